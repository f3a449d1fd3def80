"""Tables 1 to 4 of the ESFT paper (arXiv 2407.01906), answered by the comparison on the embedded model.

    metier compare benchmarks/comparisons/embedded.yaml && python benchmarks/comparisons/paper_tables.py

Reads the comparison's runs and writes `paper_tables.md` beside this file. A difference is told only where its 95%
interval, over seeds and test items, leaves out 0; what the paper found stands beside it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import numpy.typing as npt

from metier.evaluation.comparison.cells import Cell, Cells
from metier.evaluation.comparison.config import BASE, FULL, load_comparison
from metier.evaluation.comparison.statistics import Seeds, interval
from metier.evaluation.result import Change
from metier.reports import units

FOLDER = Path(__file__).parent
TOKEN, GATE, LORA = "ESFT, token scores", "ESFT, gate scores", "LoRA, all experts"
RANDOM, COLDEST = "random experts", "coldest experts"
WITH_SHARED, SHARED = "relevant and shared experts", "shared experts alone"
NOT_ROUTED, RELEVANT_TOO = "all but routed experts and embeddings", "relevant experts and all but embeddings"


@dataclass(frozen=True)
class Published:
    """What the paper has of a row: its mean over 8 tasks, and over 7 general benchmarks."""

    special: float
    general: float


PAPER = {
    BASE: Published(33.6, 62.4),
    FULL: Published(51.0, 58.8),
    LORA: Published(44.9, 59.1),
    TOKEN: Published(49.4, 61.5),
    GATE: Published(50.2, 60.6),
    WITH_SHARED: Published(49.8, 60.7),
    SHARED: Published(47.4, 61.2),
    NOT_ROUTED: Published(49.0, 60.0),
    RELEVANT_TOO: Published(50.8, 60.3),
}
RANDOM_LOSS = -2.8
"""Table 4: random experts instead of those by token scores, mean over 8 tasks."""


@dataclass(frozen=True)
class Side:
    """One method on every task."""

    label: str
    runs: dict[str, list[dict]]

    def seeds(self, task: str) -> Seeds:
        runs = self.runs[task]
        return Seeds(
            tuple(run["test"]["score"] for run in runs),
            np.array([run["test"]["item_scores"] for run in runs], dtype=float),
        )

    def forgetting(self, task: str, base: Side) -> Seeds:
        """Rises of bits a byte over the base, domains in the place of items."""
        before = base.runs[task][0]["bits_per_byte"]
        rises = np.array(
            [[run["bits_per_byte"][name] - bits for name, bits in before.items()] for run in self.runs[task]]
        )
        return Seeds(tuple(rises.mean(1)), rises)

    def score(self, task: str) -> float:
        return self.seeds(task).mean

    def of_first(self, name: str) -> float:
        """A cost that does not depend on seeds, the mean over tasks."""
        return fmean(runs[0][name] for runs in self.runs.values())

    def bits(self, task: str, domain: str) -> float:
        return fmean(run["bits_per_byte"][domain] for run in self.runs[task])


def sides_of(cells: Cells) -> dict[str, Side]:
    """Every method that has a run on every task at its best rate."""
    found = {}
    by_label = {candidate.label: candidate for candidate in cells.config.candidates}
    for label in (BASE, *by_label):
        runs: dict[str, list[dict]] = {}
        for task in cells.config.tasks:
            if label == BASE:
                wanted = [Cell(task=task, label=BASE)]
            elif (rate := cells.best_rate(task, by_label[label])) is not None:
                wanted = [Cell(task=task, label=label, learning_rate=rate, seed=seed) for seed in cells.config.seeds]
            else:
                continue
            there = [result for cell in wanted if (result := cells.result(cell)) is not None]
            if there:
                runs[task] = there
        if len(runs) == len(cells.config.tasks):
            found[label] = Side(label, runs)
    return found


def at_the_edge(cells: Cells) -> str:
    """Of the methods in these tables, on how many tasks the best rate is the least or the largest of those tried."""
    counts = {}
    for candidate in cells.config.candidates:
        if candidate.label not in PAPER and candidate.label not in (RANDOM, COLDEST):
            continue
        rates = cells.rates(candidate)
        best = [cells.best_rate(task, candidate) for task in cells.config.tasks]
        if number := sum(rate in (min(rates), max(rates)) for rate in best):
            counts[candidate.label] = number
    named = "; ".join(f"{label} ({number})" for label, number in counts.items())
    return (
        "The best rate is the least or the largest of those that were tried, so that a better one may lie beyond, on "
        f"so many of the {len(cells.config.tasks)} tasks: {named}."
    )


def mean_difference(first: list[Seeds], second: list[Seeds]) -> Change:
    """Of two methods, the mean over tasks, with its interval over seeds and items."""
    drawn: list[npt.NDArray[np.float64]] = []
    for one, other in zip(first, second, strict=True):
        drawn.append(one.resampled() - other.resampled())
    value = fmean(one.mean - other.mean for one, other in zip(first, second, strict=True))
    return interval(np.mean(drawn, axis=0), value)


def signed(change: Change, digits: int) -> str:
    low, high = (units.signed(value, digits=digits) for value in (change.low, change.high))
    return f"{units.signed(change.value, digits=digits)} ({low} to {high})"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["-"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


class Answer:
    """The page, part by part."""

    def __init__(self, cells: Cells) -> None:
        self.tasks = list(cells.config.tasks)
        self.sides = sides_of(cells)
        missing = [label for label in (BASE, FULL, LORA, TOKEN, GATE, RANDOM, SHARED) if label not in self.sides]
        if missing:
            sys.exit(f"no run on every task yet of: {', '.join(missing)}; run the comparison first.")
        self.base = self.sides[BASE]
        self.metrics = {task: self.base.runs[task][0]["test"]["metric"] for task in self.tasks}

    def specialised(self, first: str, second: str) -> Change:
        one, other = self.sides[first], self.sides[second]
        return mean_difference([one.seeds(task) for task in self.tasks], [other.seeds(task) for task in self.tasks])

    def forgetting(self, first: str, second: str) -> Change:
        one, other = self.sides[first], self.sides[second]
        return mean_difference(
            [one.forgetting(task, self.base) for task in self.tasks],
            [other.forgetting(task, self.base) for task in self.tasks],
        )

    def mean_score(self, label: str) -> float:
        return fmean(self.sides[label].score(task) for task in self.tasks)

    def mean_forgetting(self, label: str) -> float:
        return fmean(self.sides[label].forgetting(task, self.base).mean for task in self.tasks)

    def share_of_gain(self, label: str) -> str:
        start = self.mean_score(BASE)
        return units.share((self.mean_score(label) - start) / (self.mean_score(FULL) - start))

    def table_1(self) -> list[str]:
        head = [
            "",
            *(f"{task}, {self.metrics[task]}" for task in self.tasks),
            "mean",
            "of full's gain",
            "paper: mean",
            "of full's gain",
        ]
        rows = []
        for label in (BASE, FULL, LORA, TOKEN, GATE):
            scores = [units.number(self.sides[label].score(task), digits=1) for task in self.tasks]
            published, vanilla, full = PAPER[label], PAPER[BASE].special, PAPER[FULL].special
            share = units.share((published.special - vanilla) / (full - vanilla))
            rows.append(
                [
                    label,
                    *scores,
                    units.number(self.mean_score(label), digits=1),
                    self.share_of_gain(label),
                    f"{published.special}",
                    share,
                ]
            )
        return ["## Table 1: the task that was trained for", "", *table(head, rows)]

    def table_2(self) -> list[str]:
        domains = list(self.base.runs[self.tasks[0]][0]["bits_per_byte"])
        head = ["", *domains, "mean rise, ± sd over tasks", "of full's", "paper: mean", "of full's fall"]
        rows = []
        for label in (BASE, FULL, LORA, TOKEN, GATE):
            side = self.sides[label]
            bits = [units.number(fmean(side.bits(task, name) for task in self.tasks), digits=3) for name in domains]
            rises = [side.forgetting(task, self.base).mean for task in self.tasks]
            fall = (PAPER[BASE].general - PAPER[label].general) / (PAPER[BASE].general - PAPER[FULL].general)
            rows.append(
                [
                    label,
                    *bits,
                    "" if label == BASE else f"{units.signed(fmean(rises), digits=3)} ± {stdev(rises):.3f}",
                    "" if label == BASE else units.share(fmean(rises) / self.mean_forgetting(FULL)),
                    f"{PAPER[label].general}",
                    "" if label == BASE else units.share(fall),
                ]
            )
        said = (
            "Bits a byte of general text, by domain, the mean over the models of the tasks: lower is better. "
            "The paper's are scores."
        )
        return ["## Table 2: what else the model could do", "", said, "", *table(head, rows)]

    def table_3(self) -> list[str]:
        parts = {
            FULL: ("all", "yes", "yes"),
            WITH_SHARED: ("relevant", "yes", "no"),
            TOKEN: ("relevant", "no", "no"),
            SHARED: ("none", "yes", "no"),
            NOT_ROUTED: ("none", "yes", "yes*"),
            RELEVANT_TOO: ("relevant", "yes", "yes*"),
            BASE: ("none", "no", "no"),
        }
        head = ["routed", "shared", "all else", "trained", "specialised", "forgetting", "paper: specialised", "general"]
        rows = []
        for label, (routed, shared, other) in parts.items():
            if label not in self.sides:
                continue
            is_base = label == BASE
            rows.append(
                [
                    routed,
                    shared,
                    other,
                    "0" if is_base else units.count(self.sides[label].of_first("trained_parameters")),
                    units.number(self.mean_score(label), digits=1),
                    "" if is_base else units.signed(self.mean_forgetting(label), digits=3),
                    f"{PAPER[label].special}",
                    f"{PAPER[label].general}",
                ]
            )
        said = "\\* But embeddings, which the paper's rows train too."
        return ["## Table 3: which parts are trained", "", said, "", *table(head, rows)]

    def table_4(self) -> list[str]:
        head = ["instead of the relevant experts", *self.tasks, "mean", "paper: mean"]
        rows = []
        for label, published in ((RANDOM, f"{RANDOM_LOSS}"), (COLDEST, "")):
            if label not in self.sides:
                continue
            side, relevant = self.sides[label], self.sides[TOKEN]
            by_task = [mean_difference([side.seeds(task)], [relevant.seeds(task)]) for task in self.tasks]
            rows.append(
                [
                    label,
                    *(signed(change, 1) for change in by_task),
                    signed(self.specialised(label, TOKEN), 1),
                    published,
                ]
            )
        said = "As many experts a layer as token scores chose, other ones. Differences with 95% intervals."
        return ["## Table 4: do the experts matter?", "", said, "", *table(head, rows)]

    def costs(self) -> list[str]:
        rows = []
        for label in (FULL, LORA, TOKEN, GATE):
            side = self.sides[label]
            rows.append([label, units.size(side.of_first("delta_bytes")), units.size(side.of_first("host_peak_bytes"))])
        said = (
            "Storage of what is left after training, in the trained precision, and the peak of the process. "
            "Seconds: the comparison's page."
        )
        return ["## Cost", "", said, "", *table(["", "delta", "peak memory"], rows)]

    def claims(self) -> list[str]:
        """What the paper says, and whether these runs say the same."""
        special = [
            ("ESFT (token) against full fine-tuning", TOKEN, FULL),
            ("ESFT (gate) against full fine-tuning", GATE, FULL),
            ("ESFT (token) against LoRA on all", TOKEN, LORA),
            ("with shared experts against without", WITH_SHARED, TOKEN),
            ("shared experts alone against ESFT (token)", SHARED, TOKEN),
            ("all but routed experts against ESFT (token)", NOT_ROUTED, TOKEN),
            ("all but the other routed experts against ESFT (token)", RELEVANT_TOO, TOKEN),
        ]
        rows = []
        for title, first, second in special:
            if first not in self.sides or second not in self.sides:
                continue
            published = PAPER[first].special - PAPER[second].special
            ours = self.specialised(first, second)
            rows.append([f"{title}: score", signed(ours, 1), f"{published:+.1f}", verdict(ours, published)])
            # the paper's general scores fall as bits a byte rise
            published = PAPER[first].general - PAPER[second].general
            ours = self.forgetting(first, second)
            rows.append(
                [f"{title}: forgetting", signed(ours, 3), f"general {published:+.1f}", verdict(ours, -published)]
            )
        ours = self.specialised(RANDOM, TOKEN)
        rows.append(
            [
                "random against relevant experts: score",
                signed(ours, 1),
                f"{RANDOM_LOSS:+.1f}",
                verdict(ours, RANDOM_LOSS),
            ]
        )
        head = ["", "here, mean over tasks", "paper", "so"]
        return ["## Where it agrees", "", *table(head, rows)]

    def page(self, cells: Cells) -> str:
        num_seeds = sorted(
            {len(runs) for label, side in self.sides.items() if label != BASE for runs in side.runs.values()}
        )
        seeds = f"{num_seeds[0]}" if len(num_seeds) == 1 else f"{num_seeds[0]} to {num_seeds[-1]}"
        config = cells.config
        lines = [
            "# The tables of the ESFT paper, on the embedded model",
            "",
            "`python benchmarks/comparisons/paper_tables.py` wrote this from the runs of `embedded.yaml`; the "
            "comparison's page is `embedded/comparison.html`.",
            "",
            f"{len(self.tasks)} tasks, {seeds} seeds, {config.run['max_steps']} steps, each method at the best of "
            f"{len(config.learning_rate_factors)} learning rates by validation score; {config.test_items} test items a "
            "task. The paper: DeepSeek-V2-Lite (66 experts a layer, 16 B parameters), up to 500 steps, 8 tasks, "
            "general data mixed in for all; here a model of 18.5 M parameters with 32 experts a layer, and no general "
            "data. Top-p is 0.5 here, 0.2 (token) and 0.1 (gate) there.",
            "",
            at_the_edge(cells),
            "",
        ]
        for part in (self.claims, self.table_1, self.table_2, self.table_3, self.table_4, self.costs):
            lines += part()
        return "\n".join(lines).rstrip() + "\n"


def verdict(ours: Change, published: float) -> str:
    """Whether a difference here has the sign of the paper's."""
    if ours.low <= 0 <= ours.high:
        return "not told apart here"
    return "agrees" if (ours.value > 0) == (published > 0) else "differs"


def main() -> None:
    cells = Cells(load_comparison(FOLDER / "embedded.yaml"))
    text = Answer(cells).page(cells)
    (FOLDER / "paper_tables.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
