"""Each operation is of its kind, and has the bytes and floating-point operations that it takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metier.planning.trace import Tracer
from metier.planning.work import Work

X, W, IDS = torch.ones(6, 8), torch.ones(8, 4), torch.tensor([0, 2, 5])
Q = torch.ones(1, 2, 16, 8)


def works_of(run: Callable[[], object]) -> list[Work]:
    tracer = Tracer(None)
    with tracer:
        run()
    return list(tracer.operations.works.elements())


@pytest.mark.parametrize(
    ("run", "kind", "sizes", "num_bytes", "flops"),
    [
        (lambda: X @ W, "product", (1, 6, 8, 4), 4 * (48 + 32 + 24), 2 * 6 * 8 * 4),
        (lambda: torch.addmm(torch.ones(4), X, W), "product", (1, 6, 8, 4), 4 * (4 + 48 + 32 + 24), 2 * 6 * 8 * 4),
        (lambda: torch.bmm(X.expand(3, 6, 8), W.expand(3, 8, 4)), "product", (3, 6, 8, 4), None, 3 * 2 * 6 * 8 * 4),
        (lambda: torch.mm(X, W, out=torch.ones(6, 4)), "grouped product", (1, 6, 8, 4), None, 2 * 6 * 8 * 4),
        (lambda: F.scaled_dot_product_attention(Q, Q, Q), "attention", (2, 16, 16, 8), None, 4 * 2 * 16 * 16 * 8),
        (lambda: X + X, "copy", (4 * 3 * 48,), 4 * 3 * 48, 0),
        (lambda: X.mul_(2.0), "copy", (4 * 2 * 48,), 4 * 2 * 48, 0),
        (lambda: X.exp(), "function", (4 * 2 * 48,), 4 * 2 * 48, 0),
        (lambda: X.softmax(-1), "function", (4 * 2 * 48,), 4 * 2 * 48, 0),
        # three rows are taken, and three rows written, whatever else there is
        (lambda: X[IDS], "gather", (4 * 2 * 24,), 4 * 2 * 24, 0),
        (lambda: F.embedding(IDS, X), "gather", (4 * 2 * 24,), 4 * 2 * 24, 0),
        (lambda: X.index_add_(0, IDS, torch.ones(3, 8)), "scatter", (4 * 3 * 24,), 4 * 3 * 24, 0),
        (lambda: IDS.sort(), "choose", None, None, 0),
        (lambda: torch.empty(1000), "copy", (0,), 0, 0),
    ],
)
def test_an_operation_has_its_kind_and_sizes(
    run: Callable[[], Tensor], kind: str, sizes: tuple[int, ...] | None, num_bytes: int | None, flops: int
) -> None:
    work = works_of(run)[-1]
    assert (work.kind, work.flops) == (kind, flops)
    assert sizes is None or work.sizes == sizes
    assert num_bytes is None or work.num_bytes == num_bytes


def test_views_are_nothing() -> None:
    assert works_of(lambda: X.t()[1:].unsqueeze(0).expand(3, -1, -1)) == []


def test_an_attentions_gradient_has_five_products_for_two() -> None:
    query = Q.clone().requires_grad_()
    found = {
        work.kind: work
        for work in works_of(lambda: F.scaled_dot_product_attention(query, query, query).sum().backward())
    }
    assert found["attention gradient"].sizes == found["attention"].sizes
    assert found["attention gradient"].flops * 2 == found["attention"].flops * 5
