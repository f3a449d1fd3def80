"""Names and folders of deltas: nothing from outside of the allowed folders, nothing that runs code."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from metier.errors import RequestError
from metier.serving.places import allowed_folder, check_files, check_name, deltas_in


def made_delta(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def allowed(tmp_path: Path) -> Path:
    made_delta(tmp_path / "allowed" / "law")
    made_delta(tmp_path / "secret" / "plans")
    return tmp_path / "allowed"


@pytest.mark.parametrize("name", ["law", "Law-2.1_b", "0", "a" * 100])
def test_plain_names_are_taken(name: str) -> None:
    check_name(name, "base")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "-a", "a\n", "ä", "a" * 101, "a\x00"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match="expected at most 100 letters, digits, dots, dashes and underscores"):
        check_name(name, "base")


def test_the_bases_name_is_refused() -> None:
    with pytest.raises(RequestError, match="got 'base' as a delta's name, which is the base's"):
        check_name("base", "base")


@pytest.mark.parametrize("is_absolute", [True, False])
def test_a_folder_inside_is_allowed(allowed: Path, is_absolute: bool) -> None:
    path = str(allowed / "law") if is_absolute else "law"
    assert allowed_folder(path, [allowed.parent / "other", allowed] if is_absolute else [allowed]) == allowed / "law"


@pytest.fixture
def outside(allowed: Path) -> Path:
    (allowed / "link").symlink_to(allowed.parent / "secret" / "plans")
    (allowed / "up").symlink_to("..")
    (allowed / "circle").symlink_to("circle")
    return allowed


@pytest.mark.parametrize(
    "path",
    ["", ".", "../secret/plans", "law/../law", "link", "up/secret/plans", "circle", "a\x00b", "x" * 5000, "/etc", "\ud800"],
)  # fmt: skip
def test_a_way_out_is_refused(outside: Path, path: str) -> None:
    with pytest.raises(
        RequestError, match=r"expected a folder inside one that deltas may be read from, without '\.\.'"
    ):
        allowed_folder(path, [outside])


def test_an_absolute_way_out_is_refused(allowed: Path) -> None:
    with pytest.raises(RequestError, match="expected a folder inside one"):
        allowed_folder(str(allowed.parent / "secret" / "plans"), [allowed])


def test_a_folder_whose_name_begins_like_an_allowed_one_is_outside(allowed: Path) -> None:
    other = made_delta(allowed.parent / "allowed-not" / "law")
    with pytest.raises(RequestError, match="expected a folder inside one"):
        allowed_folder(str(other), [allowed])


def test_without_an_allowed_folder_everything_is_outside(allowed: Path) -> None:
    with pytest.raises(RequestError, match="expected a folder inside one"):
        allowed_folder(str(allowed / "law"), [])


def test_a_link_within_the_allowed_folder_is_followed(allowed: Path) -> None:
    (allowed / "newest").symlink_to("law")
    assert allowed_folder("newest", [allowed]) == allowed / "law"


def test_an_allowed_folder_may_be_a_link_itself(allowed: Path) -> None:
    (allowed.parent / "deltas").symlink_to(allowed)
    assert allowed_folder("law", [allowed.parent / "deltas"]) == allowed / "law"


def test_a_file_that_is_a_link_out_is_refused(allowed: Path) -> None:
    (allowed / "law" / "adapter_model.safetensors").unlink()
    (allowed / "law" / "adapter_model.safetensors").symlink_to(
        allowed.parent / "secret" / "plans" / "adapter_model.safetensors"
    )
    with pytest.raises(RequestError, match=r"adapter_model\.safetensors is a link that leads out"):
        allowed_folder("law", [allowed])


def test_a_pipe_is_refused(allowed: Path) -> None:
    (allowed / "law" / "adapter_model.safetensors").unlink()
    os.mkfifo(allowed / "law" / "adapter_model.safetensors")
    with pytest.raises(RequestError, match=r"adapter_model\.safetensors is no ordinary file"):
        allowed_folder("law", [allowed])


@pytest.mark.parametrize("name", ["adapter_model.bin", "optimizer.pt", "x.PICKLE", "w.pth"])
def test_files_that_may_run_code_are_refused_by_name(allowed: Path, name: str) -> None:
    (allowed / "law" / name).write_bytes(b"")
    with pytest.raises(
        RequestError, match=f"got {name}, which may run code when it is read; expected safetensors only"
    ):
        allowed_folder("law", [allowed])


@pytest.mark.parametrize(("name", "got"), [("none", "no such folder"), ("law/adapter_config.json", "a file")])
def test_what_is_no_folder_is_refused(allowed: Path, name: str, got: str) -> None:
    with pytest.raises(RequestError, match=f"got {got}, expected a delta's"):
        check_files(allowed / name)


def test_deltas_and_runs_are_found_by_their_folders_names(allowed: Path) -> None:
    run = made_delta(allowed / "medicine" / "adapter")
    (allowed / "notes").mkdir()
    assert deltas_in(allowed) == {"law": allowed / "law", "medicine": run}


def test_a_folder_of_deltas_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="got no such folder, expected a folder"):
        deltas_in(tmp_path / "none")
