"""The files of an ESFT checkpoint: which safetensors belong to it, and what their headers name.

The published evaluator takes every safetensors file of a folder as it comes, so a lost shard, one of several ranks'
folders or a file twice is not noticed there. Here each is an error, before a tensor is read.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from metier.deltas.tensors_file import StoredTensor, read_file_header
from metier.errors import CorruptDeltaError

EXPERTS_FILE = "expert_cfg.json"
_INDEX_END = ".safetensors.index.json"
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")
_RANK = re.compile(r"last_checkpoint_ep\d+")
EXPERT_TENSOR = re.compile(r".*\.layers\.(\d+)\..*\bexperts\.(\d+)\.(\w+\.(?:weight|bias))")
"""A tensor of one routed expert: layer, expert, and which of its matrices."""
_COPY_AGAIN = "Copy the whole folder again from where it was made."


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointTensors:
    """What the headers of a checkpoint's files say."""

    tensors: dict[str, StoredTensor]
    files: dict[str, Path]
    """The file of each tensor."""
    metadata: dict[str, str]
    """Of all files together."""

    def experts(self) -> dict[int, list[int]]:
        """The experts of which there is a tensor, by layer, both ascending."""
        found: dict[int, set[int]] = {}
        for name in self.tensors:
            if match := EXPERT_TENSOR.fullmatch(name):
                found.setdefault(int(match[1]), set()).add(int(match[2]))
        return {layer: sorted(found[layer]) for layer in sorted(found)}


def read_headers(folder: Path) -> CheckpointTensors:
    """The headers of all files of the checkpoint in `folder`.

    Raises:
        CorruptDeltaError: `folder` holds no checkpoint, or only a part of one; a file is damaged; two hold one tensor.
    """
    _refuse_ranks(folder)
    indexes = sorted(folder.glob(f"*{_INDEX_END}"))
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise _no_checkpoint(folder)
    _check_shards(folder, [path.name for path in paths])
    tensors: dict[str, StoredTensor] = {}
    files: dict[str, Path] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        found, said = read_file_header(path)
        for name in found:
            if name in files:
                raise CorruptDeltaError(
                    f"{folder}: {name} is both in {files[name].name} and in {path.name}, expected each tensor once.\n"
                    "Leave the files of one checkpoint in the folder."
                )
            files[name] = path
        tensors |= found
        metadata |= said
    for index in indexes:
        _check_index(index, files)
    return CheckpointTensors(tensors=tensors, files=files, metadata=metadata)


def _refuse_ranks(folder: Path) -> None:
    ranks = sorted(path.name for path in folder.glob("*") if path.is_dir() and _RANK.fullmatch(path.name))
    if not ranks and not _RANK.fullmatch(folder.name):
        return
    got = f"the folders {', '.join(ranks)}" if ranks else "the folder of one rank"
    raise CorruptDeltaError(
        f"{folder}: got {got} of a run with expert parallelism, of which each holds a part of the experts, "
        "expected one folder with all of them.\nCopy the safetensors files of every last_checkpoint_ep… folder into a "
        f"new folder, under different names and without an index, put {EXPERTS_FILE} beside them, and give that."
    )


def _check_shards(folder: Path, names: list[str]) -> None:
    """Every file that calls itself one of several has all its siblings."""
    shards: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if match := _SHARD.fullmatch(name):
            shards.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (stem, num_shards), found in shards.items():
        missing = sorted(set(range(1, num_shards + 1)) - found)
        if missing:
            raise CorruptDeltaError(
                f"{folder}: got {len(found)} files {stem}-…-of-{num_shards:05}.safetensors, expected {num_shards}; "
                f"missing: {', '.join(map(str, missing))}.\n{_COPY_AGAIN}"
            )


def _check_index(index: Path, files: dict[str, Path]) -> None:
    try:
        said = json.loads(index.read_bytes())["weight_map"]
        named = {str(name): str(file) for name, file in said.items()}
    except (ValueError, RecursionError, OSError, LookupError, TypeError, AttributeError) as error:
        raise CorruptDeltaError(
            f"{index}: got no readable index, expected JSON with a weight_map ({error}).\n{_COPY_AGAIN}"
        ) from error
    found = {name: path.name for name, path in files.items()}
    for name in sorted(named.keys() | found.keys()):
        if named.get(name) != found.get(name):
            raise CorruptDeltaError(
                f"{index}: {name} should be in {named.get(name, 'no file')}, but is in {found.get(name, 'no file')}.\n"
                f"{_COPY_AGAIN}"
            )


def _no_checkpoint(folder: Path) -> CorruptDeltaError:
    expected = f"expected an ESFT checkpoint: {EXPERTS_FILE} and safetensors files"
    if not folder.exists():
        got, then = "no such folder", "Give the folder that a run of ESFT wrote, such as …/last_checkpoint."
    elif not folder.is_dir():
        got, then = "a file", "Give the folder that holds it."
    elif any(folder.glob("*.bin")):
        got, then = "pickled tensors (.bin), which can run code when they are read", "Save them as safetensors first."
    elif (folder / "last_checkpoint").is_dir():
        got, then = "a run's folder", f"Give {folder / 'last_checkpoint'}."
    else:
        got, then = "no safetensors file", "Give the folder that a run of ESFT wrote, such as …/last_checkpoint."
    return CorruptDeltaError(f"{folder}: got {got}, {expected}.\n{then}")
