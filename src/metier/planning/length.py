"""How many steps a run has."""

from __future__ import annotations

import math

from metier.config import RunConfig


def num_steps(num_items: int, config: RunConfig) -> int:
    """Of the optimizer, as the trainer counts them.

    Args:
        num_items: records of a process, general ones included.
        config: of the run.
    """
    if config.max_steps is not None:
        return config.max_steps
    batches = math.ceil(num_items / config.per_device_train_batch_size)
    return math.ceil(config.num_train_epochs * math.ceil(batches / config.gradient_accumulation_steps))


def planned_steps(config: RunConfig, num_records: int | None, num_processes: int) -> int | None:
    """The same from the number of the task's records; None where neither that nor the run says it."""
    if num_records is None:
        return config.max_steps
    num_general = 0 if config.general_dataset is None else round(config.general_ratio * num_records)
    return num_steps(math.ceil((num_records + num_general) / num_processes), config)
