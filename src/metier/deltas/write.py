"""Write a delta's folder from its configuration and rows, wherever they come from: a model, or another format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from metier import __version__
from metier.deltas.card import delta_card
from metier.deltas.format import (
    CARD_FILE,
    CONFIG_FILE,
    EXPERT_IDS,
    FORMAT_VERSION,
    HEADER_SUM,
    LOW_RANK,
    TENSORS_FILE,
    experts_text,
    header_sum,
    rows_name,
    tensor_sum,
)
from metier.deltas.low_rank import LowRankSettings
from metier.deltas.tensors_file import StoredTensor, write_tensors
from metier.deltas.whole_folder import check_replaceable, written_whole
from metier.errors import DeltaError
from metier.methods.esft import EsftConfig
from metier.methods.expert_lora import ExpertLoraConfig
from metier.models.fingerprint import fingerprint
from metier.models.moe import moe_layers

DeltaConfig = EsftConfig | ExpertLoraConfig
"""Of the adapters that are saved as deltas."""
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
"""The dtypes of rows, as safetensors spells them."""
Config = TypeVar("Config", EsftConfig, ExpertLoraConfig)
_ALL_NAMES = {**DTYPE_NAMES, torch.int64: "I64", torch.int8: "I8"}


def check_delta_folder(folder: Path) -> None:
    """Raise a ConfigError unless a delta may be written to `folder`: it is new, empty, or a former delta's."""
    check_replaceable(
        folder,
        known=frozenset({CONFIG_FILE, TENSORS_FILE, CARD_FILE}),
        marker=CONFIG_FILE,
        what="a former delta",
    )


def write_delta(folder: Path, *, model: nn.Module, config: DeltaConfig, rows: Mapping[str, Tensor]) -> None:
    """Write a delta, whole or not at all. The same delta gives the same bytes.

    Args:
        folder: as `check_delta_folder` has it.
        model: the base, or a model with it inside; only the sizes of its experts are looked at.
        config: complete, as it is to be saved.
        rows: by stored name (`rows_name`), in the dtype to store.

    Raises:
        DeltaError: a row is not finite.
    """
    assert config.experts is not None, "a configuration refuses to be made without experts"
    for name, tensor in rows.items():
        if not torch.isfinite(tensor).all():
            raise DeltaError(
                f"{name}: the rows hold values that are not finite in {tensor.dtype}; nothing was saved.\n"
                "If the run diverged, lower its learning rate; if only the dtype is too narrow, save with "
                "dtype=torch.float32."
            )
    tensors = {name: as_stored(tensor) for name, tensor in sorted({**rows, **expert_ids(config)}.items())}
    with written_whole(folder) as new:
        config.save_pretrained(str(new))
        write_tensors(new / TENSORS_FILE, tensors, _metadata(model, config, tensors))
        base = config.base_model_name_or_path or "unknown"
        card = delta_card(
            base=base,
            fingerprint=config.base_fingerprint,
            experts=config.experts,
            is_low_rank=isinstance(config, ExpertLoraConfig),
            also_train=config.also_train or (),
        )
        (new / CARD_FILE).write_text(card, encoding="utf-8")


def new_config(model: PreTrainedModel, experts: Mapping[int, Sequence[int]]) -> EsftConfig:
    """The configuration of a delta that replaces `experts` of `model` but was never on it, complete."""
    layers = {layer.index: layer for layer in moe_layers(model)}
    config = EsftConfig(experts={layer: list(ids) for layer, ids in experts.items()})
    assert config.experts is not None, "EsftConfig refuses to be made without experts"
    config.base_fingerprint = fingerprint(model)
    config.num_experts = max(layer.num_experts for layer in layers.values())
    config.target_modules = [layers[index].path for index in config.experts]
    return as_saved(config, model)


def as_saved(config: Config, base: nn.Module) -> Config:
    """`config` with what PEFT's own save_pretrained sets in it."""
    config.inference_mode = True
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(base, "name_or_path", None) or None
    if config.task_type is None:
        # AutoPeftModel finds the base's class by this, as PEFT's own save_pretrained has it
        config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return config


def expert_ids(config: DeltaConfig) -> dict[str, Tensor]:
    """By stored name: which experts the rows of each layer are, int64 (k,)."""
    assert config.experts is not None, "a configuration refuses to be made without experts"
    assert config.peft_type is not None, "both configurations set theirs"
    assert config.target_modules is not None, "it is set when an adapter is made"
    layers = zip(config.target_modules, config.experts.values(), strict=True)
    method = str(config.peft_type.value)
    return {rows_name(path, EXPERT_IDS, method): torch.tensor(ids, dtype=torch.int64) for path, ids in layers}


def as_stored(tensor: Tensor) -> tuple[StoredTensor, memoryview]:
    """What a safetensors file says of a tensor, and its bytes."""
    tensor = tensor.detach().cpu().contiguous()
    data = tensor.reshape(-1).view(torch.uint8).numpy().data
    return StoredTensor(dtype=_ALL_NAMES[tensor.dtype], shape=tuple(tensor.shape)), data


def _metadata(
    model: nn.Module, config: DeltaConfig, tensors: Mapping[str, tuple[StoredTensor, memoryview]]
) -> dict[str, str]:
    assert config.experts is not None, "a configuration refuses to be made without experts"
    assert config.peft_type is not None, "both configurations set theirs"
    layers = moe_layers(model)
    expert_parameters = sum(getattr(x.experts, name).numel() for x in layers for name in x.parameter_names())
    metadata = {
        "format": "pt",
        "metier_delta": FORMAT_VERSION,
        "metier_version": __version__,
        "peft_type": str(config.peft_type.value),
        "base_fingerprint": str(config.base_fingerprint),
        "base_expert_parameters": str(expert_parameters),
        "num_experts": str(config.num_experts),
        "experts": experts_text(config.experts),
        "sha256": json.dumps({name: tensor_sum(x.dtype, x.shape, [data]) for name, (x, data) in tensors.items()}),
    }
    if isinstance(config, ExpertLoraConfig):
        settings = LowRankSettings(
            r=config.r, lora_alpha=config.lora_alpha, use_rslora=config.use_rslora, ranks=config.ranks or {}
        )
        metadata[LOW_RANK] = settings.text()
    return {**metadata, HEADER_SUM: header_sum(metadata)}
