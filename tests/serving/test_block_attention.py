"""Attention block by block, against each request's own product over its own keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from metier.serving.block_attention import attend_blocks, plan_blocks

BLOCK, STRIDE, SIZE = 4, 24, 8
"""Tokens of a block, and from one block of a layer to the next: other layers' lie between."""
# float32: sums in another order
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
REQUESTS = {
    "one block each": [([0], 4), ([24], 1), ([48], 3)],
    "out of order, with gaps": [([120], 2), ([0], 4), ([720], 3), ([48], 1), ([744], 4)],
    "several blocks": [([24, 0, 96], 10), ([72], 2), ([48, 480], 8), ([504], 1)],
    "shared blocks": [([0, 24], 6), ([0, 48], 5), ([0, 72], 8), ([96], 1)],
    "nine side by side": [([24 * number], 1 + number % 4) for number in range(9)],
}


def reference(query_HD: Tensor, keys_LGD: Tensor, values_LGD: Tensor) -> Tensor:
    repeats = query_HD.shape[0] // keys_LGD.shape[1]
    keys, values = (each.repeat_interleave(repeats, 1) for each in (keys_LGD, values_LGD))
    shares_HL = (torch.einsum("hd,lhd->hl", query_HD, keys) * 0.3).softmax(-1)
    return torch.einsum("hl,lhd->hd", shares_HL, values)


@pytest.mark.parametrize("case", REQUESTS)
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_request_attends_to_its_own_tokens(case: str, groups: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    requests = REQUESTS[case]
    # what is nobody's is large, so that it would be seen
    cache = 1e6 * torch.randn(1000, groups, SIZE, dtype=dtype)
    keys, values = cache[3:], cache.clone()[7:]
    query = torch.randn(len(requests), 4, SIZE, dtype=dtype)
    places = []
    for firsts, total in requests:
        place = torch.cat([torch.arange(first, first + BLOCK) for first in firsts])[:total]
        for tokens in (keys, values):
            tokens[place] = torch.randn(total, groups, SIZE, dtype=dtype)
        places.append(place)
    firsts, totals = zip(*requests, strict=True)
    plan = plan_blocks(firsts, totals, block_tokens=BLOCK, stride=STRIDE)
    got = attend_blocks(query, keys, values, plan, scaling=0.3)
    want = [reference(own, keys[place], values[place]) for own, place in zip(query, places, strict=True)]
    torch.testing.assert_close(got, torch.stack(want), **TOLERANCE)


def test_blocks_near_each_other_are_one_product_and_far_ones_are_not() -> None:
    firsts = [[0], [24], [72], [960], [984]]
    plan = plan_blocks(firsts, [4] * 5, block_tokens=BLOCK, stride=STRIDE)
    assert [(run.first_token, run.num_blocks) for run in plan.runs] == [(0, 4), (960, 2)]


def test_only_as_many_tokens_are_read_as_the_longest_has() -> None:
    plan = plan_blocks([[0], [24], [48]], [1, 3, 2], block_tokens=BLOCK, stride=STRIDE)
    assert [num_tokens for _, _, num_tokens in plan.parts()] == [3]
    assert [num_tokens for _, _, num_tokens in plan.parts(most=1)] == [1, 3, 2]
