"""A parameter whose numbers live in a store: it looks like any weight, and is read when a product needs it.

Models, PEFT and autograd see a tensor of the usual shape, dtype and device. What autograd keeps of it for the backward
pass is the parameter itself, not numbers, so a quantised weight is dequantised again there, and one on disk read again.
A view of it is one too and reads nothing before it is used. Nobody can write into either.
"""

# E weights of a stack, O outputs, I inputs

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils._pytree import tree_map_only

from metier.errors import ModelError
from metier.memory.frozen_store import FrozenStore

aten = torch.ops.aten

Look = Callable[[Tensor], Tensor]
"""A view of a plain tensor."""


class FrozenWeight(Tensor):
    """Weights `first` to `last - 1` of a store: (last - first, O, I), or one (O, I); maybe transposed or viewed."""

    store: FrozenStore
    first: int
    last: int
    is_matrix: bool
    is_transposed: bool
    dtypes: tuple[torch.dtype, ...]
    """What it was converted to, one after the other: each may have rounded."""
    viewed: tuple[Look, ...]
    """Other views than of experts and transposed ones, one after the other, each made of numbers when they are read."""

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
        dtypes: tuple[torch.dtype, ...] = (),
        device: torch.device | None = None,
        viewed: tuple[Look, ...] = (),
    ) -> FrozenWeight:
        num_outputs, num_inputs = store.shape[-2:]
        shape: tuple[int, ...] = (num_outputs, num_inputs)
        strides: tuple[int, ...] = (num_inputs, 1)
        if is_transposed:
            shape, strides = shape[::-1], strides[::-1]
        if not is_matrix:
            shape, strides = (last - first, *shape), (num_outputs * num_inputs, *strides)
        dtype = dtypes[-1] if dtypes else store.dtype
        if viewed:
            seen = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
            for look in viewed:
                seen = look(seen)
            shape, strides, dtype = seen.shape, seen.stride(), seen.dtype
        # a view of a parameter has to be an ordinary tensor in inference mode too
        with torch.inference_mode(False):
            made: FrozenWeight = torch.Tensor._make_wrapper_subclass(
                cls,
                shape,
                strides=strides,
                dtype=dtype,
                device=device or torch.device("cpu"),
                requires_grad=False,
            )
        made.store, made.first, made.last = store, first, last
        made.is_matrix, made.is_transposed, made.dtypes, made.viewed = is_matrix, is_transposed, dtypes, viewed
        return made

    def numbers(self) -> Tensor:
        """The weight as a plain tensor on its device, to be read only: it may be the store's own memory."""
        if self.device.type == "meta":
            return torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device=self.device)
        # a stack whose weights are no multiple of 64 bytes has gaps, of which nobody is told
        read_NOI = self._rounded(self.store.read(self.first, self.last, self.device)).contiguous()
        out = read_NOI.mT if self.is_transposed else read_NOI
        out = out[0] if self.is_matrix else out
        for look in self.viewed:
            out = look(out)
        return out

    def some(self, indices: Sequence[int]) -> list[Tensor]:
        """Some weights of the stack as plain tensors, each (O, I) or transposed; nothing else is read.

        Args:
            indices: from 0 to the size of the stack minus 1.
        """
        assert not self.is_matrix, f"{self.store.name}: one weight is no stack"
        assert not self.viewed, f"{self.store.name}: of a view there is no telling which weight is where"
        if self.device.type == "meta":
            return [torch.empty(self.shape[1:], dtype=self.dtype, device=self.device) for _ in indices]
        read = self.store.read_some([self.first + index for index in indices], self.device)
        return [self._rounded(one.mT if self.is_transposed else one) for one in read]

    def _rounded(self, numbers: Tensor) -> Tensor:
        for dtype in self.dtypes:
            numbers = numbers.to(dtype)
        return numbers

    @property
    def data(self) -> FrozenWeight:
        """The same weight, as of any tensor."""
        return _like(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        """Only the same weight in another dtype, on another device or transposed.

        Raises:
            ModelError: other numbers, which would not be kept.
        """
        if not (isinstance(value, FrozenWeight) and value._what == self._what):
            self._refuse_write()
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.is_transposed, self.dtypes = value.is_transposed, value.dtypes

    @property
    def requires_grad(self) -> bool:
        """Never."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> FrozenWeight:
        """Raises ModelError where a gradient is asked for."""
        if requires_grad:
            self._refuse("cannot be trained")
        return self

    def untyped_storage(self) -> NoReturn:
        """Raises ModelError: what saves or shares a tensor's memory finds none here."""
        self._refuse("has no memory that could be saved or shared")

    def share_memory_(self) -> NoReturn:
        self.untyped_storage()

    def numpy(self, *, force: bool = False) -> Any:
        """A copy; a weight in a store cannot be written."""
        return self.numbers().clone().numpy(force=force)

    def __dlpack__(self, **options: Any) -> Any:
        return self.numbers().clone().__dlpack__(**options)

    @property
    def _what(self) -> tuple[FrozenStore, int, int, bool, tuple[Look, ...]]:
        """Which numbers."""
        return self.store, self.first, self.last, self.is_matrix, self.viewed

    def _refuse_write(self) -> NoReturn:
        self._refuse("cannot be written")

    def _refuse(self, what: str) -> NoReturn:
        raise ModelError(
            f"{self.store.name}: is frozen in a store ({self.store.tier}) and {what}.\n"
            "Load the model without a store (metier.load), or save the adapter alone and merge it into the model's "
            "files: metier merge."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """An ordinary parameter with the same numbers: PEFT copies the modules that are trained whole."""
        copied = nn.Parameter(self.numbers().clone(), requires_grad=False)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved and sent as an ordinary parameter: a store is of one process."""
        return nn.Parameter(self.numbers().clone(), requires_grad=False).__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FrozenWeight({self.store.name}, {tuple(self.shape)}, {self.dtype}, {self.store.tier})"

    @classmethod
    @_disable_dynamo  # a weight at a time would be compiled, and its store among them
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if _is_composite(func):
            # in inference mode torch hands over operations whole that it otherwise takes apart: `mT` is a transpose
            return func.decompose(*args, **options)
        first = args[0] if args else None
        if isinstance(first, FrozenWeight):
            known = _VIEWS.get(func)
            if known is not None and (known is _same or not first.viewed):
                viewed = known(*args, **options)
                if viewed is not None:
                    return viewed
            if _is_view(func):
                return _looked_at(first, lambda plain: func(plain, *args[1:], **options))
        for weight in _written(func, args, options):
            weight._refuse_write()
        args, options = tree_map_only(FrozenWeight, FrozenWeight.numbers, (args, options))
        if func.overloadpacket is aten.set_:  # shares the memory of what it is given, and its schema does not say so
            args = (args[0], args[1].clone(), *args[2:])
        return func(*args, **options)


@cache
def _is_composite(func: Any) -> bool:
    return bool(func._can_decompose())


@cache
def _is_view(func: Any) -> bool:
    """Whether an operation's result shares the memory of its first argument."""
    shared = func._schema.arguments[0].alias_info
    return shared is not None and not shared.is_write


@cache
def _places_written(func: Any) -> list[tuple[int, str]]:
    """The arguments that an operation writes, by place and name."""
    arguments = enumerate(func._schema.arguments)
    return [(place, a.name) for place, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[FrozenWeight]:
    """The weights that an operation would write."""
    for place, name in _places_written(func):
        value = args[place] if place < len(args) else kwargs.get(name)
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, FrozenWeight):
                yield one


def _looked_at(weight: FrozenWeight, look: Callable[[Tensor], Any]) -> Any:
    """A view of a weight, or several where the operation gives several."""
    shown = look(torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta"))
    if isinstance(shown, Tensor):
        return _like(weight, viewed=(*weight.viewed, look))
    return [_like(weight, viewed=(*weight.viewed, _Part(look, index))) for index in range(len(shown))]


@dataclass(frozen=True)
class _Part:
    """One of the views that an operation gives."""

    look: Callable[[Tensor], Sequence[Tensor]]
    index: int

    def __call__(self, plain: Tensor) -> Tensor:
        return self.look(plain)[self.index]


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
    viewed: tuple[Look, ...] | None = None,
) -> FrozenWeight:
    """The same weight but for what is given."""
    converted = () if dtype is None or dtype == weight.dtype else (dtype,)
    return FrozenWeight(
        weight.store,
        weight.first if first is None else first,
        weight.last if last is None else last,
        is_matrix=weight.is_matrix if is_matrix is None else is_matrix,
        is_transposed=weight.is_transposed if is_transposed is None else is_transposed,
        dtypes=(*weight.dtypes, *converted),
        device=device or weight.device,
        viewed=weight.viewed if viewed is None else viewed,
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
    first = weight.first + _checked(weight, index)
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
    if ids.dim() != 1 or ids.dtype in (torch.bool, torch.uint8) or not len(ids):
        return None
    return torch.stack(weight.some([_checked(weight, i) for i in ids.tolist()]))


def _checked(weight: FrozenWeight, index: int) -> int:
    """From 0 on, as torch counts from the end where it is negative."""
    size = weight.last - weight.first
    if not -size <= index < size:
        raise IndexError(f"{weight.store.name}: index {index} is out of bounds for dimension 0 with size {size}")
    return index % size


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
