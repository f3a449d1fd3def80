"""A model without its weights: classes and shapes from the configuration alone, and where its files are.

Enough to know what a checkpoint's tensors mean without holding them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from metier.errors import ModelError
from metier.models.fingerprint import mark_skeleton
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
    config = read_config(resolve_source(model), {"trust_remote_code": trust_remote_code})
    return skeleton_of(config, name=str(model), trust_remote_code=trust_remote_code)


def model_config(
    model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """A model's configuration, for which neither weights nor a tokenizer need be there.

    Args:
        model: a folder with a config.json or that file itself, a hub id, or "embedded".
        revision, trust_remote_code: as `metier.load`.

    Raises:
        ConfigError, ModelError: as `metier.load`.
    """
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    path = Path(model).expanduser()
    if path.is_file() or (path / "config.json").is_file():
        return read_config(str(path), common)
    if revision is not None:
        common["revision"] = revision
    return read_config(resolve_source(model, revision=revision), common)


def skeleton_of(
    config: PreTrainedConfig, *, name: str, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a configuration, its parameters on the meta device.

    Args:
        config: any; sizes and class come from it alone.
        name: of the model, for messages.
        dtype: of the parameters; the configuration's where it is not given.
        trust_remote_code: as `metier.load`.

    Raises:
        ModelError, UnsupportedModelError: as `metier.load`.
    """
    wanted = config.dtype if dtype is None else dtype
    options: dict[str, Any] = {} if wanted is None else {"dtype": wanted}
    with torch.device("meta"):
        auto_class = network_class_for(name, config)
        try:
            network: PreTrainedModel = auto_class.from_config(config, **options, trust_remote_code=trust_remote_code)
        except (RuntimeError, ValueError, TypeError, AttributeError, ArithmeticError, StrictDataclassError) as error:
            raise ModelError(
                f"{name}: no model can be made by its configuration: {first_line(error)}\nCompare its sizes with those "
                "of the model's own config.json."
            ) from error
        follow_contract(network)
    mark_skeleton(network)
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
