"""Several deltas made into one: what each expert is then, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

from metier.deltas.compose import compose, conflicts
from metier.deltas.read import read_delta
from metier.deltas.save import save_delta
from metier.deltas.verify import verify
from metier.errors import BaseMismatchError, ConfigError
from metier.methods.esft import EsftConfig
from metier.models.load import LoadedModel
from metier.models.moe import moe_layers
from tiny_models import tiny_model, tiny_tokenizer

# float32: a change is a difference of numbers of about 1
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def base(family: str = "deepseek_v2", **changes: object) -> LoadedModel:
    return LoadedModel(model=tiny_model(family, **changes), tokenizer=tiny_tokenizer(), source="tiny")


def delta(folder: Path, experts: dict[int, list[int]], *, seed: int, family: str = "deepseek_v2") -> Path:
    """A delta whose rows moved by random numbers."""
    model = peft.get_peft_model(tiny_model(family), EsftConfig(experts=experts))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "esft_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_delta(model, folder)
    return folder


def experts_of(folder: Path, family: str = "deepseek_v2") -> dict[tuple[int, int, str], Tensor]:
    rows, config = read_delta(folder).load_rows(), read_delta(folder).config
    return {
        (layer, expert, name): tensor[row]
        for layer, ids in config.experts.items()
        for row, expert in enumerate(ids)
        for name, tensor in rows[layer].items()
    }


def base_rows(family: str = "deepseek_v2") -> dict[tuple[int, int, str], Tensor]:
    return {
        (layer.index, expert, name): getattr(layer.experts, name)[expert].detach()
        for layer in moe_layers(tiny_model(family))
        for name in layer.parameter_names()
        for expert in range(layer.num_experts)
    }


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """They collide in expert 3 of layer 1 alone."""
    return (
        delta(tmp_path / "law", {1: [1, 3], 2: [0]}, seed=1),
        delta(tmp_path / "code", {1: [3, 6], 2: [5]}, seed=2),
    )


def test_by_default_experts_are_taken_over_and_those_of_both_get_the_mean_change(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    result = compose(pair, base(), tmp_path / "both")
    assert result.config.experts == {1: (1, 3, 6), 2: (0, 5)} or result.config.experts == {1: [1, 3, 6], 2: [0, 5]}
    law, code, both = (experts_of(folder) for folder in (*pair, tmp_path / "both"))
    for place, row in both.items():
        if place in law and place in code:
            torch.testing.assert_close(row, (law[place] + code[place]) / 2, **TOLERANCE)
        else:
            assert torch.equal(row, law.get(place, code.get(place)))


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss"])
def test_weights_scale_each_change_and_add_up(family: str, tmp_path: Path) -> None:
    one = delta(tmp_path / "one", {1: [1, 3]}, seed=1, family=family)
    two = delta(tmp_path / "two", {1: [3]}, seed=2, family=family)
    compose([one, two], base(family), tmp_path / "both", weights=[0.5, 2.0])
    start, first, second = base_rows(family), experts_of(one), experts_of(two)
    for place, row in experts_of(tmp_path / "both").items():
        want = start[place] + 0.5 * (first[place] - start[place])
        if place in second:
            want = want + 2.0 * (second[place] - start[place])
        torch.testing.assert_close(row, want, **TOLERANCE)


def test_a_negative_weight_negates_a_delta_and_adding_the_delta_gives_the_base(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    compose([pair[0]], base(), tmp_path / "negative", weights=[-1.0])
    start, law = base_rows(), experts_of(pair[0])
    for place, row in experts_of(tmp_path / "negative").items():
        torch.testing.assert_close(row, 2 * start[place] - law[place], **TOLERANCE)
    compose([pair[0], tmp_path / "negative"], base(), tmp_path / "nothing", weights=[1.0, 1.0])
    for place, row in experts_of(tmp_path / "nothing").items():
        torch.testing.assert_close(row, start[place], **TOLERANCE)


def test_what_was_composed_passes_every_check_of_a_delta(pair: tuple[Path, Path], tmp_path: Path) -> None:
    loaded = base()
    loaded.model.save_pretrained(tmp_path / "base")
    loaded.tokenizer.save_pretrained(tmp_path / "base")
    compose(pair, loaded, tmp_path / "both")
    assert verify(tmp_path / "both", tmp_path / "base").passed


def test_the_report_names_each_expert_that_two_deltas_change(tmp_path: Path) -> None:
    folders = {
        "law": delta(tmp_path / "law", {1: [1, 3], 2: [0]}, seed=1),
        "code": delta(tmp_path / "code", {1: [3, 6], 2: [0]}, seed=2),
        "same": delta(tmp_path / "same", {1: [1, 3], 2: [0]}, seed=1),
    }
    compose({"law": folders["law"]}, base(), tmp_path / "negative", weights=[-2.0])
    report = conflicts({**folders, "negative": tmp_path / "negative"}, base())
    by_place = {(c.layer, c.expert, c.first, c.second): c for c in report}
    assert (1, 6, "law", "code") not in by_place
    assert {(layer, expert) for layer, expert, _, _ in by_place} == {(1, 1), (1, 3), (2, 0)}
    assert by_place[1, 1, "law", "same"].cosine == pytest.approx(1, abs=1e-5)
    assert by_place[1, 1, "law", "negative"].cosine == pytest.approx(-1, abs=1e-5)
    assert by_place[1, 1, "law", "negative"].norm_ratio == pytest.approx(2, rel=1e-3)
    # random changes of thousands of numbers are nearly at right angles
    assert abs(by_place[1, 3, "law", "code"].cosine) < 0.2
    assert [(c.layer, c.expert) for c in report] == sorted((c.layer, c.expert) for c in report)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, math.nan], [1.0, math.inf], [1.0, 2.0, 3.0]])
def test_weights_that_are_not_one_number_a_delta_are_refused(
    weights: list[float], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="for 2 deltas, expected one finite number other than 0 for each"):
        compose(pair, base(), tmp_path / "both", weights=weights)
    assert not (tmp_path / "both").exists()


def test_no_delta_one_twice_and_one_of_another_base_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected at least one"):
        compose([], base(), tmp_path / "both")
    with pytest.raises(ConfigError, match="and each once"):
        compose([pair[0], pair[0]], base(), tmp_path / "both")
    with pytest.raises(BaseMismatchError, match="was trained on"):
        compose(pair, base(seed=4), tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_a_folder_with_other_things_is_not_written_to(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"thesis\.txt"):
        compose(pair, base(), tmp_path / "both")
    assert (tmp_path / "both" / "thesis.txt").read_text() == "mine"
