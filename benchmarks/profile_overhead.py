"""What a routing profile costs over the bare forward pass; the claim is at most 5% more time.

    python benchmarks/profile_overhead.py [--repeats 25] [--num-batches 2]

Both sides run the same model on the same tokens in one process, by turns, so that a slow minute of the
machine hits both. First it is checked that the profile counts exactly what the routers return. The profile's
side is all of `count_sequences`: finding the layers, hooking, counting, hashing the routers. Writes
results/profile_overhead.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedModel

from metier.models.moe import moe_layers
from metier.routing.capture import evaluating
from metier.routing.profile import count_sequences

RESULT = Path(__file__).parent / "results" / "profile_overhead.md"
BATCH_SIZE, SEQUENCE_LENGTH = 4, 512


def olmoe_shaped() -> PreTrainedModel:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=50_304,
        hidden_size=1024,
        intermediate_size=512,
        num_experts=64,
        num_experts_per_tok=8,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=16,
        pad_token_id=1,
    )
    return OlmoeForCausalLM._from_config(config, dtype=torch.bfloat16)


def bare_forward(model: PreTrainedModel, ids_NS: Tensor) -> None:
    with evaluating(model):
        for ids_BS in ids_NS.split(BATCH_SIZE):
            model(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS), use_cache=False, logits_to_keep=1)


def check_parity(model: PreTrainedModel, ids_NS: Tensor) -> None:
    """The counts of a profile are those of the ids that the routers return."""
    ids_BS = ids_NS[:BATCH_SIZE]
    chosen: list[Tensor] = []
    handles = [
        model.get_submodule(str(layer.router_path)).register_forward_hook(
            lambda module, args, output: chosen.append(output[2])
        )
        for layer in moe_layers(model)
    ]
    bare_forward(model, ids_BS)
    for handle in handles:
        handle.remove()
    counted_LE = count_sequences(model, ids_BS, batch_size=BATCH_SIZE).token_counts_HLE.sum(dim=0)
    for counted_E, ids_TK in zip(counted_LE, chosen, strict=True):
        assert counted_E.tolist() == [int((ids_TK == expert).sum()) for expert in range(64)], "counts differ"


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def hardware() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else [])
        if line.startswith("model name")
    ]
    cpu = names[0] if names else platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores, {cpu}, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--num-batches", type=int, default=2)
    arguments = parser.parse_args()
    model = olmoe_shaped()
    ids_NS = torch.randint(2, 50_000, (arguments.num_batches * BATCH_SIZE, SEQUENCE_LENGTH))
    check_parity(model, ids_NS)
    sides = {
        "bare forward": lambda: bare_forward(model, ids_NS),
        "profile": lambda: count_sequences(model, ids_NS, batch_size=BATCH_SIZE),
    }
    for run in sides.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(arguments.repeats):
        # by turns first and second: what runs second may find warmer caches
        for name in sorted(sides, reverse=bool(repeat % 2)):
            times[name].append(seconds(sides[name]))
    ratios = [b / a for a, b in zip(times["bare forward"], times["profile"], strict=True)]
    report(times, ratios, arguments, num_tokens=ids_NS.numel())


def report(
    times: dict[str, list[float]], ratios: list[float], arguments: argparse.Namespace, *, num_tokens: int
) -> None:
    rows = [
        f"| {name} | {statistics.median(t):.3f} | {min(t):.3f} to {max(t):.3f} "
        f"| {num_tokens / statistics.median(t):,.0f} |"
        for name, t in times.items()
    ]
    overhead = statistics.median(times["profile"]) / statistics.median(times["bare forward"]) - 1
    pairs = sorted(ratio - 1 for ratio in ratios)
    text = f"""# Cost of a routing profile

`python benchmarks/profile_overhead.py --repeats {arguments.repeats} --num-batches {arguments.num_batches}`

OLMoE-shaped model: hidden 1024, 64 experts of 512, top-8, 2 layers, bfloat16; {arguments.num_batches}
batches of {BATCH_SIZE} x {SEQUENCE_LENGTH} tokens; {arguments.repeats} repeats by turns. Both sides compute
the last position's logits only. The counts were checked against the routers' own output first.

| | median seconds | range | tokens/s |
|---|---|---|---|
{chr(10).join(rows)}

Overhead of the medians: **{overhead:+.1%}** (claim: at most +5%). Pair by pair: median
{statistics.median(pairs):+.1%}, range {pairs[0]:+.1%} to {pairs[-1]:+.1%}.

{hardware()}; Python {platform.python_version()}, torch {torch.__version__},
transformers {transformers.__version__}.
"""
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
