"""A tuner around modules whose adapters are parameters and nothing else: what is loaded is checked, all of it."""

from __future__ import annotations

from peft import PeftConfig
from peft.tuners.tuners_utils import _filter_state_dict_by_key_prefixes, _get_tuner_state_dict_key_prefixes
from torch import Tensor, nn

from metier.errors import CorruptDeltaError
from metier.methods.module_tuner import ModuleTuner


class ParameterTuner(ModuleTuner):
    """A `ModuleTuner` that refuses files which do not fit; abstract.

    PEFT loads with `strict=False` and warns; an adapter with a tensor too few would quietly be half an adapter.
    """

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """What PEFT loads: the parameters of the file by the model's names.

        Raises:
            CorruptDeltaError: a parameter is missing, foreign or of another shape; nothing was loaded.
        """
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        of_model: dict[str, Tensor] = model.state_dict()
        prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
        wanted = _filter_state_dict_by_key_prefixes(of_model, prefixes)
        foreign = remapped.keys() - of_model.keys()
        for name in sorted(wanted.keys() | foreign):
            got = tuple(remapped[name].shape) if name in remapped else None
            expected = tuple(wanted[name].shape) if name in wanted else None
            if got != expected:
                raise CorruptDeltaError(
                    f"{name}: the delta holds {'no such tensor' if got is None else f'shape {got}'}, expected "
                    f"{'no such tensor' if expected is None else f'shape {expected}'} by its configuration; "
                    "nothing was loaded.\nThe file is truncated or belongs to another adapter_config.json."
                )
        return remapped
