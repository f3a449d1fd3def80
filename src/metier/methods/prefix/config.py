"""What a prefix is: how long, and how its keys and values are made while it trains."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig

from metier.errors import ConfigError
from metier.methods.peft_types import MetierPeftType


@dataclass
class PrefixConfig(PeftConfig):
    """Configuration of a prefix; a dataclass as PEFT wants them, saved as `adapter_config.json`.

    Raises:
        ConfigError: a value out of range.

    Paper: prefix tuning, arXiv:2101.00190.
    """

    num_prefix_tokens: int = field(default=16, metadata={"help": "Keys and values in front of each layer's own."})
    bottleneck: int | None = field(
        default=None,
        metadata={
            "help": "Width of the network that makes keys and values while the prefix trains, as in the paper, which "
            "found it more stable; None trains them themselves. `fold_prefix` turns the one into the other."
        },
    )
    gated: bool = field(
        default=False,
        metadata={
            "help": "Whether each query multiplies the prefix by a gate in (0, 1), a linear map of the layer's input "
            "(UniPELT, arXiv:2110.07577). Attention then costs twice as much."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Attention modules that get a prefix: their paths, the ends of their paths, or None for every one "
            "that calls transformers' attention interface."
        },
    )
    base_fingerprint: str | None = field(
        default=None, metadata={"help": "Fingerprint of the base; set when the adapter is made, checked ever after."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MetierPeftType.METIER_PREFIX
        where = type(self).__name__
        if self.num_prefix_tokens < 1:
            raise ConfigError(f"{where}: num_prefix_tokens must be at least 1, got {self.num_prefix_tokens}.")
        if self.bottleneck is not None and self.bottleneck < 1:
            raise ConfigError(f"{where}: bottleneck must be at least 1 or None, got {self.bottleneck}.")
