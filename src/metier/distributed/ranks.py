"""The ranks of a run: processes that torchrun, accelerate or a cluster has started, and what they say to each other.

There is no process manager and no collective of our own: a launcher says in the environment who a process is, and
accelerate joins it to the others with the backend of its devices (NCCL, or gloo on CPUs). Where there is no launcher
there is one rank, and every function here is the plain thing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from metier.errors import MetierError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which process this is, of how many."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    """Processes on this machine, which share its memory and its cores."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    @property
    def are_several(self) -> bool:
        return self.size > 1


def join_ranks() -> Ranks:
    """Join the processes that were launched together; where this one was started by itself, it stays so."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        from accelerate import PartialState

        if is_restart():
            _join_again()
        # on a machine without an accelerator the state has to be told
        PartialState() if torch.accelerator.is_available() else PartialState(cpu=True)
    return ranks_here()


def _join_again() -> None:
    """Join under a name that no earlier try has used.

    torchrun keeps one store of addresses through its restarts (pytorch#167288), so that the processes of the next try
    would call at the doors of the last one's, and give up after a minute.
    """
    store, rank, size = next(iter(rendezvous("env://")))
    tries = os.environ["TORCHELASTIC_RESTART_COUNT"]
    dist.init_process_group(store=PrefixStore(f"try-{tries}", store), rank=rank, world_size=size)


def leave_ranks() -> None:
    """Take leave of the others; torch warns of processes that go without."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def ranks_here() -> Ranks:
    """Which process this is, among those that it has joined."""
    if not dist.is_available() or not dist.is_initialized():
        return Ranks()
    size = dist.get_world_size()
    return Ranks(dist.get_rank(), size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))


def is_restart() -> bool:
    """Whether torchrun has started this process in place of one that was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def on_main(do: Callable[[], T]) -> T:
    """What the main process gets from `do`, in all of them; the others wait for it.

    Raises:
        MetierError: what `do` raised. In the other processes it is marked as told already, so that it is printed once.
    """
    ranks = ranks_here()
    if not ranks.are_several:
        return do()
    told: list[Any] = [None, None]
    if ranks.is_main:
        try:
            told[0] = do()
        except MetierError as error:
            told[1] = error
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        told[1].was_told = not ranks.is_main
        raise told[1]
    result: T = told[0]
    return result


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if ranks_here().are_several:
        dist.barrier()


def summed(tensor: Tensor) -> Tensor:
    """The sum over the processes, in a tensor of its own."""
    if not ranks_here().are_several:
        return tensor.clone()
    total = tensor.detach().to(_device(), copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def largest(value: float) -> float:
    """The largest of the processes' values."""
    if not ranks_here().are_several:
        return value
    of_all = torch.tensor(value, dtype=torch.float64, device=_device())
    dist.all_reduce(of_all, op=dist.ReduceOp.MAX)
    return float(of_all)


def total(value: float) -> float:
    """The sum of the processes' values."""
    if not ranks_here().are_several:
        return value
    return float(summed(torch.tensor(value, dtype=torch.float64, device=_device())))


def _device() -> torch.device:
    """Where collectives work: the accelerator of this process, or the CPU."""
    from accelerate import PartialState

    device: torch.device = PartialState().device
    return device
