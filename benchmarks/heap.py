"""What a step on a CPU takes, in memory and time, by what becomes of freed blocks.

    python benchmarks/heap.py [--repeats 3]      writes results/heap.md

Three ways, each in a process of its own and in turn: as glibc has it; giving back where the process would else grow
past its peak, as `metier train` does; every block mapped by itself (MALLOC_MMAP_THRESHOLD_=65536). Memory is the most
that is resident over what there was before the model, seconds are a step's median. Its tensors are the planner's.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import planner

RESULTS = Path(__file__).parent / "results"
CELLS = (
    planner.Cell("llama", "lora", 4, 512, False),
    planner.Cell("olmoe", "esft-2", 4, 512, False),
    planner.Cell("olmoe", "full", 4, 512, True),
    planner.Cell("embedded", "esft-8", 4, 512, False),
)
WAYS: dict[str, dict[str, str]] = {
    "as glibc has it": {},
    "giving back": {},
    "every block mapped": {"MALLOC_MMAP_THRESHOLD_": "65536"},
}


def measure(way: str, cell: planner.Cell) -> dict[str, Any]:
    if way != "giving back":
        from metier.training import give_back

        give_back.is_left_alone = lambda: True
    return planner.measure(cell)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one")
    given = parser.parse_args()
    if given.one:
        way, cell = json.loads(given.one)
        print(json.dumps(measure(way, planner.Cell(**cell))))
        return
    estimators: dict[str, Any] = {}
    rows = []
    for cell in CELLS:
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(given.repeats):
            for way in WAYS:
                command = [__file__, "--one", json.dumps([way, asdict(cell)])]
                found[way].append(planner.in_a_process(command, **WAYS[way]))
        predicted = planner.predict(cell, estimators)
        tensors = predicted["predicted_bytes"] - predicted["predicted"]["workspace"]
        plain = median(one["step_seconds"] for one in found["as glibc has it"])
        for way, runs in found.items():
            peaks, ratios = [one["peak_bytes"] for one in runs], [one["step_seconds"] / plain for one in runs]
            rows.append(
                f"| {cell.name} | {way} | {median(peaks) / 2**20:,.0f} | {median(peaks) / tensors - 1:+.1%} | "
                f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
            )
            print(rows[-1], flush=True)
    text = f"""# What becomes of freed blocks on a CPU

    python benchmarks/heap.py --repeats {given.repeats}

{(__doc__ or "").split(chr(10) * 2, 2)[2].strip()}

| run | freed blocks | memory, MiB | over its tensors | seconds, against glibc's way |
|-|-|-|-|-|
{chr(10).join(rows)}
"""
    (RESULTS / "heap.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
