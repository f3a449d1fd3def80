"""What a mixture of LoRA experts is: how many, how wide, how many a token gets, which are trained, on which base."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from peft import PeftConfig

from metier.errors import ConfigError, SelectionError
from metier.methods.expert_ids import expert_ids_by_layer
from metier.methods.peft_types import MetierPeftType
from metier.routing.selection import ExpertSelection


@dataclass
class MixLoraConfig(PeftConfig):
    """Configuration of a mixture of LoRA experts; a dataclass as PEFT wants them, saved as `adapter_config.json`.

    With `top_k` below `num_experts` it is MixLoRA; with `top_k = num_experts`, every token by weight through all of
    them, MoLoRA.

    Raises:
        ConfigError: a value out of range.
        SelectionError: `experts` is no mapping of layer numbers to expert ids.

    Paper: MixLoRA, arXiv:2404.15159; MoLoRA, arXiv:2309.05444.
    """

    num_experts: int = field(default=8, metadata={"help": "LoRA experts of each feed-forward block."})
    top_k: int = field(
        default=2,
        metadata={
            "help": "Experts that a token gets, their weights adding up to 1; num_experts for all. With 1 the weight "
            "is always 1, and the router learns from the balance alone."
        },
    )
    r: int = field(default=16, metadata={"help": "Rank of an expert's change of each projection."})
    lora_alpha: float = field(default=32.0, metadata={"help": "A change is multiplied by lora_alpha / r."})
    router_aux_loss_coef: float = field(
        default=0.01, metadata={"help": "Factor of the loss that balances experts; 0 for none."}
    )
    experts: dict[int, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Expert ids by decoder layer, counted from 0: only these are trained, and routers rest. None "
            "trains all experts and the routers."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Feed-forward modules to change: their paths, the ends of their paths, or None for that of every "
            "decoder layer."
        },
    )
    base_fingerprint: str | None = field(
        default=None, metadata={"help": "Fingerprint of the base; set when the adapter is made, checked ever after."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MetierPeftType.MIXLORA
        where = type(self).__name__
        for name in ("num_experts", "top_k", "r"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{where}: {name} must be a whole number of at least 1, got {value!r}.")
        if self.top_k > self.num_experts:
            raise ConfigError(f"{where}: top_k={self.top_k} is more than num_experts={self.num_experts}; lower it.")
        if not (math.isfinite(self.lora_alpha) and self.lora_alpha > 0):
            raise ConfigError(f"{where}: lora_alpha must be greater than 0, got {self.lora_alpha!r}.")
        if not (math.isfinite(self.router_aux_loss_coef) and self.router_aux_loss_coef >= 0):
            raise ConfigError(f"{where}: router_aux_loss_coef must be at least 0, got {self.router_aux_loss_coef!r}.")
        if self.experts is not None:
            self.experts = expert_ids_by_layer(self.experts, where)

    @property
    def scale(self) -> float:
        """What every `B A` is multiplied by."""
        return self.lora_alpha / self.r

    @classmethod
    def from_selection(cls, selection: ExpertSelection, **options: object) -> MixLoraConfig:
        """The configuration that trains a selection's experts alone; `options` are this class' other fields.

        Raises:
            SelectionError: as `experts_of`.
        """
        return cls(experts=experts_of(selection), **options)  # type: ignore[arg-type]


def experts_of(selection: ExpertSelection) -> dict[int, list[int]]:
    """A selection's experts by decoder layer.

    Raises:
        SelectionError: it wants shared experts or other modules trained, which a mixture has none of.
    """
    if selection.shared_experts or selection.non_expert_modules:
        raise SelectionError(
            "the selection has shared_experts or non_expert_modules set, but a mixture of LoRA experts has routed "
            "experts alone.\nSet both to false."
        )
    return {layer: sorted(ids) for layer, ids in selection.experts.items()}
