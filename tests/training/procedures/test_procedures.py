"""Training procedures: each against what its paper says, resumed to the same bits, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerState

from metier.config import RunConfig
from metier.data.encode import Encoded
from metier.errors import ConfigError, RunError
from metier.methods import from_catalogue
from metier.methods.wrap import wrap
from metier.models.load import load
from metier.training import run as run_module
from metier.training.procedures.chosen import procedure_of
from metier.training.procedures.lisa import Lisa
from metier.training.procedures.mezo import Mezo
from metier.training.run import Foresight, train
from metier.training.trainer import make_trainer
from tiny_models import tiny_model, tiny_tokenizer

Configure = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def _nothing_is_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Foresight, "before_loading", lambda self: None)
    monkeypatch.setattr(Foresight, "before_training", lambda self, *_, **__: {"not_traced": "left out"})


@pytest.fixture
def dense(base: Path) -> None:
    """The runs' base is a dense one."""
    tiny_model("llama").save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)


def saved(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = (folder / "adapter").glob("*.safetensors")
    return load_file(path)


def losses(folder: Path, key: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def config_of(method: str, **options: Any) -> RunConfig:
    return RunConfig(model="x", dataset="x", output_dir="x", method=method, **options)


# MeZO


def test_mezo_steps_along_a_direction_by_the_slope_that_two_losses_give() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 4))
    before, goal = weight.detach().clone(), torch.randn(3, 4)

    def loss(_seed: int, at: torch.Tensor = weight) -> torch.Tensor:
        return (at - goal).square().sum()

    optimizer = Mezo([weight], lr=0.01, epsilon=1e-3, seed=5)
    optimizer.measure(loss)
    # moved there and back again
    torch.testing.assert_close(weight.detach(), before, rtol=1e-6, atol=1e-6)
    optimizer.step()
    direction = torch.randn(3, 4, generator=torch.Generator().manual_seed(5 * 1_000_003))
    slope = (loss(0, before + 1e-3 * direction) - loss(0, before - 1e-3 * direction)) / 2e-3
    # a difference of losses of about 20 is known to 1e-6 of them, over 2e-3
    torch.testing.assert_close(weight.detach(), before - 0.01 * slope * direction, rtol=1e-3, atol=1e-3)


def test_mezo_takes_another_direction_each_time_and_keeps_no_gradients() -> None:
    weight = nn.Parameter(torch.zeros(1000))
    optimizer = Mezo([weight], lr=1.0, epsilon=0.5, seed=0)
    steps = []
    for _ in range(2):
        before = weight.detach().clone()
        optimizer.measure(lambda _: weight.sum())
        optimizer.step()
        steps.append(weight.detach() - before)
    assert weight.grad is None
    cosine = torch.nn.functional.cosine_similarity(steps[0], steps[1], dim=0)
    assert abs(cosine) < 0.2


def test_mezo_lowers_the_loss_and_counts_each_token_once(dense, configure: Configure, console: Console) -> None:
    options = {"max_steps": 12, "learning_rate": 1e-3, "seed": 0, "weight_decay": 0.0}
    result = train(configure("mezo", method="mezo", method_options={"mezo_directions": 4}, **options), console=console)
    found = losses(result.folder)
    assert sum(found[-4:]) < sum(found[:4])
    other = train(configure("lora", method="lora", **options), console=console)
    assert losses(result.folder, "num_tokens") == losses(other.folder, "num_tokens")


def test_mezo_decays_what_the_trainer_decays(dense, base: Path, configure: Configure, tmp_path: Path) -> None:
    config = configure(method="mezo", weight_decay=0.5, learning_rate=0.1)
    model = wrap(load(str(base)).model, config, None)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    items = [Encoded(list(range(5, 25)), list(range(5, 25)), "here")]
    trainer = make_trainer(model, tiny_tokenizer(), items, config, tmp_path / "c", eval_items=None, callbacks=[])
    trainer.optimizer.measure(lambda _: torch.zeros(()))  # level ground: a step is its decay
    trainer.optimizer.step()
    norms = [name for name in before if "norm" in name]
    assert norms
    for name, parameter in model.named_parameters():
        expected = before[name] if name in norms else before[name] * (1 - 0.1 * 0.5)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-5, msg=name)


# LISA


def test_lisa_trains_the_drawn_layers_and_what_is_outside_the_layers() -> None:
    model = tiny_model("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    lisa = Lisa(num_layers=1, interval=2, seed=0)
    trained = []
    for step in range(4):
        lisa.on_step_begin(None, TrainerState(global_step=step), None, model=model, optimizer=optimizer)
        layers = [number for number, layer in enumerate(model.model.layers) if next(layer.parameters()).requires_grad]
        assert layers == lisa.chosen(step // 2, 3)
        assert model.model.embed_tokens.weight.requires_grad
        model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
        optimizer.step()
        resting = [p for n, layer in enumerate(model.model.layers) if n not in layers for p in layer.parameters()]
        assert not any(parameter in optimizer.state for parameter in resting)
        trained.append(layers)
    assert trained[0] == trained[1]
    assert len({tuple(lisa.chosen(draw, 3)) for draw in range(20)}) == 3


def by_hand(parameter: nn.Parameter, state: dict[str, Any], rate: float, decay: float) -> None:
    """One step of AdamW, as its paper has it."""
    state["t"] = state.get("t", 0) + 1
    grad = parameter.grad
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * grad
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * grad**2
    first, second = state["m"] / (1 - 0.9 ** state["t"]), state["v"] / (1 - 0.999 ** state["t"])
    with torch.no_grad():
        parameter.mul_(1 - rate * decay).sub_(rate * first / (second.sqrt() + 1e-8))


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(step))
    return model(input_ids=ids, labels=ids).loss


def test_lisa_is_adamw_on_the_drawn_layers_begun_anew_where_they_come_back() -> None:
    # in float64: where a gradient is next to 0, its last bits decide a step that is as large as any
    one, other = tiny_model("llama").double(), tiny_model("llama").double()
    other.load_state_dict(one.state_dict())
    optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2, weight_decay=0.1)
    lisa, states = Lisa(num_layers=1, interval=2, seed=3), dict[str, dict[str, Any]]()
    for step in range(8):
        lisa.on_step_begin(None, TrainerState(global_step=step), None, model=one, optimizer=optimizer)
        loss_of(one, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        chosen = lisa.chosen(step // 2, 3)
        loss_of(other, step).backward()
        for name, parameter in other.named_parameters():
            if ".layers." in name and int(name.split(".layers.")[1].split(".")[0]) not in chosen:
                states.pop(name, None)
            else:
                by_hand(parameter, states.setdefault(name, {}), 1e-2, 0.1)
        other.zero_grad()
    assert len({tuple(lisa.chosen(draw, 3)) for draw in range(4)}) > 1
    for (name, got), expected in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9, msg=name)


def test_lora_plus_is_adamw_with_a_faster_second_matrix() -> None:
    options = {"learning_rate": 1e-3, "weight_decay": 0.1, "method_options": {"loraplus_lr_ratio": 4.0}}
    config = config_of("lora_plus", **options)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(wrap(tiny_model("llama"), config, None).eval())
    one, other = models
    optimizer, states = procedure_of(config, one).optimizer, dict[str, dict[str, Any]]()
    for step in range(4):
        loss_of(one, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_of(other, step).backward()
        for name, parameter in other.named_parameters():
            if parameter.requires_grad:
                by_hand(parameter, states.setdefault(name, {}), 4e-3 if ".lora_B." in name else 1e-3, 0.1)
        other.zero_grad()
    trained = [name for name, parameter in one.named_parameters() if parameter.requires_grad]
    assert any(one.get_parameter(name).any() for name in trained if ".lora_B." in name)
    for name in trained:
        torch.testing.assert_close(one.get_parameter(name), other.get_parameter(name), rtol=1e-4, atol=1e-6, msg=name)


# resumed


@pytest.mark.parametrize("method", ["mezo", "lisa", "lora_plus", "lora_fa", "fishmask", "diff_pruning", "mixlora"])
def test_a_run_that_stopped_resumes_to_the_same_bits(
    dense, method: str, configure: Configure, console: Console
) -> None:
    options = {
        "method": method,
        "max_steps": 4,
        "save_steps": 2,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-3,
    }
    if method == "lisa":
        options["method_options"] = {"lisa_interval": 1, "lisa_layers": 1}
    straight = train(configure("straight", **options), console=console)
    train(configure("stopped", **{**options, "max_steps": 2}), console=console)
    folder = Path(configure("stopped", **options).output_dir)
    # as if it had been killed behind its second step
    (folder / "run.yaml").write_text(configure("stopped", **options).to_yaml())
    resumed = train(configure("stopped", resume_from_checkpoint="last", **options), console=console)
    first, second = saved(straight.folder), saved(resumed.folder)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(straight.folder, "num_tokens") == losses(resumed.folder, "num_tokens")


def test_what_a_checkpoint_has_chosen_is_not_chosen_again(
    dense, configure: Configure, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"method": "fishmask", "save_steps": 2, "max_steps": 2}
    first = saved(train(configure(**options), console=console).folder)
    monkeypatch.setattr(from_catalogue, "prepare", lambda *_: pytest.fail("chosen again"))
    second = saved(train(configure(resume_from_checkpoint="last", **options), console=console).folder)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_sparse_delta_without_padding_resumes(dense, configure: Configure, console: Console) -> None:
    options = {"method": "pafi", "padding_free": True, "save_steps": 2}
    straight = saved(train(configure(**options), console=console).folder)
    folder = Path(configure(**options).output_dir)
    (folder / "checkpoints" / "checkpoint-4" / "complete").unlink()
    resumed = saved(train(configure(resume_from_checkpoint="last", **options), console=console).folder)
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize("method", ["adalora", "galore", "cpt", "p_tuning"])
def test_what_cannot_be_resumed_is_refused_before_it_begins(method: str) -> None:
    with pytest.raises(ConfigError, match=f"a run of {method} cannot be taken up again, for"):
        config_of(method, save_steps=5)


# losses


def test_adalora_keeps_its_directions_orthogonal(dense, configure: Configure, console: Console) -> None:
    options = {"method": "adalora", "max_steps": 3, "learning_rate": 1e-2}
    plain = train(configure("plain", **options, method_options={"orth_reg_weight": 1e-6}), console=console)
    pulled = train(configure("pulled", **options, method_options={"orth_reg_weight": 10.0}), console=console)

    def distance(folder: Path) -> float:
        rows = [t for name, t in saved(folder).items() if "lora_A" in name and len(t)]
        return sum(float((t @ t.T - torch.eye(len(t))).norm()) for t in rows) / len(rows)

    assert distance(pulled.folder) < 0.9 * distance(plain.folder)


def test_adalora_that_would_never_allot_is_refused(dense, configure: Configure, console: Console) -> None:
    with pytest.raises(ConfigError, match="tinit and tfinal are 500 and 0, but the run has 4 steps"):
        train(configure(method="adalora", method_options={"tinit": 500}), console=console)


def test_evaluation_does_not_depend_on_how_steps_are_accumulated(
    dense, configure: Configure, console: Console, records: Path
) -> None:
    found = []
    for number in (1, 4):
        options = {"method": "adaption_prompt", "max_steps": 2, "learning_rate": 1e-9, "num_train_epochs": 1.0}
        result = train(
            configure(f"by{number}", gradient_accumulation_steps=number, eval_dataset=str(records), **options),
            console=console,
        )
        # at so small a rate both are the base's
        result.model.eval()
        found.append(losses(result.folder, "eval_loss") or losses(result.folder))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-2)


def test_lora_plus_has_its_ratio_and_its_weight_decay() -> None:
    config = config_of("lora_plus", learning_rate=1e-3, weight_decay=0.1, method_options={"loraplus_lr_ratio": 4.0})
    optimizer = procedure_of(config, wrap(tiny_model("llama"), config, None)).optimizer
    assert {round(group["lr"] / 1e-3) for group in optimizer.param_groups if group["params"]} == {1, 4}
    assert {group["weight_decay"] for group in optimizer.param_groups if group["params"]} == {0.1}


def test_lora_fa_trains_the_upper_matrices_alone() -> None:
    wrapped = wrap(tiny_model("llama"), config_of("lora_fa"), None)
    names = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert names
    assert all(".lora_B." in name for name in names)


# options


def test_a_random_mask_is_drawn_by_the_runs_seed() -> None:
    masks = []
    for seed in (0, 0, 1):
        wrapped = wrap(tiny_model("llama"), config_of("random_mask", seed=seed), None)
        state = peft.get_peft_model_state_dict(wrapped)
        masks.append({name: tensor.tolist() for name, tensor in state.items() if "indices" in name})
    assert masks[0] == masks[1] != masks[2]


@pytest.mark.parametrize(
    ("family", "targets"), [("llama", "attention"), ("deepseek_v2", None), ("deepseek_v2", "attention,routed")]
)
def test_layers_to_transform_hold_where_parts_are_named(family: str, targets: str | None) -> None:
    config = config_of("lora", targets=targets, method_options={"layers_to_transform": [1]})
    wrapped = wrap(tiny_model(family), config, None)
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".layers.1." in name for name in trained)
    assert any("experts" in name for name in trained) == (family != "llama")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("hira", {"lora_r": 4}, "lora_r: hira has no such option"),
        ("houlsby", {"lora_dropout": 0.5}, "lora_dropout: houlsby has no such option"),
        ("supertuning", {"lora_r": 4}, "lora_r: supertuning has no such option"),
        ("lora", {"method_options": {"init_lora_weights": "eva"}}, "needs calls of PEFT that a run does not make"),
        (
            "lora",
            {"method_options": {"init_lora_weights": "pissa_niter_4"}},
            "draws at random again when the adapter is",
        ),
        ("adamss", {"method_options": {"use_asa": True}}, "needs calls of PEFT that a run does not make"),
    ],
)
def test_what_would_do_nothing_is_refused(method: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        wrap(tiny_model("llama"), config_of(method, **options), None)


def test_ranks_reach_the_methods_that_have_them() -> None:
    unipelt = wrap(tiny_model("llama"), config_of("unipelt", lora_r=4), None).peft_config["default"]
    assert unipelt.lora_r == 4
    adalora = wrap(tiny_model("llama"), config_of("adalora", lora_r=4), None).peft_config["default"]
    assert (adalora.target_r, adalora.init_r) == (4, 6)
    assert wrap(tiny_model("llama"), config_of("supertuning"), None).peft_config["default"].r is None


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("full", {"lora_r": 4}, "lora_r: method full has no LoRA."),
        ("prefix", {"gradient_checkpointing": True}, "gradient_checkpointing: prefix stands in the KV cache"),
    ],
)
def test_keys_that_do_not_go_with_a_method_are_refused(method: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_of(method, **options)


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        ("diff_pruning", "density", 1.5),
        ("mezo", "mezo_directions", 0),
        ("mezo", "mezo_epsilon", 0.0),
        ("galore", "rank", 0),
        ("fishmask", "mask_records", 0),
        ("lisa", "lisa_layers", 0),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_loaded(
    method: str, option: str, value: float, configure: Configure, console: Console
) -> None:
    with pytest.raises(ConfigError, match=f"{option}: must be"):
        train(configure(method=method, method_options={option: value}), console=console)


def test_galore_decays_weights_and_leaves_norms(dense, configure: Configure, tmp_path: Path) -> None:
    pytest.importorskip("galore_torch")
    config = configure(method="galore", weight_decay=0.1)
    items = [Encoded(list(range(3, 10)), list(range(3, 10)), str(number)) for number in range(6)]
    model = wrap(tiny_model("llama"), config, None)
    trainer = make_trainer(model, tiny_tokenizer(), items, config, tmp_path, eval_items=None, callbacks=[])
    groups = trainer.create_optimizer().param_groups
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name else 0.1), name


@pytest.mark.parametrize("method", ["lora", "full", "mezo"])
def test_a_step_that_is_no_number_ends_the_run_before_it_is_in_the_weights(
    method: str, dense, configure: Configure, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run_module.make_trainer

    def poisoned(*args: Any, **options: Any) -> Any:
        trainer = plain(*args, **options)
        compute = trainer.compute_loss

        def loss(*args: Any, **options: Any) -> Any:
            found = compute(*args, **options)
            return found * float("nan") if trainer.state.global_step == 2 else found

        trainer.compute_loss = loss
        return trainer

    monkeypatch.setattr(run_module, "make_trainer", poisoned)
    config = configure(method=method, max_steps=4, **({"per_device_train_batch_size": 2} if method == "mezo" else {}))
    with pytest.raises(RunError, match=r"not finite; nothing was updated(?s:.*)The 2 steps before are kept in (\S+)"):
        train(config, console=console)
    kept = Path(config.output_dir) / "checkpoints" / "checkpoint-2"
    (path,) = kept.glob("*model.safetensors")
    assert all(tensor.isfinite().all() for tensor in load_file(path).values())
    assert losses(Path(config.output_dir))[-1] > 0
