"""docs/support.md from the chain's results: one row a family, one column a step."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import transformers

from families.chain import STEPS, ChainResult
from families.discovery import contract_families

PAGE = Path(__file__).parents[2] / "docs" / "support.md"

_HEAD = """\
# Model families

Written by `python scripts/support_page.py` with transformers {version}; do not edit. Each family is a folder of
`transformers/models`. A tiny random model of it goes through the whole chain:

1. **load**: saved with `save_pretrained`, loaded with `metier.load`, and its MoE layers seen.
2. **profile**: every token counted in every layer.
3. **select**: some experts of each layer.
4. **train**: three AdamW steps with weight decay, which change the logits.
5. **only those rows**: every selected row moved, every other tensor is the same to the bit.
6. **save**: the delta.
7. **fresh process**: a new process loads base and delta, and gives the same logits.
8. **merge**: the delta into the base, with `save_pretrained`.
9. **plain transformers**: a new process without metier loads that, and gives the same logits.

Multimodal models are trained on text, in the experts that text passes. "Experts" says how their parameters are laid
out. {num_whole} of the {num_contract} families whose experts follow transformers' experts contract pass every step.
"""

_OUTSIDE = """\
## Outside the contract

Llama 4's and Switch Transformers' blocks are replaced by ones that follow the contract and compute the same, with the
same checkpoint: `metier.load` does it, or `metier.models.foreign.follow_contract(model)`. Switch Transformers are
encoder-decoders: a record's prompt goes into the encoder and its reply into the decoder, whose layers are counted behind
the encoder's. `metier train` runs them on transformers' Seq2SeqTrainer; `padding_free` and general ability, a loss on
plain text, are refused for them.
"""


def page(results: Iterable[ChainResult]) -> str:
    """The whole page; `results` of every family, in any order."""
    ordered = sorted(results, key=lambda result: result.family)
    inside = [result for result in ordered if result.family in contract_families()]
    outside = [result for result in ordered if result.family not in contract_families()]
    num_whole = sum(result.num_passed == len(STEPS) for result in inside)
    head = _HEAD.format(version=transformers.__version__, num_whole=num_whole, num_contract=len(inside))
    parts = [head, "## In the experts contract\n", _table(inside), _OUTSIDE, _table(outside)]
    return "\n".join(parts)


def row(result: ChainResult) -> str:
    """One family's line of the table."""
    marks = ["✓" if number < result.num_passed else "–" for number in range(len(STEPS))]
    cells = [result.family, result.class_name, result.layout, *marks, result.reason]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _table(results: list[ChainResult]) -> str:
    titles = ["family", "model", "experts", *STEPS, "why not"]
    lines = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    return "\n".join([*lines, *map(row, results)]) + "\n"
