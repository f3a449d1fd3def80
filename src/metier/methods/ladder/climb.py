"""What the parts of a ladder tell each other in one forward pass: the decoder's inputs, and the side states so far."""

# B rows, T tokens of a row, K tokens that are looked at, D hidden_size, S side_size

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from metier.errors import UnsupportedModelError
from metier.methods.ladder.scope import Scope, scope_of
from metier.methods.ladder.side import Remember, SideRung
from metier.methods.ladder.side_cache import side_cache_layer


@dataclass(slots=True)
class Climb:
    """One forward pass of the decoder."""

    inputs: dict[str, Any]
    """What the decoder was called with, by name."""
    num_past: int
    """Tokens that its cache held then."""
    scope: Scope | None = None
    sides: dict[str, Tensor] = field(default_factory=dict)
    """Side states (B, T, S) of the active adapters."""


class Ladder:
    """Shared by all layers of a model that a ladder stands at; `begin` is a hook on the decoder."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        # replicas of torch's DataParallel run in threads of one process
        self._climbs: dict[int, Climb] = {}
        self._hook: RemovableHandle | None = None

    def watch(self, decoder: nn.Module) -> None:
        """From now on, know of every forward pass."""
        self._hook = decoder.register_forward_pre_hook(self.begin, with_kwargs=True)

    def leave(self) -> None:
        """Take the hook away."""
        if self._hook is not None:
            self._hook.remove()

    def begin(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A new forward pass."""
        names = list(inspect.signature(type(decoder).forward).parameters)[1:] if args else []
        inputs = dict(zip(names, args, strict=False)) | kwargs
        cache = inputs.get("past_key_values")
        self._climbs[get_ident()] = Climb(inputs, 0 if cache is None else int(cache.get_seq_length()))

    def rung(
        self, adapter_name: str, path: str, rung: SideRung, before_BTD: Tensor, after_BTD: Tensor, cache: Any
    ) -> None:
        """One decoder layer has run: the side network's part beside it."""
        climb = self._climb(path)
        if climb.scope is None:
            climb.scope = scope_of(
                climb.inputs, num_past=climb.num_past, has_cache=cache is not None, hidden_BTD=after_BTD
            )
        remember: Remember | None = None
        if cache is not None:
            place = (adapter_name, path)
            layer = side_cache_layer(cache, place, num_layers=self.num_layers, num_past=climb.num_past)
            remember = partial(layer.update)
        side_BTS = climb.sides.get(adapter_name)
        if side_BTS is not None:
            side_BTS = side_BTS.to(after_BTD.device)  # layers may be spread over devices
        climb.sides[adapter_name] = rung(side_BTS, before_BTD, after_BTD, climb.scope, remember)

    @property
    def sides(self) -> dict[str, Tensor]:
        """Side states of the forward pass so far, by adapter."""
        climb = self._climbs.get(get_ident())
        return {} if climb is None else climb.sides

    def end(self) -> dict[str, Tensor]:
        """The last side states; the pass is over, and nothing of it is held any longer."""
        climb = self._climbs.pop(get_ident(), None)
        return {} if climb is None else climb.sides

    def _climb(self, path: str) -> Climb:
        climb = self._climbs.get(get_ident())
        if climb is None:
            raise UnsupportedModelError(
                f"{path}: was called outside of its decoder's forward pass, of whose inputs a ladder makes the side "
                "network's mask.\nCall the model as a whole."
            )
        return climb
