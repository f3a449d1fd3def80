"""See through PEFT's wrappers to the base model, so that a layer has one path, wrapped or not.

PEFT puts `base_model.model.` before every path and hides a tuned module under a child named `base_layer` (or
`original_module`). Everything that metier says about a layer is about the base's module at the base's path.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_INNER_NAMES = ("base_layer", "original_module")


def bare_model(model: nn.Module) -> nn.Module:
    """The model under a `PeftModel` or under a tuner; any other model is returned as it is."""
    kind = type(model)  # not the instance: tuners answer for the model that they hold
    if hasattr(kind, "get_base_model"):
        inner = model.get_base_model()  # type: ignore[operator]
    elif "peft_config" in vars(model) and not hasattr(kind, "save_pretrained"):
        inner = model.model  # a tuner: LoraModel, EsftModel …
    else:
        return model
    assert isinstance(inner, nn.Module), f"PEFT returned {type(inner).__name__} as the base model"
    return bare_model(inner)


def text_config_of(model: nn.Module) -> Any:
    """The configuration of the part of a transformers model that reads text, the model maybe wrapped by PEFT."""
    config: Any = bare_model(model).config
    return config.get_text_config()


def base_path(path: str) -> str:
    """`path` inside a wrapped bare model, as the same module is called in the unwrapped one."""
    return ".".join(part for part in path.split(".") if part not in _INNER_NAMES)


def original_module(module: nn.Module) -> nn.Module:
    """The base's own module under any number of PEFT wrappers around it."""
    for name in _INNER_NAMES:
        # look among the registered children: wrappers may forward unknown attributes to what they wrap
        inner = module._modules.get(name)
        if inner is not None:
            return original_module(inner)
    return module


def show_base(model: nn.Module) -> None:
    """Have every wrapper whose adapter's values stand in the base's own tensors put the base's back, to the bit.

    Whoever reads the base's tensors under an active adapter calls this first. The next forward pass puts the adapter's
    values where they were.
    """
    for module in model.modules():
        _show_base_of(module)


def _show_base_of(module: nn.Module) -> None:
    restore = getattr(type(module), "restore_base", None)  # not the instance: wrappers answer for what they wrap
    if restore is not None:
        restore(module)


def base_module(model: nn.Module, path: str) -> nn.Module | None:
    """The base's own module at `path` of the bare model, whatever PEFT has put around it or around a module that it
    lies in; None where there is none."""
    module = bare_model(model)
    for name in path.split(".") if path else ():
        child = original_module(module)._modules.get(name)
        if child is None:
            return None
        module = child
    return original_module(module)


def base_tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers of the base in `module`, under the base's names; adapters' tensors are
    left out."""
    _show_base_of(module)
    module = original_module(module)
    yield from own_tensors(module, prefix)
    for name, child in module.named_children():
        yield from base_tensors(child, f"{prefix}{name}.")


def own_tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers that `module` itself holds, without its children's."""
    for name, parameter in module.named_parameters(recurse=False):
        yield f"{prefix}{name}", parameter
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield f"{prefix}{name}", buffer
