"""Diff pruning: learn where a difference is needed, then keep the largest as a sparse delta."""

from __future__ import annotations

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from metier.errors import ConfigError, DeltaError
from metier.methods.module_tuner import ModuleTuner
from metier.methods.sparse_delta.candidates import candidates
from metier.methods.sparse_delta.config import SparseDeltaConfig
from metier.methods.sparse_delta.diff_config import DiffPruningConfig
from metier.methods.sparse_delta.diff_layer import CANNOT_MERGE, DiffPruningLayer
from metier.methods.sparse_delta.in_place import gathered_at
from metier.methods.sparse_delta.layer import SparseDeltaLayer
from metier.methods.sparse_delta.masks.top_entries import top_entries
from metier.models.base_parameters import base_parameters, language_layer_index
from metier.models.unwrap import bare_model


class DiffPruningModel(ModuleTuner):
    """A model in diff pruning's first stage. Made by `peft.get_peft_model(model, DiffPruningConfig())`.

    The loss to train is the task's plus `penalty()`: without it no gate closes. A plain training loop adds it
    (`loss = model(**batch).loss + model.penalty()`); a trainer has to be told. Then `prune(model, density=…)` keeps the
    largest differences as a sparse delta, which may be trained on, as in the paper.
    """

    prefix = "diff_pruning_"
    tuner_layer_cls = DiffPruningLayer
    cannot_merge = CANNOT_MERGE

    def penalty(self) -> Tensor:
        """What the active adapters' gates cost, to be added to the loss; float32, ()."""
        return sum((layer.penalty() for layer in _layers(self.model).values()), start=torch.zeros(()))

    def expected_entries(self) -> float:
        """How many differences the active adapters' gates let through in the mean, for a log."""
        with torch.no_grad():
            return float(sum(layer.expected_entries() for layer in _layers(self.model).values()))

    def _chosen_modules(self, config: PeftConfig) -> list[str]:
        like = SparseDeltaConfig(target_kinds=config.target_kinds)
        return list(dict.fromkeys(found.module_path for found in candidates(self.model, like)))

    def _new_layer(self, module: nn.Module, path: str, config: PeftConfig) -> nn.Module:
        if language_layer_index(f"{path}.") is None:
            mine = {id(parameter) for parameter in module.parameters(recurse=False)}
            for found in base_parameters(self.model):
                if found.also_at and id(found.parameter) in mine:
                    raise ConfigError(
                        f"{path}: diff pruning of a parameter that is tied ({found.path} and {found.also_at[0]}) would "
                        "leave its other place as it is.\nLeave it out, or train it with SparseDeltaConfig."
                    )
        return DiffPruningLayer(module, path)


def prune(
    model: PeftModel, *, density: float | None = None, num_entries: int | None = None, adapter_name: str = "default"
) -> PeftModel:
    """The base with a sparse delta of the largest gated differences, |gate · difference|, over all parameters.

    The model is unloaded: take what is returned. The differences are those of evaluation, where gates are fixed.

    Args:
        model: with a diff-pruning adapter.
        density: share of the entries to keep, in (0, 1].
        num_entries: how many, instead.
        adapter_name: of the adapter; the sparse delta has its name.

    Raises:
        ConfigError: neither or both of density and num_entries, or more entries than there are.
        DeltaError: there is no such diff-pruning adapter.
    """
    if not isinstance(model.peft_config.get(adapter_name), DiffPruningConfig):
        raise DeltaError(
            f"prune: the model has no diff-pruning adapter '{adapter_name}', but {list(model.peft_config)}."
        )
    if (density is None) == (num_entries is None):
        raise ConfigError(f"prune: give either density or num_entries, got {density} and {num_entries}.")
    gated = {
        f"{layer.path}.{name}": layer.gated(adapter_name, name, drawn=False).detach()
        for layer in _layers(model).values()
        if adapter_name in layer.adapter_names
        for name in layer.names
    }
    size = SparseDeltaConfig(density=density, num_entries=num_entries).budget(sum(x.numel() for x in gated.values()))
    entries = top_entries({path: difference.abs for path, difference in gated.items()}, size)
    base = model.unload()
    pruned = get_peft_model(base, SparseDeltaConfig(mask="given", entries=entries), adapter_name)
    for path, indices_M in entries.items():
        module_path, _, name = path.rpartition(".")
        layer = bare_model(pruned).get_submodule(module_path)
        assert isinstance(layer, SparseDeltaLayer), "made for these entries"
        with torch.no_grad():
            layer.values_of(name)[adapter_name].copy_(gathered_at(gated[path], indices_M.to(gated[path].device)))
    return pruned


def _layers(model: nn.Module) -> dict[str, DiffPruningLayer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, DiffPruningLayer)}
