"""The output layer on a CPU: fewer products, the same loss and gradients as TRL's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from trl import SFTTrainer

from metier.config import RunConfig
from metier.data.encode import Encoded
from metier.methods.wrap import wrap
from metier.training.labelled_positions import layers_of
from metier.training.trainer import make_trainer
from tiny_models import VOCAB_SIZE, tiny_model, tiny_tokenizer

ITEMS = [
    Encoded(list(range(5, 25)), [-100] * 15 + list(range(20, 25)), "long"),
    Encoded(list(range(7, 14)), [-100] * 4 + list(range(11, 14)), "short"),
    Encoded(list(range(30, 36)), list(range(30, 36)), "all of it"),
]
NUM_LABELLED = 5 + 3 + 5


@pytest.fixture(params=["full", "lora"])
def trainer(request: pytest.FixtureRequest, configure: Callable[..., RunConfig], tmp_path: Path) -> SFTTrainer:
    config = configure(method=request.param)
    torch.manual_seed(0)
    model = wrap(tiny_model("deepseek_v2"), config, None)
    return make_trainer(model, tiny_tokenizer(), ITEMS, config, tmp_path / "c", eval_items=None, callbacks=[])


def a_step(trainer: SFTTrainer, compute_loss: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients, and floating-point operations."""
    trainer.model.zero_grad()
    batch = trainer.data_collator(ITEMS)
    batch.pop("origin", None)
    with FlopCounterMode(display=False) as counter:
        loss = compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(NUM_LABELLED))
        loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, counter.get_total_flops()


def test_loss_and_gradients_are_those_of_trl_and_the_output_layer_computes_only_what_has_a_label(
    trainer: SFTTrainer,
) -> None:
    trainer.model.train()
    loss, gradients, flops = a_step(trainer, trainer.compute_loss)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    torch.manual_seed(0)
    expected, expected_gradients, expected_flops = a_step(
        trainer, lambda *a, **k: SFTTrainer.compute_loss(trainer, *a, **k)
    )
    torch.testing.assert_close(loss, expected)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)
    for name, values in trainer._metrics["train"].items():
        if name != "num_tokens":
            assert metrics[name] == pytest.approx(values[-1], rel=1e-5), name
    # of a head's products the counter sees two: the forward pass's, and the same again in the backward pass
    num_positions = len(ITEMS) * (len(ITEMS[0].input_ids) - 1)
    hidden_size = trainer.model.config.hidden_size
    assert expected_flops - flops == 2 * 2 * (num_positions - NUM_LABELLED) * VOCAB_SIZE * hidden_size


def test_the_model_is_left_as_it_was(trainer: SFTTrainer) -> None:
    batch = trainer.data_collator(ITEMS)
    batch.pop("origin", None)
    ids = batch["input_ids"]
    trainer.compute_loss(trainer.model, dict(batch))
    assert trainer.model(input_ids=ids).logits.shape == (*ids.shape, VOCAB_SIZE)
    layers_of(trainer).register_forward_pre_hook(lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        trainer.compute_loss(trainer.model, dict(batch))
    assert not layers_of(trainer)._forward_hooks


def test_a_batch_without_labels_and_one_whose_logits_are_wanted_go_trls_way(trainer: SFTTrainer) -> None:
    batch = trainer.data_collator(ITEMS)
    batch.pop("origin", None)
    _, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    assert outputs.logits.shape == (*batch["input_ids"].shape, VOCAB_SIZE)
    loss = trainer.compute_loss(trainer.model, {**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert float(loss.detach()) == 0
