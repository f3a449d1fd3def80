"""Adapters' values in the base's own parameter: written over its entries, and taken out again to the bit.

No second copy of the parameter exists. Beside it lie the originals of the written entries alone, and autograd is shown
an alias of it whose gradient is gathered at those entries as soon as it is there.
"""

# N entries of the parameter, M of them an adapter's

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metier.errors import ConfigError


class Delta(NamedTuple):
    """What one adapter adds to one parameter."""

    adapter: str
    indices_M: Tensor | None
    """Flat positions, sorted and unique; None for all N of them, in order."""
    values_M: Tensor
    """float32 differences to the base's entries."""


class EntriesInPlace:
    """The entries of one parameter at which adapters' values may stand instead of the base's.

    autograd's version counter is kept to what stands there: the same contents have the same version, whenever they are
    written. So a backward pass fails, with torch's own error, where other contents stand in the parameter than in its
    forward pass; and a look at the base between the two (`disable_adapter` for a reference model) does no harm.
    """

    def __init__(self, owner: nn.Module, name: str, path: str) -> None:
        self._owner, self.name, self.path = owner, name, path
        self._kept: Tensor | None = None
        """Originals of the entries that are written."""
        self._written_at: Tensor | None = None
        self._contents: tuple[object, ...] = ()
        """What stands there: empty for the base's own."""
        self._known: tuple[object, ...] = ()
        """What stood there last that was not the base's, with the version it has."""
        self._known_version = self._base_version = self._version = -1
        self._may_have_moved = False

    @property
    def parameter(self) -> Tensor:
        found = self._owner._parameters[self.name]
        assert found is not None, f"{self.path} was there when the adapter was made"
        return found

    @property
    def originals(self) -> Tensor | None:
        """The base's entries where others stand, one after the other; None where none do."""
        return self._kept

    @property
    def is_written(self) -> bool:
        return bool(self._contents)

    def values_may_have_moved(self) -> None:
        """Have the next `show` write, even where no version says that a value changed.

        Fused optimizers and those with kernels of their own change parameters behind the version counter's back.
        """
        self._may_have_moved = True

    def show(self, deltas: Sequence[Delta]) -> None:
        """Have the base's entries plus the sum of `deltas` stand in the parameter; writes only what is not there."""
        if not deltas:
            self.restore()
            return
        where = tuple((delta.adapter, _identity(delta.indices_M)) for delta in deltas)
        contents = (where, *(_identity(delta.values_M) for delta in deltas))
        if contents == self._contents and not self._may_have_moved:
            return
        if self._contents and self._contents[0] != where:
            self.restore()
        # a fused optimizer may be about to use the gradients that are there
        self._may_have_moved = any(delta.values_M.grad is not None for delta in deltas)
        indices_M, sums_M = _summed(deltas)
        if self._kept is None:
            self._begin(indices_M)
        assert self._kept is not None, "just begun"
        original_M = self._kept
        exact = torch.promote_types(original_M.dtype, sums_M.dtype)
        wanted_M = (original_M.to(exact) + sums_M).to(original_M.dtype)
        # where nothing is added the very bits stay, of a negative zero too
        wanted_M = torch.where(sums_M == 0, original_M, wanted_M)
        if contents != self._known:
            self._known, self._known_version = contents, self._fresh_version()
        self._write(wanted_M, self._known_version)
        self._contents = contents

    def restore(self) -> None:
        """Put the base's entries back, to the bit."""
        if self._kept is None:
            return
        version = self._base_version if _version(self.parameter) == self._version else self._fresh_version()
        self._write(self._kept.to(self.parameter), version)
        self.forget()

    def forget(self) -> None:
        """Take what stands in the parameter for the base's own from here on."""
        self._kept = self._written_at = None
        self._contents = ()

    def proxy(self, deltas: Sequence[Delta]) -> Tensor:
        """The parameter for one forward pass, through which gradients reach the values of `deltas`."""
        values = [delta.values_M for delta in deltas]
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in values)):
            return self.parameter
        alias: Tensor = _Entries.apply(self.parameter, self, [delta.indices_M for delta in deltas], *values)
        return alias

    def _begin(self, indices_M: Tensor | None) -> None:
        flat_N = self._flat()
        self._kept = flat_N.clone() if indices_M is None else flat_N.index_select(0, indices_M)
        self._written_at = indices_M
        version = _version(self.parameter)
        if version != self._version or self._base_version != version:
            self._known = ()  # another hand has changed the base since
        self._base_version = self._version = version

    def _flat(self) -> Tensor:
        parameter = self.parameter
        if not parameter.is_contiguous():
            raise ConfigError(
                f"{self.path}: a parameter of shape {tuple(parameter.shape)} with strides {parameter.stride()}, "
                "expected a contiguous one.\nMake it so before the adapter is put on: "
                "`parameter.data = parameter.data.contiguous()`."
            )
        # `data`, whose changes no version counter counts: the version is set by `_write`
        return parameter.data.view(-1)

    def _write(self, wanted_M: Tensor, version: int) -> None:
        flat_N = self._flat()
        if self._written_at is None:
            flat_N.copy_(wanted_M)
        else:
            flat_N[self._written_at] = wanted_M
        if not self.parameter.is_inference():
            torch._C._autograd._unsafe_set_version_counter((self.parameter,), (version,))
        self._version = version

    def _fresh_version(self) -> int:
        return max(_version(self.parameter), self._known_version, self._base_version) + 1


def _identity(tensor: Tensor | None) -> tuple[int, int] | None:
    return None if tensor is None else (id(tensor), _version(tensor))


def _version(tensor: Tensor) -> int:
    # what was made in inference mode has none, and nobody can train it
    return 0 if tensor.is_inference() else tensor._version


def _summed(deltas: Sequence[Delta]) -> tuple[Tensor | None, Tensor]:
    """Where anything is added, and how much, float32; adapters may meet at an entry."""
    if len(deltas) == 1:
        return deltas[0].indices_M, deltas[0].values_M.detach()
    if any(delta.indices_M is None for delta in deltas):
        size = next(len(delta.values_M) for delta in deltas if delta.indices_M is None)
        indices_M, sums_M = None, deltas[0].values_M.new_zeros(size)
    else:
        indices_M = torch.cat([delta.indices_M for delta in deltas if delta.indices_M is not None]).unique()
        sums_M = deltas[0].values_M.new_zeros(len(indices_M))
    for delta in deltas:
        values_M = delta.values_M.detach()
        if delta.indices_M is None:
            sums_M += values_M
        else:
            places_M = delta.indices_M if indices_M is None else torch.searchsorted(indices_M, delta.indices_M)
            sums_M[places_M] += values_M
    return indices_M, sums_M


class _Entries(torch.autograd.Function):
    """(parameter, values…) → an alias of the parameter; the gradient of that goes to the values, gathered."""

    @staticmethod
    def forward(
        ctx: Any, parameter: Tensor, place: EntriesInPlace, indices: list[Tensor | None], *values: Tensor
    ) -> Tensor:
        ctx.place, ctx.indices, ctx.dtypes = place, indices, [tensor.dtype for tensor in values]
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # an optimizer may follow
        ctx.place.values_may_have_moved()
        gathered = [
            gathered_at(grad, indices_M).to(dtype) if wanted else None
            for indices_M, dtype, wanted in zip(ctx.indices, ctx.dtypes, ctx.needs_input_grad[3:], strict=True)
        ]
        return None, None, None, *gathered


def gathered_at(tensor: Tensor, indices_M: Tensor | None) -> Tensor:
    """The entries of a tensor at flat positions, without a contiguous copy of all of it where there is none."""
    if indices_M is None:
        return tensor.reshape(-1)
    if tensor.is_contiguous():
        return tensor.view(-1).index_select(0, indices_M)
    return tensor[torch.unravel_index(indices_M.long(), tensor.shape)]
