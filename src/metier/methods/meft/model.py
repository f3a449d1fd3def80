"""The MEFT tuner: put `MeftLayer` around feed-forward blocks, through PEFT's own machinery."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from torch import Tensor, nn

from metier.memory.row_store import link
from metier.methods.meft.layer import CANNOT_MERGE, MeftLayer
from metier.methods.meft.state import load_rows, with_rows
from metier.methods.module_tuner import ModuleTuner
from metier.models.feed_forward import feed_forward_paths, hidden_size_of, num_layers_of


class MeftModel(ModuleTuner):
    """A model with MEFT adapters. Made by `peft.get_peft_model(model, MeftConfig(r=6144))`.

    Train it with `metier.memory.RowAdamW`: its rows are no parameters, and another optimizer would not move them.
    """

    prefix = "meft_"
    tuner_layer_cls = MeftLayer
    cannot_merge = CANNOT_MERGE

    def _chosen_modules(self, config: PeftConfig) -> list[str]:
        return feed_forward_paths(self.model)

    def _new_layer(self, module: nn.Module, path: str, config: PeftConfig) -> nn.Module:
        return MeftLayer(module, path, hidden_size_of(self.model), num_layers=num_layers_of(self.model))

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's own; then the rows of all layers know of each other."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        layers = [module for module in self.model.modules() if isinstance(module, MeftLayer)]
        link([layer.stores[adapter_name] for layer in layers if adapter_name in layer.stores])

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
        """What PEFT loads: routers, and rows, which the layers put into their stores."""
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        return load_rows(model, adapter_name, remapped)
