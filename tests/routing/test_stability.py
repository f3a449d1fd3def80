"""Split-half agreement, its interval, and when to look at it."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metier.errors import ConfigError, SelectionError
from metier.routing.blocks import BlockCounts
from metier.routing.policy import SelectionConfig
from metier.routing.stability import Stability, StabilityConfig, check_points, measure_stability

TOP_2 = SelectionConfig(score="token", top_k=2)
# an example is 60 resamples, which on a busy machine take longer than hypothesis allows by default
UNHURRIED = settings(max_examples=30, deadline=None)
LOOK = StabilityConfig(selection=TOP_2, num_resamples=60)


def made_blocks(counts_GLE: Tensor, num_tokens_G: Tensor | None = None) -> BlockCounts:
    return BlockCounts(
        layer_ids=tuple(range(counts_GLE.shape[1])),
        num_experts=counts_GLE.shape[2],
        top_k=1,
        token_counts_GLE=counts_GLE,
        gate_mass_GLE=counts_GLE.double() * 0.5,
        output_norm_GLE=counts_GLE.double() * 3.0,
        num_tokens_G=counts_GLE[:, 0].sum(dim=1) if num_tokens_G is None else num_tokens_G,
        meta={"model": "m"},
    )


def random_blocks(seed: int, num_blocks: int = 24, num_tokens: int = 60) -> BlockCounts:
    """Blocks of routing that is nearly even, so that the halves disagree at times."""
    generator = torch.Generator().manual_seed(seed)
    ids_GLT = torch.randint(6, (num_blocks, 3, num_tokens), generator=generator)
    return made_blocks(torch.nn.functional.one_hot(ids_GLT, 6).sum(dim=2))


def test_the_profile_of_blocks_is_even_ones_and_odd_ones() -> None:
    blocks = random_blocks(0, num_blocks=6)
    profile = blocks.profile()
    for half in (0, 1):
        assert torch.equal(profile.token_counts_HLE[half], blocks.token_counts_GLE[half::2].sum(dim=0))
        assert torch.equal(profile.gate_mass_HLE[half], blocks.gate_mass_GLE[half::2].sum(dim=0))
    assert profile.output_norm_HLE is not None
    assert torch.equal(profile.output_norm_HLE, profile.token_counts_HLE * 3.0)
    assert profile.num_tokens_H == (180, 180)
    assert profile.meta == {"model": "m"}


def test_a_resample_counts_each_block_as_often_as_it_was_drawn() -> None:
    blocks = random_blocks(0, num_blocks=4)
    profile = blocks.profile(torch.tensor([2, 0, 0, 3]))
    assert torch.equal(profile.token_counts_HLE[0], blocks.token_counts_GLE[0] * 2)
    assert torch.equal(profile.token_counts_HLE[1], blocks.token_counts_GLE[3] * 3)
    assert torch.equal(profile.gate_mass_HLE, profile.token_counts_HLE * 0.5)
    assert profile.output_norm_HLE is not None
    assert torch.equal(profile.output_norm_HLE, profile.token_counts_HLE * 3.0)
    assert profile.num_tokens_H == (120, 180)


@UNHURRIED
@given(seed=st.integers(0, 200))
def test_the_interval_is_ordered_and_the_same_each_time(seed: int) -> None:
    blocks = random_blocks(seed)
    found = measure_stability(blocks, LOOK, num_sequences=24)
    assert 0 <= found.low <= found.jaccard <= found.high <= 1
    assert found.jaccard == blocks.profile().reliability(TOP_2)
    assert found.num_tokens == 24 * 60
    assert measure_stability(blocks, LOOK, num_sequences=24) == found


@UNHURRIED
@given(seed=st.integers(0, 50))
def test_more_confidence_is_a_wider_interval(seed: int) -> None:
    blocks = random_blocks(seed)
    narrow, wide = (
        measure_stability(
            blocks, StabilityConfig(selection=TOP_2, num_resamples=60, confidence=share), num_sequences=24
        )
        for share in (0.5, 0.95)
    )
    assert wide.low <= narrow.low <= narrow.high <= wide.high


def test_blocks_that_are_all_alike_agree_for_sure() -> None:
    found = measure_stability(made_blocks(torch.tensor([[[6, 3, 1, 0]]] * 20)), LOOK, num_sequences=20)
    assert (found.jaccard, found.low, found.high) == (1, 1, 1)
    assert found.is_stable


def test_halves_of_different_tasks_disagree_for_sure() -> None:
    # drawn within a half, so that no resample mixes what the halves are
    found = measure_stability(made_blocks(torch.tensor([[[6, 3, 0, 0]], [[0, 0, 3, 6]]] * 10)), LOOK, num_sequences=20)
    assert (found.jaccard, found.low, found.high) == (0, 0, 0)
    assert not found.is_stable


def test_the_interval_is_wide_where_sequences_differ() -> None:
    # one sequence of many tokens in each half decides, and is missing from a third of the resamples
    common, rare = [[20, 10, 0, 0]], [[0, 0, 900, 400]]
    found = measure_stability(made_blocks(torch.tensor([common] * 18 + [rare] * 2)), LOOK, num_sequences=20)
    assert (found.jaccard, found.high) == (1, 1)
    assert found.low < 0.7
    assert not found.is_stable


def test_the_interval_is_the_resamples_spread_around_what_was_measured() -> None:
    blocks = random_blocks(5)
    found = measure_stability(blocks, LOOK, num_sequences=24)
    generator = random.Random(0)
    resampled = []
    for _ in range(60):
        times = [0] * 24
        for half in (0, 1):
            for block in generator.choices(range(half, 24, 2), k=12):
                times[block] += 1
        agreement = blocks.profile(torch.tensor(times)).reliability(TOP_2)
        assert agreement is not None
        resampled.append(agreement)
    resampled.sort()
    mean = sum(resampled) / 60
    # 2.5% of 60 resamples are one and a half: one is cut off at each end
    assert found.low == pytest.approx(max(found.jaccard - (mean - resampled[1]), 0))
    assert found.high == pytest.approx(min(found.jaccard + (resampled[58] - mean), 1))
    assert resampled[0] < mean < resampled[59]


def test_a_skewed_spread_leaves_the_interval_around_what_was_measured() -> None:
    common, rare = [[20, 10, 0, 0]], [[0, 0, 900, 400]]
    blocks = made_blocks(torch.tensor([common] * 14 + [rare] * 6))  # few resamples lack the rare ones in one half
    half = measure_stability(
        blocks, StabilityConfig(selection=TOP_2, num_resamples=60, confidence=0.5), num_sequences=20
    )
    assert (half.low, half.jaccard, half.high) == (1, 1, 1)


def test_a_spread_skewed_upwards_leaves_it_there_too() -> None:
    heavy, light, odd = [[900, 400, 0, 0]], [[0, 0, 9, 4]], [[0, 0, 9, 4]]
    even = [heavy, light, light, heavy, light, light, heavy, light, light, light]  # few resamples lack all heavy ones
    blocks = made_blocks(torch.tensor([block for pair in zip(even, [odd] * 10, strict=True) for block in pair]))
    half = measure_stability(
        blocks, StabilityConfig(selection=TOP_2, num_resamples=200, confidence=0.5), num_sequences=20
    )
    assert (half.low, half.jaccard, half.high) == (0, 0, 0)


def test_empty_blocks_are_not_drawn() -> None:
    counts_GLE = torch.zeros(64, 1, 4, dtype=torch.int64)
    counts_GLE[:2] = torch.tensor([6, 3, 1, 0])  # else a resample of nothing has no scores
    assert measure_stability(made_blocks(counts_GLE), LOOK, num_sequences=2).low == 1


@pytest.mark.parametrize(
    ("num_sequences", "low", "is_stable"), [(16, 0.9, True), (15, 1.0, False), (64, 0.89, False), (64, 0.91, True)]
)
def test_it_is_stable_if_the_low_end_reaches_the_threshold(num_sequences: int, low: float, is_stable: bool) -> None:
    found = Stability(num_sequences=num_sequences, num_tokens=9, jaccard=0.95, low=low, high=1.0, threshold=0.9)
    assert found.is_stable == is_stable
    assert str(found) == f"Jaccard 0.950 ({low:.3f} to 1.000)"


@given(num_sequences=st.integers(1, 5000))
def test_checks_double_and_end_with_all(num_sequences: int) -> None:
    points = check_points(num_sequences)
    assert points[-1] == num_sequences
    assert points[:-1] == [16 * 2**i for i in range(len(points) - 1)]
    assert points == sorted(set(points))
    assert len(points) == 1 or points[-1] <= 2 * points[-2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 0.0}, r"threshold must be in \(0, 1\], got 0.0"),
        ({"threshold": 1.5}, r"threshold must be in \(0, 1\], got 1.5"),
        ({"confidence": 1.0}, r"confidence must be in \(0, 1\), got 1.0"),
        ({"num_resamples": 19}, "num_resamples must be at least 20, got 19"),
    ],
)
def test_a_setting_outside_its_range_is_an_error(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StabilityConfig(**changes)


def test_what_the_selection_needs_must_be_there() -> None:
    budget = SelectionConfig(score="token", budget_bytes=40)
    with pytest.raises(SelectionError, match="expert_bytes: got none, but budget_bytes=40 needs bytes an expert"):
        StabilityConfig(selection=budget)
    minus = SelectionConfig(score="token", top_k=1, minus_general=True)
    with pytest.raises(SelectionError, match="general: got none, but minus_general=True needs the profile"):
        StabilityConfig(selection=minus)


def test_budget_and_general_data_reach_the_selection() -> None:
    blocks = made_blocks(torch.tensor([[[6, 3, 1, 0]], [[6, 1, 3, 0]]] * 10))
    general = made_blocks(torch.tensor([[[8, 0, 0, 2]], [[8, 0, 0, 2]]])).profile()
    minus = SelectionConfig(score="token", top_k=1, minus_general=True)
    plain = SelectionConfig(score="token", top_k=1)
    assert measure_stability(blocks, StabilityConfig(selection=plain), num_sequences=20).low == 1
    assert measure_stability(blocks, StabilityConfig(selection=minus, general=general), num_sequences=20).high == 0
    budget = StabilityConfig(selection=SelectionConfig(score="token", budget_bytes=20), expert_bytes={0: 10})
    assert measure_stability(blocks, budget, num_sequences=20).jaccard == pytest.approx(1 / 3)
