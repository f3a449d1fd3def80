"""The running batch: every answer is that of its merged model alone."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from metier.serving.contract import SamplingSettings
from metier.serving.paged_batch import BatchLimits, BatchRequest, PagedBatch
from serving.served_models import Served, served

LIMITS = BatchLimits(max_requests=16, max_batch_tokens=64, cache_tokens=4096)
LONG = list(range(10, 230))
PROMPTS = [[5, 9, 12, 7], [8], LONG, [61, 62, 63, 64, 65, 66], LONG[:140]]


class Batch:
    """A running batch, and what came out of it."""

    def __init__(self, model: PreTrainedModel, limits: BatchLimits) -> None:
        self.outputs: queue.Queue[Any] = queue.Queue()
        self.paged = PagedBatch(model, limits, lambda outputs: [self.outputs.put(each) for each in outputs])
        self.added = 0

    def add(self, prompt: list[int], number: int = 0, **settings: Any) -> BatchRequest:
        self.added += 1
        request = BatchRequest(
            request_id=f"r{self.added}",
            prompt_ids=prompt,
            number=number,
            key=number,
            settings=SamplingSettings(**{"max_tokens": 12, "temperature": 0, **settings}),
            eos_token_ids=[],
        )
        self.paged.add(request)
        return request

    def answers(self, num: int) -> dict[str, list[int]]:
        """Tokens of the next `num` requests that end."""
        done: dict[str, list[int]] = {}
        while len(done) < num:
            output = self.outputs.get(timeout=30)
            assert output.error is None
            if output.is_finished():
                done[output.request_id] = output.generated_tokens
        return done


@contextmanager
def running_batch(model: PreTrainedModel, limits: BatchLimits = LIMITS) -> Iterator[Batch]:
    batch = Batch(model, limits)
    batch.paged.start()
    try:
        yield batch
    finally:
        batch.paged.stop()


def greedy(model: PreTrainedModel, prompt: list[int], num: int = 12) -> list[int]:
    out = model.generate(torch.tensor([prompt]), max_new_tokens=num, do_sample=False, eos_token_id=None)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def with_deltas(family: str) -> Served:
    found = served(family)
    layers = [layer.view.index for layer in found.layers]
    found.add_rows(1, {layer: [0, 2, 3] for layer in layers}, seed=1)
    found.add_rows(2, {layers[-1]: [1, 3]}, seed=2)
    found.add_low_rank(3, {layer: [0, 1] for layer in layers}, seed=3)
    return found


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe", "mixtral", "olmoe", "gpt_oss"])
def test_every_answer_is_that_of_its_merged_model_alone(family: str) -> None:
    found = with_deltas(family)
    with running_batch(found.model) as batch:
        asked = {}
        for number in (0, 1, 2, 3):
            for prompt in PROMPTS:
                asked[batch.add(prompt, number).request_id] = (number, prompt)
        answers = batch.answers(len(asked))
    for request_id, (number, prompt) in asked.items():
        assert answers[request_id] == greedy(found.merged.get(number, found.plain), prompt), (number, prompt)


def test_a_prefix_is_found_again_for_its_own_delta_alone() -> None:
    found = with_deltas("olmoe")
    with running_batch(found.model) as batch:
        first = {batch.add(LONG, number).request_id: number for number in (1, 0)}
        answers = batch.answers(2)
        again = {batch.add(LONG, number).request_id: number for number in (0, 1, 2)}
        answers |= batch.answers(3)
        cached = {number: batch.paged.requests[each].num_cached_tokens for each, number in again.items()}
    for request_id, number in (first | again).items():
        assert answers[request_id] == greedy(found.merged.get(number, found.plain), LONG)
    assert cached == {0: 128, 1: 128, 2: 0}


def test_a_full_cache_makes_requests_wait_and_loses_none() -> None:
    found = with_deltas("olmoe")
    limits = BatchLimits(max_requests=16, max_batch_tokens=64, cache_tokens=512)
    with running_batch(found.model, limits) as batch:
        asked = {batch.add(prompt, number).request_id: (number, prompt) for number in (0, 1, 2) for prompt in PROMPTS}
        answers = batch.answers(len(asked))
    for request_id, (number, prompt) in asked.items():
        assert answers[request_id] == greedy(found.merged.get(number, found.plain), prompt)


def test_a_cancelled_request_is_gone_and_others_go_on() -> None:
    found = with_deltas("olmoe")
    with running_batch(found.model) as batch:
        long = batch.add([5], 1, max_tokens=4000)
        short = batch.add([8], 2)
        assert not batch.paged.is_gone(long.request_id)
        batch.paged.cancel(long.request_id)
        answers = batch.answers(1)
        wait_until(lambda: batch.paged.is_gone(long.request_id))
        assert batch.paged.cache_used < 0.2
    assert answers == {short.request_id: greedy(found.merged[2], [8])}


def test_prefixes_that_are_kept_for_later_take_no_share_of_the_cache() -> None:
    found = with_deltas("olmoe")
    with running_batch(found.model) as batch:
        batch.add(LONG, 1)
        batch.answers(1)
        batch.add(LONG, 1, max_tokens=200)
        first = batch.outputs.get(timeout=30)
        assert not first.is_finished()
        assert batch.paged.cache_used > 0
        batch.answers(1)
        assert batch.paged.cache_used == 0


def test_a_request_that_waits_for_a_full_cache_goes_on_once_the_others_are_cancelled() -> None:
    found = with_deltas("olmoe")
    limits = BatchLimits(max_requests=16, max_batch_tokens=64, cache_tokens=512)
    with running_batch(found.model, limits) as batch:
        prompts = [LONG + [7] * 30, LONG[50:172]]
        asked = {batch.add(prompt, 1, max_tokens=100).request_id: prompt for prompt in prompts}
        scheduler = batch.paged._manager.batch_processor.scheduler
        # they hold three of four blocks, and each needs another one soon: one has to wait
        wait_until(lambda: scheduler.block_new_requests)
        (waits,) = scheduler.waiting_requests
        (runs,) = asked.keys() - {waits}
        batch.paged.cancel(runs)
        wait_until(lambda: batch.paged.is_gone(runs))
        batch.paged.forget(runs)
        assert batch.answers(1) == {waits: greedy(found.merged[1], asked[waits], 100)}


def test_what_a_forgotten_request_leaves_in_the_cache_is_found_by_nobody() -> None:
    found = with_deltas("olmoe")
    with running_batch(found.model) as batch:
        hook = found.layers[0].register_forward_pre_hook(lambda *_: batch.paged.forget("r1"))
        batch.add(LONG, 1)
        batch.answers(1)
        hook.remove()
        base = batch.add(LONG, 0)
        assert batch.answers(1) == {"r2": greedy(found.plain, LONG)}
        assert base.num_cached_tokens == 0


def test_a_batch_that_was_stopped_holds_nothing() -> None:
    found = with_deltas("olmoe")
    with running_batch(found.model) as batch:
        long = batch.add([5], 1, max_tokens=4000)
        batch.outputs.get(timeout=30)
    assert not batch.paged.is_alive
    assert batch.paged.is_gone(long.request_id)
    assert batch.paged.cache_used == 0


def test_experts_are_counted_over_prompt_and_answer() -> None:
    found = with_deltas("olmoe")
    with running_batch(found.model) as batch:
        asked = batch.add([5, 9, 12], 1, counts_experts=True)
        batch.add([5, 9, 12], 2)
        batch.answers(2)
        # four experts a token; the last token of an answer is not read again
        assert {layer: int(counts.sum()) for layer, counts in asked.counts.items()} == dict.fromkeys(
            (0, 1, 2), 4 * (3 + 12 - 1)
        )


def test_an_error_in_the_model_ends_the_loop_and_every_request() -> None:
    found = with_deltas("olmoe")

    def broken(*_: Any) -> None:
        raise RuntimeError("the model broke")

    found.layers[0].register_forward_pre_hook(broken)
    with running_batch(found.model) as batch:
        batch.add([5], 1)
        output = batch.outputs.get(timeout=30)
        assert "the model broke" in output.error
        wait_until(lambda: not batch.paged.is_alive)
        assert "the model broke" in str(batch.paged.error)


def test_the_model_has_its_own_attention_again_after_the_batch() -> None:
    found = with_deltas("olmoe")
    before = found.model.config._attn_implementation
    with running_batch(found.model):
        assert found.model.config._attn_implementation != before
    assert found.model.config._attn_implementation == before
