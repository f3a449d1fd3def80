"""One budget of bytes for all layers together: where training an expert buys most score a byte.

Plain Python, like `metier.routing.policy`. The layers compete: a layer whose routing is concentrated has
experts of high score and gets its place first, a layer of even routing may get none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from metier.errors import SelectionError


def pick_within_budget(
    scores: Mapping[int, Sequence[float]], *, expert_bytes: Mapping[int, int], budget_bytes: int
) -> dict[int, tuple[int, ...]]:
    """Experts of all layers by falling score a byte, as long as they fit.

    Ties break by decoder layer, then by expert id. The list ends at the first expert that does not fit; no
    smaller one behind it is tried. Little is lost (less than one expert's bytes, and nothing where all layers
    are alike, as in nearly every model), and a larger budget then always adds to the selection of a smaller
    one, instead of trading one expert for another. An expert without a positive score is never picked: the
    task does not use it (or, minus general, no more than other data do), so its bytes would buy nothing. A
    large budget may therefore stay unspent.

    Args:
        scores: one score an expert, by decoder layer; comparable between layers, as shares of a layer are.
        expert_bytes: bytes of one expert, by decoder layer; the same layers.
        budget_bytes: what all picked experts may take together.

    Returns:
        Expert ids by falling score, by decoder layer in rising order. A layer without any is left out; where
        nothing fits, all are.

    Raises:
        SelectionError: `scores` and `expert_bytes` name different layers, a size is below 1, or a score is
            not a number.

    MoE-Sieve (arXiv:2603.24044) found greedy layer budgets no better than the same number in each layer.
    """
    _check(scores, expert_bytes)
    ranked = sorted(
        (-score / expert_bytes[layer], layer, expert)
        for layer, row in scores.items()
        for expert, score in enumerate(row)
        if score > 0
    )
    picked: dict[int, list[int]] = {layer: [] for layer in sorted(scores)}
    left_bytes = budget_bytes
    for _, layer, expert in ranked:
        left_bytes -= expert_bytes[layer]
        if left_bytes < 0:
            break
        picked[layer].append(expert)
    return {layer: tuple(experts) for layer, experts in picked.items() if experts}


def _check(scores: Mapping[int, Sequence[float]], expert_bytes: Mapping[int, int]) -> None:
    if scores.keys() != expert_bytes.keys():
        raise SelectionError(
            f"expert_bytes: got layers {sorted(expert_bytes)}, expected {sorted(scores)} as in the profile.\n"
            f"Take both from one model."
        )
    for layer, size_bytes in expert_bytes.items():
        if size_bytes < 1:
            raise SelectionError(f"layers.{layer}: got {size_bytes} bytes an expert, expected at least 1.")
    for layer, row in scores.items():
        if not all(math.isfinite(score) for score in row):
            raise SelectionError(
                f"layers.{layer}: got a score that is not a finite number.\n"
                f"Profile the model again; what it computes on these records may overflow."
            )
