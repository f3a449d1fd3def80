"""/health and /metrics."""

from __future__ import annotations

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from metier.errors import OverloadedError
from serving.fake_engine import FakeEngine
from serving.http.serving_app import BASE, chat, client_of
from serving.made_tokenizers import byte_level

CHAT = "/v1/chat/completions"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(byte_level())


@pytest.fixture
def app(engine: FakeEngine) -> TestClient:
    return client_of(engine)


def samples(app: TestClient) -> dict[tuple[str, ...], float]:
    """Values by the sample's name and its labels' values, in the labels' order."""
    response = app.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(response.text)
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in families
        for sample in family.samples
    }


def test_a_living_engine_is_healthy(app: TestClient) -> None:
    response = app.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_a_dead_engine_says_of_what_it_died_without_a_trace(app: TestClient, engine: FakeEngine) -> None:
    engine.died_of = "out of memory\nTraceback (most recent call last): ..."
    response = app.get("/health")
    assert (response.status_code, response.json()) == (503, {"status": "dead", "reason": "out of memory"})


def test_requests_are_counted_by_model_and_outcome(app: TestClient, engine: FakeEngine) -> None:
    for model in ("law", "law", "medicine"):
        app.post(CHAT, json=chat(model=model))
    engine.fail_after = 1
    app.post(CHAT, json=chat())
    engine.submit_error = OverloadedError("too many wait")
    app.post(CHAT, json=chat())
    got = samples(app)
    assert {key: value for key, value in got.items() if key[0] == "metier_requests_total"} == {
        ("metier_requests_total", "law", "finished"): 2,
        ("metier_requests_total", "medicine", "finished"): 1,
        ("metier_requests_total", "law", "failed"): 1,
        ("metier_requests_total", "law", "refused"): 1,
    }


def test_unknown_models_make_no_series(app: TestClient) -> None:
    for number in range(3):
        app.post(CHAT, json=chat(model=f"no-{number}"))
    assert not re.search("no-[0-9]", app.get("/metrics").text)


def test_series_of_names_that_are_served_no_more_do_not_pile_up(app: TestClient, engine: FakeEngine) -> None:
    app.post(CHAT, json=chat(model=BASE))
    app.post(CHAT, json=chat(model="law"))
    for number in range(70):
        engine.names = ["law", f"other-{number}"]
        app.post(CHAT, json=chat(model=f"other-{number}"))
    names = {key[1] for key in samples(app) if key[0].endswith(("_total", "_count"))}
    # what is served, and some more to be seen once more
    assert names == {BASE, "law", *(f"other-{number}" for number in range(5, 70))}
    engine.names = ["law", "other-0"]
    app.post(CHAT, json=chat(model="other-0"))
    assert samples(app)["metier_requests_total", "other-0", "finished"] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_counted_by_model(app: TestClient, engine: FakeEngine, stream: bool) -> None:
    engine.num_cached_tokens = 4
    app.post(CHAT, json=chat(stream=stream, n=2))
    got = samples(app)
    assert got["metier_prompt_tokens_total", "law"] == len(engine.generations[0].prompt_ids)
    assert got["metier_cached_prompt_tokens_total", "law"] == 4
    assert got["metier_generated_tokens_total", "law"] == sum(g.num_given for g in engine.generations)


def test_latencies_are_kept_by_model(app: TestClient, engine: FakeEngine) -> None:
    engine.token_seconds = 0.02
    app.post(CHAT, json=chat())
    got, num_tokens = samples(app), engine.generations[0].num_given
    for name in ("time_to_first_token", "request", "time_per_output_token"):
        assert got[f"metier_{name}_seconds_count", "law"] == 1
    assert got["metier_time_to_first_token_seconds_sum", "law"] >= 0.02
    assert got["metier_time_per_output_token_seconds_sum", "law"] >= 0.02
    assert got["metier_request_seconds_sum", "law"] >= 0.02 * num_tokens
    assert got["metier_time_to_first_token_seconds_sum", "law"] < got["metier_request_seconds_sum", "law"]


def test_the_engines_state_is_shown(app: TestClient) -> None:
    got = samples(app)
    assert got["metier_engine_up",] == 1
    assert got["metier_running_requests",] == 0
    assert got["metier_waiting_requests",] == 3
    assert got["metier_cache_used_ratio",] == 0.25
    assert got["metier_tier_bytes", "host"] == 1000
    assert got["metier_delta_bytes", "law", "host"] == 1000
    assert got["metier_delta_bytes", "medicine", "accelerator"] == 1000
    assert got["metier_delta_running_requests", "law"] == 0


def test_two_servers_count_apart(app: TestClient) -> None:
    app.post(CHAT, json=chat())
    assert ("metier_requests_total", "law", "finished") not in samples(client_of())
