"""What a model's router did on some data, as counts and sums.

A `RoutingProfile` never holds averages: so two of them add up to exactly the profile of both data sets, and
every score can be derived afterwards. `metier.routing.profile` measures one.
"""

# H halves (even and odd sequences), L MoE layers, E experts

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from metier.errors import DataError, SelectionError
from metier.routing import profile_files
from metier.routing.merging import merged, refuse_other_model
from metier.routing.policy import Score, SelectionConfig, mean_jaccard, pick
from metier.routing.scores import (
    gate_score_LE,
    output_norm_score_LE,
    positive_share_LE,
    raw_gate_score_LE,
    raw_output_norm_LE,
    token_ratio_LE,
)
from metier.routing.selection_config import Scale

RELIABLE = 0.9
"""Split-half agreement under which a profile is called unreliable."""
PAPER_SELECTION = SelectionConfig(score="token", top_p=0.2)
_DTYPES = {"token_counts_HLE": torch.int64, "gate_mass_HLE": torch.float64, "output_norm_HLE": torch.float64}


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
    output_norm_HLE: Tensor | None = None
    """Sum of the norms of the weighted outputs, float64, (2, num_layers, num_experts); None where they were
    not measured."""
    meta: dict[str, str] = field(default_factory=dict)
    """What it was measured on: model, fingerprint, sequence length …"""

    def __post_init__(self) -> None:
        shape = (2, len(self.layer_ids), self.num_experts)
        for name, dtype in _DTYPES.items():
            tensor = getattr(self, name)
            if tensor is None and name == "output_norm_HLE":
                continue
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

    def scores_LE(self, score: Score, *, half: int | None = None, scale: Scale = "normalised") -> Tensor:
        """A layer's scores by expert: float32, (num_layers, num_experts).

        Args:
            score: "token" for the share of routing slots, "gate" for the share of gate mass, "output_norm" for
                the share of the weighted outputs' norms.
            half: 0 or 1 for the even or odd sequences alone; None for all.
            scale: "normalised", each row sums to 1; "raw", the mean a token (token scores are the same in
                both).

        Raises:
            SelectionError: nothing was counted, output norms were not measured, or the raw scale was asked for an
                encoder-decoder.
        """
        return self.exact_scores_LE(score, half=half, scale=scale).to(torch.float32)

    def exact_scores_LE(self, score: Score, *, half: int | None = None, scale: Scale = "normalised") -> Tensor:
        """As `scores_LE`, in float64: what experts are ranked by, so that near ties stay apart."""
        counted_HLE = self._counted_HLE(score)
        counted_LE = counted_HLE.sum(dim=0) if half is None else counted_HLE[half]
        if score == "token":
            return token_ratio_LE(counted_LE)
        if scale == "raw" and "encoder_decoder" in self.meta:
            raise SelectionError(
                "scale: got 'raw', the mean a token, for an encoder-decoder, whose layers see different tokens.\n"
                "Use the scale 'normalised'."
            )
        if scale == "normalised":
            return gate_score_LE(counted_LE) if score == "gate" else output_norm_score_LE(counted_LE)
        num_tokens = self.num_tokens if half is None else self.num_tokens_H[half]
        raw_LE = raw_gate_score_LE if score == "gate" else raw_output_norm_LE
        return raw_LE(counted_LE, num_tokens=num_tokens)

    def raw_gate_scores_LE(self) -> Tensor:
        """Mean gate a token: the paper's own scale, float32, (num_layers, num_experts).

        Rows sum to 1 only where the router renormalises the gates of the chosen experts; the router's scaling
        factor, where it has one, is inside (see `metier.routing.scores.raw_gate_score_LE`).
        """
        return self.scores_LE("gate", scale="raw")

    def ranking_LE(
        self, config: SelectionConfig, *, half: int | None = None, general: RoutingProfile | None = None
    ) -> Tensor:
        """What `config`'s policy ranks by: float64, (num_layers, num_experts).

        With `minus_general`, the task's scores (of `half`) minus the general ones (of all general data); for
        `top_p`, which needs a share, clipped and normalised as `metier.routing.scores.positive_share_LE`.

        Raises:
            SelectionError: as `scores_LE`; `general` is missing, not needed, or of another model.
        """
        scores_LE = self.exact_scores_LE(config.score, half=half, scale=config.scale)
        if general is None:
            return scores_LE
        refuse_other_model(self, general, role="the task's profile", why="A difference of scores needs one model")
        difference_LE = scores_LE - general.exact_scores_LE(config.score, scale=config.scale)
        return difference_LE if config.top_p is None else positive_share_LE(difference_LE)

    def picked(
        self,
        config: SelectionConfig,
        *,
        half: int | None = None,
        general: RoutingProfile | None = None,
        expert_bytes: Mapping[int, int] | None = None,
    ) -> dict[int, tuple[int, ...]]:
        """The experts that `config` picks in each layer, by falling score; arguments as
        `metier.routing.selection.select`. With `budget_bytes` layers may be missing."""
        config.check_inputs(general=general, expert_bytes=expert_bytes)
        rows = self.ranking_LE(config, half=half, general=general).tolist()
        return pick(dict(zip(self.layer_ids, rows, strict=True)), config, expert_bytes=expert_bytes)

    def reliability(
        self,
        config: SelectionConfig,
        *,
        general: RoutingProfile | None = None,
        expert_bytes: Mapping[int, int] | None = None,
    ) -> float | None:
        """Split-half agreement: Jaccard of what each half alone selects, mean over layers, from 0 to 1.

        None where a half is empty, so that nothing can be said.
        """
        if min(self.num_tokens_H) == 0:
            return None
        even, odd = (self.picked(config, half=half, general=general, expert_bytes=expert_bytes) for half in (0, 1))
        return mean_jaccard(even, odd)

    def warn_if_unreliable(
        self,
        config: SelectionConfig,
        *,
        general: RoutingProfile | None = None,
        expert_bytes: Mapping[int, int] | None = None,
        stacklevel: int = 2,
    ) -> None:
        """Issue an `UnreliableProfileWarning` where the two halves disagree on `config`, or one is empty."""
        reliability = self.reliability(config, general=general, expert_bytes=expert_bytes)
        if reliability is not None and reliability >= RELIABLE:
            return
        found = "one half is empty" if reliability is None else f"Jaccard {reliability:.2f}, expected {RELIABLE}"
        warnings.warn(
            f"routing profile of {self.num_tokens} tokens: its two halves select different experts with "
            f"{config.score_name} and {config.policy_name} ({found}).\nProfile more tokens of the task.",
            UnreliableProfileWarning,
            stacklevel=stacklevel + 1,
        )

    def merge(self, other: RoutingProfile) -> RoutingProfile:
        """The profile of both data sets together, exact to the last bit and independent of the order.

        Raises:
            SelectionError: the profiles are of different shapes, models or adapters, or output norms were
                measured in one alone.
        """
        return merged(self, other)

    def __add__(self, other: RoutingProfile) -> RoutingProfile:
        return self.merge(other)

    def save(self, folder: str | Path) -> None:
        """Write profile.safetensors and profile.json (for people: what was measured, and how reliable it
        is)."""
        tensors = {"token_counts_HLE": self.token_counts_HLE, "gate_mass_HLE": self.gate_mass_HLE}
        if self.output_norm_HLE is not None:
            tensors["output_norm_HLE"] = self.output_norm_HLE
        settings = (PAPER_SELECTION, SelectionConfig(score="gate", top_p=PAPER_SELECTION.top_p))
        description = {
            "num_tokens": self.num_tokens,
            "num_tokens_H": list(self.num_tokens_H),
            "layer_ids": list(self.layer_ids),
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "split_half_jaccard": {
                f"{c.score_name}, {c.policy_name}": self.reliability(c) for c in settings if self.num_tokens
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

    def _counted_HLE(self, score: Score) -> Tensor:
        if score == "token":
            return self.token_counts_HLE
        if score == "gate":
            return self.gate_mass_HLE
        if self.output_norm_HLE is None:
            raise SelectionError(
                "output_norm: this profile was measured without output norms.\n"
                "Measure it again with output_norms=True, or select by another score."
            )
        return self.output_norm_HLE
