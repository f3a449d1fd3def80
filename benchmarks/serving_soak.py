"""A server under clients that ask, leave, misuse it, load and unload deltas, for minutes: is any answer wrong at last?

    python benchmarks/serving_soak.py           some 20 minutes on two cores; writes benchmarks/results/serving_soak.md

`metier serve` in a process of its own, with eleven deltas of three kinds of which less than half fit into its memory
at once, and a KV cache too small for all requests. Each client does one thing after another at random: asks (whole or
in a stream, greedy or by a seed, several answers, stop strings, log probabilities), leaves in the middle, sends what
must be refused, loads or unloads. Every answer is compared with that of the merged model alone. At last nothing may
run, wait or hold a place in the cache; and the server is told to stop while requests run.

Memory is judged after a warm-up of a fifth of the time: the median of the last fifth against that of the second fifth.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

import httpx2
from serving_soak_asking import Soak, ask, check, draw_asked, read_events
from serving_soak_leaving import ask_together, leave
from serving_soak_loading import (
    Fresh,
    change_contested,
    change_in_order,
    load_what_must_be_refused,
    put_in,
    settle,
)
from serving_soak_misuse import MAX_BODY, misuse
from serving_soak_names import ABSENT, Names
from serving_soak_report import Outcome, write_report
from serving_soak_server import Server, gauges, left_behind
from serving_soak_world import BASE, PERMANENT, World, make_world

SHARE_OF_DELTAS = 0.45
"""Of the bytes of all deltas, what the server has room for."""
CACHE_TOKENS, MAX_BATCH_TOKENS = 3072, 96
GRACE_SECONDS = 30
_STUCK_SECONDS = 120


def start_server(world: World, log: Path) -> Server:
    permanent = [argument for name in PERMANENT for argument in ("--delta", f"{name}={world.path(name)}")]
    # one is stored in half the bytes that it is served in
    sizes = {name: num * (2 if name == "esft-2" else 1) for name, num in world.delta_bytes().items()}
    options = {
        "--model": BASE,
        "--dtype": "float32",
        "--port": 0,
        "--delta-dir": world.folder / "shelf",
        "--delta-memory": int(sum(sizes.values()) * SHARE_OF_DELTAS),
        "--cache-tokens": CACHE_TOKENS,
        "--max-batch-tokens": MAX_BATCH_TOKENS,
        "--max-body": MAX_BODY,
        "--max-concurrent": 28,
        "--grace-seconds": GRACE_SECONDS,
    }
    given = [str(each) for option in options.items() for each in option]
    return Server([*given, *permanent, "--allow-loading"], log)


async def client(soak: Soak, rng: random.Random, fresh: Fresh, until: float) -> None:
    """One thing after another, until the time is over."""
    acts = {ask: 50, leave: 14, misuse: 14, ask_together: 3, change_in_order: 6, change_contested: 7}
    acts |= {load_what_must_be_refused: 4, fresh.come_and_go: 2}
    while time.monotonic() < until:
        act = rng.choices(list(acts), list(acts.values()))[0]
        try:
            async with asyncio.timeout(_STUCK_SECONDS):
                await act(soak, rng)
        except TimeoutError:
            soak.record.is_unexpected(f"{act.__name__}: no end after {_STUCK_SECONDS} s")
        except Exception as error:
            soak.record.count(act.__name__, type(error).__name__)
            soak.record.is_unexpected(f"{act.__name__}: {type(error).__name__}: {error}")
            await asyncio.sleep(1)


async def run_clients(soak: Soak, server: Server, *, seconds: float, num_clients: int, seed: int) -> None:
    until, fresh = time.monotonic() + seconds, Fresh()
    soak.record.began = time.monotonic()
    watching = asyncio.create_task(server.watch(time.monotonic()))
    await asyncio.gather(
        *(client(soak, random.Random(f"{seed} {number}"), fresh, until) for number in range(num_clients))
    )
    watching.cancel()


async def rest(soak: Soak) -> dict[str, float]:
    """What is left behind once nobody asks."""
    left: dict[str, float] = {}
    for _ in range(100):
        left = left_behind(await gauges(soak.http))
        if not left:
            break
        await asyncio.sleep(0.1)
    return left


async def ask_all(soak: Soak, rng: random.Random) -> None:
    """Every name can be put into service, and is answered rightly."""
    await settle(soak)
    for name in soak.names.orderly:
        if name.possible == {ABSENT}:
            await put_in(soak, name, name.folders[0])
    for _ in range(3):
        await asyncio.gather(*(ask(soak, rng, [name]) for name in soak.names.all))


async def stop_while_running(
    soak: Soak, server: Server, num_clients: int, rng: random.Random
) -> tuple[int | None, float]:
    """SIGTERM while requests run, which have to be answered rightly: the exit code, and the seconds until the end."""
    begun = asyncio.Barrier(num_clients + 1)

    async def stream() -> None:
        asked = draw_asked(soak, rng, soak.names.fixed)
        body = {**asked.body, "stream": True, "stream_options": {"include_usage": True}}
        async with soak.http.stream("POST", asked.path, json=body) as response:
            await begun.wait()
            answers, usage = await read_events(response.aiter_lines(), asked)
            soak.record.count("runs at the end", response.status_code)
            check(soak, "runs at the end", asked, response.status_code, answers, usage, {asked.name.folders[0]})

    async def come_too_late() -> None:
        while True:
            for method, path in (("GET", "/health"), ("GET", "/metrics"), ("POST", "/v1/completions")):
                response = await soak.http.request(method, path, json={"model": BASE, "prompt": "The"})
                soak.record.count("comes too late", response.status_code)
                if response.status_code not in (200, 503) or (method == "POST" and response.status_code == 200):
                    soak.record.is_unexpected(f"{method} {path} while closing: {response.status_code} {response.text}")
            await asyncio.sleep(0.02)

    running = [asyncio.create_task(stream()) for _ in range(num_clients)]
    async with asyncio.timeout(_STUCK_SECONDS):
        await begun.wait()
    server.stop()
    began = time.monotonic()
    await asyncio.sleep(0.05)
    late = asyncio.create_task(come_too_late())
    code = await server.ended(seconds=GRACE_SECONDS + 10)
    seconds = time.monotonic() - began
    ends = await asyncio.gather(*running, late, return_exceptions=True)
    for end in ends[:-1]:
        if end is not None:
            soak.record.is_unexpected(f"runs at the end: {type(end).__name__}: {end}")
    if not isinstance(ends[-1], httpx2.TransportError):
        soak.record.is_unexpected(f"comes too late: {ends[-1]!r}")
    return code, seconds


async def soak_whole(world: World, server: Server, options: argparse.Namespace) -> Outcome:
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx2.AsyncClient(base_url=server.address, timeout=_STUCK_SECONDS, limits=limits) as http:
        soak = Soak(server.address, world, Names(), http)
        rng = random.Random(options.seed)
        await run_clients(soak, server, seconds=60 * options.minutes, num_clients=options.clients, seed=options.seed)
        left = await rest(soak)
        await ask_all(soak, rng)
        left |= await rest(soak)
        last = server.sample(soak.record.began)
        code, seconds = await stop_while_running(soak, server, min(options.clients, 16), rng)
    return Outcome(
        record=soak.record,
        samples=server.samples,
        last_sample=last,
        left_behind=left,
        exit_code=code,
        seconds_to_end=seconds,
        complaints=server.complaints(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--questions", type=int, default=24, help="to each of the twelve models")
    parser.add_argument("--folder", type=Path, help="where deltas and right answers are kept and found again")
    parser.add_argument("--no-report", action="store_true", help="write nothing to benchmarks/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        world = make_world(folder, num_questions=options.questions)
        print(f"{len(world.greedy) + len(world.drawn)} right answers", flush=True)
        server = start_server(world, Path(made) / "server.log")
        faults = ["it did not come to an end"]
        try:
            outcome = asyncio.run(soak_whole(world, server, options))
            faults = outcome.faults()
        finally:
            server.kill()
            if faults:
                print(server.log.read_text(errors="replace")[-5000:])
    if not options.no_report:
        write_report(outcome, world, options)
    print(outcome.summary())
    print("\n".join(faults) if faults else "Nothing wrong.")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
