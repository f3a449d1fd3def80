"""Two replicas on Ray Serve under clients of sixteen deltas: does a request go to a replica that holds its delta?

    python benchmarks/serving_ray_soak.py       some 10 minutes on two cores; benchmarks/results/serving_ray_soak.md

`metier serve --on ray --replicas 2` in a process of its own, with sixteen ESFT deltas of which a replica holds eight
at once (`--held`). Each client asks for one model after another, whole or in a stream. Every answer is compared with
that of the merged model alone, in one process and without the server. Where each request's delta lay when the request
came to its replica is counted there, before anything is loaded for it, and read from /metrics. Memory is judged after a
warm-up of a fifth of the time: the median of the last fifth against that of the second fifth.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import httpx2
from serving_ray_soak_report import Outcome, write_report
from serving_ray_soak_world import BASE, RayWorld, make_ray_world
from serving_soak_asking import CHAT, TEXT
from serving_soak_record import Record
from serving_soak_server import Sample, Server, gauges, left_behind, sample_of

ENGINE = "ray::ServeReplica:metier:Engine"
_STUCK_SECONDS = 300
_BASE_SHARE = 0.1
"""Of requests, those to the base, which any replica answers."""
_GRACE_SECONDS = 60


def start_server(world: RayWorld, log: Path, *, held: int) -> Server:
    deltas = [word for name in world.names for word in ("--delta", f"{name}={world.folder / name}")]
    # the largest ones, so that whichever are asked for fit
    room = sum(sorted(world.sizes.values(), reverse=True)[:held])
    options = {
        "--model": BASE,
        "--dtype": "float32",
        "--port": 0,
        "--on": "ray",
        "--replicas": 2,
        "--device-memory": "1500MiB",
        "--delta-memory": room,
        "--cache-tokens": 16384,
        "--grace-seconds": _GRACE_SECONDS,
    }
    return Server([*(str(each) for option in options.items() for each in option), *deltas], log)


def engine_pids() -> list[int]:
    """Of the replicas that this machine has; there is one such server here."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                title = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if title.startswith(ENGINE):
                found.append(int(entry.name))
    return found


class Clients:
    """What they share."""

    def __init__(self, world: RayWorld, http: httpx2.AsyncClient, *, skew: float) -> None:
        self.world, self.http, self.record = world, http, Record()
        # the names in another order than that in which they were made
        names = random.Random(1).sample(world.names, len(world.names))
        self._weights = {name: 1 / (place + 1) ** skew for place, name in enumerate(names)}

    def draw(self, rng: random.Random) -> str:
        if rng.random() < _BASE_SHARE:
            return BASE
        return rng.choices(list(self._weights), list(self._weights.values()))[0]

    async def ask(self, rng: random.Random) -> None:
        name = self.draw(rng)
        question = rng.choice([q for q in self.world.questions if (name, q.number) in self.world.rights])
        right = self.world.rights[name, question.number]
        body = {"model": name, "max_tokens": question.max_tokens, "temperature": 0}
        body |= {"messages": question.messages} if question.is_chat else {"prompt": question.text}
        path, is_stream, began = CHAT if question.is_chat else TEXT, rng.random() < 0.5, time.perf_counter()
        status, text, reason = await (self._stream if is_stream else self._whole)(path, body)
        kind = "stream" if is_stream else "whole"
        self.record.count(kind, status, time.perf_counter() - began if status == 200 else None)
        if status != 200:
            self.record.is_unexpected(f"{kind}: {name}: {status}: {text[:300]}")
            return
        self.record.num_checked += 1
        if (text, reason) != (right.text, right.finish_reason):
            self.record.is_wrong(f"{kind}: {body}: {reason} {text!r} for {right.finish_reason} {right.text!r}")

    async def _whole(self, path: str, body: dict) -> tuple[int, str, str | None]:
        response = await self.http.post(path, json=body)
        if response.status_code != 200:
            return response.status_code, response.text, None
        (choice,) = response.json()["choices"]
        return 200, choice.get("message", choice).get("content", choice.get("text")), choice["finish_reason"]

    async def _stream(self, path: str, body: dict) -> tuple[int, str, str | None]:
        async with self.http.stream("POST", path, json={**body, "stream": True}) as response:
            if response.status_code != 200:
                return response.status_code, (await response.aread()).decode(), None
            text, reason, is_done = "", None, False
            async for line in response.aiter_lines():
                is_done = is_done or line == "data: [DONE]"
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        return 200, chunk["error"]["message"], "error"
                    (choice,) = chunk["choices"]
                    text += choice.get("delta", choice).get("content", choice.get("text")) or ""
                    reason = choice["finish_reason"] or reason
            return 200, text, reason if is_done else "cut off"

    async def ask_on(self, rng: random.Random, until: float) -> None:
        while time.monotonic() < until:
            try:
                async with asyncio.timeout(_STUCK_SECONDS):
                    await self.ask(rng)
            except Exception as error:
                self.record.count("failed", type(error).__name__)
                self.record.is_unexpected(f"{type(error).__name__}: {error}")
                await asyncio.sleep(1)


async def watch(
    clients: Clients,
    began: float,
    samples: dict[int, list[Sample]],
    loads: list[float],
    arrivals: list[tuple[float, dict[str, int]]],
) -> None:
    """What each replica's process takes, each second; how busy the machine is and where deltas lay, each ten."""
    for second in itertools.count():
        if second % 10 == 0:
            loads.append(os.getloadavg()[0])
            arrivals.append((time.monotonic() - began, await arrived(clients.http)))
        for pid in engine_pids():
            samples.setdefault(pid, []).append(sample_of(pid, began))
        await asyncio.sleep(1)


async def arrived(http: httpx2.AsyncClient) -> dict[str, int]:
    """Requests for deltas by the tier in which those lay, over all replicas."""
    counts: dict[str, int] = {}
    for name, value in (await gauges(http)).items():
        if name.startswith("metier_delta_requests_total{"):
            tier = name.partition('tier="')[2].partition('"')[0]
            counts[tier] = counts.get(tier, 0) + int(value)
    return counts


async def soak(world: RayWorld, server: Server, options: argparse.Namespace) -> Outcome:
    limits = httpx2.Limits(max_connections=None)
    samples: dict[int, list[Sample]] = {}
    loads: list[float] = []
    arrivals: list[tuple[float, dict[str, int]]] = []
    async with httpx2.AsyncClient(base_url=server.address, timeout=_STUCK_SECONDS, limits=limits) as http:
        clients = Clients(world, http, skew=options.skew)
        began = clients.record.began = time.monotonic()
        watching = asyncio.create_task(watch(clients, began, samples, loads, arrivals))
        until = began + 60 * options.minutes
        rngs = [random.Random(f"{options.seed} {number}") for number in range(options.clients)]
        await asyncio.gather(*(clients.ask_on(rng, until) for rng in rngs))
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        arrivals.append((time.monotonic() - began, await arrived(http)))
        found = await gauges(http)
    server.stop()
    return Outcome(
        record=clients.record,
        samples=samples,
        loads=loads,
        arrivals=arrivals,
        left_behind=left_behind(found),
        exit_code=await server.ended(seconds=_GRACE_SECONDS + 60),
        complaints=server.complaints(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--held", type=int, default=8, help="deltas that a replica has room for")
    parser.add_argument(
        "--skew", type=float, default=0.0, help="0: all deltas alike; 1: the nth has an nth of requests"
    )
    parser.add_argument("--deltas", type=int, default=16)
    parser.add_argument("--questions", type=int, default=8, help="to each model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where deltas and right answers are kept and found again")
    parser.add_argument("--no-report", action="store_true", help="write nothing to benchmarks/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        world = make_ray_world(options.folder or Path(made), options.deltas, options.questions)
        print(f"{len(world.rights)} right answers", flush=True)
        server = start_server(world, Path(made) / "server.log", held=options.held)
        faults = ["it did not come to an end"]
        try:
            outcome = asyncio.run(soak(world, server, options))
            faults = outcome.faults()
        finally:
            server.kill()
            if faults:
                print(server.log.read_text(errors="replace")[-5000:])
    print(outcome.summary())
    if not options.no_report:
        write_report(outcome, world, options)
    print("\n".join(faults) if faults else "Nothing wrong.")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
