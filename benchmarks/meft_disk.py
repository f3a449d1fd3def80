"""MEFT with rows on disk: an adapter larger than the memory it is given, against the same one in memory.

    python benchmarks/meft_disk.py [--folder FOLDER]     about ten minutes on two cores, as root on Linux, 16 GB of disk

Ten layers of LLaMA-7B's width (4096), 6,144 rows each, 512 tokens, float32, the adapter alone: its rows and AdamW's two
moments take 6.0 GB, the step's gradients up to 2 GB more. The side on disk runs in a memory control group of 2.5 GB
that has no swap: what it holds, files included, cannot be more. The side in memory has the machine's.

Two kinds of input. *Alike*: tokens that share most of what they are, so that a step uses some Key-Experts only and what
it needs fits into the memory. *Independent*: tokens that use all, so that the disk is read and written all the time.
The disk's own bandwidth is measured beside it, past the system's cache, reading and writing one file each and both at
once. Both sides run with MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ (glibc keeps its memory) and
OMP_WAIT_POLICY=passive. Writes results/meft_disk.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
LIMIT_BYTES = 2_500_000_000
WIDTH, R, TOKENS, LAYERS = 4096, 6144, 512, 10
COMMON = 6.0
"""How much larger the common part of tokens that are alike is than what sets them apart."""
STEPS, WARM_UP = 7, 3
CHUNK, CHUNKS = 8 << 20, 300
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


def disk_bytes() -> tuple[int, int]:
    """Read from and written to the disk by this process, cache hits not counted."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"]), int(fields["write_bytes"])


def own_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def train(tier: str, inputs: str, folder: str) -> None:
    """One side, in a process of its own: prints a line of JSON a step."""
    import torch
    from torch import Tensor, nn

    from metier.memory import RowAdamW, RowStore
    from metier.memory.clipping import clip_grad_norm_
    from metier.memory.row_store import link
    from metier.memory.step_gradients import StepGradients
    from metier.methods.meft.defaults import KEY_STD, meft_sizes, router_scale
    from metier.methods.meft.sparse_rows import sparse_rows

    sizes = meft_sizes(R)

    class Adapter(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            shape, name = (sizes.num_key_experts, sizes.rows_per_key_expert, WIDTH), f"layer-{number}"
            self.store = RowStore(*shape, tier=tier, folder=folder, name=name)
            self.router = nn.Parameter(torch.empty(sizes.num_key_experts, WIDTH))
            for block in range(sizes.num_key_experts):
                keys_MD = self.store.rows_NMWD[block, :, 0].normal_(0, KEY_STD)
                self.store.changed([block])
                self.router.data[block] = router_scale(sizes, WIDTH) * keys_MD.mean(0)
            self.gradients = StepGradients(self.store)
            self.rows = self.gradients.holder

        def forward(self, hidden_TD: Tensor) -> Tensor:
            gates, ids = (hidden_TD @ self.router.T).topk(sizes.num_active_key_experts)
            return sparse_rows(hidden_TD, ids, gates, self.gradients, top_k=sizes.top_k)

    def normal(num: int, seed: int) -> Tensor:
        return torch.randn(num, WIDTH, generator=torch.Generator().manual_seed(seed))

    torch.manual_seed(0)
    layers = nn.ModuleList(Adapter(number) for number in range(LAYERS))
    link([layer.store for layer in layers])
    optimizer = RowAdamW(layers.parameters(), lr=1e-4)
    for step in range(STEPS):
        hidden_TD = normal(TOKENS, step) + (COMMON * normal(1, 12345) if inputs == "alike" else 0)
        hidden_TD = (hidden_TD / hidden_TD.square().mean(1, keepdim=True).sqrt()).requires_grad_()
        target_TD = normal(TOKENS, 99)
        started, (read, written) = time.perf_counter(), disk_bytes()
        for layer in layers:
            hidden_TD = hidden_TD + layer(hidden_TD)
        loss = (hidden_TD - target_TD).square().mean()
        loss.backward()
        clip_grad_norm_(layers.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meters = [layer.store.meter.take() for layer in layers]
        row = {
            "seconds": time.perf_counter() - started,
            "read": disk_bytes()[0] - read,
            "written": disk_bytes()[1] - written,
            "used": sum(meter.num_blocks_used for meter in meters) / LAYERS / sizes.num_key_experts,
            "stall": sum(meter.stall_seconds for meter in meters),
            "own": own_bytes(),
            "loss": float(loss),
        }
        print(json.dumps(row), flush=True)


@contextmanager
def limited(limit: int):
    """A memory control group; yields its folder and where its peak is to be read."""
    root = Path("/sys/fs/cgroup")
    is_first = (root / "memory").is_dir()
    group = (root / "memory" if is_first else root) / f"metier-{os.getpid()}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if is_first else "memory.max")).write_text(str(limit))
    if not is_first:
        (group / "memory.swap.max").write_text("0")
    try:
        yield group, group / ("memory.max_usage_in_bytes" if is_first else "memory.peak")
    finally:
        group.rmdir()


def side(tier: str, inputs: str, folder: Path) -> tuple[list[dict], int]:
    """The steps after those to warm up, and the group's peak (0 without one)."""
    command = [sys.executable, __file__, "--side", tier, inputs, "--folder", str(folder)]
    environment = {**os.environ, **KEEP_MEMORY, "OMP_WAIT_POLICY": "passive"}
    if tier == "host":
        text, peak = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout, 0
    else:
        with limited(LIMIT_BYTES) as (group, peak_file):
            inside = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *command]
            text = subprocess.run(inside, env=environment, check=True, capture_output=True, text=True).stdout
            peak = int(peak_file.read_text())
    rows = [json.loads(line) for line in text.splitlines()]
    print(tier, inputs, *(f"{row['seconds']:.1f}" for row in rows), flush=True)
    return rows[WARM_UP:], peak


def bandwidth(folder: Path) -> dict[str, float]:
    """Bytes a second of the disk itself, one after the other, past the cache."""
    mine, other = folder / "one", folder / "other"

    def copy(path: Path, direction: str) -> subprocess.Popen:
        ends = ["if=/dev/zero", f"of={path}", "oflag=direct"]
        if direction == "read":
            ends = [f"if={path}", "of=/dev/null", "iflag=direct"]
        return subprocess.Popen(["dd", *ends, f"bs={CHUNK}", f"count={CHUNKS}"], stderr=subprocess.DEVNULL)

    def rate(*copies: tuple[Path, str]) -> float:
        started = time.perf_counter()
        running = [copy(path, direction) for path, direction in copies]
        assert all(process.wait() == 0 for process in running), "dd failed; does the file system know O_DIRECT?"
        return len(copies) * CHUNK * CHUNKS / (time.perf_counter() - started)

    rates = {"write": rate((mine, "write")), "read": rate((mine, "read"))}
    rates["both at once"] = rate((mine, "read"), (other, "write"))
    mine.unlink()
    other.unlink()
    return rates


def report(folder: Path) -> str:
    before = bandwidth(folder)
    lines = ["# MEFT: rows on disk", "", "    python benchmarks/meft_disk.py", ""]
    lines += [(__doc__ or "").split("16 GB of disk\n\n")[1].replace(" Writes results/meft_disk.md.", "").strip(), ""]
    lines += ["| inputs | Key-Experts used | in memory | on disk, 2.5 GB | ratio | read a step | written a step |"]
    lines += ["|-|-|-|-|-|-|-|"]
    details = []
    for inputs in ("alike", "independent"):
        in_memory, _ = side("host", inputs, folder)
        on_disk, peak = side("disk", inputs, folder)
        assert [row["loss"] for row in in_memory] == [row["loss"] for row in on_disk], "the tiers compute the same"
        fast, slow = (statistics.median(row["seconds"] for row in rows) for rows in (in_memory, on_disk))
        read, written = (statistics.mean(row[name] for row in on_disk) for name in ("read", "written"))
        lines.append(
            f"| {inputs} | {on_disk[0]['used']:.0%} | {fast:.2f} s | {slow:.2f} s | {slow / fast:.2f} | "
            f"{read / 1e9:.2f} GB | {written / 1e9:.2f} GB |"
        )
        spread = ", ".join(f"{row['seconds']:.1f}" for row in on_disk)
        details += [
            "",
            f"{inputs.capitalize()}: steps of {spread} s on disk; waited for the disk "
            f"{statistics.median(row['stall'] for row in on_disk):.1f} s of a step; the group's peak "
            f"{peak / 1e9:.2f} GB, of it at most {max(row['own'] for row in on_disk) / 1e9:.2f} GB the process's own.",
        ]
        moved = (read + written) / statistics.mean(row["seconds"] for row in on_disk)
    after = bandwidth(folder)
    rates = {name: (before[name] + after[name]) / 2 for name in before}
    lines += details
    lines += ["", "The disk itself, mean of before and after: "]
    lines[-1] += "; ".join(f"{name} {rate / 1e6:.0f} MB/s" for name, rate in rates.items()) + "."
    in_turn = read / rates["read"] + written / rates["write"]
    took = (read + written) / moved
    lines += [
        "",
        f"With independent inputs a step moves {moved / 1e6:.0f} MB/s over its whole time, computing included: "
        f"{moved / rates['both at once']:.0%} of what the disk reads and writes at once, and {in_turn / took:.0%} of "
        "what it does reading first and then writing.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="on the disk to be measured; a temporary one by default")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        train(*args.side, args.folder)
        return
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        text = report(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(text)
    (RESULTS / "meft_disk.md").write_text(text)


if __name__ == "__main__":
    main()
