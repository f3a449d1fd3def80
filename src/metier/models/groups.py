"""Modules beside the routed experts that may be trained whole, by what they are: four groups, in every family."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from metier.errors import UnsupportedModelError
from metier.models.moe import moe_layers
from metier.models.spellings import LAYER_INDEX, SHARED_EXPERTS_NAMES, SHARED_GATE_NAMES
from metier.models.unwrap import bare_model, base_path, original_module

GROUPS = ("shared_experts", "router", "attention", "norms")
"""`shared_experts` and `router` of every MoE layer; `attention` of every decoder layer, with the norms inside it;
`norms` of every decoder layer and after the last."""


def group_paths(model: nn.Module, group: str) -> list[str]:
    """Module paths of a group in the bare model, in the order of the model.

    Raises:
        UnsupportedModelError: the model has no such modules, or its routers are no modules of their own.
    """
    assert group in GROUPS, f"{group} is none of {GROUPS}"
    bare = bare_model(model)
    finders = {"shared_experts": _shared_experts, "router": _routers, "attention": _attention, "norms": _norms}
    paths = [path for path in dict.fromkeys(finders[group](bare)) if _has_parameters(bare, path)]
    if not paths:
        raise UnsupportedModelError(
            f"{group}: {type(bare).__name__} has no such modules; its first MoE layer is "
            f"{moe_layers(bare)[0].path}, and beside it lie {', '.join(_neighbours(bare))}.\n"
            f"Leave {group} out."
        )
    return paths


def _shared_experts(bare: nn.Module) -> Iterator[str]:
    for layer in moe_layers(bare):
        block = layer.path.rpartition(".")[0]
        for owner in (block, block.rpartition(".")[0]):  # Granite and Ernie keep them beside the block
            children = bare.get_submodule(owner)._modules
            yield from (
                f"{owner}.{n}" for n in (*SHARED_EXPERTS_NAMES, *SHARED_GATE_NAMES) if children.get(n) is not None
            )


def _routers(bare: nn.Module) -> Iterator[str]:
    yield from (layer.router_path for layer in moe_layers(bare) if layer.router_path is not None)


def _attention(bare: nn.Module) -> Iterator[str]:
    for path in _decoder_layers(bare):
        for name, child in original_module(bare.get_submodule(path)).named_children():
            if ("attn" in name or "attention" in name) and not _is_norm(child):
                yield f"{path}.{name}"


def _norms(bare: nn.Module) -> Iterator[str]:
    layers = _decoder_layers(bare)
    for path in layers:
        yield from _norms_in(bare, path)
    for owner in dict.fromkeys(path.rpartition(".")[0].rpartition(".")[0] for path in layers):
        yield from _norms_in(bare, owner)


def _norms_in(bare: nn.Module, path: str) -> Iterator[str]:
    for name, child in bare.get_submodule(path).named_children():
        if _is_norm(child):
            yield f"{path}.{name}" if path else name


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(original_module(module)).__name__


def _decoder_layers(bare: nn.Module) -> list[str]:
    """Paths of all decoder layers, dense ones included, such as `model.layers.0`."""
    stacks: dict[str, None] = {}
    for layer in moe_layers(bare):
        found = list(LAYER_INDEX.finditer(layer.path))[-1]
        stacks[layer.path[: found.end()].rpartition(".")[0]] = None
    return [f"{stack}.{name}" for stack in stacks for name, _ in bare.get_submodule(stack).named_children()]


def _has_parameters(bare: nn.Module, path: str) -> bool:
    return any(True for _ in original_module(bare.get_submodule(path)).parameters())


def _neighbours(bare: nn.Module) -> list[str]:
    block = moe_layers(bare)[0].path.rpartition(".")[0]
    return [base_path(f"{block}.{name}") for name, _ in bare.get_submodule(block).named_children()]
