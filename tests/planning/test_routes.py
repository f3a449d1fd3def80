"""Tokens choose as a profile says, or as a selection's policy does."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from metier.cli import app
from metier.config import RunConfig
from metier.errors import SelectionError
from metier.planning.estimate import Estimator
from metier.planning.links import World, links_of
from metier.planning.plan import plan
from metier.planning.routes import assumed_chances, chances_of, drawn
from metier.planning.step import Batch
from metier.routing.routing_profile import RoutingProfile
from metier.routing.selection import ExpertSelection
from tiny_models import tiny_model

BASE = tiny_model("deepseek_v2").config
LAYERS = tuple(range(BASE.first_k_dense_replace, BASE.num_hidden_layers))
NUM_EXPERTS, TOP_K = BASE.n_routed_experts, BASE.num_experts_per_tok
BATCH = Batch(4, 64)


def config(**keys: object) -> RunConfig:
    return RunConfig(**{"model": "m", "dataset": "d", "output_dir": "-", "dtype": "float32", "method": "esft", **keys})


def profile(*shares: list[float], tokens: int = 1000) -> RoutingProfile:
    """One whose halves have those shares of the routes, in every layer alike."""
    counts_HLE = torch.tensor([[[round(share * tokens) for share in half]] * len(LAYERS) for half in shares])
    return RoutingProfile(
        layer_ids=LAYERS,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        token_counts_HLE=counts_HLE,
        gate_mass_HLE=counts_HLE.double(),
        num_tokens_H=(tokens, tokens),
    )


def shares(*first: float) -> list[float]:
    """Some experts', and the others all alike."""
    rest = (1 - sum(first)) / (NUM_EXPERTS - len(first))
    return [*first, *[rest] * (NUM_EXPERTS - len(first))]


def trained_flops(estimator: Estimator, wanted: RunConfig) -> int:
    """Of the backward pass: what trained experts have is more, for their gradients."""
    trace = estimator(wanted, BATCH).trace
    assert trace is not None
    return trace.flops("backward")


def test_a_profile_says_how_likely_experts_are_each_half_its_own() -> None:
    found = profile(shares(0.5), shares(0.3))
    assert chances_of(found)[LAYERS[0]][0] == pytest.approx(0.4, rel=0.01)
    assert chances_of(found, half=0)[LAYERS[0]][0] == pytest.approx(0.5, rel=0.01)
    assert chances_of(found, half=1)[LAYERS[0]][0] == pytest.approx(0.3, rel=0.01)
    assert sorted(chances_of(found)) == list(LAYERS)


def test_an_expert_that_was_never_seen_is_possible() -> None:
    counted = [1.0, *[0.0] * (NUM_EXPERTS - 1)]
    chances_E = chances_of(profile(counted, counted))[LAYERS[0]]
    assert (chances_E > 0).all()
    assert len(torch.multinomial(chances_E, TOP_K).unique()) == TOP_K


def test_a_selection_by_top_p_has_that_share_of_the_routes() -> None:
    selection = ExpertSelection(experts={LAYERS[0]: (1, 3)}, num_experts=NUM_EXPERTS)
    chances, said = assumed_chances(config(top_p=0.5), selection)
    assert chances[LAYERS[0]][[1, 3]].sum() == pytest.approx(0.5)
    assert chances[LAYERS[0]].sum() == pytest.approx(1)
    assert "50% of its routes" in said
    # without a policy a run selects as the paper does
    assert "20% of its routes" in assumed_chances(config(), selection)[1]


@pytest.mark.parametrize(
    "keys",
    [{"select_top_k": 2}, {"top_p": 0.5, "score": "gate"}, {"selection": "s.json"}, {"select_top_fraction": 0.5}],
)
def test_of_other_selections_nothing_is_known(keys: dict[str, object]) -> None:
    selection = ExpertSelection(experts={LAYERS[0]: (1, 3)}, num_experts=NUM_EXPERTS)
    chances, said = assumed_chances(config(**keys), selection)
    assert chances == {}
    assert "as likely as any other" in said


@pytest.mark.parametrize(
    ("shares_E", "top_k", "expected"),
    [
        ([0.25, 0.25, *[0.5 / 14] * 14], 4, [1.0, 1.0, *[2 / 14] * 14]),
        ([0.1] * 6 + [0.4 / 58] * 58, 6, [0.6] * 6 + [2.4 / 58] * 58),
        # more than a place with every token nobody can have; the others share what is left
        ([0.7, 0.1, 0.1, 0.1], 2, [1.0, 1 / 3, 1 / 3, 1 / 3]),
        ([0.25] * 4, 4, [1.0] * 4),
    ],
)
def test_experts_get_their_shares_and_a_token_none_twice(
    shares_E: list[float], top_k: int, expected: list[float]
) -> None:
    ids_TK = drawn(torch.tensor(shares_E), 4000, top_k, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == top_k for row in ids_TK.tolist())
    counts_E = torch.bincount(ids_TK.flatten(), minlength=len(shares_E))
    assert counts_E.sum() == 4000 * top_k
    torch.testing.assert_close(counts_E / 4000, torch.tensor(expected), rtol=0.1, atol=0.02)


def test_of_a_profile_the_experts_are_selected_and_the_routes_drawn() -> None:
    likely, unlikely = (Estimator(BASE, profile=profile(shares(share), shares(share))) for share in (0.6, 0.25))
    wanted = config(select_top_k=1)
    assert trained_flops(likely, wanted) > trained_flops(unlikely, wanted)
    found = likely(wanted, BATCH)
    assert "as in the profile of 2,000 tokens." in " ".join(found.assumptions)
    # how many experts top_p takes is no assumption any more
    assert likely(config(top_p=0.5), BATCH).state.num_trained == found.state.num_trained


def test_halves_have_their_own_routes() -> None:
    measured = profile(shares(0.6), shares(0.25))
    first, second = (Estimator(BASE, profile=measured, half=half) for half in (0, 1))
    assert trained_flops(first, config(select_top_k=1)) > trained_flops(second, config(select_top_k=1))


def test_a_profile_of_another_model_is_refused() -> None:
    other = RoutingProfile(
        layer_ids=(0, 9),
        num_experts=3,
        top_k=1,
        token_counts_HLE=torch.ones(2, 2, 3, dtype=torch.int64),
        gate_mass_HLE=torch.ones(2, 2, 3, dtype=torch.float64),
        num_tokens_H=(3, 3),
    )
    with pytest.raises(SelectionError, match=r"profile: got layers \[0, 9\] of 3 experts, expected layers"):
        Estimator(BASE, profile=other)(config(select_top_k=1), BATCH)


def test_a_profile_is_refused_where_there_are_no_such_experts() -> None:
    measured = profile(shares(0.5), shares(0.5))
    with pytest.raises(SelectionError, match="expected layers"):
        Estimator(tiny_model("llama").config, profile=measured)(config(method="lora"), BATCH)


def test_a_profile_with_an_empty_half_gives_no_interval(tmp_path: Path) -> None:
    BASE.save_pretrained(tmp_path)
    wanted = config(model=str(tmp_path), method="lora", max_length=64)
    (row,) = plan(wanted, profile=profile(shares(0.5), [0.0] * NUM_EXPERTS)).rows
    assert row.spread is None
    assert row.estimate is not None


def test_what_differs_between_halves_is_an_interval(tmp_path: Path) -> None:
    BASE.save_pretrained(tmp_path)
    wanted = config(model=str(tmp_path), select_top_k=1, max_length=64, per_device_train_batch_size=4)
    made = plan(wanted, profile=profile(shares(0.6), shares(0.25)))
    (row,) = made.rows
    assert row.spread is not None
    assert row.estimate is not None
    assert row.spread.device_bytes[0] <= row.estimate.total_device_bytes <= row.spread.device_bytes[1]
    assert row.spread.device_bytes[0] < row.spread.device_bytes[1]
    assert row.spread.seconds is not None
    assert made.as_dict()["runs"][0]["spread"]["seconds"] == row.spread.seconds
    console = Console(file=io.StringIO(), width=200)
    console.print(made)
    assert "esft, from one half of the profile to the other: " in console.file.getvalue()
    assert plan(wanted).rows[0].spread is None


def test_a_profiles_folder_is_an_option(tmp_path: Path) -> None:
    BASE.save_pretrained(tmp_path)
    profile(shares(0.6), shares(0.6)).save(tmp_path / "profile")
    options = ["--profile", str(tmp_path / "profile"), "--top-p", "0.5", "--output", str(tmp_path / "plan.json")]
    done = CliRunner().invoke(app, ["plan", "--model", str(tmp_path), "--max-length", "64", *options])
    assert done.exit_code == 0, done.output
    (run,) = json.loads((tmp_path / "plan.json").read_text())["runs"]
    assert any("profile of 2,000 tokens" in said for said in run["assumptions"])
    assert run["spread"]["device_bytes"]


def test_the_interval_of_one_process_of_several_is_that_processs(tmp_path: Path) -> None:
    wanted = config(select_top_k=1, model=str(tmp_path), max_length=64)
    BASE.save_pretrained(tmp_path)
    measured = profile(shares(0.6), shares(0.25))
    made = plan(wanted, profile=measured, device="h100", world=World(8, 8, links_of("nvlink4")))
    for row in made.rows:
        low, high = row.spread.device_bytes
        assert low <= row.estimate.total_device_bytes <= high
    copied, whole = made.rows[0], plan(wanted, profile=measured, device="h100").rows[0]
    # its buckets are in all of it
    assert (
        copied.spread.device_bytes[0] - whole.spread.device_bytes[0]
        == copied.estimate.device_bytes["gradients sent"]
        > 0
    )
