"""The soak's clients that leave before the end, and the page's way of asking several models over one connection."""

from __future__ import annotations

import asyncio
import json
import random
import uuid

import httpx2
from serving_soak_asking import CHAT, TEXT, Asked, Soak, check, draw_asked, read_events


async def ask_together(soak: Soak, rng: random.Random) -> None:
    """As the page does: one question to several models over one connection; sometimes one is stopped, or all left."""
    names = rng.sample(soak.names.fixed, 3)
    question = rng.choice(
        [q for q in soak.world.questions if all((n.folders[0], q.number) in soak.world.greedy for n in names)]
    )
    words = {"messages": question.messages} if question.is_chat else {"prompt": question.text}
    words |= {"temperature": 0, "max_tokens": question.max_tokens, "stream": True}
    words["stream_options"] = {"include_usage": True}
    asked_id, leaves, stops = uuid.uuid4().hex, rng.random() < 0.3, rng.random() < 0.3
    body = {
        "id": asked_id,
        "path": CHAT if question.is_chat else TEXT,
        "models": [n.name for n in names],
        "body": words,
    }
    texts, statuses, num_events = dict.fromkeys(body["models"], ""), {}, 0
    async with soak.http.stream("POST", "/page/ask", json=body) as response:
        soak.record.count("page, asked together", response.status_code)
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            event = json.loads(line[6:])
            texts[event["model"]] += event.get("text", "")
            statuses[event["model"]] = event.get("status", statuses.get(event["model"]))
            num_events += 1
            if leaves and num_events > 3:
                return
            if stops and num_events == 3:
                stopped = await soak.http.post("/page/stop", json={"id": asked_id, "model": names[0].name})
                soak.record.count("page, one is stopped", stopped.status_code)
    for name in names[1 if stops else 0 :]:
        asked = Asked(name, [question], words)
        answers, usage = await read_events(_each(texts[name.name].splitlines()), asked)
        check(soak, "page", asked, statuses[name.name], answers, usage, set(name.folders))


async def _each(lines: list[str]):
    for line in lines:
        yield line


async def leave(soak: Soak, rng: random.Random) -> None:
    """Ask and close the connection: before anything comes, after the head, in the middle, or after reading nothing."""
    asked = draw_asked(soak, rng, soak.names.asked)
    where = rng.choice(["before the head", "after the head", "in the middle", "whole", "reads nothing"])
    kind = f"leaves, {where}"
    if where in ("before the head", "whole"):
        body = asked.body if where == "whole" else {**asked.body, "stream": True}
        try:
            response = await soak.http.post(asked.path, json=body, timeout=rng.choice([0.002, 0.02, 0.1, 0.5]))
            soak.record.count(kind, response.status_code)
            if response.status_code not in (200, 404, 429):
                soak.record.is_unexpected(f"{kind}: {response.status_code}: {response.text[:300]}")
        except httpx2.TimeoutException:
            soak.record.count(kind, "left")
        return
    async with soak.http.stream("POST", asked.path, json={**asked.body, "stream": True}) as response:
        if response.status_code != 200:
            soak.record.count(kind, response.status_code)
            return
        if where == "reads nothing":
            await asyncio.sleep(rng.random() * 3)
        if where == "in the middle":
            num_lines = rng.randint(1, 16)
            async for _ in response.aiter_lines():
                num_lines -= 1
                if not num_lines:
                    break
        soak.record.count(kind, "left")
