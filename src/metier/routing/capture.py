"""Watch the router through the experts' inputs, with hooks that leave no trace in the model.

Whatever a family's router computes, its experts are called as `experts(hidden_states_TD, top_k_index_TK,
top_k_weights_TK)`; so the inputs of the experts are the one place where every family shows the same thing.
"""

# T tokens, D hidden_size, K top_k, B sequences, S sequence_length

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from metier.errors import UnsupportedModelError
from metier.models.moe import MoELayer
from metier.routing.counter import RoutingCounter
from metier.routing.output_norms import output_norms_TK


class RoutingCapture:
    """Counts every forward pass between `watch` and its end; see `watch`.

    Args:
        layers: the layers to watch; their order is that of the counter's positions.
        counter: where the counts go.
        with_output_norms: measure the norms of the experts' outputs too, which runs the experts once more.
    """

    def __init__(self, layers: Sequence[MoELayer], counter: RoutingCounter, *, with_output_norms: bool = False) -> None:
        self._layers = layers
        self._counter = counter
        self._with_output_norms = with_output_norms
        self._group_T = self._encoder_group_T = torch.zeros(0, dtype=torch.int64)
        self._has_padding = False
        self._seen = [0] * len(layers)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Hook the experts' entries; the hooks are gone at the end, whatever happened."""
        handles = [
            layer.entry.register_forward_pre_hook(self._hook(position), with_kwargs=True)
            for position, layer in enumerate(self._layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def batch(self, group_T: Tensor, encoder_group_T: Tensor | None = None) -> Iterator[None]:
        """One forward pass over tokens whose sequences belong to these groups of the counter.

        Args:
            group_T: int64, (num_tokens,); a group below 0 is padding, which is not counted.
            encoder_group_T: of the tokens of an encoder-decoder's encoder; None where the model only decodes.

        Raises:
            UnsupportedModelError: a layer's experts were not called on exactly these tokens.
        """
        self._group_T = group_T
        self._encoder_group_T = group_T if encoder_group_T is None else encoder_group_T
        self._has_padding = encoder_group_T is not None
        self._seen = [0] * len(self._layers)
        yield
        for position, layer in enumerate(self._layers):
            seen, wanted = self._seen[position], self._groups(position).numel()
            if seen != wanted:
                raise UnsupportedModelError(
                    f"{layer.path}: the experts received {seen} tokens in a batch of {wanted}.\n"
                    f"metier counts routing only where each token passes a layer's experts exactly once."
                )

    def _groups(self, position: int) -> Tensor:
        return self._encoder_group_T if self._layers[position].in_encoder else self._group_T

    def _hook(self, position: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            expert_ids_TK: Tensor = args[1] if len(args) > 1 else kwargs["top_k_index"]
            routing_weights_TK: Tensor = args[2] if len(args) > 2 else kwargs["top_k_weights"]
            expert_ids_TK = expert_ids_TK.reshape(-1, expert_ids_TK.shape[-1])
            routing_weights_TK = routing_weights_TK.reshape_as(expert_ids_TK)
            start = self._seen[position]
            self._seen[position] = start + expert_ids_TK.shape[0]
            group_T = self._groups(position)[start : self._seen[position]]
            if group_T.shape[0] != expert_ids_TK.shape[0]:
                return  # `batch` reports it
            is_counted_T = group_T >= 0 if self._has_padding else slice(None)
            group_T = group_T[is_counted_T]
            expert_ids_TK, routing_weights_TK = expert_ids_TK[is_counted_T], routing_weights_TK[is_counted_T]
            norms_TK = None
            if self._with_output_norms:
                hidden_states: Tensor = args[0] if args else kwargs["hidden_states"]
                norms_TK = output_norms_TK(
                    module,
                    hidden_states.reshape(-1, hidden_states.shape[-1])[is_counted_T],
                    expert_ids_TK,
                    routing_weights_TK,
                    num_experts=self._layers[position].num_experts,
                )
            # some families give a slot that reaches nobody a real expert's id, and a weight of 0 (ZAYA, Switch)
            nobody = self._layers[position].num_experts
            expert_ids_TK = expert_ids_TK.long().masked_fill(routing_weights_TK == 0, nobody)
            self._counter.add(position, expert_ids_TK, routing_weights_TK, group_T, norms_TK)

        return count


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own training flag is put back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # not inference_mode: buffers that a model makes on first use would be unusable in training
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training
