"""What a LoRA on selected experts is: which experts of which layers it changes, at which rank, and on which base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from peft import PeftConfig

from metier.errors import ConfigError
from metier.methods.expert_ids import expert_ids_by_layer
from metier.methods.peft_types import MetierPeftType
from metier.methods.whole_module import checked_groups, groups_of
from metier.routing.selection import ExpertSelection


@dataclass
class ExpertLoraConfig(PeftConfig):
    """Configuration of a LoRA on selected experts; a dataclass as PEFT wants them, saved as `adapter_config.json`.

    Raises:
        SelectionError: `experts` is missing, empty, or not a mapping of layer numbers to expert ids.
        ConfigError: a rank, alpha or dropout out of range, or ranks of experts that are not selected.
    """

    experts: dict[int, list[int]] | None = field(
        default=None,
        metadata={"help": "Expert ids to change, by decoder layer (counted from 0, dense layers included)."},
    )
    r: int = field(default=8, metadata={"help": "Rank of each expert's change."})
    lora_alpha: float = field(default=16.0, metadata={"help": "A change is multiplied by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the changes' inputs, in [0, 1)."})
    use_rslora: bool = field(default=False, metadata={"help": "Multiply by lora_alpha / sqrt(r) instead."})
    ranks: dict[int, dict[int, int]] | None = field(
        default=None, metadata={"help": "Other ranks than r: by decoder layer, then by expert."}
    )
    also_train: list[str] | None = field(
        default=None,
        metadata={"help": "Modules to train whole beside the experts: shared_experts, router, attention, norms."},
    )
    whole_modules: list[str] | None = field(
        default=None, metadata={"help": "Paths of the modules trained whole; set when the adapter is made."}
    )
    base_fingerprint: str | None = field(
        default=None, metadata={"help": "Fingerprint of the base; set when the adapter is made, checked ever after."}
    )
    num_experts: int | None = field(
        default=None, metadata={"help": "Routed experts a layer of the base; set when the adapter is made."}
    )
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Paths of the expert layers; set from `experts` when the adapter is made."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MetierPeftType.EXPERT_LORA
        self.experts = expert_ids_by_layer(self.experts, type(self).__name__)
        self.also_train = checked_groups(self.also_train, type(self).__name__)
        # JSON knows no numbers as keys
        ranks = {int(layer): {int(e): r for e, r in by.items()} for layer, by in (self.ranks or {}).items()}
        self.ranks = ranks or None
        self._check(ranks)

    def rank(self, layer: int, expert: int) -> int:
        """The rank of one expert's change."""
        return (self.ranks or {}).get(layer, {}).get(expert, self.r)

    def scale(self, layer: int, expert: int) -> float:
        """What one expert's `B A` is multiplied by."""
        rank = self.rank(layer, expert)
        return self.lora_alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @classmethod
    def from_selection(
        cls, selection: ExpertSelection, *, also_train: Sequence[str] = (), **options: object
    ) -> ExpertLoraConfig:
        """The configuration that changes a selection's experts; `options` are this class' other fields.

        Args:
            selection: which experts; where it says so, shared experts are trained whole.
            also_train: groups of modules to train whole: `shared_experts`, `router`, `attention`, `norms`.
            options: other fields of the configuration.

        Raises:
            SelectionError: as `EsftConfig.from_selection`.
        """
        experts = {layer: list(ids) for layer, ids in selection.experts.items()}
        return cls(experts=experts, also_train=groups_of(selection, also_train), **options)  # type: ignore[arg-type]

    def _check(self, ranks: dict[int, dict[int, int]]) -> None:
        assert self.experts is not None, "refused above"
        given = [("r", self.r)] + [(f"ranks[{n}][{e}]", r) for n, by in ranks.items() for e, r in by.items()]
        for name, rank in given:
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ConfigError(f"ExpertLoraConfig: {name} must be a whole number of at least 1, got {rank!r}.")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"ExpertLoraConfig: lora_dropout must be in [0, 1), got {self.lora_dropout!r}.")
        if not (math.isfinite(self.lora_alpha) and self.lora_alpha > 0):
            raise ConfigError(f"ExpertLoraConfig: lora_alpha must be greater than 0, got {self.lora_alpha!r}.")
        stray = [(n, e) for n, by in ranks.items() for e in by if e not in self.experts.get(n, [])]
        if stray:
            layer, expert = stray[0]
            raise ConfigError(
                f"ExpertLoraConfig: ranks names expert {expert} of layer {layer}, but experts there are "
                f"{self.experts.get(layer, [])}. Select it, or remove its rank."
            )
