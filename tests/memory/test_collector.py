"""What the garbage collector is kept from looking at."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from metier.memory import collector


@pytest.fixture
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(collector, "_is_done", False)
    frozen = gc.get_freeze_count()
    yield
    if not frozen:
        gc.unfreeze()


class Ring:
    """Refers to itself, so that only a collection frees it."""

    def __init__(self, ended: list[str], name: str) -> None:
        self.me, self.ended, self.name = self, ended, name

    def __del__(self) -> None:
        self.ended.append(self.name)


@pytest.mark.usefixtures("_as_before")
def test_what_is_there_is_not_looked_at_again_but_garbage_is_freed_before_and_after() -> None:
    ended: list[str] = []
    Ring(ended, "garbage before")
    there = Ring(ended, "there")
    frozen = gc.get_freeze_count()
    assert collector.keep_objects()
    assert ended == ["garbage before"]
    assert gc.get_freeze_count() > frozen
    assert not any(each is there for each in gc.get_objects())
    Ring(ended, "garbage after")
    del there
    gc.collect()
    assert ended == ["garbage before", "garbage after"]


@pytest.mark.usefixtures("_as_before")
def test_only_the_first_call_does_it() -> None:
    assert collector.keep_objects()
    later = [Ring([], "later")]
    assert not collector.keep_objects()
    assert any(each is later for each in gc.get_objects())
