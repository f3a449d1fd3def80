"""A dense feed-forward block taken apart: up projections, what lies between, and the down projection."""

# T tokens, D hidden_size, U width of an up projection, F inner width (U, or half of it where gate and up are one)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metier.errors import UnsupportedModelError

_GATED = (("gate_proj", "up_proj"), "down_proj")
_FUSED = (("gate_up_proj",), "down_proj")
_PLAIN = (
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("fc_in",), "fc_out"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")


@dataclass(frozen=True, slots=True)
class DenseMlp:
    """`down(between(up(x), …))`, its projections being called as the modules that they are, adapters on them included.

    The block is `act(gate) * up` between its projections, where `gate` and `up` are two of them or the halves of one;
    or `act(up)` where there is no gate.
    """

    module: nn.Module
    up_names: tuple[str, ...]
    down_name: str
    activation_name: str
    is_fused: bool
    hidden_size: int
    """D"""
    up_size: int
    """U"""
    inner_size: int
    """F"""

    @property
    def has_gate(self) -> bool:
        return self.is_fused or len(self.up_names) == 2

    def ups(self, hidden_TD: Tensor) -> tuple[Tensor, ...]:
        """(T, U) of each up projection."""
        return tuple(getattr(self.module, name)(hidden_TD) for name in self.up_names)

    def between(self, *ups_TU: Tensor) -> Tensor:
        """(T, F), row by row."""
        activation = getattr(self.module, self.activation_name)
        gate_TF, *rest = ups_TU[0].chunk(2, dim=-1) if self.is_fused else ups_TU
        inner_TF: Tensor = activation(gate_TF)
        return inner_TF * rest[0] if rest else inner_TF

    def down(self, inner_TF: Tensor) -> Tensor:
        """(T, D)"""
        out_TD: Tensor = getattr(self.module, self.down_name)(inner_TF)
        return out_TD


def dense_mlp(module: nn.Module, path: str) -> DenseMlp:
    """Take a block apart, and compare what its parts compute with what it computes, to the bit.

    Args:
        module: a feed-forward block without MoE.
        path: of the block, for errors.

    Raises:
        UnsupportedModelError: its projections or its activation have no known names, it has dropout, or it computes
            something else.
    """
    kind, children = type(module).__name__, set(module._modules)
    found = next((f for f in (_GATED, _FUSED, *_PLAIN) if children.issuperset((*f[0], f[1]))), None)
    activation = next((name for name in _ACTIVATIONS if callable(getattr(module, name, None))), None)
    if found is None or activation is None:
        raise UnsupportedModelError(
            f"{path}: {kind} has {', '.join(sorted(children)) or 'no children'}, expected the projections and the "
            f"activation of a dense feed-forward block, such as gate_proj, up_proj, down_proj and act_fn."
        )
    _refuse_dropout(module, path)
    ups, down_name = found
    (hidden_size, up_size), (inner_size, _) = _sizes(module, ups[0], path), _sizes(module, down_name, path)
    mlp = DenseMlp(module, ups, down_name, activation, found is _FUSED, hidden_size, up_size, inner_size)
    if not _computes_the_same(mlp):
        raise UnsupportedModelError(
            f"{path}: {kind} computes something else than {down_name}({activation}({ups[0]}(x))"
            f"{' * up' if mlp.has_gate else ''}), so its experts would not be changes of it."
        )
    return mlp


def _refuse_dropout(module: nn.Module, path: str) -> None:
    own = {name: value for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)}
    inner = {name: child.p for name, child in module.named_modules() if isinstance(child, nn.Dropout)}
    for name, share in {**own, **inner}.items():
        if share:
            raise UnsupportedModelError(
                f"{path}: {type(module).__name__} has {name}={share}, which its experts would go without.\n"
                "Set it to 0 in the model's configuration."
            )


def _sizes(module: nn.Module, name: str, path: str) -> tuple[int, int]:
    """Inputs and outputs of a projection, a linear layer or GPT-2's transposed one."""
    projection: Any = getattr(module, name)
    for inputs, outputs in (("in_features", "out_features"), ("nx", "nf")):
        if hasattr(projection, inputs):
            return int(getattr(projection, inputs)), int(getattr(projection, outputs))
    raise UnsupportedModelError(f"{path}.{name}: {type(projection).__name__} does not say how wide it is.")


@torch.no_grad()
def _computes_the_same(mlp: DenseMlp) -> bool:
    parameter = next(mlp.module.parameters())
    if parameter.is_meta:
        return True  # there is nothing to compare
    dtype = parameter.dtype if parameter.dtype.is_floating_point else torch.float32
    probe_TD = torch.linspace(-2, 2, 3 * mlp.hidden_size, device=parameter.device).view(3, -1).to(dtype)
    try:
        expected = mlp.module(probe_TD)
    except TypeError:  # it wants more than a hidden state
        return False
    return isinstance(expected, Tensor) and torch.equal(expected, mlp.down(mlp.between(*mlp.ups(probe_TD))))
