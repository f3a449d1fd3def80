"""`gsm8k`: whether a solution ends in the right number, however it writes it.

Source of the task: GSM8K, arXiv:2110.14168. Its own answers end in "#### 42"; models that were taught otherwise end
in "The answer is 42", "\\boxed{42}" or a sentence, so all of these are read, and numbers are compared as numbers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from metier.errors import DataError
from metier.evaluation.item_scores import ItemScores, mean_of_items

TOLERANCE = Decimal("1e-6")
"""Two numbers this near are the same; MEFT's evaluation (arXiv:2406.04984) uses the same figure."""

_CURRENCY = "[$€£¥₹]"
# a minus after a letter, a digit or a closing bracket is a dash or a subtraction, as in "3-4" and "step-2"
_SIGN = r"(?<![\w)\].])[-−]"
_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
_NUMBER = rf"(?:{_SIGN}{_CURRENCY}?|{_CURRENCY}(?:{_SIGN})?)?{_DIGITS}"
_ANY = re.compile(_NUMBER, re.ASCII)
_MARKED = re.compile(
    rf"(?:####|\\boxed\s*\{{|answer\s+is\s*:?|answer\s*:)[\s*_`=(\[{{\\$]*(?P<number>{_NUMBER})",
    re.IGNORECASE | re.ASCII,
)


def final_number(text: str) -> Decimal | None:
    """The number that a solution ends in; None where it has none.

    The last one that directly follows "####", "answer is", "answer:" or "\\boxed{", white space and emphasis aside;
    else the last number of the text. Commas between thousands, currency signs and a trailing point are no part
    of it. Fractions and percent signs are not read: "1/2" ends in 2.
    """
    marked = [match["number"] for match in _MARKED.finditer(text)]
    found = marked or _ANY.findall(text)
    return Decimal(re.sub(f"{_CURRENCY}|,", "", found[-1]).replace("−", "-")) if found else None


def gsm8k(replies: Sequence[str], references: Sequence[str]) -> ItemScores:
    """100 where reply and reference end in the same number, else 0; replies without a number are counted.

    A reference may be the bare number or a whole solution.

    Raises:
        DataError: a reference without a number; then the task is broken, not the model.
    """
    items: list[float] = []
    num_unparsed = 0
    for position, (reply, reference) in enumerate(zip(replies, references, strict=True)):
        expected, got = final_number(reference), final_number(reply)
        if expected is None:
            raise DataError(
                f"test item {position}: the reference has no number: got {reference[:80]!r}.\n"
                "gsm8k compares numbers; mend the record or use exact_match."
            )
        num_unparsed += got is None
        items.append(100.0 * (got is not None and abs(got - expected) <= TOLERANCE))
    return mean_of_items(items, num_unparsed=num_unparsed)
