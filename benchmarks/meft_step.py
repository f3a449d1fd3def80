"""MEFT: time of a step, bytes that move, and the sparse AdamW, against dense adapters of the same width.

    python benchmarks/meft_step.py     about six minutes on two cores, alone on the machine

Layers of SmolLM2-135M's width (576) and of LLaMA-7B's (4096, two layers), 6,144 rows, 2 x 256 tokens, float32. An
adapter alone is measured, without its base: forward, backward and the optimizer's step.

What a step costs depends on how many rows it uses, and that on how alike the tokens are. For width 576 the inputs are
real: what the feed-forward block of SmolLM2-135M's layer 15 reads on English text (`smollm2.py`; left out where that
model or ../shared/data is not there). There is no LLaMA-7B here, so for 4096 they are made: normal in directions whose
variance falls as 1/k, about a common mean of a third of their energy. Independent normal inputs, which use nearly
every Key-Expert, are the worst case and are measured beside them. Adapters begin as they are made; none is trained.

The dense side is a Parallel Adapter with torch.optim.AdamW, both as torch gives it and with `fused=True`, which the
Trainer of transformers takes. Writes results/meft_step.md.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from smollm2 import feed_forward_inputs
from torch import Tensor, nn

from metier.memory import RowAdamW, RowStore
from metier.memory.row_state import add_state
from metier.memory.row_update import RowChunks, StepSettings, update_rows
from metier.memory.step_gradients import StepGradients
from metier.methods.meft.defaults import KEY_STD, meft_sizes, router_scale
from metier.methods.meft.sparse_rows import sparse_rows

RESULTS = Path(__file__).parent / "results"
R, TOKENS, ROUNDS, ACCUMULATION = 6144, 512, 5, 16
TIER_ROUNDS = {576: 81, 4096: 21}
CROSSOVER_ROWS = (256, 512, 1024, 1536, 2048, 3072, 4096, 6144)


class DenseAdapter(nn.Module):
    def __init__(self, width: int, rows: int = R) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(width, rows) * KEY_STD)
        self.values = nn.Parameter(torch.zeros(rows, width))

    def forward(self, hidden_TD: Tensor) -> Tensor:
        return (hidden_TD @ self.keys).relu() @ self.values


class SparseAdapter(nn.Module):
    def __init__(self, width: int, *, is_remote: bool = False, tier: str = "host") -> None:
        super().__init__()
        self.sizes = meft_sizes(R)
        store = RowStore(
            self.sizes.num_key_experts, self.sizes.rows_per_key_expert, width, tier=tier, is_remote=is_remote
        )
        store.rows_NMWD[:, :, 0].normal_(0, KEY_STD)
        self.store, self.gradients = store, StepGradients(store)
        self.rows = self.gradients.holder
        self.router = nn.Parameter(router_scale(self.sizes, width) * store.rows_NMWD[:, :, 0].mean(1))

    def forward(self, hidden_TD: Tensor) -> Tensor:
        gates, ids = (hidden_TD @ self.router.T).topk(self.sizes.num_active_key_experts)
        return sparse_rows(hidden_TD, ids, gates, self.gradients, top_k=self.sizes.top_k)


def independent(width: int, num: int, seed: int) -> Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed))


def correlated(width: int, num: int, seed: int) -> Tensor:
    """Normal in directions whose variance falls as 1/k about a common mean, entries of variance 1 as a norm leaves."""
    hidden_TD = normalised(independent(width, num, seed) * torch.arange(1, width + 1).float().rsqrt())
    return normalised(hidden_TD + normalised(independent(width, 1, 12345)) / 2**0.5)


def normalised(hidden_TD: Tensor) -> Tensor:
    return hidden_TD / hidden_TD.square().mean(1, keepdim=True).sqrt()


def step_of(adapters: list[nn.Module], optimizer: torch.optim.Optimizer, hidden_TD: Tensor, target_TD: Tensor):
    def step() -> None:
        inputs_TD = hidden_TD.requires_grad_()  # as inside a model, whose lower layers want a gradient
        loss = sum((adapter(inputs_TD) - target_TD).square().mean() for adapter in adapters)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        hidden_TD.grad = None

    return step


def seconds(sides: dict[str, Callable[[], None]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Every side once a round, in turn, after two rounds to warm up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 2):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            if number >= 2:
                times[name].append(time.perf_counter() - started)
    return times


def table(times: dict[str, list[float]], against: str) -> list[str]:
    base = statistics.median(times[against])
    lines = ["| side | median | range | of the dense one |", "|-|-|-|-|"]
    for name, values in times.items():
        median = statistics.median(values)
        spread = f"{1e3 * min(values):.1f} to {1e3 * max(values):.1f}"
        lines.append(f"| {name} | {1e3 * median:.1f} ms | {spread} | {median / base:.2f} |")
    print("\n".join(lines), flush=True)
    return [*lines, ""]


def step_part(width: int, num_layers: int, inputs: dict[str, Tensor]) -> list[str]:
    lines = [f"## Step, width {width}, {num_layers} layer{'s' if num_layers > 1 else ''}", ""]
    for name, hidden_TD in inputs.items():
        target_TD = independent(width, TOKENS, 9)
        sides, stores = {}, []
        for label, options in (("dense", {}), ("dense, fused AdamW", {"fused": True})):
            dense = [DenseAdapter(width) for _ in range(num_layers)]
            parameters = [p for adapter in dense for p in adapter.parameters()]
            optimizer = torch.optim.AdamW(parameters, lr=1e-4, **options)
            sides[label] = step_of(dense, optimizer, hidden_TD.clone(), target_TD)
        for tier in ("host", "device"):
            torch.manual_seed(0)  # the same rows
            sparse = [SparseAdapter(width, tier=tier) for _ in range(num_layers)]
            optimizer = RowAdamW([p for adapter in sparse for p in adapter.parameters()], lr=1e-4)
            sides[f"MEFT, {tier}"] = step_of(sparse, optimizer, hidden_TD.clone(), target_TD)
            stores += [adapter.store for adapter in sparse]
        times = seconds(sides)
        taken = [store.meter.take() for store in stores]
        used = statistics.mean(m.num_blocks_used for m in taken) / (ROUNDS + 2) / stores[0].num_blocks
        updated = statistics.mean(m.num_rows_updated for m in taken) / (ROUNDS + 2) / R
        lines += [f"{name}: {used:.0%} of Key-Experts used, {updated:.0%} of rows updated a step", ""]
        lines += table(times, "dense")
    return lines


def tiers_part(width: int, hidden_TD: Tensor, rounds: int) -> list[str]:
    """The same adapter on the host and on the device, which on a CPU are one memory, in turn."""
    sides = {}
    for tier in ("host", "device"):
        torch.manual_seed(0)
        sparse = SparseAdapter(width, tier=tier)
        optimizer = RowAdamW(sparse.parameters(), lr=1e-4)
        sides[tier] = step_of([sparse], optimizer, hidden_TD.clone(), independent(width, TOKENS, 9))
    times = seconds(sides, rounds)
    ratios = [host / device for host, device in zip(times["host"], times["device"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    medians = statistics.median(times["host"]) / statistics.median(times["device"])
    line = (
        f"One layer, width {width}: the host's step takes {medians:.3f} of the device's by the medians of {rounds} "
        f"rounds, {middle:.3f} by the median of the rounds' ratios (quarters: {low:.3f} to {high:.3f})."
    )
    print(line, flush=True)
    return [line, ""]


def crossover_part(width: int, hidden_TD: Tensor) -> list[str]:
    """Dense adapters of fewer rows against MEFT's: which is as fast, and which takes as much of a device."""
    target_TD = independent(width, TOKENS, 9)
    sparse = SparseAdapter(width)
    meft = f"MEFT, {R:,} rows"
    optimizer: torch.optim.Optimizer = RowAdamW(sparse.parameters(), lr=1e-4)
    sides = {meft: step_of([sparse], optimizer, hidden_TD.clone(), target_TD)}
    for rows in CROSSOVER_ROWS:
        dense = DenseAdapter(width, rows)
        optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-4, fused=True)
        sides[f"dense, {rows:,} rows"] = step_of([dense], optimizer, hidden_TD.clone(), target_TD)
    times = {name: statistics.median(values) for name, values in seconds(sides).items()}
    used = sparse.store.meter.take().num_blocks_used / (ROUNDS + 2) / sparse.store.num_blocks
    # trained numbers, their gradients and moments; of MEFT's rows, which are elsewhere, those used and gradients
    taken = {name: 16 * 2 * width * rows for name, rows in zip(list(sides)[1:], CROSSOVER_ROWS, strict=True)}
    taken[meft] = round(8 * used * 2 * width * R) + 16 * sparse.router.numel()
    lines = ["| side | step | of MEFT's | on the device | of MEFT's |", "|-|-|-|-|-|"]
    for name, took in times.items():
        lines.append(
            f"| {name} | {1e3 * took:.1f} ms | {took / times[meft]:.2f} "
            f"| {taken[name] / 1e6:.0f} MB | {taken[name] / taken[meft]:.2f} |"
        )
    print("\n".join(lines), flush=True)
    return [*lines, ""]


def bytes_part(width: int, batches: list[Tensor]) -> list[str]:
    """What moves where the device cannot address the store: one micro-batch, and a step of sixteen."""
    rows = []
    for num in (1, ACCUMULATION):
        adapter = SparseAdapter(width, is_remote=True)
        adapter_bytes = adapter.store.arrays["rows"].nbytes
        optimizer = RowAdamW(adapter.parameters(), lr=1e-4)
        for micro in range(num):
            adapter(batches[micro].clone().requires_grad_()).sum().backward()
        optimizer.step()
        meter = adapter.store.meter.take()
        there, back = meter.bytes_to_device / adapter_bytes, meter.bytes_from_device / adapter_bytes
        rows.append(f"| {num} | {there:.2f} P | {back:.2f} P | {there + back:.2f} P | {0.56 * num:.2f} P |")
    lines = ["| micro-batches | to the device | back | both | 0.56 P for each |", "|-|-|-|-|-|", *rows]
    print("\n".join(lines), flush=True)
    return [*lines, ""]


def adamw_part(width: int = 4096, share: float = 0.26) -> list[str]:
    store = RowStore(R // 32, 32, width)
    store.rows_NMWD.normal_()
    add_state(store, "float32")
    chunks = RowChunks(store, "float32")
    generator = torch.Generator().manual_seed(0)
    row_ids = torch.randperm(R, generator=generator)[: int(share * R)].sort().values
    grads = torch.randn(len(row_ids), 2 * width, generator=generator)
    places = torch.arange(len(row_ids))
    sides: dict[str, Callable[[], None]] = {}
    for label, options in (("dense", {}), ("dense, fused", {"fused": True})):
        parameter = nn.Parameter(torch.randn(R, 2 * width))
        parameter.grad = torch.randn(R, 2 * width)
        sides[label] = torch.optim.AdamW([parameter], lr=1e-4, **options).step
    sides[f"{share:.0%} of rows"] = lambda: update_rows(
        chunks, row_ids, grads, places, StepSettings(1e-4, 0.01), seed=0
    )
    lines = [f"## AdamW over {R} rows of width {width} (key and value)", ""]
    return lines + table(seconds(sides, rounds=9), "dense")


def main() -> None:
    torch.manual_seed(0)
    lines = ["# MEFT: steps, bytes, AdamW", "", "    python benchmarks/meft_step.py", ""]
    lines += [(__doc__ or "").split("\n\n", 2)[2].strip(), ""]
    capability = torch.backends.cpu.get_cpu_capability()
    lines += [f"torch {torch.__version__}, {torch.get_num_threads()} threads, {capability}.", ""]
    lines += adamw_part()
    real = feed_forward_inputs(ACCUMULATION)
    tiers = ["## Tiers: host and device are one memory here, and the same rows", ""]
    for width, num_layers in ((576, 1), (4096, 2)):
        made = [correlated(width, TOKENS, 100 + micro) for micro in range(ACCUMULATION)]
        micro_batches = {"real": real} if width == 576 and real is not None else {"made": made}
        ((name, batches),) = micro_batches.items()
        lines += step_part(width, num_layers, {name: batches[0], "independent": independent(width, TOKENS, 1)})
        lines += [f"One layer, {name} inputs, against dense adapters of fewer rows (fused AdamW):", ""]
        lines += crossover_part(width, batches[0])
        tiers += tiers_part(width, batches[0], TIER_ROUNDS[width])
        lines += [f"Bytes that move, of the adapter's P, {name} inputs:", "", *bytes_part(width, batches)]
    (RESULTS / "meft_step.md").write_text("\n".join([*lines, *tiers]))


if __name__ == "__main__":
    main()
