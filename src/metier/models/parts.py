"""Which part of a decoder layer each of its modules belongs to: what a method can be put on, and what it covers."""

from __future__ import annotations

from torch import nn

from metier.errors import UnsupportedModelError
from metier.models.base_parameters import base_modules
from metier.models.moe import is_dense, moe_layers
from metier.models.spellings import LAYER_INDEX, OTHER_MODALITY, SHARED_EXPERTS_NAMES, SHARED_GATE_NAMES
from metier.models.unwrap import bare_model

PARTS = ("attention", "dense", "shared", "routed", "router", "norms")
"""Attention, a dense feed-forward block, shared experts, routed experts, the router, the norms."""


def part_paths(model: nn.Module) -> dict[str, list[str]]:
    """The modules of each part, by their paths in the bare model, in its order; parts that it lacks are left out.

    Of attention, dense blocks and shared experts these are the linear layers; of routed experts the modules with the
    stacked parameters.
    """
    bare = bare_model(model)
    layers = [] if is_dense(bare) else moe_layers(bare)
    experts, routers = {layer.path for layer in layers}, {layer.router_path for layer in layers}
    found: dict[str, list[str]] = {part: [] for part in PARTS}
    for path, module in base_modules(bare):
        part = None if OTHER_MODALITY.search(path) else _part(path, module, experts, routers)
        if part is not None:
            found[part].append(path)
    return {part: paths for part, paths in found.items() if paths}


def _part(path: str, module: nn.Module, experts: set[str], routers: set[str | None]) -> str | None:
    if path in experts:
        return "routed"
    if path in routers:
        return "router"
    if "Norm" in type(module).__name__:
        return None if any(path.startswith(f"{outer}.") for outer in experts) else "norms"
    if not isinstance(module, nn.Linear) or any(path.startswith(f"{outer}.") for outer in (*experts, *routers)):
        return None
    layer = list(LAYER_INDEX.finditer(path))
    if not layer:
        return None
    names = path[layer[-1].end() :].strip(".").split(".")
    if any("attn" in name.lower() or "attention" in name.lower() for name in names) or (
        names[0] == "mixer" and names[-1] in ("q_proj", "k_proj", "v_proj", "o_proj")
    ):
        return "attention"
    if any(name in SHARED_GATE_NAMES for name in names):
        return "router"
    return "shared" if any(name in SHARED_EXPERTS_NAMES for name in names) else "dense"


def modules_of(model: nn.Module, parts: tuple[str, ...]) -> list[str]:
    """The modules of some parts.

    Raises:
        UnsupportedModelError: the model has none of them.
    """
    there = part_paths(model)
    found = [path for part in parts for path in there.get(part, ())]
    if not found:
        raise UnsupportedModelError(
            f"targets: got {', '.join(parts)}, but {type(bare_model(model)).__name__} has none of them; its parts are "
            f"{', '.join(there)}. Name some of these."
        )
    return found
