"""A parameter whose numbers live in a store: it looks like any weight, and is read when a product needs it.

Models, PEFT and autograd see a tensor of the usual shape, dtype and device. What autograd keeps of it for the backward
pass is the parameter itself, not numbers, so a quantised weight is dequantised again there, and one on disk read again.
Selecting experts and transposing cost nothing and read nothing.
"""

# E weights of a stack, O outputs, I inputs

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from metier.errors import ModelError
from metier.memory.frozen_store import FrozenStore

aten = torch.ops.aten


class FrozenWeight(Tensor):
    """Weights `first` to `last - 1` of a store: (last - first, O, I), or one (O, I); maybe transposed."""

    store: FrozenStore
    first: int
    last: int
    is_matrix: bool
    is_transposed: bool

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        store: FrozenStore,
        first: int,
        last: int,
        *,
        is_matrix: bool,
        is_transposed: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> FrozenWeight:
        num_outputs, num_inputs = store.shape[-2:]
        shape, strides = (num_outputs, num_inputs), (num_inputs, 1)
        if is_transposed:
            shape, strides = shape[::-1], strides[::-1]
        # a view of a parameter has to be an ordinary tensor in inference mode too
        with torch.inference_mode(False):
            made: FrozenWeight = torch.Tensor._make_wrapper_subclass(
                cls,
                shape if is_matrix else (last - first, *shape),
                strides=strides if is_matrix else (num_outputs * num_inputs, *strides),
                dtype=dtype or store.dtype,
                device=device or torch.device("cpu"),
                requires_grad=False,
            )
        made.store, made.first, made.last = store, first, last
        made.is_matrix, made.is_transposed = is_matrix, is_transposed
        return made

    def numbers(self) -> Tensor:
        """The weight as a plain tensor on its device."""
        # a stack whose weights are no multiple of 64 bytes has gaps, of which nobody is told
        read_NOI = self.store.read(self.first, self.last, self.device).to(self.dtype).contiguous()
        out = read_NOI.mT if self.is_transposed else read_NOI
        return out[0] if self.is_matrix else out

    def some(self, indices: Sequence[int]) -> list[Tensor]:
        """Some weights of the stack as plain tensors, each (O, I) or transposed; nothing else is read."""
        assert not self.is_matrix, f"{self.store.name}: one weight is no stack"
        read = self.store.read_some([self.first + index for index in indices], self.device)
        return [(one.mT if self.is_transposed else one).to(self.dtype) for one in read]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """An ordinary parameter with the same numbers: PEFT copies the modules that are trained whole."""
        copied = nn.Parameter(self.numbers().clone(), requires_grad=False)
        memo[id(self)] = copied
        return copied

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FrozenWeight({self.store.name}, {tuple(self.shape)}, {self.dtype}, {self.store.tier})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _VIEWS:
            viewed = _VIEWS[func](*args, **kwargs)
            if viewed is not None:
                return viewed
        elif func._schema.is_mutable and isinstance(args[0], FrozenWeight):
            raise ModelError(
                f"{args[0].store.name}: is frozen in a store ({args[0].store.tier}) and cannot be written.\n"
                "Load the model without a store, or merge a delta into its files: metier merge."
            )
        args, kwargs = tree_map_only(FrozenWeight, FrozenWeight.numbers, (args, kwargs))
        return func(*args, **kwargs)


def frozen(store: FrozenStore, device: torch.device) -> FrozenWeight:
    """All of a store, as a model holds it."""
    return FrozenWeight(store, 0, store.num_weights, is_matrix=len(store.shape) == 2, device=device)


def _like(
    weight: FrozenWeight,
    *,
    first: int | None = None,
    last: int | None = None,
    is_matrix: bool | None = None,
    is_transposed: bool | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> FrozenWeight:
    """The same weight but for what is given."""
    return FrozenWeight(
        weight.store,
        weight.first if first is None else first,
        weight.last if last is None else last,
        is_matrix=weight.is_matrix if is_matrix is None else is_matrix,
        is_transposed=weight.is_transposed if is_transposed is None else is_transposed,
        dtype=dtype or weight.dtype,
        device=device or weight.device,
    )


def _same(weight: FrozenWeight) -> FrozenWeight:
    return _like(weight)


def _converted(
    weight: FrozenWeight,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    **_: object,
) -> FrozenWeight:
    """In another dtype or on another device when it is read."""
    return _like(weight, dtype=dtype, device=device)


def _slice(
    weight: FrozenWeight, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> FrozenWeight | None:
    if weight.is_matrix or dim % 3 or step != 1:
        return None
    first, last, _ = slice(start, end).indices(weight.last - weight.first)
    return _like(weight, first=weight.first + first, last=weight.first + max(first, last))


def _select(weight: FrozenWeight, dim: int, index: int) -> FrozenWeight | None:
    if weight.is_matrix or dim % 3:
        return None
    first = weight.first + index % (weight.last - weight.first)
    return _like(weight, first=first, last=first + 1, is_matrix=True)


def _transpose(weight: FrozenWeight, one: int = 0, other: int = 1) -> FrozenWeight | None:
    if {one % weight.dim(), other % weight.dim()} != {weight.dim() - 2, weight.dim() - 1}:
        return None
    return _like(weight, is_transposed=not weight.is_transposed)


def _index(weight: FrozenWeight, indices: Sequence[Tensor | None]) -> Tensor | None:
    """Experts by their ids: only they are read."""
    ids = indices[0]
    if weight.is_matrix or len(indices) != 1 or ids is None:
        return None
    if ids.dim() != 1 or ids.dtype == torch.bool or not len(ids):
        return None
    return torch.stack(weight.some([i % (weight.last - weight.first) for i in ids.tolist()]))


_VIEWS: dict[Any, Callable[..., Tensor | None]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten._to_copy.default: _converted,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.t.default: _transpose,
    aten.transpose.int: _transpose,
    aten.index.Tensor: _index,
}
"""What needs no numbers, or not all; None from one of them means that it does."""
