"""A profile's two files: the tensors as safetensors, and beside them JSON that a person can read.

The tensors are integers and float64 sums, so reading back gives the same bits. Both files are written under
another name first and moved, so a killed run never leaves half a profile.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from metier.errors import DataError

TENSORS_FILE = "profile.safetensors"
DESCRIPTION_FILE = "profile.json"
_TENSORS = {"token_counts_HLE", "gate_mass_HLE"}
_OPTIONAL_TENSORS = {"output_norm_HLE"}
_DESCRIPTION = {"layer_ids", "num_experts", "top_k", "num_tokens_H", "meta"}


def write(folder: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write both files into `folder`, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f".{TENSORS_FILE}")
    text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
    (folder / f".{DESCRIPTION_FILE}").write_text(text, encoding="utf-8")
    for name in (TENSORS_FILE, DESCRIPTION_FILE):
        os.replace(folder / f".{name}", folder / name)


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description in `folder`; a tensor that not every profile has may be missing.

    Raises:
        DataError: a file is missing, is broken, or lacks an entry.
    """
    try:
        tensors = load_file(folder / TENSORS_FILE)
        description = json.loads((folder / DESCRIPTION_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{folder}: got no {Path(str(error.filename or TENSORS_FILE)).name}, expected {TENSORS_FILE} and "
            f"{DESCRIPTION_FILE}.\nMeasure the profile with `metier profile`."
        ) from error
    except (SafetensorError, ValueError, OSError) as error:
        raise DataError(f"{folder}: the profile is broken: {error}\nMeasure it again with `metier profile`.") from error
    missing = (_TENSORS - tensors.keys()) | (
        _DESCRIPTION - (description.keys() if isinstance(description, dict) else set())
    )
    if missing:
        raise DataError(
            f"{folder}: the profile lacks {', '.join(sorted(missing))}.\nMeasure it again with `metier profile`."
        )
    return {name: tensors[name] for name in sorted(_TENSORS | (_OPTIONAL_TENSORS & tensors.keys()))}, description
