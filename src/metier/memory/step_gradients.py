"""The gradients of one optimizer step: of the blocks that the step used, and of no others.

They are the `grad` of a parameter, the *holder*, whose first axis is as long as there are used blocks. So clipping by
the global norm, gradient scaling and `zero_grad` treat them like any other gradient, and no dense one is ever formed.
The holder's own values mean nothing and take no memory; `RowAdamW` updates the store instead.
"""

# G blocks with a gradient, M rows a block, D hidden_size

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from metier.distributed.ranks import ranks_here, summed
from metier.errors import ConfigError
from metier.memory.disk_policy import Phase
from metier.memory.row_store import RowStore

_ROOM = 1.25
"""How much larger than needed a buffer is made when it has to grow."""
_AT_ONCE = 64
"""Blocks that processes send each other at once."""
GROUP_BYTES = 32 << 20
"""Of rows that are worked on before others: while they are, a disk reads what the next ones need."""


class StepGradients:
    """Gradients of a store's blocks since the last step, summed over micro-batches."""

    def __init__(self, store: RowStore) -> None:
        self.store = store
        self.block_ids: list[int] = []
        """Which block each slot of the gradient is."""
        self._slot: dict[int, int] = {}
        self._shape = (store.rows_per_block, 2, store.hidden_size)
        self._buffer = torch.empty(0, *self._shape)
        self._fired = torch.empty(0, store.rows_per_block, dtype=torch.bool)
        self.holder = nn.Parameter(torch.zeros(0, *self._shape))
        self.holder.step_gradients = self  # type: ignore[attr-defined]
        self.scale = 1.0
        """What the optimizer is to multiply with what lies on disk."""
        self._found_finite: tuple[Tensor, int] | None = None
        """Gradients of which all were looked at, and how often they had been written by then."""
        block_bytes = 4 * store.rows_per_block * 2 * store.hidden_size
        self.num_together = max(1, GROUP_BYTES // block_bytes)
        """Blocks that are worked on before others."""

    @property
    def is_wanted(self) -> bool:
        """Whether a pass now is one of a step, which will ask for its rows again."""
        return torch.is_grad_enabled() and self.holder.requires_grad

    @property
    def fired_GM(self) -> Tensor:
        """Which rows had a part in some token's output, bool: the others have a gradient of zero."""
        return self._fired[: len(self.block_ids)]

    @torch.no_grad()
    def places(self, block_ids: Sequence[int], device: torch.device) -> tuple[list[Tensor], list[Tensor], list[bool]]:
        """Where the gradients of these blocks are to be added: for each (M, 2, D), its rows' flags (M,), and whether it
        is new to the step: then the place holds nothing yet and is to be written over."""
        self.begin()
        self._take_back()
        self._apply_scale()
        self._found_finite = None
        new = [block for block in dict.fromkeys(block_ids) if block not in self._slot]
        is_new = set(new)
        for block in new:
            self._slot[block] = len(self.block_ids)
            self.block_ids.append(block)
        num_slots = len(self.block_ids)
        self._make_room(num_slots, device)
        self.store.wanted([self._slot[block] for block in block_ids], ("gradients",), to_write=True)
        self.store.wait_for(("gradients",))
        if new:
            self._fired[num_slots - len(new) : num_slots] = False
        if new or self.holder.grad is None:
            self._give_to_holder(num_slots)
        slots = [self._slot[block] for block in block_ids]
        return [self._buffer[s] for s in slots], [self._fired[s] for s in slots], [b in is_new for b in block_ids]

    def reserve(self, device: torch.device) -> Tensor:
        """Make room for all blocks before the first step, as there is after one that used them all; returns it."""
        self._make_room(self.store.num_blocks, device)
        return self._buffer

    def begin(self) -> None:
        """A pass begins: what an optimizer or its user has done with is forgotten."""
        if self.holder.grad is None and self.block_ids:
            self.clear()

    def changed(self, block_ids: Sequence[int]) -> None:
        """Gradients of these blocks were added to; the disk, if they are there, is to have them in time."""
        self.store.changed([self._slot[block] for block in block_ids], ("gradients",))

    def read_ahead(self, slots: slice) -> None:
        """Have the disk read gradients that an optimizer will come to soon."""
        self.store.wanted(range(slots.start, slots.stop), ("gradients",))

    def groups(self, phase: Phase, read_ahead: Callable[[slice], None]) -> Iterator[slice]:
        """Slots of the gradient, some at a time; while one group is worked on, a disk reads what the next one needs."""
        num_slots, at_once = len(self.block_ids), self.num_together
        groups = [slice(first, min(first + at_once, num_slots)) for first in range(0, num_slots, at_once)]
        for number, group in enumerate(groups):
            self.store.come_to(phase)
            if number == 0:
                read_ahead(group)
            self.store.wait_for([*self.store.arrays, "gradients"])
            if number + 1 < len(groups):
                read_ahead(groups[number + 1])
            yield group

    def parts(self) -> Iterator[Tensor]:
        """The step's gradients, some at a time, (G, M, 2, D) each, without what they are to be multiplied with."""
        grad = self.holder.grad
        assert grad is not None, "rows without a gradient are left out"
        for group in self.groups("norm", self.read_ahead):
            yield grad[group]

    def are_finite(self) -> bool:
        """Whether all are; nothing is read where their norm said so and nobody has written since."""
        grad = self.holder.grad
        if grad is not None and self._found_finite is not None:
            found, version = self._found_finite
            if found is grad and version == grad._version:
                return True
        return all(is_finite(part) for part in self.parts())

    def norm(self) -> float:
        """The 2-norm of all of them, as one vector."""
        norm = self.scale * math.hypot(*(float(torch.linalg.vector_norm(part)) for part in self.parts()))
        self._found_finite = self._seen() if math.isfinite(norm) else None
        return norm

    @torch.no_grad()
    def multiply(self, scale: float) -> None:
        """Scale them by a number below 1; what lies on disk is not written for it."""
        grad = self.holder.grad
        assert grad is not None, "rows without a gradient are left out"
        if self.store.gradients is None:
            are_finite = self._found_finite is not None
            grad.mul_(scale)
            self._found_finite = self._seen() if are_finite else None
        else:
            self.scale *= scale

    def _seen(self) -> tuple[Tensor, int]:
        grad = self.holder.grad
        assert grad is not None, "rows without a gradient are left out"
        return grad, grad._version

    def _apply_scale(self) -> None:
        """More is about to be added: what is there is brought to the scale that it is said to have."""
        if self.scale == 1:
            return
        for group in self.groups("backward", self.read_ahead):
            self._buffer[group] *= self.scale
            self.store.changed(range(group.start, group.stop), ("gradients",))
        self.scale = 1.0

    def _take_back(self) -> None:
        """Somebody may have put another tensor in the gradient's place: what is added has to be added to that."""
        grad = self.holder.grad
        if grad is not None and grad.data_ptr() != self._buffer.data_ptr():
            self._buffer[: len(grad)] = grad
            self.holder.grad = self._buffer[: len(grad)]

    @torch.no_grad()
    def average_over_ranks(self) -> None:
        """The mean over the processes of a run, each of which has a replica of the store; all of them must call this.

        Afterwards all have gradients of the same blocks, in the same order, whichever of them they used themselves.
        """
        device = self._buffer.device
        used_N = torch.zeros(self.store.num_blocks, dtype=torch.int64)
        used_N[self.block_ids] = 1
        blocks: list[int] = summed(used_N).nonzero().flatten().tolist()
        if not blocks:
            return
        places, _, is_new = self.places(blocks, device)
        for place, is_without in zip(places, is_new, strict=True):
            if is_without:
                place.zero_()
        self._sort()
        num_slots, size = len(blocks), ranks_here().size
        for first in range(0, num_slots, _AT_ONCE):
            part = slice(first, min(first + _AT_ONCE, num_slots))
            self._buffer[part] = summed(self._buffer[part]) / size
        self._fired[:num_slots] = summed(self._fired[:num_slots].to(torch.int32)) > 0

    def _sort(self) -> None:
        """Put the slots into the order of their blocks, each in its turn, without room for all of them twice."""
        for slot, block in enumerate(sorted(self.block_ids)):
            other = self._slot[block]
            if other == slot:
                continue
            for tensor in (self._buffer, self._fired):
                taken = tensor[slot].clone()
                tensor[slot] = tensor[other]
                tensor[other] = taken
            moved = self.block_ids[slot]
            self.block_ids[slot], self.block_ids[other] = block, moved
            self._slot[block], self._slot[moved] = slot, other

    @torch.inference_mode(False)
    def clear(self) -> None:
        """Forget the step: its gradients were used, or are not wanted."""
        self.store.forget_gradients(len(self.block_ids))
        self.block_ids, self._slot = [], {}
        self.scale, self._found_finite = 1.0, None
        self.holder.grad = None
        self.holder.data = self._buffer.new_zeros(0, *self._shape)

    def _make_room(self, num_slots: int, device: torch.device) -> None:
        if num_slots <= len(self._buffer) and self._buffer.device == device:
            return
        buffer = self.store.gradient_room(device)
        if buffer is None:
            room = min(self.store.num_blocks, max(num_slots, int(len(self._buffer) * _ROOM)))
            buffer = torch.empty(room, *self._shape, device=device)
        buffer = buffer.view(-1, *self._shape)
        fired = torch.zeros(len(buffer), self.store.rows_per_block, dtype=torch.bool, device=device)
        if self._buffer.device == device:
            buffer[: len(self._buffer)] = self._buffer
            fired[: len(self._fired)] = self._fired
        self._buffer, self._fired = buffer, fired

    def _give_to_holder(self, num_slots: int) -> None:
        self.holder.grad = None
        # one number seen from everywhere: the shape that a gradient needs, without its memory
        self.holder.data = self._buffer.new_zeros(1).expand(num_slots, *self._shape)
        self.holder.grad = self._buffer[:num_slots]


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are; a sum, which is quick, may have overflowed where they are."""
    return bool(torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all())


def refuse_other_optimizers(optimizer: Optimizer, *_: Any) -> None:
    """A hook before the step of every optimizer: one that knows nothing of stores would leave their rows as they are.

    Raises:
        ConfigError: the optimizer has a parameter that stands for rows, and cannot update them.
    """
    if getattr(optimizer, "updates_stores", False):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradients = step_gradients_of(parameter)
            if gradients is not None:
                raise ConfigError(
                    f"{gradients.store.name}: got {type(optimizer).__name__}, which cannot train rows that lie in a "
                    "store; nothing was updated.\nUse metier.memory.RowAdamW; with transformers' Trainer: "
                    "optimizer_cls_and_kwargs=(RowAdamW, {'lr': 1e-4})."
                )


register_optimizer_step_pre_hook(refuse_other_optimizers)


def step_gradients_of(parameter: nn.Parameter) -> StepGradients | None:
    """The step's gradients of rows that a parameter stands for; None for an ordinary parameter."""
    return getattr(parameter, "step_gradients", None)
