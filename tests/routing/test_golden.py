"""Routing logs with known answers: DeepSeek-V2-Lite's published scores and selections, and a small cut of our
own.

The published logs (deepseek-ai/ESFT, results/) lie beside the checkout, not in it; where they are missing,
the synthetic cut alone runs through the same code. Its expected values come from golden/make_synthetic.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from metier.routing.policy import SelectionConfig, pick_experts
from metier.routing.profile import RoutingProfile, profile_routing
from metier.routing.selection import ExpertSelection, select
from metier.routing.statistics import shared_top_k, top_share

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "deepseek_v2_lite_routing"
PUBLISHED_TASKS = ("intent", "law")
SYNTHETIC = Path(__file__).parent / "golden"
# published scores have four decimals, so the truth is at most half of the last one away
ROUNDING = 5e-5
CONFIG = SelectionConfig(score="token", top_p=0.2)

needs_published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"{PUBLISHED} is absent")


def measured_on(path: Path, *, layer_ids: list[int], num_experts: int) -> RoutingProfile:
    log = np.load(path)
    return profile_routing(
        torch.from_numpy(log["expert_ids_LTK"]),
        torch.from_numpy(log["routing_weights_LTK"]),
        layer_ids=layer_ids,
        num_experts=num_experts,
        sample_lengths=log["sample_lengths"].tolist(),
    )


def published(task: str) -> RoutingProfile:
    return measured_on(PUBLISHED / f"{task}.npz", layer_ids=list(range(1, 27)), num_experts=64)


def published_scores_LE(task: str, name: str) -> torch.Tensor:
    scores = json.loads((PUBLISHED / f"{task}.summary.json").read_text())[name]
    return torch.tensor([[scores[str(layer)][str(e)] for e in range(64)] for layer in range(1, 27)]).double()


def selected_on_rounded(profile: RoutingProfile) -> dict[int, tuple[int, ...]]:
    rows = profile.token_ratio_LE.double().numpy().round(4).tolist()
    picked = [pick_experts(row, top_p=CONFIG.top_p) for row in rows]
    return dict(zip(profile.layer_ids, picked, strict=True))


@pytest.mark.golden
@needs_published
@pytest.mark.parametrize("task", PUBLISHED_TASKS)
def test_published_scores_are_met(task: str) -> None:
    profile = published(task)
    tokens_LE = published_scores_LE(task, "token_scores")
    gates_LE = published_scores_LE(task, "gate_scores")
    assert (profile.token_ratio_LE.double() - tokens_LE).abs().max() < ROUNDING
    assert (profile.raw_gate_scores_LE().double() - gates_LE).abs().max() < ROUNDING


@pytest.mark.golden
@needs_published
@pytest.mark.parametrize("task", PUBLISHED_TASKS)
def test_all_published_selections_are_met_to_the_order(task: str) -> None:
    expected = ExpertSelection.load(PUBLISHED / f"{task}.expert_config.json")
    assert len(expected.experts) == 26
    assert selected_on_rounded(published(task)) == expected.experts
    rows = published_scores_LE(task, "token_scores").numpy().tolist()
    picked = {layer: pick_experts(row, top_p=0.2) for layer, row in enumerate(rows, start=1)}
    assert picked == expected.experts


@pytest.mark.golden
@needs_published
@pytest.mark.parametrize("task", PUBLISHED_TASKS)
def test_unrounded_scores_select_what_was_published_but_for_ties_of_rounding(task: str) -> None:
    """Counts decide a near-tie that four decimals hide: in each log one expert of one layer changes place."""
    expected = ExpertSelection.load(PUBLISHED / f"{task}.expert_config.json").experts
    chosen = published(task).picked(CONFIG)
    assert [layer for layer in expected if chosen[layer] != expected[layer]] == {"intent": [17], "law": [21]}[task]
    assert {layer: len(ids) for layer, ids in chosen.items()} == {i: len(ids) for i, ids in expected.items()}


@pytest.mark.golden
@needs_published
def test_published_files_are_written_back_byte_for_byte(tmp_path: Path) -> None:
    for task in PUBLISHED_TASKS:
        path = PUBLISHED / f"{task}.expert_config.json"
        ExpertSelection.load(path).save(tmp_path / path.name)
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.golden
@needs_published
def test_published_logs_have_the_known_concentration_and_reliability() -> None:
    profiles = {task: published(task) for task in PUBLISHED_TASKS}
    shares = {t: [top_share(p.gate_score_LE, k).mean().item() for k in (1, 6, 12)] for t, p in profiles.items()}
    assert shares["intent"] == pytest.approx([0.075, 0.33, 0.51], abs=0.005)
    assert shares["law"] == pytest.approx([0.073, 0.28, 0.43], abs=0.005)
    shared = shared_top_k(profiles["intent"].gate_score_LE, profiles["law"].gate_score_LE, 6)
    assert 0.38 <= shared.double().mean() <= 1.46
    assert profiles["intent"].reliability(CONFIG) == pytest.approx(0.92, abs=0.03)
    assert profiles["law"].reliability(CONFIG) == pytest.approx(0.79, abs=0.03)


@pytest.fixture(scope="module")
def expected() -> dict[str, object]:
    return json.loads((SYNTHETIC / "synthetic.json").read_text())


@pytest.fixture(scope="module")
def synthetic(expected: dict[str, object]) -> RoutingProfile:
    return measured_on(
        SYNTHETIC / "synthetic.npz", layer_ids=expected["layer_ids"], num_experts=expected["num_experts"]
    )


def test_synthetic_scores_are_met(synthetic: RoutingProfile, expected: dict[str, object]) -> None:
    for name, scores_LE in (
        ("token_scores", synthetic.token_ratio_LE),
        ("raw_gate_scores", synthetic.raw_gate_scores_LE()),
    ):
        wanted_LE = torch.tensor([expected[name][str(layer)] for layer in synthetic.layer_ids])
        assert (scores_LE - wanted_LE).abs().max() <= ROUNDING + 1e-7


def test_synthetic_selections_are_met_to_the_order(synthetic: RoutingProfile, expected: dict[str, object]) -> None:
    wanted = {int(layer): tuple(ids) for layer, ids in expected["selected"].items()}
    assert selected_on_rounded(synthetic) == wanted
    assert synthetic.picked(CONFIG)[5] == (6, 19, 2, 9)


def test_synthetic_logs_gate_scores_sum_to_one_though_the_gates_do_not(synthetic: RoutingProfile) -> None:
    ones = torch.ones(3)
    torch.testing.assert_close(synthetic.gate_score_LE.sum(dim=1), ones)
    raw_L = synthetic.raw_gate_scores_LE().sum(dim=1)
    torch.testing.assert_close(raw_L[[0, 2]], ones[:2])
    assert raw_L[1] < 0.8
    torch.testing.assert_close(synthetic.raw_gate_scores_LE() / raw_L[:, None], synthetic.gate_score_LE)


@pytest.mark.filterwarnings("ignore::metier.routing.profile.UnreliableProfileWarning")
def test_synthetic_log_is_selected_from_by_gate_too(synthetic: RoutingProfile) -> None:
    selection = select(synthetic, SelectionConfig(score="gate", top_p=0.5))
    for row, ids in zip(synthetic.gate_score_LE.tolist(), selection.experts.values(), strict=True):
        assert sum(row[e] for e in ids) >= 0.5 - 1e-6
        assert sum(row[e] for e in ids[:-1]) < 0.5
