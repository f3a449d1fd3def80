"""What a run gained on its task and what the model forgot, method beside method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from metier.evaluation.result import Change, Evaluation, MetricScore
from metier.reports import units
from metier.reports.blocks import color_of, method_names, metric_title, missing, section, table
from metier.reports.data import ReportData, method_title
from metier.reports.markup import Child, Markup, join, tag
from metier.reports.plots import Bar, Point, bars, scatter


def quality(data: ReportData) -> Markup:
    """Task scores of each method, and what each gained and forgot in one picture."""
    title = "What it gained"
    scored = {name: one for name, one in data.evaluations.items() if one.metrics}
    if not scored:
        return section(title, missing("No task was evaluated, so there are no task scores."))
    names = method_names(data)
    charts = []
    for metric in dict.fromkeys(metric for one in scored.values() for metric in one.metrics):
        items = [
            Bar(
                name=method_title(name),
                value=one.metrics[metric].value,
                low=one.metrics[metric].low,
                high=one.metrics[metric].high,
                color=color_of(name, names),
                text=units.number(one.metrics[metric].value, digits=1) + _unread(one.metrics[metric]),
            )
            for name, one in scored.items()
            if metric in one.metrics
        ]
        charts.append(tag("div", tag("h3", metric_title(metric)), bars(items, label=f"{metric} by method")))
    first = next(iter(scored.values()))
    cut = ", ".join(f"{method_title(name)} {one.num_cut}" for name, one in scored.items() if one.num_cut)
    return section(
        title,
        tag("div", tag("div", *charts), _front(data, names), class_="pair"),
        tag("p", f"Replies that were cut at the length limit: {cut}.", class_="note") if cut else None,
        lead=f"{first.num_items:,} items of split {first.split}; scores of 0 to 100 with 95% intervals.",
    )


def _unread(score: MetricScore) -> str:
    return f" ({score.num_unparsed} unparsed)" if score.num_unparsed else ""


def _front(data: ReportData, names: Sequence[str]) -> Markup | None:
    points = [
        Point(
            name=method_title(row.name),
            x=(0.0, 0.0, 0.0) if row.forgetting is None else _ends(row.forgetting),
            y=_ends(row.score),
            color=color_of(row.name, names),
        )
        for row in data.rows
        if row.score is not None and (row.is_base or row.forgetting is not None)
    ]
    if len(points) < 2:
        return None
    return tag(
        "div",
        tag("h3", "Task score against forgetting"),
        scatter(
            points,
            x_title="forgetting (bits per byte)",
            y_title="task score",
            label="Task score against forgetting; up and to the left is better.",
        ),
        tag("p", "Up and to the left is better.", class_="note"),
    )


def _ends(value: Change | MetricScore) -> tuple[float, float, float]:
    return value.value, value.low, value.high


def general(data: ReportData) -> Markup:
    """Held-out loss per domain for each method, and the cloze test."""
    title = "What it forgot"
    measured = {name: one for name, one in data.evaluations.items() if one.domains}
    if not measured:
        return section(title, missing("General ability was not evaluated, so forgetting is not known."))
    names = method_names(data)
    return section(
        title,
        _domain_table(measured),
        tag("div", _forgetting_bars(data, names), _cloze_bars(data, names), class_="pair"),
        lead="Loss on held-out general text in bits per byte (lower is better) and its change from the base.",
    )


def _domain_table(measured: Mapping[str, Evaluation]) -> Markup:
    base_name = "base" if "base" in measured else next(iter(measured))
    base = measured[base_name]
    others = [name for name in measured if name != base_name]

    def moved(after: float | None, before: float | None) -> Child:
        if after is None or before is None:
            return units.MISSING
        kind = "worse" if after - before > 0.0005 else "better" if after - before < -0.0005 else None
        difference = tag("small", units.signed(after - before, digits=3), class_=kind)
        return join((units.number(after, digits=3), " ", difference))

    body: list[list[Child]] = []
    for domain, loss in base.domains.items():
        row: list[Child] = [domain, units.number(loss.bits_per_byte, digits=3)]
        for name in others:
            after = measured[name].domains.get(domain)
            row.append(moved(None if after is None else after.bits_per_byte, loss.bits_per_byte))
        body.append(row)
    mean: list[Child] = ["mean of domains", units.number(base.bits_per_byte, digits=3)]
    mean += [moved(measured[name].bits_per_byte, base.bits_per_byte) for name in others]
    head: list[Child] = ["domain", method_title(base_name), *(method_title(name) for name in others)]
    return table(head, [*body, mean], highlight=len(body))


def _forgetting_bars(data: ReportData, names: Sequence[str]) -> Markup | None:
    items = [
        Bar(
            name=method_title(row.name),
            value=row.forgetting.value,
            low=row.forgetting.low,
            high=row.forgetting.high,
            color=color_of(row.name, names),
            text=units.signed(row.forgetting.value, digits=3),
        )
        for row in data.rows
        if row.forgetting is not None
    ]
    if not items:
        return None
    return tag("div", tag("h3", "Forgetting, mean of domains"), bars(items, label="Bits per byte lost, by method"))


def _cloze_bars(data: ReportData, names: Sequence[str]) -> Markup | None:
    scored = {name: one.cloze for name, one in data.evaluations.items() if one.cloze is not None}
    if not scored:
        return None
    items = [
        Bar(
            name=method_title(name),
            value=cloze.accuracy,
            low=cloze.low,
            high=cloze.high,
            color=color_of(name, names),
            text=units.number(cloze.accuracy, digits=1),
        )
        for name, cloze in scored.items()
    ]
    first = next(iter(scored.values()))
    mark = (first.chance, f"chance, {units.number(first.chance, digits=0)}")
    heading = tag("h3", f"Cloze test, accuracy on {len(first.item_scores):,} items")
    return tag("div", heading, bars(items, mark=mark, label="Cloze accuracy by method"))
