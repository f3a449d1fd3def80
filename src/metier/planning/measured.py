"""How methods scored where they were compared: the only ground on which a plan recommends one.

Both tables are of one small model each, and say so: a method's place on another model and task is for `metier compare`
to find out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Measured:
    """One method."""

    share: float
    """Of full fine-tuning's gain, the mean over tasks."""
    is_level: bool
    """Whether no task told it apart from its best method."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Several, beside each other."""

    where: str
    """In words."""
    methods: Mapping[str, Measured]


ON_MOE = Comparison(
    "on the embedded MoE model's three tasks",
    {
        "full": Measured(1.0, is_level=True),
        "whole_parts": Measured(0.92, is_level=True),
        "esft": Measured(0.87, is_level=True),
        "lora": Measured(0.80, is_level=False),
        "meft": Measured(0.76, is_level=True),
        "expert_lora": Measured(0.74, is_level=False),
        "mam": Measured(0.71, is_level=False),
        "fishmask": Measured(0.59, is_level=False),
        "pfeiffer": Measured(0.59, is_level=False),
        "parallel_adapter": Measured(0.50, is_level=False),
        "bitfit": Measured(0.38, is_level=False),
        "ia3": Measured(0.32, is_level=False),
        "ladder": Measured(0.19, is_level=False),
        "prompt": Measured(0.04, is_level=False),
        "prefix_attention": Measured(-0.09, is_level=False),
    },
)
"""benchmarks/comparisons/embedded: shared experts alone stand for `whole_parts`, ESFT by token scores for `esft`, LoRA
on all experts for `lora`."""

ON_DENSE = Comparison(
    "on SmolLM2-135M and utterances to JSON",
    {
        "full": Measured(1.0, is_level=True),
        "pfeiffer": Measured(0.92, is_level=True),
        "lora": Measured(0.89, is_level=True),
        "bitfit": Measured(0.87, is_level=True),
        "fishmask": Measured(0.81, is_level=True),
        "meft": Measured(0.8, is_level=True),
        "ia3": Measured(0.73, is_level=True),
        "prefix_attention": Measured(0.03, is_level=False),
        "ladder": Measured(0.01, is_level=False),
        "prompt": Measured(-0.01, is_level=False),
    },
)
"""benchmarks/comparisons/smollm2: one task, two seeds."""
