"""Started by a launcher: runs configurations one after another and counts what their processes send and hold.

    python counting.py OUT.json CONFIG.yaml … [--fsdp]

Bytes of torch's own collectives, as they are called: those of shards by FSDP2, those of DDP's buckets by a hook.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp._fully_shard import _fsdp_collectives as fsdp
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from metier.config_reading import load_run_config
from metier.distributed.ranks import join_ranks, leave_ranks, wait_for_all
from metier.memory import step_gradients
from metier.training import replicas
from metier.training import run as run_module
from metier.training.run import train

SENT: Counter[str] = Counter()
"""Bytes of whole tensors, in all steps, that a collective gathers, scatters or sums up."""
HELD: Counter[str] = Counter()
"""Bytes that this process holds when a step ends."""
DONE: dict[str, int] = {}
"""What was sent until training was over; tensors are made whole after it, once."""


class CountHeld(TrainerCallback):
    """Adds up gradients before a step and the optimizer's state after it."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        SENT.clear()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        DONE.clear()
        DONE.update(SENT)

    def on_pre_optimizer_step(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        HELD["gradients"] = sum(_storage(p.grad) for p in model.parameters() if p.grad is not None)

    def on_substep_end(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        whole = (getattr(part, "_unsharded_param", None) for part in _parts(model))
        grads = [parameter.grad for parameter in whole if parameter is not None and parameter.grad is not None]
        HELD["gradients between batches"] = sum(map(_storage, grads))

    def on_step_end(self, *_: Any, optimizer: Any, **__: Any) -> None:
        states = optimizer.state.values()
        HELD["optimizer state"] = sum(
            _storage(t) for state in states for name, t in state.items() if torch.is_tensor(t) and name != "step"
        )


def _parts(model: torch.nn.Module) -> list[Any]:
    """What FSDP2 keeps of each sharded parameter; modules that are gathered together have it in common."""
    states = {id(state): state for m in model.modules() if (state := getattr(m, "_get_fsdp_state", lambda: None)())}
    return [part for state in states.values() for group in state._fsdp_param_groups for part in group.fsdp_params]


def _storage(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


def _whole_bytes(tensor: DTensor, **_: Any) -> int:
    """Of a sharded tensor that is gathered, padding included; a sum of single numbers does not count."""
    if not any(placement.is_shard() for placement in tensor.placements):
        return 0
    size = dist.get_world_size()
    return size * -(-tensor.shape[0] // size) * math.prod(tensor.shape[1:]) * tensor.element_size()


def _count(module: Any, name: str, collective: str, size_of: Any) -> None:
    plain = getattr(module, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        SENT[collective] += size_of(*args, **kwargs)
        return plain(*args, **kwargs)

    setattr(module, name, counted)


def _bucket_sum(group, bucket):  # torch reads annotations, and not their texts
    SENT["all-reduce"] += bucket.buffer().nbytes
    return allreduce_hook(group, bucket)


def watch() -> None:
    """Have everything counted that is sent once a step or more, but for single numbers."""
    _count(fsdp.DefaultAllGather, "__call__", "all-gather", lambda _, output_tensor, *a, **k: output_tensor.nbytes)
    _count(
        fsdp.DefaultReduceScatter, "__call__", "reduce-scatter",
        lambda _, output_tensor, input_tensor, *a, **k: input_tensor.nbytes,
    )  # fmt: skip
    # TRL's output layer reads a weight without calling its module
    _count(DTensor, "full_tensor", "all-gather", _whole_bytes)
    _count(step_gradients, "summed", "all-reduce", lambda tensor: tensor.nbytes)
    # its own name for torch.distributed, so that nobody else's calls are counted

    class Dist:
        def __getattr__(self, name: str) -> Any:
            return getattr(dist, name)

        def all_reduce(self, tensor: torch.Tensor, **options: Any) -> Any:
            SENT["all-reduce"] += tensor.nbytes
            return dist.all_reduce(tensor, **options)

    replicas.dist = Dist()  # type: ignore[assignment]
    plain = DistributedDataParallel.__init__

    def with_hook(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        self.register_comm_hook(None, _bucket_sum)

    DistributedDataParallel.__init__ = with_hook  # type: ignore[method-assign]


def main(out: Path, paths: list[str], options: list[str]) -> None:
    """Run each file; the first process writes what was counted, by run."""
    run_module.Foresight.before_loading = lambda self: None  # type: ignore[method-assign]
    run_module.Foresight.before_training = lambda self, *_, **__: {"not_traced": "left out"}  # type: ignore[method-assign]
    make = run_module.make_trainer
    run_module.make_trainer = lambda *a, callbacks, **k: make(*a, callbacks=[*callbacks, CountHeld()], **k)
    watch()
    ranks = join_ranks()
    found = {}
    for path in paths:
        HELD.clear()
        config = load_run_config(path, options)
        train(config)
        found[Path(path).stem] = {"sent": {k: v / config.max_steps for k, v in DONE.items()}, "held": dict(HELD)}
        wait_for_all()
    if ranks.is_main:
        out.write_text(json.dumps(found, indent=2))
    leave_ranks()


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        [word for word in sys.argv[2:] if not word.startswith("--")],
        [word for word in sys.argv[2:] if word.startswith("--")],
    )
