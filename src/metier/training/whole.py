"""Sharded tensors made whole again, once a run is over: those that are saved, and those that say which base it was."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor

from metier.models.fingerprint import fingerprint_tensors


def make_whole(model: nn.Module) -> None:
    """Put whole tensors in place of the shards of what was trained, and of what a base's fingerprint is made of.

    All processes must call this; whole tensors are on the CPU. The rest stays sharded, so that the model computes no
    more.
    """
    named = {id(tensor) for tensor in fingerprint_tensors(model)}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if isinstance(parameter, DTensor) and (parameter.requires_grad or id(parameter) in named):
                whole = nn.Parameter(parameter.detach().full_tensor().cpu(), requires_grad=parameter.requires_grad)
                module._parameters[name] = whole
