"""What metier says of one method: its place in the survey's tree, who provides it, what it trains and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Part = Literal["attention", "dense", "shared", "routed", "router", "norms"]
"""Of a decoder layer: attention, a dense feed-forward block, shared experts, routed experts, the router, the norms."""

LINEAR: tuple[Part, ...] = ("attention", "dense", "shared")
"""Where linear layers are that any method for them can change; routed experts are stacked, and few can."""

ALL_PARTS: tuple[Part, ...] = get_args(Part)

DENSE, MOE = "dense", "moe"
ANY = (DENSE, MOE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One leaf of the tree, which `metier train --method NAME` runs."""

    name: str
    title: str
    branch: tuple[str, str]
    """Of the survey's tree (arXiv:2403.14608): the kind, and the group within it."""
    paper: str
    """Where it is described."""
    provider: Literal["metier", "PEFT", "transformers"]
    trains: str
    """What has gradients, in words."""
    inference: str
    """What it costs when the model generates, in words: "nothing once merged" and the like."""
    merges: bool
    """Whether the base's weights can take what it trained, so that nothing is left to compute beside them."""
    fits: tuple[str, ...] = ANY
    """Kinds of models: `dense`, `moe`."""

    config: str | None = None
    """Where its configuration class is, as `module.Class`; its fields are options of a run. None where it has none."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Options that are not that class' own defaults, or that make the method what it is."""
    fixed: frozenset[str] = frozenset()
    """Of the defaults those that make it what it is, which no run may change."""
    fill: str | None = None
    """A function, as `module:function`, that gives the options which follow from the model."""
    targets: tuple[Part, ...] = ()
    """Parts whose modules it goes on where a run names none; () where it has no target modules."""
    moe_targets: tuple[Part, ...] | None = None
    """The same on an MoE model, where it differs."""
    can_target: tuple[Part, ...] = LINEAR
    """Parts that a run may name by `targets`."""
    selects_experts: bool = False
    """Whether it goes on experts that a selection names."""
    is_prompt: bool = False
    """Whether it is a prompt: vectors before a record, instead of changes in the layers."""
    optimizer: str | None = None
    """A training procedure of its own, by the name that `training/` knows it by; None is AdamW."""
    procedure_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of that procedure, with their defaults."""
    not_resumable: str = ""
    """Why a run that stopped cannot be taken up again to the same bits, as a clause; "" where it can."""
    writes_base: bool = False
    """Whether it writes into the base's weights, so that these cannot be in a store of their own."""
    base_format: Literal["int8", "nf4"] | None = None
    """How the base's weights are kept where a run does not say it."""
    saves_whole_model: bool = False
    """Whether it changes the base itself, so that a run leaves a model instead of an adapter."""

    def default_targets(self, *, is_moe: bool) -> tuple[Part, ...]:
        """Parts whose modules it goes on where a run names none."""
        return self.moe_targets if is_moe and self.moe_targets is not None else self.targets

    @property
    def changes_base(self) -> bool:
        """Whether it trains or writes the base's own weights, so that these cannot be in a store of their own."""
        return self.saves_whole_model or self.writes_base

    @property
    def is_free_at_inference(self) -> bool:
        """Whether a token takes no more operations than in the base: merged, part of it, or a prompt, read once."""
        return self.merges or self.saves_whole_model or self.is_prompt

    @property
    def kind(self) -> str:
        """The survey's first word for it: Additive, Selective, Reparameterized, Hybrid or Memory-efficient."""
        return self.branch[0]
