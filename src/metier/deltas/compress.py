"""Store a delta in fewer bytes, and turn it back into an ordinary one.

Three ways, of which each says what it costs: rows rounded to bfloat16, which stays an ordinary delta; 8 bits a value;
and the difference from the base as a product of low rank. The last two are folders of their own (`compressed_file.py`)
that `decompress` turns into a delta with the very bits that were measured; then `verify` and `merge` take it.
"""

# M rows and N columns of one expert's matrix as it is stored

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from metier.deltas.compressed_file import CompressedDelta, read_compressed, sums_of, write_compressed
from metier.deltas.encode import Parts, decode, encode_int8, encode_low_rank, relative_error
from metier.deltas.format import COMPRESSED_FILE, CONFIG_FILE, TENSORS_FILE, rows_name
from metier.deltas.on_base import check_experts, check_fingerprint, check_tensors
from metier.deltas.read import Delta, read_delta
from metier.deltas.tensors_file import StoredTensor
from metier.deltas.whole_folder import check_replaceable, written_whole
from metier.deltas.write import DTYPE_NAMES, as_stored, check_delta_folder, write_delta
from metier.errors import BaseMismatchError, ConfigError
from metier.methods.esft import EsftConfig
from metier.models.load import LoadedModel, load
from metier.models.moe import moe_layers

Method = Literal["bf16", "int8", "low_rank"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressionReport:
    """What compressing a delta saved and lost.

    The error of a row, which is one expert's matrix of one parameter, is ‖stored − row‖ / ‖row − base‖: the share of
    what training changed that is lost. 0 is nothing, 1 is as bad as the base.
    """

    method: Method
    bytes_before: int
    """Of the tensors' file."""
    bytes_after: int
    max_error: float
    mean_error: float
    encodings: dict[str, int]
    """How many rows are stored in which way, such as `{"low rank 12": 3, "plain": 1}`."""


def compress(
    delta: str | Path,
    base: str | Path | LoadedModel,
    output: str | Path,
    *,
    method: Method,
    max_relative_error: float | None = None,
    trust_remote_code: bool = False,
) -> CompressionReport:
    """Write a delta to `output` in fewer bytes, whole or not at all.

    Args:
        delta: the adapter's folder.
        base: the one it was trained on: a folder, a hub id, "embedded", or a model from `metier.load`.
        output: new, empty, or a former result of the same kind.
        method: "bf16" (an ordinary delta), "int8" (see `encode_int8`) or "low_rank" (see `encode_low_rank`).
        max_relative_error: with "low_rank" and only there: the error that each row may have, over 0 and under 1.
        trust_remote_code: as `metier.load`.

    Raises:
        ConfigError: an unknown method; `max_relative_error` is missing, not needed or out of range; `output` holds
            other things.
        CorruptDeltaError, DeltaError: as `read_delta`; or the tensors do not fit the base's; or a row is not finite.
        BaseMismatchError, SelectionError: the delta was trained on another base.
        ModelError: the base cannot be loaded.
    """
    output = Path(output)
    _check_arguments(method, max_relative_error, output)
    files = read_delta(delta, whole_rows_for="compression")
    loaded = base if isinstance(base, LoadedModel) else load(base, trust_remote_code=trust_remote_code)
    check_fingerprint(files, loaded.model, loaded.source)
    check_experts(files, loaded.model, loaded.source)
    check_tensors(files, loaded.model)
    bases = _base_rows(loaded, files.config.experts)
    rows = {rows_name(files.config.paths[i], n): t for i, named in files.load_rows().items() for n, t in named.items()}
    encoded = {name: _encode(t, bases[name], method, max_relative_error or 0.0) for name, t in rows.items()}
    served = {name: _decode(parts, bases[name], _dtype(rows[name], method)) for name, parts in encoded.items()}
    if method == "bf16":
        write_delta(output, model=loaded.model, config=EsftConfig.from_pretrained(str(files.folder)), rows=served)
    else:
        ids = {rows_name(path, ""): files.config.experts[layer] for layer, path in files.config.paths.items()}
        with written_whole(output) as new:
            write_compressed(new, files, _named(encoded, ids), {name: as_stored(t) for name, t in served.items()})
    errors = [e for name, t in rows.items() for e in map(relative_error, t, bases[name], served[name])]
    return CompressionReport(
        method=method,
        bytes_before=(files.folder / TENSORS_FILE).stat().st_size,
        bytes_after=(output / (TENSORS_FILE if method == "bf16" else COMPRESSED_FILE)).stat().st_size,
        max_error=max(errors),
        mean_error=sum(errors) / len(errors),
        encodings=dict(Counter(_encoding(parts) for stack in encoded.values() for parts in stack)),
    )


def decompress(
    folder: str | Path, base: str | Path | LoadedModel, output: str | Path, *, trust_remote_code: bool = False
) -> Delta:
    """Turn a compressed delta back into an ordinary one: the rows that `compress` measured, to the bit.

    Args:
        folder: of the compressed delta.
        base: the one it was compressed on.
        output: the delta's folder: new, empty, or a former delta's.
        trust_remote_code: as `metier.load`.

    Raises:
        CorruptDeltaError, DeltaError: as `read_compressed`.
        BaseMismatchError: the base is another, also where only its experts are, which the fingerprint does not see.
        ConfigError: `output` holds other things.
        ModelError: the base cannot be loaded.
    """
    folder, output = Path(folder), Path(output)
    check_delta_folder(output)
    compressed = read_compressed(folder)
    loaded = base if isinstance(base, LoadedModel) else load(base, trust_remote_code=trust_remote_code)
    check_fingerprint(compressed, loaded.model, loaded.source)
    check_experts(compressed, loaded.model, loaded.source)
    bases = _base_rows(loaded, compressed.config.experts)
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    rows = {}
    for name, stack in _load_parts(compressed).items():
        rows[name] = _decode(stack, bases[name], dtypes[compressed.rows[name][0]])
    got = sums_of({name: as_stored(tensor) for name, tensor in rows.items()})
    for name in sorted(got.keys() | compressed.rows_sums.keys()):
        if got.get(name) != compressed.rows_sums.get(name):
            raise BaseMismatchError(
                f"{folder}: {name}: decoding on base {loaded.source!r} does not give the rows that were compressed; "
                "nothing was written.\nThe experts of this base are others, or it was loaded in another dtype."
            )
    write_delta(output, model=loaded.model, config=EsftConfig.from_pretrained(str(folder)), rows=rows)
    return read_delta(output)


def _check_arguments(method: Method, max_relative_error: float | None, output: Path) -> None:
    if method not in ("bf16", "int8", "low_rank"):
        raise ConfigError(f"method: got {method!r}, expected 'bf16', 'int8' or 'low_rank'.")
    if (max_relative_error is not None) != (method == "low_rank"):
        raise ConfigError(
            f"max_relative_error: got {max_relative_error} for method {method!r}, expected a share such as 0.1 with "
            "'low_rank', and None with the others, whose error follows from their bits."
        )
    if max_relative_error is not None and not 0 < max_relative_error < 1:
        raise ConfigError(f"max_relative_error: got {max_relative_error}, expected a share over 0 and under 1.")
    if method == "bf16":
        check_delta_folder(output)
    else:
        check_replaceable(
            output,
            known=frozenset({CONFIG_FILE, COMPRESSED_FILE}),
            marker=COMPRESSED_FILE,
            what="a former compressed delta",
        )


def _base_rows(base: LoadedModel, experts: dict[int, tuple[int, ...]]) -> dict[str, Tensor]:
    """The base's own rows of the selected experts by the stored name of the delta's, on the CPU."""
    return {
        rows_name(layer.path, name): getattr(layer.experts, name).detach()[list(experts[layer.index])].cpu()
        for layer in moe_layers(base.model)
        if layer.index in experts
        for name in layer.parameter_names()
    }


def _encode(rows: Tensor, base: Tensor, method: Method, max_relative_error: float) -> list[Parts]:
    """Each expert's matrix or bias of one parameter; biases, which are small, stay as they are."""
    if method == "bf16":
        return [{"plain": matrix.bfloat16()} for matrix in rows]
    if rows.dim() == 2:
        return [{"plain": bias} for bias in rows]
    if method == "int8":
        return [encode_int8(matrix_MN, base_MN) for matrix_MN, base_MN in zip(rows, base, strict=True)]
    return [
        encode_low_rank(matrix_MN, base_MN, max_relative_error=max_relative_error)
        for matrix_MN, base_MN in zip(rows, base, strict=True)
    ]


def _decode(stack: list[Parts], base: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.stack([decode(parts, base_MN, dtype) for parts, base_MN in zip(stack, base, strict=True)])


def _dtype(rows: Tensor, method: Method) -> torch.dtype:
    return torch.bfloat16 if method == "bf16" else rows.dtype


def _named(
    encoded: dict[str, list[Parts]], ids: dict[str, tuple[int, ...]]
) -> dict[str, tuple[StoredTensor, memoryview]]:
    named: dict[str, tuple[StoredTensor, memoryview]] = {}
    for name, stack in encoded.items():
        experts = next(experts for start, experts in ids.items() if name.startswith(start))
        for expert, parts in zip(experts, stack, strict=True):
            named |= {f"{name}.{expert}.{part}": as_stored(tensor) for part, tensor in parts.items()}
    return named


def _load_parts(delta: CompressedDelta) -> dict[str, list[Parts]]:
    """By the stored name of the rows: the parts of each expert in the order of the rows."""
    loaded: dict[str, list[Parts]] = {}
    with safe_open(delta.folder / COMPRESSED_FILE, framework="pt") as file:
        for layer, path in delta.config.paths.items():
            for name in delta.rows:
                if name.startswith(rows_name(path, "")):
                    loaded[name] = [
                        {part: file.get_tensor(stored) for part, stored in delta.parts_of(name, expert).items()}
                        for expert in delta.config.experts[layer]
                    ]
    return loaded


def _encoding(parts: Parts) -> str:
    if "left" in parts:
        return f"low rank {parts['left'].shape[1]}"
    return {"plain": "plain", "int8": "int8", "int8_difference": "int8 of the difference"}[
        next(part for part in parts if part != "scale")
    ]
