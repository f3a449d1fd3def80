"""The folder of a compressed delta: `adapter_config.json` as it was, and `compressed_delta.safetensors`.

The second holds the parts of each expert's matrix, named `<name of the rows>.<expert id>.<part>` (`encode.py` says
which parts there are), and in its metadata the dtype and shape of the rows that decoding gives, and their sums.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from metier import __version__
from metier.deltas.adapter_config import AdapterConfig, read_adapter_config
from metier.deltas.encode import parts_fit
from metier.deltas.format import (
    COMPRESSED_FILE,
    COMPRESSED_VERSION,
    CONFIG_FILE,
    DAMAGED,
    HEADER_SUM,
    experts_text,
    header_sum,
    rows_name,
    tensor_sum,
)
from metier.deltas.read import Delta, check_sums
from metier.deltas.tensors_file import StoredTensor, read_file_header, write_tensors
from metier.errors import CorruptDeltaError, DeltaError

_KEYS = frozenset(
    {
        "format",
        "metier_compressed_delta",
        "metier_version",
        "base_fingerprint",
        "num_experts",
        "experts",
        "rows",
        "rows_sha256",
        "sha256",
        HEADER_SUM,
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressedDelta:
    """A compressed delta whose files passed every check; nothing is decoded yet."""

    folder: Path
    config: AdapterConfig
    rows: dict[str, tuple[str, tuple[int, ...]]]
    """Dtype and shape of the rows that decoding gives, by their stored name."""
    rows_sums: dict[str, str]
    """`tensor_sum` of those rows."""
    parts: dict[str, StoredTensor]

    def parts_of(self, name: str, expert: int) -> dict[str, str]:
        """Names in the file of the parts of one expert's matrix, by part."""
        start = f"{name}.{expert}."
        return {stored.removeprefix(start): stored for stored in self.parts if stored.startswith(start)}


def write_compressed(
    folder: Path,
    delta: Delta,
    parts: dict[str, tuple[StoredTensor, memoryview]],
    rows: dict[str, tuple[StoredTensor, memoryview]],
) -> None:
    """Write both files into `folder`.

    Args:
        delta: what was compressed.
        parts: by their name in the file.
        rows: what decoding the parts gives; only dtypes, shapes and sums are written.
    """
    config = delta.config
    metadata = {
        "format": "pt",
        "metier_compressed_delta": COMPRESSED_VERSION,
        "metier_version": __version__,
        "base_fingerprint": str(config.base_fingerprint),
        "num_experts": str(config.num_experts),
        "experts": experts_text(config.experts),
        "rows": json.dumps({name: [row.dtype, list(row.shape)] for name, (row, _) in sorted(rows.items())}),
        "rows_sha256": json.dumps(sums_of(rows)),
        "sha256": json.dumps(sums_of(parts)),
    }
    (folder / CONFIG_FILE).write_bytes((delta.folder / CONFIG_FILE).read_bytes())
    write_tensors(folder / COMPRESSED_FILE, parts, {**metadata, HEADER_SUM: header_sum(metadata)})


def sums_of(tensors: dict[str, tuple[StoredTensor, memoryview]]) -> dict[str, str]:
    """`tensor_sum` of each tensor by its name."""
    return {name: tensor_sum(x.dtype, x.shape, [data]) for name, (x, data) in sorted(tensors.items())}


def read_compressed(folder: Path) -> CompressedDelta:
    """The compressed delta in `folder`, checked as `read_delta` checks a plain one.

    Raises:
        CorruptDeltaError: the folder holds none, or its files are truncated, altered, or do not fit together.
        DeltaError: a later version of metier wrote it in another format.
    """
    config = read_adapter_config(folder)
    where = folder / COMPRESSED_FILE
    if config.low_rank is not None:
        raise CorruptDeltaError(f"{folder}: got a {config.method} delta; only whole rows are compressed.\n{DAMAGED}")
    if not where.is_file():
        raise CorruptDeltaError(f"{where}: got no such file, expected a compressed delta.\nGive the folder of one.")
    parts, metadata = read_file_header(where)
    _check_metadata(where, metadata, config)
    check_sums(where, parts, metadata)
    rows = {name: (dtype, tuple(shape)) for name, (dtype, shape) in json.loads(metadata["rows"]).items()}
    sums = json.loads(metadata["rows_sha256"])
    delta = CompressedDelta(folder=folder, config=config, rows=rows, rows_sums=sums, parts=parts)
    _check_parts(where, delta)
    return delta


def _check_metadata(where: Path, metadata: dict[str, str], config: AdapterConfig) -> None:
    if metadata.get(HEADER_SUM) != header_sum(metadata):
        raise CorruptDeltaError(f"{where}: the metadata does not fit its own {HEADER_SUM}.\n{DAMAGED}")
    version = metadata.get("metier_compressed_delta")
    if version != COMPRESSED_VERSION:
        raise DeltaError(
            f"{where}: got a compressed delta of format {version!r}, expected {COMPRESSED_VERSION!r}.\n"
            f"It was written by metier {metadata.get('metier_version', 'of unknown version')}; install that."
        )
    if metadata.keys() != _KEYS:
        names = sorted(metadata.keys() ^ _KEYS)
        raise CorruptDeltaError(f"{where}: metadata keys are missing or unknown: {', '.join(names)}.\n{DAMAGED}")
    said = {
        "base_fingerprint": str(config.base_fingerprint),
        "num_experts": str(config.num_experts),
        "experts": experts_text(config.experts),
    }
    for key, got in said.items():
        if metadata[key] != got:
            raise CorruptDeltaError(
                f"{where}: {key}: adapter_config.json says {got}, but the tensors were written with {metadata[key]}.\n"
                "One of the two files was altered or comes from another delta; copy both again."
            )


def _check_parts(where: Path, delta: CompressedDelta) -> None:
    """Each expert's matrix of each row tensor has one complete set of parts, and there is nothing else."""
    left = set(delta.parts)
    for layer, path in delta.config.paths.items():
        for name, (dtype, shape) in delta.rows.items():
            for expert in delta.config.experts[layer] if name.startswith(rows_name(path, "")) else ():
                names = delta.parts_of(name, expert)
                kinds = {part: (delta.parts[stored].dtype, delta.parts[stored].shape) for part, stored in names.items()}
                if not parts_fit(kinds, shape[1:], dtype):
                    raise CorruptDeltaError(
                        f"{where}: {name} of expert {expert}: got the parts {kinds}, which do not make a matrix "
                        f"{dtype} {list(shape[1:])}.\n{DAMAGED}"
                    )
                left -= set(names.values())
    if left:
        raise CorruptDeltaError(f"{where}: got tensor {min(left)!r}, which is no part of a selected row.\n{DAMAGED}")
