"""Measuring output norms, and stopping as soon as enough is known."""

from __future__ import annotations

import dataclasses
import random
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metier.data.message import Message, Record
from metier.errors import ConfigError, DataError, SelectionError
from metier.models.moe import moe_layers
from metier.routing.blocks import BlockCounts
from metier.routing.measure import count_sequences
from metier.routing.output_norms import output_norms_TK
from metier.routing.policy import SelectionConfig
from metier.routing.profile import RoutingProfile, UnreliableProfileWarning, profile
from metier.routing.routing_profile import PAPER_SELECTION
from metier.routing.selection import select
from metier.routing.stability import Stability, StabilityConfig, measure_stability
from tiny_models import tiny_model, tiny_tokenizer

ALL = SelectionConfig(score="token", top_fraction=1.0)  # every half selects every expert: stable at once
EASY = StabilityConfig(selection=ALL, num_resamples=20)
# near-even routing of random models: no few tokens agree on one expert of each layer
HARD = StabilityConfig(selection=SelectionConfig(score="token", top_k=1), threshold=1.0, num_resamples=20)


def sequences_NS(num_sequences: int, length: int = 8) -> Tensor:
    return torch.randint(3, 260, (num_sequences, length), generator=torch.Generator().manual_seed(1))


def assert_same_counts(first: RoutingProfile, second: RoutingProfile) -> None:
    assert torch.equal(first.token_counts_HLE, second.token_counts_HLE)
    assert torch.equal(first.gate_mass_HLE, second.gate_mass_HLE)
    assert first.num_tokens_H == second.num_tokens_H


def test_output_norms_change_nothing_else() -> None:
    model = tiny_model("deepseek_v2")
    plain = count_sequences(model, sequences_NS(5), batch_size=2)
    with_norms = count_sequences(model, sequences_NS(5), batch_size=2, output_norms=True)
    assert_same_counts(with_norms, plain)
    assert plain.output_norm_HLE is None
    assert with_norms.output_norm_HLE is not None
    assert torch.equal(with_norms.output_norm_HLE > 0, with_norms.token_counts_HLE > 0)


@torch.no_grad()
def test_output_norms_are_those_of_the_experts_in_the_model() -> None:
    model = tiny_model("gpt_oss")
    model.eval()
    layers, seen = moe_layers(model), []
    handles = [
        layer.entry.register_forward_pre_hook(lambda module, args: seen.append((module, args))) for layer in layers
    ]
    model(input_ids=sequences_NS(3))
    for handle in handles:
        handle.remove()
    measured = count_sequences(model, sequences_NS(3), batch_size=3, output_norms=True)
    half_T = torch.tensor([0, 1, 0]).repeat_interleave(8)
    assert measured.output_norm_HLE is not None
    for row, (entry, (hidden_TD, ids_TK, weights_TK)) in enumerate(seen):
        norms_TK = output_norms_TK(entry, hidden_TD.reshape(24, -1), ids_TK, weights_TK, num_experts=4).double()
        for half in (0, 1):
            for expert in range(4):
                expected = norms_TK[half_T == half][ids_TK[half_T == half] == expert].sum().item()
                # 24 tokens times 2^-27 of rounding, and the last bits of float32
                assert measured.output_norm_HLE[half, row, expert].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.filterwarnings("ignore::metier.routing.profile.UnreliableProfileWarning")
def test_experts_are_selected_by_output_norm() -> None:
    model = tiny_model("olmoe")
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.experts.down_proj[5].mul_(100)  # whoever gets a token, expert 5 adds the most
    measured = count_sequences(model, sequences_NS(6), batch_size=3, output_norms=True)
    assert select(measured, SelectionConfig(score="output_norm", top_k=1)).experts == {0: (5,), 1: (5,), 2: (5,)}
    raw_LE = measured.scores_LE("output_norm", scale="raw")
    shares_LE = measured.scores_LE("output_norm")
    torch.testing.assert_close(raw_LE / raw_LE.sum(dim=1, keepdim=True), shares_LE)
    assert measured.output_norm_HLE is not None
    torch.testing.assert_close(raw_LE.double() * 48, measured.output_norm_HLE.sum(dim=0))
    assert torch.equal(measured.scores_LE("token", scale="raw"), measured.scores_LE("token"))  # of four slots a token
    with pytest.raises(
        DataError, match=r"output_norm_HLE: got torch\.float64 \(2, 3, 7\), expected torch\.float64 \(2, 3, 8"
    ):
        dataclasses.replace(measured, output_norm_HLE=measured.output_norm_HLE[..., 1:])


def test_profiles_with_output_norms_are_kept_and_merge(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    first, second = (count_sequences(model, part, batch_size=2, output_norms=True) for part in sequences_NS(8).split(4))
    whole = count_sequences(model, sequences_NS(8), batch_size=2, output_norms=True)
    merged = first + second
    assert_same_counts(merged, whole)
    assert merged.output_norm_HLE is not None
    assert torch.equal(merged.output_norm_HLE, whole.output_norm_HLE)
    merged.save(tmp_path)
    loaded = RoutingProfile.load(tmp_path)
    assert torch.equal(loaded.output_norm_HLE, merged.output_norm_HLE)


def test_a_profile_without_output_norms_is_read_and_does_not_merge_with_one_that_has_them(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    count_sequences(model, sequences_NS(4), batch_size=2).save(tmp_path)
    old = RoutingProfile.load(tmp_path)
    assert old.output_norm_HLE is None
    new = count_sequences(model, sequences_NS(4), batch_size=2, output_norms=True)
    for one, other in ((old, new), (new, old)):
        with pytest.raises(
            SelectionError, match=r"(?s)output_norm_HLE: got one profile with output norms and one with"
        ):
            one.merge(other)


def test_a_stable_selection_stops_the_measurement() -> None:
    model = tiny_model("olmoe")
    stopped = count_sequences(model, sequences_NS(50), batch_size=7, until_stable=EASY)
    assert_same_counts(stopped, count_sequences(model, sequences_NS(50)[:16], batch_size=7))
    assert stopped.num_tokens == 16 * 8
    assert stopped.meta["stable_after_tokens"] == "128"
    assert stopped.meta["split_half_interval"] == "Jaccard 1.000 (1.000 to 1.000) of token scores, top_fraction=1.0"


@pytest.mark.parametrize("num_sequences", [40, 70])
def test_a_selection_that_is_never_stable_takes_all_and_warns(num_sequences: int) -> None:
    model, ids_NS = tiny_model("olmoe"), sequences_NS(num_sequences)
    tokens = num_sequences * 8
    message = rf"(?s)not stable after all {tokens} tokens in {num_sequences} sequences: Jaccard .* of token scores, top_k=1; expected at least 1\.0.*Profile more tokens of the task\."
    with pytest.warns(UnreliableProfileWarning, match=message):
        stopped = count_sequences(model, ids_NS, batch_size=16, until_stable=HARD)
    assert_same_counts(stopped, count_sequences(model, ids_NS, batch_size=8))
    assert stopped.meta["stable_after_tokens"] == "never"


def test_where_it_stops_does_not_depend_on_the_batch_size() -> None:
    model = tiny_model("deepseek_v2")
    look = StabilityConfig(selection=SelectionConfig(score="token", top_p=0.5), threshold=0.4, num_resamples=20)
    found = [count_sequences(model, sequences_NS(300), batch_size=size, until_stable=look).meta for size in (5, 16, 64)]
    assert 128 < int(found[0]["stable_after_tokens"]) < 2400  # neither at the first look nor at the last
    assert found[0] == found[1] == found[2]


def test_each_block_has_the_counts_of_its_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[BlockCounts] = []

    def spy(blocks: BlockCounts, config: StabilityConfig, *, num_sequences: int) -> Stability:
        seen.append(blocks)
        return measure_stability(blocks, config, num_sequences=num_sequences)

    monkeypatch.setattr("metier.routing.measure.measure_stability", spy)
    with pytest.warns(UnreliableProfileWarning):
        count_sequences(tiny_model("olmoe"), sequences_NS(70), batch_size=16, until_stable=HARD)
    assert [int((blocks.num_tokens_G > 0).sum()) for blocks in seen] == [16, 32, 64, 64]
    assert seen[-1].num_tokens_G[[0, 5, 6, 63]].tolist() == [16, 16, 8, 8]  # sequence 64 is in block 0 again
    for blocks in seen:
        slots_GL = blocks.token_counts_GLE.sum(dim=2)
        assert torch.equal(slots_GL, (blocks.num_tokens_G * blocks.top_k)[:, None].expand_as(slots_GL))


def test_few_sequences_are_never_stable() -> None:
    with pytest.warns(UnreliableProfileWarning, match="(?s)fewer than 16 sequences say nothing.*or shorter sequences"):
        stopped = count_sequences(tiny_model("olmoe"), sequences_NS(15), batch_size=5, until_stable=EASY)
    assert stopped.num_tokens == 15 * 8


def test_one_sequence_has_no_second_half() -> None:
    with pytest.raises(DataError, match="sequences: got 1, expected at least 2 to measure"):
        count_sequences(tiny_model("olmoe"), sequences_NS(1), batch_size=5, until_stable=EASY)
    with pytest.raises(DataError, match="sequences: got 0, expected at least 1 to measure"):
        count_sequences(tiny_model("olmoe"), sequences_NS(0), batch_size=5)


def test_output_norms_that_are_not_measured_cannot_become_stable() -> None:
    look = StabilityConfig(selection=SelectionConfig(score="output_norm", top_p=0.2))
    with pytest.raises(
        ConfigError, match=r"(?s)until_stable: got a selection by output_norm scores, but output_norms=F"
    ):
        count_sequences(tiny_model("olmoe"), sequences_NS(20), batch_size=5, until_stable=look)
    with pytest.warns(UnreliableProfileWarning, match="of output_norm scores"):
        count_sequences(tiny_model("olmoe"), sequences_NS(4), batch_size=4, until_stable=look, output_norms=True)


def test_a_profile_of_records_stops_and_leaves_the_model_as_it_was() -> None:
    model, tokenizer = tiny_model("deepseek_v2"), tiny_tokenizer()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    letters = random.Random(0)
    records = [
        Record(
            messages=(Message(role="user", content="".join(letters.choices("abcdefghijklmnopqrstuvwxyz ", k=90))),),
            origin=f"made:{i}",
        )
        for i in range(60)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnreliableProfileWarning)  # stable, so the paper's setting is not asked about
        measured = profile(model, tokenizer, records, max_length=32, until_stable=EASY, output_norms=True)
    assert (measured.reliability(PAPER_SELECTION) or 0) < 0.9  # else nobody would have warned anyway
    assert measured.num_tokens == 16 * 32
    assert measured.meta["stable_after_tokens"] == "512"
    assert measured.meta["num_records"] == "60"
    assert measured.output_norm_HLE is not None
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert attributes == {name: sorted(vars(module)) for name, module in model.named_modules()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
