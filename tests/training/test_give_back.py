"""Looking for what can be given back changes nothing of a run but its memory."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metier.config import RunConfig
from metier.data.encode import Encoded
from metier.methods.wrap import wrap
from metier.training import give_back as module
from metier.training.trainer import make_trainer
from tiny_models import tiny_model, tiny_tokenizer

ITEMS = [Encoded(list(range(5, 25)), list(range(5, 25)), str(number)) for number in range(12)]

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")


@pytest.fixture(autouse=True)
def _as_a_user_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name)


def _train(configure: Callable[..., RunConfig], folder: Path, **changes: Any) -> tuple[Any, dict[str, Tensor]]:
    config = configure(method="full", gradient_accumulation_steps=2, max_steps=2, **changes)
    torch.manual_seed(0)
    model = wrap(tiny_model("deepseek_v2"), config, None)
    trainer = make_trainer(model, tiny_tokenizer(), ITEMS, config, folder, eval_items=None, callbacks=[])
    trainer.train()
    return model, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_looks_in_every_layer_both_ways_and_gives_back_where_the_policy_says_so(
    configure: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    given, looked = [], []

    class Seen(module.HeapPolicy):
        def begin_step(self) -> None:
            super().begin_step()
            looked.append(0)

        def should_give_back(self, held_bytes: int, peak_bytes: int) -> bool:
            looked[-1] += 1
            assert 100 << 20 < held_bytes <= 1.01 * peak_bytes
            return looked[-1] == 3

    monkeypatch.setattr(module, "HeapPolicy", Seen)
    monkeypatch.setattr(module, "give_back_what_is_free", lambda: given.append(len(looked)))
    model, trained = _train(configure, tmp_path / "looking", gradient_checkpointing=checkpointing)
    parts = [part for stack in module.layer_stacks(model) for part in stack.modules()]
    num_parts = sum(next(part.parameters(), None) is not None for part in parts)
    # a step has two micro-batches; the second is followed by the optimizer
    passes = [count for count in looked if count]
    assert len(passes) == 4
    assert len(given) == 4
    assert min(passes) > 1.5 * num_parts
    assert not any(part._forward_hooks for part in parts)

    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    looked.clear()
    _, expected = _train(configure, tmp_path / "alone", gradient_checkpointing=checkpointing)
    assert not any(looked)
    for name, value in expected.items():
        assert torch.equal(trained[name], value), name


def test_an_evaluation_comes_to_the_places_of_a_step(
    configure: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = []

    class Seen(module.HeapPolicy):
        def __init__(self) -> None:
            super().__init__()
            policies.append(self)

    monkeypatch.setattr(module, "HeapPolicy", Seen)
    config = configure(method="full", max_steps=4)
    model = wrap(tiny_model("deepseek_v2"), config, None)
    trainer = make_trainer(model, tiny_tokenizer(), ITEMS, config, tmp_path, eval_items=ITEMS, callbacks=[])
    trainer.args.eval_strategy = trainer.args.eval_strategy.__class__("steps")
    trainer.args.eval_steps = 1
    trainer.train()
    parts = [part for stack in module.layer_stacks(model) for part in stack.modules()]
    num_parts = sum(next(part.parameters(), None) is not None for part in parts)
    (policy,) = policies
    # forward and backward, the optimizer, and the first batch of an evaluation, which follows a step
    assert len(policy._growth) <= 3 * num_parts + 1
