"""How a run is parted among processes: batches of a step, copies or shards of the weights, and what is refused.

Free of a trainer, so that a plan for any number of processes asks the very functions that a run asks.
"""

from __future__ import annotations

import dataclasses
import os

from metier.catalogue.tree import method_of
from metier.config import RunConfig
from metier.distributed.ranks import Ranks
from metier.errors import ConfigError

_OPTIMIZERS_OF_ONE = {
    "mezo": "each process would walk in a direction of its own",
    "lisa": "the layers that are trained change, and a process waits for gradients of all",
    "galore": "its projections need a gradient whole",
    "lora_fa": "PEFT's optimizer keeps its state under other names than a checkpoint of several processes has",
    "adalora": "its ranks are allotted by what one process sees",
}


def for_ranks(config: RunConfig, ranks: Ranks) -> RunConfig:
    """The configuration as one process of several has it: `global_batch_size` is turned into batches of a step.

    Raises:
        ConfigError: the global batch cannot be parted so, or what is configured does not go with several processes.
    """
    if ranks.are_several:
        _check(config)
    elif config.fsdp:
        raise ConfigError(
            "fsdp: there is one process, so nothing to shard over. Start several, such as by torchrun "
            "--nproc-per-node 2 -m metier train …, or leave it out."
        )
    if config.global_batch_size is None:
        return config
    at_once = config.per_device_train_batch_size * ranks.size
    if config.global_batch_size % at_once:
        raise ConfigError(
            f"global_batch_size: got {config.global_batch_size}, which {ranks.size} processes with "
            f"per_device_train_batch_size {config.per_device_train_batch_size} cannot part: expected a multiple of "
            f"{at_once}. Change one of the two."
        )
    batches = config.global_batch_size // at_once
    return dataclasses.replace(config, global_batch_size=None, gradient_accumulation_steps=batches)


def global_batch(config: RunConfig, ranks: Ranks) -> int:
    """Records of a step over all processes."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * ranks.size


def is_sharded(config: RunConfig) -> bool:
    """Whether weights are sharded, by the run's own key or by the launcher's configuration."""
    return config.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _check(config: RunConfig) -> None:
    method = method_of(config.method)
    if method.optimizer in _OPTIMIZERS_OF_ONE:
        why = _OPTIMIZERS_OF_ONE[method.optimizer]
        raise ConfigError(f"method: {method.name} does not run in several processes: {why}. Start one.")
    if config.method == "meft" and config.meft_store == "disk":
        raise ConfigError(
            "meft_store: rows on disk belong to one process, and there are several. Use host, of which each process "
            "has a replica."
        )
    in_bf16 = "bfloat16" in (config.meft_row_dtype, config.meft_state_dtype)
    if config.method == "meft" and config.meft_update == "exact" and in_bf16:
        raise ConfigError(
            "meft_update: exact rounds rows and moments in bfloat16 at random, each process when it comes to them, so "
            "replicas would drift apart. Use meft_update: lazy, or float32 for meft_row_dtype and meft_state_dtype."
        )
    if not is_sharded(config):
        return
    if int(os.environ.get("FSDP_VERSION", "2")) != 2:
        raise ConfigError("fsdp: got version 1 of the launcher's configuration, expected fsdp_version: 2. Set it.")
    if (method.config or "").startswith("metier.methods.sparse_delta"):
        raise ConfigError(
            f"fsdp: {method.name} writes single entries into the base's weights, of which each process would have a "
            "part. Leave fsdp out: each process then has a copy."
        )
    if config.has_frozen_base:
        raise ConfigError(
            "base_store and base_format keep the base's weights elsewhere, and the launcher's configuration shards "
            "them over processes. Leave one side out."
        )
