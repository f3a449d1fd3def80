"""A folder comes back from a node byte by byte, its result last."""

from __future__ import annotations

from pathlib import Path

import pytest

from metier.evaluation.comparison.on_ray.files import add_folders, read_files, write_files


def test_what_is_written_is_what_was_read_but_for_what_is_left_out(tmp_path: Path) -> None:
    for name in ("result.json", "log.txt", "run/adapter/a.safetensors", "run/checkpoints/4/optimizer.pt", "run/a.json"):
        (tmp_path / "cell" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cell" / name).write_bytes(name.encode())
    files = read_files(tmp_path / "cell", without=("checkpoints", "*.safetensors"))
    write_files(tmp_path / "back", files)
    assert files == {name: name.encode() for name in ("log.txt", "result.json", "run/a.json")}
    assert read_files(tmp_path / "back") == files
    assert read_files(tmp_path / "nothing") == {}


def test_the_result_is_there_last(tmp_path: Path) -> None:
    # a folder that is in the way ends the writing before the result
    (tmp_path / "log.txt").mkdir()
    with pytest.raises(OSError):
        write_files(tmp_path, {"result.json": b"{}", "log.txt": b""})
    assert not (tmp_path / "result.json").exists()


def test_a_folder_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    add_folders(tmp_path, {"one/a.json": b"first", "two/b/c.json": b"deep"})
    add_folders(tmp_path, {"one/a.json": b"second"})
    assert read_files(tmp_path) == {"one/a.json": b"first", "two/b/c.json": b"deep"}
