"""Which delta is served under which name, while several are loaded and unloaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from metier.errors import DeltaError, UnknownDeltaError
from metier.serving.on_ray.names import NamedDelta, Names

LAW = NamedDelta("law", Path("/deltas/law"), 1)
CODE = Path("/deltas/code")


def test_a_delta_is_served_once_it_has_come_and_not_before() -> None:
    names = Names([LAW])
    with names.coming("code", CODE) as delta:
        assert names.get("code") is None
        assert names.all() == [LAW]
    assert names.all() == [LAW, delta]
    assert names.get("code") == delta
    assert (delta.name, delta.folder) == ("code", CODE)
    assert delta.since_ns > LAW.since_ns


def test_a_delta_that_did_not_come_leaves_its_name_free() -> None:
    names = Names([])
    with pytest.raises(OSError, match="no such file"), names.coming("code", CODE):
        raise OSError("no such file")
    assert names.all() == []
    with names.coming("code", CODE):
        pass


def test_a_delta_that_leaves_is_not_served_any_more_and_its_name_is_free_afterwards() -> None:
    names = Names([LAW])
    with names.leaving("law") as delta:
        assert delta == LAW
        assert names.get("law") is None
        with (
            pytest.raises(DeltaError, match="delta 'law': one of that name is still going out of service"),
            names.coming("law", CODE),
        ):
            pass
    with names.coming("law", CODE) as later:
        pass
    assert later.since_ns > delta.since_ns


def test_a_name_is_taken_by_who_is_served_and_by_who_is_coming() -> None:
    names = Names([LAW])
    with pytest.raises(DeltaError, match="delta 'law': the name is taken"), names.coming("law", CODE):
        pass
    with (
        names.coming("code", CODE),
        pytest.raises(DeltaError, match="delta 'code': the name is taken"),
        names.coming("code", CODE),
    ):
        pass


def test_who_is_not_served_cannot_leave() -> None:
    with (
        pytest.raises(UnknownDeltaError, match="delta 'law': no delta of that name is served"),
        Names([]).leaving("law"),
    ):
        pass
