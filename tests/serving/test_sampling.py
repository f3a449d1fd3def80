"""Each request's own settings in one batch."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from metier.serving.contract import SamplingSettings
from metier.serving.sampling import RequestSampler

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])


def drawn(sampler: RequestSampler, scores_BV: Tensor, ids: list[str]) -> list[int]:
    """The tokens that transformers takes: the largest of what the sampler leaves."""
    states = [SimpleNamespace(state=SimpleNamespace(request_id=each)) for each in ids]
    argument = sampler.prepare_tensor_args(states)
    tokens: list[int] = sampler(scores_BV, argument).argmax(-1).tolist()
    return tokens


def sequence(seed: int | None, *, others: int = 0, num: int = 30, **settings: float) -> list[int]:
    """The tokens of one request, alone or after others in the batch."""
    sampler = RequestSampler()
    sampler.add("mine", SamplingSettings(max_tokens=num, seed=seed, **settings))
    ids = [f"other{n}" for n in range(others)]
    for each in ids:
        sampler.add(each, SamplingSettings(max_tokens=num, temperature=1.3))
    return [drawn(sampler, LOGITS.repeat(others + 1, 1), [*ids, "mine"])[-1] for _ in range(num)]


def test_temperature_zero_takes_the_likeliest_beside_requests_that_draw() -> None:
    assert set(sequence(None, temperature=0, others=3)) == {4}


@pytest.mark.parametrize("temperature", [1e-6, 1e-307, 5e-324])
def test_a_temperature_near_zero_takes_the_likeliest_too(temperature: float) -> None:
    assert set(sequence(1, temperature=temperature)) == {4}


@pytest.mark.parametrize("broken", [torch.nan, -torch.inf, torch.inf])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_logits_that_are_no_numbers_end_nobody_elses_answer(broken: float, top_p: float) -> None:
    sampler = RequestSampler()
    sampler.add("a", SamplingSettings(max_tokens=1, seed=0, top_p=top_p, num_top_logprobs=3))
    sampler.add("b", SamplingSettings(max_tokens=1, temperature=0))
    tokens = drawn(sampler, torch.stack([torch.full_like(LOGITS, broken), LOGITS]), ["a", "b"])
    assert 0 <= tokens[0] < len(LOGITS)
    assert tokens[1] == 4


def test_a_token_that_cannot_come_is_never_drawn() -> None:
    banned = LOGITS.clone()
    banned[[0, 3]] = -torch.inf
    sampler = RequestSampler()
    sampler.add("a", SamplingSettings(max_tokens=1, temperature=2.0, seed=0))
    assert {drawn(sampler, banned.unsqueeze(0), ["a"])[0] for _ in range(300)} == {1, 2, 4}


def test_the_same_seed_draws_the_same_whoever_else_is_there() -> None:
    alone = sequence(7, temperature=1.0)
    assert sequence(7, temperature=1.0, others=5) == alone
    assert sequence(8, temperature=1.0) != alone


def test_without_a_seed_each_request_draws_anew() -> None:
    assert sequence(None, temperature=2.0) != sequence(None, temperature=2.0)


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**80])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert sequence(seed, temperature=1.0) == sequence(seed, temperature=1.0)


def test_draws_follow_the_probabilities() -> None:
    num = 6000
    counts = Counter(sequence(3, num=num, temperature=0.8))
    for token, share in enumerate((LOGITS / 0.8).softmax(-1).tolist()):
        # five standard deviations
        assert abs(counts[token] / num - share) < 5 * (share * (1 - share) / num) ** 0.5


def test_top_p_keeps_the_fewest_tokens_that_make_it_up() -> None:
    shares = LOGITS.softmax(-1)
    two = float(shares[4] + shares[0])
    assert set(sequence(1, num=400, temperature=1.0, top_p=two - 1e-3)) == {4, 0}
    assert set(sequence(1, num=400, temperature=1.0, top_p=two + 1e-3)) == {4, 0, 1}
    assert set(sequence(1, num=100, temperature=1.0, top_p=1e-9)) == {4}


def test_log_probabilities_are_the_models_own() -> None:
    sampler = RequestSampler()
    draw = sampler.add("a", SamplingSettings(max_tokens=1, temperature=0.1, seed=0, num_top_logprobs=2))
    none = sampler.add("b", SamplingSettings(max_tokens=1, temperature=0))
    drawn(sampler, LOGITS.repeat(2, 1), ["b", "a"])
    (token,) = draw.tokens
    want = LOGITS.log_softmax(-1).tolist()
    assert token.logprob == pytest.approx(want[token.token_id])
    assert token.top_logprobs == (pytest.approx((4, want[4])), pytest.approx((0, want[0])))
    assert none.tokens == []


def test_log_probabilities_of_the_token_alone() -> None:
    sampler = RequestSampler()
    draw = sampler.add("a", SamplingSettings(max_tokens=1, temperature=0, num_top_logprobs=0))
    drawn(sampler, LOGITS.unsqueeze(0), ["a"])
    assert draw.tokens[0].top_logprobs == ()
    assert draw.tokens[0].logprob == pytest.approx(float(LOGITS.log_softmax(-1)[4]))
