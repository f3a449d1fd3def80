"""ESFT's file format: read, written, and every way in which a file can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier.errors import SelectionError
from metier.routing.esft_format import ExpertConfig, read_expert_config, write_expert_config

PUBLISHED = '{"experts": {"1": [8, 26], "10": [3], "2": [7]}, "shared_experts": false, "non_expert_modules": true}'


def test_a_file_in_the_published_form_is_read_and_written_to_the_letter(tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    path.write_text(PUBLISHED)
    config = read_expert_config(path)
    assert config == ExpertConfig(
        experts={1: (8, 26), 10: (3,), 2: (7,)}, shared_experts=False, non_expert_modules=True
    )
    write_expert_config(tmp_path / "new" / "out.json", config)
    assert (tmp_path / "new" / "out.json").read_text() == PUBLISHED


@given(
    experts=st.dictionaries(
        st.integers(0, 99), st.lists(st.integers(0, 999), min_size=1, unique=True).map(tuple), max_size=9
    ),
    shared=st.booleans(),
    others=st.booleans(),
)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, experts: dict[int, tuple[int, ...]], shared: bool, others: bool
) -> None:
    path = tmp_path_factory.mktemp("written") / "config.json"
    config = ExpertConfig(experts=experts, shared_experts=shared, non_expert_modules=others)
    write_expert_config(path, config)
    assert read_expert_config(path) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "got list, expected the keys"),
        ('{"experts": {"1": [2]}}', r"got the keys \['experts'\], expected the keys"),
        (PUBLISHED.replace('"shared', '"share'), r"got the keys .*'share_experts'"),
        (PUBLISHED.replace('"shared', '"top_p": 0.2, "shared'), r"got the keys .*'top_p'"),
        (PUBLISHED.replace("false", "0"), "shared_experts: got 0, expected true or false"),
        (
            PUBLISHED.replace('{"1": [8, 26], "10": [3], "2": [7]}', "[1]"),
            r"experts: got \[1\], expected layers",
        ),
        (PUBLISHED.replace('"10"', '"ten"'), "got layer 'ten', expected the number of a decoder layer"),
        (PUBLISHED.replace('"10"', '"-1"'), "got layer '-1', expected the number"),
        (PUBLISHED.replace('"10"', '"01"'), "got layer '01', expected the number"),
        (PUBLISHED.replace('"10"', '"1"'), "the key '1' is there twice"),
        (PUBLISHED.replace("[3]", "3"), r"layers\.10: got 3, expected a list of expert ids"),
        (PUBLISHED.replace("[3]", '["3"]'), r"layers\.10: got \['3'\], expected a list of expert ids"),
        (PUBLISHED.replace("[3]", "[true]"), r"layers\.10: got \[True\], expected a list of expert ids"),
        (PUBLISHED.replace("[3]", "[3.0]"), r"layers\.10: got \[3\.0\], expected a list of expert ids"),
    ],
)
def test_a_wrong_file_is_an_error_that_says_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(SelectionError, match=rf"config\.json: .*{message}"):
        read_expert_config(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match=r"none\.json: No such file or directory; expected a selection"):
        read_expert_config(tmp_path / "none.json")


def test_a_file_of_bytes_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SelectionError, match="not valid JSON"):
        read_expert_config(tmp_path / "config.json")
