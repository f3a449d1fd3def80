"""Masks as functions of tensors, each against the obvious way to compute it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from families.chain import made_model
from families.configs import tiny_config
from metier.errors import ConfigError, DataError
from metier.methods.sparse_delta.masks import top_entries as module
from metier.methods.sparse_delta.masks.gradients import fisher, gradient_sums
from metier.methods.sparse_delta.masks.hard_concrete import fixed_gates, open_chance, sampled_gates
from metier.methods.sparse_delta.masks.random import random_entries
from metier.methods.sparse_delta.masks.shares import evenly_spaced, shares
from metier.methods.sparse_delta.masks.top_entries import top_entries
from metier.models.attention_heads import attention_heads


def plain_top(scores, count, *, largest=True):
    """Sort everything at once; a stable sort takes the first among equals."""
    flat = torch.cat([score.flatten().float() for score in scores.values()])
    best = flat.sort(descending=largest, stable=True).indices[:count].sort().values
    found, first = {}, 0
    for name, score in scores.items():
        inside = best[(best >= first) & (best < first + score.numel())] - first
        first += score.numel()
        if len(inside):
            found[name] = inside
    return found


def same(got, expected):
    assert got.keys() == expected.keys()
    for name, indices in got.items():
        assert indices.dtype == torch.int32
        assert torch.equal(indices.long(), expected[name])


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("count", [1, 63, 257, 1000, 1391])
@pytest.mark.parametrize("kind", ["normal", "ties", "tiny", "zeros"])
def test_the_threshold_finds_what_sorting_finds(count, largest, kind, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 100)
    torch.manual_seed(0)
    scores = {"a": torch.randn(31, 17).abs(), "b": torch.rand(1), "c": torch.randn(3, 7, 41).abs()}
    scores["c"][0, 0, 0] = -0.0
    if kind == "ties":
        scores = {name: (score * 3).round() for name, score in scores.items()}
    elif kind == "tiny":
        scores = {name: score * 1e-42 for name, score in scores.items()}  # subnormal
    elif kind == "zeros":
        scores = {name: score * 0 for name, score in scores.items()}
    assert sum(score.numel() for score in scores.values()) >= 1389
    count = min(count, sum(score.numel() for score in scores.values()))
    got = top_entries({name: (lambda score=score: score) for name, score in scores.items()}, count, largest=largest)
    same(got, plain_top(scores, count, largest=largest))


def test_scores_in_bf16_are_compared_as_they_are():
    scores = {"a": torch.randn(50, 3, dtype=torch.bfloat16).abs()}
    same(top_entries({"a": lambda: scores["a"]}, 20), plain_top(scores, 20))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_score_that_is_no_score_is_refused(bad):
    with pytest.raises(ConfigError, match="a: a score is negative or not finite"):
        top_entries({"a": lambda: torch.tensor([1.0, bad])}, 1)


@pytest.mark.parametrize("count", [0, 6])
def test_more_entries_than_there_are_is_refused(count):
    with pytest.raises(ConfigError, match=f"between 1 and the 5 entries of the target parameters, got {count}"):
        top_entries({"a": lambda: torch.ones(5)}, count)


@pytest.mark.parametrize("count", [1, 2, 7, 50, 99, 103])
def test_shares_sum_to_the_count_and_follow_the_sizes(count):
    sizes = {"a": 60, "b": 3, "c": 40}
    parts = shares(sizes, count)
    assert sum(parts.values()) == count
    assert all(abs(parts.get(name, 0) - count * size / 103) <= 1 for name, size in sizes.items())


def test_evenly_spaced_entries_are_different_and_span_the_parameter():
    assert evenly_spaced(10, 3).tolist() == [0, 3, 6]
    assert evenly_spaced(7, 7).tolist() == list(range(7))
    assert len(evenly_spaced(1 << 40, 5, device=torch.device("meta"))) == 5


@pytest.mark.parametrize("count", [3, 40, 90, 100])
def test_random_entries_are_as_many_as_wanted_and_repeatable(count):
    sizes = {"a": 70, "b": 30}
    found = random_entries(sizes, count, seed=1)
    assert sum(len(indices) for indices in found.values()) == count
    for name, indices in found.items():
        assert torch.equal(indices, indices.unique())
        assert indices.max() < sizes[name]
    again, other = random_entries(sizes, count, seed=1), random_entries(sizes, count, seed=2)
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert count == 100 or any(not torch.equal(found[name], other[name]) for name in found)


def test_random_entries_favour_no_place():
    found = torch.cat([random_entries({"a": 1000}, 100, seed=seed)["a"] for seed in range(100)])
    # 10,000 draws: the mean of a uniform position scatters by 289 / 100 around 499.5; five times that
    assert abs(found.double().mean() - 499.5) < 15


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.head(self.drop(self.body(x).tanh()))


def squared(model, batch):
    return (model(batch["x"]) - batch["y"]).square().mean()


def regression():
    generator = torch.Generator().manual_seed(0)
    batches = [{"x": torch.randn(3, 5, generator=generator), "y": torch.randn(3, 1, generator=generator)} for _ in "ab"]
    return Regression().train(), batches


def gradients_of(model, batch):
    model.eval()
    gradients = torch.autograd.grad(squared(model, batch), [model.body.weight, model.head.weight])
    model.train()
    return gradients


@pytest.mark.parametrize("per_sample", [True, False])
def test_fisher_is_the_mean_of_squared_gradients(per_sample):
    model, batches = regression()
    parameters = {"body.weight": model.body.weight, "head.weight": model.head.weight}
    got = fisher(model, parameters, batches, squared, per_sample=per_sample)
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for batch in batches for i in range(3)]
    steps = rows if per_sample else batches
    squares = [[gradient.square() for gradient in gradients_of(model, step)] for step in steps]
    for name, found in zip(parameters, zip(*squares, strict=True), strict=True):
        torch.testing.assert_close(got[name], torch.stack(found).mean(0))


def test_the_sum_of_gradients_is_taken_before_its_magnitude():
    model, batches = regression()
    got = gradient_sums(model, {"body.weight": model.body.weight}, batches, squared)
    expected = sum(gradients_of(model, batch)[0] for batch in batches).abs()
    torch.testing.assert_close(got["body.weight"], expected)


def test_taking_gradients_leaves_the_model_as_it_was_even_after_an_error():
    model, batches = regression()
    model.head.bias.requires_grad_(False)
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}

    def failing(model, batch):
        squared(model, batch).backward()
        raise RuntimeError("out of memory")

    fisher(model, {"body.weight": model.body.weight}, batches, squared)
    with pytest.raises(RuntimeError, match="out of memory"):
        fisher(model, {"body.weight": model.body.weight}, batches, failing)
    assert model.training
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name][0])
        assert value.requires_grad == before[name][1]
        assert value.grad is None
    squared(model, batches[0]).backward()
    assert model.body.weight.grad is not None, "a hook was left behind"


def test_no_batch_and_batches_without_rows_are_refused():
    model, _ = regression()
    with pytest.raises(DataError, match="batches: got none"):
        fisher(model, {"body.weight": model.body.weight}, [], squared)
    odd = [{"x": torch.zeros(3, 5), "y": torch.zeros(1, 1)}]
    with pytest.raises(ConfigError, match=r"tensors of \[1, 3\] rows cannot be parted into samples"):
        fisher(model, {"body.weight": model.body.weight}, odd, squared)


def test_gates_are_closed_as_often_as_their_chance_says():
    alpha = torch.full((100_000,), 0.7)
    torch.manual_seed(0)
    share = (sampled_gates(alpha, lower=-1.5, upper=1.5) > 0).float().mean()
    # the share of 100,000 draws scatters by 0.0015; four times that
    assert abs(share - open_chance(alpha, lower=-1.5, upper=1.5)[0]) < 0.006
    expected = (torch.sigmoid(torch.tensor(0.7)) * 3 - 1.5).clamp(0, 1)
    torch.testing.assert_close(fixed_gates(alpha, lower=-1.5, upper=1.5)[0], expected)
    assert fixed_gates(torch.tensor(5.0), lower=-1.5, upper=1.5) == 1
    assert fixed_gates(torch.tensor(-5.0), lower=-1.5, upper=1.5) == 0


def test_layers_may_have_different_numbers_of_heads() -> None:
    config = tiny_config("laguna")
    per_layer = [config.num_attention_heads] * config.num_hidden_layers
    per_layer[1] *= 2
    config.num_attention_heads_per_layer = per_layer
    model = made_model(config)
    found = attention_heads(model)
    assert [heads.num_heads for heads in found] == per_layer
    for heads, layer in zip(found, model.model.layers, strict=True):
        queries, output = (
            next(part for part in heads.parts if part.path.endswith(f"{name}.weight")) for name in ("q_proj", "o_proj")
        )
        assert queries.size == output.size == layer.self_attn.head_dim
        keys = next(part for part in heads.parts if part.path.endswith("k_proj.weight"))
        assert (keys.size, keys.heads_per_slice) == (layer.self_attn.head_dim, layer.self_attn.num_key_value_groups)
