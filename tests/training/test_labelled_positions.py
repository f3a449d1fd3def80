"""The output layer on a CPU: fewer products, the same loss and gradients as TRL's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, RecurrentGemmaConfig
from trl import SFTTrainer

from families.chain import made_model
from families.configs import tiny_config
from labelled_items import ITEMS, NUM_LABELLED, batch_of
from metier.config import RunConfig
from metier.methods.wrap import wrap
from metier.models.own_logits import has_plain_head
from metier.training.labelled_positions import layers_of
from metier.training.trainer import make_trainer
from tiny_models import VOCAB_SIZE, tiny_model, tiny_tokenizer


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


@pytest.mark.parametrize("parts", [(3,), (1, 1, 1), (2, 1)])
@pytest.mark.parametrize("accepts", [None, False])
def test_a_step_is_the_same_however_its_records_are_parted(
    accepts: bool | None, parts: tuple[int, ...], configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Also where a class says that its own loss cannot count a step's tokens, as Qwen3-VL's and Gemma 4's do."""
    config = configure(method="full")
    torch.manual_seed(0)
    model = tiny_model("deepseek_v2")
    if accepts is not None:
        model.accepts_loss_kwargs = accepts
    expected = model(**batch_of(ITEMS)).logits[:, :-1].flatten(0, 1)
    labels = batch_of(ITEMS)["labels"][:, 1:].flatten()
    wanted = torch.nn.functional.cross_entropy(expected, labels, ignore_index=-100)
    wrapped = wrap(model, config, None)
    made = make_trainer(wrapped, tiny_tokenizer(), ITEMS, config, tmp_path / "c", eval_items=None, callbacks=[])
    made.current_gradient_accumulation_steps = len(parts)
    firsts = [sum(parts[:number]) for number in range(len(parts))]
    batches = [batch_of(ITEMS[first : first + size]) for first, size in zip(firsts, parts, strict=True)]
    num_items = made._get_num_items_in_batch(batches, torch.device("cpu"))
    made.optimizer = torch.optim.SGD(made.model.parameters())
    total = sum(made.training_step(made.model, batch, num_items) for batch in batches)
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["recurrent_gemma", "inkling_text", "llama4_text", "roberta", "llama"])
def test_a_run_trains_on_the_models_own_logits(kind: str, configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    torch.manual_seed(0)
    if kind == "recurrent_gemma":
        own = RecurrentGemmaConfig(
            vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            lru_width=32, logits_soft_cap=0.5,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(own)
    elif kind == "inkling_text":
        changed = tiny_config(kind)
        changed.vocab_size, changed.unpadded_vocab_size = VOCAB_SIZE, VOCAB_SIZE - 8
        model = made_model(changed)
    elif kind in ("llama4_text", "roberta"):
        model = made_model(tiny_config(kind))
    else:
        model = tiny_model(kind)
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.mul_(30)
    config = configure(method="full")
    made = make_trainer(model, tiny_tokenizer(), ITEMS, config, tmp_path / "c", eval_items=None, callbacks=[])
    batch = batch_of(ITEMS)
    made.model.eval()
    with torch.no_grad():
        got = made.compute_loss(made.model, dict(batch), num_items_in_batch=torch.tensor(NUM_LABELLED))
        given = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**given, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    wanted = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert has_plain_head(model) is (kind == "llama")
