"""What a run says to a person: of slow number formats, of padding, and of what it took beside what was foreseen."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from rich.console import Console
from transformers import PreTrainedModel

from metier.config import RunConfig
from metier.data.collate import padding_share
from metier.data.encode import EncodedSet, Item
from metier.planning.spelling import duration, size

WORTH_TELLING = 0.2
"""Share of padding in a batch from which a run says so."""


def tell_of_padding(items: EncodedSet[Item], config: RunConfig, console: Console) -> None:
    """Say how much of a batch is padding, where it is much."""
    share = padding_share([len(item.input_ids) for item in items.items], config.per_device_train_batch_size)
    if share >= WORTH_TELLING:
        console.print(f"{share:.0%} of what a batch computes is padding; padding_free: true leaves it out.")


def tell_of_repeats(num_records: int, config: RunConfig, num_processes: int, console: Console) -> None:
    """Say that several processes fill an epoch's last round of batches with its first records, where they have to."""
    num_filled = -num_records % (config.per_device_train_batch_size * num_processes)
    if num_processes > 1 and num_filled:
        console.print(
            f"{num_filled} of an epoch's first records are trained on again at its end, so that each of "
            f"{num_processes} processes has a whole batch; one process would have them once."
        )


def tell_of_slow_bf16(model: PreTrainedModel, config: RunConfig, console: Console) -> None:
    """Say that this CPU computes bfloat16 slowly, where the run would have it so."""
    if model.device.type != "cpu" or not (config.bf16 or model.dtype == torch.bfloat16):
        return
    can = torch.cpu.get_capabilities()
    if can.get("architecture") == "x86_64" and not (can.get("avx512_bw") or can.get("avx_ne_convert")):
        console.print(
            "This CPU has no instructions for bfloat16: its products take some 50 times as long as float32's, which "
            "dtype: float32 and bf16: false give.",
            style="yellow",
        )


def tell_of_what_is_foreseen(foreseen: Mapping[str, float | str], console: Console) -> None:
    """Say before the first step what the run will take, as far as that is known."""
    parts = []
    if "peak_memory_bytes" in foreseen:
        parts.append(f"{size(int(foreseen['peak_memory_bytes']))} at the peak")
    if "step_seconds" in foreseen:
        parts.append(f"{duration(float(foreseen['step_seconds']))} a step")
        parts.append(f"{duration(float(foreseen['train_seconds']))} in all")
    if parts:
        console.print(f"Foreseen: {', '.join(parts)}.", highlight=False)


def peak_beside_foreseen(peak: int, foreseen: Mapping[str, float | str]) -> str:
    """The peak of memory, measured and foreseen."""
    if "peak_memory_bytes" not in foreseen:
        return f"Peak memory {size(peak)}; what it would be was not foreseen: {foreseen['not_traced']}"
    expected = int(foreseen["peak_memory_bytes"])
    return f"Peak memory {size(peak)}, {size(expected)} foreseen ({expected / peak - 1:+.1%})"


def step_beside_foreseen(seconds: float | None, foreseen: Mapping[str, float | str]) -> str:
    """The time of a step, measured and foreseen."""
    if seconds is None:
        return "There was no step left to take."
    if "step_seconds" not in foreseen:
        why = foreseen.get("not_timed", foreseen.get("not_traced"))
        return f"A step took {seconds:.3g} s; what it would take was not foreseen: {why}"
    expected = float(foreseen["step_seconds"])
    return (
        f"A step took {seconds:.3g} s, {expected:.3g} s foreseen ({expected / seconds - 1:+.0%}), most of it for "
        f"{foreseen['bottleneck']}"
    )
