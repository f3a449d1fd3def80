"""The verdict of the soak on Ray and its report: benchmarks/results/serving_ray_soak.md, from the runs in the JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import textwrap
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from serving_ray_soak_world import RayWorld
from serving_soak_record import Record
from serving_soak_server import Sample

RESULTS = Path(__file__).parent / "results" / "serving_ray_soak.md"
WANTED = 0.9
"""Of requests for deltas, those that come to a replica which holds the delta."""
MAX_GROWTH = 0.05
_LEAST_SAMPLES = 25
"""Of a soak that is long enough for its memory to be judged."""


@dataclass
class Outcome:
    record: Record
    samples: dict[int, list[Sample]]
    """By process, one for each replica."""
    loads: list[float]
    """Processes that wanted a core, each ten seconds."""
    arrivals: list[tuple[float, dict[str, int]]]
    """Seconds, and requests for deltas until then by the tier in which their deltas lay."""
    left_behind: dict[str, float]
    exit_code: int | None
    complaints: list[str]

    def share(self, *, since_seconds: float = 0.0) -> float:
        """Of requests for deltas, those that came to a replica which held theirs."""
        before = next((counts for seconds, counts in self.arrivals if seconds >= since_seconds), {})
        last = self.arrivals[-1][1]
        counts = {tier: num - before.get(tier, 0) for tier, num in last.items()}
        return counts.get("accelerator", 0) / max(1, sum(counts.values()))

    def num_arrived(self) -> int:
        return sum(self.arrivals[-1][1].values())

    def num_missed(self) -> int:
        return self.num_arrived() - self.arrivals[-1][1].get("accelerator", 0)

    def fifths(self, pid: int) -> list[float]:
        """Medians of a replica's resident bytes over fifths of the time."""
        samples = self.samples[pid]
        size = max(1, len(samples) // 5)
        parts = [samples[number * size : (number + 1) * size] for number in range(5)]
        return [statistics.median(sample.resident_bytes for sample in part) for part in parts if part]

    def growth(self) -> float:
        """Of the replica that grew most, from the second fifth to the last."""
        return max(self.fifths(pid)[-1] / self.fifths(pid)[1] - 1 for pid in self.samples)

    def faults(self) -> list[str]:
        """What is wrong; nothing where the soak has passed."""
        record = self.record
        wrong: dict[str, Any] = {
            f"{record.num_wrong} wrong answers": record.num_wrong,
            f"{record.num_unexpected} unexpected replies": record.num_unexpected,
            f"{record.num_server_errors()} server errors": record.num_server_errors(),
            f"{self.share():.1%} of requests came to a replica that held their delta": self.share() <= WANTED,
            f"{len(self.samples)} replicas' processes": len(self.samples) != 2,
            f"left behind: {self.left_behind}": self.left_behind,
            f"exit code {self.exit_code}": self.exit_code != 0,
            f"complaints in the log: {self.complaints[:5]}": self.complaints,
        }
        if min(map(len, self.samples.values()), default=0) >= _LEAST_SAMPLES:
            wrong[f"memory grew by {self.growth():.1%}"] = self.growth() > MAX_GROWTH
        return [what for what, is_wrong in wrong.items() if is_wrong]

    def summary(self) -> str:
        """For the terminal."""
        record = self.record
        lines = [
            f"{kind}: {numbers} {median or 0:.2f} s, {longest or 0:.2f} s"
            for kind, numbers, median, longest in record.rows()
        ]
        lines.append(f"{record.num_requests} requests, {record.num_checked} answers checked")
        lines.append(f"{self.share():.2%} of {self.num_arrived()} requests for deltas came to a replica that held them")
        lines.append(
            f"without the first minute: {self.share(since_seconds=60):.2%}; {self.num_missed()} in all did not"
        )
        for pid in self.samples:
            lines.append("MiB: " + ", ".join(f"{each / 2**20:.0f}" for each in self.fifths(pid)))
        return "\n".join(lines)


def write_report(outcome: Outcome, world: RayWorld, options: argparse.Namespace) -> None:
    """Put a run among those that are there, in place of one with the same options."""
    kept = RESULTS.with_suffix(".json")
    runs = json.loads(kept.read_text())["runs"] if kept.exists() else []
    names = ("minutes", "clients", "held", "skew", "deltas", "questions", "seed")
    given = {name: getattr(options, name) for name in names}
    runs = [*(run for run in runs if run["options"] != given), _run(outcome, world, given)]
    runs.sort(key=lambda run: (run["options"]["skew"], run["options"]["held"]))
    kept.write_text(json.dumps({"runs": runs}) + "\n", encoding="utf-8")
    RESULTS.write_text(_page(runs), encoding="utf-8")


def _run(outcome: Outcome, world: RayWorld, given: dict[str, Any]) -> dict[str, Any]:
    record = outcome.record
    return {
        "options": given,
        "faults": outcome.faults(),
        "delta_bytes": [min(world.sizes.values()), max(world.sizes.values())],
        "requests": record.num_requests,
        "checked": record.num_checked,
        "wrong": record.num_wrong,
        "server_errors": record.num_server_errors(),
        "unexpected": record.num_unexpected,
        "for_deltas": outcome.num_arrived(),
        "missed": outcome.num_missed(),
        "share": outcome.share(),
        "share_after_a_minute": outcome.share(since_seconds=60),
        "growth": outcome.growth(),
        "fifths_mib": [[round(each / 2**20, 1) for each in outcome.fifths(pid)] for pid in outcome.samples],
        "seconds": {kind: [median, longest] for kind, _, median, longest in record.rows()},
        "arrivals": [[round(seconds, 1), counts] for seconds, counts in outcome.arrivals],
        "load": statistics.median(outcome.loads),
        "exit_code": outcome.exit_code,
    }


def _page(runs: list[dict[str, Any]]) -> str:
    of, sizes = runs[0]["options"], runs[0]["delta_bytes"]
    faults = [fault for run in runs for fault in run["faults"]]
    versions = f"torch {version('torch')}, transformers {version('transformers')}, Ray {version('ray')}"
    loads = " and ".join(f"{run['load']:.0f}" for run in runs)
    what = f"""{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}. Two
    replicas, each on one thread, on a local Ray; the embedded model in float32; {of["deltas"]} ESFT deltas of
    {sizes[0] / 2**20:.1f} to {sizes[1] / 2**20:.1f} MiB; {of["clients"]} clients that ask one thing after another, a
    tenth of it of the base, for {of["minutes"]:g} minutes. The machine had much other work: its load was {loads} on
    average, so that the seconds say little."""
    verdict = f"""**{"Passed" if not faults else "Failed: " + "; ".join(faults)}.** Wanted: over {WANTED:.0%} of
    requests come to a replica that holds their delta already. It is counted on the replica, before anything is loaded
    for the request; one that comes while its delta is still on its way counts as missed, and so does the first for
    each delta, {of["deltas"]} in all, which nobody can hold yet. By chance the share would be that of the deltas that a
    replica has room for. Every answer was compared with that of the merged model alone."""
    growth = f"""MiB resident, medians over fifths of the time. From the second to the last
    {max(run["growth"] for run in runs):+.1%} at most (allowed: {MAX_GROWTH:.0%})."""
    return f"""# A soak of the server on Ray Serve

{chr(10).join(map(_command, runs))}

{_filled(what)}

{_filled(verdict)}

| a replica has room for | requests for deltas | missed | came to a holder | after a minute | by chance |
|-|-|-|-|-|-|
{chr(10).join(map(_placing, runs))}

The course of each run is in `serving_ray_soak.json`.

| a replica has room for | requests | answers checked | wrong | status 5xx | seconds, whole | seconds, streams |
|-|-|-|-|-|-|-|
{chr(10).join(map(_answers, runs))}

Seconds: the median, and the longest.

## Memory of the replicas' processes

{_filled(growth)}

| a replica has room for | replica | 1 | 2 | 3 | 4 | 5 |
|-|-|-|-|-|-|-|
{chr(10).join(line for run in runs for line in _memory(run))}
"""


def _filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def _command(run: dict[str, Any]) -> str:
    of = run["options"]
    options = " ".join(f"--{name} {of[name]:g}" for name in ("minutes", "held", "skew", "clients", "seed"))
    return f"    python benchmarks/serving_ray_soak.py {options}"


def _what(run: dict[str, Any]) -> str:
    of = run["options"]
    mix = "all asked for alike" if of["skew"] == 0 else f"the nth asked for in proportion to n^-{of['skew']:g}"
    return f"{of['held']} of {of['deltas']}, {mix}"


def _placing(run: dict[str, Any]) -> str:
    share, later = run["share"], run["share_after_a_minute"]
    chance = run["options"]["held"] / run["options"]["deltas"]
    return f"| {_what(run)} | {run['for_deltas']:,} | {run['missed']} | **{share:.1%}** | {later:.1%} | {chance:.0%} |"


def _answers(run: dict[str, Any]) -> str:
    seconds = [f"{median:.2f} ({longest:.2f})" for median, longest in (run["seconds"][x] for x in ("whole", "stream"))]
    numbers = [f"{run[name]:,}" for name in ("requests", "checked", "wrong", "server_errors")]
    return f"| {_what(run)} | {' | '.join([*numbers, *seconds])} |"


def _memory(run: dict[str, Any]) -> list[str]:
    return [
        f"| {_what(run)} | {number} | {' | '.join(f'{each:,.0f}' for each in fifths)} |"
        for number, fifths in enumerate(run["fifths_mib"], 1)
    ]
