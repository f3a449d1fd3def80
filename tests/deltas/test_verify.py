"""`verify` keeps each promise apart: a delta that breaks one fails that check, and is told why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import metier
from deltas.made import FAMILIES, assert_untouched, made_adapter, made_base, rows_of, state
from metier.cli import app
from metier.deltas import verify as module
from metier.deltas.probe import logits_of
from metier.deltas.save import save_delta
from metier.deltas.verify import (
    DIFFERS,
    EXPERTS,
    FILES,
    FINGERPRINT,
    FINITE,
    FRESH,
    MERGED,
    MOVED,
    TENSORS,
    UNMERGED,
    ZERO,
    verify,
)
from metier.deltas.verify_report import VerifyReport
from metier.errors import ConfigError, ModelError, VerificationError
from metier.methods.esft import EsftExperts
from metier.models.load import LoadedModel

ALL = (FILES, FINGERPRINT, EXPERTS, TENSORS, FINITE, MOVED, DIFFERS, FRESH, MERGED, UNMERGED, ZERO)
UP = "base_model.model.model.layers.1.mlp.experts.esft_gate_up_proj"
DOWN = "base_model.model.model.layers.1.mlp.experts.esft_down_proj"


def status(report: VerifyReport) -> dict[str, str]:
    assert tuple(check.name for check in report.checks) == ALL, "each check is reported once, in order"
    return {check.name: check.status for check in report.checks}


def failed(report: VerifyReport) -> set[str]:
    return {name for name, value in status(report).items() if value == "failed"}


def sentence(report: VerifyReport, name: str) -> str:
    return next(check.sentence for check in report.checks if check.name == name)


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads the files again, but not in another process, which takes seconds."""

    def load_again(base: LoadedModel, delta: Path, tokens_BS: Tensor, **_: object) -> Tensor:
        model = metier.load(base.source, dtype=base.model.dtype).model
        return logits_of(peft.PeftModel.from_pretrained(model, delta), tokens_BS)

    monkeypatch.setattr(module, "logits_in_a_fresh_process", load_again)


@pytest.mark.parametrize(("family", "dtype"), [("deepseek_v2", torch.bfloat16), ("gpt_oss", torch.float32)])
def test_a_good_delta_passes_every_check_and_the_base_is_given_back(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = made_base(tmp_path / "base", family, dtype=dtype)
    save_delta(made_adapter(base.model), tmp_path / "adapter")
    base = metier.load(tmp_path / "base")
    before = state(base.model)
    report = verify(tmp_path / "adapter", base)
    assert set(status(report).values()) == {"passed"}, report.checks
    assert report.passed
    report.raise_if_failed()
    assert_untouched(base.model, before)
    assert all(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("family", FAMILIES)
def test_what_peft_saved_passes_too_and_it_is_said_that_it_has_no_sums(family: str, tmp_path: Path) -> None:
    made_adapter(made_base(tmp_path / "base", family).model).save_pretrained(tmp_path / "adapter")
    report = verify(str(tmp_path / "adapter"), str(tmp_path / "base"))
    assert report.passed, report.checks
    assert "carry no sums" in sentence(report, FILES)


def test_files_that_are_not_intact_fail_and_nothing_else_is_run(delta_folder: Path) -> None:
    path = delta_folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    report = verify(delta_folder, "/nowhere/base")
    assert report.base == "/nowhere/base", "no base was loaded"
    assert status(report) == {FILES: "failed", **dict.fromkeys(ALL[1:], "skipped")}
    assert "got no valid safetensors file" in sentence(report, FILES)
    assert sentence(report, ZERO) == "Not run: not so that files are intact."


def test_another_base_fails(delta_folder: Path, tmp_path: Path) -> None:
    made_base(tmp_path / "other", seed=1)
    report = verify(delta_folder, tmp_path / "other")
    assert failed(report) == {FINGERPRINT}
    assert status(report)[ZERO] == "skipped"
    assert "was trained on '" in sentence(report, FINGERPRINT)
    assert "Load the base that it was trained on" in sentence(report, FINGERPRINT)


def test_another_bases_missing_layer_and_experts_fail(tmp_path: Path, delta_folder: Path) -> None:
    made_base(tmp_path / "mixtral", "mixtral")
    report = verify(delta_folder, tmp_path / "mixtral")
    assert failed(report) == {FINGERPRINT}, "mixtral's 4 experts in layers 0 to 2 have the same sizes"
    wrapped = made_adapter(made_base(tmp_path / "base").model, experts={1: [1, 7]})
    save_delta(wrapped, tmp_path / "adapter")
    report = verify(tmp_path / "adapter", tmp_path / "mixtral")
    assert failed(report) == {FINGERPRINT, EXPERTS}
    assert "layers.1: the delta replaces expert 7, but base" in sentence(report, EXPERTS)
    assert "has num_experts=4" in sentence(report, EXPERTS)
    made_adapter(made_base(tmp_path / "base2", "mixtral").model, experts={0: [1]}).save_pretrained(tmp_path / "a2")
    report = verify(tmp_path / "a2", tmp_path / "base")
    assert "layers.0: base" in sentence(report, EXPERTS)
    assert "has no MoE layer there; its MoE layers are [1, 2]" in sentence(report, EXPERTS)


def spoil(delta: Path, base: Path, change: Callable[[dict[str, nn.Parameter]], object]) -> None:
    """Save the delta again with rows changed in float32."""
    wrapped = peft.PeftModel.from_pretrained(metier.load(base).model, delta)
    with torch.no_grad():
        change(rows_of(wrapped))
    save_delta(wrapped, delta)


@pytest.mark.usefixtures("same_process")
def test_rows_that_did_not_move_are_named(delta_folder: Path, base_folder: Path) -> None:
    experts = metier.load(base_folder).model.model.layers[1].mlp.experts

    def change(rows: dict[str, nn.Parameter]) -> None:
        rows[DOWN][1] = experts.down_proj[3]
        moved_in_one_value = float(rows[UP][1, 0, 0])
        rows[UP][1] = experts.gate_up_proj[3]
        rows[UP][1, 0, 0] = moved_in_one_value

    spoil(delta_folder, base_folder, change)
    report = verify(delta_folder, base_folder)
    assert failed(report) == {MOVED}
    assert sentence(report, MOVED) == "1 rows are the base's to the bit: layers.1 expert 3 down_proj."


@pytest.mark.usefixtures("same_process")
def test_a_delta_that_changes_nothing_fails(tmp_path: Path, base_folder: Path) -> None:
    save_delta(made_adapter(metier.load(base_folder).model, step=0.0), tmp_path / "adapter")
    report = verify(tmp_path / "adapter", base_folder)
    assert failed(report) == {MOVED, DIFFERS}
    assert sentence(report, MOVED).startswith("8 rows are the base's to the bit")
    assert "The largest difference of a logit on 256 tokens is 0." in sentence(report, DIFFERS)


def test_values_that_are_not_finite_fail(tmp_path: Path, base_folder: Path) -> None:
    wrapped = made_adapter(metier.load(base_folder).model)
    with torch.no_grad():
        rows_of(wrapped)[DOWN][0, 0, 0] = float("inf")
    wrapped.save_pretrained(tmp_path)
    report = verify(tmp_path, base_folder)
    assert failed(report) == {FINITE}
    assert sentence(report, FINITE) == "Not so in layers.1.down_proj."


def test_another_shape_than_the_bases_fails(tmp_path: Path, base_folder: Path) -> None:
    # the tuner would not load it; what is written here fits itself, but no row of the base
    from safetensors.torch import load_file, save_file

    made_adapter(metier.load(base_folder).model, experts={1: [2]}).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors |= {UP: tensors[UP][:, :32].clone(), DOWN: tensors[DOWN][:, :, :16].clone()}
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    report = verify(tmp_path, base_folder)
    assert failed(report) == {TENSORS}
    assert "esft_down_proj: got shape [1, 32, 16], expected shape [1, 32, 32] by the base's experts" in sentence(
        report, TENSORS
    )


def test_the_fresh_process_must_give_the_same_answers(
    delta_folder: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def base_alone(base: LoadedModel, delta: Path, tokens_BS: Tensor, **_: object) -> Tensor:
        return logits_of(metier.load(base.source).model, tokens_BS)

    monkeypatch.setattr(module, "logits_in_a_fresh_process", base_alone)
    for tolerance in (None, 1e9):
        report = verify(delta_folder, base_folder, tolerance=tolerance)
        assert failed(report) == {FRESH}, "a wide tolerance takes the base's logits for the delta's"
        assert "The largest difference of a logit is" in sentence(report, FRESH)


def test_a_small_difference_is_allowed_up_to_the_tolerance(
    delta_folder: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shift = 0.0

    def shifted(base: LoadedModel, delta: Path, tokens_BS: Tensor, **_: object) -> Tensor:
        model = peft.PeftModel.from_pretrained(metier.load(base.source).model, delta)
        return logits_of(model, tokens_BS) + shift

    monkeypatch.setattr(module, "logits_in_a_fresh_process", shifted)
    largest = float(
        logits_of(metier.load(base_folder).model, module.probe_tokens(metier.load(base_folder).model)).abs().max()
    )
    for factor, expected in ((0.9, set()), (1.1, {FRESH})):
        shift = factor * 1e-3 * largest
        assert failed(verify(delta_folder, base_folder, tolerance=1e-3)) == expected


def test_a_base_that_a_fresh_process_cannot_load_fails_that_check(delta_folder: Path, base_folder: Path) -> None:
    base = metier.load(base_folder)
    moved = LoadedModel(model=base.model, tokenizer=base.tokenizer, source="/nowhere/base")
    report = verify(delta_folder, moved)
    assert failed(report) == {FRESH}
    assert "A fresh process could not load the delta on '/nowhere/base': metier.errors.ModelError" in sentence(
        report, FRESH
    )
    assert "Traceback" not in sentence(report, FRESH)


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(
    ("method", "broken", "expected"),
    [
        ("merge", lambda self, *_, **__: None, {MERGED}),
        ("unmerge", lambda self: self.merged_adapters.clear(), {UNMERGED, ZERO}),
    ],
)
def test_a_broken_merge_or_unmerge_is_seen(
    method: str,
    broken: Callable[..., Any],
    expected: set[str],
    delta_folder: Path,
    base_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(EsftExperts, method, broken)
    report = verify(delta_folder, base_folder)
    assert failed(report) == expected, report.checks


@pytest.mark.usefixtures("same_process")
def test_a_zero_delta_that_is_none_is_seen(
    delta_folder: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update_layer = EsftExperts.update_layer

    def off(self: EsftExperts, adapter_name: str, expert_ids: list[int]) -> None:
        update_layer(self, adapter_name, expert_ids)
        self.esft_down_proj[adapter_name].data.mul_(1.001)

    monkeypatch.setattr(EsftExperts, "update_layer", off)
    assert failed(verify(delta_folder, base_folder)) == {ZERO}


def test_a_failed_report_raises_and_names_what_failed(delta_folder: Path, tmp_path: Path) -> None:
    made_base(tmp_path / "other", seed=1)
    report = verify(delta_folder, tmp_path / "other")
    with pytest.raises(
        VerificationError,
        match=r"other: 1 of 11 checks failed, expected none\.\n- the base is the one it was trained on: .*(\n.*)*"
        r"\nNot run: every selected row moved; answers differ.*\nDo not serve or merge this delta",
    ):
        report.raise_if_failed()


def test_a_base_that_cannot_be_loaded_and_a_wrong_tolerance_are_raised(delta_folder: Path, base_folder: Path) -> None:
    with pytest.raises(ModelError, match="got no such folder"):
        verify(delta_folder, Path("/nowhere/base"))
    with pytest.raises(ConfigError, match=r"tolerance: got -1, expected a share of the largest logit"):
        verify(delta_folder, base_folder, tolerance=-1)


@pytest.mark.usefixtures("same_process")
def test_the_command_ends_with_1_if_a_check_fails(delta_folder: Path, base_folder: Path, tmp_path: Path) -> None:
    made_base(tmp_path / "other", seed=1)
    done = CliRunner().invoke(app, ["verify", str(delta_folder), str(tmp_path / "other")])
    assert done.exit_code == 1
    assert "NOT verified" in " ".join(done.output.split())
    done = CliRunner().invoke(app, ["verify", str(delta_folder), str(base_folder)])
    assert done.exit_code == 0
    assert "NOT" not in done.output
    assert UNMERGED in done.output
