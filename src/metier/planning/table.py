"""A plan as people read it: a column for each method, or a line where they are many, and sentences below."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from metier.catalogue.tree import method_of
from metier.errors import UnsupportedModelError
from metier.planning.devices import REACHED_BANDWIDTH, REACHED_RATE
from metier.planning.estimate import KINDS, TRACED
from metier.planning.kv_cache import KvCache
from metier.planning.segments import StepTrace
from metier.planning.sharding import PARTED_KINDS
from metier.planning.spelling import count, duration, size

if TYPE_CHECKING:
    from metier.planning.estimate import Estimate
    from metier.planning.plan import Plan, Row

LONG = 32_768
"""Tokens of the sequence for which the KV cache is shown."""
_IN_THE_CACHE = ("prefix", "cartridge")
"""Methods of PEFT that put a cache of their own in place of the model's."""
MOST_COLUMNS = 8
"""Methods that are shown side by side; more of them are a line each."""
_AFTER = (
    "device",
    "host",
    "disk",
    "delta",
    "checkpoint",
    "forward",
    "backward",
    "moved",
    "step",
    "in all",
    "inference",
    "cache",
    "fits",
)
_SENT = ("sent", "sending")
"""In several processes: bytes, and seconds where a link is named."""


def kinds_of(plan: Plan) -> tuple[str, ...]:
    """Of bytes, in the order in which they are shown."""
    return KINDS if plan.world is None else PARTED_KINDS


def _lines(plan: Plan) -> tuple[str, ...]:
    """Of the table, from top to bottom."""
    sent = () if plan.world is None else _SENT
    return ("trained", *kinds_of(plan), *_AFTER[:-3], *sent, *_AFTER[-3:])


def _cells(plan: Plan, row: Row) -> list[str]:
    found, kinds = row.estimate, kinds_of(plan)
    if found is None:
        return [*["–"] * (len(_lines(plan)) - 1), row.verdict]
    trace = found.trace
    return [
        count(found.state.num_trained),
        *("–" if kind in TRACED and trace is None else size(found.device_bytes[kind]) for kind in kinds),
        f"{'> ' if trace is None else ''}{size(found.total_device_bytes)}",
        size(found.host_bytes),
        size(found.disk_bytes),
        size(found.delta_bytes),
        size(found.checkpoint_bytes),
        *_teraflops(row.config.gradient_accumulation_steps, trace),
        *_time_cells(plan, row),
        *_sent_cells(row),
        *_inference_cells(plan, found),
        row.verdict,
    ]


def _inference_cells(plan: Plan, found: Estimate) -> list[str]:
    """When it generates: operations of a token, as a share of the base's, and bytes of a sequence's KV cache."""
    added, grown = found.added_at_inference, added_cache_bytes(plan, found)
    return ["–" if added is None else f"+{added:.0%}", "–" if grown is None else f"+{size(grown)}"]


def added_cache_bytes(plan: Plan, found: Estimate) -> int | None:
    """What a method's virtual tokens add to a long sequence's KV cache; None where that is not known."""
    tokens, cache = found.num_virtual_tokens, plan.kv_cache
    if not tokens or cache is None:
        return 0 if tokens == 0 else None
    if found.config.method not in _IN_THE_CACHE:
        return cache.soft_prompt_bytes(tokens, num_tokens=LONG)
    try:
        return cache.prefix_bytes(tokens, num_tokens=LONG)
    except UnsupportedModelError:
        return None


def _teraflops(num_batches: int, trace: StepTrace | None) -> list[str]:
    """Of a step of the optimizer, forward and backward."""
    if trace is None:
        return ["–"] * 2
    both = [num_batches * trace.flops("forward") / 1e12, num_batches * trace.flops("backward") / 1e12]
    return [f"{number:.3g} TFLOPs" if number < 999.5 else f"{number:,.0f} TFLOPs" for number in both]


def _time_cells(plan: Plan, row: Row) -> list[str]:
    """Bytes that come from another tier in a step, the step's time, and that of all steps where their number is known.

    A step of the optimizer is meant, with all batches whose gradients it sums up.
    """
    if row.estimate is None or row.estimate.trace is None:
        return ["–"] * 3
    moved = plan.moved_bytes(row.estimate)
    if row.time is None:
        return [size(sum(moved.values())), "–", "–"]
    seconds = plan.seconds_in_all(row)
    return [size(sum(moved.values())), duration(row.time.seconds), "–" if seconds is None else duration(seconds)]


def _sent_cells(row: Row) -> list[str]:
    """Of a process of several, in a step of the optimizer; none of one alone."""
    if row.estimate is None or row.estimate.on_rank is None:
        return []
    seconds = "–" if row.link_seconds is None else duration(row.link_seconds)
    return [size(row.estimate.on_rank.sent_bytes), seconds]


def shown(plan: Plan) -> Group:
    """For a terminal."""
    return Group(_table(plan), *_remarks(plan))


def _table(plan: Plan) -> Table:
    if _is_long(plan):
        return _list(plan)
    table = Table(title=_title(plan), title_justify="left")
    table.add_column("at the peak of a step")
    for row in plan.rows:
        table.add_column(row.name.replace(" ", "\n"), justify="right")
    cells = [_cells(plan, row) for row in plan.rows]
    for number, name in enumerate(_lines(plan)):
        table.add_row(name, *(column[number] for column in cells), end_section=name in ("trained", KINDS[-1], "disk"))
    return table


def _list(plan: Plan) -> Table:
    """Of many methods: a line each, with what tells them apart."""
    table = Table(title=_title(plan), title_justify="left")
    names = ("trained", "of the step", "device", "host", "delta", "step", "inference", "cache", "fits")
    table.add_column("at the peak of a step")
    for name in names:
        table.add_column(name, justify="right")
    for row in plan.rows:
        found = row.estimate
        if found is None:
            table.add_row(row.name, *["–"] * (len(names) - 1), row.verdict)
            continue
        is_traced = found.trace is not None
        table.add_row(
            row.name,
            count(found.state.num_trained),
            size(sum(found.device_bytes[kind] for kind in TRACED)) if is_traced else "–",
            f"{'' if is_traced else '> '}{size(found.total_device_bytes)}",
            size(found.host_bytes),
            size(found.delta_bytes),
            "–" if row.time is None else duration(row.time.seconds),
            *_inference_cells(plan, found),
            f"no: {size(row.lacking_bytes)} more" if row.lacking_bytes else row.verdict,
        )
    return table


def _is_long(plan: Plan) -> bool:
    return len({(row.config.method, row.setting) for row in plan.rows}) > MOST_COLUMNS


def _title(plan: Plan) -> str:
    memory = f"{size(plan.budget.device_bytes)} of memory"
    if plan.budget.host_bytes is not None:
        memory = f"{size(plan.budget.device_bytes)} on the device, {size(plan.budget.host_bytes)} on the host"
    runtime = f"; {size(plan.budget.runtime_bytes)} of it is the process's own"
    each = "" if plan.world is None else f"each of {plan.world.size:,} processes has "
    return f"{plan.rows[0].config.model}: {each}{memory}{runtime if plan.budget.runtime_bytes else ''}"


def _remarks(plan: Plan) -> Iterable[Text]:
    best = plan.recommended
    fitting = [row for row in plan.rows if row.fits]
    if best is None and fitting:
        said = f"{len(fitting)} methods fit" if _is_long(plan) else f"{', '.join(row.name for row in fitting)}: fits"
        yield Text(f"{said}. Which scores best was not measured; metier compare does it on your task.")
    if best is not None:
        where, share = plan.measured.where, plan.measured.methods[best.config.method].share
        yield Text(
            f"{best.name} fits, and of what fits had the highest score {where}: {share:.0%} of full fine-tuning's gain."
        )
        if plan.level:
            named = (f"{row.name} ({size(row.estimate.total_bytes)})" for row in plan.level if row.estimate is not None)
            yield Text(f"Not told apart from the best method there, the least memory first: {', '.join(named)}.")
        deltas = {row.name: row.estimate.delta_bytes for row in plan.rows if row.fits and row.estimate}
        smallest = min(deltas, key=lambda name: deltas[name])
        if smallest != best.name:
            yield Text(f"The smallest delta is that of {smallest}: {size(deltas[smallest])}.")
    for row in plan.rows:
        name = row.name
        if row.change is not None:
            total = row.change.estimate.total_device_bytes + plan.budget.runtime_bytes
            yield Text(f"{name} fits with {row.change}: {size(total)}.")
        elif row.lacking_bytes and not _is_long(plan):
            yield Text(f"{name} lacks {size(row.lacking_bytes)}; no change that is known here makes it fit.")
        elif row.why_not:
            yield Text(f"{name}: {row.why_not}")
    yield from _in_several(plan)
    bottlenecks: dict[str, list[str]] = {}
    for row in plan.rows:
        if row.time is not None:
            bottlenecks.setdefault(row.time.bottleneck, []).append(row.name)
    if bottlenecks:
        said = "; ".join(f"{', '.join(methods)}: {part}" for part, methods in bottlenecks.items())
        yield Text(f"What most of a step's time goes to: {said}.")
    peaks: dict[str, list[str]] = {}
    for row in plan.rows:
        if row.estimate is not None and row.estimate.trace is not None:
            peaks.setdefault(_place_of_peak(row.estimate.trace), []).append(row.name)
    if peaks:
        said = "; ".join(f"{', '.join(names)}: {place}" for place, names in peaks.items())
        yield Text(f"Where the peak is: {said}.")
    for row in plan.rows:
        if row.spread is not None:
            yield Text(f"{row.name}, from one half of the profile to the other: {row.spread}.")
    if plan.device is not None:
        yield Text(
            f"Seconds are by the maker's figures of {plan.device}, of which {REACHED_RATE:.0%} of the rates and "
            f"{REACHED_BANDWIDTH:.0%} of the bandwidths are taken to be reached; nothing was measured on a GPU. What "
            "its runtime takes of the memory is not counted.",
            style="yellow",
        )
    if plan.was_busy:
        yield Text(
            "Others took this machine's cores while it was measured. Its seconds may be far too long, and are not "
            "kept.",
            style="yellow",
        )
    if plan.why_no_time:
        yield Text(f"Seconds are not known: {plan.why_no_time}")
    if plan.kv_cache is not None:
        yield Text(_cache_in_words(plan.kv_cache))
        yield from _serving(plan, plan.kv_cache)
    yield from (Text(f"Assumed: {assumption}", style="dim") for assumption in plan.assumptions)


def _place_of_peak(trace: StepTrace) -> str:
    """The part of the step whose temporaries are those of the table."""
    peak = trace.peak()
    if peak.layer is None:
        return "forward"
    num_layers = len(trace.stands_for)
    return "the output layer and the loss" if peak.layer == num_layers else f"backward through layer {peak.layer}"


def _in_several(plan: Plan) -> Iterable[Text]:
    """From how many processes on a run fits, what they send, and over what."""
    if plan.world is None:
        return
    yield from (Text(str(pays)) for pays in plan.pays)
    for row in plan.rows:
        if row.estimate is not None and row.estimate.on_rank is not None and row.estimate.on_rank.sent:
            parts = ", ".join(f"{size(number)} by {name}" for name, number in row.estimate.on_rank.sent.items())
            yield Text(f"{row.name} sends from each process, in a step: {parts}.")
    link = plan.world.slowest_link
    if link is None:
        yield Text("Seconds of sending are not known. Name what is sent over: --link nvlink4,infiniband-ndr.")
        return
    nodes = f"{plan.world.devices_per_node} processes a machine"
    yield Text(
        f"Sending is by the maker's figures of {link.name}, the slowest link of the ring ({nodes}), of which "
        f"{REACHED_BANDWIDTH:.0%} are taken to be reached; it was not measured. What of it is hidden behind computing "
        "is not known.",
        style="yellow",
    )


def _serving(plan: Plan, cache: KvCache) -> Iterable[Text]:
    """How many sequences and deltas fit beside each other on the device that runs are planned for."""
    known = {row.name: row.estimate for row in plan.rows if row.estimate is not None}
    whole = {name for name, found in known.items() if method_of(found.config.method).saves_whole_model}
    deltas = {name: found.delta_bytes for name, found in known.items() if name not in whole}
    if not known or not cache.token_bytes:
        return
    # full fine-tuning keeps them in another dtype
    weights = min(found.state.base_bytes for found in known.values())
    memory = max(0, plan.budget.device_bytes - plan.budget.runtime_bytes)
    fitting = cache.num_sequences_that_fit(memory, LONG, weights_bytes=weights)
    said = f"Serving on it, the base takes {size(weights)} and leaves room for {fitting:,} such sequences"
    if deltas and fitting:
        smallest = min(deltas, key=lambda method: deltas[method])
        number = cache.num_deltas_that_fit(
            memory, LONG, num_sequences=1, weights_bytes=weights, delta_bytes=max(1, deltas[smallest])
        )
        said += f", or for one and {number:,} deltas of {smallest}"
    yield Text(f"{said}.")


def _cache_in_words(cache: KvCache) -> str:
    """Of the base; what a method's virtual tokens add stands in the table."""
    kinds = ", ".join(dict.fromkeys(str(layer) for layer in cache.layers))
    return (
        f"When it generates, the KV cache ({kinds}) takes {size(cache.token_bytes)} a token, "
        f"{size(cache.bytes_for(LONG))} for a sequence of {LONG:,}."
    )
