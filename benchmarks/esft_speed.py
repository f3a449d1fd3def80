"""Speed of ESFT: a training step against the bare forward pass and against every other way to train the same model.

    python benchmarks/esft_speed.py [--rounds 3]         about 25 minutes on two cores; writes results/esft_speed.md
    python benchmarks/esft_speed.py --memory             two minutes; writes results/esft_memory.md

The model is OLMoE-shaped (hidden size 1024, 64 experts of 512, top-8, bf16) with four layers, the batch 4 x 512 tokens,
another one each step; 6 or 16 experts a layer are trained. Every side runs in processes of its own, in turn. AdamW is
torch's fused one everywhere, and glibc keeps its memory.

`published loop` is how ESFT's own code runs experts: one module an expert, a Python loop over all of them, and autograd
over everything. `forward` is one forward pass without gradients, on transformers' fastest backend. `batched_mm` is left
out: it gathers a copy of the weights for each token, 48 GiB a layer here.

What ESFT's memory is made of is counted apart: gradients, AdamW's moments, and every tensor that autograd keeps between
the passes (once, however often it is kept, parameters aside).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path

from step_time import MALLOC, batch, busiest, check_parity, olmoe

RESULTS = Path(__file__).parent / "results" / "esft_speed.md"
MEMORY_RESULTS = RESULTS.with_name("esft_memory.md")
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
"""glibc gives every block of a megabyte back to the system as soon as it is freed."""
LAYERS, WARMUP, STEPS = 4, 3, 5
SIDES = (
    "forward",
    "esft 6",
    "esft 16",
    "esft 6, checkpointing",
    "esft 6, compiled",
    "expert LoRA 6",
    "expert LoRA 16",
    "published loop 6",
    "published loop 16",
    "LoRA on attention",
    "LoRA on experts",
    "full, grouped_mm",
    "full, eager",
)


def build(side: str):
    """The side's model, wanting gradients where the method trains."""
    import peft

    from metier.methods.esft import EsftConfig
    from metier.methods.expert_lora import ExpertLoraConfig

    model = olmoe(LAYERS, "eager" if "eager" in side else "grouped_mm")
    words = side.replace(",", "").split()
    number = next((int(word) for word in words if word.isdigit()), 0)
    if side.startswith("esft"):
        model = peft.get_peft_model(model, EsftConfig(experts=busiest(model, number)))
    elif side.startswith("expert LoRA"):
        model = peft.get_peft_model(model, ExpertLoraConfig(experts=busiest(model, number), r=8))
    elif side.startswith("published loop"):
        use_loops(model, busiest(model, number))
    elif side == "LoRA on attention":
        names = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=names))
    elif side == "LoRA on experts":
        names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        options = {"r": 8, "lora_alpha": 16, "target_modules": [], "target_parameters": names}
        model = peft.get_peft_model(model, peft.LoraConfig(**options))
    model.train()
    if "checkpointing" in words:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if "compiled" in words:
        model.compile()
    return model


def use_loops(model, experts: dict[int, list[int]]) -> None:
    """Replace every layer's stacked experts by one module an expert in a loop, of which the chosen ones are trained."""
    import torch
    from torch import nn

    class LoopedExperts(nn.Module):
        def __init__(self, stacked, chosen: list[int]) -> None:
            super().__init__()
            self.experts = nn.ModuleList()
            for number in range(stacked.num_experts):
                gate, up = stacked.gate_up_proj[number].detach().chunk(2)
                expert = nn.Module()
                for name, weight in (("gate", gate), ("up", up), ("down", stacked.down_proj[number].detach())):
                    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
                    linear.weight = nn.Parameter(weight.clone(), requires_grad=number in chosen)
                    expert.add_module(name, linear)
                self.experts.append(expert)

        def forward(self, hidden, expert_ids, weights):
            out = torch.zeros_like(hidden)
            for number, expert in enumerate(self.experts):
                tokens, slots = (expert_ids == number).nonzero(as_tuple=True)
                if len(tokens):
                    rows = hidden[tokens]
                    rows = expert.down(nn.functional.silu(expert.gate(rows)) * expert.up(rows))
                    out.index_add_(0, tokens, rows * weights[tokens, slots, None].to(rows.dtype))
            return out

    model.requires_grad_(False)
    for index, layer in enumerate(model.model.layers):
        layer.mlp.experts = LoopedExperts(layer.mlp.experts, experts[index])


def measure(side: str) -> dict[str, object]:
    """One process' part: seconds a step, how far peak memory rose, and for ESFT what has to exist."""
    import torch

    model = build(side)
    trained = [p for p in model.parameters() if p.requires_grad]
    if side == "forward":
        with torch.no_grad():
            seconds = [timed(lambda step=step: model(input_ids=batch(step))) for step in range(WARMUP + STEPS)]
        return {"seconds": seconds[WARMUP:], "growth_bytes": 0, "trained": 0}
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.1, fused=True)
    loaded = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def step(number: int) -> None:
        ids = batch(number)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = [timed(lambda number=number: step(number)) for number in range(WARMUP + STEPS)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {"seconds": seconds[WARMUP:], "growth_bytes": peak - loaded, "trained": sum(p.numel() for p in trained)}
    if side in ("esft 6", "esft 16"):
        result["must_exist"] = must_exist(model, trained)
        result["tensors_peak"] = tensors_peak(lambda: step(0)) + result["must_exist"]["AdamW's moments"]
    return result


def tensors_peak(run) -> int:
    """Most bytes that tensors made in a step hold at once, as torch's allocator counts them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def must_exist(model, trained) -> dict[str, int]:
    """Bytes that a step needs beside the loaded model (which has the masters already)."""
    import torch

    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = batch(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    del loss
    state = sum(p.numel() * p.element_size() for p in trained)
    return {"gradients": state, "AdamW's moments": 2 * state, "kept for the backward pass": sum(kept.values())}


def parity() -> None:
    """ESFT with a zero delta has the base's logits to the bit, and the loop its own up to rounding."""
    import torch

    model, ids = olmoe(LAYERS, "grouped_mm").eval(), batch()
    with torch.no_grad():
        want = model(input_ids=ids).logits
        assert torch.equal(build("esft 6").eval()(input_ids=ids).logits, want), "a zero delta moved a logit"
        looped = build("published loop 6").eval()(input_ids=ids).logits
    # bf16: another rounding may send a token to another expert, so the mean is compared
    difference = (looped.float() - want.float()).abs().mean() / want.float().std()
    assert difference < 0.05, f"the published loop's logits are off by {difference:.3f} of their spread"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="what ESFT's memory is made of, instead")
    parser.add_argument("--parity", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        # an error that is counted, not a kill that takes the benchmark along
        resource.setrlimit(resource.RLIMIT_DATA, (args.limit, args.limit))
        print(json.dumps(measure(args.side)))
        return
    if args.memory:
        MEMORY_RESULTS.write_text(memory_report())
        print(MEMORY_RESULTS.read_text())
        return
    if args.parity:
        parity()
        return
    check_parity(__file__)
    runs: dict[str, list[dict]] = {side: [] for side in SIDES}
    too_large: dict[str, float] = {}
    for _ in range(args.rounds):
        for side in SIDES:
            if side in too_large:
                continue
            limit = int(0.95 * available_bytes())
            command = [sys.executable, __file__, "--side", side, "--limit", str(limit)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **MALLOC})
            if "not enough memory" in done.stderr or "Cannot allocate memory" in done.stderr:
                too_large[side] = limit / 2**30
                print(side, f"needs more than {limit / 2**30:.1f} GiB", flush=True)
                continue
            if done.returncode:
                sys.exit(f"{side}: {done.stderr[-2000:]}")
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(side, [round(s, 3) for s in runs[side][-1]["seconds"]], flush=True)
    RESULTS.write_text(report({side: parts for side, parts in runs.items() if parts}, args.rounds, too_large))
    print(RESULTS.read_text())


def memory_report() -> str:
    """What the process takes against what tensors take, with an allocator that keeps memory and one that does not."""
    lines = ["# Memory of ESFT", "", "    python benchmarks/esft_speed.py --memory", ""]
    lines += [
        "The model and the steps of [esft_speed.md](esft_speed.md). A process takes more than its tensors do: glibc",
        "keeps freed blocks for later ones, which do not always fit. In bytes that must exist: gradients and moments",
        "of the selected rows, and what autograd keeps. They do not all exist at once, so tensors can stay below.",
        "",
        "| side | glibc | median s | must exist, MiB | tensors at most | process at most |",
        "|-|-|-|-|-|-|",
    ]
    for side in ("esft 6", "esft 16"):
        for name, settings in (("keeps memory", MALLOC), ("gives large blocks back", GIVES_BACK)):
            command = [sys.executable, __file__, "--side", side, "--limit", str(available_bytes())]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **settings})
            found = json.loads(done.stdout.splitlines()[-1])
            must = sum(found["must_exist"].values())
            shares = [f"{v / 2**20:,.0f} MiB, {v / must:.2f}" for v in (found["tensors_peak"], found["growth_bytes"])]
            seconds = statistics.median(found["seconds"])
            lines.append(f"| {side} | {name} | {seconds:.2f} | {must / 2**20:,.0f} | {shares[0]} | {shares[1]} |")
    return "\n".join([*lines, ""])


def available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def report(runs: dict[str, list[dict]], rounds: int, too_large: dict[str, float]) -> str:
    seconds = {side: [s for run in parts for s in run["seconds"]] for side, parts in runs.items()}
    middle = {side: statistics.median(values) for side, values in seconds.items()}
    growth = {side: statistics.median(run["growth_bytes"] for run in parts) for side, parts in runs.items()}
    rows = [
        f"| {side} | {middle[side]:.3f} | {min(values):.3f} to {max(values):.3f} "
        f"| {middle[side] / middle['forward']:.2f} | {middle[side] / middle['esft 6']:.2f} "
        f"| {growth[side] / 2**20:,.0f} | {runs[side][0]['trained']:,} |"
        for side, values in seconds.items()
    ]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    lines = [
        "# Speed of ESFT",
        "",
        "    python benchmarks/esft_speed.py",
        "",
        (__doc__ or "").split("\n\n", 2)[2].strip(),
    ]
    lines += [
        "",
        f"{packages}; {os.cpu_count()} cores. {rounds} rounds of {STEPS} steps after {WARMUP}, sides in turn.",
    ]
    lines += ["", "| side | median s | range | times the forward pass | times ESFT 6 | peak growth, MiB | trained |"]
    lines += ["|-|-|-|-|-|-|-|", *rows, ""]
    lines += [f"{side}: did not fit into {limit:.1f} GiB of free memory.\n" for side, limit in too_large.items()]
    others = [side for side in runs if not side.startswith(("esft", "expert LoRA", "forward"))]
    goals = [
        ("a step of ESFT 6 in forward passes", middle["esft 6"] / middle["forward"], "at most 2.4", 2.4),
        ("a step of ESFT 16 in forward passes", middle["esft 16"] / middle["forward"], "at most 2.4", 2.4),
        ("ESFT 6 against the fastest other side", middle["esft 6"] / min(middle[s] for s in others), "under 1", 1.0),
    ]
    for side in ("esft 6", "esft 16"):
        parts = runs[side][0]["must_exist"]
        share = growth[side] / sum(parts.values())
        goals.append((f"peak growth of {side} in bytes that must exist", share, "at most 1.1", 1.1))
        listed = "; ".join(f"{name} {value / 2**20:,.0f} MiB" for name, value in parts.items())
        lines.append(f"{side}: {listed}.")
    lines += ["", "| goal | measured | wanted | met |", "|-|-|-|-|"]
    lines += [f"| {n} | {value:.2f} | {wish} | {'yes' if value <= most else 'no'} |" for n, value, wish, most in goals]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
