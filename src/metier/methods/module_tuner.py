"""What every tuner that stands around whole modules has in common: where it attaches, what it refuses, how it goes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from metier.errors import ConfigError, DeltaError
from metier.methods.base_of import set_base_fingerprint
from metier.models.fingerprint import fingerprint_of_any


class ModuleTuner(BaseTuner):
    """A PEFT tuner that replaces modules by layers around them, which cannot be merged; abstract.

    Its configuration has `target_modules` (paths, ends of paths, or None for the tuner's own choice) and
    `base_fingerprint`. Its layers keep what they stand for as `base_layer`, have a `path` and `adapter_names`, and
    `update_layer(adapter_name, config)` that adds an adapter which changes nothing yet.
    """

    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    cannot_merge: ClassVar[str]
    """Why, as a sentence for an error."""

    @abstractmethod
    def _chosen_modules(self, config: PeftConfig) -> list[str]:
        """Paths of the modules that an adapter stands around where its configuration names none."""

    @abstractmethod
    def _new_layer(self, module: nn.Module, path: str, config: PeftConfig) -> nn.Module:
        """The tuner's layer around a module, without an adapter yet."""

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        set_base_fingerprint(peft_config, self.model, fingerprint_of_any(self.model))
        if peft_config.target_modules is None:
            peft_config.target_modules = self._chosen_modules(peft_config)
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
            target.update_layer(adapter_name, peft_config)
            return
        layer = self._new_layer(target, current_key, peft_config)
        layer.update_layer(adapter_name, peft_config)  # type: ignore[operator]
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's own, which may shorten a long list of target modules; the saved configuration names each one."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        layers = [module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls)]
        self.peft_config[adapter_name].target_modules = [x.path for x in layers if adapter_name in x.adapter_names]

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own looks for a single `weight`, which a block does not have
        setattr(parent, child_name, new_module)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        raise DeltaError(f"merge_adapter: {self.cannot_merge}")

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            raise DeltaError(f"merge_and_unload: {self.cannot_merge}")
        unloaded: nn.Module = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        return unloaded

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            kind = type(self).__name__.removesuffix("Model")
            raise ConfigError(f"adapter_names: {kind} adapters answer one adapter at a time; set_adapter chooses it.")
        yield
