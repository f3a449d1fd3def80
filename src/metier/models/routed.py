"""Whatever routes tokens to experts: a model's own MoE layers or, in a dense model, the mixtures that an adapter adds.

Room for profiles and selections alone. What is said of a *base* (its fingerprint, whether it is dense, what an adapter
may be put on) goes by `metier.models.moe`, which looks through adapters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise

from torch import nn

from metier.errors import UnsupportedModelError
from metier.models.moe import MoELayer, is_dense, moe_layers
from metier.models.spellings import LAYER_INDEX
from metier.models.unwrap import bare_model, base_path


class MixtureOfChanges(nn.Module, ABC):
    """Experts that an adapter adds to a dense block; they are called as those of transformers' experts contract.

    `forward(hidden_states_TD, top_k_index_TK, top_k_weights_TK)` is what they add to the block's output, (T, D), linear
    in the weights.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    inner_size: int
    has_gate: bool
    is_active: bool
    """Whether the model calls it now."""

    @property
    @abstractmethod
    def block_path(self) -> str:
        """Of the block that it belongs to, in the bare model."""


def routed_layers(model: nn.Module) -> list[MoELayer]:
    """Every layer with routed experts, in the order of decoder layers.

    The views of an adapter's mixtures have `experts` and `entry` in common and no stacked parameters, so
    `parameter_names` names nothing in them.

    Args:
        model: bare or wrapped by PEFT.

    Raises:
        UnsupportedModelError: as `moe_layers`; or two active adapters both have a mixture in one layer.
    """
    bare = bare_model(model)
    added = [_view(path, m) for path, m in bare.named_modules() if isinstance(m, MixtureOfChanges) and m.is_active]
    if not added or not is_dense(bare):
        return moe_layers(bare)
    added.sort(key=lambda layer: layer.index)
    for before, after in pairwise(added):
        if before.index == after.index:
            raise UnsupportedModelError(
                f"layers.{after.index}: two mixtures are active here, {before.path} and {after.path}, expected one.\n"
                "Activate one adapter by set_adapter."
            )
    return added


def decoder_layer_index(path: str) -> int:
    """The decoder layer that a module is in, counted from 0.

    Raises:
        UnsupportedModelError: it is in none.
    """
    found = LAYER_INDEX.findall(f"{path}.")
    if not found:
        raise UnsupportedModelError(
            f"{path}: is not inside a numbered decoder layer, expected a path such as 'model.layers.7.mlp'."
        )
    return int(found[-1])


def _view(raw_path: str, mixture: MixtureOfChanges) -> MoELayer:
    return MoELayer(
        index=decoder_layer_index(mixture.block_path),
        path=base_path(raw_path),
        experts=mixture,
        entry=mixture,
        num_experts=mixture.num_experts,
        top_k=mixture.top_k,
        hidden_size=mixture.hidden_size,
        moe_intermediate_size=mixture.inner_size,
        has_gate=mixture.has_gate,
        has_bias=False,
        is_transposed=False,
        is_concatenated=False,
        has_post_expert_norm=False,
        num_shared_experts=0,
        router_path=None,
    )
