"""Products of single rows with matrices of their own choice, against plain products."""

from __future__ import annotations

import pytest
import torch

from metier.serving import few_rows
from metier.serving.few_rows import are_small, by_inputs, chosen_products, empty_by_inputs, order_rows
from metier.serving.row_pool import RowPool

CPU = torch.device("cpu")
# float32: sums in another order
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("num_rows", [1, 63, 257])
def test_each_row_is_multiplied_by_the_matrix_that_it_chose(num_rows: int) -> None:
    torch.manual_seed(0)
    rows, stack, chosen = torch.randn(num_rows, 24), torch.randn(7, 24, 40), torch.randint(7, (num_rows,))
    want = torch.stack([row @ stack[number] for row, number in zip(rows, chosen.tolist(), strict=True)])
    torch.testing.assert_close(chosen_products(rows, stack, chosen), want, **TOLERANCE)


def test_a_row_becomes_the_same_to_the_bit_whoever_is_beside_it() -> None:
    torch.manual_seed(0)
    rows, stack, chosen = torch.randn(9, 24), torch.randn(5, 24, 40), torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 4])
    together = chosen_products(rows, stack, chosen)
    alone = [chosen_products(rows[at : at + 1], stack, chosen[at : at + 1]) for at in range(9)]
    assert torch.equal(together, torch.cat(alone))


def test_rows_lie_by_expert_and_those_of_experts_with_many_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "MOST_ROWS", 2)
    # four experts of the base, and slots 0, 2 and 5 beside them
    chosen = torch.tensor([[3, 6], [6, 1], [9, 6], [1, 4], [1, 9]])
    order = order_rows(chosen, num_experts=4)
    assert order.chosen_P.tolist() == [3, 4, 9, 9, 1, 1, 1, 6, 6, 6]
    assert (order.num_few_base, order.num_few, order.many, order.bounds) == (1, 4, (1, 6), (4, 7, 10))
    assert order.token_P[order.row_TK].tolist() == [[number] * 2 for number in range(5)]
    assert torch.equal(order.chosen_P[order.row_TK], chosen)


def test_a_stack_that_lies_by_inputs_looks_as_before() -> None:
    stack = torch.randn(3, 4, 5)
    assert torch.equal(by_inputs(stack), stack)
    assert by_inputs(stack).mT.is_contiguous()
    assert empty_by_inputs((3, 4, 5)).shape == (3, 4, 5)
    assert empty_by_inputs((3, 4, 5)).mT.is_contiguous()


def test_large_experts_and_other_dtypes_are_left_to_plain_products() -> None:
    assert are_small([(192, 256), (192,), (256, 96)], torch.float32, CPU)
    assert not are_small([(192, 256), (1024, 1024)], torch.float32, CPU)
    assert not are_small([(192, 256)], torch.bfloat16, CPU)
    assert not are_small([(192, 256)], torch.float32, torch.device("meta"))


@pytest.mark.parametrize("is_transposed", [True, False])
def test_a_pool_of_small_experts_lies_by_inputs(is_transposed: bool) -> None:
    pool = RowPool({"up_proj": (6, 4), "bias": (6,)}, 3, dtype=torch.float32, is_transposed=is_transposed)
    stack = pool.tensors["up_proj"] if is_transposed else pool.tensors["up_proj"].mT
    assert pool.is_by_inputs
    assert stack.is_contiguous()
    assert pool.tensors["bias"].shape == (3, 6)
