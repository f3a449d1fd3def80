"""How a run is parted among the processes that a launcher has started: batches, weights, and what is refused.

Each process has its own records; gradients are averaged (DDP), or averaged and parted with the weights (FSDP2, key
`fsdp`). Both are torch's, set up by accelerate. A step sees the same records in any number of processes as long as its
global batch is the same.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from transformers import Trainer

from metier.catalogue.tree import method_of
from metier.config import RunConfig
from metier.distributed.ranks import Ranks, ranks_here
from metier.errors import ConfigError, RunError
from metier.planning.fit import changed
from metier.training.checkpoints import complete_checkpoints
from metier.training.folder import RunFolder

WORLD = "world.json"
"""In a checkpoint: how many processes made it, and how many records a step of theirs has."""
_EMPTY_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"
_OPTIMIZERS_OF_ONE = {
    "mezo": "each process would walk in a direction of its own",
    "lisa": "the layers that are trained change, and a process waits for gradients of all",
    "galore": "its projections need a gradient whole",
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
    return changed(config, {"global_batch_size": None, "gradient_accumulation_steps": batches})


def load_everywhere(config: RunConfig) -> str | None:
    """Have every process load the weights, whatever the launcher's configuration says; what was changed, in words.

    With accelerate's `fsdp_cpu_ram_efficient_loading` all but one have empty weights until they are parted, and what is
    measured before that (routing, masks) would be measured on nothing.
    """
    if not is_sharded(config) or os.environ.get(_EMPTY_LOADING, "false").lower() != "true":
        return None
    os.environ[_EMPTY_LOADING] = "false"
    return (
        "fsdp_cpu_ram_efficient_loading is turned off: each process loads the weights, for what is measured before "
        "they are parted is measured in all"
    )


def global_batch(config: RunConfig, ranks: Ranks) -> int:
    """Records of a step over all processes."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * ranks.size


def is_sharded(config: RunConfig) -> bool:
    """Whether weights are sharded, by the run's own key or by the launcher's configuration."""
    return config.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def note_world(checkpoint: Path, config: RunConfig, ranks: Ranks) -> None:
    """Write down who made a checkpoint."""
    world = {"processes": ranks.size, "global_batch_size": global_batch(config, ranks)}
    (checkpoint / WORLD).write_text(json.dumps(world) + "\n", encoding="utf-8")


def check_world(checkpoint: Path, config: RunConfig, ranks: Ranks) -> None:
    """Refuse to go on from a checkpoint with another number of records a step.

    Raises:
        RunError: the steps behind the checkpoint were larger or smaller ones.
    """
    if not (checkpoint / WORLD).exists():
        return
    world = json.loads((checkpoint / WORLD).read_text(encoding="utf-8"))
    if world["global_batch_size"] != global_batch(config, ranks):
        raise RunError(
            f"{checkpoint}: was made by {world['processes']} processes with {world['global_batch_size']} records a "
            f"step; {ranks.size} would now have {global_batch(config, ranks)}, another run. Set global_batch_size: "
            f"{world['global_batch_size']}, which any number of processes parts among itself."
        )


def shard_on_cpus(trainer: Trainer) -> None:
    """Have accelerate shard on CPUs too: it does so on accelerators alone, and torch on both."""
    state = trainer.accelerator.state
    if state.distributed_type != DistributedType.MULTI_CPU:
        return
    arguments = trainer.args.fsdp_plugin_args
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**(arguments or {}))
    state.distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


def _check(config: RunConfig) -> None:
    method = method_of(config.method)
    if method.optimizer in _OPTIMIZERS_OF_ONE:
        why = _OPTIMIZERS_OF_ONE[method.optimizer]
        raise ConfigError(f"method: {method.name} does not run in several processes: {why}. Start one.")
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


def describe(config: RunConfig, ranks: Ranks) -> str:
    """How the run is parted, in words."""
    how = "weights sharded over them (FSDP2)" if is_sharded(config) else "a copy of the weights in each (DDP)"
    return (
        f"{ranks.size} processes, {how}; {global_batch(config, ranks)} records a step, "
        f"{config.per_device_train_batch_size} at once in each"
    )


@contextmanager
def lost_peers_told(folder: RunFolder) -> Iterator[None]:
    """Say what a lost process means, in place of the words of the network; a launcher then tells the others to end.

    Raises:
        RunError: a process that this one talks to is gone.
    """
    if not ranks_here().are_several:
        yield
        return

    def told_to_end(*_: object) -> None:
        raise _lost(folder)

    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, told_to_end) if in_main_thread else None
    try:
        yield
    except RuntimeError as error:
        if not _is_of_a_peer(error):
            raise
        raise _lost(folder) from error
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


def _lost(folder: RunFolder) -> RunError:
    ranks, kept = ranks_here(), complete_checkpoints(folder.checkpoints)
    from_there = f"goes on from {kept[-1]}" if kept else "begins again, for there was no complete checkpoint yet,"
    return RunError(
        f"process {ranks.rank} of {ranks.size}: another process of the run is gone, or its launcher ends it; what the "
        f"launcher says tells which.\nWhat came after the last complete checkpoint is lost. The run {from_there} with "
        "--resume_from_checkpoint last, or by itself where torchrun may start it again (--max-restarts)."
    )


def _is_of_a_peer(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return any(word in str(error) for word in ("by peer", "gloo", "NCCL", "Broken pipe", "Timed out waiting"))
