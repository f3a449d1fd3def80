"""Memory and time of training 0.5% of a model's entries in place, against full fine-tuning.

    python benchmarks/sparse_delta.py

A random LLaMA of 80 million parameters in float32, batches of 4 × 128 tokens, AdamW. The sparse delta trains 0.5% of
the entries of all linear layers (magnitude_smallest, whose choice is timed beside it). Each side runs in a process of
its own, in turn with the others, three times; peaks are the process's, from the first step on, all that it holds
included, and glibc keeps memory as by default. Times are medians of all steps but the first of each process, and their
range: the machine had other work, so that the shortest steps say more of a side than its median. Before that a small
model is trained both ways, and has to move alike. Writes results/sparse_delta.md.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from metier.memory.process_memory import ProcessMemory
from metier.methods.sparse_delta import SparseDeltaConfig, SparseDeltaLayer

RESULTS = Path(__file__).parent / "results"
SIZES = {
    "vocab_size": 8192, "hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 14,
    "num_attention_heads": 10, "num_key_value_heads": 10,
}  # fmt: skip
SMALL = {**SIZES, "vocab_size": 64, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2}
BATCH, LENGTH, STEPS, ROUNDS, DENSITY, RATE = 4, 128, 4, 3, 0.005, 1e-4
SIDES = ("full fine-tuning", "sparse delta", "sparse delta, checkpointed", "full fine-tuning, checkpointed")


def model_of(sizes: dict[str, int]) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.float32).train()


def tokens(seed: int, vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


def step(model: Any, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> None:
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def check_parity() -> None:
    """A sparse delta moves as full fine-tuning with a masked gradient does."""
    sparse, dense = peft.get_peft_model(model_of(SMALL), SparseDeltaConfig(density=0.05)), model_of(SMALL)
    entries = sparse.peft_config["default"].entries
    dense.requires_grad_(False)
    chosen = {name: parameter.requires_grad_() for name, parameter in dense.named_parameters() if name in entries}
    options = {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.0}
    sides = (
        (sparse, torch.optim.AdamW([p for p in sparse.parameters() if p.requires_grad], **options)),
        (dense, torch.optim.AdamW(chosen.values(), **options)),
    )
    for number in range(3):
        batch = tokens(number, SMALL["vocab_size"])
        for model, optimizer in sides:
            model(input_ids=batch, labels=batch).loss.backward()
            for name, parameter in chosen.items() if model is dense else ():
                mask = torch.zeros(parameter.numel())
                mask[entries[name].long()] = 1
                parameter.grad.mul_(mask.view_as(parameter))
            optimizer.step()
            optimizer.zero_grad()
    merged = sparse.merge_and_unload()
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), parameter, rtol=0, atol=1e-5)


def run(side: str) -> dict[str, Any]:
    """One process: peak from the first step on, and each step's time."""
    model, memory = model_of(SIZES), ProcessMemory()
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "choosing": 0.0}
    if side.startswith("sparse"):
        started = time.perf_counter()
        model = peft.get_peft_model(model, SparseDeltaConfig(density=DENSITY))
        found["choosing"] = time.perf_counter() - started
    if side.endswith("checkpointed"):
        inner = model.get_base_model() if side.startswith("sparse") else model
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    found["before"] = memory.held_and_peak_bytes()[0]
    found["times"] = []
    for number in range(STEPS + 1):
        batch = tokens(number, SIZES["vocab_size"])
        started = time.perf_counter()
        step(model, optimizer, batch)
        if number:
            found["times"].append(time.perf_counter() - started)
    found["peak"] = memory.held_and_peak_bytes()[1]
    found["trained"] = sum(parameter.numel() for parameter in trainable)
    layers = [module for module in model.modules() if isinstance(module, SparseDeltaLayer)]
    started = time.perf_counter()
    for layer in layers:
        for place in layer.places.values():
            place.values_may_have_moved()
        layer.show()
    found["writing"] = time.perf_counter() - started
    return found


def measured() -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(ROUNDS):
        for side in SIDES:
            command = [sys.executable, __file__, side]
            done = subprocess.run(command, env=os.environ, stdout=subprocess.PIPE, text=True, check=True)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def rows_of(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    rows = ["| side | trained | peak | of full | step | of full | least of least |", "|-|-|-|-|-|-|-|"]
    for side, runs in found.items():
        whole = found["full fine-tuning" + (", checkpointed" if side.endswith("checkpointed") else "")]
        peak, whole_peak = (statistics.median(x["peak"] for x in these) for these in (runs, whole))
        times, whole_times = ([t for x in these for t in x["times"]] for these in (runs, whole))
        median = statistics.median(times)
        rows.append(
            f"| {side} | {runs[0]['trained']:,} | {peak / 2**20:,.0f} MiB | {peak / whole_peak:.2f} | "
            f"{median:.2f} s ({min(times):.2f} to {max(times):.2f}) | {median / statistics.median(whole_times):.2f} | "
            f"{min(times) / min(whole_times):.2f} |"
        )
    return rows


def main() -> None:
    if sys.argv[1:]:
        print(json.dumps(run(sys.argv[1])))
        return
    check_parity()
    found = measured()
    sparse = found["sparse delta"]
    choosing, writing = (statistics.median(x[name] for x in sparse) for name in ("choosing", "writing"))
    lines = ["# A sparse delta in place", "", "    python benchmarks/sparse_delta.py", ""]
    lines += [(__doc__ or "").split("\n\n", 2)[2].strip(), ""]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    lines += [f"{packages}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}.", ""]
    lines += [*rows_of(found), ""]
    lines += [
        f"Choosing the entries took {choosing:.1f} s, once. Writing all of them into the weights takes "
        f"{writing * 1e3:.0f} ms, {writing / statistics.median(t for x in sparse for t in x['times']):.1%} of a step.",
        f"The process held {sparse[0]['before'] / 2**20:,.0f} MiB before the first step, of which the weights are "
        f"{sparse[0]['parameters'] * 4 / 2**20:,.0f} MiB.",
    ]
    (RESULTS / "sparse_delta.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
