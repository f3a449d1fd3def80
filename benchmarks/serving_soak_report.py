"""The soak's verdict and its report: benchmarks/results/serving_soak.md, and the samples beside it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from serving_soak_record import Record
from serving_soak_server import Sample
from serving_soak_world import World

RESULTS = Path(__file__).parent / "results" / "serving_soak.md"
MAX_GROWTH = 0.05
_LEAST_SAMPLES = 25
"""Of a soak that is long enough for its memory to be judged."""


@dataclass
class Outcome:
    record: Record
    samples: list[Sample]
    last_sample: Sample
    left_behind: dict[str, float]
    exit_code: int | None
    seconds_to_end: float
    complaints: list[str]

    def fifth(self, number: int, what: Callable[[Sample], float]) -> float:
        """The median over one fifth of the time, the first being 0."""
        size = len(self.samples) // 5
        return statistics.median(map(what, self.samples[number * size : (number + 1) * size]))

    def growth(self) -> float:
        """Of the resident memory, from the second fifth to the last."""
        return self.fifth(4, _resident) / self.fifth(1, _resident) - 1

    def faults(self) -> list[str]:
        """What is wrong; nothing where the soak has passed."""
        record = self.record
        wrong = {
            f"{record.num_wrong} wrong answers": record.num_wrong,
            f"{record.num_unexpected} unexpected replies": record.num_unexpected,
            f"{record.num_server_errors()} server errors": record.num_server_errors(),
            f"left behind: {self.left_behind}": self.left_behind,
            f"exit code {self.exit_code}": self.exit_code != 0,
            f"complaints in the log: {self.complaints[:5]}": self.complaints,
        }
        if len(self.samples) >= _LEAST_SAMPLES:
            wrong[f"memory grew by {self.growth():.1%}"] = abs(self.growth()) > MAX_GROWTH
        return [what for what, is_wrong in wrong.items() if is_wrong]

    def summary(self) -> str:
        """For the terminal."""
        record, size = self.record, max(1, len(self.samples) // 10)
        lines = [
            f"{kind}: {numbers} {median or 0:.2f} s, {longest or 0:.2f} s"
            for kind, numbers, median, longest in record.rows()
        ]
        lines.append(f"{record.num_requests} requests, {record.num_checked} answers checked")
        lines.append("MiB: " + ", ".join(f"{sample.resident_bytes / 2**20:.1f}" for sample in self.samples[::size]))
        lines.append("threads, files: " + ", ".join(f"{x.num_threads} {x.num_files}" for x in self.samples[::size]))
        last = self.last_sample
        lines.append(
            f"at last {last.resident_bytes / 2**20:.1f} MiB, {last.num_threads} threads, {last.num_files} files"
        )
        lines.append(f"ended after {self.seconds_to_end:.1f} s with code {self.exit_code}")
        return "\n".join(lines)


def _resident(sample: Sample) -> float:
    return sample.resident_bytes


def write_report(outcome: Outcome, world: World, options: argparse.Namespace) -> None:
    record, samples = outcome.record, outcome.samples
    rows = [
        f"| {kind} | {', '.join(f'{status}: {num:,}' for status, num in numbers.items())} "
        f"| {'' if median is None else f'{median:.2f} ({longest:.2f})'} |"
        for kind, numbers, median, longest in record.rows()
    ]
    fifths = range(5)
    memory = [f"{outcome.fifth(each, _resident) / 2**20:,.1f}" for each in fifths]
    threads = [f"{outcome.fifth(each, lambda x: x.num_threads):.0f}" for each in fifths]
    files = [f"{outcome.fifth(each, lambda x: x.num_files):.0f}" for each in fifths]
    faults = outcome.faults()
    text = f"""# A soak of the server

    python benchmarks/serving_soak.py --minutes {options.minutes:g} --clients {options.clients} --seed {options.seed}

{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {version("torch")}, transformers
{version("transformers")}. {options.clients} clients for {options.minutes:g} minutes; the embedded model in float32;
eleven deltas (ESFT, LoRA on experts, LoRA), of which less than half fit at once; a cache of 3,072 tokens.

**{"Passed" if not faults else "Failed: " + "; ".join(faults)}.** {record.num_requests:,} requests;
{record.num_checked:,} answers compared with those of the merged models alone, {record.num_wrong} wrong;
{record.num_server_errors()} replies of status 5xx beside the 503 of a closing server; {record.num_unexpected} replies
other than expected. Once nobody asked, {
        "nothing ran or waited, and no block of the cache was taken"
        if not outcome.left_behind
        else f"there was left behind: {outcome.left_behind}"
    }. Told to stop while {record.num_of_kind("runs at the end")}
requests ran, the server answered them rightly and ended after {outcome.seconds_to_end:.1f} s with exit code
{outcome.exit_code}.

{world.num_left_out} of {world.num_left_out + len(world.greedy) + len(world.drawn)} answers were not asked for, because
they hang on a rounding: another token would come if each logit moved by about 1e-4.

## Memory of the server's process

Medians over fifths of the time. From the second to the last: {outcome.growth():+.1%} (at most {MAX_GROWTH:.0%}).

| | 1 | 2 | 3 | 4 | 5 |
|-|-|-|-|-|-|
| resident, MiB | {" | ".join(memory)} |
| threads | {" | ".join(threads)} |
| open files | {" | ".join(files)} |

Once nobody asked: {outcome.last_sample.resident_bytes / 2**20:,.1f} MiB, {outcome.last_sample.num_threads} threads,
{outcome.last_sample.num_files} open files. Each second's sample is in `serving_soak.json`.

## Requests

By status; "left" where the client closed the connection. 404 is right where a delta was not served at the time, 429
where all places were taken. Seconds: the median, and the longest.

| request | by status | seconds |
|-|-|-|
{chr(10).join(rows)}
"""
    RESULTS.write_text(text, encoding="utf-8")
    columns = {
        "seconds": [round(sample.seconds, 1) for sample in samples],
        "resident_bytes": [sample.resident_bytes for sample in samples],
        "anonymous_bytes": [sample.anonymous_bytes for sample in samples],
        "num_threads": [sample.num_threads for sample in samples],
        "num_files": [sample.num_files for sample in samples],
    }
    RESULTS.with_suffix(".json").write_text(json.dumps(columns) + "\n", encoding="utf-8")
