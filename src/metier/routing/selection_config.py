"""What a user says about a selection: by which score experts are ranked, and by which policy they are taken.

Torch-free, like `metier.routing.policy` that acts on it. docs/selection.md says which to use when.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from metier.errors import ConfigError, SelectionError

Score = Literal["gate", "token", "output_norm"]
SCORES: tuple[Score, ...] = ("gate", "token", "output_norm")
Scale = Literal["normalised", "raw"]
SCALES: tuple[Scale, ...] = ("normalised", "raw")
POLICIES = ("top_p", "top_k", "top_fraction", "budget_bytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionConfig:
    """How experts are chosen from a profile: a score, and exactly one of the four policies."""

    score: Score
    """"token": share of routing slots; "gate": share of gate mass; "output_norm": share of the weighted
    outputs' norms, for profiles that were measured with `output_norms=True`."""
    top_p: float | None = None
    """Policy: share of one layer's score that the selected experts must cover, in (0, 1]."""
    top_k: int | None = None
    """Policy: experts a layer. Not the router's top_k."""
    top_fraction: float | None = None
    """Policy: share of a layer's experts, in (0, 1], rounded up to whole experts."""
    budget_bytes: int | None = None
    """Policy: bytes that all selected experts of all layers may take together."""
    scale: Scale = "normalised"
    """"normalised": a layer's scores sum to 1; "raw": the mean a token, which is the paper's gate scale.
    Token scores are the same in both."""
    minus_general: bool = False
    """Rank by the task's score minus that of general data, whose profile is given where experts are
    picked."""

    def __post_init__(self) -> None:
        _one_of("score", self.score, SCORES)
        named = [f"{name}={getattr(self, name)!r}" for name in POLICIES if getattr(self, name) is not None]
        if len(named) != 1:
            raise ConfigError(
                f"policy: got {' and '.join(named) or 'none'}, expected exactly one of {', '.join(POLICIES)}.\n"
                f"{'Leave all but one out' if named else 'Name one, such as top_p=0.2, the setting of the paper'}."
            )
        _share("top_p", self.top_p, "the paper's setting for token scores is 0.2")
        _count("top_k", self.top_k, "it is the number of experts to take in each layer")
        _share("top_fraction", self.top_fraction, "0.25 takes a quarter of each layer's experts")
        _count("budget_bytes", self.budget_bytes, "it is a whole number of bytes for all layers together")
        _one_of("scale", self.scale, SCALES)
        if not isinstance(self.minus_general, bool):
            raise ConfigError(f"minus_general: got {self.minus_general!r}, expected True or False.")
        if self.top_p is not None and (self.score, self.scale) == ("output_norm", "raw") and not self.minus_general:
            raise ConfigError(
                "scale: got 'raw' for output_norm scores with top_p, but norms have no unit that a share could "
                "be taken of.\nUse scale='normalised', or another policy."
            )

    @property
    def score_name(self) -> str:
        """The score in words, for messages: "token scores", "raw gate scores minus general" …"""
        raw = "raw " if self.scale == "raw" else ""
        return f"{raw}{self.score} scores{' minus general' if self.minus_general else ''}"

    @property
    def policy_name(self) -> str:
        """The policy in words, for messages: "top_p=0.2" …"""
        return next(f"{name}={getattr(self, name)}" for name in POLICIES if getattr(self, name) is not None)

    def check_inputs(self, *, general: object | None, expert_bytes: object | None) -> None:
        """Check that what this configuration needs beside the task's profile is there, and nothing else.

        Args:
            general: the profile of general data, or None.
            expert_bytes: bytes an expert, by decoder layer, or None.

        Raises:
            SelectionError: one of them is missing, or would be ignored.
        """
        for name, got, key, needed, what in (
            ("general", general, "minus_general", self.minus_general, "the profile of general data"),
            ("expert_bytes", expert_bytes, "budget_bytes", self.budget_bytes is not None, "bytes an expert by layer"),
        ):
            if needed and got is None:
                raise SelectionError(
                    f"{name}: got none, but {key}={getattr(self, key)} needs {what}.\n"
                    f"Pass {name}=…, or leave {key} out."
                )
            if got is not None and not needed:
                raise SelectionError(
                    f"{name}: got {what}, but {key}={getattr(self, key)}, so it would be ignored.\n"
                    f"Leave {name} out, or set {key}."
                )


def _one_of(name: str, got: object, allowed: tuple[str, ...]) -> None:
    if got not in allowed:
        raise ConfigError(f"{name}: got {got!r}, expected one of {', '.join(map(repr, allowed))}.")


def _share(name: str, got: object, example: str) -> None:
    if got is None:
        return
    if isinstance(got, bool) or not isinstance(got, int | float) or not 0 < got <= 1:
        raise ConfigError(f"{name} must be in (0, 1], got {got!r}; {example}.")


def _count(name: str, got: object, meaning: str) -> None:
    if got is None:
        return
    if isinstance(got, bool) or not isinstance(got, int) or got < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, got {got!r}; {meaning}.")
