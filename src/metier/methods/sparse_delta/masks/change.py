"""Scores by how far a first pass of full fine-tuning moved each entry: the lottery ticket of LT-SFT.

Paper: LT-SFT, arXiv:2110.07560. The pass itself is `choose.py`'s, which trains all entries as one dense delta.
"""

from __future__ import annotations

from torch import Tensor


def change(difference: Tensor) -> Tensor:
    """|w after - w before|, float32."""
    return difference.detach().float().abs()
