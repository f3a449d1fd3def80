"""The sparse-delta tuner: put `SparseDeltaLayer` around modules whose parameters have chosen entries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from metier.errors import ConfigError, DeltaError
from metier.methods.base_of import set_base_fingerprint
from metier.methods.sparse_delta.choose import choose_entries
from metier.methods.sparse_delta.config import WHOLE, SparseDeltaConfig
from metier.methods.sparse_delta.entries import checked_entries, planned_counts, sizes_of
from metier.methods.sparse_delta.layer import SparseDeltaLayer
from metier.methods.sparse_delta.state import load_indices, with_indices
from metier.models.base_parameters import base_parameters
from metier.models.fingerprint import fingerprint_of_any
from metier.models.linear_biases import switches_for_biases, take_biases
from metier.models.unwrap import base_path, original_module


class SparseDeltaModel(BaseTuner):
    """A model with sparse deltas. Made by `peft.get_peft_model(model, SparseDeltaConfig(density=0.005))`.

    Gradients that stay and optimizer state exist for the chosen entries alone. A backward pass holds the dense gradient
    of one parameter at a time. Weight decay pulls a delta to 0, which is to the base and not to a weight of 0.

    Several active adapters add up, as LT-SFT composes them; an entry that two of them train is the base plus both
    differences. Not under FSDP, which shards the parameters that are written to.
    """

    prefix = "sparse_delta_"
    tuner_layer_cls = SparseDeltaLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        set_base_fingerprint(peft_config, self.model, fingerprint_of_any(self.model))
        sizes = sizes_of(self.model)
        if peft_config.entries is None and peft_config.num_entries_by_parameter is None:
            self._choose(peft_config)
        if peft_config.entries is not None:
            peft_config.entries = checked_entries(peft_config.entries, sizes)
            peft_config.num_entries_by_parameter = {p: len(i) for p, i in peft_config.entries.items()}
        _check_counts(peft_config.num_entries_by_parameter, sizes, {p.path for p in base_parameters(self.model)})
        # as parameters: PEFT saves whole embeddings where `lm_head` or `embed_tokens` is a target
        peft_config.target_modules = list(peft_config.num_entries_by_parameter)
        return peft_config

    def _choose(self, config: SparseDeltaConfig) -> None:
        # of parameters that are trained whole, nothing but their number need be known
        if config.mask in WHOLE or any(parameter.is_meta for parameter in self.model.parameters()):
            config.num_entries_by_parameter = planned_counts(self.model, config)
        else:
            config.entries = choose_entries(self.model, config)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Make the layers, also inside modules that have one: PEFT's own search ends at the first."""
        if not any(isinstance(module, SparseDeltaLayer) for module in model.modules()):
            for parameter in model.parameters():
                parameter.requires_grad_(False)
        for path, counts in _by_module(peft_config.num_entries_by_parameter).items():
            layer = self._layer_at(path)
            entries = peft_config.entries and {name: peft_config.entries[f"{path}.{name}"] for name in counts}
            layer.update_layer(self._injected, counts, entries)
            if self._injected not in self.active_adapters:
                for name in counts:
                    layer.values_of(name)[self._injected].requires_grad_(False)
        self._tie(peft_config)

    def _layer_at(self, path: str) -> SparseDeltaLayer:
        """The layer around a module of the base, by the module's path in the bare model; made where there is none."""
        parent, name = self.model, ""
        module: nn.Module = self.model
        for name in path.split("."):
            parent = original_module(module)
            module = parent.get_submodule(name)
        if isinstance(module, SparseDeltaLayer):
            return module
        layer = SparseDeltaLayer(module, path)
        layer.train(module.training)
        # a new layer has PEFT's default as its active adapter
        layer.set_adapter(list(self.active_adapters))
        setattr(parent, name, layer)
        return layer

    def _tie(self, config: SparseDeltaConfig) -> None:
        """Where a parameter has other places in the model, have gradients of those reach its values too."""
        for found in base_parameters(self.model):
            if found.also_at and found.path in (config.num_entries_by_parameter or {}):
                owner = self._layer_at(found.module_path)
                for path in found.also_at:
                    module_path, _, name = path.rpartition(".")
                    self._layer_at(module_path).owners[name] = (owner, found.name)

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:
        return base_path(key) in {path.rpartition(".")[0] for path in peft_config.num_entries_by_parameter}

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        """Done by `_prepare_model`, before PEFT's own search."""

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own, which unloading calls, looks for a single `weight`, which stacked experts do not have
        setattr(parent, child_name, new_module)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's own."""
        self._injected = adapter_name
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        # PEFT's own shortens long lists
        config = self.peft_config[adapter_name]
        config.target_modules = list(config.num_entries_by_parameter)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge in every layer, or in none where one of them cannot be merged."""
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        switches = self._check_merge(adapter_names, safe_merge) if merge else ()
        unloaded: nn.Module = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if switches:
            take_biases(unloaded, switches)
        return unloaded

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> tuple[str, ...]:
        if unknown := sorted(set(adapter_names or []) - set(self.peft_config)):
            raise DeltaError(f"adapter_names names {unknown}, but the model has {sorted(self.peft_config)}.")
        layers = [module for module in self.model.modules() if isinstance(module, SparseDeltaLayer)]
        for layer in layers:
            layer.check_merge(adapter_names, safe_merge=safe_merge)
        biases = [path for layer in layers for path in layer.added_biases(adapter_names)]
        return switches_for_biases(self.model, biases) if biases else ()

    def _check_merge_allowed(self) -> None:
        """PEFT's own warns of tied embeddings; here what is tied is one parameter before and after."""

    def _check_tied_modules(self, model: nn.Module, peft_config: PeftConfig) -> None:
        """As `_check_merge_allowed`."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ConfigError("adapter_names: sparse deltas answer a whole batch alike; set_adapter chooses which.")
        yield

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """What PEFT saves: differences and positions."""
        state: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        return with_indices(model, adapter_name, state)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """What PEFT loads: positions go into their layers here, and the differences are left to it."""
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        return load_indices(model, adapter_name, remapped)


def _by_module(counts: dict[str, int]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for path, count in counts.items():
        module_path, _, name = path.rpartition(".")
        found.setdefault(module_path, {})[name] = count
    return found


def _check_counts(counts: dict[str, int], sizes: dict[str, int], there: set[str]) -> None:
    if not counts:
        raise ConfigError("SparseDeltaConfig: no entry was chosen; raise density or num_entries.")
    for path, count in counts.items():
        if path not in sizes or not 1 <= count <= sizes[path] or (path not in there and count != sizes[path]):
            expected = f"1 to {sizes[path]}" if path in there else "all" if path in sizes else "no such parameter"
            raise ConfigError(
                f"{path}: the configuration trains {count} entries, expected {expected} of this base.\n"
                "It was made for another base, or a new bias is not trained whole."
            )
