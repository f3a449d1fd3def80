"""What an ESFT adapter is: which experts of which layers it replaces, and on which base."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig

from metier.errors import SelectionError
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
        self.experts = _normalised(self.experts)

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


def _normalised(experts: object) -> dict[int, list[int]]:
    if not isinstance(experts, dict) or not any(experts.values()):
        raise SelectionError(
            f"EsftConfig(experts=…): got {experts!r}, expected a mapping of decoder layers to expert ids with at least "
            "one expert, such as {1: [8, 26]}.\nMake one with metier.select(), or EsftConfig.from_selection()."
        )
    normalised: dict[int, list[int]] = {}
    for layer, ids in experts.items():
        try:
            numbers = sorted(int(expert) for expert in ids)
            layer = int(layer)
        except (TypeError, ValueError) as error:
            raise SelectionError(
                f"EsftConfig(experts=…): layer {layer!r} names {ids!r}, expected expert ids."
            ) from error
        if len(set(numbers)) != len(numbers):
            raise SelectionError(f"layers.{layer}: EsftConfig names an expert twice: {numbers}. Name each once.")
        if numbers:
            normalised[layer] = numbers
    return dict(sorted(normalised.items()))
