"""The page at `/` and its files, from the package."""

from __future__ import annotations

import re
from importlib.resources import files

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import Response

_KINDS = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
}
_NAME = re.compile(rf"[a-z0-9][a-z0-9_-]*\.({'|'.join(_KINDS)})")
_HEADERS = {
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # nothing from elsewhere, and no script within the page: an answer's text cannot become one
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}


def add_page(app: FastAPI) -> None:
    @app.get("/")
    async def index() -> Response:
        return _file("index.html")

    @app.get("/page/{name}")
    async def part(name: str) -> Response:
        return _file(name)


def _file(name: str) -> Response:
    found = _NAME.fullmatch(name)
    resource = files("metier.serving") / "page" / name
    if found is None or not resource.is_file():
        raise HTTPException(404)
    return Response(resource.read_bytes(), headers={**_HEADERS, "Content-Type": _KINDS[found.group(1)]})
