"""The ladder tuner: put a side network beside a decoder, through PEFT's own machinery."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from torch import nn

from metier.errors import ConfigError
from metier.methods.ladder.climb import Ladder
from metier.methods.ladder.layer import CANNOT_MERGE, LadderLayer, LadderPart, LadderTop
from metier.methods.parameter_tuner import ParameterTuner
from metier.models.decoder import DecoderParts, decoder_parts
from metier.models.feed_forward import hidden_size_of


class LadderModel(ParameterTuner):
    """A model with ladders beside it. Made by `peft.get_peft_model(model, LadderConfig(reduction=8))`.

    Any decoder of transformers whose layers hand on one hidden state, dense or MoE: a layer is looked at as a whole,
    whatever is inside. Nothing of the backbone but the last norm and the output layer has a part in the backward pass,
    so gradient checkpointing has nothing to save; it may be on and changes nothing.

    Paper: LST, arXiv:2206.06522. Departures: the side network's layers are of one kind for every family (rotary
    positions, gated MLP) and begin at random, not as pruned layers of the backbone; the backbone's last hidden state is
    added to what the side network ends in, so that a new adapter changes nothing.
    """

    prefix = "ladder_"
    tuner_layer_cls = LadderPart
    cannot_merge = CANNOT_MERGE

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        peft_config.side_size(hidden_size_of(self.model))  # refuses what cannot be made before anything is
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        expected = self._chosen_modules(peft_config)
        if sorted(peft_config.target_modules) != sorted(expected):
            odd = sorted(set(peft_config.target_modules) ^ set(expected))
            raise ConfigError(
                f"LadderConfig: target_modules must be all decoder layers and the last norm or None, got a list that "
                f"differs in {', '.join(odd[:3])}.\nlayer_stride says at which layers the side network looks."
            )
        return peft_config

    def _chosen_modules(self, config: PeftConfig) -> list[str]:
        parts = self._parts()
        return [*parts.layer_paths, parts.norm_path]

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool:
        """By whole paths alone: the end of one, such as `norm`, may be that of another module."""
        return key in peft_config.target_modules

    def _new_layer(self, module: nn.Module, path: str, config: PeftConfig) -> nn.Module:
        hidden_size, ladder = hidden_size_of(self.model), self._ladder()
        layer_paths = self._parts().layer_paths
        if path in layer_paths:
            return LadderLayer(module, path, hidden_size, ladder, layer_paths.index(path))
        return LadderTop(module, path, hidden_size, ladder)

    def _parts(self) -> DecoderParts:
        # found once, while nothing is replaced yet
        if "_decoder_parts" not in vars(self):
            self._decoder_parts = decoder_parts(self.model)
        return self._decoder_parts

    def _ladder(self) -> Ladder:
        """What the layers share; made, and told of every forward pass, with the first of them."""
        known = next((module.ladder for module in self.model.modules() if isinstance(module, LadderPart)), None)
        if known is not None:
            return known
        parts = self._parts()
        ladder = Ladder(len(parts.layer_paths))
        ladder.watch(self.model.get_submodule(parts.path))
        return ladder

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        ladder = self._ladder()
        unloaded = super()._unload_and_optionally_merge(*args, **kwargs)
        ladder.leave()
        return unloaded
