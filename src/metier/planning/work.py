"""What operations of a step cost their machine, as far as that depends on the operation: its kind and its sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Work:
    """One operation."""

    kind: str
    """`product`, `grouped product` (one of a loop over experts, which an accelerator does at once), `attention` or
    `attention gradient`, both also `masked`: by more than that what comes later is hidden; or of what computes little:
    `copy`, `function` (exponentials and their like), `gather` (rows by number), `scatter` (into rows by number) and
    `choose` (sort, count, find)."""
    dtype: torch.dtype
    sizes: tuple[int, ...]
    """Of a product (matrices, rows, inner, columns); of attention (heads and sequences, queries, keys, head_dim), of
    the rest its bytes alone."""
    num_bytes: int
    """Read and written, each number once."""
    flops: int = 0
    """Two for each multiplication and addition; none but of products and attention."""


def work_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, outputs: list[Tensor]) -> Work:
    """An operation of torch.

    Args:
        func: the ATen operator.
        args, kwargs, out: what it got and gave.
        outputs: the tensors of `out`.
    """
    packet = func._overloadpacket
    tensors = [*_flat((*args, *kwargs.values())), *outputs]
    first = next((x for x in tensors if x.dtype.is_floating_point), tensors[0])
    num_bytes = sum(map(_bytes, (*_flat(args), *outputs)))
    if packet in _OPERANDS:
        left, right = (args[place] for place in _OPERANDS[packet])
        return _product(left, right, num_bytes, is_grouped="out" in kwargs)
    if packet in _ATTENTION:
        place = _ATTENTION[packet]
        query, key = args[place], args[place + 1]
        sizes = (math.prod(query.shape[:-2]), query.shape[-2], key.shape[-2], query.shape[-1])
        # two products forward; backward one of them again and four for the gradients
        flops = (10 if place else 4) * math.prod(sizes)
        kind = "attention gradient" if place else "attention"
        if kwargs.get("attn_mask") is not None:
            kind = f"masked {kind}"
        return Work(kind, first.dtype, sizes, num_bytes, flops)
    kind = _KINDS.get(packet, "copy")
    if kind == "gather":  # of what it looks into it sees the rows that it takes
        num_bytes = 2 * sum(map(_bytes, outputs))
    elif kind == "scatter":
        num_bytes = 3 * max((_bytes(x) for x in _flat(args[1:])), default=0)
    elif packet in _UNWRITTEN:
        num_bytes = 0
    flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
    return Work(kind, first.dtype, (num_bytes,), num_bytes, flops)


def _product(left: Tensor, right: Tensor, num_bytes: int, *, is_grouped: bool) -> Work:
    """Batched, plain, one of a loop (`methods/grouped.py` alone gives products a place), or torch's grouped one.

    The rows of that are spread evenly over its groups.
    """
    rows, inner, columns = left.shape[-2], left.shape[-1], right.shape[-1]
    matrices = left.shape[0] if left.dim() == 3 else 1
    if left.dim() == 2 and right.dim() == 3:
        matrices, rows = right.shape[0], -(-rows // right.shape[0])
    flops = 2 * left.numel() * columns
    return Work(
        "grouped product" if is_grouped else "product", left.dtype, (matrices, rows, inner, columns), num_bytes, flops
    )


def _flat(values: tuple[Any, ...]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [x for x in value if isinstance(x, Tensor)]
    return found


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


_OPERANDS = {
    aten.mm: (0, 1),
    aten.bmm: (0, 1),
    aten.addmm: (1, 2),
    aten.addmm_: (1, 2),
    aten.baddbmm: (1, 2),
    aten._grouped_mm: (0, 1),
}
"""Where products have their matrices."""


def _there(*names: str) -> set[Any]:
    return {getattr(aten, name) for name in names if hasattr(aten, name)}


_ATTENTION = dict.fromkeys(
    _there(
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    ), 0,
) | dict.fromkeys(
    _there(
        "_scaled_dot_product_flash_attention_backward", "_scaled_dot_product_flash_attention_for_cpu_backward",
        "_scaled_dot_product_efficient_attention_backward", "_scaled_dot_product_cudnn_attention_backward",
    ), 1,
)  # fmt: skip
"""Where attention has its queries: a gradient is given to what computes gradients first."""
_FUNCTIONS = _there(
    "exp", "exp_", "log", "log_", "silu", "silu_", "silu_backward", "sigmoid", "sigmoid_", "sigmoid_backward", "gelu",
    "gelu_backward", "tanh", "tanh_", "tanh_backward", "_softmax", "_softmax_backward_data", "_log_softmax",
    "_log_softmax_backward_data", "logsumexp", "pow", "rsqrt", "sqrt", "sin", "cos", "erf", "softplus",
    "softplus_backward", "log1p", "bernoulli_", "native_dropout",
)  # fmt: skip
_FROM = _there("index", "index_select", "gather", "embedding", "repeat_interleave")
_INTO = _there(
    "index_add", "index_add_", "index_put", "index_put_", "_index_put_impl_", "scatter", "scatter_", "scatter_add",
    "scatter_add_", "index_copy_", "index_fill_",
)  # fmt: skip
_CHOICES = _there("sort", "topk", "argsort", "nonzero", "cumsum", "bincount", "unique_consecutive", "_unique2")
_UNWRITTEN = _there("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_KINDS = {
    **dict.fromkeys(_FUNCTIONS, "function"),
    **dict.fromkeys(_FROM, "gather"),
    **dict.fromkeys(_INTO, "scatter"),
    **dict.fromkeys(_CHOICES, "choose"),
}
