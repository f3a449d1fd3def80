"""What an ESFT adapter is: which experts of which layers it replaces, and on which base."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig

from metier.errors import SelectionError
from metier.methods.expert_ids import expert_ids_by_layer
from metier.methods.peft_types import MetierPeftType
from metier.routing.selection import ExpertSelection


@dataclass
class EsftConfig(PeftConfig):
    """Configuration of an ESFT adapter; a dataclass as PEFT wants them, saved as `adapter_config.json`.

    Raises:
        SelectionError: `experts` is missing, empty, or not a mapping of layer numbers to expert ids.
    """

    experts: dict[int, list[int]] | None = field(
        default=None,
        metadata={"help": "Expert ids to train, by decoder layer (counted from 0, dense layers included)."},
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

    @classmethod
    def from_selection(cls, selection: ExpertSelection) -> EsftConfig:
        """The configuration that trains a selection's experts.

        Raises:
            SelectionError: the selection wants shared experts or other modules trained too, which ESFT's format allows
                and this tuner does not do.
        """
        if selection.shared_experts or selection.non_expert_modules:
            raise SelectionError(
                f"the selection has shared_experts={selection.shared_experts} and "
                f"non_expert_modules={selection.non_expert_modules}, but the ESFT tuner trains routed experts only.\n"
                "Set both to false."
            )
        return cls(experts={layer: list(ids) for layer, ids in selection.experts.items()})
