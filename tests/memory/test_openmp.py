"""Workers of OpenMP: ended where nothing is computed any more, and none beside the one thread that computes."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from metier.memory.openmp import OneThreadEach

IN_A_PROCESS = """
import os, sys, torch
from metier.memory.openmp import end_workers

def num_threads():
    return len(os.listdir("/proc/self/task"))

def compute():
    torch.rand(1 << 20).mul_(2)

torch.set_num_threads(3)
before = num_threads()
compute()
with_workers = num_threads()
assert end_workers()
ended = num_threads()
compute()
print(before, with_workers, ended, num_threads())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux does")
def test_workers_end_and_come_again() -> None:
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS], capture_output=True, text=True, check=True)
    before, with_workers, ended, again = map(int, done.stdout.split())
    assert with_workers == before + 2
    assert ended == before
    assert again == with_workers


def test_threads_that_compute_alone_leave_the_number_of_others_as_it_is() -> None:
    number = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        one_each, found = OneThreadEach(2), []

        def alone() -> None:
            one_each.enter()
            found.append(torch.get_num_threads())

        threads = [threading.Thread(target=alone) for _ in range(2)]
        for thread in threads:
            thread.start()
        one_each.wait()
        for thread in threads:
            thread.join()
        assert found == [1, 1]
        assert torch.get_num_threads() == 3
        later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert found[-1] == 3
    finally:
        torch.set_num_threads(number)
