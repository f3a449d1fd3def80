"""The MEFT tuner: put `MeftLayer` around feed-forward blocks, through PEFT's own machinery."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from metier.errors import BaseMismatchError, ConfigError, DeltaError
from metier.memory.row_store import link
from metier.methods.meft.config import MeftConfig
from metier.methods.meft.layer import CANNOT_MERGE, MeftLayer
from metier.methods.meft.state import load_rows, with_rows
from metier.models.feed_forward import feed_forward_paths, hidden_size_of, num_layers_of
from metier.models.fingerprint import fingerprint_of_any


class MeftModel(BaseTuner):
    """A model with MEFT adapters. Made by `peft.get_peft_model(model, MeftConfig(r=6144))`.

    Train it with `metier.memory.RowAdamW`: its rows are no parameters, and another optimizer would not move them.
    """

    prefix = "meft_"
    tuner_layer_cls = MeftLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        assert isinstance(peft_config, MeftConfig), "registered with this tuner"
        found = fingerprint_of_any(self.model)
        if peft_config.base_fingerprint not in (None, found):
            base = getattr(getattr(self.model, "config", None), "name_or_path", "") or type(self.model).__name__
            raise BaseMismatchError(
                f"The adapter was trained on '{peft_config.base_model_name_or_path}' with fingerprint "
                f"{peft_config.base_fingerprint[:12]}, but is put on '{base}' with fingerprint {found[:12]}.\n"
                "Load the base that it was trained on, or train it again on this one."
            )
        peft_config.base_fingerprint = found
        if peft_config.target_modules is None:
            peft_config.target_modules = feed_forward_paths(self.model)
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
        assert isinstance(peft_config, MeftConfig), "registered with this tuner"
        num_layers = num_layers_of(self.model)
        if isinstance(target, MeftLayer):
            target.update_layer(adapter_name, peft_config, num_layers=num_layers)
            return
        layer = MeftLayer(target, current_key, hidden_size_of(self.model))
        layer.update_layer(adapter_name, peft_config, num_layers=num_layers)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's own, which may shorten a long list of target modules; the saved configuration names each block."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        layers = [module for module in self.model.modules() if isinstance(module, MeftLayer)]
        self.peft_config[adapter_name].target_modules = [x.path for x in layers if adapter_name in x.stores]
        link([layer.stores[adapter_name] for layer in layers if adapter_name in layer.stores])

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own looks for a single `weight`, which a block does not have
        setattr(parent, child_name, new_module)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        raise DeltaError(f"merge_adapter: {CANNOT_MERGE}")

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            raise DeltaError(f"merge_and_unload: {CANNOT_MERGE}")
        unloaded: nn.Module = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        return unloaded

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ConfigError("adapter_names: MEFT adapters answer one adapter at a time; set_adapter chooses it.")
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
        """What PEFT saves: routers and rows."""
        state: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        return with_rows(model, adapter_name, state)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """What PEFT loads: the rows go into their stores here, and the routers are left to it."""
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        return load_rows(model, adapter_name, remapped)
