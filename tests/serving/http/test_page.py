"""The page's files, and nothing else of the package."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from metier.serving.http import page
from serving.http.serving_app import client_of


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    (tmp_path / "page" / "sub").mkdir(parents=True)
    for name in ("index.html", "page.js", "page.css", "notes.txt"):
        (tmp_path / "page" / name).write_text(f"the {name}")
    (tmp_path / "secret.js").write_text("the secret")
    monkeypatch.setattr(page, "files", lambda package: tmp_path)
    return client_of(api_key="s3cret")


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/", "text/html"), ("/page/index.html", "text/html"), ("/page/page.js", "text/javascript"), ("/page/page.css", "text/css")],
)  # fmt: skip
def test_the_pages_files_are_served_without_a_key(app: TestClient, path: str, kind: str) -> None:
    response = app.get(path)
    assert response.text == f"the {path.rsplit('/', 1)[1] or 'index.html'}"
    assert response.headers["content-type"] == f"{kind}; charset=utf-8"
    assert "script-src 'self'" in response.headers["content-security-policy"]


@pytest.mark.parametrize(
    "name", ["none.js", "notes.txt", "sub", "..%2Fsecret.js", "%2e%2e/secret.js", ".js", "page.js%00", "PAGE.JS"]
)
def test_other_files_are_not_found(app: TestClient, name: str) -> None:
    response = app.get(f"/page/{name}")
    assert response.status_code in (401, 404)
    assert "the secret" not in response.text
