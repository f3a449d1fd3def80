"""Compression: what a smaller delta costs in task score.

    python benchmarks/compression.py     about ten minutes on two cores

ESFT trains the embedded model on `synopsis` and on `translate` (one pass, seed 0, the settings of quality.py, learning
rate 2e-3). Each delta is stored in every form that `metier compress` has, turned back into an ordinary delta, loaded on
a fresh base and scored on the whole test split. The delta as it was trained is float32, and so is the base.

Writes results/compression.md.
"""

from __future__ import annotations

import tempfile
from io import StringIO
from pathlib import Path

import peft
from quality import TOP_P, measure, run_config, task_profile
from quality_report import forgetting
from rich.console import Console

import metier
from metier.deltas.compress import CompressionReport, compress, decompress
from metier.reports.units import size
from metier.routing.selection import SelectionConfig, select
from metier.training.run import train

RESULTS = Path(__file__).parent / "results"
TASKS = ("synopsis", "translate")
LEARNING_RATE = 2e-3
FORMS: tuple[tuple[str, float | None], ...] = (
    ("bf16", None),
    ("int8", None),
    ("low_rank", 0.1),
    ("low_rank", 0.3),
    ("low_rank", 0.5),
    ("low_rank", 0.7),
)


def scored(delta: Path, task: str) -> dict:
    """The scores of a fresh base with this delta."""
    base = metier.load("embedded", dtype="float32")
    tuned = peft.PeftModel.from_pretrained(base.model, str(delta)).eval()
    return measure(tuned, base.tokenizer, task)


def stored(delta: Path, folder: Path, method: str, max_error: float | None) -> tuple[CompressionReport, Path]:
    """The delta in one form, and the ordinary delta that is got back from it."""
    base = metier.load("embedded", dtype="float32")
    report = compress(delta, base, folder / "compressed", method=method, max_relative_error=max_error)
    if method == "bf16":
        return report, folder / "compressed"
    decompress(folder / "compressed", base, folder / "delta")
    return report, folder / "delta"


def row(name: str, num_bytes: int, whole_bytes: int, error: float, scores: dict, before: dict) -> str:
    metric = next(iter(before["test"]))
    score, start = scores["test"][metric], before["test"][metric]
    line = (
        f"| {name} | {size(num_bytes)} ({num_bytes / whole_bytes:.0%}) | {error:.2%} | {score:.2f} "
        f"| {score - start:+.2f} | {forgetting(scores, before):+.4f} |"
    )
    print(line, flush=True)
    return line


def task_part(task: str) -> list[str]:
    base = metier.load("embedded", dtype="float32")
    before = measure(base.model, base.tokenizer, task)
    metric, start = next(iter(before["test"].items()))
    lines = [f"## {task}", "", f"The base has {start:.2f} {metric}.", ""]
    lines += [f"| stored as | bytes | change lost, mean of rows | {metric} | gain | forgetting, bits a byte |"]
    lines += ["|-|-|-|-|-|-|"]
    with tempfile.TemporaryDirectory() as name:
        selection = select(task_profile(task), SelectionConfig(score="token", top_p=TOP_P))
        config = run_config(Path(name), task, learning_rate=LEARNING_RATE, selection=selection)
        train(config, console=Console(file=StringIO()))
        delta = Path(name) / "run" / "adapter"
        whole_bytes = (delta / "adapter_model.safetensors").stat().st_size
        lines.append(row("float32, as trained", whole_bytes, whole_bytes, 0.0, scored(delta, task), before))
        for number, (method, max_error) in enumerate(FORMS):
            report, back = stored(delta, Path(name) / str(number), method, max_error)
            label = method if max_error is None else f"{method}, at most {max_error:.0%} lost"
            lines.append(row(label, report.bytes_after, whole_bytes, report.mean_error, scored(back, task), before))
    return [*lines, ""]


def main() -> None:
    lines = ["# Compression", "", "    python benchmarks/compression.py", ""]
    lines += [(__doc__ or "").split("\n\n", 2)[2].strip(), ""]
    for task in TASKS:
        lines += task_part(task)
    (RESULTS / "compression.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
