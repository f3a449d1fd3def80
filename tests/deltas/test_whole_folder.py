"""A folder is written whole or not at all, and never over something else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from metier.deltas.whole_folder import check_replaceable, written_whole
from metier.errors import ConfigError


def write(folder: Path, text: str, name: str = "a") -> None:
    with written_whole(folder) as new:
        assert new.parent == folder.parent, "renaming is only whole within one file system"
        (new / name).write_text(text)


def test_a_new_folder_appears_with_the_rights_of_any_new_folder(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "out", "1")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "deep" / "out" / "a").read_text() == "1"
    assert (tmp_path / "deep" / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_an_old_folder_is_replaced_with_all_its_files(tmp_path: Path) -> None:
    write(tmp_path / "out", "1", name="old")
    write(tmp_path / "out", "2")
    assert os.listdir(tmp_path / "out") == ["a"]
    assert os.listdir(tmp_path) == ["out"]


def test_an_exception_leaves_the_old_folder(tmp_path: Path) -> None:
    write(tmp_path / "out", "1")

    def interrupted() -> None:
        with written_whole(tmp_path / "out") as new:
            (new / "a").write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "out" / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]


def test_a_second_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "1")

    def broken(*_: object) -> None:
        raise OSError("Input/output error")

    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "out", "2")
    assert (tmp_path / "out" / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]


def test_killed_between_the_two_renames_both_folders_are_there(tmp_path: Path) -> None:
    write(tmp_path / "out", "1")
    script = """
import os, pathlib, sys
from metier.deltas.whole_folder import written_whole
os.rename = lambda *_: os._exit(9)
with written_whole(pathlib.Path(sys.argv[1])) as new:
    (new / "a").write_text("2")
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], check=False)
    assert done.returncode == 9
    found = {path.parent.name.rsplit("-", 1)[0]: path.read_text() for path in tmp_path.rglob("a")}
    assert found == {".out.old": "1", ".out.new": "2"}


def test_a_relative_folder_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with written_whole(Path("out")) as new:
        (new / "a").write_text("1")
    assert (tmp_path / "out" / "a").read_text() == "1"


def check(folder: Path, known: frozenset[str] | None = None) -> None:
    check_replaceable(folder, known=known, marker="m", what="a former thing")


def test_what_may_be_replaced(tmp_path: Path) -> None:
    check(tmp_path / "none")
    check(tmp_path)
    (tmp_path / "m").touch()
    check(tmp_path)
    check(tmp_path, frozenset({"m"}))


def test_what_may_not_be_replaced(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / name).touch()
    with pytest.raises(
        ConfigError, match=r"got a folder with a, b, c …, expected none, .* or a former thing\.\nNothing"
    ):
        check(tmp_path)
    with pytest.raises(ConfigError, match="a: got a file, expected a folder to write to"):
        check(tmp_path / "a")
    (tmp_path / "m").touch()
    with pytest.raises(ConfigError, match="got a folder with b, c, d, expected"):
        check(tmp_path, frozenset({"m", "a"}))
