"""A step's time is put together from those of its operations, each measured once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from metier.config import RunConfig
from metier.errors import ConfigError
from metier.planning import clock as module
from metier.planning import machine as machines
from metier.planning.clock import DeviceClock, MachineClock, clock_here
from metier.planning.devices import DEVICES, Device, device_called, device_of
from metier.planning.machine import Machine
from metier.planning.segments import Segment, StepTrace
from metier.planning.trace import Operations
from metier.planning.work import Work


def product(rows: int, inner: int, columns: int, kind: str = "product") -> Work:
    num_bytes = 4 * (rows * inner + inner * columns + rows * columns)
    return Work(kind, torch.float32, (1, rows, inner, columns), num_bytes, 2 * rows * inner * columns)


def moved(num_bytes: int, kind: str = "copy") -> Work:
    return Work(kind, torch.float32, (num_bytes,), num_bytes)


def trace_of(*works: Work, fresh_bytes: int = 0) -> StepTrace:
    one = Segment("forward", None, 0, 0, fresh_bytes, Operations(Counter(works)))
    return StepTrace((one,), ())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> MachineClock:
    """Of a machine that takes a nanosecond for a multiplication, and a tenth of one for a byte."""
    monkeypatch.setattr(machines, "reference", lambda: (1.0, 1.0))
    monkeypatch.setitem(module._COMPUTED, "product", lambda _, sizes: 1e-9 * torch.tensor(sizes).prod().item())
    monkeypatch.setitem(module._COMPUTED, "grouped product", module._COMPUTED["product"])
    monkeypatch.setitem(module._MOVED, "copy", lambda _, num_bytes: 1e-10 * num_bytes)
    monkeypatch.setattr(module.times, "fresh_byte", lambda: 1e-9)
    monkeypatch.setattr(module.times, "overhead", lambda _: 1e-6)
    return MachineClock(Machine(), Path())


def test_the_parts_of_a_step_add_up(clock: MachineClock) -> None:
    parts = clock.passes(trace_of(product(64, 64, 64), product(64, 64, 64), moved(1 << 16), fresh_bytes=1000))
    assert parts["products"] == pytest.approx(clock.in_a_step * 2 * 64**3 * 1e-9)
    assert parts["memory traffic"] == pytest.approx(clock.in_a_step * module.SCATTERED * (1 << 16) * 1e-10)
    assert parts["fresh memory"] == pytest.approx(1e-6)
    assert parts["overhead"] == pytest.approx(3e-6)
    assert set(parts) == set(module.PARTS)


@pytest.mark.parametrize("sizes", [(3, 100, 7), (5000, 4096, 11008), (1, 1, 1), (130_000, 2, 130_000)])
def test_products_of_odd_and_large_shapes_take_what_their_operations_do(
    clock: MachineClock, sizes: tuple[int, int, int]
) -> None:
    assert clock.of(product(*sizes)) == pytest.approx(1e-9 * sizes[0] * sizes[1] * sizes[2])
    ((name, _),) = clock.machine.multiples.items()
    measured = [int(size) for size in name.split()[2:]]
    assert 2 * torch.tensor(measured).prod() <= module._MOST_FLOPS
    # and not much less than there may be, or than the product itself has
    most = min(module._MOST_FLOPS, 2 * sizes[0] * sizes[1] * sizes[2], 2 * module._MOST_NUMBERS * min(sizes))
    assert 2 * torch.tensor(measured).prod() >= most / 8
    assert max(measured[1] * measured[2], measured[2] * measured[3], measured[1] * measured[3]) <= module._MOST_NUMBERS


@pytest.mark.parametrize("num_bytes", [5000, 1 << 18, 3 << 20, 1 << 26, 5 << 28])
def test_between_two_sizes_and_beyond_them_time_goes_with_bytes(clock: MachineClock, num_bytes: int) -> None:
    assert clock.of(moved(num_bytes)) == pytest.approx(1e-10 * num_bytes)


def test_the_smallest_operation_takes_a_call(clock: MachineClock) -> None:
    assert clock.of(moved(4)) == clock.of(moved(module._BYTES[0]))


def test_an_empty_product_takes_nothing(clock: MachineClock) -> None:
    assert clock.of(product(0, 8, 8)) == 0
    assert not clock.machine.multiples


def test_products_of_a_loop_and_others_are_measured_once(clock: MachineClock) -> None:
    assert clock.of(product(64, 64, 64)) == clock.of(product(64, 64, 64, "grouped product"))
    assert len(clock.machine.multiples) == 1


def test_a_slow_moment_is_no_slow_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    paces = iter([1.0, 1.0, 3.0, 3.0, 1.0, 1.0])
    monkeypatch.setattr(machines, "reference", lambda: (next(paces), 0.9))
    machine = Machine()
    machine.seconds("quick", lambda: 2.0)
    machine.seconds("in a slow moment", lambda: 6.0)
    machine.seconds("again quick", lambda: 2.0)
    assert machine.seconds("in a slow moment", lambda: pytest.fail("was measured twice")) == 2.0


def test_what_was_measured_is_kept_and_a_broken_file_is_measured_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(machines.FOLDER, str(tmp_path / "cache"))
    monkeypatch.setattr(machines, "reference", lambda: (0.5, 1.0))
    first = Machine.load()
    assert not first.save()  # nothing to keep
    seconds = first.seconds("one", lambda: 0.25)
    assert first.save()
    assert Machine.load().seconds("one", lambda: pytest.fail("was measured twice")) == seconds
    (file,) = (tmp_path / "cache").iterdir()
    assert json.loads(file.read_text())["machine"]["threads"] == str(torch.get_num_threads())
    file.write_text('{"multiples": [1, 2]}')
    assert Machine.load().multiples == {}


def test_what_a_busy_machine_took_is_for_this_process_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(machines.FOLDER, str(tmp_path))
    shares = iter([1.0, 1.0, 0.9, 0.4, 1.0, 1.0])
    monkeypatch.setattr(machines, "reference", lambda: (1.0, next(shares)))
    machine = Machine.load()
    assert machine.seconds("quiet", lambda: 2.0) == 2.0
    assert not machine.was_busy
    assert machine.seconds("busy", lambda: 90.0) == machine.seconds("busy", lambda: pytest.fail("again")) == 90.0
    assert machine.was_busy
    machine.save()
    later = Machine.load()
    assert sorted(later.multiples) == ["quiet"]
    assert not later.was_busy
    assert later.seconds("busy", lambda: 3.0) == 3.0


def test_a_machine_that_was_busy_all_the_time_has_seconds_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "reference", lambda: (4.0, 0.1))
    assert Machine().seconds("one", lambda: 8.0) == 8.0


def test_where_nothing_can_be_kept_nothing_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(machines.FOLDER, str(tmp_path / "file"))
    machine = Machine.load()
    machine.seconds("one", lambda: 0.25)
    assert machine.save()


@pytest.mark.parametrize("threads", [1, 2])
def test_another_number_of_threads_is_another_machine(threads: int) -> None:
    before, now = machines.fingerprint(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert (machines.fingerprint() == before) == (threads == now)
    finally:
        torch.set_num_threads(now)


def test_every_operation_can_be_measured() -> None:
    """For real: small ones, and none takes no time."""
    clock = clock_here(RunConfig(model="-", dataset="-", output_dir="."))
    assert isinstance(clock, MachineClock)
    for kind in ("product", "attention", "attention gradient"):
        work = Work(kind, torch.float32, (2, 16, 16, 8), 0, 1)
        assert 0 < clock.of(work) < 1
    for kind in module._MOVED:
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            assert 0 < clock._moved(Work(kind, dtype, (100,), 100), module._MOVED[kind]) < 1
    without = clock.optimizer(10**6, 0, copies_rows=False)
    for copies in (False, True):
        assert 0 < without < clock.optimizer(10**6, 10**6, copies_rows=copies) < 10
    assert 0 < clock.decoding("int8", 10**6) < 1
    assert 0 < clock.decoding("nf4", 10**6) < 1
    assert 0 < clock.from_disk(10**6) < 10
    assert 0 <= clock.passes(trace_of(moved(8), fresh_bytes=1000))["fresh memory"] < 1


def test_twice_the_product_takes_about_twice_the_time() -> None:
    clock = MachineClock(Machine(), Path())
    seconds = [clock.of(product(rows, 512, 1024)) for rows in (128, 512)]
    assert len({**clock.machine.multiples, **clock.machine.passing}) == 2
    # where others have the cores nothing is sure
    assert clock.was_busy or 1.5 < seconds[1] / seconds[0] < 10


DEVICE = Device("d", 1 << 30, 1e9 / 0.8, {torch.float32: 1e9 / 0.6}, 1e8 / 0.8, "a test", launch_seconds=0.0)


def test_a_devices_operation_takes_the_longer_of_computing_and_moving() -> None:
    small, large = product(1, 1000, 1000), product(4000, 1000, 1000)
    parts = DeviceClock(DEVICE).passes(trace_of(small, large))
    assert parts["products"] == pytest.approx(small.num_bytes / 1e9 + large.flops / 1e9)


def test_a_device_does_a_loop_over_experts_at_once() -> None:
    slow = Device("d", 1, 1e9, {torch.float32: 1e9}, 1e9, "a test", launch_seconds=1.0)
    trace = trace_of(product(8, 8, 8, "grouped product"), product(8, 8, 8, "grouped product"), moved(8))
    assert DeviceClock(slow).passes(trace)["overhead"] == 1.0


def test_a_dtype_without_a_figure_has_float32s() -> None:
    assert DEVICE.rate(torch.float64) == DEVICE.rate(torch.float32) == pytest.approx(1e9)


def test_devices_are_found_by_name_and_by_torchs_name() -> None:
    assert device_of("RTX 4090") is DEVICES["rtx-4090"]
    assert device_called("NVIDIA GeForce RTX 4090") is DEVICES["rtx-4090"]
    assert device_called("NVIDIA A100-SXM4-80GB") is DEVICES["a100-80gb"]
    assert device_called("NVIDIA L40S") is DEVICES["l40s"]
    assert device_called("NVIDIA L4") is DEVICES["l4"]
    assert device_called("NVIDIA H100 80GB HBM3") is DEVICES["h100"]
    assert device_called("Tesla T4") is DEVICES["t4"]
    with pytest.raises(ConfigError, match=r"device: got 'voodoo', expected one of a100-40gb"):
        device_of("voodoo")


@pytest.mark.parametrize("sizes", [(64, 4096, 4096, 128), (2, 65_536, 65_536, 128), (128, 64, 64, 64)])
def test_of_a_large_attention_a_part_of_the_same_form_is_measured(
    clock: MachineClock, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, int, int]
) -> None:
    seen = []
    monkeypatch.setitem(
        module._COMPUTED, "attention", lambda _, sizes: seen.append(sizes) or 1e-9 * torch.tensor(sizes).prod().item()
    )
    flops = 4 * sizes[0] * sizes[1] * sizes[2] * sizes[3]
    assert clock.of(Work("attention", torch.float32, sizes, 0, flops)) == pytest.approx(flops / 4 * 1e-9)
    ((heads, queries, keys, width),) = seen
    assert (queries, width) == (keys, sizes[3])
    assert heads >= min(sizes[0], torch.get_num_threads() / 2)
    assert 2 * heads * queries * keys * width <= module._MOST_FLOPS


@pytest.mark.parametrize(
    "name",
    ["NVIDIA L40", "NVIDIA T400 4GB", "NVIDIA GH200 480GB", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "AMD Instinct MI300X",
     "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA A100-SXM4-80GB MIG 1g.10gb"],
)  # fmt: skip
def test_a_device_of_which_there_are_no_figures_is_none(name: str) -> None:
    assert device_called(name) is None


def test_a_device_without_bfloat16_has_float32s_rate() -> None:
    assert DEVICES["t4"].rate(torch.bfloat16) == DEVICES["t4"].rate(torch.float32) < DEVICES["t4"].rate(torch.float16)


def test_where_no_disk_can_be_measured_a_usual_one_is_assumed(
    clock: MachineClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path) -> float:
        raise OSError("no space left")

    monkeypatch.setattr(module.times, "disk_byte", full)
    assert clock.from_disk(2 * 10**9) == 1.0
    clock.folder = Path("/proc/no/such/folder")
    monkeypatch.setattr(module.times, "disk_byte", lambda _: 1e-9)
    assert clock.from_disk(10**9) == pytest.approx(1.0)


def test_two_processes_keep_what_each_has_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(machines.FOLDER, str(tmp_path))
    monkeypatch.setattr(machines, "reference", lambda: (1.0, 1.0))
    first, second = Machine.load(), Machine.load()
    first.seconds("one", lambda: 1.0)
    second.seconds("two", lambda: 2.0)
    second.learned, second.has_learned = {"in_a_step": 1.5}, True
    second.save()
    first.save()
    both = Machine.load()
    assert sorted(both.multiples) == ["one", "two"]
    assert both.learned == {"in_a_step": 1.5}
    both.forget()
    both.save()
    assert Machine.load().multiples == Machine.load().learned == {}


@pytest.mark.parametrize(
    "content",
    [
        '{"multiples": {"a": 1}, "learned": {}, "reference_seconds": []}',
        '{"multiples": {"a": NaN}, "learned": {}, "reference_seconds": [1]}',
        '{"multiples": {"a": 1}, "learned": {"workspace_bytes": Infinity}, "reference_seconds": [1]}',
        '{"multiples": {"a": -1}, "learned": {}, "reference_seconds": [1]}',
        "[]",
        "",
    ],
)
def test_a_file_with_odd_numbers_is_no_knowledge(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str) -> None:
    monkeypatch.setenv(machines.FOLDER, str(tmp_path))
    (tmp_path / f"machine-{machines.fingerprint()}.json").write_text(content)
    machine = Machine.load()
    assert (machine.multiples, machine.references, machine.learned) == ({}, [], {})
