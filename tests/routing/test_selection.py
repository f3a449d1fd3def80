"""From a profile to a selection: the right score, the right policy, and what they need beside the profile."""

from __future__ import annotations

import pytest
import torch

from metier.errors import SelectionError
from metier.models.moe import moe_layers
from metier.routing.profile import RoutingProfile, UnreliableProfileWarning
from metier.routing.selection import SelectionConfig, expert_bytes, select
from tiny_models import tiny_model


def made_profile(even: list[int], odd: list[int]) -> RoutingProfile:
    """One layer, number 3, of four experts; the gate mass runs against the counts."""
    counts_HLE = torch.tensor([[even], [odd]])
    return RoutingProfile(
        layer_ids=(3,),
        num_experts=4,
        top_k=1,
        token_counts_HLE=counts_HLE,
        gate_mass_HLE=100.0 - counts_HLE.double(),
        num_tokens_H=(sum(even), sum(odd)),
    )


def test_select_uses_the_score_that_is_asked_for() -> None:
    profile = made_profile([70, 20, 9, 1], [70, 20, 9, 1])
    assert select(profile, SelectionConfig(score="token", top_p=0.8)).experts == {3: (0, 1)}
    assert select(profile, SelectionConfig(score="gate", top_p=0.5)).experts == {3: (3, 2)}


def test_select_remembers_the_number_of_experts() -> None:
    selection = select(made_profile([70, 20, 9, 1], [70, 20, 9, 1]), SelectionConfig(score="token", top_p=0.8))
    assert selection.num_experts == 4
    assert selection.num_selected == 2
    assert (selection.shared_experts, selection.non_expert_modules) == (False, False)


def test_select_warns_where_the_halves_disagree() -> None:
    with pytest.warns(UnreliableProfileWarning, match=r"(?s)token scores and top_p=0\.5 \(Jaccard 0\.33, expected"):
        select(made_profile([45, 40, 15, 0], [45, 0, 15, 40]), SelectionConfig(score="token", top_p=0.5))


TASK, GENERAL = [50, 30, 15, 5], [50, 10, 30, 10]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({"top_p": 0.9}, (0, 1, 2)),
        ({"top_k": 1}, (0,)),
        ({"top_fraction": 0.4}, (0, 1)),
        ({"budget_bytes": 25}, (0, 1)),
    ],
)
def test_each_policy_is_applied(policy: dict[str, float], expected: tuple[int, ...]) -> None:
    sizes_bytes = {3: 10} if "budget_bytes" in policy else None
    selection = select(made_profile(TASK, TASK), SelectionConfig(score="token", **policy), expert_bytes=sizes_bytes)
    assert selection.experts == {3: expected}


def test_minus_general_ranks_by_the_difference() -> None:
    task, general = made_profile(TASK, TASK), made_profile(GENERAL, GENERAL)
    # differences: 0, +0.2, -0.15, -0.05
    ranked = select(task, SelectionConfig(score="token", top_k=4, minus_general=True), general=general)
    assert ranked.experts == {3: (1, 0, 3, 2)}
    covering = select(task, SelectionConfig(score="token", top_p=1.0, minus_general=True), general=general)
    assert covering.experts == {3: (1,)}
    bought = SelectionConfig(score="token", budget_bytes=40, minus_general=True)
    assert select(task, bought, general=general, expert_bytes={3: 10}).experts == {3: (1,)}


def test_the_general_profile_counts_whole_and_the_halves_of_the_task_are_compared() -> None:
    task, general = made_profile([60, 20, 20, 0], [20, 60, 20, 0]), made_profile([40, 40, 0, 20], [40, 40, 20, 0])
    config = SelectionConfig(score="token", top_k=1, minus_general=True)
    assert task.reliability(config, general=general) == 0
    assert general.reliability(config, general=task) == 0
    assert made_profile(TASK, TASK).reliability(config, general=general) == 1


@pytest.mark.filterwarnings("ignore::metier.routing.profile.UnreliableProfileWarning")
def test_raw_gate_scores_are_a_mean_a_token() -> None:
    task = made_profile([70, 20, 9, 1], [70, 20, 9, 1])  # gate mass 30, 80, 91, 99 of 100 tokens in each half
    raw = task.exact_scores_LE("gate", scale="raw")
    assert raw.tolist() == [pytest.approx([0.30, 0.80, 0.91, 0.99])]
    assert task.exact_scores_LE("gate", scale="raw", half=1).tolist() == [pytest.approx([0.30, 0.80, 0.91, 0.99])]
    assert select(task, SelectionConfig(score="gate", top_p=0.98, scale="raw")).experts == {3: (3,)}
    assert select(task, SelectionConfig(score="gate", top_p=0.98)).experts == {3: (3, 2, 1, 0)}
    tokens = task.exact_scores_LE("token", scale="raw")
    assert torch.equal(tokens, task.exact_scores_LE("token"))


def test_both_sides_of_a_difference_are_on_the_scale_that_is_asked_for() -> None:
    task, general = made_profile(TASK, TASK), made_profile(GENERAL, GENERAL)
    config = SelectionConfig(score="gate", top_k=1, scale="raw", minus_general=True)
    expected_LE = torch.tensor([[50, 70, 85, 95]]) / 100 - torch.tensor([[50, 90, 70, 90]]) / 100
    torch.testing.assert_close(task.ranking_LE(config, general=general).float(), expected_LE)


def test_raw_gate_scores_that_cannot_cover_top_p_are_an_error() -> None:
    profile = made_profile([70, 20, 9, 1], [70, 20, 9, 1])
    thin = RoutingProfile(
        layer_ids=(3,),
        num_experts=4,
        top_k=1,
        token_counts_HLE=profile.token_counts_HLE,
        gate_mass_HLE=profile.gate_mass_HLE / 1000,
        num_tokens_H=profile.num_tokens_H,
    )
    message = (
        r"(?s)layers\.3: raw gate scores sum to 0\.0030, so that they never cover top_p=0\.1: .*Lower top_p, or use"
    )
    with pytest.raises(SelectionError, match=message):
        select(thin, SelectionConfig(score="gate", top_p=0.1, scale="raw"))


def test_a_score_that_was_not_measured_is_an_error() -> None:
    with pytest.raises(SelectionError, match=r"(?s)output_norm: this profile was measured without output norms.*again"):
        select(made_profile(TASK, TASK), SelectionConfig(score="output_norm", top_p=0.5))


def test_what_a_configuration_needs_must_be_there_and_nothing_else() -> None:
    task = made_profile(TASK, TASK)
    plain, minus = (SelectionConfig(score="token", top_k=1, minus_general=flag) for flag in (False, True))
    budget = SelectionConfig(score="token", budget_bytes=99)
    with pytest.raises(SelectionError, match=r"general: got none, but minus_general=True needs the profile of general"):
        select(task, minus)
    with pytest.raises(
        SelectionError, match=r"(?s)general: got the profile of general data, but minus_general=False, so"
    ):
        select(task, plain, general=task)
    with pytest.raises(SelectionError, match=r"expert_bytes: got none, but budget_bytes=99 needs bytes an expert"):
        select(task, budget)
    with pytest.raises(SelectionError, match=r"expert_bytes: got bytes an expert by layer, but budget_bytes=None, so"):
        select(task, plain, expert_bytes={3: 10})


def test_a_general_profile_of_another_model_is_an_error() -> None:
    task, general = made_profile(TASK, TASK), made_profile(GENERAL, GENERAL)
    task.meta["fingerprint"], general.meta["fingerprint"] = "a", "b"
    message = (
        r"(?s)fingerprint: got a profile with 'b', expected 'a' as in the task's profile.*needs one model; profile"
    )
    with pytest.raises(SelectionError, match=message):
        select(task, SelectionConfig(score="token", top_k=1, minus_general=True), general=general)


def test_a_task_like_the_general_data_is_an_error() -> None:
    task = made_profile(TASK, TASK)
    for policy in ({"top_p": 0.5}, {"budget_bytes": 99}):
        config = SelectionConfig(score="token", minus_general=True, **policy)
        with pytest.raises(
            SelectionError, match=r"(?s)no expert .*scores higher on the task than in general.*differ from"
        ):
            select(task, config, general=task, expert_bytes={3: 10} if "budget_bytes" in policy else None)


def test_a_budget_below_one_expert_is_an_error() -> None:
    message = (
        r"(?s)budget_bytes=9: not even the first expert by token scores fits; one takes 10 bytes.*Raise budget_bytes"
    )
    with pytest.raises(SelectionError, match=message):
        select(made_profile(TASK, TASK), SelectionConfig(score="token", budget_bytes=9), expert_bytes={3: 10})


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss", "nemotron_h"])
def test_expert_bytes_times_experts_are_the_bytes_of_all_stacks(family: str) -> None:
    model = tiny_model(family).bfloat16()
    layers = moe_layers(model)
    numbers = {
        layer.index: sum(parameter.numel() for name, parameter in layer.experts.named_parameters()) for layer in layers
    }
    num_experts = layers[0].num_experts
    assert {layer: size * num_experts for layer, size in expert_bytes(model).items()} == {
        layer: number * 2 for layer, number in numbers.items()
    }
    assert expert_bytes(model, bytes_per_parameter=16) == {
        layer: size * 8 for layer, size in expert_bytes(model).items()
    }
