"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}` with the fitting status.

What goes wrong by no fault of the client's is logged with an id and its traceback; the client gets the id.
"""

from __future__ import annotations

import json
import logging
import uuid
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from metier.errors import (
    DeltaError,
    EngineError,
    OverloadedError,
    RequestError,
    SelectionError,
    ServingError,
    UnknownDeltaError,
)

logger = logging.getLogger("metier.serving")
RETRY_AFTER_SECONDS = 1
_MOST_CHARS = 2000
_INVALID, _SERVER = "invalid_request_error", "server_error"


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = _INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message[:_MOST_CHARS], "type": kind, "param": param, "code": code}}
        self.headers = headers or {}

    def response(self) -> Response:
        return json_response(self.body, self.status, self.headers)


class FailedAnswerError(Exception):
    """The engine could not go on with an answer; the message is for the log."""


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(body), status, headers, media_type="application/json")


def as_api_error(error: BaseException) -> ApiError:
    """What the client is told of `error`; one that is not on purpose is logged."""
    match error:
        case ApiError():
            return error
        case UnknownDeltaError():
            return ApiError(404, str(error), param="model", code="model_not_found")
        case OverloadedError():
            return overloaded(str(error))
        case EngineError():
            # the first line: the rest may be the trace of what the engine died of
            return unavailable((str(error).strip() or "The engine is not there.").splitlines()[0])
        case RequestError() | DeltaError() | SelectionError() | ServingError():
            return ApiError(400, str(error))
        case FailedAnswerError():
            return internal(str(error))
        case _:
            return internal(error)


def overloaded(message: str) -> ApiError:
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return ApiError(429, message, kind="rate_limit_error", code="overloaded", headers=headers)


def unavailable(message: str) -> ApiError:
    return ApiError(503, message, kind=_SERVER, code="unavailable")


def internal(error: BaseException | str) -> ApiError:
    """An error of the server's own: logged with an id, by which the client can ask about it."""
    incident = uuid.uuid4().hex[:12]
    if isinstance(error, str):
        logger.error("request failed (%s): %s", incident, error)
    else:
        logger.error("request failed (%s)", incident, exc_info=error)
    message = f"The server failed to answer. Its log has the reason under {incident}."
    return ApiError(500, message, kind=_SERVER, code="internal_error")


def install_error_handlers(app: FastAPI) -> None:
    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _invalid(error).response()

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        return ApiError(error.status_code, _http_message(request, error), headers=headers).response()

    async def on_purpose(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    for kind in (ApiError, ServingError, DeltaError, SelectionError):
        app.add_exception_handler(kind, on_purpose)


def _http_message(request: Request, error: HTTPException) -> str:
    where = f"{request.method} {request.url.path[:200]}"
    if error.status_code == 404:
        return f"{where}: there is nothing here. docs/serving-api.md lists what the server answers."
    if error.status_code == 405:
        return f"{where}: it is there, but not for this method."
    return f"{where}: {error.detail}"


def _invalid(error: RequestValidationError) -> ApiError:
    """The first of a body's faults, named as a client would write it: `messages[0].content`."""
    fault = error.errors()[0]
    kind, place = fault["type"], [part for part in fault["loc"] if part != "body"]
    if kind == "json_invalid":
        return ApiError(400, f"The body is no JSON: {fault['ctx']['error']} at character {place[0]}.")
    if not place and kind in ("missing", "dict_type", "model_attributes_type"):
        got = "no body" if kind == "missing" else "something else"
        return ApiError(400, f"Got {got}, expected a JSON object with the header Content-Type: application/json.")
    named = fault.get("ctx", {}).get("param")
    param = _spelled([*place, *([named] if named else [])])
    message = str(fault["msg"])
    if kind == "missing":
        message = "it is missing"
    return ApiError(400, f"{param}: {message}" if param else message, param=param or None)


def _spelled(place: list[Any]) -> str:
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
