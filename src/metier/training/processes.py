"""A run in the processes that a launcher has started: how they load and shard, and what is said when one is lost.

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
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from transformers import Trainer

from metier.config import RunConfig
from metier.distributed.parting import global_batch, is_sharded
from metier.distributed.ranks import Ranks, ranks_here
from metier.errors import RunError
from metier.training.checkpoints import complete_checkpoints
from metier.training.folder import RunFolder

WORLD = "world.json"
"""In a checkpoint: how many processes made it, and how many records a step of theirs has."""
_EMPTY_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


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
    if trainer.accelerator.device.type != "cpu":
        return
    arguments = trainer.args.fsdp_plugin_args
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**(arguments or {}))
    state.distributed_type = DistributedType.FSDP
    # every later look at the state takes it from there; without, gradients would be sent after each batch of a step
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


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
