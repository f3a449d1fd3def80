"""The engine as a whole: real deltas from files, in tiers too small for all of them, in one batch."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from metier.errors import DeltaError, EngineError, OverloadedError, RequestError, UnknownDeltaError
from metier.models.load import LoadedModel
from metier.models.moe import moe_layers
from metier.serving.contract import SamplingSettings
from metier.serving.engine import Engine
from metier.serving.generation import Answer
from metier.serving.start import EngineSettings, start_engine
from serving.delta_folders import base_in, esft_in, expert_lora_in, lora_in, merged
from tiny_models import VOCAB_SIZE

PROMPT, OTHER = [5, 9, 12, 7, 40, 41], [8, 90, 91]
LONG = list(range(10, 150))
SMALL = {"cache_tokens": 4096, "max_batch_tokens": 64, "max_requests": 8}


class World:
    """A base and its deltas in folders, and what each merged model answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base: LoadedModel = base_in(folder / "base")
        every = {layer.index: [0, 1, 2, 3] for layer in moe_layers(self.base.model)}
        self.deltas = {
            "law": esft_in(folder / "law", self.base, seed=1, experts=every),
            "code": esft_in(folder / "code", self.base, seed=2),
            "thin": expert_lora_in(folder / "thin", self.base, seed=3),
            "lora": lora_in(folder / "lora", self.base, seed=4),
        }
        self._answers: dict[tuple[str | None, tuple[int, ...]], list[int]] = {}

    def greedy(self, delta: str | None, prompt: list[int]) -> list[int]:
        key = (delta, tuple(prompt))
        if key not in self._answers:
            model: Any = self.base.model.eval() if delta is None else merged(self.base, self.deltas[delta])
            out = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None)
            self._answers[key] = out[0, len(prompt) :].tolist()
        return self._answers[key]

    def start(self, *names: str, **settings: Any) -> Engine:
        started = start_engine(
            str(self.folder / "base"),
            {name: self.deltas[name] for name in names},
            settings=EngineSettings(**{**SMALL, **settings}),
        )
        started.engine._eos_token_ids = []
        return started.engine


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def run(engine: Engine, body: Callable[[], Awaitable[None]]) -> None:
    """`body` in an event loop, then the end of the engine; a test that hangs fails."""

    async def whole() -> None:
        try:
            await asyncio.wait_for(body(), timeout=60)
        finally:
            await engine.close(grace_seconds=0)

    asyncio.run(whole())


def ask(engine: Engine, delta: str | None, prompt: list[int] = PROMPT, **settings: Any) -> Answer:
    return engine.submit(
        prompt, delta=delta, settings=SamplingSettings(**{"max_tokens": 10, "temperature": 0, **settings})
    )


async def tokens_of(answer: Answer) -> list[int]:
    return [token.token_id async for token in answer]


def test_requests_of_all_kinds_of_deltas_are_answered_as_by_their_merged_models(world: World) -> None:
    engine = world.start("law", "code", "thin", "lora")

    async def body() -> None:
        asked = [(name, p) for name in (None, "law", "code", "thin", "lora") for p in (PROMPT, OTHER, LONG)]
        got = await asyncio.gather(*(tokens_of(ask(engine, name, prompt)) for name, prompt in asked))
        for (name, prompt), tokens in zip(asked, got, strict=True):
            assert tokens == world.greedy(name, prompt), (name, prompt)
        assert engine.status().num_running == engine.status().num_waiting == 0

    run(engine, body)
    assert len({tuple(world.greedy(name, PROMPT)) for name in (None, "law", "code", "thin", "lora")}) == 5


def test_a_lora_on_the_output_layer_is_for_its_own_requests_alone(world: World) -> None:
    world.deltas["head"] = lora_in(world.folder / "head", world.base, seed=5, target_modules=["lm_head", "k_proj"])
    engine = world.start("head", "law")

    async def body() -> None:
        asked = [(name, prompt) for prompt in (LONG, PROMPT, OTHER, [4]) for name in ("head", None, "law", "head")]
        got = await asyncio.gather(*(tokens_of(ask(engine, name, prompt)) for name, prompt in asked))
        for (name, prompt), tokens in zip(asked, got, strict=True):
            assert tokens == world.greedy(name, prompt), (name, prompt)

    run(engine, body)
    assert world.greedy("head", PROMPT) != world.greedy(None, PROMPT)


def test_deltas_take_turns_on_an_accelerator_too_small_for_two(world: World) -> None:
    sizes = {status.name: status.num_bytes for status in _statuses(world)}
    engine = world.start("law", "code", delta_memory_bytes=max(sizes.values()))

    async def body() -> None:
        for _ in range(2):
            asked = ["law", "code"] * 3
            got = await asyncio.gather(*(tokens_of(ask(engine, name)) for name in asked))
            assert got == [world.greedy(name, PROMPT) for name in asked]
        assert engine.status().delta_bytes["accelerator"] <= max(sizes.values())

    run(engine, body)


def _statuses(world: World) -> list[Any]:
    engine = world.start("law", "code")
    found = engine.deltas()
    run(engine, lambda: asyncio.sleep(0))
    return found


def test_a_delta_is_loaded_and_unloaded_while_others_are_answered(world: World) -> None:
    engine = world.start("law")

    async def body() -> None:
        long = asyncio.create_task(tokens_of(ask(engine, "law", max_tokens=60)))
        await engine.load_delta("code", world.deltas["code"])
        assert [status.name for status in engine.deltas()] == ["law", "code"]
        running = ask(engine, "code", max_tokens=60)
        leaving = asyncio.create_task(engine.unload_delta("code"))
        await asyncio.sleep(0)
        with pytest.raises(UnknownDeltaError, match="'code'"):
            ask(engine, "code")
        assert (await tokens_of(running))[:10] == world.greedy("code", PROMPT)
        await leaving
        assert [status.name for status in engine.deltas()] == ["law"]
        assert (await long)[:10] == world.greedy("law", PROMPT)

    run(engine, body)


def test_another_delta_under_the_same_name_shares_no_prefix_with_the_former(world: World) -> None:
    engine = world.start("law")

    async def body() -> None:
        assert await tokens_of(ask(engine, "law", LONG)) == world.greedy("law", LONG)
        again = ask(engine, "law", LONG)
        assert await tokens_of(again) == world.greedy("law", LONG)
        assert again.finish is not None
        assert again.finish.num_cached_tokens == 128
        await engine.unload_delta("law")
        await engine.load_delta("law", world.deltas["code"])
        other = ask(engine, "law", LONG)
        assert await tokens_of(other) == world.greedy("code", LONG)
        assert other.finish is not None
        assert other.finish.num_cached_tokens == 0

    run(engine, body)


def test_a_delta_is_brought_up_and_sent_down_without_a_request(world: World) -> None:
    sizes = {status.name: status.num_bytes for status in _statuses(world)}
    engine = world.start("law", "code", delta_memory_bytes=max(sizes.values()))

    def tiers() -> dict[str, str]:
        return {status.name: status.tier for status in engine.deltas()}

    async def body() -> None:
        for name, other in (("law", "code"), ("code", "law"), ("code", "law"), ("law", "code")):
            await engine.bring_delta(name)
            assert tiers() == {name: "accelerator", other: "disk"}
        running = asyncio.create_task(tokens_of(ask(engine, "law", max_tokens=40)))
        await asyncio.sleep(0)
        engine.send_delta_down("law")
        coming = asyncio.create_task(engine.bring_delta("code"))
        assert (await running)[:10] == world.greedy("law", PROMPT)
        await coming
        assert tiers() == {"law": "disk", "code": "accelerator"}
        engine.send_delta_down("code")
        while tiers()["code"] != "disk":
            await asyncio.sleep(0.001)
        await asyncio.wait_for(asyncio.gather(engine.unload_delta("law"), engine.unload_delta("code")), timeout=10)

    run(engine, body)


def test_who_waits_for_a_delta_to_be_brought_hears_of_every_end(world: World, tmp_path: Path) -> None:
    sizes = {status.name: status.num_bytes for status in _statuses(world)}
    bad = Path(shutil.copytree(world.deltas["code"], tmp_path / "bad"))
    engine = world.start("law", delta_memory_bytes=max(sizes.values()))

    async def body() -> None:
        await engine.load_delta("bad", bad)
        (bad / "adapter_model.safetensors").unlink()
        with pytest.raises(UnknownDeltaError, match="'none'"):
            await engine.bring_delta("none")
        with pytest.raises(DeltaError, match=r"adapter_model\.safetensors"):
            await engine.bring_delta("bad")
        ask(engine, "law", max_tokens=200)
        given_up = asyncio.create_task(engine.bring_delta("bad"))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        await asyncio.wait_for(engine.unload_delta("bad"), timeout=10)
        await engine.load_delta("code", world.deltas["code"])
        waiting = asyncio.create_task(engine.bring_delta("code"))
        await asyncio.sleep(0)
        await engine.close(grace_seconds=0)
        with pytest.raises(EngineError, match="shutting down"):
            await waiting
        with pytest.raises(EngineError, match="shutting down"):
            await engine.bring_delta("law")

    run(engine, body)


def test_a_cancelled_answer_ends_soon_and_frees_its_delta(world: World) -> None:
    engine = world.start("law", max_requests=1)

    async def body() -> None:
        running, waiting = ask(engine, "law", max_tokens=200), ask(engine, "law")
        await running.__aiter__().__anext__()
        last = ask(engine, None)
        waiting.cancel()
        running.cancel()
        assert await tokens_of(waiting) == []
        await tokens_of(running)
        assert running.finish is not None
        assert waiting.finish is not None
        assert running.finish.reason == waiting.finish.reason == "cancelled"
        assert running.num_tokens < 200
        assert await tokens_of(last) == world.greedy(None, PROMPT)
        await asyncio.wait_for(engine.unload_delta("law"), timeout=10)

    run(engine, body)


def test_a_cancelled_answer_says_what_it_has_used(world: World) -> None:
    engine = world.start("law")

    async def body() -> None:
        await tokens_of(ask(engine, "law", LONG))
        answer = ask(engine, "law", LONG, max_tokens=100, counts_experts=True)
        await answer.__aiter__().__anext__()
        answer.cancel()
        await tokens_of(answer)
        assert answer.finish is not None
        assert answer.finish.reason == "cancelled"
        assert answer.finish.num_cached_tokens == 128
        assert answer.finish.experts is not None

    run(engine, body)


def test_the_delta_of_a_cancelled_answer_is_held_until_the_batch_knows_that_it_is_cancelled(world: World) -> None:
    engine = world.start("law")
    scheduler = engine._batch._manager.batch_processor.scheduler
    is_read, may_go_on = threading.Event(), threading.Event()
    add_waiting = scheduler.add_waiting_request

    def slowly(state: Any) -> None:
        is_read.set()
        may_go_on.wait(timeout=30)
        add_waiting(state)

    scheduler.add_waiting_request = slowly

    async def body() -> None:
        answer = ask(engine, "law")
        await asyncio.to_thread(is_read.wait, 30)
        # the request is in no queue of the batch now
        answer.cancel()
        await asyncio.sleep(0.1)
        assert engine.deltas()[0].num_running == 1
        may_go_on.set()
        assert len(await tokens_of(answer)) <= 1
        assert engine.deltas()[0].num_running == 0

    run(engine, body)


def test_what_cannot_be_answered_is_refused(world: World) -> None:
    engine = world.start("law", max_requests=1, max_waiting=3)

    async def body() -> None:
        with pytest.raises(UnknownDeltaError, match="no delta of that name is served"):
            ask(engine, "medicine")
        with pytest.raises(RequestError, match="has 6 tokens and the answer may have 4000, but together"):
            ask(engine, "law", max_tokens=4000)
        with pytest.raises(RequestError, match="the prompt has no tokens"):
            ask(engine, "law", [])
        for token_id in (-1, VOCAB_SIZE, 2**40):
            with pytest.raises(RequestError, match=f"the prompt has token {token_id}, but the model's are 0 to 261"):
                ask(engine, "law", [5, token_id])
        asked = [ask(engine, None, max_tokens=100)]
        with pytest.raises(OverloadedError, match="Try again later"):
            asked.extend(ask(engine, "law") for _ in range(5))
        for answer in asked:
            await tokens_of(answer)
        # a refused request does not hold its delta
        await asyncio.wait_for(engine.unload_delta("law"), timeout=10)

    run(engine, body)


def test_a_delta_that_was_altered_on_the_disk_is_an_error_to_those_who_wait(world: World, tmp_path: Path) -> None:
    sizes = {status.name: status.num_bytes for status in _statuses(world)}
    copied = Path(shutil.copytree(world.deltas["code"], tmp_path / "code"))
    engine = world.start("law", delta_memory_bytes=max(sizes.values()))

    async def body() -> None:
        await engine.load_delta("code", copied)
        # in another place, so that it is read again
        assert await tokens_of(ask(engine, "law")) == world.greedy("law", PROMPT)
        file = copied / "adapter_model.safetensors"
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
        answer = ask(engine, "code")
        assert await tokens_of(answer) == []
        assert answer.finish is not None
        assert answer.finish.reason == "error"
        assert str(file) in str(answer.finish.error)
        assert await tokens_of(ask(engine, "law")) == world.greedy("law", PROMPT)

    run(engine, body)


def test_a_delta_of_another_base_is_refused(world: World, tmp_path: Path) -> None:
    other = base_in(tmp_path / "other", "deepseek_v2")
    folder = esft_in(tmp_path / "delta", other)
    engine = world.start("law")

    async def body() -> None:
        with pytest.raises(DeltaError, match="base"):
            await engine.load_delta("other", folder)
        with pytest.raises(DeltaError, match="the name is taken"):
            await engine.load_delta("law", world.deltas["code"])
        assert [status.name for status in engine.deltas()] == ["law"]

    run(engine, body)


def test_a_model_that_breaks_ends_every_answer_and_the_engine_says_so(world: World) -> None:
    engine = world.start("law")

    def broken(*_: Any) -> None:
        raise RuntimeError("the model broke")

    async def body() -> None:
        engine._batch._model.register_forward_pre_hook(broken)
        answer = ask(engine, "law")
        assert await tokens_of(answer) == []
        assert answer.finish is not None
        assert "the model broke" in str(answer.finish.error)
        while engine.status().is_alive:
            await asyncio.sleep(0.01)
        with pytest.raises(EngineError, match="the engine has died: the model broke"):
            ask(engine, None)

    run(engine, body)


def test_a_failure_without_a_text_is_no_finished_answer(world: World) -> None:
    engine = world.start("law")

    def broken(*_: Any) -> None:
        raise MemoryError

    async def body() -> None:
        engine._batch._model.register_forward_pre_hook(broken)
        answer = ask(engine, "law")
        await tokens_of(answer)
        assert answer.finish is not None
        assert (answer.finish.reason, answer.finish.error) == ("error", "MemoryError()")

    run(engine, body)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_deltas_cannot_move_any_more_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = world.start("law", "code", delta_memory_bytes=max(each.num_bytes for each in _statuses(world)))

    async def body() -> None:
        monkeypatch.setattr(engine._tiers._residency, "prefetch", lambda names: 1 // 0)
        answer = ask(engine, next(status.name for status in engine.deltas() if status.tier == "disk"))
        await tokens_of(answer)
        assert "the thread that loads deltas has died" in str(answer.finish)
        status = engine.status()
        assert not status.is_alive
        assert "ZeroDivisionError" in str(status.error)
        assert await tokens_of(ask(engine, None)) == world.greedy(None, PROMPT)

    run(engine, body)


def test_all_who_wait_hear_of_it_when_the_engine_dies(world: World) -> None:
    engine = world.start("law", max_requests=1)
    all_asked = threading.Event()

    def broken(*_: Any) -> None:
        all_asked.wait(timeout=30)
        raise RuntimeError("the model broke")

    async def body() -> None:
        engine._batch._model.register_forward_pre_hook(broken)
        answers = [ask(engine, "law") for _ in range(20)]
        all_asked.set()
        await asyncio.gather(*map(tokens_of, answers))
        assert "the model broke" in str(answers[0].finish)
        assert {answer.finish.reason for answer in answers if answer.finish is not None} == {"error"}
        assert engine.status().num_running == engine.status().num_waiting == 0

    run(engine, body)


def test_an_engine_that_was_closed_still_says_how_it_is(world: World) -> None:
    engine = world.start("law", max_requests=1)

    async def body() -> None:
        answers = [ask(engine, "law", max_tokens=200) for _ in range(3)]
        await answers[0].__aiter__().__anext__()
        await engine.close(grace_seconds=0)
        for answer in answers:
            await tokens_of(answer)
        assert {answer.finish.reason for answer in answers if answer.finish is not None} == {"cancelled"}
        status = engine.status()
        assert not status.is_alive
        assert status.num_running == status.num_waiting == 0

    run(engine, body)


def test_closing_lets_running_requests_finish_and_takes_no_new_ones(world: World) -> None:
    engine = world.start("law")

    async def body() -> None:
        answer = asyncio.create_task(tokens_of(ask(engine, "law", max_tokens=40)))
        await asyncio.sleep(0)
        closing = asyncio.create_task(engine.close(grace_seconds=30))
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match="shutting down"):
            ask(engine, None)
        await closing
        assert (await answer)[:10] == world.greedy("law", PROMPT)

    asyncio.run(body())


def test_experts_of_an_answer_are_counted(world: World) -> None:
    engine = world.start("code")

    async def body() -> None:
        answer = ask(engine, "code", counts_experts=True)
        await tokens_of(answer)
        assert answer.finish is not None
        use = answer.finish.experts
        assert use is not None
        assert use.layers == (0, 1, 2)
        assert use.replaced == ((0, 2),) * 3
        # two experts a token; the last token of an answer is not read again
        assert [sum(counts) for counts in use.counts] == [2 * (6 + 10 - 1)] * 3

    run(engine, body)


def test_log_probabilities_come_with_their_tokens(world: World) -> None:
    engine = world.start("law")

    async def body() -> None:
        answer = ask(engine, "law", num_top_logprobs=3)
        tokens = [token async for token in answer]
        assert [token.token_id for token in tokens] == world.greedy("law", PROMPT)
        assert all(token.top_logprobs[0] == (token.token_id, token.logprob) for token in tokens)
        assert all(len(token.top_logprobs) == 3 for token in tokens)

    run(engine, body)
