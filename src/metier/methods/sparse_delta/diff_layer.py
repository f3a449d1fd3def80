"""One module of the base with diff pruning on it: a gated difference at every entry of its parameters."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call

from metier.errors import ConfigError, DeltaError
from metier.methods.sparse_delta.diff_config import DiffPruningConfig
from metier.methods.sparse_delta.masks.hard_concrete import fixed_gates, open_chance, sampled_gates

CANNOT_MERGE = (
    "a diff-pruning adapter is dense, and its gates are still open in part, so it is not merged. Call "
    "`prune(model, density=…)`, which makes a sparse delta of it that can be."
)
_KINDS = ("diff_pruning_values_", "diff_pruning_alpha_", "diff_pruning_group_")


class DiffPruningLayer(nn.Module, BaseTunerLayer):
    """Stands in a model for a module, which it keeps as `base_layer`, and calls it with `base + gates · differences`.

    For parameter `<name>` an adapter has float32 parameters of its shape: `diff_pruning_values_<name>.<adapter>`, from
    0, and `diff_pruning_alpha_<name>.<adapter>`; with `structured` one number, `diff_pruning_group_<name>.<adapter>`.
    Gates are drawn anew in each forward pass of training, and fixed in evaluation.
    """

    def __init__(self, base_layer: nn.Module, path: str) -> None:
        super().__init__()
        self.base_layer, self.path = base_layer, path
        self.names = [name for name, _ in base_layer.named_parameters(recurse=False)]
        if not self.names:
            raise ConfigError(f"{path}: {type(base_layer).__name__} holds no parameter itself; name what lies in it.")
        self.adapter_layer_names = tuple(f"{kind}{name}" for name in self.names for kind in _KINDS)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.configs: dict[str, DiffPruningConfig] = {}
        self.other_param_names = ("configs",)
        self.merged_adapters: list[str] = []

    @property
    def adapter_names(self) -> list[str]:
        """The adapters that stand here."""
        return list(self.configs)

    def update_layer(self, adapter_name: str, config: DiffPruningConfig) -> None:
        """Add an adapter whose differences are 0, so that it changes nothing yet."""
        for name, parameter in self.base_layer.named_parameters(recurse=False):
            zeros = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            values, alpha, group = (getattr(self, f"{kind}{name}") for kind in _KINDS)
            values[adapter_name] = nn.Parameter(zeros)
            alpha[adapter_name] = nn.Parameter(torch.full_like(zeros, config.alpha_init))
            if config.structured:
                group[adapter_name] = nn.Parameter(zeros.new_full((), config.alpha_init))
        self.configs[adapter_name] = config
        BaseTunerLayer.set_adapter(self, BaseTunerLayer.active_adapters.fget(self))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base layer's, with the active adapters' gated differences on its parameters."""
        adapters = self._active()
        if not adapters:
            return self.base_layer(*args, **kwargs)
        weights = {}
        for name, parameter in self.base_layer.named_parameters(recurse=False):
            added = sum(
                (self.gated(a, name, drawn=self.training) for a in adapters), start=torch.zeros(()).to(parameter)
            )
            weights[name] = (parameter + added).to(parameter.dtype)
        return functional_call(self.base_layer, weights, args, kwargs)

    def gated(self, adapter_name: str, name: str, *, drawn: bool) -> Tensor:
        """An adapter's differences on one parameter times its gates, float32."""
        config, values, alpha, group = self._of(adapter_name, name)
        gates = sampled_gates if drawn else fixed_gates
        out = values * gates(alpha, lower=config.lower, upper=config.upper)
        return out if group is None else out * gates(group, lower=config.lower, upper=config.upper)

    def expected_entries(self) -> Tensor:
        """How many differences the active adapters' gates let through in the mean; differentiable."""
        return sum((self._expected(a, n) for a in self._active() for n in self.names), start=torch.zeros(()))

    def penalty(self) -> Tensor:
        """`expected_entries`, each weighted by its adapter's `penalty_weight`."""
        terms = (
            self.configs[adapter].penalty_weight * self._expected(adapter, name)
            for adapter in self._active()
            for name in self.names
        )
        return sum(terms, start=torch.zeros(()))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise DeltaError(f"{self.path}: {CANNOT_MERGE}")

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def _expected(self, adapter_name: str, name: str) -> Tensor:
        config, _, alpha, group = self._of(adapter_name, name)
        chance = open_chance(alpha, lower=config.lower, upper=config.upper).sum()
        return chance if group is None else chance * open_chance(group, lower=config.lower, upper=config.upper)

    def _of(self, adapter_name: str, name: str) -> tuple[DiffPruningConfig, Tensor, Tensor, Tensor | None]:
        values, alpha, group = (dict(getattr(self, f"{kind}{name}").items()).get(adapter_name) for kind in _KINDS)
        assert values is not None, f"{self.path} has adapter {adapter_name}"
        assert alpha is not None, f"{self.path} has adapter {adapter_name}"
        return self.configs[adapter_name], values, alpha, group

    def _active(self) -> list[str]:
        active: list[str] = BaseTunerLayer.active_adapters.fget(self)
        return [] if self.disable_adapters else [name for name in active if name in self.configs]
