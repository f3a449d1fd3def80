"""A model without its weights: classes and shapes from the configuration alone, and where its files are.

Enough to know what a checkpoint's tensors mean without holding them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from metier.errors import ModelError
from metier.models.foreign import follow_contract
from metier.models.load import first_line, network_class_for, read_config, resolve_source

OTHER_WEIGHTS = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.onnx",
    "*.h5",
    "*.msgpack",
    "*.ot",
    "*.npz",
    "*.pickle",
    "*.pkl",
)
"""Weights in other formats than safetensors, which are never read."""


def skeleton(model: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that `metier.load` would load, its parameters on the meta device.

    Args:
        model: a local folder, a hub id, or "embedded".
        trust_remote_code: as `metier.load`.

    Raises:
        ModelError, UnsupportedModelError: as `metier.load`.
    """
    target, common = resolve_source(model), {"trust_remote_code": trust_remote_code}
    config = read_config(target, common)
    options: dict[str, Any] = {} if config.dtype is None else {"dtype": config.dtype}
    with torch.device("meta"):
        network: PreTrainedModel = network_class_for(str(model), config).from_config(config, **options, **common)
        follow_contract(network)
    return network.eval()


def checkpoint_folder(model: str | Path) -> Path:
    """The folder that holds a model's files; a hub's are downloaded first.

    Raises:
        ModelError: there is no such folder, or the hub cannot be reached.
    """
    target = resolve_source(model)
    if Path(target).is_dir():
        return Path(target)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(target, ignore_patterns=[*OTHER_WEIGHTS, "original/*"]))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{model}: the model's files could not be downloaded: {first_line(error)}\n"
            "Expected a hub id that can be reached (and, if gated, a login)."
        ) from error
