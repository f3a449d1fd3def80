"""MoE blocks outside transformers' experts contract, replaced by ones that follow it and compute the same.

For families whose blocks are a few lines away from the contract. Each keeps the names of its checkpoint's tensors, so
models are read and written as before.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from metier.models.llama4 import Llama4Moe
from metier.models.switch import SwitchMoe

_BLOCKS: dict[str, Callable[[str, nn.Module], nn.Module]] = {
    "Llama4TextMoe": Llama4Moe,
    "SwitchTransformersSparseMLP": SwitchMoe,
}
"""By the class of transformers' block: what takes its place, made from the block's path and the block."""


def can_follow_contract(model: nn.Module) -> bool:
    """Whether `follow_contract` would replace a block of `model`."""
    return any(type(module).__name__ in _BLOCKS for module in model.modules())


def has_replaced_blocks(model: nn.Module) -> bool:
    """Whether `follow_contract` has replaced a block of `model`, so that transformers alone stacks its experts
    otherwise."""
    return any(isinstance(module, Llama4Moe | SwitchMoe) for module in model.modules())


def follow_contract(model: nn.Module) -> None:
    """Replace, in place, every MoE block of `model` that is known here; any other model is left as it is.

    Raises:
        UnsupportedModelError: a block is of a kind that the contract cannot express.
    """
    for path, block in list(model.named_modules()):
        make = _BLOCKS.get(type(block).__name__)
        if make is not None:
            parent_path, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent_path), name, make(path, block).train(block.training))
    if type(model).__name__ == "Llama4ForCausalLM":
        # transformers' class names a backbone that it does not have, and TRL's trainers look for it
        model.base_model_prefix = "model"  # type: ignore[assignment]
