"""Expert ids by layer, as every tuner of selected experts takes them."""

from __future__ import annotations

from metier.errors import SelectionError


def expert_ids_by_layer(experts: object, config: str) -> dict[int, list[int]]:
    """Layers and ids as numbers, both ascending, layers without experts left out; JSON's text keys are understood.

    Args:
        experts: what the user gave.
        config: the configuration's name, for errors.

    Raises:
        SelectionError: it is not a mapping of layer numbers to expert ids, names none, or names one twice.
    """
    if not isinstance(experts, dict) or not any(experts.values()):
        raise SelectionError(
            f"{config}(experts=…): got {experts!r}, expected a mapping of decoder layers to expert ids with at least "
            f"one expert, such as {{1: [8, 26]}}.\nMake one with metier.select(), or {config}.from_selection()."
        )
    normalised: dict[int, list[int]] = {}
    for layer, ids in experts.items():
        try:
            numbers = sorted(int(expert) for expert in ids)
            layer = int(layer)
        except (TypeError, ValueError) as error:
            raise SelectionError(f"{config}(experts=…): layer {layer!r} names {ids!r}, expected expert ids.") from error
        if len(set(numbers)) != len(numbers):
            raise SelectionError(f"layers.{layer}: {config} names an expert twice: {numbers}. Name each once.")
        if numbers:
            normalised[layer] = numbers
    return dict(sorted(normalised.items()))
