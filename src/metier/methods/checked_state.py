"""PEFT loads what it finds and warns of the rest; here a file is all of an adapter, or nothing of it is loaded."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from metier.errors import CorruptDeltaError

_FSDP_PART = "_fsdp_wrapped_module."


def check_state(
    model: nn.Module, layer_class: type[BaseTunerLayer], adapter_name: str, state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """`state`, once it was found to hold every parameter that an adapter has in the model, in its shape, and no other.

    Args:
        model: with the adapter on it.
        layer_class: the method's layers; their children and parameters named `<something>.<adapter>` are the adapter's.
        adapter_name: whose parameters are to be loaded.
        state: by the model's own names, as PEFT's remapping leaves it.

    Raises:
        CorruptDeltaError: a tensor is missing, foreign or of another shape; nothing was loaded.
    """
    wanted = {
        f"{path.replace(_FSDP_PART, '')}.{name}": tuple(parameter.shape)
        for path, layer in model.named_modules()
        if isinstance(layer, layer_class)
        for kind in layer.adapter_layer_names
        for name, parameter in getattr(layer, kind).named_parameters(prefix=kind)
        if name.split(".")[1] == adapter_name
    }
    for name in sorted(wanted.keys() | state.keys()):
        got = tuple(state[name].shape) if name in state else None
        if got != wanted.get(name):
            raise CorruptDeltaError(
                f"{name}: the delta holds {'no such tensor' if got is None else f'shape {got}'}, expected "
                f"{'no such tensor' if name not in wanted else f'shape {wanted[name]}'} by its configuration.\n"
                "The file is truncated or belongs to another adapter_config.json; nothing was loaded."
            )
    return state
