"""What diff pruning is: which modules get a difference at every entry, and how its gates begin and are paid for."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig

from metier.errors import ConfigError
from metier.methods.peft_types import MetierPeftType
from metier.models.base_parameters import KINDS


@dataclass
class DiffPruningConfig(PeftConfig):
    """Configuration of diff pruning's first stage; a dataclass as PEFT wants them, saved as `adapter_config.json`.

    It trains a difference and a gate for every entry of its target modules, weights and biases, so that it takes more
    memory than full fine-tuning; on MoE models the default targets are as `SparseDeltaConfig`'s. Its result is a sparse
    delta: `prune`.

    Raises:
        ConfigError: a value out of range.

    Paper: diff pruning, arXiv:2012.07463.
    """

    penalty_weight: float = field(
        default=1.25e-7,
        metadata={"help": "What each entry whose gate is expected to be open adds to the loss by `penalty()`."},
    )
    structured: bool = field(
        default=False,
        metadata={"help": "Whether each parameter has a gate of its own beside those of its entries, as a group."},
    )
    alpha_init: float = field(default=5.0, metadata={"help": "What gates begin at; they are open for large values."})
    lower: float = field(default=-1.5, metadata={"help": "Where gates are stretched to below 0."})
    upper: float = field(default=1.5, metadata={"help": "Where gates are stretched to above 1."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Paths of modules, the ends of their paths, or None for those of target_kinds."}
    )
    target_kinds: list[str] | None = field(
        default=None, metadata={"help": f"Modules by what their weights are: {', '.join(KINDS)}."}
    )
    base_fingerprint: str | None = field(
        default=None, metadata={"help": "Fingerprint of the base; set when the adapter is made, checked ever after."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MetierPeftType.DIFF_PRUNING
        where = type(self).__name__
        if not self.penalty_weight >= 0:
            raise ConfigError(f"{where}: penalty_weight must be at least 0, got {self.penalty_weight}.")
        if not (self.lower < 0 and self.upper > 1):
            raise ConfigError(f"{where}: lower must be under 0 and upper over 1, got {self.lower} and {self.upper}.")
        if stray := [kind for kind in self.target_kinds or () if kind not in KINDS]:
            raise ConfigError(f"{where}: target_kinds: got {stray[0]!r}, expected some of {', '.join(KINDS)}.")
