"""Records: load them from wherever they are, and mix task records with general ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from metier.data.formats import parse_record
from metier.data.message import ROLES, Message, Record
from metier.data.sources import read_rows
from metier.errors import DataError

__all__ = ["ROLES", "Message", "Record", "load_records", "mix"]


def load_records(
    source: str | Path, *, split: str | None = None, limit: int | None = None, keep: Sequence[str] = ()
) -> list[Record]:
    """Load records of any supported format from a file, a folder of splits or a `datasets` name.

    Args:
        source: .jsonl, .json, .parquet or .csv; a folder with such files named by split; `embedded:NAME`,
            a task that comes along; or a `datasets` name, `name:configuration` where it has several.
        split: of a folder or a data set, `train` by default; a file has none.
        limit: load the first `limit` records only.
        keep: keys beyond those of the format that go into a record's `extra`.

    Returns:
        At least one record, in the order of the source.

    Raises:
        DataError: for anything that cannot be read or understood, with the file and the line.
        ConfigError: no such task comes along.
    """
    if limit is not None and limit < 1:
        raise DataError(f"{source}: limit must be at least 1, got {limit}.")
    rows = islice(read_rows(source, split=split), limit)
    records = [parse_record(row, origin, keep=keep) for origin, row in rows]
    if not records:
        raise DataError(f"{source}: no records. Expected at least one; check the path and the split.")
    return records


def mix(records: Sequence[Record], general: Sequence[Record], ratio: float, seed: int) -> list[Record]:
    """Task records and general ones in one random order, against forgetting.

    Args:
        records: the task's records; each appears once.
        general: general-purpose records, drawn without repeating one before all were drawn.
        ratio: general records for each task record. The paper mixes 1:1.
        seed: of the draw and the order.

    Paper: ESFT, arXiv:2407.01906, section 4 (alignment data mixed in for all methods).
    """
    if not records or not general:
        raise DataError(
            f"cannot mix {len(records)} task records with {len(general)} general ones: both need at least 1."
        )
    if ratio <= 0:
        raise DataError(f"general_ratio must be greater than 0, got {ratio}.")
    draw = random.Random(seed)
    num_general = round(len(records) * ratio)
    drawn: list[Record] = []
    while len(drawn) < num_general:
        drawn += draw.sample(general, min(len(general), num_general - len(drawn)))
    mixed = [*records, *drawn]
    draw.shuffle(mixed)
    return mixed
