"""What is given up first: what a step's fixed program comes to last."""

from __future__ import annotations

import pytest

from metier.memory.disk_policy import next_use, place


def test_a_step_goes_up_then_down_then_up_twice():
    order = [(phase, layer) for phase in ("forward", "backward", "norm", "optimizer") for layer in range(3)]
    by_place = sorted(order, key=lambda what: place(*what, 3))
    assert by_place[:3] == [("forward", 0), ("forward", 1), ("forward", 2)]
    assert by_place[3:6] == [("backward", 2), ("backward", 1), ("backward", 0)]
    assert by_place[6:9] == [("norm", 0), ("norm", 1), ("norm", 2)]
    assert by_place[9:] == [("optimizer", 0), ("optimizer", 1), ("optimizer", 2)]


@pytest.mark.parametrize(
    ("kind", "layer", "now", "expected"),
    [
        ("rows", 2, ("forward", 2), 1),  # the backward pass begins where the forward one ends
        ("rows", 0, ("forward", 0), 5),
        ("rows", 0, ("backward", 0), 4),  # past the norm
        ("rows", 2, ("optimizer", 2), 3),  # the next step's forward pass
        ("state", 1, ("optimizer", 1), 12),  # a whole step
        ("state", 0, ("optimizer", 2), 10),
        ("gradients", 1, ("backward", 1), 3),
        ("gradients", 1, ("norm", 1), 3),  # the optimizer
    ],
)
def test_next_uses(kind, layer, now, expected):
    assert next_use(kind, layer, 3, place(*now, 3)) == expected


def test_after_the_optimizer_the_moments_just_used_are_the_last_to_be_wanted():
    now = place("optimizer", 1, 3)
    uses = {(kind, layer): next_use(kind, layer, 3, now) for kind in ("rows", "state") for layer in range(3)}
    assert max(uses, key=uses.__getitem__) == ("state", 1)
