"""What is said where Ray is not installed, or the cluster is not there."""

from __future__ import annotations

import importlib.util
import re
import socket
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from metier.cli import app
from metier.errors import ConfigError, RunError
from metier.evaluation.comparison.on_ray.cluster import _connect, in_a_line

SPEC = "output_dir: out\nmodel: embedded\ntasks: [synopsis]\nmethods: [{method: ia3, learning_rate: 1e-2}]\n"


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "comparison.yaml").write_text(SPEC)
    return "comparison.yaml"


def compare(*arguments: str) -> None:
    CliRunner().invoke(app, ["compare", *arguments], catch_exceptions=False)


def test_without_ray_the_command_to_install_it_is_named(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[..., ModuleSpec | None] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    with pytest.raises(
        ConfigError, match=r"--on ray: Ray is not installed\.\nInstall it with: pip install 'metier\[ray\]'"
    ):
        compare(spec, "--on", "ray")
    assert not Path("out").exists()


def test_an_address_without_a_cluster_to_go_to_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"--ray-address is for --on ray, which is missing\. Add it, or"):
        compare(spec, "--ray-address", "10.0.0.1:6379")


@pytest.mark.parametrize("address", ["10.0.0.1", "head", "ray://head", "head:port"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(
        ConfigError, match=re.escape(f"got {address!r}, expected HOST:PORT of the cluster's head, or auto")
    ):
        _connect(None, address)


def test_a_cluster_that_does_not_answer_is_no_hang() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(
            RunError, match=rf"no Ray cluster answers at {address} .*\nStart one there \(ray start --head\)"
        ):
            _connect(None, address)


def test_a_cluster_that_lets_nobody_in_is_said_so() -> None:
    class RayError(Exception): ...

    def init(*_: object, **__: object) -> None:
        raise RayError("the token is missing\n  pages of advice\n")

    ray = SimpleNamespace(init=init, exceptions=SimpleNamespace(RayError=RayError))
    with pytest.raises(
        RunError, match=r"the Ray cluster at auto cannot be joined: the token is missing\nWhere it asks"
    ):
        _connect(ray, "auto")


def test_a_cluster_that_does_not_start_is_tried_twice_and_told() -> None:
    tries = []

    def init(*_: object, **__: object) -> None:
        tries.append(0)
        raise Exception("The current node timed out during startup.")

    with pytest.raises(
        RunError, match=r"Ray cannot start on this machine: The current node timed out during startup\."
    ):
        _connect(SimpleNamespace(init=init), None)
    assert len(tries) == 2


def test_what_ray_says_is_told_in_a_line() -> None:
    assert in_a_line(ValueError("the worker died\n pages of advice \n\n")) == "the worker died"
    assert (
        in_a_line(ValueError("ray::f()\nTraceback (most recent call last):\n  f()\nKeyError: 'a'\n")) == "KeyError: 'a'"
    )
    assert in_a_line(ValueError()) == "ValueError"
