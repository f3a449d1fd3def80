"""Which deltas make way for which, counted in bytes; no delta is real."""

from __future__ import annotations

import subprocess
import sys
from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from metier.errors import ServingError
from metier.serving.residency import Move, Residency


def book(*names: str, accelerator: int = 20, host: int = 0, size: int = 10) -> Residency:
    """A book with deltas of one size, none of them loaded."""
    residency = Residency(accelerator_bytes=accelerator, host_bytes=host)
    for name in names:
        residency.add(name, accelerator_bytes=size, host_bytes=size)
    return residency


def load(residency: Residency, *names: str) -> None:
    for name in names:
        moves = residency.make_room(name)
        assert moves is not None
        for move in moves:
            residency.done(move)


def up(name: str) -> Move:
    return Move(name, "disk", "accelerator")


def down(name: str) -> Move:
    return Move(name, "accelerator", "disk")


def test_a_delta_that_fits_evicts_nobody() -> None:
    residency = book("a", "b")
    load(residency, "a")
    assert residency.make_room("b") == (up("b"),)


def test_a_delta_is_resident_only_once_its_move_is_done() -> None:
    residency = book("a")
    (move,) = residency.make_room("a") or ()
    assert not residency.is_resident("a")
    assert residency.tier("a") == "disk"
    residency.done(move)
    assert residency.is_resident("a")
    assert residency.tier("a") == "accelerator"


def test_a_delta_that_is_there_or_on_its_way_needs_no_move() -> None:
    residency = book("a", "b")
    load(residency, "a")
    assert residency.make_room("a") == ()
    assert residency.make_room("b") == (up("b"),)
    assert residency.make_room("b") == ()


def test_the_least_recently_used_delta_makes_way() -> None:
    residency = book("a", "b", "c")
    load(residency, "a", "b")
    residency.touch("a")
    assert residency.make_room("c") == (down("b"), up("c"))


def test_an_acquired_delta_counts_as_used_when_it_is_released() -> None:
    residency = book("a", "b", "c")
    load(residency, "a", "b")
    residency.acquire("a")
    residency.touch("b")
    residency.release("a")
    assert residency.make_room("c") == (down("b"), up("c"))


def test_as_many_make_way_as_are_needed_and_no_more() -> None:
    residency = book("a", "b", "c", accelerator=30)
    residency.add("large", accelerator_bytes=15, host_bytes=15)
    load(residency, "a", "b", "c")
    assert residency.make_room("large") == (down("a"), down("b"), up("large"))


def test_deltas_in_use_and_pinned_ones_stay() -> None:
    residency = book("a", "b", "c", accelerator=30)
    residency.add("d", accelerator_bytes=10, host_bytes=10)
    load(residency, "a", "b", "c")
    residency.acquire("a")
    residency.pin("b")
    assert residency.make_room("d") == (down("c"), up("d"))


def test_there_is_no_way_while_all_are_in_use() -> None:
    residency = book("a", "b", "c")
    load(residency, "a", "b")
    residency.acquire("a")
    residency.acquire("b")
    assert residency.make_room("c") is None
    residency.release("a")
    assert residency.make_room("c") == (down("a"), up("c"))


def test_a_delta_on_its_way_down_is_not_resident_and_comes_up_again_only_afterwards() -> None:
    residency = book("a", "b", "c")
    load(residency, "a", "b")
    moves = residency.make_room("c")
    assert moves == (down("a"), up("c"))
    assert not residency.is_resident("a")
    assert residency.make_room("a") is None
    residency.done(moves[0])
    assert residency.make_room("a") == (down("b"), up("a"))


def test_bytes_of_moves_under_way_are_not_given_twice() -> None:
    residency = book("a", "b", "c")
    residency.make_room("a")
    residency.make_room("b")
    assert residency.make_room("c") is None


def test_bytes_of_an_abandoned_move_are_free_again() -> None:
    residency = book("a", "b", accelerator=10)
    (move,) = residency.make_room("a") or ()
    assert residency.make_room("b") is None
    residency.abandon(move)
    assert residency.make_room("b") == (up("b"),)
    assert residency.tier("a") == "disk"


def test_a_delta_goes_up_by_the_host_where_the_host_has_room() -> None:
    residency = book("a", accelerator=10, host=10)
    assert residency.make_room("a") == (Move("a", "disk", "host"), Move("a", "host", "accelerator"))


def test_an_evicted_delta_keeps_its_copy_on_the_host() -> None:
    residency = book("a", "b", accelerator=10, host=20)
    load(residency, "a")
    moves = residency.make_room("b")
    assert moves == (
        Move("a", "accelerator", "host"),
        Move("b", "disk", "host"),
        Move("b", "host", "accelerator"),
    )
    for move in moves:
        residency.done(move)
    assert residency.tier("a") == "host"
    residency.touch("b")
    assert residency.make_room("a") == (Move("b", "accelerator", "host"), Move("a", "host", "accelerator"))


def test_a_copy_on_the_host_makes_way_for_the_next() -> None:
    residency = book("a", "b", accelerator=10, host=10)
    load(residency, "a")
    assert residency.make_room("b") == (
        Move("a", "host", "disk"),
        Move("a", "accelerator", "disk"),
        Move("b", "disk", "host"),
        Move("b", "host", "accelerator"),
    )


def test_a_delta_larger_than_the_host_is_read_straight_to_the_accelerator() -> None:
    residency = book("a", accelerator=10, host=9)
    assert residency.make_room("a") == (up("a"),)


def test_a_pinned_delta_keeps_its_only_copy_on_the_host() -> None:
    residency = book("a", "b", accelerator=20, host=10)
    (to_host, up_move) = residency.make_room("a") or ()
    residency.done(to_host)
    residency.abandon(up_move)
    residency.pin("a")
    assert residency.make_room("b") == (up("b"),)


def test_a_copy_under_a_delta_in_use_makes_way_on_the_host() -> None:
    residency = book("a", "b", accelerator=20, host=10)
    load(residency, "a")
    residency.acquire("a")
    assert residency.make_room("b") == (
        Move("a", "host", "disk"),
        Move("b", "disk", "host"),
        Move("b", "host", "accelerator"),
    )


def test_bytes_are_those_of_the_copies_in_a_tier() -> None:
    residency = book("a", "b", "c", accelerator=10, host=20)
    load(residency, "a", "b")
    assert [residency.num_bytes(tier) for tier in ("accelerator", "host", "disk")] == [10, 20, 10]


def test_prefetch_brings_up_who_has_waited_longest() -> None:
    residency = book("a", "b", accelerator=10)
    assert residency.prefetch(["b", "a"]) == (up("b"),)


def test_prefetch_goes_on_to_the_next_name_while_the_first_is_on_its_way() -> None:
    residency = book("a", "b")
    residency.make_room("a")
    assert residency.prefetch(["a", "b"]) == (up("b"),)


def test_prefetch_does_not_evict_what_an_earlier_name_stands_for() -> None:
    residency = book("a", "b", accelerator=10)
    load(residency, "a")
    assert residency.prefetch(["a", "b"]) == ()
    assert residency.prefetch(["b", "a"]) == (down("a"), up("b"))


def test_prefetch_evicts_what_a_later_name_stands_for_only_where_no_others_can_make_way() -> None:
    residency = book("a", "b", "c")
    load(residency, "a", "b")
    assert residency.prefetch(["c", "a"]) == (down("b"), up("c"))
    residency = book("a", "b", "c")
    load(residency, "a", "b")
    assert residency.prefetch(["c", "a", "b"]) == (down("a"), up("c"))


def test_prefetch_brings_a_delta_to_the_host_while_the_accelerator_is_in_use() -> None:
    residency = book("a", "b", accelerator=10, host=20)
    load(residency, "a")
    residency.acquire("a")
    (move,) = residency.prefetch(["b"])
    assert move == Move("b", "disk", "host")
    residency.done(move)
    assert residency.prefetch(["b"]) == ()
    residency.release("a")
    assert residency.prefetch(["b"]) == (Move("a", "accelerator", "host"), Move("b", "host", "accelerator"))


def test_prefetch_to_the_host_does_not_evict_what_an_earlier_name_stands_for() -> None:
    residency = book("a", "b", "c", accelerator=10, host=10)
    load(residency, "a")
    residency.acquire("a")
    for move in residency.prefetch(["b"]):
        residency.done(move)
    assert residency.prefetch(["b", "c"]) == ()


def test_a_dropped_delta_can_be_forgotten_and_added_again() -> None:
    residency = book("a", accelerator=10, host=10)
    load(residency, "a")
    for move in residency.drop("a"):
        residency.done(move)
    residency.forget("a")
    residency.add("a", accelerator_bytes=10, host_bytes=10)
    assert residency.tier("a") == "disk"


@pytest.mark.parametrize(("host", "target"), [(0, "disk"), (10, "host")])
def test_a_delta_that_is_sent_down_keeps_its_copy_on_the_host_alone(host: int, target: str) -> None:
    residency = book("a", host=host)
    load(residency, "a")
    assert residency.send_down("a") == (Move("a", "accelerator", target),)
    assert not residency.is_resident("a")
    assert residency.send_down("a") == ()
    residency.done(Move("a", "accelerator", target))
    assert residency.tier("a") == target
    assert residency.send_down("a") == ()


def test_deltas_in_use_and_pinned_ones_are_not_sent_down() -> None:
    residency = book("a", "b")
    load(residency, "a", "b")
    residency.acquire("a")
    residency.pin("b")
    assert residency.send_down("a") == residency.send_down("b") == ()


def test_a_delta_larger_than_the_accelerator_is_refused() -> None:
    with pytest.raises(
        ServingError,
        match=r"delta 'a': got 21 bytes, where the accelerator has 20 for deltas, of which 0 are pinned already\.\n"
        r"Raise the budget for deltas, or pin fewer\.",
    ):
        book("a", size=21)


def test_a_delta_that_does_not_fit_beside_the_pinned_ones_is_refused() -> None:
    residency = book("a")
    residency.pin("a")
    with pytest.raises(
        ServingError, match="got 11 bytes, where the accelerator has 20 for deltas, of which 10 are pin"
    ):
        residency.add("b", accelerator_bytes=11, host_bytes=11)


def test_a_pin_that_would_keep_another_delta_out_for_ever_is_refused() -> None:
    residency = book("a", "b")
    residency.pin("a")
    residency.add("c", accelerator_bytes=10, host_bytes=10)
    with pytest.raises(
        ServingError, match=r"'b': got 10 bytes to pin.* are pinned already, and the largest .* needs 10"
    ):
        residency.pin("b")
    assert not residency.is_pinned("b")


def test_a_delta_can_be_pinned_that_fills_the_accelerator() -> None:
    residency = book("a", size=20)
    residency.pin("a")
    assert residency.is_pinned("a")


def test_policies_do_without_torch() -> None:
    code = "import sys, metier.serving.residency, metier.serving.admission; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


NAMES = st.sampled_from("abcdef")


class Server(RuleBasedStateMachine):
    """Every order of requests, moves, failures and pins; what is where is counted here once more, from the moves."""

    def __init__(self) -> None:
        super().__init__()
        self.budgets = {"accelerator": 20, "host": 12}
        self.residency = Residency(accelerator_bytes=20, host_bytes=12)
        self.sizes: dict[str, int] = {}
        self.used: list[str] = []
        self.users: dict[str, int] = {}
        self.pinned: set[str] = set()
        self.copies: dict[str, set[str]] = {}
        self.queue: deque[Move] = deque()

    def bytes_in(self, tier: str) -> int:
        return sum(self.sizes[name] for name, tiers in self.copies.items() if tier in tiers)

    def use(self, name: str) -> None:
        self.used = [*(other for other in self.used if other != name), name]

    def plan(self, moves: tuple[Move, ...] | None, keeping: set[str]) -> None:
        moving = {move.name for move in self.queue}
        wanted = moves[-1].name if moves else None
        for source in ("accelerator", "host"):
            victims = [m.name for m in moves or () if m.is_eviction and m.source == source]
            for victim in victims:
                assert victim not in moving
                assert victim != wanted
                if source == "accelerator" or "accelerator" not in self.copies[victim]:
                    assert victim not in self.pinned
                    assert victim not in keeping
                    assert not self.users[victim]
            # LRU: who was used before the last victim and may be evicted too is a victim
            if victims:
                assert victims == sorted(victims, key=self.used.index)
                for other in self.used[: self.used.index(victims[-1])]:
                    spare = source == "host" and "accelerator" in self.copies[other]
                    kept = not spare and (other in self.pinned or other in keeping or self.users[other])
                    may = source in self.copies[other] and other not in moving and other != wanted and not kept
                    assert other in victims or not may
        self.queue.extend(moves or ())

    @initialize(sizes=st.lists(st.integers(2, 9), min_size=6, max_size=6))
    def begin(self, sizes: list[int]) -> None:
        for name, size in zip("abcdef", sizes, strict=True):
            self.add(name, size, False)

    @rule(name=NAMES, size=st.integers(1, 21), pinned=st.booleans())
    def add(self, name: str, size: int, pinned: bool) -> None:
        if name in self.sizes:
            return
        fixed = sum(self.sizes[other] for other in self.pinned)
        largest = max((s for n, s in self.sizes.items() if n not in self.pinned), default=0) if pinned else 0
        try:
            self.residency.add(name, accelerator_bytes=size, host_bytes=size, is_pinned=pinned)
        except ServingError:
            assert fixed + size + largest > 20
            return
        assert fixed + size + largest <= 20
        self.sizes[name], self.users[name], self.copies[name] = size, 0, set()
        self.pinned |= {name} if pinned else set()
        self.use(name)

    @rule(name=NAMES)
    def touch(self, name: str) -> None:
        if name in self.sizes:
            self.residency.touch(name)
            self.use(name)

    @rule(name=NAMES)
    def pin(self, name: str) -> None:
        if name in self.sizes:
            try:
                self.residency.pin(name)
            except ServingError:
                return
            self.pinned.add(name)

    @rule(name=NAMES)
    def unpin(self, name: str) -> None:
        if name in self.sizes:
            self.residency.pin(name, False)
            self.pinned.discard(name)

    @rule(name=NAMES)
    def acquire(self, name: str) -> None:
        if name in self.sizes and self.residency.is_resident(name):
            self.residency.acquire(name)
            self.users[name] += 1
            self.use(name)

    @rule(name=NAMES)
    def release(self, name: str) -> None:
        if self.users.get(name):
            self.residency.release(name)
            self.users[name] -= 1
            self.use(name)

    @rule(name=NAMES, keeping=st.sets(NAMES))
    def make_room(self, name: str, keeping: set[str]) -> None:
        if name in self.sizes:
            self.plan(self.residency.make_room(name, keeping=keeping - {name}), keeping - {name})

    @rule(names=st.lists(NAMES, unique=True))
    def prefetch(self, names: list[str]) -> None:
        names = [name for name in names if name in self.sizes]
        moves = self.residency.prefetch(names)
        if moves:
            earlier = names[: names.index(moves[-1].name)]
            needs_others = {move.name for move in moves if move.is_eviction} & set(names)
            self.plan(moves, set(earlier if needs_others else names) - {moves[-1].name})

    @rule(name=NAMES)
    def send_down(self, name: str) -> None:
        if name in self.sizes:
            may = not self.users[name] and name not in self.pinned and name not in {m.name for m in self.queue}
            moves = self.residency.send_down(name)
            assert [move.source for move in moves] == ["accelerator"] * (may and "accelerator" in self.copies[name])
            self.queue.extend(moves)

    @rule(name=NAMES)
    def drop(self, name: str) -> None:
        moving = {move.name for move in self.queue}
        if name in self.sizes and not self.users[name] and name not in moving:
            self.queue.extend(self.residency.drop(name))

    @rule(name=NAMES)
    def forget(self, name: str) -> None:
        if name in self.sizes and not self.copies[name] and name not in {move.name for move in self.queue}:
            self.residency.forget(name)
            self.pinned.discard(name)
            self.used.remove(name)
            del self.sizes[name], self.users[name], self.copies[name]

    @precondition(lambda self: self.queue)
    @rule()
    def carry_out(self) -> None:
        move = self.queue.popleft()
        if move.is_eviction:
            assert not self.users[move.name] or "accelerator" in self.copies[move.name] - {move.source}
            self.copies[move.name].remove(move.source)
        else:
            assert move.source == "disk" or move.source in self.copies[move.name]
            self.copies[move.name].add(move.target)
        self.residency.done(move)

    @precondition(lambda self: any(not move.is_eviction for move in self.queue))
    @rule()
    def fail(self) -> None:
        name = next(move.name for move in self.queue if not move.is_eviction)
        for move in [m for m in self.queue if m.name == name and not m.is_eviction]:
            self.queue.remove(move)
            self.residency.abandon(move)

    @invariant()
    def no_tier_is_over_its_budget(self) -> None:
        for tier, budget in self.budgets.items():
            # moves are carried out in order, so those under way are counted as they come
            copies = {name: set(tiers) for name, tiers in self.copies.items()}
            assert self.bytes_in(tier) <= budget
            for move in self.queue:
                if move.is_eviction:
                    copies[move.name].discard(move.source)
                else:
                    copies[move.name].add(move.target)
                assert sum(self.sizes[name] for name, tiers in copies.items() if tier in tiers) <= budget

    @invariant()
    def the_book_says_where_deltas_are(self) -> None:
        for name, copies in self.copies.items():
            expected = "accelerator" if "accelerator" in copies else "host" if "host" in copies else "disk"
            assert self.residency.tier(name) == expected
            leaving = any(move.name == name and move.source == "accelerator" for move in self.queue)
            assert self.residency.is_resident(name) == ("accelerator" in copies and not leaving)
        for tier in self.budgets:
            assert self.residency.num_bytes(tier) == self.bytes_in(tier)

    def teardown(self) -> None:
        """Once nobody uses any, each delta can be made resident."""
        for name in self.users:
            while self.users[name]:
                self.release(name)
        while self.queue:
            self.carry_out()
        for name in self.sizes:
            moves = self.residency.make_room(name)
            assert moves is not None
            self.plan(moves, set())
            while self.queue:
                self.carry_out()
            assert self.residency.is_resident(name)


TestServer = Server.TestCase
TestServer.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
