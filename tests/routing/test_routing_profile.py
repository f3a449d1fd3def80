"""What a profile holds: scores, reliability, exact merging, and its two files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from metier.errors import DataError, SelectionError
from metier.routing.policy import SelectionConfig
from metier.routing.profile import RoutingProfile, UnreliableProfileWarning, profile_routing
from metier.routing.routing_profile import PAPER_SELECTION

NUM_LAYERS, NUM_EXPERTS, TOP_K = 2, 7, 3


def random_log(seed: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids_LTK = torch.rand(NUM_LAYERS, num_tokens, NUM_EXPERTS, generator=generator).argsort(dim=-1)[..., :TOP_K]
    # a steep softmax: sums of weights of one magnitude would be exact without rounding
    logits_LTK = torch.randn(NUM_LAYERS, num_tokens, TOP_K, generator=generator) * 20
    return ids_LTK, logits_LTK.softmax(dim=-1)


def made(ids_LTK: Tensor, weights_LTK: Tensor, lengths: list[int], **meta: str) -> RoutingProfile:
    return profile_routing(
        ids_LTK, weights_LTK, layer_ids=[1, 4], num_experts=NUM_EXPERTS, sample_lengths=lengths, meta=meta
    )


def some_profile(seed: int = 0, num_tokens: int = 40, **meta: str) -> RoutingProfile:
    return made(*random_log(seed, num_tokens), [num_tokens // 2, num_tokens - num_tokens // 2], **meta)


def assert_equal(first: RoutingProfile, second: RoutingProfile) -> None:
    assert torch.equal(first.token_counts_HLE, second.token_counts_HLE)
    assert torch.equal(first.gate_mass_HLE, second.gate_mass_HLE)
    for name in ("layer_ids", "num_experts", "top_k", "num_tokens_H", "meta"):
        assert getattr(first, name) == getattr(second, name)


def test_scores_are_float32_and_their_rows_sum_to_one() -> None:
    profile = some_profile()
    for score in ("token", "gate"):
        for half in (None, 0, 1):
            scores_LE = profile.scores_LE(score, half=half)
            assert scores_LE.shape == (NUM_LAYERS, NUM_EXPERTS)
            assert scores_LE.dtype == torch.float32
            torch.testing.assert_close(scores_LE.sum(dim=1), torch.ones(NUM_LAYERS))
    assert torch.equal(profile.token_ratio_LE, profile.scores_LE("token"))
    assert torch.equal(profile.gate_score_LE, profile.scores_LE("gate"))


def test_token_scores_are_the_papers_ratio() -> None:
    profile = some_profile()
    counted_LE = profile.token_counts_HLE.sum(dim=0)
    torch.testing.assert_close(profile.token_ratio_LE, counted_LE / (TOP_K * profile.num_tokens))


def test_halves_are_even_and_odd_samples() -> None:
    ids_LTK, weights_LTK = random_log(0, 10)
    profile = made(ids_LTK, weights_LTK, [3, 5, 2])
    even = torch.tensor([0, 1, 2, 8, 9])
    assert profile.num_tokens_H == (5, 5)
    assert profile.num_tokens == 10
    alone = made(ids_LTK[:, even], weights_LTK[:, even], [5])
    assert torch.equal(profile.token_counts_HLE[0], alone.token_counts_HLE[0])
    torch.testing.assert_close(profile.scores_LE("gate", half=0), alone.scores_LE("gate"))


def test_reliability_is_the_mean_jaccard_of_the_halves() -> None:
    counts_HLE = torch.tensor([[[5, 4, 1], [6, 3, 1]], [[5, 4, 1], [6, 1, 3]]])
    profile = RoutingProfile(
        layer_ids=(0, 1),
        num_experts=3,
        top_k=1,
        token_counts_HLE=counts_HLE,
        gate_mass_HLE=counts_HLE.double(),
        num_tokens_H=(10, 10),
    )
    assert profile.reliability(SelectionConfig(score="token", top_p=0.9)) == pytest.approx((1 + 1 / 3) / 2)
    assert profile.reliability(SelectionConfig(score="gate", top_p=0.5)) == 1
    profile.warn_if_unreliable(SelectionConfig(score="gate", top_p=0.5))  # pytest.warns below sees the other case
    with pytest.warns(UnreliableProfileWarning, match=r"profile of 20 tokens: .*top_p=0\.9 \(Jaccard 0\.67"):
        profile.warn_if_unreliable(SelectionConfig(score="token", top_p=0.9))


@pytest.mark.filterwarnings("error")
def test_a_reliable_profile_does_not_warn() -> None:
    profile = some_profile()
    halves = torch.stack([profile.token_counts_HLE[0]] * 2)
    RoutingProfile(
        layer_ids=profile.layer_ids,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        token_counts_HLE=halves,
        gate_mass_HLE=halves.double(),
        num_tokens_H=(20, 20),
    ).warn_if_unreliable(PAPER_SELECTION)


def test_a_profile_with_an_empty_half_says_so() -> None:
    profile = made(*random_log(0, 10), [10])
    assert profile.reliability(PAPER_SELECTION) is None
    with pytest.warns(UnreliableProfileWarning, match="one half is empty"):
        profile.warn_if_unreliable(PAPER_SELECTION)


@given(seed=st.integers(0, 1000), cut=st.integers(0, 60), other_cut=st.integers(0, 60))
def test_profiles_of_parts_merge_to_the_profile_of_the_whole(seed: int, cut: int, other_cut: int) -> None:
    ids_LTK, weights_LTK = random_log(seed, 60)
    first, second = sorted((cut, other_cut))
    bounds = [(0, first), (first, second), (second, 60)]
    a, b, c = (made(ids_LTK[:, i:j], weights_LTK[:, i:j], [j - i], part=str(i)) for i, j in bounds)
    whole = made(ids_LTK, weights_LTK, [60])
    for merged in ((a + b) + c, a + (b + c), c.merge(a).merge(b)):
        assert torch.equal(merged.token_counts_HLE, whole.token_counts_HLE)
        assert torch.equal(merged.gate_mass_HLE, whole.gate_mass_HLE)
        assert merged.num_tokens_H == whole.num_tokens_H
    assert_equal((a + b) + c, c + (b + a))


def test_merging_leaves_both_profiles_as_they_were() -> None:
    first, second = some_profile(0), some_profile(1)
    first + second
    assert_equal(first, some_profile(0))
    assert_equal(second, some_profile(1))


def test_merged_profiles_list_what_differs() -> None:
    merged = some_profile(0, model="m", data="z") + some_profile(1, model="m", data="a")
    assert merged.meta == {"model": "m", "data": "a + z"}


def test_profiles_of_different_models_do_not_merge() -> None:
    with pytest.raises(SelectionError, match=r"(?s)fingerprint: got a profile with 'b', expected 'a'.*one model"):
        some_profile(fingerprint="a").merge(some_profile(fingerprint="b"))
    with pytest.raises(SelectionError, match="adapter: got a profile with 'law', expected 'none'"):
        some_profile(adapter="none").merge(some_profile(adapter="law"))


def test_profiles_of_different_shapes_do_not_merge() -> None:
    ids_LTK, weights_LTK = random_log(0, 10)
    other = profile_routing(ids_LTK, weights_LTK, layer_ids=[1, 4], num_experts=NUM_EXPERTS + 1, sample_lengths=[10])
    with pytest.raises(SelectionError, match="num_experts: got a profile with 8, expected 7"):
        some_profile().merge(other)
    layers = profile_routing(ids_LTK, weights_LTK, layer_ids=[1, 5], num_experts=NUM_EXPERTS, sample_lengths=[10])
    with pytest.raises(SelectionError, match=r"layer_ids: got a profile with \(1, 5\), expected \(1, 4\)"):
        some_profile().merge(layers)
    thin = profile_routing(
        ids_LTK[..., :1], weights_LTK[..., :1], layer_ids=[1, 4], num_experts=NUM_EXPERTS, sample_lengths=[10]
    )
    with pytest.raises(SelectionError, match="top_k: got a profile with 1, expected 3"):
        some_profile().merge(thin)


def test_a_profile_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    profile = some_profile(3, model="tiny", note="ünïcode")
    profile.save(tmp_path / "run")
    assert_equal(RoutingProfile.load(tmp_path / "run"), profile)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "profile.json",
        "profile.safetensors",
    ]


def test_the_json_file_tells_a_person_what_was_measured(tmp_path: Path) -> None:
    profile = some_profile(3, model="tiny")
    profile.save(tmp_path)
    description = json.loads((tmp_path / "profile.json").read_text())
    assert description["num_tokens"] == 40
    assert description["layer_ids"] == [1, 4]
    assert description["meta"] == {"model": "tiny"}
    jaccard = description["split_half_jaccard"]["token scores, top_p=0.2"]
    assert jaccard == profile.reliability(PAPER_SELECTION)


def test_a_missing_profile_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected profile\.safetensors and profile\.json"):
        RoutingProfile.load(tmp_path)
    some_profile().save(tmp_path)
    (tmp_path / "profile.json").unlink()
    with pytest.raises(DataError, match=r"got no profile\.json"):
        RoutingProfile.load(tmp_path)


@pytest.mark.parametrize("name", ["profile.json", "profile.safetensors"])
def test_a_truncated_profile_is_an_error(tmp_path: Path, name: str) -> None:
    some_profile().save(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20])
    with pytest.raises(DataError, match="the profile is broken"):
        RoutingProfile.load(tmp_path)


def test_a_profile_that_lacks_an_entry_is_an_error(tmp_path: Path) -> None:
    some_profile().save(tmp_path)
    description = json.loads((tmp_path / "profile.json").read_text())
    del description["top_k"]
    (tmp_path / "profile.json").write_text(json.dumps(description))
    with pytest.raises(DataError, match="the profile lacks top_k"):
        RoutingProfile.load(tmp_path)


def test_tensors_of_another_shape_are_an_error(tmp_path: Path) -> None:
    some_profile().save(tmp_path)
    description = json.loads((tmp_path / "profile.json").read_text())
    (tmp_path / "profile.json").write_text(json.dumps({**description, "num_experts": 9}))
    message = r"gate_mass_HLE|token_counts_HLE: got torch\.int64 \(2, 2, 7\), expected torch\.int64 \(2, 2, 9\)"
    with pytest.raises(DataError, match=message):
        RoutingProfile.load(tmp_path)


@pytest.mark.parametrize(
    ("layer_ids", "lengths", "message"),
    [([1], [10], "1 layer ids, expected"), ([1, 4], [9], "got samples of 9 tokens in all, expected 10")],
)
def test_a_routing_log_that_does_not_fit_is_an_error(layer_ids: list[int], lengths: list[int], message: str) -> None:
    ids_LTK, weights_LTK = random_log(0, 10)
    with pytest.raises(DataError, match=message):
        profile_routing(ids_LTK, weights_LTK, layer_ids=layer_ids, num_experts=NUM_EXPERTS, sample_lengths=lengths)


def test_an_empty_profile_has_no_scores() -> None:
    nothing = torch.zeros(2, 1, 3, dtype=torch.int64)
    profile = RoutingProfile(
        layer_ids=(0,),
        num_experts=3,
        top_k=1,
        token_counts_HLE=nothing,
        gate_mass_HLE=nothing.double(),
        num_tokens_H=(0, 0),
    )
    with pytest.raises(SelectionError, match="row 0: this layer counted no token at all"):
        profile.scores_LE("gate")
