"""Model-written code is run only where allowed, judged by its tests, and held to every limit."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from metier.errors import ConfigError, DataError
from metier.evaluation import sandbox
from metier.evaluation.code_block import code_of
from metier.evaluation.metrics import score_replies
from metier.evaluation.sandbox import Limits, Outcome, namespaces, run_tests

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")

ADD = "def add(a, b):\n    return a + b"
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]
QUICK = Limits(wall_seconds=1.0, cpu_seconds=1, memory_bytes=256 << 20, file_bytes=1 << 16)


def score(*replies: str, **extra: object) -> object:
    return score_replies(
        "code_tests",
        replies,
        [ADD] * len(replies),
        extras=[{"tests": TESTS, **extra}] * len(replies),
        allow_code_execution=True,
    )


def test_code_counts_if_all_tests_hold() -> None:
    got = score(
        ADD,
        f"Sure:\n```python\n{ADD}\n```\nFor example:\n```python\nadd('a', 1)\n```",
        "```bash\npip install add\n```\n```py\n" + ADD,
        "def add(a, b):\n    return 3",
        "def sum(a, b):\n    return a + b",
        "To add numbers, use +.",
    )
    assert got.item_scores == (100.0, 100.0, 100.0, 0.0, 0.0, 0.0)
    assert got.num_unparsed == 1


def test_nothing_runs_unless_the_caller_allows_it(tmp_path: Path) -> None:
    reply = f"open({str(tmp_path / 'ran')!r}, 'w')"
    with pytest.raises(
        ConfigError, match=r"metric 'code_tests' runs code that the model wrote, which is off unless asked"
    ):
        score_replies("code_tests", [reply], [""], extras=[{"tests": "pass"}])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, r"test item 0: 'tests' must be Python statements or a list of them, got None"),
        ({"tests": " "}, r"'tests' must be Python statements or a list of them, got ' '"),
        ({"tests": [1]}, r"'tests' must be Python statements or a list of them, got \[1\]"),
        (
            {"tests": "assert add(1"},
            r"test item 0: the record's test_setup does not run or its tests are no Python \(SyntaxError\)",
        ),
        ({"tests": "pass", "test_setup": "import nothing_like_it"}, r"\(ModuleNotFoundError\)"),
    ],
)
def test_a_record_without_tests_that_run_is_the_tasks_fault(extra: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        score_replies("code_tests", [ADD], [ADD], extras=[extra], allow_code_execution=True)


def test_another_platform_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(ConfigError, match=r"code_tests: got the platform 'darwin', expected 'linux'"):
        run_tests(ADD, "pass")


def test_the_setup_runs_before_the_reply() -> None:
    assert (
        run_tests("def f(x: List[int]): return x", "assert f([1]) == [1]", setup="from typing import List") == "passed"
    )


@pytest.mark.parametrize(
    "reply",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise KeyboardInterrupt",
        "import ctypes; ctypes.string_at(0)",
        "print('passed'); import os; os.write(1, b'passed\\n'); os._exit(0)",
        "input()",
        "def f(): return f()\nf()",
    ],
)
def test_ending_early_is_no_way_past_the_tests(reply: str) -> None:
    assert run_tests(reply, "pass", limits=QUICK) is Outcome.failed


@pytest.mark.parametrize("reply", ["def f(:", "it's", "\0", "(" * 5000])
def test_what_is_no_python_is_unparsed(reply: str) -> None:
    assert run_tests(reply, "pass", limits=QUICK) is Outcome.unparsed


@pytest.mark.parametrize(
    "guard",
    [
        "if __name__ == '__main__':\n    raise ValueError",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'",
    ],
)
def test_the_module_is_an_imported_one(guard: str) -> None:
    assert run_tests(guard, "pass", limits=QUICK) is Outcome.passed


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        ("import time; time.sleep(60)", Outcome.timed_out),
        ("try:\n    while True: pass\nexcept BaseException: pass\nwhile True: pass", Outcome.failed),
        ("x = bytearray(1 << 29)", Outcome.failed),
        ("open('big', 'wb').write(b'0' * (1 << 20))", Outcome.failed),
        ("files = [open('/dev/null') for _ in range(100)]", Outcome.failed),
        ("import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))", Outcome.failed),
    ],
    ids=["wall", "cpu", "memory", "file", "files", "raising a limit"],
)
def test_each_limit_ends_the_reply(reply: str, outcome: Outcome) -> None:
    if "setrlimit" in reply and os.geteuid() == 0 and not namespaces():
        pytest.skip("root may raise its limits where it cannot be put into a namespace")
    wall = Limits(
        wall_seconds=8.0 if outcome is Outcome.failed else 0.5,
        cpu_seconds=1,
        memory_bytes=256 << 20,
        file_bytes=1 << 16,
    )
    start = time.monotonic()
    assert run_tests(reply, "pass", limits=wall) is outcome
    assert time.monotonic() - start < 7


@pytest.mark.skipif(os.geteuid() == 0, reason="root is not held to the limit on processes")
def test_no_process_or_thread_is_started() -> None:
    assert run_tests("import os; os.fork()", "pass", limits=QUICK) is Outcome.failed
    assert run_tests("import threading; threading.Thread(target=print).start()", "pass", limits=QUICK) is Outcome.failed


@pytest.mark.parametrize("has_namespaces", [True, False])
def test_what_a_reply_started_ends_with_it(
    has_namespaces: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_namespaces:
        monkeypatch.setattr(sandbox, "namespaces", lambda: ())
    beat = tmp_path / "beat"
    reply = f"import os, time\nif os.fork() == 0:\n    while True:\n        open({str(beat)!r}, 'w').write(str(time.time()))\n        time.sleep(0.02)\n"
    run_tests(reply + "time.sleep(0.2)", "pass", limits=Limits(num_processes=1 << 20))
    last = beat.read_text()
    time.sleep(0.2)
    assert beat.read_text() == last


def test_a_reply_finds_no_environment_no_modules_of_ours_and_a_folder_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("METIER_SECRET", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    checks = [
        "import os, sys",
        "assert 'METIER_SECRET' not in os.environ and 'HOME' not in os.environ",
        "assert os.listdir() == []",
        "open('a', 'w').write('x')",
        f"assert {str(Path(__file__).parent)!r} not in sys.path and '' not in sys.path",
    ]
    before = set(Path.cwd().iterdir())
    assert run_tests("pass", "\n".join(checks)) is Outcome.passed
    assert set(Path.cwd().iterdir()) == before


@pytest.mark.skipif(not namespaces(), reason="no namespaces for this user")
def test_there_is_no_network_where_namespaces_can_be_had() -> None:
    tests = "import socket\ntry:\n    socket.create_connection(('127.0.0.1', 9), 1)\nexcept OSError as error:\n    assert error.errno == 101, error"
    assert run_tests("pass", tests) is Outcome.passed


def test_without_namespaces_code_is_judged_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "namespaces", lambda: ())
    assert score(ADD, "def add(a, b): return 3").item_scores == (100.0, 0.0)
    assert run_tests("import time; time.sleep(60)", "pass", limits=QUICK) is Outcome.timed_out


def test_code_block() -> None:
    assert code_of("a\n```\nb\n```\nc") == "b\n"
    assert code_of("~~~ Python title=x\nb\nc") == "b\nc"
    assert code_of("```js\nb\n```") == "```js\nb\n```"
    assert code_of("no `fence`") == "no `fence`"
