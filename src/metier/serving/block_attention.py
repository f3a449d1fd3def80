"""Attention of requests that each add one token, over blocks of a paged cache, where they lie.

Request by request it is many small products, and the keys of one in several blocks are copied. Here each block of each
request is one row of a batched product; blocks that lie near each other in the cache are seen as one tensor, without a
copy, and what has no token of the request's is masked. A request in several blocks gets its answer from its blocks' by
the sums of their shares.
"""

# R requests, B rows: blocks of requests, N blocks of a run, H heads, G key-value heads, Q heads of one group
# L tokens of a block, D head size, J rows and heads

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

_MOST_GAP = 1
"""Blocks between two that are read for nothing, rather than begin another product."""
_AT_ONCE = 4
_Block = tuple[int, int, int]
"""Where it begins, the number of its request, how many of its tokens are the request's."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Blocks at equal distances, in the order of the cache."""

    first_token: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """Where the blocks of a step's requests lie; the same for all layers of one kind."""

    runs: tuple[_Run, ...]
    stride: int
    """Tokens between two blocks that follow each other in the cache."""
    request_B: Tensor
    """Whose query each row of the runs takes, int64; any for a block that is read for nothing."""
    mask_B1L: Tensor
    """0 where a block has a token of its request, else -inf."""
    row_R: Tensor | None
    """Each request's row, where each has one; None where some have several."""
    used_B: Tensor
    """Rows that are not read for nothing, int64."""
    first_token_B: Tensor
    """Where each row's block begins, int64."""
    sizes: tuple[int, ...]
    """Tokens of each row's block that are its request's."""
    _values: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def parts(self, most: int | None = None) -> Iterator[tuple[slice, int, int]]:
        """Runs, or parts of them of so many blocks: which rows they are, where they begin, tokens of the longest."""
        row = 0
        for run in self.runs:
            for done in range(0, run.num_blocks, most or run.num_blocks):
                part = slice(row + done, row + min(done + (most or run.num_blocks), run.num_blocks))
                yield part, run.first_token + done * self.stride, max(self.sizes[part])
            row += run.num_blocks

    def values(self, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of a layer's values as (tokens * G, D): those of each row's each head, laid end to end; where each head's
        begin; and which of (B * G * L) shares each one's is. All int64."""
        if num_groups not in self._values:
            num_tokens = self.mask_B1L.shape[-1]
            is_seen_BGL = (self.mask_B1L == 0).expand(-1, num_groups, -1)
            token_BL = self.first_token_B.unsqueeze(-1) + torch.arange(num_tokens)
            row_BGL = token_BL.unsqueeze(1) * num_groups + torch.arange(num_groups).unsqueeze(-1)
            size_J = is_seen_BGL.sum(-1).flatten()
            share = is_seen_BGL.flatten().nonzero().squeeze(1)
            self._values[num_groups] = row_BGL[is_seen_BGL], size_J.cumsum(0) - size_J, share
        return self._values[num_groups]


def plan_blocks(
    first_tokens: Sequence[Sequence[int]], num_tokens: Sequence[int], *, block_tokens: int, stride: int
) -> BlockPlan:
    """Args:
    first_tokens: where each block of each request begins in a layer's view of the cache.
    num_tokens: of each request.
    block_tokens: of a full block; all of a request's but the last one are full.
    stride: tokens between two neighbouring blocks.
    """
    left: list[_Block] = []
    for request, (firsts, total) in enumerate(zip(first_tokens, num_tokens, strict=True)):
        left += [(first, request, min(block_tokens, total - i * block_tokens)) for i, first in enumerate(firsts)]
    left.sort()
    runs: list[_Run] = []
    requests: list[int] = []
    sizes: list[int] = []
    used: list[int] = []
    while left:
        # a block that several requests share is in as many runs
        run, left = _first_run(left, stride)
        place = len(requests)
        num = (run[-1][0] - run[0][0]) // stride + 1
        runs.append(_Run(run[0][0], num))
        requests += [run[0][1]] * num
        sizes += [1] * num
        for first, request, size in run:
            at = place + (first - run[0][0]) // stride
            requests[at], sizes[at] = request, size
            used.append(at)
    size_B = torch.tensor(sizes)
    mask_BL = torch.zeros(len(sizes), int(size_B.max()))
    mask_BL.masked_fill_(torch.arange(mask_BL.shape[1]) >= size_B.unsqueeze(-1), -torch.inf)
    request_B, used_B = torch.tensor(requests), torch.tensor(used)
    row_R = None
    if len(used) == len(num_tokens):
        row_R = torch.empty_like(used_B)
        row_R[request_B[used_B]] = used_B
    first_B = torch.cat([run.first_token + stride * torch.arange(run.num_blocks) for run in runs])
    return BlockPlan(tuple(runs), stride, request_B, mask_BL.unsqueeze(1), row_R, used_B, first_B, tuple(sizes))


def _first_run(blocks: list[_Block], stride: int) -> tuple[list[_Block], list[_Block]]:
    """Of blocks in order: those that lie near the first one and each other, and all others."""
    run = [blocks[0]]
    others: list[_Block] = []
    for place, block in enumerate(blocks[1:], start=1):
        distance = block[0] - run[-1][0]
        if distance > (_MOST_GAP + 1) * stride:
            return run, [*others, *blocks[place:]]
        if distance == 0 or distance % stride:
            others.append(block)
        else:
            run.append(block)
    return run, others


def attend_blocks(
    query_RHD: Tensor, keys_TGD: Tensor, values_TGD: Tensor, plan: BlockPlan, *, scaling: float | None
) -> Tensor:
    """Each request's one query over all of its keys: (R, H, D).

    Args:
        keys_TGD: one layer's view of the cache, token by token; all of it finite, that of nobody too.
    """
    num_heads, size = query_RHD.shape[1:]
    scale = size**-0.5 if scaling is None else scaling
    query_BHD = query_RHD[plan.request_B]
    # of torch's kernels the one for attention is slow with one query
    is_one_query = num_heads == keys_TGD.shape[1] and query_RHD.dtype == torch.float32
    attend = _attend_one if is_one_query else _attend_group
    out_BHD, sum_BH = attend(query_BHD, keys_TGD, values_TGD, plan, scale)
    if plan.row_R is not None:
        return out_BHD[plan.row_R]
    used = plan.used_B
    return _joined(out_BHD[used], sum_BH[used], plan.request_B[used], len(query_RHD))


def _attend_one(
    query_BHD: Tensor, keys_TGD: Tensor, values_TGD: Tensor, plan: BlockPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """Where each head has keys of its own: sums of products, and sums of values weighted by shares."""
    num_rows, num_heads, size = query_BHD.shape
    scores_BHL = query_BHD.new_full((num_rows, num_heads, plan.mask_B1L.shape[-1]), -torch.inf)
    query_BH1D = (query_BHD * scale).unsqueeze(2)
    # few enough at once that the products are still in the processor's cache when they are added up
    for part, first_token, num_tokens in plan.parts(_AT_ONCE):
        keys_NHLD = _seen(keys_TGD, part, first_token, num_tokens, plan.stride)
        torch.sum(query_BH1D[part] * keys_NHLD, -1, out=scores_BHL[part, :, :num_tokens])
    scores_BHL += plan.mask_B1L
    index, begin_J, share = plan.values(num_heads)
    shares = scores_BHL.softmax(-1).view(-1)[share]
    out_JD = F.embedding_bag(index, values_TGD.view(-1, size), begin_J, mode="sum", per_sample_weights=shares)
    return out_JD.view(query_BHD.shape), scores_BHL.logsumexp(-1)


def _attend_group(
    query_BHD: Tensor, keys_TGD: Tensor, values_TGD: Tensor, plan: BlockPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """Where several heads share keys: as queries of one head."""
    query_BGQD = query_BHD.unflatten(1, (keys_TGD.shape[1], -1))
    mask_B11L = plan.mask_B1L.to(query_BHD.dtype).unsqueeze(1)
    outs, sums = [], []
    for part, first_token, num_tokens in plan.parts():
        keys_NGLD, values_NGLD = (
            _seen(each, part, first_token, num_tokens, plan.stride) for each in (keys_TGD, values_TGD)
        )
        mask_N11L = mask_B11L[part, ..., :num_tokens]
        out_NGQD, sum_NGQ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query_BGQD[part], keys_NGLD, values_NGLD, attn_mask=mask_N11L, scale=scale
        )
        outs.append(out_NGQD)
        sums.append(sum_NGQ)
    return torch.cat(outs).flatten(1, 2), torch.cat(sums).flatten(1, 2)


def _seen(tokens_TGD: Tensor, part: slice, first_token: int, num_tokens: int, stride: int) -> Tensor:
    """Blocks at equal distances where they lie, (N, G, L, D)."""
    _, num_groups, size = tokens_TGD.shape
    by_token, by_group, by_value = tokens_TGD.stride()
    return tokens_TGD.as_strided(
        (part.stop - part.start, num_groups, num_tokens, size),
        (stride * by_token, by_group, by_token, by_value),
        tokens_TGD.storage_offset() + first_token * by_token,
    )


def _joined(out_BHD: Tensor, sum_BH: Tensor, request_B: Tensor, num_requests: int) -> Tensor:
    """Answers of blocks, by the logarithms of what their scores' exponentials add up to, as answers of requests."""
    index_BH = request_B.unsqueeze(-1).expand_as(sum_BH)
    top_RH = sum_BH.new_full((num_requests, sum_BH.shape[1]), -torch.inf).scatter_reduce(0, index_BH, sum_BH, "amax")
    share_BH = (sum_BH - top_RH[request_B]).exp()
    total_RH = torch.zeros_like(top_RH).index_add(0, request_B, share_BH)
    share_BH = share_BH / total_RH[request_B]
    joined_RHD = sum_BH.new_zeros(num_requests, *out_BHD.shape[1:])
    return joined_RHD.index_add(0, request_B, out_BHD * share_BH.unsqueeze(-1)).to(out_BHD.dtype)
