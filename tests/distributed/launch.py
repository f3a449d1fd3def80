"""Start runs in several processes of this machine, and read what they left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SECONDS = 300
"""A launch ends within them, or is a hang."""


@dataclass(frozen=True)
class Launched:
    """How a launch ended."""

    code: int
    text: str


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **more}


def metier_command(*arguments: str) -> list[str]:
    """The words that start metier in one process."""
    return [sys.executable, "-m", "metier", *arguments] if arguments else [sys.executable]


def torchrun(processes: int, *arguments: str, options: tuple[str, ...] = (), **more: str) -> Launched:
    """`torchrun … -m metier ARGUMENTS`, on a port of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *options]
    return command([sys.executable, *launcher, "-m", "metier", *arguments], **more)


def command(words: list[str], **more: str) -> Launched:
    done = subprocess.run(words, env=environment(**more), capture_output=True, text=True, timeout=SECONDS, check=False)
    return Launched(done.returncode, done.stdout + done.stderr)


def losses(folder: Path) -> dict[int, dict[str, float]]:
    """Logged lines by step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "loss" in line}
