"""GSM8K's answers: the number is found however a solution ends, and nothing else is taken for it."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier.errors import DataError
from metier.evaluation.final_number import final_number
from metier.evaluation.metrics import score_replies


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 42", "42"),
        ("2 + 2 = 4\n#### 1,234", "1234"),
        ("so 7 are left.\nThe answer is: 42", "42"),
        ("The answer is 42.", "42"),
        ("the ANSWER is **$1,234.50**, not 7", "1234.50"),
        ("Answer: -3 (of 10)", "-3"),
        (r"\boxed{18} \text{ of 20}", "18"),
        (r"The final answer is \$5", "5"),
        ("The answer is 3, no: the answer is 4", "4"),
        ("#### 3\nQuestion: and 5 more?", "3"),
        ("she has 3 boxes of 4, so 12 in all", "12"),
        ("it costs €2,500", "2500"),
        ("a loss of -$20", "-20"),
        ("a loss of $-20", "-20"),
        ("a change of −5", "-5"),
        ("between 3-4", "4"),
        ("about .75", ".75"),
        ("9.0", "9.0"),
        ("10.", "10"),
        ("1,2345", "2345"),
        ("the answer is found by adding 3 and 4: 7", "7"),
    ],
)
def test_the_number_that_a_solution_ends_in(text: str, number: str) -> None:
    assert final_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "the answer is unknown", "#### ", "$ and ,", "-", "٣"])
def test_a_text_without_a_number_has_none(text: str) -> None:
    assert final_number(text) is None


def test_numbers_are_compared_as_numbers_and_unreadable_replies_counted() -> None:
    replies = ["#### 1200", "The answer is $1,200.00", "1199.99", "about a thousand", "1200.0000001"]
    score = score_replies("gsm8k", replies, ["steps\n#### 1,200"] * 5)
    assert score.item_scores == (100.0, 100.0, 0.0, 0.0, 100.0)
    assert score.num_unparsed == 1


def test_a_reference_without_a_number_is_the_tasks_fault() -> None:
    with pytest.raises(DataError, match=r"test item 1: the reference has no number: got 'none'"):
        score_replies("gsm8k", ["1", "2"], ["1", "none"])


@given(
    value=st.decimals(-(10**9), 10**9, allow_nan=False, places=2),
    before=st.text(max_size=20),
    form=st.sampled_from(["#### {:,}", "The answer is: {}.", "\\boxed{{{}}}", " so {:,} "]),
)
def test_every_number_is_read_in_every_form(value: Decimal, before: str, form: str) -> None:
    assert final_number(f"{before}\n{form.format(value)}") == value


@given(st.text(alphabet="0123456789,.-−$ #answeri:\\boxed{}\n", max_size=40))
def test_no_text_is_an_error(text: str) -> None:
    final_number(text)
