"""What every tuner of selected experts has in common: where it attaches, mixed batches, whole merges, whole loads."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from metier.errors import DeltaError, SelectionError
from metier.methods.adapter_state import checked_state, with_expert_ids
from metier.methods.base_of import set_base_fingerprint
from metier.methods.whole_module import COPIES, WholeModule, loadable, whole_modules
from metier.models.fingerprint import fingerprint
from metier.models.groups import group_paths
from metier.models.moe import MoELayer, moe_layers

BASE = "__base__"
"""The adapter name that stands for the base in `adapter_names`, as in PEFT."""


class ExpertTuner(BaseTuner):
    """A PEFT tuner over some experts of some layers; abstract.

    Its configuration has `experts`, `base_fingerprint`, `num_experts` and `target_modules`; its layers have
    `update_layer`, `check_merge` and `set_requests`. A batch may mix adapters: pass `adapter_names=["law", "__base__",
    …]`, one a row, to the PEFT model's forward.
    """

    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    @abstractmethod
    def _new_layer(self, view: MoELayer) -> nn.Module:
        """The tuner's layer around an experts module, without an adapter yet."""

    @abstractmethod
    def _update_layer(self, layer: nn.Module, adapter_name: str, config: PeftConfig) -> None:
        """Add an adapter to a layer."""

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        layers = {layer.index: layer for layer in moe_layers(self.model)}
        assert peft_config.experts is not None, "the configuration refuses to be made without experts"
        base = getattr(getattr(self.model, "config", None), "name_or_path", "") or type(self.model).__name__
        set_base_fingerprint(peft_config, self.model, fingerprint(self.model))
        for index, ids in peft_config.experts.items():
            _check_experts(index, ids, layers, base)
        peft_config.num_experts = max(layer.num_experts for layer in layers.values())
        peft_config.target_modules = [layers[index].path for index in peft_config.experts]
        # for the time of the injection, which asks layer by layer
        self._views = {layer.path: layer for layer in layers.values()}
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            self._update_layer(target, adapter_name, peft_config)
            return
        layer = self._new_layer(self._views[current_key])
        self._update_layer(layer, adapter_name, peft_config)
        self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's own, which may shorten a long list of target modules; the saved configuration names each layer."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        paths = {view.index: path for path, view in self._views.items()}
        config.target_modules = [paths[index] for index in config.experts]
        del self._views
        self._add_whole_modules(adapter_name, config)

    def _add_whole_modules(self, adapter_name: str, config: PeftConfig) -> None:
        """Give the adapter a copy of each module that it trains whole; PEFT switches them from here on."""
        groups = config.also_train or ()
        config.whole_modules = [path for group in groups for path in group_paths(self.model, group)] or None
        for path in config.whole_modules or ():
            parent_path, _, name = path.rpartition(".")
            parent = self.model.get_submodule(parent_path)
            module = getattr(parent, name)
            if isinstance(module, WholeModule):
                module.update(adapter_name)
                continue
            wrapper = WholeModule(module, adapter_name)
            if adapter_name not in self.active_adapters:
                wrapper.set_adapter([])
            setattr(parent, name, wrapper)
        for wrapper in whole_modules(self.model).values():
            for adapter, copy in wrapper.modules_to_save.items():
                is_trained = adapter in self.active_adapters and not self.peft_config[adapter].inference_mode
                copy.requires_grad_(is_trained)

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
        if merge:
            self._check_merge(adapter_names, safe_merge)
        unloaded: nn.Module = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        return unloaded

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        self._check_known(adapter_names or [], "adapter_names")
        for layer in self._layers():
            layer.check_merge(adapter_names, safe_merge=safe_merge)

    def _check_known(self, names: list[str], where: str) -> None:
        if unknown := sorted(set(names) - set(self.peft_config)):
            raise DeltaError(f"{where} names {unknown}, but the model has {sorted(self.peft_config)}. Load them first.")

    def _layers(self) -> list[Any]:
        return [module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls)]

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own looks for a single `weight`, which stacked experts do not have; our rows are made on their device
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """For the time of one forward pass, each row of the batch uses the adapter that `adapter_names` gives it."""
        names: list[str] | None = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise DeltaError("adapter_names mixes adapters for inference only; call model.eval() first.")
        self._check_known([name for name in names if name != BASE], "adapter_names")
        with_copies = sorted({name for name in set(names) - {BASE} if self.peft_config[name].also_train})
        if with_copies:
            raise DeltaError(
                f"adapter_names mixes adapters, but {with_copies} train whole modules beside experts, which a batch "
                "cannot mix. Answer them one adapter at a time, or merge."
            )
        layers = self._layers()
        merged = sorted({name for layer in layers for name in layer.merged_adapters})
        if merged:
            raise DeltaError(
                f"adapter_names mixes adapters, but {merged} are merged into the base. Unmerge them first."
            )
        batch = next((t for t in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if t is not None), None)
        if batch is not None and len(batch) != len(names):
            raise DeltaError(f"adapter_names has {len(names)} names for a batch of {len(batch)} rows; give one a row.")
        by_request = tuple(() if name == BASE else (name,) for name in names)
        for layer in layers:
            layer.set_requests(by_request)
        try:
            yield
        finally:
            for layer in layers:
                layer.set_requests(None)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """What PEFT saves: the rows, and which experts they are."""
        rows: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        return with_expert_ids(model, adapter_name, rows)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """What PEFT loads: the rows under the model's names, checked to be all of this adapter's and no others."""
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        copies = {path: module for path, module in whole_modules(model).items() if adapter_name in module._adapters}
        loaded = loadable(copies, adapter_name, remapped)
        own = {name for path in copies for name in loaded if name.startswith(f"{path}.{COPIES}.")}
        rows = checked_state(model, adapter_name, {name: t for name, t in loaded.items() if name not in own})
        return {**rows, **{name: loaded[name] for name in own}}


def _check_experts(index: int, ids: list[int], layers: dict[int, MoELayer], base: str) -> None:
    if index not in layers:
        raise SelectionError(
            f"layers.{index}: the adapter trains experts {ids}, but base '{base}' has no MoE layer there; "
            f"its MoE layers are {sorted(layers)}.\nLayers count from 0, dense ones included."
        )
    num_experts = layers[index].num_experts
    bad = [expert for expert in ids if not 0 <= expert < num_experts]
    if bad:
        raise SelectionError(
            f"layers.{index}: the adapter trains expert {bad[0]}, but base '{base}' has num_experts={num_experts}.\n"
            "Load the base that the selection was made on, or select again."
        )
