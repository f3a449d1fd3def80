"""What the trainer's own step takes, numbers and all, to hold a trace against."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer

from metier.config import RunConfig
from metier.data.encode import Encoded
from metier.memory.frozen_model import frozen_weights
from metier.memory.frozen_weight import FrozenWeight
from metier.memory.step_gradients import step_gradients_of
from metier.methods.meft import MeftLayer
from metier.methods.wrap import wrap
from metier.models.moe import is_dense, moe_layers
from metier.planning.drawn_routes import route
from metier.planning.step import Batch, columns_that_are_written, rest_layers
from metier.planning.trace import Operations, Tracer
from metier.planning.without_numbers import originals, show_entries
from metier.routing.selection import ExpertSelection
from metier.training.trainer import make_trainer
from tiny_models import tiny_tokenizer


def _items(batch: Batch, ids: list[int], labels: list[int]) -> list[Encoded]:
    """Records that a collator makes such a batch of: all as long, all but one shorter, or two to a row."""
    whole = Encoded(input_ids=ids, labels=labels, origin="test")
    if batch.rows == "whole":
        return [whole] * batch.num_rows
    if batch.rows == "padded":
        return [whole] + [Encoded(input_ids=ids[1:], labels=labels[1:], origin="test")] * (batch.num_rows - 1)
    half = len(ids) // 2
    halves = Encoded(input_ids=ids[:half], labels=labels[half // 2 :][:half], origin="test")
    return [whole] + [halves] * (2 * (batch.num_rows - 1))


def measured(
    base: PreTrainedModel,
    config: RunConfig,
    selection: ExpertSelection | None,
    batch: Batch,
    *,
    is_reserved: bool = False,
    then: Callable[[Trainer], None] = lambda trainer: None,
) -> tuple[int, Operations]:
    """Peak and operations of the trainer's step, numbers and all; each layer's routes are those of the trace.

    `then` is called with the trainer after the step, which has left its gradients.
    """
    labels = batch.labels_BT()[0].tolist()
    ids = list(range(6, 6 + batch.num_tokens))
    looked_at = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
    model = wrap(base, config, selection, [looked_at])
    items = _items(batch, ids, labels)
    trainer = make_trainer(
        model,
        tiny_tokenizer(),
        items,
        dataclasses.replace(config, per_device_train_batch_size=len(items)),
        Path(config.output_dir),
        eval_items=None,
        callbacks=[],
    )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if hasattr(model, "peft_config"):
            model.enable_input_require_grads()
    if config.method == "lisa":  # its callback does so as a step begins
        rest_layers(model, config.procedure_options["lisa_layers"])
    inputs = next(iter(trainer.get_train_dataloader()))
    route([] if is_dense(model) else moe_layers(model), {}, 0)
    trainer.current_gradient_accumulation_steps = 1
    prepared = trainer.accelerator.prepare_model(model.train())
    show_entries(model)
    tracer = Tracer(None)
    rows = [s.rows_NMWD for m in model.modules() if isinstance(m, MeftLayer) for s in m.stores.values()]
    gradients = [step_gradients_of(p) for p in model.parameters()]
    room = [one.reserve(torch.device("cpu")) for one in gradients if one is not None]
    parameters = [p for p in model.parameters() if not isinstance(p, FrozenWeight)]
    stored = [weight.store._bytes_EB for weight in frozen_weights(model)]
    for tensor in (*parameters, *model.buffers(), *rows, *room, *stored, *originals(model)):
        tracer.memory.known(tensor)
    with tracer, nullcontext() if is_reserved else columns_that_are_written(base):
        trainer.training_step(
            prepared,
            inputs,
            torch.tensor(float((batch.labels_BT() >= 0).sum())),
        )
    then(trainer)
    return tracer.memory.peak, tracer.operations
