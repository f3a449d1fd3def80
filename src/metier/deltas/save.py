"""Save an adapter on experts as a delta: PEFT's folder, with sums over its content, as small as its use allows."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from metier.deltas.format import NAME_PREFIX
from metier.deltas.write import DTYPE_NAMES, DeltaConfig, as_saved, check_delta_folder, expert_ids, write_delta
from metier.errors import ConfigError, DeltaError
from metier.methods.esft import EsftConfig
from metier.methods.expert_layer import ExpertTunerLayer
from metier.methods.expert_lora import ExpertLoraConfig
from metier.methods.whole_module import whole_modules


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
        DeltaError: the model has no such adapter, it is neither an ESFT adapter nor a LoRA on experts, its
            configuration names other experts than it replaces, or a row is not finite in `dtype`.
    """
    folder = Path(folder)
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise ConfigError(f"dtype: got {dtype}, expected one of {', '.join(map(str, DTYPE_NAMES))}, or None.")
    config = _config(model, adapter_name)
    check_delta_folder(folder)
    write_delta(folder, model=model, config=config, rows=_rows(model, config, adapter_name, dtype))


def _config(model: PeftModel, adapter_name: str) -> DeltaConfig:
    """A copy of the adapter's configuration as PEFT would save it."""
    if adapter_name not in model.peft_config:
        raise DeltaError(
            f"save_delta: got adapter {adapter_name!r}, expected one of the model's: {sorted(model.peft_config)}.\n"
            "Name one of them."
        )
    config = model.peft_config[adapter_name]
    if not isinstance(config, EsftConfig | ExpertLoraConfig):
        raise DeltaError(
            f"save_delta: adapter {adapter_name!r} is {type(config).__name__}, expected EsftConfig or "
            "ExpertLoraConfig.\n"
            "Save adapters of PEFT's own methods with `model.save_pretrained`."
        )
    return as_saved(copy.deepcopy(config), model.get_base_model())


def _rows(model: PeftModel, config: DeltaConfig, adapter_name: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The adapter's rows by stored name, on the CPU, in the dtype to store."""
    dtypes: dict[str, torch.dtype] = {}
    for layer in model.modules():
        if isinstance(layer, ExpertTunerLayer):
            # what the forward pass casts all of a layer's rows to
            served = getattr(layer.base_layer, layer.base_names[0]).dtype
            names = [f"{NAME_PREFIX}{layer.path}.{name}" for name in layer.adapter_layer_names]
            dtypes |= dict.fromkeys(names, dtype or served)
    for path, module in whole_modules(model.get_base_model()).items():
        for name, parameter in module.original_module.named_parameters():
            dtypes[f"{NAME_PREFIX}{path}.{name}"] = dtype or parameter.dtype
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    for name, ids in expert_ids(config).items():
        got = state.pop(name).tolist()
        if got != ids.tolist():
            raise DeltaError(
                f"{name}: adapter {adapter_name!r} replaces experts {got}, but its configuration says {ids.tolist()}; "
                "nothing was saved.\nLeave `peft_config` as it was when the adapter was made."
            )
    return {name: tensor.detach().to("cpu", dtypes[name]) for name, tensor in state.items()}
