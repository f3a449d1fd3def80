"""What a ladder is: how wide its side network is, how often it looks at the backbone, and on which base it stands."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from peft import PeftConfig

from metier.errors import ConfigError
from metier.methods.peft_types import MetierPeftType


@dataclass
class LadderConfig(PeftConfig):
    """Configuration of a ladder; a dataclass as PEFT wants them, saved as `adapter_config.json`.

    Raises:
        ConfigError: a value out of range.

    Paper: LST, arXiv:2206.06522.
    """

    reduction: int = field(
        default=8, metadata={"help": "The side network is as wide as the backbone's hidden size divided by this."}
    )
    num_heads: int = field(default=4, metadata={"help": "Heads of the side network's attention."})
    mlp_factor: float = field(
        default=3.0, metadata={"help": "Inner width of the side network's MLPs, as a multiple of its own width."}
    )
    layer_stride: int = field(
        default=1, metadata={"help": "A rung at every so manieth decoder layer; the last layer always has one."}
    )
    temperature: float = field(
        default=0.1, metadata={"help": "T of the gates sigmoid(alpha / T) between backbone and side state."}
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "All decoder layers and the last norm; set when the adapter is made, checked ever after."},
    )
    base_fingerprint: str | None = field(
        default=None, metadata={"help": "Fingerprint of the base; set when the adapter is made, checked ever after."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MetierPeftType.LADDER
        for name in ("reduction", "num_heads", "layer_stride"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"LadderConfig: {name} must be a whole number of at least 1, got {value!r}.")
        for name in ("mlp_factor", "temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"LadderConfig: {name} must be greater than 0, got {value!r}.")

    def side_size(self, hidden_size: int) -> int:
        """Width of the side network on a backbone of this width.

        Raises:
            ConfigError: it cannot be split into heads of an even width, which rotary positions need.
        """
        size = hidden_size // self.reduction
        if size < 1 or size % (2 * self.num_heads):
            raise ConfigError(
                f"LadderConfig: a hidden size of {hidden_size} and reduction={self.reduction} make a side network of "
                f"width {size}, which cannot be split into num_heads={self.num_heads} heads of an even width.\n"
                "Choose another reduction or another num_heads."
            )
        return size

    def has_rung(self, number: int, num_layers: int) -> bool:
        """Whether the decoder layer `number`, counted from 0, has a rung."""
        return (number + 1) % self.layer_stride == 0 or number + 1 == num_layers
