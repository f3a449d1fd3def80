"""A batch that mixes deltas answers each request as its merged model does alone."""

from __future__ import annotations

import pytest
import torch

from metier.serving import few_rows
from metier.serving.step import NO_DELTA, make_step, running
from serving.served_models import Served, logits, served

# float32 on both sides; rows of a batch are summed in another order than alone
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
PROMPTS = [[5, 9, 12, 7], [5, 9, 12, 7, 30], [8], [61, 62, 63, 64, 65, 66]]


@pytest.fixture(params=["small", "large"], autouse=True)
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny models' experts are small; let them pass for large ones too, and for experts with many rows."""
    if request.param == "large":
        monkeypatch.setattr(few_rows, "MOST_BYTES", 0)
    else:
        monkeypatch.setattr(few_rows, "MOST_ROWS", 3)


def check_mixed(found: Served, numbers: list[int]) -> None:
    """Each prompt with its delta: packed into one batch of experts, against merged models alone."""
    # attention is not ours here: what goes in is each layer's input by the merged models, request by request
    for layer in found.layers:
        hidden, ids, weights, want = [], [], [], []
        for prompt, number in zip(PROMPTS, numbers, strict=True):
            model = found.merged.get(number, found.plain)
            experts = model.get_submodule(layer.view.path)
            calls: list[tuple[tuple[torch.Tensor, ...], torch.Tensor]] = []
            hook = experts.register_forward_hook(lambda _, args, out, calls=calls: calls.append((args, out)))
            logits(model, prompt)
            hook.remove()
            (args, out), *_ = calls
            for place, tensors in zip((hidden, ids, weights, want), (*args, out), strict=True):
                place.append(tensors)
        parts = [(number, len(prompt)) for number, prompt in zip(numbers, PROMPTS, strict=True)]
        with torch.no_grad(), running(make_step(parts)):
            mixed = layer(torch.cat(hidden), torch.cat(ids), torch.cat(weights))
        torch.testing.assert_close(mixed, torch.cat(want), **TOLERANCE)


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe", "mixtral", "olmoe", "gpt_oss", "nemotron_h"])
def test_a_mixed_batch_equals_each_merged_model_alone(family: str) -> None:
    found = served(family)
    layers = [layer.view.index for layer in found.layers]
    found.add_rows(1, {layer: [0, 2, 3] for layer in layers}, seed=1)
    found.add_rows(2, {layers[-1]: [3]}, seed=2)
    check_mixed(found, [1, 2, NO_DELTA, 1])


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss"])
def test_deltas_of_both_kinds_share_a_batch(family: str) -> None:
    found = served(family)
    layers = [layer.view.index for layer in found.layers]
    found.add_rows(1, {layer: [0, 1] for layer in layers}, seed=1)
    found.add_low_rank(2, {layer: [1, 3] for layer in layers}, seed=2)
    found.add_low_rank(3, {layers[0]: [0]}, seed=3, rank=4)
    check_mixed(found, [2, 1, 3, NO_DELTA])
    check_mixed(found, [2, 3, 2, 3])


def test_a_delta_of_every_expert_leaves_nothing_on_the_base() -> None:
    found = served("mixtral")
    layers = [layer.view.index for layer in found.layers]
    found.add_rows(4, {layer: [0, 1, 2, 3] for layer in layers}, seed=1)
    check_mixed(found, [4, 4, 4, 4])


def test_requests_of_the_base_are_answered_to_the_bit_beside_deltas() -> None:
    found = served("olmoe")
    layer = found.layers[0]
    found.add_rows(1, {0: [0, 1, 2, 3, 4, 5, 6, 7]}, seed=1)
    hidden, ids, weights = torch.randn(3, 32), torch.tensor([[0, 1, 2, 3]] * 3), torch.full((3, 4), 0.25)
    with torch.no_grad():
        with running(make_step([(NO_DELTA, 1), (1, 1), (NO_DELTA, 1)])):
            mixed = layer(hidden, ids, weights)
        with running(make_step([(NO_DELTA, 2)])):
            alone = layer(hidden[[0, 2]], ids[:2], weights[:2])
    assert torch.equal(mixed[[0, 2]], alone)
    assert not torch.allclose(mixed[1], layer.base_layer(hidden[1:2], ids[:1], weights[:1])[0], atol=1e-3)


def test_outside_a_step_the_model_is_the_base() -> None:
    found = served()
    found.add_rows(1, {1: [0, 1, 2, 3, 4, 5, 6, 7]}, seed=1)
    for layer in found.layers:
        # a product's last bits hang on how its weights lie
        experts = found.plain.get_submodule(layer.view.path)
        for name in layer.view.parameter_names():
            strides = getattr(layer.base_layer, name).stride()
            weight = getattr(experts, name)
            weight.data = torch.empty_strided(weight.shape, strides).copy_(weight.data)
    assert torch.equal(logits(found.model, PROMPTS[0]), logits(found.plain, PROMPTS[0]))


def test_a_freed_number_is_the_base_again() -> None:
    found = served("mixtral")
    found.add_rows(1, {layer.view.index: [0, 1, 2, 3] for layer in found.layers}, seed=1)
    for layer in found.layers:
        layer.slot_NE[1] = -1
    found.merged.clear()
    check_mixed(found, [1, 1, 1, 1])


def test_experts_are_counted_for_those_who_ask() -> None:
    found = served("mixtral")
    layer = found.layers[1]
    ids = torch.tensor([[0, 1], [0, 2], [3, 1]])
    step = make_step([(NO_DELTA, 1), (1, 2)], counted=[None, 0])
    with torch.no_grad(), running(step):
        layer(torch.randn(3, 32), ids, torch.full((3, 2), 0.5))
    assert step.counts[layer.view.index].tolist() == [[1, 1, 1, 1]]
