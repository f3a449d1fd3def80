"""What a model's router did on some data, as counts and sums.

A `RoutingProfile` never holds averages: so two of them add up to exactly the profile of both data sets, and
every score can be derived afterwards. `metier.routing.profile` measures one.
"""

# H halves (even and odd sequences), L MoE layers, E experts

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from metier.errors import DataError, SelectionError
from metier.routing import profile_files
from metier.routing.policy import Score, SelectionConfig, jaccard, pick_experts
from metier.routing.scores import gate_score_LE, raw_gate_score_LE, token_ratio_LE

RELIABLE = 0.9
"""Split-half agreement under which a profile is called unreliable."""
PAPER_SELECTION = SelectionConfig(score="token", top_p=0.2)
_SAME_IN_A_MERGE = ("fingerprint", "adapter")


class UnreliableProfileWarning(UserWarning):
    """The two halves of a profile's data select different experts."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RoutingProfile:
    """How often, and how strongly, each expert of each MoE layer was chosen on some data."""

    layer_ids: tuple[int, ...]
    """Decoder layers, rising; row l of every tensor is decoder layer layer_ids[l]."""
    num_experts: int
    top_k: int
    token_counts_HLE: Tensor
    """Routing slots received, int64, (2, num_layers, num_experts): even sequences, odd sequences."""
    gate_mass_HLE: Tensor
    """Sum of routing weights received, float64, (2, num_layers, num_experts)."""
    num_tokens_H: tuple[int, int]
    meta: dict[str, str] = field(default_factory=dict)
    """What it was measured on: model, fingerprint, sequence length …"""

    def __post_init__(self) -> None:
        shape = (2, len(self.layer_ids), self.num_experts)
        for name, dtype in (("token_counts_HLE", torch.int64), ("gate_mass_HLE", torch.float64)):
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise DataError(
                    f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}: two "
                    f"halves, {shape[1]} layers, {shape[2]} experts.\nMeasure the profile again."
                )

    @property
    def num_tokens(self) -> int:
        return sum(self.num_tokens_H)

    @property
    def token_ratio_LE(self) -> Tensor:
        """Share of routing slots, float32, (num_layers, num_experts), rows sum to 1."""
        return self.scores_LE("token")

    @property
    def gate_score_LE(self) -> Tensor:
        """Share of gate mass, float32, (num_layers, num_experts), rows sum to 1."""
        return self.scores_LE("gate")

    def scores_LE(self, score: Score, *, half: int | None = None) -> Tensor:
        """A layer's scores by expert: float32, (num_layers, num_experts), each row sums to 1.

        Args:
            score: "token" for the share of routing slots, "gate" for the share of gate mass.
            half: 0 or 1 for the even or odd sequences alone; None for all.

        Raises:
            SelectionError: nothing was counted.
        """
        return self._exact_scores_LE(score, half=half).to(torch.float32)

    def raw_gate_scores_LE(self) -> Tensor:
        """Mean gate a token: the paper's own scale, float32, (num_layers, num_experts).

        Rows sum to 1 only where the router renormalises the gates of the chosen experts; the router's scaling
        factor, where it has one, is inside (see `metier.routing.scores.raw_gate_score_LE`).
        """
        return raw_gate_score_LE(self.gate_mass_HLE.sum(dim=0), num_tokens=self.num_tokens).to(torch.float32)

    def picked(self, config: SelectionConfig, *, half: int | None = None) -> dict[int, tuple[int, ...]]:
        """The experts that `config` picks in each layer, by falling score."""
        rows = self._exact_scores_LE(config.score, half=half).tolist()
        return {layer: pick_experts(row, top_p=config.top_p) for layer, row in zip(self.layer_ids, rows, strict=True)}

    def reliability(self, config: SelectionConfig) -> float | None:
        """Split-half agreement: Jaccard of what each half alone selects, mean over layers, from 0 to 1.

        None where a half is empty, so that nothing can be said.
        """
        if min(self.num_tokens_H) == 0:
            return None
        even, odd = self.picked(config, half=0), self.picked(config, half=1)
        return sum(jaccard(even[layer], odd[layer]) for layer in self.layer_ids) / len(self.layer_ids)

    def warn_if_unreliable(self, config: SelectionConfig, *, stacklevel: int = 2) -> None:
        """Issue an `UnreliableProfileWarning` where the two halves disagree on `config`, or one is empty."""
        reliability = self.reliability(config)
        if reliability is not None and reliability >= RELIABLE:
            return
        found = "one half is empty" if reliability is None else f"Jaccard {reliability:.2f}, expected {RELIABLE}"
        warnings.warn(
            f"routing profile of {self.num_tokens} tokens: its two halves select different experts with "
            f"{config.score} scores and top_p={config.top_p} ({found}).\nProfile more tokens of the task.",
            UnreliableProfileWarning,
            stacklevel=stacklevel + 1,
        )

    def merge(self, other: RoutingProfile) -> RoutingProfile:
        """The profile of both data sets together, exact to the last bit and independent of the order.

        Raises:
            SelectionError: the profiles are of different shapes, models or adapters.
        """
        for name in ("layer_ids", "num_experts", "top_k"):
            _refuse_difference(name, getattr(self, name), getattr(other, name))
        for name in _SAME_IN_A_MERGE:
            if name in self.meta and name in other.meta:
                _refuse_difference(name, self.meta[name], other.meta[name])
        return RoutingProfile(
            layer_ids=self.layer_ids,
            num_experts=self.num_experts,
            top_k=self.top_k,
            token_counts_HLE=self.token_counts_HLE + other.token_counts_HLE,
            gate_mass_HLE=self.gate_mass_HLE + other.gate_mass_HLE,
            num_tokens_H=(
                self.num_tokens_H[0] + other.num_tokens_H[0],
                self.num_tokens_H[1] + other.num_tokens_H[1],
            ),
            meta=_merged_meta(self.meta, other.meta),
        )

    def __add__(self, other: RoutingProfile) -> RoutingProfile:
        return self.merge(other)

    def save(self, folder: str | Path) -> None:
        """Write profile.safetensors and profile.json (for people: what was measured, and how reliable it
        is)."""
        tensors = {"token_counts_HLE": self.token_counts_HLE, "gate_mass_HLE": self.gate_mass_HLE}
        settings = (PAPER_SELECTION, SelectionConfig(score="gate", top_p=PAPER_SELECTION.top_p))
        description = {
            "num_tokens": self.num_tokens,
            "num_tokens_H": list(self.num_tokens_H),
            "layer_ids": list(self.layer_ids),
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "split_half_jaccard": {
                f"{c.score} scores, top_p={c.top_p}": self.reliability(c) for c in settings if self.num_tokens
            },
            "meta": self.meta,
        }
        profile_files.write(Path(folder), tensors, description)

    @classmethod
    def load(cls, folder: str | Path) -> RoutingProfile:
        """Read what `save` wrote.

        Raises:
            DataError: a file is missing or broken.
        """
        tensors, description = profile_files.read(Path(folder))
        even, odd = description["num_tokens_H"]
        return cls(
            layer_ids=tuple(description["layer_ids"]),
            num_experts=description["num_experts"],
            top_k=description["top_k"],
            num_tokens_H=(even, odd),
            meta=dict(description["meta"]),
            **tensors,
        )

    def _exact_scores_LE(self, score: Score, *, half: int | None) -> Tensor:
        counted_HLE = self.token_counts_HLE if score == "token" else self.gate_mass_HLE
        counted_LE = counted_HLE.sum(dim=0) if half is None else counted_HLE[half]
        return token_ratio_LE(counted_LE) if score == "token" else gate_score_LE(counted_LE)


def _refuse_difference(name: str, mine: object, theirs: object) -> None:
    if mine != theirs:
        raise SelectionError(
            f"{name}: got a profile with {theirs!r}, expected {mine!r} as in the profile that it is merged "
            f"into.\nOnly profiles of one model add up; profile both data sets with the same model."
        )


def _merged_meta(mine: dict[str, str], theirs: dict[str, str]) -> dict[str, str]:
    """Equal values stay; different ones are listed, sorted, so that the order of merging does not show."""
    merged = {}
    for name in sorted(mine.keys() | theirs.keys()):
        values = {part for meta in (mine, theirs) if name in meta for part in meta[name].split(" + ")}
        merged[name] = " + ".join(sorted(values))
    return merged
