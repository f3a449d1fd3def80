"""To and from PEFT's own LoRA on stacked experts (`LoraConfig(target_parameters=…)`), for servers that read it.

PEFT knows one rank and one scale for all experts of a parameter, and stores `A` as `(E * R, in)`, expert by expert, but
`B` as `(out, R * E)` with the experts innermost. Ours are over the changed experts; PEFT's hold zeros for the rest.
"""

# E experts of the base, C changed experts, R rank; I, O inputs and outputs of a projection

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from metier.errors import CorruptDeltaError, DeltaError
from metier.methods.expert_lora.config import ExpertLoraConfig
from metier.methods.expert_lora.layer import LoraExperts
from metier.models.foreign import has_replaced_blocks
from metier.models.moe import MoELayer, moe_layers
from metier.models.unwrap import bare_model

Factors = tuple[Tensor, Tensor]
"""`A` and `B` of one stacked weight."""


def export_peft_lora(model: peft.PeftModel, folder: str | Path, *, adapter_name: str = "default") -> None:
    """Write an adapter of ours as a folder that plain PEFT loads as a LoRA, with the same logits up to rounding.

    The rank is the highest of any expert, and `lora_alpha` equals it: each expert's own scale goes into its `B`. The
    file is larger than ours by the experts that are not changed, and for experts of a lower rank.

    Raises:
        DeltaError: the model has no such adapter, it is none of ours, it trains whole modules too, or PEFT would see
            other experts than metier.
    """
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, ExpertLoraConfig):
        raise DeltaError(
            f"export_peft_lora: adapter '{adapter_name}' is {type(config).__name__}, expected ExpertLoraConfig; "
            f"the model has {sorted(model.peft_config)}."
        )
    _check_whole_modules(config, adapter_name)
    changed = [(v, v.entry) for v in moe_layers(model) if isinstance(v.entry, LoraExperts)]
    changed = [(view, layer) for view, layer in changed if layer.expert_ids(adapter_name)]
    check_peft_sees(model)
    rank = max(layer.rank(adapter_name) for _, layer in changed)
    tensors: dict[str, Tensor] = {}
    for view, layer in changed:
        tensors |= pack_layer(view, layer.expert_ids(adapter_name), _scaled(view, layer, adapter_name), rank)
    lora = lora_config(
        rank,
        target_parameters=[f"{view.path}.{name}" for view, _ in changed for name in stacked_weights(view)],
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
    lora.save_pretrained(str(folder))


def lora_config(rank: int, **options: Any) -> peft.LoraConfig:
    """PEFT's configuration of a LoRA whose `B` are scaled already: `lora_alpha` equals the rank."""
    return peft.LoraConfig(**{"r": rank, "lora_alpha": rank, "target_modules": [], "inference_mode": True, **options})


def pack_layer(view: MoELayer, ids: Sequence[int], factors: Mapping[str, Factors], rank: int) -> dict[str, Tensor]:
    """One layer's tensors by the names under which PEFT stores them.

    Args:
        view: the base's layer; only its layout is looked at.
        ids: the C changed experts.
        factors: by the base's stacked weight, `A` (C, r, I) and `B` (C, O, r) with the scale in it, r at most `rank`.
        rank: PEFT's one rank.
    """
    tensors = {}
    for parameter, (a_CRI, b_COR) in factors.items():
        a_ERI = a_CRI.new_zeros(view.num_experts, rank, a_CRI.shape[2])
        b_EOR = b_COR.new_zeros(view.num_experts, b_COR.shape[1], rank)
        a_ERI[list(ids), : a_CRI.shape[1]], b_EOR[list(ids), :, : b_COR.shape[2]] = a_CRI, b_COR
        key = _key(view, parameter, stacked_weights(view))
        tensors[f"{key}.lora_A.weight"] = a_ERI.flatten(0, 1).contiguous()
        tensors[f"{key}.lora_B.weight"] = b_EOR.permute(1, 2, 0).flatten(1).contiguous()
    return tensors


def check_peft_sees(model: nn.Module) -> None:
    """Raise a DeltaError where plain PEFT has other experts before it than metier: those of replaced blocks."""
    if has_replaced_blocks(model):
        raise DeltaError(
            f"{type(bare_model(model)).__name__}: transformers stacks its experts outside the contract, so PEFT would "
            "read a LoRA on them transposed.\nMerge the delta instead, or serve it beside its base."
        )


def import_peft_lora(model: PreTrainedModel, folder: str | Path, *, adapter_name: str = "default") -> peft.PeftModel:
    """Put a LoRA that PEFT saved on stacked experts on `model` as an adapter of ours: same logits, thin products.

    An expert whose `B` is zero is not changed, and not taken over.

    Raises:
        DeltaError: the folder's LoRA adapts something else than stacked experts, has ranks by pattern, or changes
            nothing.
        CorruptDeltaError: a tensor is missing, of another shape, or belongs to nothing that the configuration names.
    """
    lora = peft.PeftConfig.from_pretrained(str(folder))
    _check_convertible(lora, folder)
    tensors = dict(load_peft_weights(str(folder), device="cpu"))
    found: dict[int, dict[str, Factors]] = {}
    for view in moe_layers(model):
        adapted = [name for name in stacked_weights(view) if _is_target(f"{view.path}.{name}", lora.target_parameters)]
        for name in adapted:
            found.setdefault(view.index, {})[name] = _factors(view, name, adapted, tensors, lora.r, folder)
    if tensors:
        raise CorruptDeltaError(f"{folder}: {sorted(tensors)[0]} belongs to no stacked expert of the base.")
    experts = {index: _changed(factors) for index, factors in found.items()}
    if not any(experts.values()):
        raise DeltaError(f"{folder}: every change is zero, so there is no expert to take over. Use the base as it is.")
    config = ExpertLoraConfig(
        experts=experts,
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        use_rslora=lora.use_rslora,
        task_type=lora.task_type,
        base_model_name_or_path=lora.base_model_name_or_path,
    )
    wrapped = peft.get_peft_model(model, config, adapter_name=adapter_name)
    for view in moe_layers(wrapped):
        if experts.get(view.index):
            _fill(view, adapter_name, experts[view.index], found[view.index])
    return wrapped


def stacked_weights(view: MoELayer) -> list[str]:
    """The layer's stacked weights, in the order in which PEFT wraps them, the last one outermost."""
    names = view.parameter_names()
    return [name for name, _ in view.experts.named_parameters(recurse=False) if name in names and "bias" not in name]


def _key(view: MoELayer, parameter: str, adapted: list[str]) -> str:
    """PEFT's name of a parameter's wrapper: one `base_layer` for each that is wrapped around it."""
    return f"base_model.model.{view.path}" + ".base_layer" * (len(adapted) - 1 - adapted.index(parameter))


def _is_target(path: str, targets: list[str]) -> bool:
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _scaled(view: MoELayer, layer: LoraExperts, adapter: str) -> dict[str, Factors]:
    """`A` and `scale * B` of the changed experts, by the base's parameter."""
    names = {view.parameter_names()[0]: "up", "down_proj": "down"}
    scales_C11 = torch.tensor(layer.scales[adapter]).view(-1, 1, 1)
    factors = {}
    for parameter, projection in names.items():
        a_CRI = getattr(layer, f"expert_lora_{projection}_A")[adapter].detach().cpu().float()
        b_COR = getattr(layer, f"expert_lora_{projection}_B")[adapter].detach().cpu().float()
        factors[parameter] = (a_CRI, b_COR * scales_C11)
    return factors


def _check_whole_modules(config: ExpertLoraConfig, adapter_name: str) -> None:
    if config.whole_modules:
        raise DeltaError(
            f"export_peft_lora: adapter '{adapter_name}' replaces {config.whole_modules[0]} too, which a LoRA on "
            "experts cannot hold, and leaving it out would be another model.\nMerge the adapter instead."
        )


def _check_convertible(lora: peft.PeftConfig, folder: str | Path) -> None:
    if not isinstance(lora, peft.LoraConfig) or not lora.target_parameters:
        raise DeltaError(
            f"{folder}: got a {lora.peft_type} adapter, expected a LoRA with target_parameters. Load it with PEFT."
        )
    others = {"target_modules": lora.target_modules, "rank_pattern": lora.rank_pattern}
    others |= {"alpha_pattern": lora.alpha_pattern, "use_dora": lora.use_dora, "modules_to_save": lora.modules_to_save}
    if used := sorted(name for name, value in others.items() if value):
        raise DeltaError(
            f"{folder}: the LoRA has {', '.join(used)}, which a LoRA on experts cannot hold. Load it with PEFT."
        )


def _factors(
    view: MoELayer, parameter: str, adapted: list[str], tensors: dict[str, Tensor], rank: int, folder: str | Path
) -> Factors:
    """`A` (E, R, I) and `B` (E, O, R) of one parameter, taken out of `tensors`."""
    weight = getattr(view.experts, parameter)
    out_size, in_size = weight.shape[1:][::-1] if view.is_transposed else weight.shape[1:]
    shapes = {"A": (view.num_experts * rank, in_size), "B": (out_size, rank * view.num_experts)}
    found = {}
    for letter, shape in shapes.items():
        key = f"{_key(view, parameter, adapted)}.lora_{letter}.weight"
        tensor = tensors.pop(key, None)
        if tensor is None or tuple(tensor.shape) != shape:
            got = "no such tensor" if tensor is None else f"shape {tuple(tensor.shape)}"
            raise CorruptDeltaError(f"{folder}: {key}: got {got}, expected shape {shape}; nothing was loaded.")
        found[letter] = tensor.float()
    a_ERI = found["A"].view(view.num_experts, rank, in_size)
    return a_ERI, found["B"].view(out_size, rank, view.num_experts).permute(2, 0, 1)


def _changed(factors: dict[str, Factors]) -> list[int]:
    """The experts that any projection changes."""
    changed_E = torch.stack([b_EOR.flatten(1).any(1) for _, b_EOR in factors.values()]).any(0)
    ids: list[int] = changed_E.nonzero().flatten().tolist()
    return ids


@torch.no_grad()
def _fill(view: MoELayer, adapter: str, ids: list[int], factors: dict[str, Factors]) -> None:
    for parameter, (a_ERI, b_EOR) in factors.items():
        projection = "down" if parameter == "down_proj" else "up"
        getattr(view.entry, f"expert_lora_{projection}_A")[adapter].copy_(a_ERI[ids])
        getattr(view.entry, f"expert_lora_{projection}_B")[adapter].copy_(b_EOR[ids])
