"""One server for all tests with a real client, over an engine that each test finds as new."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import openai
import pytest

from serving.fake_engine import FakeEngine
from serving.http.serving_app import served
from serving.made_tokenizers import byte_level


@pytest.fixture(scope="session")
def _engine() -> FakeEngine:
    return FakeEngine(byte_level())


@pytest.fixture(scope="session")
def address(_engine: FakeEngine) -> Iterator[str]:
    with served(_engine) as url:
        yield url


@pytest.fixture(scope="session")
def _client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=30)


@pytest.fixture
def engine(_engine: FakeEngine) -> FakeEngine:
    new = FakeEngine(byte_level())
    for each in fields(FakeEngine):
        setattr(_engine, each.name, getattr(new, each.name))
    return _engine


@pytest.fixture
def client(engine: FakeEngine, _client: openai.OpenAI) -> openai.OpenAI:
    return _client
