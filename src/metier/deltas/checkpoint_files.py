"""A checkpoint's safetensors files, tensor by tensor: one is read, or written over in a copy, without the rest."""

from __future__ import annotations

import fnmatch
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from metier.deltas.tensors_file import StoredTensor, parse_header
from metier.errors import ModelError
from metier.models.skeleton import OTHER_WEIGHTS

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_NOT_BESIDE = (*OTHER_WEIGHTS, "*.safetensors", "*.index.json", ".*")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """Where each tensor of a checkpoint lies."""

    folder: Path
    tensors: dict[str, tuple[str, StoredTensor]]
    """By name: file name, and place in that file."""

    def file_names(self) -> list[str]:
        """The files with tensors in them."""
        return sorted({file for file, _ in self.tensors.values()})

    def read(self, name: str) -> Tensor:
        """One tensor, in its stored dtype."""
        with safe_open(self.folder / self.tensors[name][0], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def dtype(self, name: str) -> torch.dtype | None:
        """Of a stored tensor; None where it is no floating-point dtype that rows can have."""
        return _DTYPES.get(self.tensors[name][1].dtype)

    def overwrite(self, copy: Path, name: str, value: Tensor) -> None:
        """Write a tensor's values over those in a copy of the folder. Shape and dtype are those that are stored."""
        file_name, stored = self.tensors[name]
        assert (value.dtype, tuple(value.shape)) == (self.dtype(name), stored.shape), f"{name}: another shape or dtype"
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        assert data.nbytes == stored.end_byte - stored.first_byte, f"{name}: another size"
        with (copy / file_name).open("r+b") as file:
            file.seek(stored.first_byte)
            file.write(data)


def open_checkpoint(folder: Path) -> CheckpointFiles | None:
    """The checkpoint in a model's folder, or None where it has no safetensors files.

    Raises:
        ModelError: the index or a file is damaged or missing.
    """
    index, tensors = folder / INDEX, {}
    try:
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        elif (folder / ONE_FILE).is_file():
            names = [ONE_FILE]
        else:
            return None
        for name in names:
            if Path(name).name != name:
                raise ModelError(f"{index}: got file name {name!r}, expected one of the same folder.")
            with safe_open(folder / name, framework="np") as file:
                file.keys()  # the library judges whether the header is valid
            header, start = parse_header(folder / name)
            header.pop("__metadata__", None)
            for key, entry in header.items():
                first, end = entry["data_offsets"]
                place = StoredTensor(
                    dtype=entry["dtype"],
                    shape=tuple(entry["shape"]),
                    first_byte=start + first,
                    end_byte=start + end,
                )
                tensors[key] = (name, place)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{folder}: the checkpoint's files could not be read ({type(error).__name__}: {error}).\n"
            "Download or save the model again."
        ) from error
    return CheckpointFiles(folder, tensors)


def copy_beside(source: Path, target: Path) -> None:
    """Copy what lies beside a checkpoint's weights: configuration, tokenizer, chat template, code, card."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not any(fnmatch.fnmatch(path.name, pattern) for pattern in _NOT_BESIDE):
            shutil.copyfile(path, target / path.name)
