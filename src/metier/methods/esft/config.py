"""What an ESFT adapter is: which experts of which layers it replaces, and on which base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from peft import PeftConfig

from metier.methods.expert_ids import expert_ids_by_layer
from metier.methods.peft_types import MetierPeftType
from metier.methods.whole_module import checked_groups, groups_of
from metier.routing.selection import ExpertSelection


@dataclass
class EsftConfig(PeftConfig):
    """Configuration of an ESFT adapter; a dataclass as PEFT wants them, saved as `adapter_config.json`.

    Raises:
        SelectionError: `experts` is missing, empty, or not a mapping of layer numbers to expert ids.
        ConfigError: `also_train` names an unknown group of modules.
    """

    experts: dict[int, list[int]] | None = field(
        default=None,
        metadata={"help": "Expert ids to train, by decoder layer (counted from 0, dense layers included)."},
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
        self.peft_type = MetierPeftType.ESFT
        self.experts = expert_ids_by_layer(self.experts, type(self).__name__)
        self.also_train = checked_groups(self.also_train, type(self).__name__)

    @classmethod
    def from_selection(cls, selection: ExpertSelection, *, also_train: Sequence[str] = ()) -> EsftConfig:
        """The configuration that trains a selection's experts, and shared experts too where it says so.

        Args:
            selection: which experts.
            also_train: groups of modules to train whole: `shared_experts`, `router`, `attention`, `norms`.

        Raises:
            SelectionError: the selection wants all other modules trained too, which in ESFT's format means embeddings
                and the output layer as well.
        """
        return cls(
            experts={layer: list(ids) for layer, ids in selection.experts.items()},
            also_train=groups_of(selection, also_train),
        )
