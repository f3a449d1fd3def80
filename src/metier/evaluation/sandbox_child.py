"""The other side of `sandbox.py`: limits itself, then runs a reply and its tests. Never imported, only run by path.

It reads one JSON object from standard input and writes one line to standard output: the job's token and what came of
it. Only the standard library is imported, because it runs with `-I` in a process that may take little memory.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from types import ModuleType


def main() -> None:
    """Run the job, say what came of it, and end whatever the reply left running in this process."""
    job = json.load(sys.stdin)
    # a reply's prints go nowhere, and its reads find the end: only this function writes to the parent's file
    answer = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    for name, most in job["limits"].items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    outcome = "failed"
    try:
        outcome = _run(job["setup"], job["reply"], job["tests"])
    finally:
        os.write(answer, f"{job['token']} {outcome}\n".encode())
        os._exit(0)


def _run(setup: str, reply: str, tests: str) -> str:
    # not "__main__", so that a reply's own example under that guard is no part of the check
    module = ModuleType("reply")
    sys.modules["reply"] = module
    try:
        compile(tests, "tests", "exec")
        exec(compile(setup, "setup", "exec"), module.__dict__)
    except BaseException as error:
        return f"broken {type(error).__name__}"
    try:
        code = compile(reply, "reply", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "unparsed"
    try:
        exec(code, module.__dict__)
        exec(compile(tests, "tests", "exec"), module.__dict__)
    except BaseException:  # SystemExit too: a reply that ends the process has not passed
        return "failed"
    return "passed"


if __name__ == "__main__":
    main()
