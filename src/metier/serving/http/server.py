"""Run the application by uvicorn: bind first, say where, and stop gracefully.

On SIGTERM or SIGINT new requests are refused with 503 while the running ones finish, for `grace_seconds` at most; a
second signal stops at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from metier.errors import ServingError
from metier.serving.http.service import Service

_FLUSH_SECONDS = 5
"""For the last bytes of answers that are done, after the engine has stopped."""


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket at that address, so that a taken port is known before a model is loaded.

    Raises:
        ServingError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise ServingError(
            f"{host}:{port}: the server cannot listen there: {error}.\nGive another --port or --host."
        ) from error
    bound.set_inheritable(True)
    return bound


def run(app: FastAPI, bound: socket.socket, on_start: Callable[[str], None]) -> None:
    """Serve until a signal.

    Args:
        app: of `create_app`.
        bound: where to listen.
        on_start: called once with the server's address, when it answers.
    """
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=_FLUSH_SECONDS, server_header=False
    )
    asyncio.run(_serve(uvicorn.Server(config), app.state.service, bound, on_start))


async def _serve(
    server: uvicorn.Server, service: Service, bound: socket.socket, on_start: Callable[[str], None]
) -> None:
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.02)
    closing: list[asyncio.Task[None]] = []

    def stop() -> None:
        if closing:
            server.force_exit = server.should_exit = True
        else:
            closing.append(asyncio.create_task(_close(server, service)))

    loop = asyncio.get_running_loop()
    with contextlib.suppress(NotImplementedError):  # Windows has none; uvicorn's own handlers stay, which end it too
        for kind in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(kind, stop)
    if not serving.done():
        on_start(_address(bound))
    await serving


async def _close(server: uvicorn.Server, service: Service) -> None:
    try:
        await service.close()
    finally:
        server.should_exit = True


def _address(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
