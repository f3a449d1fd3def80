"""What the files of a LoRA on experts say: ranks and scales, and the shapes of its four stacks in a layer.

Torch-free. The change of an expert's weight is `scale * B A`; `changes.py` forms it where a model is at hand.
"""

# C changed experts of a layer, R highest rank, D hidden_size, F moe_intermediate_size, U = 2F where experts are gated

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metier.deltas.format import DAMAGED
from metier.deltas.tensors_file import DTYPES, StoredTensor
from metier.errors import CorruptDeltaError

STACKS = frozenset({"up_A", "up_B", "down_A", "down_B"})
"""The names of a layer's tensors: (C, R, D), (C, U, R), (C, R, F), (C, D, R)."""
Experts = Mapping[int, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRankSettings:
    """Of `adapter_config.json`: what turns `A` and `B` into a change."""

    r: int
    lora_alpha: float
    use_rslora: bool
    ranks: dict[int, dict[int, int]]
    """Other ranks than r, by decoder layer and expert."""

    def rank(self, layer: int, expert: int) -> int:
        """Of one expert's change."""
        return self.ranks.get(layer, {}).get(expert, self.r)

    def scale(self, layer: int, expert: int) -> float:
        """What one expert's `B A` is multiplied by."""
        rank = self.rank(layer, expert)
        return self.lora_alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def text(self) -> str:
        """As the metadata has it, which binds the tensors to these settings."""
        ranks = {str(n): {str(e): r for e, r in sorted(by.items())} for n, by in sorted(self.ranks.items())}
        values = {"lora_alpha": float(self.lora_alpha), "r": self.r, "ranks": ranks, "use_rslora": self.use_rslora}
        return json.dumps(values)


def read_low_rank(path: Path, values: Mapping[str, Any], experts: Experts) -> LowRankSettings:
    """The settings in `adapter_config.json`.

    Raises:
        CorruptDeltaError: a value is missing, out of range, or names an expert that is not selected.
    """
    r, alpha, rslora, ranks = (values.get(key) for key in ("r", "lora_alpha", "use_rslora", "ranks"))
    _expect(path, "r", r, _is_rank(r), "a whole number of at least 1")
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool) and math.isfinite(alpha) and alpha > 0
    _expect(path, "lora_alpha", alpha, is_number, "a number over 0")
    _expect(path, "use_rslora", rslora, isinstance(rslora, bool), "true or false")
    _expect(path, "ranks", ranks, ranks is None or isinstance(ranks, dict), "ranks by layer and expert, or null")
    selected = {str(layer): {str(expert) for expert in ids} for layer, ids in experts.items()}
    for layer, by_expert in (ranks or {}).items():
        is_known = isinstance(by_expert, dict) and by_expert.keys() <= selected.get(layer, set())
        _expect(path, f"ranks of layer {layer}", by_expert, is_known, "ranks of experts that are selected there")
        is_right = all(_is_rank(rank) for rank in by_expert.values())
        _expect(path, f"ranks of layer {layer}", by_expert, is_right, "whole numbers of at least 1")
    return LowRankSettings(
        r=r,  # type: ignore[arg-type]
        lora_alpha=float(alpha),  # type: ignore[arg-type]
        use_rslora=bool(rslora),
        ranks={int(n): {int(e): rank for e, rank in by.items()} for n, by in (ranks or {}).items()},
    )


def check_stacks(where: str, stacks: Mapping[str, StoredTensor], ranks: list[int]) -> None:
    """Raise a CorruptDeltaError unless a layer's four stacks belong together.

    Args:
        where: file and layer, for the error.
        stacks: by the names of `STACKS`, without the prefix.
        ranks: one a changed expert of the layer.
    """
    if stacks.keys() != STACKS:
        raise CorruptDeltaError(
            f"{where}: got tensors {sorted(stacks) or 'none'}, expected {sorted(STACKS)}.\n{DAMAGED}"
        )
    bad = [name for name, stack in stacks.items() if stack.dtype not in DTYPES]
    if bad:
        got = stacks[bad[0]].dtype
        raise CorruptDeltaError(f"{where}: {bad[0]}: got dtype {got}, expected one of {', '.join(DTYPES)}.\n{DAMAGED}")
    shapes = {name: stack.shape for name, stack in stacks.items()}
    if not _belong_together(shapes, len(ranks), max(ranks)):
        raise CorruptDeltaError(
            f"{where}: got shapes { {name: list(shape) for name, shape in sorted(shapes.items())} }, expected "
            f"{len(ranks)} experts of rank up to {max(ranks)}: up_A (C, R, hidden), up_B (C, U, R), down_A (C, R, F), "
            f"down_B (C, hidden, R), with U = F or 2 F.\n{DAMAGED}"
        )


def _belong_together(shapes: Mapping[str, tuple[int, ...]], num_experts: int, rank: int) -> bool:
    if any(len(shape) != 3 or 0 in shape for shape in shapes.values()):
        return False
    hidden, up, inner = shapes["up_A"][2], shapes["up_B"][1], shapes["down_A"][2]
    return up in (inner, 2 * inner) and shapes == stack_shapes(num_experts, rank, hidden, up, inner)


def stack_shapes(num_experts: int, rank: int, hidden: int, up: int, inner: int) -> dict[str, tuple[int, ...]]:
    """What a layer's four stacks have to be."""
    return {
        "up_A": (num_experts, rank, hidden),
        "up_B": (num_experts, up, rank),
        "down_A": (num_experts, rank, inner),
        "down_B": (num_experts, hidden, rank),
    }


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _expect(path: Path, key: str, value: Any, is_right: bool, expected: str) -> None:
    if not is_right:
        raise CorruptDeltaError(f"{path}: {key}: got {value!r:.100}, expected {expected}.\n{DAMAGED}")
