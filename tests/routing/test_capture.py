"""The hooks: what they read from a call, and that nothing of them stays."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from metier.errors import UnsupportedModelError
from metier.routing.capture import RoutingCapture, evaluating
from metier.routing.counter import RoutingCounter

IDS_TK = torch.tensor([[0, 2], [1, 2], [2, 0]])
WEIGHTS_TK = torch.tensor([[0.5, 0.25], [0.5, 0.5], [1.0, 0.125]])
HALF_T = torch.tensor([0, 1, 1])


class Experts(nn.Module):
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return hidden_states


def made() -> tuple[Experts, RoutingCapture, RoutingCounter]:
    experts, counter = Experts(), RoutingCounter(num_layers=1, num_experts=3)
    layer = SimpleNamespace(in_encoder=False, entry=experts, path="layers.0.experts", num_experts=3)
    return experts, RoutingCapture([layer], counter), counter  # type: ignore[list-item]


def check(counter: RoutingCounter) -> None:
    assert counter.token_counts_HLE().tolist() == [[[1, 0, 1]], [[1, 1, 2]]]
    assert counter.gate_mass_HLE().tolist() == [[[0.5, 0, 0.25]], [[0.125, 0.5, 1.5]]]


def test_inputs_are_counted_by_position_or_by_keyword() -> None:
    for call in (
        lambda experts: experts(torch.zeros(3, 4), IDS_TK, WEIGHTS_TK),
        lambda experts: experts(torch.zeros(3, 4), IDS_TK, top_k_weights=WEIGHTS_TK),
        lambda experts: experts(hidden_states=torch.zeros(3, 4), top_k_weights=WEIGHTS_TK, top_k_index=IDS_TK),
    ):
        experts, capture, counter = made()
        with capture.watch(), capture.batch(HALF_T):
            call(experts)
        check(counter)


def test_a_slot_of_weight_0_reached_no_expert() -> None:
    """ZAYA gives a token that skips its experts the id of expert 0; Switch one over capacity that of the full expert."""
    experts, capture, counter = made()
    weights_TK = torch.tensor([[0.0, 0.25], [0.5, 0.5], [1.0, 0.0]])
    with capture.watch(), capture.batch(HALF_T):
        experts(torch.zeros(3, 4), IDS_TK, weights_TK)
    assert counter.token_counts_HLE().sum((0, 1)).tolist() == [0, 1, 3]


def test_a_batch_handed_over_in_chunks_is_counted_whole() -> None:
    experts, capture, counter = made()
    with capture.watch(), capture.batch(HALF_T):
        experts(torch.zeros(2, 4), IDS_TK[:2], WEIGHTS_TK[:2])
        experts(torch.zeros(1, 4), IDS_TK[2:], WEIGHTS_TK[2:])
    check(counter)


def test_ids_with_batch_and_sequence_apart_are_counted_in_order() -> None:
    experts, capture, counter = made()
    with capture.watch(), capture.batch(HALF_T):
        experts(torch.zeros(3, 1, 4), IDS_TK[:, None], WEIGHTS_TK[:, None])
    check(counter)


def test_calls_outside_are_not_counted() -> None:
    experts, capture, counter = made()
    with capture.watch(), capture.batch(HALF_T):
        experts(torch.zeros(3, 4), IDS_TK, WEIGHTS_TK)
    experts(torch.zeros(3, 4), IDS_TK, WEIGHTS_TK)
    check(counter)
    assert not experts._forward_pre_hooks


def run(experts: Experts, capture: RoutingCapture, num_calls: int) -> None:
    with capture.watch(), capture.batch(HALF_T):
        for _ in range(num_calls):
            experts(torch.zeros(3, 4), IDS_TK, WEIGHTS_TK)


@pytest.mark.parametrize("num_calls", [0, 2])
def test_tokens_that_do_not_add_up_are_an_error(num_calls: int) -> None:
    experts, capture, _ = made()
    message = rf"layers\.0\.experts: the experts received {3 * num_calls} tokens in a batch of 3"
    with pytest.raises(UnsupportedModelError, match=message):
        run(experts, capture, num_calls)
    assert not experts._forward_pre_hooks


def fail_while_evaluating(model: nn.Module) -> None:
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise RuntimeError("on purpose")


def test_evaluating_puts_every_flag_back_even_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    with pytest.raises(RuntimeError, match="on purpose"):
        fail_while_evaluating(model)
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert torch.is_grad_enabled()


class Doubling(nn.Module):
    """Expert e multiplies its input by e + 1; adds up the slots as the contract has it."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        factors_TK = top_k_weights * (top_k_index + 1)
        return hidden_states * factors_TK.sum(dim=-1, keepdim=True)


@pytest.mark.parametrize("in_chunks", [False, True])
@pytest.mark.parametrize("by_keyword", [False, True])
def test_output_norms_are_measured_from_the_same_call(in_chunks: bool, by_keyword: bool) -> None:
    experts = Doubling()
    counter = RoutingCounter(num_layers=1, num_experts=3, with_output_norms=True)
    layer = SimpleNamespace(in_encoder=False, entry=experts, path="layers.0.experts", num_experts=3)
    capture = RoutingCapture([layer], counter, with_output_norms=True)  # type: ignore[list-item]
    hidden_TD = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]])  # norms 5, 2, 1
    with capture.watch(), capture.batch(HALF_T):
        for part in (slice(0, 2), slice(2, 3)) if in_chunks else (slice(0, 3),):
            if by_keyword:
                experts(top_k_index=IDS_TK[part], top_k_weights=WEIGHTS_TK[part], hidden_states=hidden_TD[part])
            else:
                experts(hidden_TD[part], IDS_TK[part], WEIGHTS_TK[part])
    norm_HLE = counter.output_norm_GLE()
    assert norm_HLE is not None
    # token 0: 5 * (0.5 * 1) and 5 * (0.25 * 3); token 1: 2 * (0.5 * 2) and 2 * (0.5 * 3); token 2: 3 and 0.125
    assert norm_HLE.tolist() == [[[2.5, 0, 3.75]], [[0.125, 2, 6]]]
    check(counter)
