"""What a delta holds, from its files alone: neither the base nor a tensor is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from metier.deltas.format import TENSORS_FILE
from metier.deltas.read import Delta, read_delta

_UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True, slots=True)
class DeltaSummary:
    """A delta in figures; prints itself with rich."""

    folder: Path
    method: str
    base_name: str | None
    base_fingerprint: str | None
    experts: dict[int, tuple[int, ...]]
    num_experts: int | None
    """Routed experts a layer of the base."""
    also_train: tuple[str, ...]
    """Groups of modules that are replaced whole."""
    num_parameters: int
    num_bytes: int
    """Of the tensors' file."""
    dtypes: tuple[str, ...]
    ranks: tuple[int, ...]
    """Of a LoRA's changes, each once; empty where rows replace the base's."""
    base_expert_parameters: int | None
    """Of all routed experts of the base; known where metier saved the delta."""
    metier_version: str | None
    has_sums: bool

    @property
    def expert_share(self) -> float | None:
        """The delta's parameters as a share of those of the base's routed experts."""
        return None if self.base_expert_parameters is None else self.num_parameters / self.base_expert_parameters

    def __rich__(self) -> Group:
        return Group(self._facts(), self._layers())

    def _facts(self) -> Table:
        table = Table(title=Text(str(self.folder)), show_header=False, title_justify="left")
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        num_selected = sum(len(ids) for ids in self.experts.values())
        share = _UNKNOWN if self.expert_share is None else f"{self.expert_share:.2%}"
        for name, value in (
            ("method", self.method),
            ("base", self.base_name or _UNKNOWN),
            ("base's fingerprint", self.base_fingerprint or _UNKNOWN),
            ("layers", str(len(self.experts))),
            ("experts", str(num_selected)),
            *([("whole modules", ", ".join(self.also_train))] if self.also_train else []),
            ("parameters", f"{self.num_parameters:,}"),
            ("of the base's experts", share),
            ("bytes", f"{self.num_bytes:,}"),
            ("dtype", ", ".join(self.dtypes)),
            *([("rank", ", ".join(map(str, self.ranks)))] if self.ranks else []),
            ("written by", f"metier {self.metier_version}" if self.metier_version else "PEFT"),
            ("sums", "checked" if self.has_sums else "none in the files"),
        ):
            table.add_row(name, Text(value))
        return table

    def _layers(self) -> Table:
        table = Table()
        table.add_column("layer", justify="right")
        table.add_column("experts", justify="right")
        table.add_column("ids", overflow="fold")
        of = "" if self.num_experts is None else f" of {self.num_experts}"
        for layer, ids in self.experts.items():
            table.add_row(str(layer), f"{len(ids)}{of}", ", ".join(map(str, ids)))
        return table


def inspect(folder: str | Path) -> DeltaSummary:
    """Read a delta with all checks of its files, and sum it up.

    Raises:
        CorruptDeltaError: as `read_delta`.
    """
    return summarise(read_delta(folder))


def summarise(delta: Delta) -> DeltaSummary:
    """The summary of a delta that is read already."""
    known = delta.metadata.get("base_expert_parameters")
    low_rank, experts = delta.config.low_rank, delta.config.experts
    ranks = {low_rank.rank(n, e) for n, ids in experts.items() for e in ids} if low_rank is not None else set()
    return DeltaSummary(
        folder=delta.folder,
        method=delta.config.method,
        base_name=delta.config.base_name,
        base_fingerprint=delta.config.base_fingerprint,
        experts=delta.config.experts,
        num_experts=delta.config.num_experts,
        num_parameters=sum(tensor.num_parameters for tensor in delta.tensors.values()),
        num_bytes=(delta.folder / TENSORS_FILE).stat().st_size,
        also_train=delta.config.also_train,
        ranks=tuple(sorted(ranks)),
        dtypes=tuple(sorted({tensor.dtype for tensor in delta.tensors.values()})),
        base_expert_parameters=None if known is None else int(known),
        metier_version=delta.metadata.get("metier_version"),
        has_sums=delta.has_sums,
    )
