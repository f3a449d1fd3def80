"""The ESFT tuner: put `EsftExperts` where a selection says, through PEFT's own machinery."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from metier.errors import BaseMismatchError, CorruptDeltaError, DeltaError, SelectionError
from metier.methods.esft.config import EsftConfig
from metier.methods.esft.layer import EsftExperts
from metier.models.fingerprint import fingerprint
from metier.models.moe import MoELayer, moe_layers

BASE = "__base__"
"""The adapter name that stands for the base in `adapter_names`, as in PEFT."""


class EsftModel(BaseTuner):
    """A model with ESFT adapters. Made by `peft.get_peft_model(model, EsftConfig(experts={1: [8, 26]}))`.

    A batch may mix adapters: pass `adapter_names=["law", "__base__", …]`, one a row, to the PEFT model's forward.
    """

    prefix = "esft_"
    tuner_layer_cls = EsftExperts
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: EsftConfig, model_config: dict[str, Any]) -> EsftConfig:
        layers = {layer.index: layer for layer in moe_layers(self.model)}
        assert peft_config.experts is not None, "EsftConfig refuses to be made without experts"
        base = getattr(getattr(self.model, "config", None), "name_or_path", "") or type(self.model).__name__
        found = fingerprint(self.model)
        if peft_config.base_fingerprint not in (None, found):
            raise BaseMismatchError(
                f"The adapter was trained on '{peft_config.base_model_name_or_path}' with fingerprint "
                f"{peft_config.base_fingerprint[:12]}, but is put on '{base}' with fingerprint {found[:12]}.\n"
                "Load the base that it was trained on, or train it again on this one."
            )
        for index, ids in peft_config.experts.items():
            _check_experts(index, ids, layers, base)
        peft_config.base_fingerprint = found
        peft_config.num_experts = max(layer.num_experts for layer in layers.values())
        peft_config.target_modules = [layers[index].path for index in peft_config.experts]
        return peft_config

    def _create_and_replace(
        self,
        peft_config: EsftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        view = next(layer for layer in moe_layers(self.model) if layer.path == current_key)
        assert peft_config.experts is not None
        expert_ids = peft_config.experts[view.index]
        if isinstance(target, EsftExperts):
            target.update_layer(adapter_name, expert_ids)
            return
        layer = EsftExperts(view)
        layer.update_layer(adapter_name, expert_ids)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

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
        unknown = sorted(set(names) - set(self.peft_config) - {BASE})
        if unknown:
            raise DeltaError(
                f"adapter_names names {unknown}, but the model has {sorted(self.peft_config)}. Load them first."
            )
        layers = [module for module in self.model.modules() if isinstance(module, EsftExperts)]
        by_request = tuple(() if name == BASE else (name,) for name in names)
        for layer in layers:
            layer.set_requests(by_request)
        try:
            yield
        finally:
            for layer in layers:
                layer.set_requests(None)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's own remapping, then a check that nothing is missing, foreign or of another shape.

        PEFT loads with `strict=False` and warns; a delta with a tensor too few would quietly serve base experts.
        """
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        wanted = {
            name: tuple(p.shape)
            for name, p in model.named_parameters()
            if f".{cls.prefix}" in name and name.endswith(f".{adapter_name}")
        }
        for name in sorted(wanted.keys() | remapped.keys()):
            got = tuple(remapped[name].shape) if name in remapped else None
            if got != wanted.get(name):
                raise CorruptDeltaError(
                    f"{name}: the delta holds {'no such tensor' if got is None else f'shape {got}'}, expected "
                    f"{'no such tensor' if name not in wanted else f'shape {wanted[name]}'} by its configuration.\n"
                    "The file is truncated or belongs to another adapter_config.json; nothing was loaded."
                )
        return remapped


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
