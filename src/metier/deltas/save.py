"""Save an ESFT adapter as a delta: PEFT's folder, with sums over its content, as small as its use allows."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict

from metier import __version__
from metier.deltas.card import delta_card
from metier.deltas.format import (
    CARD_FILE,
    CONFIG_FILE,
    FORMAT_VERSION,
    HEADER_SUM,
    METHOD,
    TENSORS_FILE,
    experts_text,
    header_sum,
    rows_name,
    tensor_sum,
)
from metier.deltas.tensors_file import StoredTensor, write_tensors
from metier.deltas.whole_folder import check_replaceable, written_whole
from metier.errors import ConfigError, DeltaError
from metier.methods.esft import EsftConfig, EsftExperts
from metier.models.moe import moe_layers

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_Row = tuple[StoredTensor, memoryview]


def save_delta(
    model: PeftModel, folder: str | Path, *, adapter_name: str = "default", dtype: torch.dtype | None = None
) -> None:
    """Write an adapter as a folder that `peft.PeftModel.from_pretrained` loads and `read_delta` checks.

    The folder appears whole or not at all, and takes the place of a former delta.

    Args:
        model: with the adapter on it.
        folder: new, empty, or a former delta's.
        adapter_name: which adapter.
        dtype: of the stored rows. None takes the base's: the forward pass casts the float32 masters to it anyway, so
            the logits are the same bits at half the size. Give torch.float32 to train on from the very same masters.

    Raises:
        ConfigError: `dtype` is not one that a delta can have, or `folder` holds other things.
        DeltaError: the model has no such adapter, it is not an ESFT adapter, or a row is not finite in `dtype`.
    """
    folder = Path(folder)
    if dtype is not None and dtype not in _DTYPE_NAMES:
        raise ConfigError(f"dtype: got {dtype}, expected one of {', '.join(map(str, _DTYPE_NAMES))}, or None.")
    config = _config(model, adapter_name)
    check_replaceable(
        folder,
        known=frozenset({CONFIG_FILE, TENSORS_FILE, CARD_FILE}),
        marker=CONFIG_FILE,
        what="a former delta",
    )
    tensors = _rows(model, adapter_name, dtype)
    assert config.experts is not None, "EsftConfig refuses to be made without experts"
    with written_whole(folder) as new:
        config.save_pretrained(str(new))
        write_tensors(new / TENSORS_FILE, tensors, _metadata(model, config, tensors))
        base = config.base_model_name_or_path or "unknown"
        card = delta_card(base=base, fingerprint=config.base_fingerprint, experts=config.experts)
        (new / CARD_FILE).write_text(card, encoding="utf-8")


def _config(model: PeftModel, adapter_name: str) -> EsftConfig:
    """A copy of the adapter's configuration as PEFT would save it."""
    if adapter_name not in model.peft_config:
        raise DeltaError(
            f"save_delta: got adapter {adapter_name!r}, expected one of the model's: {sorted(model.peft_config)}.\n"
            "Name one of them."
        )
    config = model.peft_config[adapter_name]
    if not isinstance(config, EsftConfig):
        raise DeltaError(
            f"save_delta: adapter {adapter_name!r} is {type(config).__name__}, expected EsftConfig.\n"
            "Save adapters of PEFT's own methods with `model.save_pretrained`."
        )
    config = copy.deepcopy(config)
    config.inference_mode = True
    base = model.get_base_model()
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(base, "name_or_path", None) or None
    if config.task_type is None:
        # AutoPeftModel finds the base's class by this, as PEFT's own save_pretrained has it
        config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return config


def _rows(model: PeftModel, adapter_name: str, dtype: torch.dtype | None) -> dict[str, _Row]:
    dtypes: dict[str, torch.dtype] = {}
    for layer in model.modules():
        if isinstance(layer, EsftExperts):
            # what the forward pass casts all of a layer's rows to
            served = getattr(layer.base_layer, layer.base_names[0]).dtype
            dtypes |= {rows_name(layer.path, name): dtype or served for name in layer.base_names}
    rows = {}
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    for name, tensor in sorted(state.items()):
        stored = tensor.detach().to("cpu", dtypes[name]).contiguous()
        if not torch.isfinite(stored).all():
            raise DeltaError(
                f"{name}: adapter {adapter_name!r} holds values that are not finite in {stored.dtype}; nothing was "
                "saved.\nIf the run diverged, lower its learning rate; if only the dtype is too narrow, save with "
                "dtype=torch.float32."
            )
        data = stored.reshape(-1).view(torch.uint8).numpy().data
        rows[name] = (StoredTensor(dtype=_DTYPE_NAMES[stored.dtype], shape=tuple(stored.shape)), data)
    return rows


def _metadata(model: PeftModel, config: EsftConfig, tensors: Mapping[str, _Row]) -> dict[str, str]:
    assert config.experts is not None, "EsftConfig refuses to be made without experts"
    layers = moe_layers(model)
    expert_parameters = sum(getattr(x.experts, name).numel() for x in layers for name in x.parameter_names())
    metadata = {
        "format": "pt",
        "metier_delta": FORMAT_VERSION,
        "metier_version": __version__,
        "peft_type": METHOD,
        "base_fingerprint": str(config.base_fingerprint),
        "base_expert_parameters": str(expert_parameters),
        "num_experts": str(config.num_experts),
        "experts": experts_text(config.experts),
        "sha256": json.dumps({name: tensor_sum(x.dtype, x.shape, [data]) for name, (x, data) in tensors.items()}),
    }
    return {**metadata, HEADER_SUM: header_sum(metadata)}
