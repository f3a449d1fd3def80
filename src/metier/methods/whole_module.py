"""Modules that an adapter on experts trains whole: a copy beside the base's own, as PEFT's `modules_to_save` has it.

PEFT saves, switches and deletes such copies by itself. What differs here: a copy has float32 masters and computes in
the base's dtype; only parameters are saved; merging writes into the base's module, and unloading gives it back as it
was.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.func import functional_call

from metier.errors import ConfigError, CorruptDeltaError, SelectionError
from metier.models.groups import GROUPS
from metier.routing.selection import ExpertSelection

COPIES = "modules_to_save"
"""The child of a `WholeModule` that holds an adapter's copy, by PEFT's name."""


def checked_groups(groups: Iterable[str] | None, where: str) -> list[str] | None:
    """The groups to train whole, each once, in the order of `GROUPS`; None where there are none.

    Raises:
        ConfigError: an unknown group; names the nearest.
    """
    if groups is None:
        return None
    named = [groups] if isinstance(groups, str) else list(groups)
    for group in named:
        if group not in GROUPS:
            nearest = difflib.get_close_matches(str(group), GROUPS, n=1, cutoff=0.5)
            hint = f"Did you mean '{nearest[0]}'?" if nearest else f"The groups are: {', '.join(GROUPS)}."
            raise ConfigError(f"{where}: also_train: got {group!r}, which is no group of modules. {hint}")
    return [group for group in GROUPS if group in named] or None


def groups_of(selection: ExpertSelection, also_train: Iterable[str]) -> list[str] | None:
    """The groups that a selection and the caller want trained whole.

    Raises:
        SelectionError: the selection's `non_expert_modules`, which stands for more than the groups there are.
    """
    if selection.non_expert_modules:
        raise SelectionError(
            "the selection has non_expert_modules=True, which in ESFT's own code means everything but experts, "
            "embeddings and the output layer included.\nSet it to false and name what to train: "
            f"also_train=[{', '.join(repr(group) for group in GROUPS[1:])}]."
        )
    return [*also_train, *(["shared_experts"] if selection.shared_experts else [])] or None


class WholeModule(ModulesToSaveWrapper):
    """Stands in a model for a module, which it keeps as `original_module`; each adapter has a copy of its own."""

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        """Add an adapter's copy, which begins as the base's module with parameters of at least float32."""
        is_new = adapter_name not in self.modules_to_save
        super().update(adapter_name, **kwargs)
        for parameter in self.modules_to_save[adapter_name].parameters() if is_new else ():
            if parameter.dtype.itemsize < 4:
                parameter.data = parameter.data.float()

    def parameter_names(self) -> list[str]:
        """Names of the parameters of the module, which are the same in every copy."""
        return [name for name, _ in self.original_module.named_parameters()]

    def copy_of(self, adapter_name: str) -> nn.Module | None:
        """An adapter's copy, or None where it has none here."""
        copy: nn.Module | None = dict(self.modules_to_save.named_children()).get(adapter_name)
        return copy

    def served(self, adapter_name: str) -> dict[str, Tensor]:
        """An adapter's parameters in the dtypes of the base's: what the forward pass computes with."""
        dtypes = {name: parameter.dtype for name, parameter in self.original_module.named_parameters()}
        copy = self.modules_to_save[adapter_name]
        return {name: parameter.to(dtypes[name]) for name, parameter in copy.named_parameters()}

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active_adapters:
            return self.original_module(*args, **kwargs)
        adapter = self.active_adapters[0]
        return functional_call(self.modules_to_save[adapter], self.served(adapter), args, kwargs)

    def _getattr_wrapped(self, name: str, modules: Any) -> Any:
        """What a model reads of the module without calling it: of a parameter, what the forward pass computes with."""
        copy = modules[COPIES][self.active_adapters[0]]
        value, original = getattr(copy, name), getattr(self.original_module, name)
        return value.to(original.dtype) if isinstance(value, nn.Parameter) else value

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base's module: with the values of the active (or named) adapter, or as it was."""
        names = [n for n in (adapter_names or self.active_adapters) if n in self._adapters] if merge else []
        for adapter in names:
            write(self.original_module, self.served(adapter))
        original: nn.Module = self.original_module
        return original

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """What PEFT saves: the parameters, without buffers, which are the base's."""
        if adapter_name not in self._adapters:
            return {}
        return {name: state_dict[f"{COPIES}.{adapter_name}.{name}"] for name in self.parameter_names()}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Nothing for PEFT to rename, which would end in a KeyError where a file lacks a tensor: see `loadable`."""
        return {}


def whole_modules(model: nn.Module) -> dict[str, WholeModule]:
    """The modules of which some adapter has a copy, by their path in `model`."""
    return {path: module for path, module in model.named_modules() if isinstance(module, WholeModule)}


@torch.no_grad()
def write(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Put values into a module's parameters, in place."""
    for name, parameter in module.named_parameters():
        parameter.copy_(values[name])


def loadable(modules: dict[str, WholeModule], adapter_name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the parameters of an adapter's whole modules under the model's own names, all of them.

    Args:
        modules: of the adapter, by their path in the model.
        adapter_name: whose copies are to be loaded.
        state: by stored names; what belongs to no whole module is left as it is.

    Raises:
        CorruptDeltaError: a parameter is missing or has another shape.
    """
    result = dict(state)
    for path, module in modules.items():
        for name, parameter in module.original_module.named_parameters():
            stored = f"{path}.{name}"
            got = result.pop(stored, None)
            if got is None or got.shape != parameter.shape:
                raise CorruptDeltaError(
                    f"{stored}: the delta holds {'no such tensor' if got is None else f'shape {tuple(got.shape)}'}, "
                    f"expected shape {tuple(parameter.shape)}, for its configuration says that {path} is trained.\n"
                    "The file is truncated or belongs to another adapter_config.json; nothing was loaded."
                )
            result[f"{path}.{COPIES}.{adapter_name}.{name}"] = got
    return result
