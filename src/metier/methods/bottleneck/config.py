"""What a bottleneck adapter is: where it stands, how wide it is, and which layers go without."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from peft import PeftConfig

from metier.errors import ConfigError
from metier.methods.peft_types import MetierPeftType

Variant = Literal["houlsby", "pfeiffer", "parallel"]
ActivationName = Literal["relu", "gelu", "silu"]


@dataclass
class BottleneckConfig(PeftConfig):
    """Configuration of a bottleneck adapter; a dataclass as PEFT wants them, saved as `adapter_config.json`.

    Raises:
        ConfigError: a value out of range.

    Papers: Houlsby, arXiv:1902.00751; Pfeiffer, arXiv:2005.00247; parallel, arXiv:2110.04366; AdapterDrop,
    arXiv:2010.11918.
    """

    r: int = field(default=64, metadata={"help": "Width of the bottleneck."})
    variant: Variant = field(
        default="pfeiffer",
        metadata={
            "help": "'houlsby': after attention and after the feed-forward block of every layer, on the output before "
            "the residual is added. 'pfeiffer': after the feed-forward block alone. 'parallel': beside the "
            "feed-forward block, reading what it reads."
        },
    )
    activation: ActivationName = field(default="relu", metadata={"help": "Between the two layers."})
    scaling: float = field(default=1.0, metadata={"help": "Factor of the adapter's output."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout of the bottleneck while training, in [0, 1)."})
    layer_norm: bool = field(default=False, metadata={"help": "Whether a LayerNorm of its own stands in front."})
    gated: bool = field(
        default=False,
        metadata={
            "help": "Whether the output is multiplied by a gate in (0, 1), a linear map of what the adapter reads "
            "(UniPELT, arXiv:2110.07577)."
        },
    )
    drop_layers: int = field(default=0, metadata={"help": "First layers of the model that get no adapter."})
    random_drop_layers: int = field(
        default=0,
        metadata={
            "help": "Each training step goes without the adapters of the first n layers, n drawn between 0 and this; "
            "afterwards any as many can be dropped at inference (robust AdapterDrop)."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Blocks to stand at: their paths, the ends of their paths, or None for those of the variant in "
            "every decoder layer."
        },
    )
    base_fingerprint: str | None = field(
        default=None, metadata={"help": "Fingerprint of the base; set when the adapter is made, checked ever after."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MetierPeftType.BOTTLENECK
        where = type(self).__name__
        for name, choices in (("variant", get_args(Variant)), ("activation", get_args(ActivationName))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{where}: {name} must be {' or '.join(choices)}, got {getattr(self, name)!r}.")
        if self.r < 1:
            raise ConfigError(f"{where}: r must be at least 1, got {self.r}.")
        if not self.scaling > 0:
            raise ConfigError(f"{where}: scaling must be greater than 0, got {self.scaling}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"{where}: dropout must be in [0, 1), got {self.dropout}.")
        for name in ("drop_layers", "random_drop_layers"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{where}: {name} must be at least 0, got {getattr(self, name)}.")
