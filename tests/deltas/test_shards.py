"""A checkpoint's tensors in files of a given size: every tensor once, with its bits, under an index that is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from metier.deltas.shards import reshard, shard_bytes
from metier.errors import ConfigError


@pytest.mark.parametrize(
    ("size", "num_bytes"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("20kb", 20_000), ("7", 7), ("9B", 9)]
)
def test_a_size_is_read(size: str, num_bytes: int) -> None:
    assert shard_bytes(size) == num_bytes


@pytest.mark.parametrize("size", ["", "five", "-1", "0", "5GiB", "0.1"])
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(ConfigError, match="expected a size such as 5GB, 500MB or 1000000"):
        shard_bytes(size)


def made_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Two files with tensors of 40, 80, 8 and 400 bytes, of dtypes that rows of a delta cannot have among them."""
    first = {"a": torch.arange(10.0), "b": torch.arange(20.0)}
    second = {"c": torch.tensor([7]), "d": torch.arange(100, dtype=torch.int32).view(4, 25)}
    folder.mkdir()
    weight_map = {}
    for number, tensors in ((1, first), (2, second)):
        save_file(tensors, folder / f"model-0000{number}-of-00002.safetensors")
        weight_map |= dict.fromkeys(tensors, f"model-0000{number}-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return first | second


@pytest.mark.parametrize(("max_bytes", "num_files"), [(10_000, 1), (400, 2), (120, 3), (1, 4)])
def test_every_tensor_is_in_one_file_and_the_index_says_in_which(
    max_bytes: int, num_files: int, tmp_path: Path
) -> None:
    want = made_checkpoint(tmp_path / "model")
    reshard(tmp_path / "model", max_bytes)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) == num_files
    got = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert sum(len(load_file(path)) for path in files) == len(want) == len(got)
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    index = tmp_path / "model" / "model.safetensors.index.json"
    assert {path.name for path in (tmp_path / "model").iterdir()} == {f.name for f in files} | (
        {index.name} if num_files > 1 else set()
    )
    if num_files > 1:
        values = json.loads(index.read_text())
        assert values["metadata"]["total_size"] == 528
        assert values["weight_map"] == {name: path.name for path in files for name in load_file(path)}
        assert all(len(load_file(p)) == 1 or sum(t.nbytes for t in load_file(p).values()) <= max_bytes for p in files)
