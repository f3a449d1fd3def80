"""The soak's clients that load and unload deltas: in order, all at once, and where the server must refuse."""

from __future__ import annotations

import asyncio
import random
import time

import httpx2
from serving_soak_asking import Soak, ask
from serving_soak_names import ABSENT, Name
from serving_soak_world import SPARE

DAMAGED = ["flipped", "truncated", "pickled", "foreign", "no-config", "no-tensors", "empty", "link"]
_TAKEN = ("the name is taken", "still going out of service")


async def load(soak: Soak, name: str, path: object, **options: object) -> httpx2.Response:
    body = {"lora_name": name, "lora_path": str(path), **options}
    return await soak.http.post("/v1/load_lora_adapter", json=body)


async def unload(soak: Soak, name: str) -> httpx2.Response:
    return await soak.http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def expect(soak: Soak, kind: str, response: httpx2.Response, statuses: set[int], *texts: str) -> None:
    """Count a response; it has one of the statuses, and an error one of the texts."""
    soak.record.count(kind, response.status_code)
    has_text = not texts or response.status_code == 200 or any(text in response.text for text in texts)
    if response.status_code not in statuses or not has_text:
        soak.record.is_unexpected(f"{kind}: got {response.status_code}: {response.text[:400]}")


async def change_in_order(soak: Soak, rng: random.Random) -> None:
    """Load a name that is not served, or unload one that is, and know what it stands for from then on."""
    free = [name for name in soak.names.orderly if not name.lock.locked()]
    if not free:
        return
    name = rng.choice(free)
    async with name.lock:
        began = time.perf_counter()
        if name.possible == {ABSENT}:
            await put_in(soak, name, rng.choice(name.folders))
            soak.record.seconds["load"].append(time.perf_counter() - began)
            if rng.random() < 0.2:
                again = await load(soak, name.name, soak.world.path(rng.choice(SPARE)))
                expect(soak, "load, the name is taken", again, {400}, _TAKEN[0])
        elif rng.random() < 0.6:
            await take_out(soak, name, twice=rng.random() < 0.2)
            soak.record.seconds["unload"].append(time.perf_counter() - began)
    if rng.random() < 0.5:
        await ask(soak, rng, [name])


async def put_in(soak: Soak, name: Name, folder: str) -> None:
    name.may_be(ABSENT, folder)
    expect(soak, "load", await load(soak, name.name, soak.world.path(folder)), {200})
    name.may_be(folder)


async def take_out(soak: Soak, name: Name, *, twice: bool = False) -> None:
    name.may_be(ABSENT, *name.possible)
    first, *others = await asyncio.gather(*(unload(soak, name.name) for _ in range(2 if twice else 1)))
    if others and first.status_code == 404:
        first, *others = others[0], first
    expect(soak, "unload", first, {200})
    for other in others:
        expect(soak, "unload, twice at once", other, {404})
    name.may_be(ABSENT)


async def change_contested(soak: Soak, rng: random.Random) -> None:
    """Load or unload a name that others load and unload at the same time; some clients do not wait for the end."""
    name = rng.choice(soak.names.contested)
    pinned = {"pinned": True} if "esft" not in name.name and rng.random() < 0.3 else {}
    timeout = rng.choice([None, None, 0.005, 0.05])
    kind = "load, contested" if (is_load := rng.random() < 0.5) else "unload, contested"
    sent = load(soak, name.name, soak.world.path(name.folders[0]), **pinned) if is_load else unload(soak, name.name)
    try:
        async with asyncio.timeout(timeout):
            response = await sent
    except TimeoutError:
        soak.record.count(kind, "left")
        return
    if is_load:
        expect(soak, kind, response, {200, 400}, *_TAKEN)
    else:
        expect(soak, kind, response, {200, 404})


class Fresh:
    """Names that were never served before: each is loaded, asked and unloaded once."""

    def __init__(self) -> None:
        self.num = 0

    async def come_and_go(self, soak: Soak, rng: random.Random) -> None:
        self.num += 1
        folder = rng.choice([each for each in SPARE if not each.startswith("esft")])
        name = Name(f"fresh-{self.num}", [folder], {ABSENT})
        await put_in(soak, name, folder)
        await ask(soak, rng, [name])
        await take_out(soak, name)


async def load_what_must_be_refused(soak: Soak, rng: random.Random) -> None:
    shelf, outside = soak.world.folder / "shelf", soak.world.folder / "outside" / "esft-3"
    if rng.random() < 0.6:
        wrong = rng.choice(DAMAGED)
        name = rng.choice([f"damaged-{wrong}", "damaged"])
        # two clients may do so at the same time, and one finds the name on its way in
        response = await load(soak, name, shelf / "damaged" / wrong)
        expect(soak, f"load, damaged: {wrong}", response, {400})
        return
    path = rng.choice([outside, "../outside/esft-3", "spare/../../outside/esft-3", "/", "/etc", "", "\x00", "nothing"])
    expect(soak, "load, not allowed", await load(soak, "outside", path), {400})
    name = rng.choice(["a/b", "", "x" * 101, "ü", soak.names.fixed[0].name])
    expect(soak, "load, not a name", await load(soak, name, soak.world.path(SPARE[0])), {400})
    expect(soak, "unload, not served", await unload(soak, rng.choice(["nothing", "damaged", ""])), {404})


async def settle(soak: Soak) -> None:
    """Nothing is loaded or unloaded any more: every contested name can be loaded, asked and unloaded."""
    for name in soak.names.contested:
        async with asyncio.timeout(60):
            while (gone := await unload(soak, name.name)).status_code != 404 or "going out" in gone.text:
                await asyncio.sleep(0.1)
            while "still going out" in (loaded := await load(soak, name.name, soak.world.path(name.folders[0]))).text:
                await asyncio.sleep(0.1)
        expect(soak, "load, at the end", loaded, {200})
        name.may_be(name.folders[0])
