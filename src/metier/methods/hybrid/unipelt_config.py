"""What a UniPELT adapter is: a prefix, a LoRA and a serial adapter in every layer, each behind gates."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig

from metier.errors import ConfigError
from metier.methods.bottleneck.config import ActivationName, BottleneckConfig
from metier.methods.peft_types import MetierPeftType
from metier.methods.prefix.config import PrefixConfig


@dataclass
class UnipeltConfig(PeftConfig):
    """Configuration of a UniPELT adapter; sizes as in the paper.

    Raises:
        ConfigError: a value out of range; named by the part that it belongs to.

    Paper: UniPELT, arXiv:2110.07577.
    """

    num_prefix_tokens: int = field(default=10, metadata={"help": "Keys and values in front of each layer's own."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the LoRA; its gate is its scaling."})
    r: int = field(default=48, metadata={"help": "Width of the adapter after the feed-forward block."})
    activation: ActivationName = field(default="relu", metadata={"help": "Between the adapter's two layers."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapter's bottleneck, in [0, 1)."})
    lora_targets: list[str] | None = field(
        default=None,
        metadata={
            "help": "Projections of each attention module that get a LoRA, by their names in it; None for those of "
            "queries and values. Where attention is latent (MLA): the last query projection and kv_b_proj."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Attention modules, which get a prefix and a LoRA, and other blocks, which get an adapter after "
            "them: their paths, the ends of their paths, or None for those of every decoder layer."
        },
    )
    base_fingerprint: str | None = field(
        default=None, metadata={"help": "Fingerprint of the base; set when the adapter is made, checked ever after."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MetierPeftType.UNIPELT
        where = type(self).__name__
        if self.lora_r < 1:
            raise ConfigError(f"{where}: lora_r must be at least 1, got {self.lora_r}.")
        if self.lora_targets is not None and not self.lora_targets:
            raise ConfigError(f"{where}: lora_targets must name some projection or be None, got {self.lora_targets}.")
        for part in ("prefix_part", "bottleneck_part"):
            getattr(self, part)  # making a part checks its values

    @property
    def prefix_part(self) -> PrefixConfig:
        return PrefixConfig(num_prefix_tokens=self.num_prefix_tokens, gated=True)

    @property
    def bottleneck_part(self) -> BottleneckConfig:
        return BottleneckConfig(
            r=self.r, variant="pfeiffer", activation=self.activation, dropout=self.dropout, gated=True
        )
