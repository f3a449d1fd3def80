"""Run one cell of a comparison in a process of its own: `python -m metier.training.cell FOLDER [--ends-with-starter]`.

The folder has `cell.json`, which says what to run; `result.json` appears in it whole, when all is measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from metier.catalogue.tree import method_of
from metier.config import POLICIES, RunConfig
from metier.config_reading import run_config_of
from metier.data.records import load_records
from metier.errors import ConfigError
from metier.evaluation.comparison.cells import RESULT, SPEC
from metier.evaluation.comparison.child import ENDS_WITH_STARTER, end_with_starter
from metier.evaluation.comparison.config import BASE, run_values
from metier.evaluation.evaluate import evaluate
from metier.evaluation.generate import encode_prompts
from metier.evaluation.tasks import TaskSpec, load_task
from metier.memory.process_memory import ProcessMemory
from metier.methods.virtual_tokens import num_virtual_tokens
from metier.methods.wrap import selects_experts
from metier.models.load import LoadedModel, load
from metier.planning.kv_cache import kv_cache
from metier.routing.configured import selection_config
from metier.routing.controls import coldest_selection, random_selection
from metier.routing.profile import profile
from metier.routing.routing_profile import RoutingProfile
from metier.routing.selection import ExpertSelection, expert_bytes, select
from metier.training.folder import package_versions
from metier.training.run import train

LATENCY_PROMPTS, LATENCY_TOKENS, LATENCY_REPEATS = 4, 24, 5


def run_cell(folder: Path) -> None:
    """Train and measure what `cell.json` says, and write `result.json`.

    Raises:
        MetierError: as a run and an evaluation raise.
    """
    started = time.monotonic()
    spec = json.loads((folder / SPEC).read_text(encoding="utf-8"))
    task = load_task(spec["cell"]["task"])
    if spec["cell"]["label"] == BASE:
        loaded = load(spec["model"], dtype=spec["run"].get("dtype", "auto"))
        found: dict[str, Any] = {}
    else:
        loaded, found = _trained(spec, task, folder)
    result = {**spec["cell"], **found, **_measured(loaded.model, loaded.tokenizer, task, spec)}
    result |= {"seconds": time.monotonic() - started, "versions": package_versions(), "hardware": hardware()}
    half = folder / f"{RESULT}.part"
    half.write_text(json.dumps(result), encoding="utf-8")
    half.replace(folder / RESULT)


def hardware() -> dict[str, Any]:
    """What a cell ran on."""
    found: dict[str, Any] = {"platform": platform.platform(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    names = Path("/proc/cpuinfo")
    if names.exists():
        lines = [line for line in names.read_text().splitlines() if line.startswith("model name")]
        found["cpu"] = lines[0].partition(":")[2].strip() if lines else platform.processor()
    return found


def _trained(spec: dict[str, Any], task: TaskSpec, folder: Path) -> tuple[LoadedModel, dict[str, Any]]:
    """The trained model, and what its training cost."""
    if "train" not in task.splits:
        raise ConfigError(f"task {task.name!r}: has no split `train`, which a comparison trains on.")
    candidate, run = spec["candidate"], folder / "run"
    values = run_values(
        {**spec["run"], "model": spec["model"]},
        {**candidate, "seed": spec["cell"]["seed"]},
        task=str(task.splits["train"]),
        folder=run,
    )
    config = run_config_of(values, where=f"compare: {candidate['label']}")
    if selects_experts(config) and config.selection is None:
        selection = _selection(config, candidate["experts"], spec, task)
        selection.save(folder / "selection.json")
        kept = {key: value for key, value in values.items() if key not in _SELECTING}
        config = run_config_of({**kept, "selection": str(folder / "selection.json")}, where=candidate["label"])
    _remove_former(run)
    result = train(config)
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    loaded = LoadedModel(model=result.model, tokenizer=result.tokenizer, source=spec["model"])
    weights = list((run / "adapter").rglob("*.safetensors"))
    found = {
        "merges": method_of(config.method).merges,
        "trained_parameters": result.plan.num_trained,
        "delta_bytes": sum(path.stat().st_size for path in weights),
        "device_peak_bytes": result.peak_memory_bytes if torch.cuda.is_available() else None,
        "host_peak_bytes": _host_peak_bytes() if torch.cuda.is_available() else result.peak_memory_bytes,
        "train_seconds": result.train_seconds,
        "step_seconds": plan["measured"]["step_seconds"],
        "foreseen_peak_bytes": plan["predicted"].get("peak_memory_bytes"),
        "foreseen_step_seconds": plan["predicted"].get("step_seconds"),
        "num_experts": None if result.selection is None else result.selection.num_selected,
    }
    _remove_weights(run)
    return loaded, found


_SELECTING = (*POLICIES, "minus_general", "profile_until_stable")
"""Keys by which experts are selected."""


def _selection(config: RunConfig, experts: str, spec: dict[str, Any], task: TaskSpec) -> ExpertSelection:
    """By the task's profile, which all cells of the task share; or as many experts by chance, or the coldest."""
    of = [spec["model"], config.dtype, str(task.splits["train"]), spec["profile_tokens"]]
    digest = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:10]
    place = Path(spec["profiles"]) / f"{Path(task.name).name}-{digest}"
    base = load(spec["model"], dtype=config.dtype)
    if not (place / "profile.json").exists():
        records = load_records(task.splits["train"])
        measured = profile(base.model, base.tokenizer, records, num_tokens=spec["profile_tokens"], max_length=512)
        # whole or not at all, for another cell may be at it too
        half = place.with_name(f"{place.name}.{os.getpid()}")
        measured.save(half)
        try:
            half.rename(place)
        except OSError:
            shutil.rmtree(half)
    measured = RoutingProfile.load(place)
    wanted = selection_config(config)
    relevant = select(measured, wanted, expert_bytes=expert_bytes(base.model) if wanted.budget_bytes else None)
    if experts == "random":
        return random_selection(relevant, num_experts=measured.num_experts, seed=config.seed)
    if experts == "coldest":
        return coldest_selection(relevant, measured, score=wanted.score)
    return relevant


def _measured(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: TaskSpec, spec: dict[str, Any]
) -> dict[str, Any]:
    """Scores on validation and test, general ability, and what a reply costs more than the base's."""
    validation = evaluate(
        model, tokenizer, task=task, split="validation", limit=spec["validation_items"], general=False, num_samples=0
    )
    test = evaluate(
        model, tokenizer, task=task, limit=spec["test_items"], general_bytes=spec["general_bytes"], cloze_items=1
    )
    assert validation.score is not None, "a task has a metric"
    assert test.score is not None, "a task has a metric"
    return {
        "validation": validation.score.value,
        "test": {"metric": test.score.metric, "score": test.score.value, "item_scores": list(test.score.item_scores)},
        "bits_per_byte": {name: loss.bits_per_byte for name, loss in test.domains.items()},
        "samples": [[sample.prompt, sample.reference, sample.reply] for sample in test.samples[:3]],
        "added_latency": _added_latency(model, tokenizer, task),
        "added_kv_bytes": _added_kv_bytes(model),
    }


def _added_latency(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: TaskSpec) -> float | None:
    """By what share a reply takes longer than with the adapter off; None where there is none to turn off."""
    if not isinstance(model, PeftModel):
        return None
    records = task.records("test", limit=LATENCY_PROMPTS)
    prompts = encode_prompts(records, tokenizer, max_new_tokens=LATENCY_TOKENS, max_length=None)
    width = min(len(prompt.token_ids) for prompt in prompts)
    ids_BT = torch.tensor([list(prompt.token_ids[-width:]) for prompt in prompts], device=model.device)
    options = {"max_new_tokens": LATENCY_TOKENS, "min_new_tokens": LATENCY_TOKENS, "do_sample": False}

    def seconds() -> float:
        begun = time.perf_counter()
        model.generate(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), pad_token_id=0, **options)
        return time.perf_counter() - begun

    model.eval()
    ratios = []
    with torch.inference_mode():
        for _ in range(LATENCY_REPEATS + 1):
            with_adapter = seconds()
            with model.disable_adapter():
                without = seconds()
            ratios.append(with_adapter / without)
    return median(ratios[1:]) - 1


def _added_kv_bytes(model: PreTrainedModel) -> int | None:
    """Of one sequence's KV cache: what virtual tokens take in it; None where a network beside has one of its own."""
    num_tokens = num_virtual_tokens(model)
    return num_tokens * kv_cache(model.config, dtype=model.dtype).token_bytes if num_tokens else num_tokens


def _host_peak_bytes() -> int | None:
    """Of a process whose run is on an accelerator."""
    if not ProcessMemory.is_known():
        return None
    memory = ProcessMemory()
    try:
        return memory.held_and_peak_bytes()[1]
    finally:
        memory.close()


def _remove_former(run: Path) -> None:
    """What a killed process has left of the same run."""
    shutil.rmtree(run, ignore_errors=True)


def _remove_weights(run: Path) -> None:
    """They are measured, and three hundred runs of them would fill a disk."""
    for path in run.rglob("*.safetensors"):
        path.unlink()


if __name__ == "__main__":
    if ENDS_WITH_STARTER in sys.argv:
        end_with_starter()
    run_cell(Path(sys.argv[1]))
