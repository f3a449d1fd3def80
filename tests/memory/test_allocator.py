"""What is freed goes back to the system, unless somebody has said otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# blocks of 2 MB among smaller ones that stay: glibc keeps them once a larger block has been freed
_CODE = """
from pathlib import Path
import torch
from metier.memory.allocator import give_memory_back

def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) >> 10

changed = {call}
torch.ones(4 << 20)
start = own()
blocks, stay = [], []
for _ in range(100):
    blocks.append(torch.ones(1 << 19))
    stay.append(torch.ones(5000))
full = own()
del blocks
print(changed, full - start, own() - start)
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")


def _megabytes(call: str, **environment: str) -> tuple[str, int, int]:
    kept = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", _CODE.format(call=call)]
    done = subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, check=True)
    changed, full, after = done.stdout.split()
    return changed, int(full), int(after)


@glibc
def test_freed_blocks_go_back_to_the_system() -> None:
    changed, full, after = _megabytes("give_memory_back()")
    assert changed == "True"
    assert full > 150
    assert after < 20


@glibc
def test_without_it_they_stay() -> None:
    _, full, after = _megabytes("None")
    assert full > 150
    assert after > 100


@glibc
def test_the_environment_goes_first() -> None:
    changed, _, _ = _megabytes("give_memory_back()", MALLOC_MMAP_THRESHOLD_="8589934592")
    assert changed == "False"


@glibc
def test_what_is_free_is_given_back_once() -> None:
    program = """
from metier.memory.allocator import give_back_what_is_free
from metier.memory.memory_limit import held_bytes
import torch
kept = []
blocks = [torch.zeros(1 << 18) for _ in range(200)]  # 1 MB each, in the heap for its size
kept.append(torch.zeros(8))  # what lies above keeps the heap from shrinking by itself
before = held_bytes()
del blocks
held = held_bytes()
given = give_back_what_is_free()
print(before, held, held_bytes(), given)
"""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    before, held, after, given = done.stdout.split()
    assert int(held) > int(before) - (50 << 20)
    assert int(after) < int(before) - (150 << 20)
    assert given == "True"
