"""TRL's SFTTrainer, set up from a RunConfig: records are tokens and labels already, and no default surprises.

Encoder-decoders, which TRL does not train, get transformers' Seq2SeqTrainer with the same settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from metier.config import RunConfig
from metier.data.collate import Collator, PaddingFreeCollator
from metier.data.encode import Item
from metier.data.pairs import PairCollator, token_mean_loss
from metier.models.encoder_decoder import decoder_start_token, is_encoder_decoder
from metier.models.own_logits import has_plain_head
from metier.models.unwrap import bare_model, text_config_of
from metier.training.give_back import GiveBack
from metier.training.labelled_positions import keep_to_labelled_positions
from metier.training.learning_rates import set_learning_rates
from metier.training.not_finite import stop_at_not_finite
from metier.training.own_logits import train_on_own_logits
from metier.training.procedures.chosen import procedure_of


def make_trainer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    config: RunConfig,
    checkpoints: Path,
    *,
    eval_items: Sequence[Item] | None,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """A trainer over encoded records; the loss is on their labels, the mean over the step's labelled tokens."""
    if not isinstance(model, PeftModel):
        # the trainer resumes by parameter names: experts stacked as in memory, not one by one as on the hub
        model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    pad_token = int(tokenizer.pad_token_id)
    procedure = procedure_of(config, model)
    arguments = _arguments(config, checkpoints, has_eval=eval_items is not None) | procedure.arguments
    common: dict[str, Any] = {
        "model": model,
        "train_dataset": _dataset(items),
        "eval_dataset": None if eval_items is None else _dataset(eval_items),
        "processing_class": tokenizer,
        "callbacks": [*callbacks, *procedure.callbacks, GiveBack()],
        "optimizers": (procedure.optimizer, None),
    }
    trainer: Trainer
    if is_encoder_decoder(model):
        trainer = Seq2SeqTrainer(
            args=Seq2SeqTrainingArguments(**arguments),
            data_collator=PairCollator(pad_token, decoder_start_token(model)),
            # the model's own loss is a batch's mean, which weighs the tokens of short batches more
            compute_loss_func=token_mean_loss,
            **common,
        )
    else:
        trainer = SFTTrainer(
            args=SFTConfig(
                dataset_kwargs={"skip_prepare_dataset": True},
                max_length=None,
                # the router is frozen under ESFT; TRL would else take a balancing loss from the model's configuration
                router_aux_loss_coef=0.0,
                **arguments,
            ),
            optimizer_cls_and_kwargs=procedure.optimizer_class,
            data_collator=(PaddingFreeCollator if config.padding_free else Collator)(pad_token),
            **common,
        )
        # Some classes (Qwen3-VL, Gemma 4 …) say that their own loss cannot count a step's tokens, and the trainer then
        # takes means of batches. TRL's loss, which is used here, can.
        trainer.model_accepts_loss_kwargs = True
        if not procedure.has_own_loss:
            (keep_to_labelled_positions if has_plain_head(model) else train_on_own_logits)(trainer)
    if procedure.after is not None:
        procedure.after(trainer)
    if config.own_learning_rates:
        set_learning_rates(trainer, model, config.own_learning_rates)
    stop_at_not_finite(trainer)
    for shown_elsewhere in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shown_elsewhere)
    return trainer


def _dataset(items: Sequence[Item]) -> Dataset:
    return Dataset.from_dict(
        {
            "input_ids": [item.input_ids for item in items],
            "labels": [item.labels for item in items],
            "origin": [item.origin for item in items],
        }
    )


def _arguments(config: RunConfig, checkpoints: Path, *, has_eval: bool) -> dict[str, Any]:
    return {
        "output_dir": str(checkpoints),
        # the collator names the origins of a batch that has nothing to train on
        "remove_unused_columns": False,
        "learning_rate": config.learning_rate,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "per_device_eval_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "num_train_epochs": config.num_train_epochs,
        "max_steps": -1 if config.max_steps is None else config.max_steps,
        "bf16": config.bf16,
        # the trainer refuses bf16 on a host without an accelerator unless it is told that it may
        "use_cpu": not torch.accelerator.is_available(),
        "gradient_checkpointing": config.gradient_checkpointing,
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "logging_steps": config.logging_steps,
        # a loss that is no number would be logged as what was before it, or 0
        "logging_nan_inf_filter": False,
        "report_to": config.report_to,
        "save_strategy": "no" if config.save_steps is None else "steps",
        "save_steps": 500 if config.save_steps is None else config.save_steps,
        # MarkCheckpoints keeps to the limit
        "save_total_limit": None,
        "eval_strategy": "epoch" if has_eval else "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **(_SHARDED if config.fsdp else {}),
    }


def remembered(model: nn.Module) -> Callable[[], None]:
    """What a trainer changes of a model that it did not make, to be put back by a call after the training.

    TRL writes into the configuration how a router is balanced, and a saved model would say so. TRL and accelerate put
    functions of theirs before a model's own `forward`: with `bf16` one that computes all in autocast and would go on
    doing so, but for `generate`, which asks the model underneath.
    """
    text_config, models = text_config_of(model), (model, bare_model(model))
    balancing = {name: getattr(text_config, name) for name in _BALANCING if hasattr(text_config, name)}
    own = [{name: vars(each)[name] for name in _OF_ACCELERATE if name in vars(each)} for each in models]

    def put_back() -> None:
        for name, value in balancing.items():
            setattr(text_config, name, value)
        for each, attributes in zip(models, own, strict=True):
            for name in _OF_ACCELERATE:
                vars(each).pop(name, None)
            vars(each).update(attributes)

    return put_back


_OF_ACCELERATE = ("forward", "_original_forward", "_is_accelerate_prepared")
_BALANCING = ("router_aux_loss_coef", "output_router_logits")
_SHARDED: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
"""FSDP2; the decoder layers, as the model names them, are gathered one at a time."""
