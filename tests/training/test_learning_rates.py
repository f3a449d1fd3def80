"""What else a run trains beside the experts: told before, with learning rates of its own, and refused where it makes no
sense."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

from metier.config import RunConfig
from metier.config_reading import load_run_config
from metier.deltas.verify import verify
from metier.errors import ConfigError
from metier.models.load import load
from metier.training import trainer as trainer_module
from metier.training.run import train

Configure = Callable[..., RunConfig]


class KeepOptimizer(TrainerCallback):
    """What the optimizer was given, by name of the parameter, when training began."""

    def __init__(self) -> None:
        self.settings: dict[str, tuple[float, float]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        names = {id(parameter): name for name, parameter in kwargs["model"].named_parameters()}
        for group in kwargs["optimizer"].param_groups:
            for parameter in group["params"]:
                self.settings[names[id(parameter)]] = (group["initial_lr"], group["weight_decay"])


def settings_of(monkeypatch: pytest.MonkeyPatch, config: RunConfig, console: Console) -> dict[str, tuple[float, float]]:
    keep, make = KeepOptimizer(), trainer_module.make_trainer

    def make_and_keep(*args: Any, callbacks: list[TrainerCallback], **kwargs: Any) -> Any:
        return make(*args, callbacks=[*callbacks, keep], **kwargs)

    monkeypatch.setattr("metier.training.run.make_trainer", make_and_keep)
    train(config, console=console)
    return keep.settings


def test_groups_have_their_own_learning_rates_and_norms_do_not_decay(
    monkeypatch: pytest.MonkeyPatch, configure: Configure, console: Console
) -> None:
    config = configure(
        train_router=True, train_attention=True, train_norms=True, router_learning_rate=1e-4, norms_learning_rate=2e-3
    )
    settings = settings_of(monkeypatch, config, console)
    expected = {".esft_": (1e-2, 0.1), ".gate.": (1e-4, 0.1), ".self_attn.": (1e-2, 0.1), "_layernorm.": (2e-3, 0.0)}
    inside = ".kv_a_layernorm."  # attention's own norm: attention's rate, and no decay, as transformers has it
    for part, want in expected.items():
        found = {value for name, value in settings.items() if part in name and inside not in name}
        assert found == {want}, part
    assert {value for name, value in settings.items() if inside in name} == {(1e-2, 0.0)}
    assert {value for name, value in settings.items() if "model.norm." in name} == {(2e-3, 0.0)}


def test_without_rates_of_their_own_all_have_the_runs(
    monkeypatch: pytest.MonkeyPatch, configure: Configure, console: Console
) -> None:
    settings = settings_of(monkeypatch, configure(train_router=True, train_norms=True), console)
    assert {rate for rate, _ in settings.values()} == {1e-2}
    assert any(".gate." in name for name in settings)


@pytest.mark.parametrize("method", ["esft", "expert_lora"])
def test_what_else_is_trained_is_told_before_and_is_in_the_delta(
    method: str, configure: Configure, console: Console
) -> None:
    config = configure(method=method, train_shared_experts=True, train_router=True, train_norms=True)
    result = train(config, console=console)
    what = {row.name: row.what for row in result.plan.rows}
    assert what["0"] == "whole input_layernorm, post_attention_layernorm"
    for layer in ("1", "2"):
        assert " experts: " in what[layer]
        assert what[layer].endswith("; whole mlp.gate, mlp.shared_experts, input_layernorm, post_attention_layernorm")
    assert what["other"] == "whole norm"
    assert "; whole" in console.file.getvalue()  # type: ignore[attr-defined]
    tensors = load_file(result.folder / "adapter" / "adapter_model.safetensors")
    num_whole = sum(
        t.numel() for name, t in tensors.items() if "experts.esft_" not in name and "expert_lora" not in name
    )
    rows = [t for name, t in tensors.items() if "experts.esft_" in name or "expert_lora" in name]
    num_rows = sum(t.numel() for t in rows if t.dtype == torch.float32)
    assert result.plan.num_trained == num_whole + num_rows
    plan = json.loads((result.folder / "plan.json").read_text())["predicted"]
    base = sum(p.numel() * p.element_size() for p in load(config.model).model.parameters())
    assert plan["base_bytes"] == base
    report = verify(result.folder / "adapter", load(config.model))
    failed = [check for check in report.checks if check.status != "passed"]
    # experts that few tokens of this tiny run reach may keep a change of zero
    assert {check.name for check in failed} <= ({"every selected row moved"} if method == "expert_lora" else set())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"router_learning_rate": 1e-4},
            r"router_learning_rate is set, but router would not be trained. Set train_router",
        ),
        ({"train_norms": True, "norms_learning_rate": 0.0}, r"norms_learning_rate must be greater than 0, got 0\.0"),
        (
            {"train_norms": True, "method": "full"},
            r"train_norms goes with the methods esft and expert_lora, got method full",
        ),
        ({"train_router": True, "method": "lora"}, r"train_router goes with .* got method lora"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(changes: dict[str, Any], message: str, configure: Configure) -> None:
    with pytest.raises(ConfigError, match=message):
        configure(**changes)


def test_the_keys_work_on_the_command_line() -> None:
    words = ["--model", "m", "--dataset", "d", "--output_dir", "o", "--train-router", "--router-learning-rate", "1e-5"]
    config = load_run_config(None, words)
    assert (config.also_train, config.own_learning_rates) == (("router",), {"router": 1e-5})
