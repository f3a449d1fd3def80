"""What a MAM adapter is: a short prefix in attention and a wide parallel adapter beside the feed-forward block."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig

from metier.methods.bottleneck.config import ActivationName, BottleneckConfig
from metier.methods.peft_types import MetierPeftType
from metier.methods.prefix.config import PrefixConfig


@dataclass
class MamConfig(PeftConfig):
    """Configuration of a mix-and-match adapter; sizes as in the paper.

    Raises:
        ConfigError: a value out of range; named by the part that it belongs to.

    Paper: MAM adapter, arXiv:2110.04366.
    """

    num_prefix_tokens: int = field(default=30, metadata={"help": "Keys and values in front of each layer's own."})
    prefix_bottleneck: int | None = field(
        default=None,
        metadata={"help": "Width of the network that makes the prefix while it trains; None trains it itself."},
    )
    r: int = field(default=512, metadata={"help": "Width of the adapter beside the feed-forward block."})
    activation: ActivationName = field(default="relu", metadata={"help": "Between the adapter's two layers."})
    scaling: float = field(default=4.0, metadata={"help": "Factor of the adapter's output."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapter's bottleneck, in [0, 1)."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Attention modules, which get a prefix, and other blocks, which get an adapter beside them: their "
            "paths, the ends of their paths, or None for those of every decoder layer."
        },
    )
    base_fingerprint: str | None = field(
        default=None, metadata={"help": "Fingerprint of the base; set when the adapter is made, checked ever after."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MetierPeftType.MAM
        for part in ("prefix_part", "bottleneck_part"):
            getattr(self, part)  # making a part checks its values

    @property
    def prefix_part(self) -> PrefixConfig:
        return PrefixConfig(num_prefix_tokens=self.num_prefix_tokens, bottleneck=self.prefix_bottleneck)

    @property
    def bottleneck_part(self) -> BottleneckConfig:
        return BottleneckConfig(
            r=self.r, variant="parallel", activation=self.activation, scaling=self.scaling, dropout=self.dropout
        )
