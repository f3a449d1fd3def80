"""One adapter's experts in one block: their matrices as parameters, called as experts of a sparse model are."""

# T tokens, D hidden_size, U width of an up projection, F inner width, N up projections, E experts, K top_k, R rank

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from metier.methods.mixlora.changes import LoraExpert, changes
from metier.methods.mixlora.config import MixLoraConfig
from metier.models.dense_mlp import DenseMlp
from metier.models.routed import MixtureOfChanges


class LoraPairs(nn.Module):
    """One expert's `A` and `B` for each projection. Every `B` begins as 0, so that the expert changes nothing."""

    def __init__(self, mlp: DenseMlp, r: int) -> None:
        super().__init__()
        num_ups = len(mlp.up_names)
        self.up_a = nn.Parameter(_uniform(num_ups, r, mlp.hidden_size))
        self.up_b = nn.Parameter(torch.zeros(num_ups, mlp.up_size, r))
        self.down_a = nn.Parameter(_uniform(r, mlp.inner_size))
        self.down_b = nn.Parameter(torch.zeros(mlp.hidden_size, r))


class Mixture(MixtureOfChanges):
    """The experts of one adapter in one block. A hook on it sees a sparse layer's routing, whatever the base is."""

    def __init__(self, mlp: DenseMlp, path: str, config: MixLoraConfig, is_active: Callable[[], bool]) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(LoraPairs(mlp, config.r) for _ in range(config.num_experts))
        self.num_experts, self.top_k, self.scale = config.num_experts, config.top_k, config.scale
        self.hidden_size, self.inner_size, self.has_gate = mlp.hidden_size, mlp.inner_size, mlp.has_gate
        self._mlp, self._path, self._is_active = mlp, path, is_active

    @property
    def block_path(self) -> str:
        return self._path

    @property
    def is_active(self) -> bool:  # type: ignore[override]
        return self._is_active()

    def forward(
        self,
        hidden_states_TD: Tensor,
        top_k_index_TK: Tensor,
        top_k_weights_TK: Tensor,
        *,
        with_base: bool = False,
    ) -> Tensor:
        """What the experts add to the block's output; or, `with_base`, the output, with one down projection for both.

        Args:
            hidden_states_TD: the block's input.
            top_k_index_TK: int64, each expert at most once a token.
            top_k_weights_TK: of each token's experts; with the base they sum to 1.
            with_base: whether to return all of the output.

        Returns:
            (T, D)
        """
        mlp = self._mlp
        ups_TU = mlp.ups(hidden_states_TD)
        inner_TF = mlp.between(*ups_TU)
        added_inner_TF, added_TD = changes(
            hidden_states_TD,
            top_k_index_TK,
            top_k_weights_TK,
            ups_TU,
            inner_TF,
            experts=[LoraExpert(x.up_a, x.up_b, x.down_a, x.down_b) for x in self._experts()],
            between=mlp.between,
            scale=self.scale,
        )
        if with_base:
            return mlp.down(inner_TF + added_inner_TF) + added_TD
        # a bias is the base's
        return mlp.down(added_inner_TF) - mlp.down(torch.zeros_like(added_inner_TF)) + added_TD

    def train_only(self, expert_ids: Collection[int]) -> None:
        """Freeze every other expert."""
        for number, pairs in enumerate(self.pairs):
            if number not in expert_ids:
                pairs.requires_grad_(False)

    def _experts(self) -> list[LoraPairs]:
        return [pairs for pairs in self.pairs if isinstance(pairs, LoraPairs)]


def _uniform(*shape: int) -> Tensor:
    """PEFT's initial values of a LoRA's `A`."""
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound)
