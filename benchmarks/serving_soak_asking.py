"""The soak's requests that are to be answered, whole or streamed, and the comparison of answers with the right ones."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from dataclasses import dataclass, field
from typing import Any

import httpx2
from serving_soak_answers import TEMPERATURE, TOP_P, Question, Right
from serving_soak_names import ABSENT, Name, Names
from serving_soak_record import Record
from serving_soak_world import World

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LOGPROB_TOLERANCE = 2e-3
"""Float32, where transformers computes a prompt in one part and the server in several."""
_RETRY_SECONDS = 0.3


@dataclass
class Soak:
    """What all clients share."""

    address: str
    world: World
    names: Names
    http: httpx2.AsyncClient
    record: Record = field(default_factory=Record)


@dataclass
class Answer:
    """One choice as it came."""

    text: str = ""
    finish_reason: str | None = None
    logprobs: list[float] = field(default_factory=list)


@dataclass
class Asked:
    """A request with what it asks for."""

    name: Name
    questions: list[Question]
    body: dict[str, Any]
    n: int = 1
    is_drawn: bool = False
    stop: str | None = None
    echo: bool = False

    @property
    def path(self) -> str:
        return CHAT if self.questions[0].is_chat else TEXT

    def rights(self, world: World, folder: str | None) -> list[Right]:
        """Of all choices, by index."""
        table = world.drawn if self.is_drawn else world.greedy
        return [self._stopped(table[folder, question.number]) for question in self.questions for _ in range(self.n)]

    def _stopped(self, right: Right) -> Right:
        text, found, _ = right.text.partition(self.stop) if self.stop else (right.text, "", "")
        return Right(right.token_ids, text, "stop" if found else right.finish_reason, right.logprobs)


def draw_asked(soak: Soak, rng: random.Random, names: list[Name]) -> Asked:
    """A request at random that has one right answer for each delta that its name may stand for."""
    world, name = soak.world, rng.choice(names)
    is_drawn = rng.random() < 0.2
    table = world.drawn if is_drawn else world.greedy
    known = [q for q in world.questions if all((folder, q.number) in table for folder in name.folders)]
    question = rng.choice(known)
    body: dict[str, Any] = {"model": name.name, "max_tokens": question.max_tokens, "temperature": 0}
    asked = Asked(name, [question], body, is_drawn=is_drawn)
    if question.is_chat:
        body["messages"] = question.messages
    else:
        body["prompt"] = rng.choice([question.text, question.prompt_ids, [question.prompt_ids]])
    if is_drawn:
        body |= {"temperature": TEMPERATURE, "top_p": TOP_P, "seed": question.number}
    else:
        body["n"] = asked.n = rng.choice([1, 1, 1, 1, 2, 3])
        alike = [q for q in known if not q.is_chat and q.max_tokens == question.max_tokens]
        if question in alike and len(alike) > 1 and rng.random() < 0.2:
            asked.questions = rng.sample(alike, 2)
            body["prompt"] = [each.text for each in asked.questions]
    _draw_extras(soak, rng, asked)
    return asked


def _draw_extras(soak: Soak, rng: random.Random, asked: Asked) -> None:
    body, question = asked.body, asked.questions[0]
    extra = rng.random()
    if extra < 0.15:
        body |= {"logprobs": True, "top_logprobs": rng.randint(0, 5)} if question.is_chat else {"logprobs": 2}
    elif extra < 0.3:
        text = asked.rights(soak.world, rng.choice(asked.name.folders))[0].text
        if len(text) > 8:
            first = rng.randrange(2, len(text) - 4)
            asked.stop = text[first : first + rng.randint(2, 4)]
            body["stop"] = [asked.stop]
    elif extra < 0.35:
        body["metier"] = {"experts": True}
    elif extra < 0.4 and not question.is_chat:
        asked.echo = body["echo"] = True


async def ask(soak: Soak, rng: random.Random, names: list[Name] | None = None) -> None:
    """Ask, whole or in a stream, and compare what comes with what is right."""
    asked = draw_asked(soak, rng, names or soak.names.asked)
    is_stream = rng.random() < 0.5
    kind = ("stream" if is_stream else "whole") + (", drawn by a seed" if asked.is_drawn else ", greedy")
    with asked.name.watched() as possible:
        began = time.perf_counter()
        if is_stream:
            status, answers, usage = await _stream(soak, asked)
        else:
            status, answers, usage = await _whole(soak, asked)
        soak.record.count(kind, status, time.perf_counter() - began if status == 200 else None)
        check(soak, kind, asked, status, answers, usage, possible)
    if status == 429:
        await asyncio.sleep(_RETRY_SECONDS * (1 + rng.random()))


async def _whole(soak: Soak, asked: Asked) -> tuple[int, list[Answer], dict[str, Any]]:
    response = await soak.http.post(asked.path, json=asked.body)
    if response.status_code != 200:
        return response.status_code, [Answer(response.text)], {}
    values = response.json()
    answers = [Answer() for _ in values["choices"]]
    for choice in values["choices"]:
        _add(answers[choice["index"]], choice, choice.get("message", choice))
    return 200, answers, values["usage"]


async def _stream(soak: Soak, asked: Asked) -> tuple[int, list[Answer], dict[str, Any]]:
    body = {**asked.body, "stream": True, "stream_options": {"include_usage": True}}
    async with soak.http.stream("POST", asked.path, json=body) as response:
        if response.status_code != 200:
            return response.status_code, [Answer((await response.aread()).decode())], {}
        return 200, *await read_events(response.aiter_lines(), asked)


async def read_events(lines, asked: Asked) -> tuple[list[Answer], dict[str, Any]]:
    """The choices and the usage of a stream's lines."""
    answers = [Answer() for _ in range(asked.n * len(asked.questions))]
    usage: dict[str, Any] = {}
    is_done = False
    async for line in lines:
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            is_done = True
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            return [Answer(finish_reason=f"error: {chunk['error']['message']}")], usage
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            _add(answers[choice["index"]], choice, choice.get("delta", choice))
    return (answers if is_done else [Answer(finish_reason="cut off")]), usage


def _add(answer: Answer, choice: dict[str, Any], text: dict[str, Any]) -> None:
    answer.text += text.get("content", text.get("text")) or ""
    answer.finish_reason = choice["finish_reason"] or answer.finish_reason
    found = choice.get("logprobs") or {}
    answer.logprobs += [token["logprob"] for token in found.get("content") or []] or found.get("token_logprobs") or []


def check(
    soak: Soak,
    kind: str,
    asked: Asked,
    status: int,
    answers: list[Answer],
    usage: dict[str, Any],
    possible: set[str | None],
) -> None:
    """Record what is not right about an answer."""
    if status in (404, 429):
        if status == 404 and ABSENT not in possible:
            soak.record.is_unexpected(f"{kind}: {asked.name.name}: 404 where {possible} may answer: {answers[0].text}")
        return
    if status != 200:
        soak.record.is_unexpected(f"{kind}: {asked.name.name}: {status}: {answers[0].text[:300]}")
        return
    soak.record.num_checked += len(answers)
    folders = possible - {ABSENT}
    faults = {folder: _faults(asked, asked.rights(soak.world, folder), answers, usage) for folder in folders}
    if all(faults.values()) or not faults:
        soak.record.is_wrong(f"{kind}: {asked.body} of {sorted(map(str, possible))}: {faults}")


def _faults(asked: Asked, rights: list[Right], answers: list[Answer], usage: dict[str, Any]) -> list[str]:
    if len(answers) != len(rights):
        return [f"{len(answers)} choices of {len(rights)}: {answers}"]
    found = []
    for index, (right, answer) in enumerate(zip(rights, answers, strict=True)):
        text = (asked.questions[index // asked.n].text if asked.echo else "") + right.text
        if answer.text != text or answer.finish_reason != right.finish_reason:
            found.append(f"[{index}] {answer.finish_reason} {answer.text!r} for {right.finish_reason} {text!r}")
        elif "logprobs" in asked.body and not _are_close(answer.logprobs, right.logprobs):
            found.append(f"[{index}] log probabilities {answer.logprobs} for {right.logprobs}")
    num_prompt = sum(len(question.prompt_ids) for question in asked.questions)
    num_answer = sum(len(right.token_ids) for right in rights)
    if not found and usage["prompt_tokens"] != num_prompt:
        found.append(f"{usage} for {num_prompt} tokens of prompts")
    if not found and asked.stop is None and usage["completion_tokens"] != num_answer:
        found.append(f"{usage} for {num_answer} tokens of answers")
    return found


def _are_close(got: list[float], expected: list[float]) -> bool:
    pairs = zip(got, expected, strict=False)
    return len(got) == len(expected) and all(math.isclose(a, b, abs_tol=LOGPROB_TOLERANCE) for a, b in pairs)
