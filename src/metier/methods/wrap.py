"""Put the configured method on a model: selected experts, a LoRA on them, or any other of the catalogue."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import peft
from transformers import PreTrainedModel

from metier.catalogue.tree import method_of
from metier.config import RunConfig
from metier.methods.esft import EsftConfig
from metier.methods.expert_lora import ExpertLoraConfig
from metier.methods.from_catalogue import put_on
from metier.methods.meft import MeftConfig
from metier.methods.meft.defaults import meft_sizes
from metier.methods.sparse_delta.masks.gradients import Batch
from metier.routing.selection import ExpertSelection

ROWS_FOLDER = "rows"
"""Of a run's folder: rows of a sparse adapter on disk, while the run goes on."""


def wrap(
    model: PreTrainedModel,
    config: RunConfig,
    selection: ExpertSelection | None,
    batches: Iterable[Batch] = (),
    checkpoint: Path | None = None,
) -> PreTrainedModel | peft.PeftModel:
    """The model with exactly the method's parameters wanting gradients, in float32.

    Args:
        model: the base.
        config: the run.
        selection: of the methods that train selected experts.
        batches: of the run's data, for methods that look at them to choose what they train; read by those alone.
        checkpoint: from which the run is going on; its adapter is loaded later, by the trainer.

    Raises:
        SelectionError: the selection does not fit the model.
        UnsupportedModelError: the method is for another kind of model.
        ConfigError: options that do not go together, or an adapter that attaches to nothing.
    """
    if method_of(config.method).saves_whole_model:
        # float32 masters: in bf16 most steps of a small learning rate would round to nothing
        return model.float().requires_grad_(True)
    if config.method == "meft":
        return peft.get_peft_model(model, meft_config(config))
    if not selects_experts(config):
        return put_on(model, config, batches, checkpoint)
    assert selection is not None, "a run on selected experts selects before it wraps"
    if config.method == "expert_lora":
        lora = ExpertLoraConfig.from_selection(
            selection,
            also_train=config.also_train,
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
        )
        return peft.get_peft_model(model, lora)
    return peft.get_peft_model(model, EsftConfig.from_selection(selection, also_train=config.also_train))


def selects_experts(config: RunConfig) -> bool:
    """Whether the run's method trains selected experts, so that it needs a selection."""
    return method_of(config.method).selects_experts


def meft_config(config: RunConfig) -> MeftConfig:
    """The sparse adapter that a run trains; rows on disk lie in the run's folder while it runs.

    Raises:
        ConfigError: its sizes do not fit together.
    """
    sizes = meft_sizes(
        config.meft_r,
        num_key_experts=config.meft_num_key_experts,
        num_active_key_experts=config.meft_num_active_key_experts,
        top_k=config.meft_top_k,
        where="method meft",
        prefix="meft_",
    )
    return MeftConfig(
        r=sizes.r,
        num_key_experts=sizes.num_key_experts,
        num_active_key_experts=sizes.num_active_key_experts,
        top_k=sizes.top_k,
        gate=config.meft_gate,
        semantics=config.meft_semantics,
        scaling=config.meft_scaling,
        store=config.meft_store,
        store_folder=str(Path(config.output_dir) / ROWS_FOLDER),
        cache_bytes=config.meft_cache_bytes,
        row_dtype=config.meft_row_dtype,
    )
