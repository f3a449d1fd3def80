"""What one of several processes holds and sends, against plain loops over slices, rings and numbers of processes."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from metier.cli import app
from metier.config import RunConfig
from metier.distributed.parting import for_ranks
from metier.distributed.ranks import Ranks
from metier.errors import ConfigError
from metier.planning.estimate import Estimator
from metier.planning.fit import Budget, _changes, changed
from metier.planning.links import LINKS, World, links_of
from metier.planning.pays import SIZES, Pays, where_sharding_pays
from metier.planning.plan import METHODS, plan
from metier.planning.sharding import GATHERED, PARTED_KINDS, SENT, RankEstimator, _most_gathered, _ring
from metier.planning.spelling import size
from metier.planning.units import Part, Unit, _with_gathers
from tiny_models import tiny_model

parts = st.builds(
    Part,
    num_slices=st.integers(1, 40),
    slice_numbers=st.integers(1, 9),
    itemsize=st.sampled_from((2, 4)),
    is_trained=st.booleans(),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with a configuration and nothing else."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model("deepseek_v2").config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def estimator() -> Estimator:
    return Estimator(tiny_model("deepseek_v2").config)


def _run(base: Path | str = "base", **options: object) -> RunConfig:
    values = {"model": str(base), "dataset": "-", "output_dir": "-", "select_top_k": 3, "max_length": 64}
    return RunConfig(**{**values, "per_device_train_batch_size": 2, "dtype": "float32", **options})


# --- parts and units, against torch's own cutting


@given(part=parts, world_size=st.integers(1, 20))
def test_a_part_is_cut_as_torch_cuts_it(part: Part, world_size: int) -> None:
    whole = torch.empty(part.num_slices, part.slice_numbers)
    pieces = torch.chunk(whole, world_size)
    # every process has as much room as the first one, whatever it has of the parameter
    assert part.shard_numbers(world_size) == pieces[0].numel()
    assert dataclasses.replace(part, is_replica=True).shard_numbers(world_size) == whole.numel()


@given(found=st.lists(parts, min_size=1, max_size=5), world_size=st.integers(1, 20), cast=st.sampled_from((None, 2)))
def test_a_unit_is_the_sum_of_its_padded_parts(found: list[Part], world_size: int, cast: int | None) -> None:
    unit = Unit("layer", tuple(found), stays_gathered=False)
    gathered = reduced = frozen = trained = 0
    for part in found:
        room = 0
        while room * world_size < part.num_slices:
            room += 1
        for _ in range(world_size):
            gathered += room * part.slice_numbers * (cast or part.itemsize)
            reduced += room * part.slice_numbers * (cast or part.itemsize) if part.is_trained else 0
        kept = room * part.slice_numbers * part.itemsize
        frozen, trained = (frozen, trained + kept) if part.is_trained else (frozen + kept, trained)
    assert unit.gathered_bytes(world_size, cast) == gathered
    assert unit.reduced_bytes(world_size, cast) == reduced
    assert (unit.shard_bytes(world_size, trained=False), unit.shard_bytes(world_size, trained=True)) == (
        frozen,
        trained,
    )
    kept = dataclasses.replace(unit, is_sent_as_kept=True)
    assert kept.gathered_bytes(world_size, cast) == unit.gathered_bytes(world_size, None)


def test_three_rows_are_not_parted_further_among_sixty_four_processes() -> None:
    rows = Part(num_slices=3, slice_numbers=10, itemsize=4, is_trained=True)
    unit = Unit("layer", (rows,), stays_gathered=False)
    assert unit.shard_bytes(64, trained=True) == 40
    # and sixty-one of them send padding
    assert unit.reduced_bytes(64, None) == 64 * 40


@given(trained=st.lists(st.booleans(), min_size=1, max_size=8), wants=st.booleans())
def test_units_are_gathered_again_where_the_backward_pass_comes_by(trained: list[bool], wants: bool) -> None:
    units = [Unit(str(n), (Part(1, 1, 4, is_trained),), stays_gathered=False) for n, is_trained in enumerate(trained)]
    # backward as FSDP2 goes: at each unit whose output wants a gradient, that unit and the one before it are there
    there = set()
    for number in reversed(range(len(units))):
        if wants or any(trained[: number + 1]):
            there |= {number, max(0, number - 1)}
    made = _with_gathers(units, inputs_want_gradients=wants)
    assert [unit.num_gathers for unit in made] == [1 + (number in there) for number in range(len(units))]


def test_what_stays_gathered_is_not_gathered_again() -> None:
    units = [Unit(str(n), (Part(1, 1, 4, True),), stays_gathered=n == 1) for n in range(2)]
    assert [unit.num_gathers for unit in _with_gathers(units, inputs_want_gradients=False)] == [2, 1]


@given(
    sizes=st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=8),
)
def test_the_most_that_is_gathered_is_two_neighbours_and_what_stays(sizes: list[tuple[int, bool]]) -> None:
    units = tuple(Unit(str(n), (), stays_gathered=stays) for n, (_, stays) in enumerate(sizes))
    staying = sum(number for number, stays in sizes if stays)
    going = [number for number, stays in sizes if not stays]
    most = max([sum(going[n : n + 2]) for n in range(len(going))], default=0)
    assert _most_gathered(units, [number for number, _ in sizes]) == staying + most


@given(world_size=st.integers(1, 12), chunk=st.integers(1, 9))
def test_a_ring_sends_as_much_as_one_that_is_walked(world_size: int, chunk: int) -> None:
    """Reduce-scatter, then all-gather: each process passes a chunk on in every round, and all end with the sum."""
    held = [[torch.full((chunk,), rank + 1.0) for _ in range(world_size)] for rank in range(world_size)]
    sent = [0] * world_size
    for adds in (True, False):
        for number in range(world_size - 1):
            places = [(rank - number + (not adds)) % world_size for rank in range(world_size)]
            moving = [held[rank][places[rank]].clone() for rank in range(world_size)]
            for rank in range(world_size):
                target, place = (rank + 1) % world_size, places[rank]
                held[target][place] = held[target][place] + moving[rank] if adds else moving[rank]
                sent[rank] += moving[rank].numel()
    total = float(sum(range(1, world_size + 1)))
    assert all(bool((piece == total).all()) for pieces in held for piece in pieces)
    assert set(sent) == {_ring(2 * world_size * chunk, world_size)}


# --- a run's bytes


@pytest.mark.parametrize("method", METHODS)
def test_shards_add_up_to_the_whole_and_copies_are_whole(method: str, estimator: Estimator) -> None:
    rows = {"meft_r": 64} if method == "meft" else {}
    config = _run(method=method, **({} if method in ("esft", "expert_lora") else {"select_top_k": None}), **rows)
    alone = estimator(config)
    copied = RankEstimator(estimator, 4)(config)
    sharded = RankEstimator(estimator, 4)(changed(config, {"fsdp": True}))
    for each in (copied, sharded):
        assert tuple(each.device_bytes) == PARTED_KINDS
        assert each.host_bytes == alone.host_bytes
    buckets = alone.state.gradient_bytes - alone.state.row_gradient_bytes
    assert copied.device_bytes == {**alone.device_bytes, GATHERED: 0, SENT: buckets}
    for kind in ("frozen weights", "trained weights", "optimizer state"):
        a_quarter = alone.device_bytes[kind] / 4
        # padding, and what is not parted: routers of a sparse adapter
        assert a_quarter <= sharded.device_bytes[kind] <= alone.device_bytes[kind], kind
    assert sharded.device_bytes["frozen weights"] == pytest.approx(alone.device_bytes["frozen weights"] / 4, rel=0.1)
    assert sharded.device_bytes["activations"] <= alone.device_bytes["activations"]
    assert sharded.on_rank is not None
    assert copied.on_rank is not None
    assert set(sharded.on_rank.sent) >= {"all-gather"}
    assert copied.on_rank.sent["all-reduce"] == 2 * buckets * 3 // 4


def test_one_process_of_one_sends_nothing_and_has_no_buckets(estimator: Estimator) -> None:
    alone, only = estimator(_run()), RankEstimator(estimator, 1)(_run())
    assert only.total_device_bytes == alone.total_device_bytes
    assert only.on_rank is not None
    assert only.on_rank.sent == {}


def test_gradients_stay_whole_between_the_batches_of_a_step(estimator: Estimator) -> None:
    once, often = (
        RankEstimator(estimator, 4)(_run(fsdp=True, gradient_accumulation_steps=number)) for number in (1, 3)
    )
    assert often.device_bytes["gradients"] == often.state.gradient_bytes
    assert once.device_bytes["gradients"] <= once.device_bytes["trained weights"]
    assert once.on_rank is not None
    assert often.on_rank is not None
    # weights are gathered for each batch, gradients are sent once
    assert often.on_rank.sent["all-gather"] == 3 * once.on_rank.sent["all-gather"]
    assert often.on_rank.sent["reduce-scatter"] == once.on_rank.sent["reduce-scatter"]


def test_mixed_precision_is_sent_in_two_bytes_by_accelerators_alone(base: Path) -> None:
    model = tiny_model("deepseek_v2").config
    config = _run(base, fsdp=True, bf16=True, method="full", select_top_k=None)
    cpu, gpu = (RankEstimator(Estimator(model, has_host=has_host), 4)(config) for has_host in (False, True))
    assert cpu.on_rank is not None
    assert gpu.on_rank is not None
    assert cpu.on_rank.sent["all-gather"] == 2 * gpu.on_rank.sent["all-gather"]
    assert cpu.on_rank.sent["reduce-scatter"] == 2 * gpu.on_rank.sent["reduce-scatter"]
    assert gpu.device_bytes["trained weights"] == cpu.device_bytes["trained weights"]
    # masters are in float32 at least
    half = RankEstimator(Estimator(model, has_host=True), 4)(changed(config, {"dtype": "bfloat16"}))
    assert half.device_bytes["trained weights"] == gpu.device_bytes["trained weights"]
    assert half.device_bytes["optimizer state"] == 2 * half.device_bytes["trained weights"]


def test_a_trace_serves_every_number_of_processes_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, traced = Estimator(tiny_model("deepseek_v2").config), []
    from metier.planning import estimate as module

    plain = module.trace_step
    monkeypatch.setattr(module, "trace_step", lambda *a, **k: (traced.append(1), plain(*a, **k))[1])
    for number in (1, 2, 8):
        RankEstimator(fresh, number)(_run(gradient_accumulation_steps=number, fsdp=number > 1))
    assert len(traced) == 1


# --- from which number on it fits


def test_the_numbers_that_fit_are_found(estimator: Estimator) -> None:
    config = _run(method="full", select_top_k=None)
    totals = {
        number: RankEstimator(estimator, number)(changed(config, {"fsdp": True})).total_device_bytes
        for number in SIZES[1:]
    }
    for limit in totals.values():
        found = where_sharding_pays(config, estimator, lambda _, most=limit: Budget(most, None), 8)
        assert found is not None
        assert found.fits["fsdp2"] == tuple(number for number, total in totals.items() if total <= limit)
    # padding makes many processes take more than few
    two = sorted(totals.values())[1]
    found = where_sharding_pays(config, estimator, lambda _: Budget(two, None), 8)
    assert str(found) == "full: DDP fits on no number of them; FSDP2 fits on 4, 8."


def test_from_where_on_it_fits_is_said_where_all_larger_numbers_do() -> None:
    looked_at = {"ddp": (2, 4, 8), "fsdp2": (2, 4, 8)}
    some = Pays("esft", False, looked_at, {"ddp": (), "fsdp2": (4, 8)}, (8, 1), None)
    assert str(some) == "esft: DDP fits on no number of them; FSDP2 fits from 4 on."
    alone = dataclasses.replace(some, fits_alone=True)
    assert str(alone).startswith("esft: One process fits, for it has no buckets; in several, DDP fits on no number")
    other = dataclasses.replace(some, fits={"ddp": (2, 4, 8), "fsdp2": ()})
    assert str(other) == "esft: DDP fits from 2 on, FSDP2 on none of them."


def test_what_fits_nowhere_and_what_fits_everywhere_is_said(estimator: Estimator) -> None:
    none = where_sharding_pays(_run(), estimator, lambda _: Budget(1000, None), 8)
    assert none is not None
    totals = {
        number: RankEstimator(estimator, number)(_run(fsdp=True)).total_device_bytes for number in SIZES if number > 1
    }
    number = min(totals, key=lambda each: totals[each])
    assert "esft: it fits on no number up to 1,024, sharded or not. " in str(none)
    assert f"Sharded over {number}, where they take least, each takes {size(totals[number])}." in str(none)
    # three experts padded to a thousand
    assert totals[1024] > totals[4]
    everywhere = where_sharding_pays(_run(), estimator, lambda _: Budget(1 << 40, None), 8)
    assert everywhere is not None
    assert everywhere.as_dict() == {"fits_alone": True, "ddp": list(SIZES[1:]), "fsdp2": list(SIZES[1:])}
    copied, sharded = everywhere.here or pytest.fail("both fit")
    assert copied.on_rank is not None
    assert sharded.on_rank is not None
    less, more = copied.on_rank.sent_bytes, sharded.on_rank.sent_bytes
    assert less < more
    assert f"DDP sends {size(less)} a step from each, FSDP2 {size(more)}, and" in str(everywhere)
    taken = sharded.total_device_bytes - copied.total_device_bytes
    assert taken > 0
    assert str(everywhere).endswith(f"FSDP2 takes {size(taken)} more of each: sharding does not pay.")


def test_a_global_batch_is_parted_among_the_processes_that_are_looked_at(estimator: Estimator) -> None:
    # twelve records, two at once: two processes or six, but not four
    found = where_sharding_pays(_run(global_batch_size=12), estimator, lambda _: Budget(1 << 40, None), 6)
    assert found is not None
    assert found.here is not None
    assert found.here[0].config.gradient_accumulation_steps == 1
    assert found.looked_at == {"ddp": (2, 6), "fsdp2": (2, 6)}


# --- the verb


def _table(made: object) -> str:
    console = Console(file=io.StringIO(), width=220)
    console.print(made)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_plan_has_copies_and_shards_side_by_side(base: Path) -> None:
    world = World(8, links=links_of("nvlink4"))
    made = plan(_run(base), methods=("esft", "lora"), device_memory="8GiB", world=world)
    assert [row.name for row in made.rows] == ["esft ddp", "esft fsdp2", "lora ddp", "lora fsdp2"]
    text = _table(made)
    for said in ("each of 8 processes has 8 GiB", GATHERED, SENT, "by all-gather", "by the maker's figures of nvlink4"):
        assert said in text, said
    assert "was not measured" in text
    for row in made.rows:
        assert row.estimate is not None
        assert row.estimate.on_rank is not None
        assert row.link_seconds == pytest.approx(row.estimate.on_rank.sent_bytes / (0.8 * 450e9))
    (only,) = plan(_run(base, fsdp=True), device_memory="8GiB", world=World(2)).rows
    assert only.way == "fsdp2"


def test_what_a_run_in_so_many_processes_refuses_is_refused_in_its_words(base: Path) -> None:
    def reasons(number: int, **options: object) -> dict[str | None, str]:
        made = plan(_run(base, select_top_k=None, **options), device_memory="8GiB", world=World(number))
        text = " ".join(_table(made).split())
        assert all(row.why_not in text for row in made.rows)
        return {row.way: row.why_not for row in made.rows if row.estimate is None}

    assert "galore does not run in several processes" in reasons(2, method="galore")["ddp"]
    assert reasons(1, method="lora")["fsdp2"].startswith("fsdp: there is one process, so nothing to shard over")
    assert list(reasons(2, method="norms")) == ["fsdp2"]
    rows = {"method": "meft", "meft_r": 64, "meft_store": "disk"}
    assert set(reasons(2, **rows)) == {"ddp", "fsdp2"}
    parting = reasons(4, method="lora", global_batch_size=12)
    with pytest.raises(ConfigError) as raised:
        for_ranks(_run(base, method="lora", select_top_k=None, global_batch_size=12), Ranks(size=4))
    assert parting == dict.fromkeys(("ddp", "fsdp2"), str(raised.value))


@pytest.mark.parametrize("has_host", [False, True])
def test_what_makes_shards_fit_is_no_store_of_the_base(has_host: bool) -> None:
    copied, sharded = (
        [key for change in _changes(_run(fsdp=fsdp), has_host=has_host) for key in change] for fsdp in (False, True)
    )
    assert {"base_store", "base_format"} <= set(copied)
    assert sharded == [key for key in copied if key not in ("base_store", "base_format")]


def test_tied_embeddings_are_one_unit_with_the_output_layer() -> None:
    config = tiny_model("llama").config
    for tied in (False, True):
        config.tie_word_embeddings = tied
        run = _run(method="full", select_top_k=None)
        names = [unit.name for unit in Estimator(config)(run).units]
        assert names == [*([] if tied else ["embeddings"]), "layer 0", "layer 1", "layer 2", "norm and output layer"]


def test_processes_of_a_machine_share_its_memory(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metier.planning import budget

    monkeypatch.setattr(budget, "memory_limit_bytes", lambda: 64 << 30)
    assert plan(_run(base), world=World(16, devices_per_node=4)).budget.device_bytes == 16 << 30
    assert plan(_run(base), world=World(2, devices_per_node=4)).budget.device_bytes == 32 << 30
    given = plan(_run(base), device_memory="8GiB", host_memory="80GiB", world=World(16)).budget
    assert (given.device_bytes, given.host_bytes) == (8 << 30, 10 << 30)


def test_the_slowest_link_of_the_ring_decides() -> None:
    both = links_of("NVLink4, infiniband-ndr")
    assert World(8, links=both).slowest_link is LINKS["nvlink4"]
    assert World(9, links=both).slowest_link is LINKS["infiniband-ndr"]
    assert World(16, devices_per_node=16, links=both).slowest_link is LINKS["nvlink4"]
    assert World(16, links=links_of("pcie4")).seconds(32 * 10**9) == pytest.approx(1 / 0.8)
    assert World(16).seconds(1) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--world-size", "0"], "world_size: got 0, expected 1 or more."),
        (["--world-size", "2", "--devices-per-node", "0"], "devices_per_node: got 0, expected 1 or more."),
        (["--world-size", "2", "--link", "foo"], "link: got 'foo', expected one of nvlink3, nvlink4"),
        (["--world-size", "2", "--link", "pcie4,pcie4,pcie4"], "or two with a comma between"),
        (["--link", "nvlink4"], "link: one process sends nothing. Say how many there are: --world-size 8."),
        (
            ["--devices-per-node", "4"],
            "devices_per_node: is for several processes. Say how many there are: --world-size 8.",
        ),
    ],
)
def test_what_cannot_be_planned_says_what_can(options: list[str], said: str, base: Path) -> None:
    done = CliRunner().invoke(app, ["plan", "--model", str(base), "--max-length", "64", *options])
    assert done.exit_code != 0
    assert said in str(done.exception)


def test_json_and_chart_have_a_process_of_several(base: Path, tmp_path: Path) -> None:
    out, chart = tmp_path / "plan.json", tmp_path / "plan.html"
    options = ["--max-length", "64", "--world-size", "4", "--output", str(out), "--chart", str(chart)]
    done = CliRunner().invoke(app, ["plan", "--model", str(base), "--device-memory", "8GiB", *options])
    assert done.exit_code == 0, done.output
    made = json.loads(out.read_text())
    assert made["world_size"] == 4
    assert made["sharding_pays"]["esft"]["fsdp2"][0] == 2
    assert [run["way"] for run in made["runs"]] == ["ddp", "fsdp2"]
    copied, sharded = made["runs"]
    assert set(copied["on_rank"]["sent_bytes"]) == {"all_reduce"}
    assert set(sharded["on_rank"]["sent_bytes"]) == {"all_gather", "reduce_scatter"}
    assert sharded["device_bytes"]["frozen_weights"] < copied["device_bytes"]["frozen_weights"]
    assert "esft fsdp2" in chart.read_text()
    assert GATHERED in chart.read_text()
