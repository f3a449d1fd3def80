"""What a method attaches to, part by part: printed before training, and an error where a part is skipped in silence."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import peft
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from metier.errors import ConfigError
from metier.models.parts import part_paths
from metier.models.unwrap import bare_model, base_path

_FEED_FORWARD = ("dense", "shared", "routed")


@dataclass(frozen=True, slots=True)
class Covered:
    """One part of a model."""

    part: str
    num_modules: int
    num_covered: int
    """Of them, those that the method changes, or stands beside."""
    kinds: tuple[str, ...]
    """Last names of those modules, such as `q_proj`."""

    def __str__(self) -> str:
        if not self.num_covered:
            return f"{self.part}: none of {self.num_modules}"
        return f"{self.part}: {self.num_covered} of {self.num_modules} ({', '.join(self.kinds)})"


def coverage(model: nn.Module) -> list[Covered]:
    """Of each part that the model has, how much of it the method on it covers.

    A module counts if an adapter or a trained parameter stands at its place, or at that of a module around it.
    """
    bare = bare_model(model)
    places = {base_path(path) for path, module in bare.named_modules() if isinstance(module, BaseTunerLayer)}
    places |= {
        base_path(name).rpartition(".")[0] for name, parameter in bare.named_parameters() if parameter.requires_grad
    }
    rows = []
    for part, paths in part_paths(model).items():
        covered = [path for path in paths if _is_covered(path, places)]
        kinds = tuple(dict.fromkeys(path.rpartition(".")[2] for path in covered))
        rows.append(Covered(part, len(paths), len(covered), kinds))
    return rows


def _is_covered(path: str, places: set[str]) -> bool:
    names = path.split(".")
    return any(".".join(names[: number + 1]) in places for number in range(len(names)))


def check_coverage(
    model: peft.PeftModel, wanted: Collection[str], *, names_modules: bool, method: str
) -> list[Covered]:
    """The coverage of an adapter that was just made.

    Args:
        model: with the adapter on it.
        wanted: the parts that it was to go on; none where it has a place of its own.
        names_modules: whether the run named modules instead.
        method: its name, for errors.

    Raises:
        ConfigError: it attaches to nothing, to no module of a part that was wanted, or, where modules were named that
            feed-forward blocks have, to some kinds of these and silently not to others.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"{method}: nothing of the model would be trained. Check what its options name.")
    rows = coverage(model)
    if not names_modules:
        skipped = [row for row in rows if row.part in wanted and not row.num_covered]
        if skipped:
            raise ConfigError(
                f"{method}: was to go on {', '.join(row.part for row in skipped)}, but nothing of it is covered: "
                f"{'; '.join(map(str, rows))}.\nPEFT turns names of feed-forward layers into routed experts in some "
                "families. Use another method for this part, or leave it out of targets."
            )
        return rows
    named = [row for row in rows if row.part in _FEED_FORWARD]
    if any(row.num_covered for row in named) and not all(row.num_covered for row in named):
        raise ConfigError(
            f"{method}: its target_modules cover feed-forward layers of one kind and silently skip another: "
            f"{'; '.join(map(str, rows))}.\nSay by `targets` which parts are meant: "
            f"targets: {','.join(row.part for row in rows if row.num_covered)}."
        )
    return rows
