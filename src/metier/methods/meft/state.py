"""What PEFT saves and loads of a MEFT adapter: routers, and the rows that lie in stores and in no `state_dict`."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from metier.errors import CorruptDeltaError
from metier.methods.meft.layer import HOLDER, ROWS, MeftLayer

ROUTER = "meft_router"
_PEFT_PREFIX = "base_model.model."


def with_rows(model: nn.Module, adapter_name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the rows of every layer, (r, 2, D), and without what only stands for them in an optimizer.

    Args:
        model: with the adapter on it.
        adapter_name: whose parameters `state` holds.
        state: by the model's own names, such as `….mlp.meft_router.default`.
    """
    kept = {name: tensor for name, tensor in state.items() if f".{HOLDER}." not in name}
    return kept | {
        f"{path}.{ROWS}.{adapter_name}": layer.stores[adapter_name].saved()
        for path, layer in _layers(model, adapter_name)
    }


def load_rows(model: nn.Module, adapter_name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state that PEFT loads, once all of a file was found to fit; the layers put its rows into their stores then.

    Args:
        model: with the adapter on it.
        adapter_name: whose rows are to be replaced.
        state: parameters by the model's own names, rows by their stored ones, without an adapter name.

    Raises:
        CorruptDeltaError: a tensor is missing, foreign or of another shape; nothing was loaded.
    """
    layers, left = dict(_layers(model, adapter_name)), dict(state)
    rows = {path: _taken(left, path, ROWS) for path in layers}
    for path, layer in layers.items():
        store = layer.stores[adapter_name]
        _check(f"{path}.{ROWS}", rows[path], (store.num_rows, 2, store.hidden_size))
        _check(f"{path}.{ROUTER}", left.get(f"{path}.{ROUTER}.{adapter_name}"), (store.num_blocks, store.hidden_size))
    foreign = sorted(name for name in left if not name.endswith(f".{ROUTER}.{adapter_name}"))
    if foreign:
        raise CorruptDeltaError(
            f"{foreign[0]}: the delta holds a tensor that no layer of its configuration has; nothing was loaded.\n"
            "The file belongs to another adapter_config.json."
        )
    for path, layer in layers.items():
        tensor = rows[path]
        assert tensor is not None, "checked above"
        left[f"{path}.{ROWS}.{adapter_name}"] = tensor
        # PEFT would warn of a parameter that no file holds
        left[f"{path}.{HOLDER}.{adapter_name}"] = layer.meft_gradients[adapter_name].detach()
    return left


def _layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, MeftLayer]]:
    for path, module in model.named_modules():
        if isinstance(module, MeftLayer) and adapter_name in module.stores:
            yield path, module


def _taken(state: dict[str, Tensor], path: str, name: str) -> Tensor | None:
    # where the tuner was put into the model itself, files still have PEFT's prefix
    for stored in (f"{path}.{name}", f"{_PEFT_PREFIX}{path}.{name}"):
        if stored in state:
            return state.pop(stored)
    return None


def _check(name: str, tensor: Tensor | None, expected: tuple[int, ...]) -> None:
    if tensor is None or tuple(tensor.shape) != expected:
        got = "no such tensor" if tensor is None else f"shape {tuple(tensor.shape)}"
        raise CorruptDeltaError(
            f"{name}: the delta holds {got}, expected shape {expected} by its configuration; nothing was loaded.\n"
            "The file is truncated or belongs to another adapter_config.json."
        )
