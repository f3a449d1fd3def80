"""The running batch: every answer is that of its merged model alone."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from metier.errors import ServingError
from metier.serving.contract import SamplingSettings
from metier.serving.paged_batch import BatchLimits, PagedBatch
from metier.serving.paged_requests import BatchRequest
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
            assert output.error in (None, "cancelled")
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
        again = [batch.add(LONG, number) for number in (0, 1, 2)]
        answers |= batch.answers(3)
        # what is kept for others to find makes way for whoever needs the room
        assert batch.paged.cache_used == 0.0
    cached = {request.number: request.num_cached_tokens for request in again}
    for request_id, number in (first | {request.request_id: request.number for request in again}).items():
        assert answers[request_id] == greedy(found.merged.get(number, found.plain), LONG)
    assert cached == {0: 128, 1: 128, 2: 0}


def test_a_request_that_breaks_does_not_reach_those_that_get_its_place_in_the_cache() -> None:
    found = with_deltas("deepseek_v2")
    keys = found.layers[0].view.path.replace("mlp.experts", "self_attn.kv_b_proj")
    limits = BatchLimits(max_requests=16, max_batch_tokens=64, cache_tokens=512)
    with running_batch(found.model, limits) as batch:
        # what the model makes of one prompt is infinite in the cache
        hook = found.model.get_submodule(keys).register_forward_hook(lambda *args: args[2] * float("inf"))
        batch.add(LONG[:20], max_tokens=3)
        batch.answers(1)
        hook.remove()
        asked = {batch.add(prompt, 1).request_id: prompt for prompt in PROMPTS}
        answers = batch.answers(len(asked))
    for request_id, prompt in asked.items():
        assert answers[request_id] == greedy(found.merged[1], prompt), prompt


def test_a_full_cache_makes_requests_wait_and_loses_none() -> None:
    found = with_deltas("olmoe")
    limits = BatchLimits(max_requests=16, max_batch_tokens=64, cache_tokens=512)
    with running_batch(found.model, limits) as batch:
        asked = {batch.add(prompt, number).request_id: (number, prompt) for number in (0, 1, 2) for prompt in PROMPTS}
        answers = batch.answers(len(asked))
    for request_id, (number, prompt) in asked.items():
        assert answers[request_id] == greedy(found.merged.get(number, found.plain), prompt)


def test_the_longest_request_fits_a_cache_of_layers_of_two_kinds() -> None:
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    found = served("gpt_oss", num_hidden_layers=4, layer_types=kinds, sliding_window=32, max_position_embeddings=2048)
    limits = BatchLimits(max_requests=16, max_batch_tokens=64, cache_tokens=96)
    with running_batch(found.model, limits) as batch:
        prompt = [5 + place % 200 for place in range(batch.paged.max_length - 2)]
        request = batch.add(prompt, max_tokens=2)
        assert batch.answers(1)[request.request_id] == greedy(found.plain, prompt, 2)


def test_a_cancelled_request_is_out_of_the_batch_and_others_go_on() -> None:
    found = with_deltas("olmoe")
    with running_batch(found.model) as batch:
        long = batch.add([5], 1, max_tokens=4000)
        short = batch.add([8], 2)
        batch.paged.cancel(long.request_id)
        output = next(each for each in iter(batch.outputs.get, None) if each.is_finished())
        assert (output.request_id, output.error) == (long.request_id, "cancelled")
        answers = batch.answers(1)
        assert batch.paged.requests == {}
        assert batch.paged.cache_used < 0.2
    assert answers == {short.request_id: greedy(found.merged[2], [8])}


def test_every_request_has_a_last_output_when_the_batch_is_stopped() -> None:
    found = with_deltas("olmoe")
    with running_batch(found.model) as batch:
        asked = {batch.add([5], 1, max_tokens=4000).request_id for _ in range(20)}
        batch.outputs.get(timeout=30)
        asked |= {batch.add([5], 1, max_tokens=4000).request_id for _ in range(20)}
    ends = [each.request_id for each in batch.outputs.queue if each.is_finished()]
    assert sorted(ends) == sorted(asked)
    with pytest.raises(ServingError, match="the engine's loop has ended"):
        batch.add([5])


def test_a_batch_that_waits_for_requests_hears_that_it_is_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(with_deltas("olmoe").model, LIMITS)
    news, is_waiting = batch.paged._manager._wake_up_loop, threading.Event()

    def wait(timeout: float) -> None:
        """Without looking again after a while."""
        is_waiting.set()
        threading.Event.wait(news, 60)

    monkeypatch.setattr(news, "wait", wait)
    batch.paged.start()
    is_waiting.wait()
    began = time.monotonic()
    batch.paged.stop()
    assert time.monotonic() - began < 30


def test_a_request_that_a_full_cache_put_back_goes_on_once_the_last_running_one_is_cancelled() -> None:
    found = with_deltas("olmoe")
    limits = BatchLimits(max_requests=16, max_batch_tokens=64, cache_tokens=96)
    with running_batch(found.model, limits) as batch:
        first, second = batch.add([5, 9], 1, max_tokens=90), batch.add([8], 2, max_tokens=40)
        while True:
            output = batch.outputs.get(timeout=30)
            if output.request_id == first.request_id and len(output.generated_tokens) == 40:
                break
        batch.paged.cancel(first.request_id)
        assert batch.answers(2)[second.request_id] == greedy(found.merged[2], [8], 40)


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
