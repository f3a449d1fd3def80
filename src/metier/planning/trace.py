"""What a step computes and keeps, operation by operation, without computing it.

Floating-point tensors are fake: they have shapes, strides and storages, and no numbers. Integers are real, because
which rows an expert has decides what is computed; a router's choice, which would need numbers, is put in its place. So
the model's own code runs, our autograd functions too, and what it allocates and frees is counted as it happens.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from metier.memory.frozen_weight import FrozenWeight
from metier.planning.work import Work, work_of

aten = torch.ops.aten
LARGE = 32 << 20
"""Bytes from which on glibc maps every block anew, DEFAULT_MMAP_THRESHOLD_MAX: each of its pages is a fault."""


@dataclass(slots=True)
class Operations:
    """What was computed under a tracer."""

    works: Counter[Work] = field(default_factory=Counter)
    """How often each."""

    @property
    def flops(self) -> int:
        """Of matrix products and attention, two for each multiplication and addition."""
        return sum(number * work.flops for work, number in self.works.items())

    @property
    def bytes_moved(self) -> int:
        """Read and written by all operations, each number once an operation."""
        return sum(number * work.num_bytes for work, number in self.works.items())

    @property
    def count(self) -> int:
        return self.works.total()


@dataclass(slots=True)
class Memory:
    """Bytes of storages that operations made and that are still held."""

    granularity: int = 1
    """What is made takes whole multiples of so many bytes."""
    live: int = 0
    peak: int = 0
    live_small: int = 0
    """Of storages that the system gives no pages of their own (`LARGE`)."""
    made_large: int = 0
    """Of the others, all that were made."""
    _held: dict[int, weakref.ref[Any]] = field(default_factory=dict)

    def made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        num_bytes = -(-storage.nbytes() // self.granularity) * self.granularity
        small_bytes = num_bytes if num_bytes < LARGE else 0
        self.live += num_bytes
        self.live_small += small_bytes
        self.made_large += num_bytes - small_bytes
        self.peak = max(self.peak, self.live)

        def freed(_: Any) -> None:
            self.live -= num_bytes
            self.live_small -= small_bytes
            self._held.pop(key, None)

        self._held[key] = weakref.ref(storage, freed)

    def known(self, tensor: Tensor) -> None:
        """Leave a storage out that was there before."""
        storage = tensor.untyped_storage()
        self._held.setdefault(storage._cdata, weakref.ref(storage, lambda _: None))


class Tracer(TorchDispatchMode):
    """Counts everything that is computed under it; with a `FakeTensorMode`, of floating-point tensors nothing is."""

    def __init__(self, fake: FakeTensorMode | None, *, granularity: int = 1) -> None:
        super().__init__()
        self.fake, self.memory, self.operations = fake, Memory(granularity), Operations()
        self._generator = torch.Generator().manual_seed(0)

    def __torch_dispatch__(
        self, func: Any, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)  # a question, nothing that is computed
        inputs = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        if any(isinstance(x, FrozenWeight) for x in inputs):
            # what it reads back is made here, and what is computed with that counts
            with self:
                return FrozenWeight.__torch_dispatch__(func, types, args, kwargs)
        if self.fake is None:
            out = func(*args, **kwargs)
        elif any(isinstance(x, FakeTensor) for x in inputs):
            out = self._faked(func, args, kwargs)
        else:
            out = self._without_fakes(func, args, kwargs)
        outputs = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
        self._count(func, args, kwargs, out, inputs, outputs)
        return out

    def _faked(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in (aten.mm.out, aten.addmm.out):  # there is one an expert, and each would take a millisecond
            return kwargs["out"]
        if func is aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return False  # a model asks whether its numbers are such that it has to stop
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            # a mask's number of places is known where the mask is
            args = (args[0], _as_places(args[1]), *args[2:])
        assert self.fake is not None, "asked for only where there is one"
        with self.fake:
            if func is aten.index.Tensor and _are_rows(*args):
                # as torch's own rule has it, which takes a millisecond for each
                return args[0].new_empty((*args[1][0].shape, *args[0].shape[1:]))
            if func is aten.index_select.default and args[1] == 0 and not kwargs:
                return args[0].new_empty((args[2].numel(), *args[0].shape[1:]))
            if func is aten._grouped_mm.default:
                return _grouped_mm(*args, **kwargs)
            if func is aten.topk.default:
                return self._chosen(*args, **kwargs)
            return func(*args, **kwargs)

    def _chosen(self, scores: Tensor, k: int, dim: int = -1, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The k best of scores that have no numbers: any, each once. Integers are real."""
        values = scores.narrow(dim, 0, k).clone()
        assert self.fake is not None, "asked for only where there is one"
        with unset_fake_temporarily():
            chosen = torch.rand(scores.shape, generator=self._generator).topk(k, dim).indices
        return values, chosen

    def _without_fakes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self.fake is not None, "asked for only where there is one"
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        packet = func._overloadpacket
        # models decide by one number that is drawn, and by whether a mask, rows by tokens, is all ones
        is_asked = (packet is aten.rand and math.prod(args[0]) == 1) or (packet is aten.ones and len(args[0]) == 2)
        # of a mask, rows by heads by queries by keys, nobody asks for numbers, and it may have billions of them
        is_mask = any(isinstance(x, Tensor) and x.dim() >= 4 for x in args)
        if is_mask or (packet in _FACTORIES and dtype.is_floating_point and not is_asked):
            with self.fake:
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _count(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> None:
        for tensor in outputs:
            self.memory.made(tensor)
        if not (inputs or outputs):
            return
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        if outputs and not func._schema.is_mutable and all(x.untyped_storage()._cdata in known for x in outputs):
            return  # views
        self.operations.works[work_of(func, args, kwargs, out, outputs)] += 1


_FACTORIES = frozenset({aten.empty, aten.zeros, aten.ones, aten.randn, aten.rand, aten.empty_strided})
"""What makes tensors of the default dtype out of sizes alone."""


def _as_places(indices: Any) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            found += list(index.nonzero().unbind(1))
        else:
            found.append(index)
    return found


def _are_rows(tensor: Tensor, places: list[Tensor | None]) -> bool:
    """Whether rows are taken by their numbers, which are real."""
    first = places[0]
    is_real = isinstance(first, Tensor) and not isinstance(first, FakeTensor)
    return len(places) == 1 and is_real and tensor.is_contiguous()


def _grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """What torch gives, of which its own rule for tensors without numbers knows bfloat16 alone."""
    num_groups = 1 if offs is None else len(offs)
    if a.dim() == b.dim() == 2:
        shape: tuple[int, ...] = (num_groups, a.shape[0], b.shape[1])
    elif a.dim() == 3:
        shape = (a.shape[0], a.shape[1], b.shape[-1]) if b.dim() == 3 else (a.shape[1], b.shape[1])
    else:
        shape = (a.shape[0], b.shape[2])
    dtype = out_dtype or a.dtype
    # rows begin at multiples of 16 bytes
    width = -(-shape[-1] * dtype.itemsize // 16) * 16 // dtype.itemsize
    strides = (width, 1) if len(shape) == 2 else (shape[1] * width, width, 1)
    return a.new_empty_strided(shape, strides, dtype=dtype)
