"""Which model a body names, for it to be routed by."""

from __future__ import annotations

import json

import pytest

from metier.serving.on_ray.forwarded import model_in


def test_the_model_of_a_request_is_found() -> None:
    assert model_in(json.dumps({"messages": [], "model": "law"}).encode()) == "law"
    assert model_in('{"model": "ž"}'.encode()) == "ž"


@pytest.mark.parametrize(
    "body",
    [b"", b"x", b"[]", b'"law"', b"null", b"{}", b'{"model": 3}', b'{"model": null}', b"\xff", b"[" * 100_000],
    ids=["nothing", "no JSON", "list", "text", "null", "none", "number", "no model", "no UTF-8", "deep"],
)
def test_a_body_without_one_is_for_a_replica_to_refuse(body: bytes) -> None:
    assert model_in(body) is None
