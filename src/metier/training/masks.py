"""Methods that choose entries of the base: what they look at before a run, what is kept of diff pruning after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from metier.catalogue.tree import method_of
from metier.config import RunConfig
from metier.data.collate import Collator
from metier.data.encode import Item
from metier.methods.sparse_delta import prune


def batches_to_look_at(
    items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> Iterator[dict[str, Any]]:
    """Batches of the run's records, drawn by its seed: `mask_records` of them in all; none where nothing looks."""
    num_records = config.procedure_options.get("mask_records", 0)
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(len(items), generator=generator)[:num_records].tolist()
    collate, size = Collator(int(tokenizer.pad_token_id)), config.per_device_train_batch_size
    for start in range(0, len(chosen), size):
        records = [items[index] for index in chosen[start : start + size]]
        rows = [{"input_ids": x.input_ids, "labels": x.labels, "origin": x.origin} for x in records]
        yield {**collate(rows), "use_cache": False}


def pruned(model: PreTrainedModel | PeftModel, config: RunConfig) -> PreTrainedModel | PeftModel:
    """After diff pruning the sparse delta of its largest differences; any other model as it is."""
    if method_of(config.method).optimizer != "diff_pruning":
        return model
    assert isinstance(model, PeftModel), "diff pruning is an adapter"
    sparse: PeftModel = prune(model, density=config.procedure_options["density"])
    return sparse
