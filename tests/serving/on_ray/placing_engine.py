"""An engine without a model whose deltas have tiers, and Ray Serve's book of models without Ray."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from metier.errors import DeltaError, UnknownDeltaError
from metier.serving.contract import DeltaStatus, EngineStatus, Tier
from metier.serving.on_ray.placement import Multiplexed


@dataclass
class PlacingEngine:
    folders: dict[str, Path]
    sizes: dict[str, int] = field(default_factory=dict)
    """Of deltas that are not of 10 bytes."""
    tiers: dict[str, Tier] = field(default_factory=dict)
    max_length: int = 512
    log: list[str] = field(default_factory=list)
    load_error: DeltaError | None = None
    may_unload: asyncio.Event = field(default_factory=asyncio.Event)
    may_bring: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.may_unload.set()
        self.may_bring.set()

    def deltas(self) -> list[DeltaStatus]:
        return [
            DeltaStatus(
                name=name,
                folder=folder,
                kind="esft",
                tier=self.tiers.get(name, "disk"),
                num_bytes=self.sizes.get(name, 10),
                is_pinned=False,
                num_running=0,
                created=0,
            )
            for name, folder in self.folders.items()
        ]

    def status(self) -> EngineStatus:
        return EngineStatus(is_alive=True, error=None, num_running=0, num_waiting=0, cache_used=0.0, delta_bytes={})

    async def load_delta(self, name: str, folder: Path, *, is_pinned: bool = False) -> DeltaStatus:
        await asyncio.sleep(0)
        if self.load_error is not None:
            raise self.load_error
        if name in self.folders:
            raise DeltaError(f"delta {name!r}: the name is taken.")
        self.log.append(f"load {name} {folder.name}")
        self.folders[name] = folder
        return self.deltas()[-1]

    async def unload_delta(self, name: str) -> None:
        await self.may_unload.wait()
        self.log.append(f"unload {name}")
        del self.folders[name]
        self.tiers.pop(name, None)

    async def bring_delta(self, name: str) -> None:
        await self.may_bring.wait()
        if name not in self.folders:
            raise UnknownDeltaError(name)
        self.log.append(f"bring {name}")
        self.tiers[name] = "accelerator"

    def send_delta_down(self, name: str) -> None:
        if name not in self.folders:
            raise UnknownDeltaError(name)
        self.log.append(f"down {name}")
        self.tiers[name] = "disk"


def multiplex(load: Multiplexed, num: int) -> Multiplexed:
    """As Ray Serve does it: one load at a time, and the least recently asked for goes first."""
    held: dict[str, object] = {}
    lock = asyncio.Lock()

    async def hold(name: str) -> object:
        async with lock:
            if name in held:
                held[name] = held.pop(name)
            else:
                if len(held) >= num:
                    held.pop(next(iter(held))).__del__()  # type: ignore[attr-defined]
                held[name] = await load(name)
            return held[name]

    return hold
