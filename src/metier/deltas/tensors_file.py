"""Write `adapter_model.safetensors`, and read its header and its sums without loading a tensor.

The library's own writer puts the metadata in another order every time; here the same delta gives the same file.
The `safetensors` library judges whether the header is valid (its checks are the format's: offsets that cover the file
without a hole, sizes that fit the shapes). It gives no offsets, so the same header is then parsed for them.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from metier.deltas.format import COMPRESSED_FILE, DAMAGED, TENSORS_FILE, tensor_sum
from metier.errors import CorruptDeltaError

_CHUNK_BYTES = 1 << 24
DTYPES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""Bytes of an item, by the dtypes that rows may have."""
IDS_DTYPE = "I64"
_ITEM_BYTES = {**DTYPES, IDS_DTYPE: 8, "I8": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file, without its values."""

    dtype: str
    """As safetensors spells it: F32, BF16, F16 or F64; I64 for expert ids."""
    shape: tuple[int, ...]
    first_byte: int = 0
    """In the file, not in its data part."""
    end_byte: int = 0

    @property
    def num_parameters(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


def write_tensors(path: Path, tensors: Mapping[str, tuple[StoredTensor, memoryview]], metadata: dict[str, str]) -> None:
    """Write a safetensors file: header and tensors in a fixed order.

    Args:
        tensors: by name; where a tensor lies in the file is decided here, so its `first_byte` and `end_byte` are not
            looked at.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    # the widest dtypes first, so that every tensor begins at a multiple of its item size
    ordered = sorted(tensors.items(), key=lambda item: (-_ITEM_BYTES[item[1][0].dtype], item[0]))
    offset = 0
    for name, (tensor, data) in ordered:
        header[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [offset, offset + data.nbytes],
        }
        offset += data.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, (_, data) in ordered:
            file.write(data)


def read_header(folder: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """All tensors of a delta by name, and the file's metadata.

    Raises:
        CorruptDeltaError: the file is missing, or as `read_file_header`.
    """
    path = folder / TENSORS_FILE
    if (folder / COMPRESSED_FILE).is_file():
        raise CorruptDeltaError(
            f"{folder}: got a compressed delta, expected {TENSORS_FILE}.\nDecompress it first: metier decompress."
        )
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        got = "adapter_model.bin, a pickle, which can run code when it is read" if pickled else "no such file"
        raise CorruptDeltaError(f"{path}: got {got}, expected the delta's tensors as safetensors.\n{DAMAGED}")
    return read_file_header(path)


def read_file_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """All tensors of a safetensors file by name, and its metadata.

    Raises:
        CorruptDeltaError: it is no safetensors file, is truncated, or holds a tensor of a dtype that no delta has.
    """
    try:
        with safe_open(path, framework="np") as file:
            names = set(file.keys())
        header, data_start = parse_header(path)
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise CorruptDeltaError(f"{path}: got no valid safetensors file ({error}).\n{DAMAGED}") from error
    metadata = header.pop("__metadata__", None) or {}
    assert header.keys() == names, "safetensors and json read other names in one header"
    tensors = {}
    for name, entry in sorted(header.items()):
        if entry["dtype"] not in _ITEM_BYTES:
            raise CorruptDeltaError(
                f"{path}: {name}: got dtype {entry['dtype']}, expected one of {', '.join(DTYPES)}.\n{DAMAGED}"
            )
        first, end = entry["data_offsets"]
        tensors[name] = StoredTensor(
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            first_byte=data_start + first,
            end_byte=data_start + end,
        )
    return tensors, metadata


def stored_integers(path: Path, tensor: StoredTensor) -> list[int]:
    """The values of a tensor of dtype I64 and one axis."""
    with path.open("rb") as file:
        file.seek(tensor.first_byte)
        data = file.read(tensor.end_byte - tensor.first_byte)
    return [value for (value,) in struct.iter_unpack("<q", data)]


def stored_sum(path: Path, tensor: StoredTensor) -> str:
    """`tensor_sum` of what lies in the file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return tensor_sum(tensor.dtype, tensor.shape, _chunks(mapped, tensor))


def _chunks(mapped: mmap.mmap, tensor: StoredTensor) -> Iterator[bytes]:
    for first in range(tensor.first_byte, tensor.end_byte, _CHUNK_BYTES):
        yield mapped[first : min(first + _CHUNK_BYTES, tensor.end_byte)]


def parse_header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header as JSON, with `__metadata__` if it has any, and the byte at which its data begin."""
    with path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(num_bytes), object_pairs_hook=_no_key_twice)
    assert isinstance(header, dict), "safetensors accepted a header that is no JSON object"
    return header, 8 + num_bytes


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands twice in the header")
    return values
