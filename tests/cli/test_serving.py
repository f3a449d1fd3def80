"""`metier serve`: what it checks before a model is loaded, and what it starts."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from typer.testing import CliRunner

from metier import embedded
from metier.cli import app
from metier.cli import serving as verb
from metier.errors import ConfigError, RequestError, ServingError
from metier.serving.http import server
from metier.serving.http.settings import HttpSettings
from serving.fake_engine import FakeEngine
from serving.made_tokenizers import byte_level


@dataclass
class Started:
    """What the verb would have started."""

    engines: list[dict[str, Any]] = field(default_factory=list)
    settings: HttpSettings = field(default_factory=HttpSettings)
    base_name: str = ""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    monkeypatch.delenv("METIER_API_KEY", raising=False)
    seen = Started()

    def start(model: str, deltas: dict[str, Path], **options: Any) -> SimpleNamespace:
        seen.engines.append({"model": model, "deltas": deltas, **options})
        return SimpleNamespace(
            engine=FakeEngine(byte_level()),
            tokenizer=byte_level(),
            budgets="deltas up to 1 GiB",
            differences=dict.fromkeys(deltas, 0.001) if options["options"]["tests_deltas"] else {},
        )

    def run(made: FastAPI, bound: Any, on_start: Any) -> None:
        service = made.state.service
        seen.settings, seen.base_name = service.settings, service.base_name
        bound.close()
        on_start("http://127.0.0.1:1")

    monkeypatch.setattr(verb, "start", start)
    monkeypatch.setattr(server, "run", run)
    return seen


def serve(*options: str | Path) -> Any:
    result = CliRunner().invoke(app, ["serve", "--port", "0", *map(str, options)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def deltas(tmp_path: Path) -> Path:
    for place in ("law", "runs/medicine/adapter"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "adapter_config.json").write_text("{}")
    return tmp_path


def test_three_lines_say_what_was_parted_tested_and_started(started: Started, deltas: Path) -> None:
    result = serve("--model", "embedded", "--delta", f"law={deltas / 'law'}", "--delta-dir", deltas / "runs")
    assert result.output == (
        "Memory: deltas up to 1 GiB.\n"
        "Self-test: each delta (2) says what its merged model says; their logits differ by 1.0e-03 of the largest at most.\n"
        "Serving at http://127.0.0.1:1: base embedded; deltas: law, medicine.\n"
    )
    expected = {"law": deltas / "law", "medicine": deltas / "runs/medicine/adapter"}
    options = {"tests_deltas": True}
    assert started.engines == [{"model": "embedded", "deltas": expected, "dtype": "auto", "options": options}]


def test_without_a_self_test_nothing_is_said_of_one(started: Started, deltas: Path) -> None:
    result = serve("--model", "embedded", "--delta", f"law={deltas / 'law'}", "--no-self-test")
    assert "Self-test" not in result.output
    assert started.engines[0]["options"] == {"tests_deltas": False}


def test_deltas_that_ship_are_served_under_any_name(started: Started) -> None:
    serve("--model", "embedded", "--delta", "synopsis=embedded:synopsis", "--delta", "slovak=embedded:translate")
    expected = {"synopsis": embedded.delta_path("synopsis"), "slovak": embedded.delta_path("translate")}
    assert started.engines[0]["deltas"] == expected


def test_budgets_are_passed_on_as_they_are_given(started: Started) -> None:
    sizes = ["--device-memory", "2GiB", "--delta-memory", "1MiB", "--cache-tokens", "100", "--max-batch-tokens", "50"]
    serve("--model", "embedded", "--dtype", "float32", *sizes)
    assert started.engines[0]["dtype"] == "float32"
    assert started.engines[0]["options"] == {
        "tests_deltas": True,
        "device_memory_bytes": 2 << 30,
        "delta_memory_bytes": 1 << 20,
        "cache_tokens": 100,
        "max_batch_tokens": 50,
    }


def test_deltas_are_pinned_by_their_names(started: Started, deltas: Path) -> None:
    serve(
        "--model", "embedded", "--delta", f"law={deltas / 'law'}", "--delta-dir", deltas / "runs", "--pin", "medicine"
    )
    assert started.engines[0]["options"] == {"tests_deltas": True, "pinned": ("medicine",)}


def test_limits_become_the_servers_settings(started: Started, deltas: Path) -> None:
    limits = ["--max-concurrent", "5", "--max-prompt-tokens", "7", "--max-body", "1MiB", "--grace-seconds", "2"]
    serve("--model", "embedded", "--delta-dir", deltas, "--allow-loading", "--api-key", "s3cret", *limits)
    assert started.settings == HttpSettings(
        api_key="s3cret",
        allowed_hosts=("127.0.0.1", "localhost", "::1"),
        allows_loading=True,
        delta_dirs=(deltas,),
        max_body_bytes=1 << 20,
        max_prompt_tokens=7,
        max_concurrent=5,
        grace_seconds=2,
    )


def test_the_key_may_be_in_the_environment(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METIER_API_KEY", "s3cret")
    serve("--model", "embedded")
    assert started.settings.api_key == "s3cret"


def test_unless_told_there_is_no_key_and_no_loading(started: Started) -> None:
    serve("--model", "embedded")
    assert (started.settings.api_key, started.settings.allows_loading) == (None, False)


@pytest.mark.parametrize(("options", "is_warned"), [([], False), (["--api-key", "s3cret"], True)])
def test_listening_to_all_without_a_key_is_warned_of(started: Started, options: list[str], is_warned: bool) -> None:
    result = serve("--model", "embedded", "--host", "0.0.0.0", *options)
    warning = (
        "Warning: listening at 0.0.0.0, this server answers anybody who can reach this machine, because no API key"
    )
    assert (warning in result.stderr) != is_warned
    assert started.settings.allowed_hosts == ()


def test_listening_to_this_machine_is_not_warned_of(started: Started) -> None:
    assert "Warning" not in serve("--model", "embedded").stderr


def test_a_folder_is_served_by_its_own_name(started: Started, tmp_path: Path) -> None:
    (tmp_path / "moe").mkdir()
    serve("--model", tmp_path / "moe")
    assert started.base_name == "moe"
    serve("--model", tmp_path / "moe", "--base-name", "lab/moe")
    assert started.base_name == "lab/moe"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--delta", "law"], ConfigError, "--delta: got 'law', expected NAME=FOLDER"),
        (["--delta", "law=embedded:synopse"], ConfigError, "unknown embedded delta: .* Did you mean 'synopsis'"),
        (["--delta", "law=none"], RequestError, "none: got no such folder, expected a delta's"),
        (["--delta", "law={law}", "--delta", "law={law}"], ConfigError, "got two deltas named 'law'"),
        (["--delta", "embedded={law}"], RequestError, "got 'embedded' as a delta's name, which is the base's"),
        (["--delta", "a/b={law}"], RequestError, "got 'a/b' as a delta's name"),
        (["--delta-dir", "{law}"], ConfigError, "has no sub-folder with an adapter_config.json"),
        (["--allow-loading"], ConfigError, "--allow-loading needs --delta-dir"),
        (["--pin", "law"], ConfigError, "--pin law: expected a delta that is served: none is"),
        (["--delta", "law={law}", "--pin", "lore"], ConfigError, "--pin lore: expected a delta that is served: law"),
        (["--delta", "law={law}", "--pin", "law", "--on", "ray"], ConfigError, "Ray Serve decides which replica"),
        (["--device-memory", "much"], ConfigError, "device_memory: got 'much', expected a size such as 24GiB"),
        (["--port", "99999"], ServingError, "the server cannot listen there"),
    ],
)
def test_what_cannot_be_served_is_refused_before_a_model_is_loaded(
    started: Started, deltas: Path, options: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        serve("--model", "embedded", *(option.format(law=deltas / "law") for option in options))
    assert started.engines == []


def test_without_a_web_framework_it_says_what_to_install(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find_spec(name))
    with pytest.raises(ServingError, match=r'uvicorn is not installed.*pip install "metier\[serve\]"'):
        serve("--model", "embedded")


# on Ray


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--replicas", "2"], ConfigError, "serve: --replicas goes with --on ray alone"),
        (["--ray-address", "auto"], ConfigError, "serve: --ray-address goes with --on ray alone"),
        (["--autoscaling", "max_replicas=2"], ConfigError, "serve: --autoscaling goes with --on ray alone"),
        (["--replica-cpus", "2"], ConfigError, "serve: --replica-cpus goes with --on ray alone"),
        (["--on", "rye"], ConfigError, "serve: --on: got 'rye', expected local or ray"),
    ],
)
def test_options_of_ray_go_with_ray_alone(
    started: Started, options: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        serve("--model", "embedded", *options)
    assert started.engines == []


def test_without_ray_it_says_what_to_install(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find_spec(name))
    with pytest.raises(ServingError, match=r"Ray is not installed\. Install it: pip install 'metier\[ray\]'"):
        serve("--model", "embedded", "--on", "ray", "--replicas", "2")
