"""What a MEFT adapter is: how many rows, how they are grouped and chosen, where they live, and on which base."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft import PeftConfig

from metier.errors import ConfigError
from metier.memory.row_store import TIERS
from metier.methods.meft.defaults import MeftSizes, meft_sizes
from metier.methods.peft_types import MetierPeftType

Gate = Literal["logit", "none"]
Semantics = Literal["token", "union"]


@dataclass
class MeftConfig(PeftConfig):
    """Configuration of a MEFT adapter; a dataclass as PEFT wants them, saved as `adapter_config.json`.

    Sizes that are not given follow from `r` and are set, so that the saved configuration has all of them.

    Raises:
        ConfigError: a value out of range, an `r` that cannot be split, or a `top_k` over the number of candidates.

    Paper: MEFT, arXiv:2406.04984.
    """

    r: int = field(default=1024, metadata={"help": "Rows (neurons) of the adapter in each layer."})
    num_key_experts: int | None = field(
        default=None, metadata={"help": "Groups that the rows are parted into; it divides r."}
    )
    num_active_key_experts: int | None = field(
        default=None, metadata={"help": "Groups that the router picks for a token."}
    )
    top_k: int | None = field(default=None, metadata={"help": "Rows among theirs that fire for a token."})
    gate: Gate = field(
        default="logit",
        metadata={
            "help": "'logit' multiplies a row's product with the input by its group's router logit, as the published "
            "code does, so that the router learns; 'none' is the paper's formula, in which it stays as it begins."
        },
    )
    semantics: Semantics = field(
        default="token",
        metadata={
            "help": "'token': every token chooses its rows for itself. 'union': every token uses the rows that any "
            "token of the batch has chosen, as in the paper's Algorithm 1; outputs then depend on the batch."
        },
    )
    scaling: float = field(default=1.0, metadata={"help": "Factor of the adapter's output."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Feed-forward modules to stand beside: their paths, the ends of their paths, or None for that of "
            "every decoder layer."
        },
    )
    store: str = field(default="device", metadata={"help": "Where the rows live: device, host or disk."})
    store_folder: str | None = field(
        default=None, metadata={"help": "Folder of the rows on disk; a temporary one where it is not set. Not saved."}
    )
    cache_bytes: int = field(
        default=0,
        metadata={
            "help": "Memory of the device, over all layers, for rows that are used in most steps, where the store is "
            "elsewhere; they are kept and updated there."
        },
    )
    row_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "What rows are kept in; bfloat16 is trained with stochastic rounding."}
    )
    base_fingerprint: str | None = field(
        default=None, metadata={"help": "Fingerprint of the base; set when the adapter is made, checked ever after."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MetierPeftType.MEFT
        where = type(self).__name__
        for name, choices in (
            ("gate", get_args(Gate)),
            ("semantics", get_args(Semantics)),
            ("store", TIERS),
            ("row_dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{where}: {name} must be {' or '.join(choices)}, got {getattr(self, name)!r}.")
        if not self.scaling > 0:
            raise ConfigError(f"{where}: scaling must be greater than 0, got {self.scaling}.")
        if self.cache_bytes < 0:
            raise ConfigError(f"{where}: cache_bytes must be at least 0, got {self.cache_bytes}.")
        sizes = self.sizes
        self.num_key_experts, self.top_k = sizes.num_key_experts, sizes.top_k
        self.num_active_key_experts = sizes.num_active_key_experts

    @property
    def sizes(self) -> MeftSizes:
        return meft_sizes(
            self.r,
            num_key_experts=self.num_key_experts,
            num_active_key_experts=self.num_active_key_experts,
            top_k=self.top_k,
        )

    def to_dict(self) -> dict[str, Any]:
        """As PEFT saves it: without the folder, which is one machine's."""
        return {**super().to_dict(), "store_folder": None}
