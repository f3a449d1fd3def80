"""What a run says of itself before it begins."""

from __future__ import annotations

from io import StringIO

import pytest
from accelerate.data_loader import BatchSamplerShard
from rich.console import Console
from torch.utils.data import BatchSampler, SequentialSampler

from metier.config import RunConfig
from metier.training.telling import tell_of_repeats


@pytest.mark.parametrize("num_records", [120, 121, 122, 123])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_records_that_processes_repeat_are_told_as_accelerate_repeats_them(num_records: int, size: int) -> None:
    config = RunConfig(model="m", dataset="d", output_dir="o", per_device_train_batch_size=2)
    told = StringIO()
    tell_of_repeats(num_records, config, size, Console(file=told, width=1000))
    sampler = BatchSampler(SequentialSampler(range(num_records)), 2, drop_last=False)
    shards = [BatchSamplerShard(sampler, size, rank) for rank in range(size)] if size > 1 else [sampler]
    num_repeated = sum(len(batch) for shard in shards for batch in shard) - num_records
    expected = f"{num_repeated} of an epoch's first records are trained on again" if num_repeated else ""
    assert told.getvalue().startswith(expected)
    assert bool(told.getvalue()) == bool(num_repeated)
