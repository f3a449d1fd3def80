"""Deltas go up and down while requests use them; the store is a dictionary, the deltas are real and tiny."""

from __future__ import annotations

import contextlib
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from metier.errors import BaseMismatchError, CorruptDeltaError, DeltaError, EngineError, ServingError, UnknownDeltaError
from metier.serving.checked_reader import CheckedReader
from metier.serving.delta_source import open_served_delta
from metier.serving.model_facts import ModelFacts
from metier.serving.residency import Residency
from metier.serving.tiers import Tiers
from serving.fake_store import FakeStore
from serving.made_deltas import alter_last_byte, save_esft

WAIT = 10.0
"""Seconds; of what takes milliseconds."""
CopyOf = Callable[..., Path]


class Served:
    """Tiers over a fake store, and what they told."""

    def __init__(self, facts: ModelFacts, size: int, *, num_slots: int, num_on_host: int = 0) -> None:
        self.store = FakeStore()
        self.events: queue.Queue[tuple[str, str, DeltaError | None]] = queue.Queue()
        self.residency = Residency(accelerator_bytes=num_slots * size, host_bytes=num_on_host * size)
        self.tiers = Tiers(
            facts=facts,
            store=self.store,
            residency=self.residency,
            on_resident=lambda name: self.events.put(("resident", name, None)),
            on_failed=lambda name, error: self.events.put(("failed", name, error)),
        )

    def load(self, *folders: Path, is_pinned: bool = False) -> None:
        for folder in folders:
            self.tiers.load(folder.name, folder, is_pinned=is_pinned).result(WAIT)

    def resident(self) -> set[str]:
        with self.tiers.steady() as names:
            return set(names)

    def tier(self, name: str) -> str:
        return next(status.tier for status in self.tiers.deltas() if status.name == name)

    def wait_for(self, kind: str, name: str) -> DeltaError | None:
        got = self.events.get(timeout=WAIT)
        assert got[:2] == (kind, name)
        return got[2]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + WAIT
        while not condition():
            assert time.monotonic() < end, "it never came to be"
            time.sleep(0.001)

    def start(self, name: str) -> int:
        self.tiers.ask(name)
        with self.tiers.steady() as names:
            assert name in names
            return self.tiers.acquire(name)


Serve = Callable[..., Served]


@pytest.fixture
def serve(facts: ModelFacts, saved: Path, reader: CheckedReader) -> Iterator[Serve]:
    """Makes `Served` with room for so many deltas like the ESFT one."""
    size = open_served_delta(saved / "esft", facts=facts, reader=reader).num_bytes
    made: list[Served] = []

    def make(**options: int) -> Served:
        made.append(Served(facts, size, **options))
        return made[-1]

    yield make
    for served in made:
        served.store.may_place.set()
        served.tiers.close()


def values_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("expert_ids")}


def assert_served(served: Served, handle: int, folder: Path) -> None:
    want, got = values_of(folder), served.store.placed[handle]
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


@pytest.mark.parametrize("kind", ["esft", "expert_lora", "lora"])
def test_a_loaded_delta_is_in_service_and_resident(serve: Serve, copy_of: CopyOf, kind: str) -> None:
    served, folder = serve(num_slots=1), copy_of(kind)
    status = served.tiers.load("law", folder, is_pinned=True).result(WAIT)
    assert served.tiers.deltas() == [status]
    assert (status.name, status.folder, status.kind, status.tier) == ("law", folder, kind, "accelerator")
    assert (status.is_pinned, status.num_running) == (True, 0)
    assert served.tiers.delta_bytes() == {"accelerator": status.num_bytes, "host": 0, "disk": 0}
    assert abs(status.created - time.time()) < 60
    assert_served(served, served.start("law"), folder)
    assert served.tiers.deltas()[0].num_running == 1


def test_a_delta_that_finds_no_room_is_in_service_on_the_disk(serve: Serve, copy_of: CopyOf) -> None:
    served = serve(num_slots=1)
    served.load(copy_of("esft", "a"), copy_of("esft", "b"))
    assert (served.tier("a"), served.tier("b")) == ("accelerator", "disk")
    assert served.resident() == {"a"}


def test_a_delta_that_is_waited_for_takes_the_place_of_an_idle_one(serve: Serve, copy_of: CopyOf) -> None:
    served, b = serve(num_slots=1), copy_of("esft", "b")
    served.load(copy_of("esft", "a"), b)
    served.tiers.ask("b")
    served.tiers.prefetch(["b"])
    served.wait_for("resident", "b")
    assert served.resident() == {"b"}
    assert served.store.log == ["place a", "remove a", "place b"]
    with served.tiers.steady():
        assert_served(served, served.tiers.acquire("b"), b)


def test_a_delta_that_is_waited_for_comes_once_the_last_request_of_another_is_over(
    serve: Serve, copy_of: CopyOf
) -> None:
    served = serve(num_slots=1)
    served.load(copy_of("esft", "a"), copy_of("esft", "b"))
    served.start("a")
    served.start("a")
    served.tiers.prefetch(["b"])
    served.tiers.release("a")
    time.sleep(0.05)
    assert served.resident() == {"a"}
    served.tiers.release("a")
    served.wait_for("resident", "b")


def test_all_that_are_waited_for_come_where_there_is_room(serve: Serve, copy_of: CopyOf) -> None:
    served = serve(num_slots=3)
    served.load(*(copy_of("esft", name) for name in "abcdef"))
    served.tiers.prefetch(["e", "a", "d", "f"])
    for name in "ed":
        served.wait_for("resident", name)
    time.sleep(0.05)
    # f would have to take the place of one that is waited for longer
    assert served.resident() == {"a", "d", "e"}


def test_pinned_deltas_come_first_and_stay(serve: Serve, copy_of: CopyOf) -> None:
    served = serve(num_slots=2)
    served.load(copy_of("esft", "a"), copy_of("esft", "b"))
    served.load(copy_of("esft", "p"), is_pinned=True)
    served.wait_for("resident", "p")
    served.tiers.prefetch(["a", "b"])
    served.wait_for("resident", "a")
    time.sleep(0.05)
    assert served.resident() == {"p", "a"}


def test_an_evicted_delta_comes_back_from_the_host_without_the_disk(serve: Serve, copy_of: CopyOf) -> None:
    served, a = serve(num_slots=1, num_on_host=2), copy_of("esft", "a")
    served.load(a, copy_of("esft", "b"))
    want = values_of(a)
    served.tiers.prefetch(["b"])
    served.wait_for("resident", "b")
    assert served.tier("a") == "host"
    (a / "adapter_model.safetensors").unlink()
    served.tiers.prefetch(["a"])
    served.wait_for("resident", "a")
    got = served.store.placed[served.start("a")]
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_a_delta_is_brought_to_the_host_while_the_accelerator_is_in_use(serve: Serve, copy_of: CopyOf) -> None:
    served = serve(num_slots=1, num_on_host=2)
    served.load(copy_of("esft", "a"), copy_of("esft", "b"))
    served.start("a")
    served.tiers.prefetch(["b"])
    served.wait_until(lambda: served.tier("b") == "host")
    time.sleep(0.05)
    assert served.events.empty()
    served.tiers.release("a")
    served.wait_for("resident", "b")
    assert served.tiers.delta_bytes()["host"] == 2 * served.tiers.delta_bytes()["accelerator"]


def test_a_copy_that_made_way_on_the_host_takes_no_memory(serve: Serve, copy_of: CopyOf) -> None:
    served = serve(num_slots=1, num_on_host=1)
    served.load(copy_of("esft", "a"), copy_of("esft", "b"))
    served.tiers.prefetch(["b"])
    served.wait_for("resident", "b")
    held = served.tiers._mover.held
    assert served.tier("a") == "disk"
    assert (held["a"].loaded, held["a"].handle) == (None, None)
    assert held["b"].loaded is not None


def test_a_delta_that_is_sent_down_leaves_once_its_last_request_is_over(serve: Serve, copy_of: CopyOf) -> None:
    served = serve(num_slots=2)
    served.load(copy_of("esft", "a"), copy_of("esft", "b"))
    served.start("a")
    served.tiers.send_down("a")
    served.tiers.send_down("b")
    served.wait_until(lambda: served.tier("b") == "disk")
    assert served.resident() == {"a"}
    served.tiers.release("a")
    served.wait_until(lambda: served.tier("a") == "disk")
    assert served.store.placed == {}
    assert served.tiers.delta_bytes()["accelerator"] == 0
    served.tiers.ask("a")
    served.tiers.prefetch(["a"])
    served.wait_for("resident", "a")


def test_a_delta_that_is_sent_down_stays_for_those_who_wait_and_who_ask_anew(serve: Serve, copy_of: CopyOf) -> None:
    served = serve(num_slots=1)
    served.load(copy_of("esft", "a"))
    served.tiers.ask("a")
    served.tiers.send_down("a")
    time.sleep(0.05)
    assert served.resident() == {"a"}
    with served.tiers.steady():
        served.tiers.acquire("a")
    served.tiers.ask("a")
    served.tiers.release("a")
    served.tiers.withdraw("a")
    time.sleep(0.05)
    assert served.resident() == {"a"}
    served.tiers.ask("a")
    served.tiers.send_down("a")
    served.tiers.withdraw("a")
    served.wait_until(lambda: served.tier("a") == "disk")


def test_a_pinned_delta_and_an_unknown_one_are_not_sent_down(serve: Serve, copy_of: CopyOf) -> None:
    served = serve(num_slots=1)
    served.load(copy_of("esft", "a"), is_pinned=True)
    served.tiers.send_down("a")
    with pytest.raises(UnknownDeltaError, match="'b'"):
        served.tiers.send_down("b")
    time.sleep(0.05)
    assert served.resident() == {"a"}


def test_calls_return_while_a_delta_is_being_placed(serve: Serve, copy_of: CopyOf) -> None:
    served = serve(num_slots=2)
    served.load(copy_of("esft", "a"))
    served.store.is_placing.clear()
    served.store.may_place.clear()
    future = served.tiers.load("b", copy_of("esft", "b"))
    assert served.store.is_placing.wait(WAIT)
    begun = time.monotonic()
    served.start("a")
    served.tiers.release("a")
    assert [status.name for status in served.tiers.deltas()] == ["a"]
    with pytest.raises(UnknownDeltaError):
        served.tiers.ask("b")
    assert time.monotonic() - begun < 1
    assert not future.done()
    served.store.may_place.set()
    future.result(WAIT)
    served.start("b")


# what goes wrong


def test_a_delta_that_does_not_fit_its_base_is_not_in_service(serve: Serve, copy_of: CopyOf, tmp_path: Path) -> None:
    from serving.made_deltas import made_model

    served = serve(num_slots=1)
    with pytest.raises(BaseMismatchError, match="trained on 'tiny' with fingerprint"):
        served.tiers.load("x", save_esft(made_model(seed=1), tmp_path / "other")).result(WAIT)
    assert served.tiers.deltas() == []
    served.tiers.load("x", copy_of("esft")).result(WAIT)


@pytest.mark.parametrize("num_slots", [1, 2])
def test_a_delta_with_an_altered_byte_is_not_in_service(serve: Serve, copy_of: CopyOf, num_slots: int) -> None:
    served, bad = serve(num_slots=num_slots), copy_of("esft", "bad")
    served.load(copy_of("esft", "a"))
    alter_last_byte(bad)
    with pytest.raises(CorruptDeltaError, match="got sha256"):
        served.tiers.load("bad", bad).result(WAIT)
    assert [status.name for status in served.tiers.deltas()] == ["a"]
    assert served.store.log == ["place a"]
    assert served.residency.num_bytes("accelerator") == served.tiers.deltas()[0].num_bytes
    served.load(copy_of("esft", "good"))


def test_a_delta_larger_than_the_room_is_not_in_service(serve: Serve, copy_of: CopyOf) -> None:
    served = serve(num_slots=0)
    with pytest.raises(ServingError, match="where the accelerator has 0 for deltas"):
        served.tiers.load("a", copy_of("esft")).result(WAIT)
    assert served.tiers.deltas() == []


@pytest.mark.parametrize("num_on_host", [0, 2])
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), DeltaError("no room")])
def test_a_delta_that_cannot_be_placed_is_not_in_service(
    serve: Serve, copy_of: CopyOf, error: Exception, num_on_host: int
) -> None:
    served = serve(num_slots=1, num_on_host=num_on_host)
    served.store.fails = error
    with pytest.raises(DeltaError, match=str(error)) as raised:
        served.tiers.load("a", copy_of("esft", "a")).result(WAIT)
    assert isinstance(error, DeltaError) or raised.value.__cause__ is error
    assert served.tiers.deltas() == []
    assert set(served.tiers.delta_bytes().values()) == {0}
    served.store.fails = None
    served.load(copy_of("esft", "b"))
    assert served.resident() == {"b"}


@pytest.mark.parametrize("num_on_host", [0, 2])
@pytest.mark.parametrize("harm", ["byte", "cut", "gone", "other"])
def test_a_file_that_was_altered_between_loads_fails_those_that_wait_for_it(
    serve: Serve, copy_of: CopyOf, model: PreTrainedModel, harm: str, num_on_host: int
) -> None:
    served, b = serve(num_slots=1, num_on_host=num_on_host), copy_of("esft", "b")
    served.load(copy_of("esft", "a"), b)
    path = b / "adapter_model.safetensors"
    good = path.read_bytes()
    if harm == "byte":
        alter_last_byte(b)
    elif harm == "cut":
        os.truncate(path, len(good) - 1)
    elif harm == "gone":
        path.unlink()
    else:
        save_esft(model, b, step=0.2)
    served.tiers.ask("b")
    served.tiers.prefetch(["b"])
    error = served.wait_for("failed", "b")
    expected = {
        "byte": "got sha256",
        "gone": "cannot be read",
        "cut": "altered or replaced",
        "other": "altered or repl",
    }
    assert expected[harm] in str(error)
    assert served.tier("b") == "disk"
    assert served.tiers.delta_bytes()["accelerator"] == 0
    # it is not tried again and again, but once the next request asks
    served.tiers.withdraw("b")
    path.write_bytes(good)
    time.sleep(0.05)
    assert served.events.empty()
    served.tiers.ask("b")
    served.wait_for("resident", "b")


def test_a_failing_delta_does_not_keep_the_next_one_waiting(serve: Serve, copy_of: CopyOf) -> None:
    served, b = serve(num_slots=1), copy_of("esft", "b")
    served.load(copy_of("esft", "a"), b, copy_of("esft", "c"))
    alter_last_byte(b)
    served.tiers.prefetch(["b", "c"])
    served.wait_for("failed", "b")
    served.wait_for("resident", "c")


def test_a_delta_that_cannot_be_removed_is_not_used_again(serve: Serve, copy_of: CopyOf) -> None:
    served = serve(num_slots=1)
    served.load(copy_of("esft", "a"), copy_of("esft", "b"))
    served.store.fails_to_remove = RuntimeError("stuck")
    served.tiers.prefetch(["b"])
    error = served.wait_for("failed", "b")
    assert "delta 'a': the move from accelerator to disk failed (RuntimeError: stuck)" in str(error)
    assert served.resident() == set()
    served.store.fails_to_remove = None
    served.tiers.ask("b")
    served.wait_for("resident", "b")


def test_a_name_that_is_taken_is_refused_and_free_after_a_failure(serve: Serve, copy_of: CopyOf) -> None:
    served, bad = serve(num_slots=2), copy_of("esft", "bad")
    alter_last_byte(bad)
    good = copy_of("esft", "good")
    for _ in range(20):  # at once, before the thread that failed could do anything more
        with pytest.raises(CorruptDeltaError):
            served.tiers.load("a", bad).result(WAIT)
    served.store.may_place.clear()
    first = served.tiers.load("a", good)
    with pytest.raises(DeltaError, match=r"delta 'a': the name is taken\.\nTake that one out of service first\."):
        served.tiers.load("a", good).result(WAIT)
    served.store.may_place.set()
    first.result(WAIT)
    with pytest.raises(DeltaError, match="delta 'a': the name is taken"):
        served.tiers.load("a", good).result(WAIT)


# out of service


def test_an_unloaded_delta_leaves_nothing(serve: Serve, copy_of: CopyOf) -> None:
    served, folder = serve(num_slots=1, num_on_host=1), copy_of("esft")
    served.load(folder)
    served.tiers.unload("esft").result(WAIT)
    assert served.tiers.deltas() == []
    assert served.store.placed == {}
    assert set(served.tiers.delta_bytes().values()) == {0}
    served.load(folder)
    served.start("esft")


def test_an_unknown_delta_cannot_be_asked_for_or_unloaded(serve: Serve) -> None:
    served = serve(num_slots=1)
    for call in (served.tiers.ask, served.tiers.unload):
        with pytest.raises(UnknownDeltaError, match=r"delta 'x': no delta of that name is served\.\nName one that is"):
            call("x")


def test_requests_that_asked_before_finish_before_a_delta_goes(serve: Serve, copy_of: CopyOf) -> None:
    served = serve(num_slots=1)
    served.load(copy_of("esft", "a"))
    handle = served.start("a")
    served.tiers.ask("a")
    served.tiers.ask("a")
    future = served.tiers.unload("a")
    with pytest.raises(UnknownDeltaError):
        served.tiers.ask("a")
    with pytest.raises(UnknownDeltaError):
        served.tiers.unload("a")
    with pytest.raises(DeltaError, match=r"'a': one of that name is still going out of service\.\nWait until"):
        served.tiers.load("a", copy_of("esft", "other")).result(WAIT)
    assert served.tiers.deltas() == []
    served.tiers.release("a")
    with served.tiers.steady() as names:  # one that waited may start still
        assert "a" in names
        assert served.tiers.acquire("a") == handle
    served.tiers.withdraw("a")
    assert not future.done()
    served.tiers.release("a")
    future.result(WAIT)
    assert served.store.placed == {}


def test_a_delta_on_the_disk_is_brought_up_for_a_request_that_asked_before_it_goes(
    serve: Serve, copy_of: CopyOf
) -> None:
    served = serve(num_slots=1)
    served.load(copy_of("esft", "a"), copy_of("esft", "b"))
    served.tiers.ask("b")
    future = served.tiers.unload("b")
    served.tiers.prefetch(["b"])
    served.wait_for("resident", "b")
    with served.tiers.steady():
        served.tiers.acquire("b")
    served.tiers.release("b")
    future.result(WAIT)


def test_an_unload_tells_what_could_not_be_removed(serve: Serve, copy_of: CopyOf) -> None:
    served = serve(num_slots=1)
    served.load(copy_of("esft", "a"))
    served.store.fails_to_remove = RuntimeError("stuck")
    with pytest.raises(DeltaError, match="stuck"):
        served.tiers.unload("a").result(WAIT)
    assert served.tiers.deltas() == []


def test_closing_ends_the_threads_and_fails_what_is_not_done(serve: Serve, copy_of: CopyOf) -> None:
    before = threading.active_count()
    served = serve(num_slots=2)
    served.load(copy_of("esft", "a"))
    served.start("a")
    leaving = served.tiers.unload("a")
    served.store.is_placing.clear()
    served.store.may_place.clear()
    begun, not_begun = served.tiers.load("b", copy_of("esft", "b")), served.tiers.load("c", copy_of("esft", "c"))
    assert served.store.is_placing.wait(WAIT)
    closing = threading.Thread(target=served.tiers.close)
    closing.start()
    served.wait_until(lambda: served.tiers._is_closing)
    served.store.may_place.set()
    closing.join(WAIT)
    assert begun.result(WAIT).name == "b"
    for future in (not_begun, leaving):
        with pytest.raises(EngineError, match="the server is closing"):
            future.result(WAIT)
    tiers = served.tiers
    for call in (lambda: tiers.ask("b"), lambda: tiers.load("d", Path("d")), lambda: tiers.unload("b")):
        with pytest.raises(EngineError, match="the server is closing"):
            call()
    assert threading.active_count() == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_ever_when_the_thread_dies_of_a_fault(
    serve: Serve, copy_of: CopyOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve(num_slots=1)
    served.load(copy_of("esft", "a"))
    served.tiers.ask("a")
    monkeypatch.setattr(served.residency, "prefetch", lambda names: 1 // 0)
    served.tiers.prefetch(["a"])
    assert "the thread that loads deltas has died (ZeroDivisionError" in str(served.wait_for("failed", "a"))
    for call in (lambda: served.tiers.load("b", copy_of("esft", "b")), lambda: served.tiers.unload("a")):
        with pytest.raises(EngineError, match=r"has died .*Start the server again"):
            call()
    assert isinstance(served.tiers.error, ZeroDivisionError)


def test_a_future_that_was_cancelled_puts_nothing_into_service(serve: Serve, copy_of: CopyOf) -> None:
    served = serve(num_slots=3)
    served.store.may_place.clear()
    first, second = served.tiers.load("a", copy_of("esft", "a")), served.tiers.load("b", copy_of("esft", "b"))
    assert second.cancel()
    served.store.may_place.set()
    first.result(WAIT)
    served.load(copy_of("esft", "c"))
    assert [status.name for status in served.tiers.deltas()] == ["a", "c"]


def test_room_is_made_ready_after_a_delta_has_come(serve: Serve, copy_of: CopyOf) -> None:
    served = serve(num_slots=3)
    served.store.to_ready = 3
    served.load(copy_of("esft", "a"))
    served.wait_until(lambda: len(served.store.log) == 4)
    assert served.store.log == ["place a", "ready", "ready", "ready"]


def test_nothing_runs_while_there_is_nothing_to_do(serve: Serve, copy_of: CopyOf) -> None:
    served = serve(num_slots=1)
    served.load(copy_of("esft", "a"), copy_of("esft", "b"))
    served.start("a")
    served.tiers.prefetch(["b"])  # which finds no room
    time.sleep(0.05)
    count = 0
    prefetch = served.residency.prefetch

    def counted(names: list[str]) -> object:
        nonlocal count
        count += 1
        return prefetch(names)

    served.residency.prefetch = counted  # type: ignore[method-assign, assignment]
    used = time.process_time()
    time.sleep(0.2)
    assert count == 0
    assert time.process_time() - used < 0.1


@pytest.mark.parametrize("num_on_host", [0, 2])
def test_under_requests_loads_and_unloads_at_once_each_request_gets_its_delta(
    serve: Serve, copy_of: CopyOf, model: PreTrainedModel, tmp_path: Path, num_on_host: int
) -> None:
    folders = [save_esft(model, tmp_path / f"delta {step}", step=0.01 * (step + 1)) for step in range(6)]
    want = {folder.name: values_of(folder) for folder in folders}
    served = serve(num_slots=2, num_on_host=num_on_host)
    served.load(*folders[:4])
    waiting: list[str] = []
    lock, end = threading.Lock(), time.monotonic() + 1.5
    problems: list[str] = []
    num_answered = 0

    def client(seed: int) -> None:
        nonlocal num_answered
        rng = random.Random(seed)
        while time.monotonic() < end:
            name = rng.choice(folders).name
            try:
                served.tiers.ask(name)
            except UnknownDeltaError:
                continue
            with lock:
                waiting.append(name)
                served.tiers.prefetch(list(dict.fromkeys(waiting)))
            handle = None
            while handle is None and time.monotonic() < end + WAIT:
                with served.tiers.steady() as names:
                    if name in names:
                        handle = served.tiers.acquire(name)
                time.sleep(0.0005)
            with lock:
                waiting.remove(name)
                served.tiers.prefetch(list(dict.fromkeys(waiting)))
            if handle is None:
                problems.append(f"{name} never came")
                return
            got = served.store.placed[handle]
            if not all(torch.equal(got[key], tensor) for key, tensor in want[name].items()):
                problems.append(f"{name} got another delta's values")
            served.tiers.release(name)
            num_answered += 1

    def operator() -> None:
        rng = random.Random(9)
        while time.monotonic() < end:
            folder = rng.choice(folders)
            with contextlib.suppress(DeltaError, UnknownDeltaError):
                if rng.random() < 0.5:
                    served.tiers.unload(folder.name).result(WAIT)
                else:
                    served.tiers.load(folder.name, folder).result(WAIT)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(4)]
    threads.append(threading.Thread(target=operator))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * WAIT)
    assert problems == []
    assert num_answered > 20
    assert len(served.store.placed) <= 2
    assert {kind for kind, _, _ in served.events.queue} <= {"resident"}
    for status in served.tiers.deltas():
        served.tiers.unload(status.name).result(WAIT)
    assert served.store.placed == {}
    assert set(served.tiers.delta_bytes().values()) == {0}
