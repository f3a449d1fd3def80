"""Whatever byte of a delta is altered: it is refused as corrupt, or what is read is what was written.

The second may only happen where nothing is said: in the white space of the two JSON texts, and in the notes of
`adapter_config.json` (names and versions), which the sums do not cover because people may edit them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.deltas.read import Delta, read_delta
from metier.errors import CorruptDeltaError

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
NUM_EXAMPLES = 200


@pytest.fixture(scope="module")
def whole(_saved: Path) -> Iterator[tuple[Path, Delta]]:
    with tempfile.TemporaryDirectory() as folder:
        for name in (CONFIG_FILE, TENSORS_FILE):
            Path(folder, name).write_bytes((_saved / name).read_bytes())
        yield Path(folder), read_delta(_saved)


def read_altered(folder: Path, name: str, altered: bytes) -> Delta | None:
    """The delta with one file altered, or None where it was refused. The file is restored."""
    original = (folder / name).read_bytes()
    (folder / name).write_bytes(altered)
    try:
        delta = read_delta(folder)
        rows = delta.load_rows()
    except CorruptDeltaError:
        return None
    finally:
        (folder / name).write_bytes(original)
    want = read_delta(folder).load_rows()
    assert all(torch.equal(rows[i][n], want[i][n]) for i in want for n in want[i])
    return delta


@settings(deadline=None, max_examples=NUM_EXAMPLES)
@given(st.integers(0, 2**32), st.integers(0, 255), st.booleans())
def test_an_altered_byte_of_the_tensors(whole: tuple[Path, Delta], at: int, byte: int, in_header: bool) -> None:
    folder, original = whole
    data = bytearray((folder / TENSORS_FILE).read_bytes())
    header_end = 8 + int.from_bytes(data[:8], "little")
    at %= header_end if in_header else len(data)
    before, data[at] = data[at], byte
    delta = read_altered(folder, TENSORS_FILE, bytes(data))
    if delta is not None:
        assert byte == before or chr(before).isspace(), f"byte {at}: {before} became {byte} unseen"
        assert delta.tensors == original.tensors
        assert delta.metadata == original.metadata
        assert delta.config == original.config


@settings(deadline=None, max_examples=NUM_EXAMPLES)
@given(st.integers(0, 2**32), st.integers(0, 255))
def test_an_altered_byte_of_the_configuration(whole: tuple[Path, Delta], at: int, byte: int) -> None:
    folder, original = whole
    data = bytearray((folder / CONFIG_FILE).read_bytes())
    at %= len(data)
    data[at] = byte
    delta = read_altered(folder, CONFIG_FILE, bytes(data))
    if delta is not None:
        for name in ("method", "base_fingerprint", "experts", "num_experts", "paths"):
            assert getattr(delta.config, name) == getattr(original.config, name)
        assert isinstance(json.loads(data), dict)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32), st.binary(max_size=40), st.integers(0, 40))
def test_bytes_cut_out_and_put_in(whole: tuple[Path, Delta], at: int, inserted: bytes, num_cut: int) -> None:
    folder, original = whole
    data = (folder / TENSORS_FILE).read_bytes()
    at %= len(data)
    delta = read_altered(folder, TENSORS_FILE, data[:at] + inserted + data[at + num_cut :])
    assert delta is None or delta.tensors == original.tensors
