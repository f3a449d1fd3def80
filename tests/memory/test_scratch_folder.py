"""Files that go with the process, even one that is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from metier.errors import ConfigError
from metier.memory import scratch_folder as module
from metier.memory.scratch_folder import held, is_in_memory, scratch_folder

ENDLESS = """
import sys, time
from metier.memory.scratch_folder import scratch_folder
with scratch_folder(sys.argv[1], option="base_folder") as folder:
    (folder / "half a weight").write_bytes(b"0" * 1000)
    print(folder, flush=True)
    time.sleep(600)
"""


def test_the_folder_goes_with_what_is_in_it(tmp_path):
    with scratch_folder(tmp_path / "new" / "one", option="base_folder") as folder:
        (folder / "weights").write_bytes(b"0")
        assert folder.parent == tmp_path / "new" / "one"
    assert list(folder.parent.iterdir()) == []


def test_an_error_takes_the_folder_with_it(tmp_path):
    with pytest.raises(KeyError), scratch_folder(tmp_path, option="base_folder"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(module.fcntl is None, reason="of Unix alone")
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_uses_is_not(tmp_path):
    processes, folders = [], []
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        folders.append(Path(process.stdout.readline().strip()))
    try:
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        assert folders[0].exists()
        with scratch_folder(tmp_path, option="base_folder"):
            assert not folders[0].exists()
            assert (folders[1] / "half a weight").exists()
    finally:
        processes[1].kill()
        processes[1].wait()


@pytest.mark.skipif(module.fcntl is None, reason="of Unix alone")
def test_a_folder_that_another_process_takes_for_an_abandoned_one_is_made_again(tmp_path, monkeypatch):
    taken: list[str] = []
    take = module._take

    def late(lock, **options):
        if not taken:  # the other process comes after the folder was made and before it is held
            taken.append(lock.name)
            module._remove_abandoned(tmp_path)
        return take(lock, **options)

    monkeypatch.setattr(module, "_take", late)
    with scratch_folder(tmp_path, option="base_folder") as folder:
        assert not Path(taken[0]).exists()
        assert (folder / ".in-use").exists()
        (folder / "weights").write_bytes(b"0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(module.fcntl is None, reason="of Unix alone")
def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    file, take, opened = tmp_path / "lock", module._take, []

    def late(lock, **options):
        opened.append(lock)
        if len(opened) == 1:
            file.unlink()  # its former holder is done
        return take(lock, **options)

    monkeypatch.setattr(module, "_take", late)
    with held(file) as is_free:
        assert is_free
        assert file.exists()
        with held(file) as is_second_free:
            assert not is_second_free
    assert len(opened) == 3


def test_somebody_elses_folders_stay(tmp_path):
    (tmp_path / "metier-weights-notes").mkdir()
    with scratch_folder(tmp_path, option="base_folder"):
        pass
    assert (tmp_path / "metier-weights-notes").exists()


def test_the_home_folder_may_be_abbreviated(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with scratch_folder("~/weights", option="base_folder") as folder:
        assert folder.parent == tmp_path / "weights"


def test_what_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"base_folder: .*file.below cannot be written \(Not a directory\)"),
        scratch_folder(tmp_path / "file" / "below", option="base_folder"),
    ):
        pass


def test_which_folders_are_in_memory(tmp_path, monkeypatch):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
        f"30 27 0:21 / {tmp_path}/fast rw shared:4 - tmpfs tmpfs rw\n"
        f"31 30 0:22 / {tmp_path}/fast/disk rw - xfs /dev/vdb rw\n"
        f"32 27 0:23 / {tmp_path}/with\\040space rw - tmpfs tmpfs rw\n"
    )
    monkeypatch.setattr(module, "_MOUNTS", mounts)
    assert is_in_memory(tmp_path / "fast" / "weights")
    assert not is_in_memory(tmp_path / "fast" / "disk" / "weights")
    assert is_in_memory(tmp_path / "with space")
    assert not is_in_memory(tmp_path)
    monkeypatch.setattr(module, "_MOUNTS", tmp_path / "elsewhere")
    assert not is_in_memory(tmp_path / "fast")
