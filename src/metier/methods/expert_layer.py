"""What all tuner layers around an experts module have in common: the base, who is active, whose experts are whose."""

# E experts of the base

from __future__ import annotations

from typing import ClassVar

from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from metier.methods.expert_bank import Activation, ExpertBank
from metier.models.moe import MoELayer


class ExpertTunerLayer(nn.Module, BaseTunerLayer):
    """Stands in a model for an experts module of transformers' contract, which it keeps as `base_layer`; abstract.

    An adapter has `parameter_names`, each a ParameterDict over adapters, and under `ids_name` the ids of its experts.
    """

    ids_name: ClassVar[str]
    """Attribute, and name in a file: which experts an adapter's rows are."""

    def __init__(self, view: MoELayer, parameter_names: tuple[str, ...]) -> None:
        super().__init__()
        self.base_layer = view.experts
        self.layer_index, self.path = view.index, view.path
        self.num_experts, self.is_transposed, self.has_gate = view.num_experts, view.is_transposed, view.has_gate
        self.has_output_norm = view.has_post_expert_norm
        self.base_names = view.parameter_names()
        self.adapter_layer_names = parameter_names
        self.other_param_names = (self.ids_name,)
        for name in parameter_names:
            setattr(self, name, nn.ParameterDict())
        # not in `state_dict`, of which accelerate shards every entry; `adapter_state.py` puts them into what PEFT saves
        setattr(self, self.ids_name, BufferDict({}, persistent=False))
        self.merged_adapters: list[str] = []
        self._adapters_by_request: tuple[tuple[str, ...], ...] | None = None

    def expert_ids(self, adapter_name: str) -> list[int]:
        """Which experts an adapter is of here; empty if it does not touch this layer."""
        if adapter_name not in self._ids():
            return []
        ids: list[int] = self._ids()[adapter_name].tolist()
        return ids

    def set_requests(self, adapters_by_request: tuple[tuple[str, ...], ...] | None) -> None:
        """For the next forward passes: which adapters each row of the batch uses; None for the active ones."""
        self._adapters_by_request = adapters_by_request

    def _ids(self) -> BufferDict:
        ids: BufferDict = getattr(self, self.ids_name)
        return ids

    def _active(self) -> list[str]:
        names: list[str] = BaseTunerLayer.active_adapters.fget(self)
        return names

    def _base(self) -> ExpertBank:
        up, tensors = self.base_names[0], {name: getattr(self.base_layer, name) for name in self.base_names}
        return ExpertBank(tensors[up], tensors["down_proj"], tensors.get(f"{up}_bias"), tensors.get("down_proj_bias"))

    def _activation(self) -> Activation:
        activation: Activation = getattr(self.base_layer, "_apply_gate" if self.has_gate else "act_fn")
        return activation

    def _output_norm(self) -> Activation | None:
        if not self.has_output_norm:
            return None
        norm: Activation = self.base_layer.get_submodule("post_expert_norm")
        return norm
