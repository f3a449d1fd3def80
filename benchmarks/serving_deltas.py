"""Bases and deltas for the serving benchmarks: the embedded model with deltas of its tasks' experts; an OLMoE shape.

What the deltas answer does not matter here, what they cost does: the embedded model's replace the experts that a task's
real profile selects (top_p 0.2, as ESFT's paper has it), and each has rows of its own, moved as far as training moves
them. The OLMoE-shaped model is random, and so are its deltas' experts.
"""

from __future__ import annotations

from pathlib import Path

from step_time import olmoe

TASKS = ("synopsis", "translate", "sections")
STEP = 0.02
"""By which a value of a row is moved on average; training moves the embedded model's rows about as far."""


def embedded_deltas(folder: Path, num: int, *, top_p: float = 0.2, step: float = STEP):
    """The embedded model in float32, and `num` deltas of it in `folder`, whose values moved by `step` on average."""
    import metier
    from metier.data.records import load_records
    from metier.evaluation.tasks import load_task

    loaded = metier.load("embedded", dtype="float32")
    selections = []
    for task in TASKS:
        records = load_records(load_task(task).splits["train"])
        profile = metier.profile(loaded.model, loaded.tokenizer, records, num_tokens=32_768, max_length=512)
        selections.append(metier.select(profile, metier.SelectionConfig(score="token", top_p=top_p)))
    for number in range(num):
        experts = {layer: list(ids) for layer, ids in selections[number % len(TASKS)].experts.items()}
        _save(loaded.model, experts, folder / f"delta-{number:02d}", seed=number, step=step)
    return loaded


def olmoe_deltas(folder: Path, num: int, *, layers: int, experts_per_layer: int, dtype: str):
    """An OLMoE-shaped model in `folder/base`, and `num` deltas of it beside it."""
    import torch

    import metier

    model = olmoe(layers, "grouped_mm").to(getattr(torch, dtype))
    model.save_pretrained(folder / "base")
    metier.load("embedded").tokenizer.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(0)
    for number in range(num):
        chosen = [torch.randperm(64, generator=generator)[:experts_per_layer].tolist() for _ in range(layers)]
        experts = {layer: sorted(ids) for layer, ids in enumerate(chosen)}
        _save(model, experts, folder / f"delta-{number:02d}", seed=number)


def _save(model, experts: dict[int, list[int]], folder: Path, *, seed: int, step: float = STEP) -> None:
    import peft
    import torch

    from metier.deltas.save import save_delta
    from metier.methods.esft import EsftConfig

    wrapped = peft.get_peft_model(model, EsftConfig(experts=experts))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "esft_" in name:
                parameter.add_(step * torch.randn(parameter.shape, generator=generator))
    save_delta(wrapped, folder)
    wrapped.unload()
