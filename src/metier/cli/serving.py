"""The verb that serves many deltas on one copy of their base."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metier.cli.app import app
from metier.cli.serving_asked import Asked, self_test_line
from metier.cli.serving_on_ray import ray_settings, serve_on_ray

if TYPE_CHECKING:
    from metier.serving.http.settings import HttpSettings
    from metier.serving.start import Started

LOCAL = ("127.0.0.1", "localhost", "::1")
EMBEDDED = "embedded:"
"""Before the name of a delta that ships with metier, in place of a folder."""


@app.command()
def serve(
    model: Annotated[str, typer.Option("--model", help="The base: a local folder, a hub id, or 'embedded'.")],
    delta: Annotated[
        list[str] | None,
        typer.Option(help="A delta to serve, as NAME=FOLDER, or NAME=embedded:DELTA of those that ship; repeat."),
    ] = None,
    delta_dir: Annotated[
        list[Path] | None,
        typer.Option(help="Serve each delta (or run) in this folder by its folder's name; may be loaded from; repeat."),
    ] = None,
    pin: Annotated[
        list[str] | None, typer.Option(help="Name of a delta that is to stay on the accelerator; repeat.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for any.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 for any that is free.")] = 8000,
    base_name: Annotated[
        str | None, typer.Option(help="Name of the base in requests; else that of --model, its last part of a folder.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="METIER_API_KEY", help="Key that clients must send.")] = None,
    allow_loading: Annotated[
        bool, typer.Option("--allow-loading", help="Let requests load deltas from --delta-dir, and unload them.")
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Further name that requests may call a server on 127.0.0.1 by (behind a proxy); repeat."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.")] = "auto",
    device_memory: Annotated[
        str | None, typer.Option(help="For base, cache and deltas on the device, such as 24GiB.")
    ] = None,
    delta_memory: Annotated[str | None, typer.Option(help="Of it for deltas, such as 4GiB.")] = None,
    cache_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens that the KV cache holds.")] = None,
    max_batch_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens in one step.")] = None,
    max_concurrent: Annotated[int, typer.Option(min=1, help="Most requests at once; more get 429.")] = 256,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of a prompt.")] = None,
    max_body: Annotated[str, typer.Option(help="Largest body of a request.")] = "4MiB",
    self_test: Annotated[
        bool, typer.Option(help="Compare each delta's logits with those of its merged model before the start.")
    ] = True,
    grace_seconds: Annotated[
        float, typer.Option(min=0, help="How long running requests may go on at shutdown.")
    ] = 30.0,
    on: Annotated[str, typer.Option(help="local (this process), or ray: replicas on a Ray cluster.")] = "local",
    replicas: Annotated[int | None, typer.Option(min=1, help="Replicas of the engine on Ray; 1 if not given.")] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Ray cluster, as HOST:PORT or auto, or RAY_ADDRESS; else one here is started.")
    ] = None,
    autoscaling: Annotated[
        list[str] | None,
        typer.Option(help="Ray Serve's autoscaling, as KEY=VALUE such as max_replicas=4, for --replicas; repeat."),
    ] = None,
    replica_cpus: Annotated[int | None, typer.Option(min=1, help="Cores of each replica on Ray.")] = None,
) -> None:
    """Serve a base and its deltas over OpenAI's API, all in one batch; a request's `model` names its delta."""
    _check_installed()
    from metier.errors import ConfigError
    from metier.planning.sizes import read_bytes
    from metier.serving.http.settings import HttpSettings

    if pin and on != "local":
        raise ConfigError("serve: --pin: Ray Serve decides which replica holds which deltas, so none can be pinned.")
    deployment = ray_settings(
        on, replicas=replicas, address=ray_address, autoscaling=autoscaling or (), cpus=replica_cpus
    )
    if allow_loading and not delta_dir:
        raise ConfigError("serve: --allow-loading needs --delta-dir, the folder that deltas may be loaded from.")
    name = base_name or _base_name(model)
    deltas = _deltas(name, delta or (), delta_dir or (), may_be_none=allow_loading)
    _check_pinned(pin or (), deltas)
    settings = HttpSettings(
        api_key=api_key or None,
        allowed_hosts=(*LOCAL, *(allow_host or ())) if host in LOCAL else (),
        allows_loading=allow_loading,
        delta_dirs=tuple(delta_dir or ()),
        max_body_bytes=read_bytes(max_body, "max_body"),
        max_prompt_tokens=max_prompt_tokens,
        max_concurrent=max_concurrent,
        grace_seconds=grace_seconds,
    )
    _warn(host, settings)
    budgets = {
        "device_memory_bytes": device_memory and read_bytes(device_memory, "device_memory"),
        "delta_memory_bytes": delta_memory and read_bytes(delta_memory, "delta_memory"),
        "cache_tokens": cache_tokens,
        "max_batch_tokens": max_batch_tokens,
    }
    given = {option: int(value) for option, value in budgets.items() if value is not None}
    asked = Asked(
        model=model,
        base_name=name,
        deltas=deltas,
        dtype=dtype,
        options={**given, "tests_deltas": self_test} | ({"pinned": tuple(pin)} if pin else {}),
        http=settings,
        host=host,
        port=port,
    )
    if deployment is None:
        _serve_here(asked)
    else:
        serve_on_ray(asked, deployment)


def _serve_here(asked: Asked) -> None:
    from metier.serving.http.app import create_app
    from metier.serving.http.server import bound_socket, run

    bound = bound_socket(asked.host, asked.port)
    started = start(asked.model, asked.deltas, dtype=asked.dtype, options=asked.options)
    typer.echo(f"Memory: {started.budgets}.")
    if started.differences:
        typer.echo(self_test_line(len(started.differences), max(started.differences.values())))
    run(
        create_app(started.engine, started.tokenizer, asked.base_name, asked.http),
        bound,
        on_start=lambda address: typer.echo(f"Serving at {address}: {asked.served}."),
    )


def start(model: str, deltas: dict[str, Path], *, dtype: str, options: dict[str, Any]) -> Started:
    """The engine and the base's tokenizer."""
    from metier.serving.start import EngineSettings, start_engine

    return start_engine(model, deltas, dtype=dtype, settings=EngineSettings(**options))


def _check_pinned(pinned: Sequence[str], deltas: dict[str, Path]) -> None:
    from metier.errors import ConfigError

    for name in pinned:
        if name not in deltas:
            raise ConfigError(
                f"serve: --pin {name}: expected a delta that is served: {', '.join(deltas) or 'none is'}."
            )


def _check_installed() -> None:
    from metier.errors import ServingError

    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise ServingError(
            f'serve: {" and ".join(missing)} is not installed. Install what serving needs: pip install "metier[serve]"'
        )


def _base_name(model: str) -> str:
    """A hub's id as it is; a folder's own name, since its place is nothing to clients."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def _deltas(base_name: str, named: Sequence[str], folders: Sequence[Path], *, may_be_none: bool) -> dict[str, Path]:
    from metier.errors import ConfigError
    from metier.serving.places import check_files, check_name, deltas_in

    found: list[tuple[str, Path]] = []
    for text in named:
        name, sign, path = text.partition("=")
        if not (name and sign and path):
            raise ConfigError(f"serve: --delta: got {text!r}, expected NAME=FOLDER, such as law=runs/law/adapter.")
        place = _place(path)
        check_files(place)
        found.append((name, place))
    for folder in folders:
        of_folder = deltas_in(folder)
        if not of_folder and not may_be_none:
            raise ConfigError(f"serve: --delta-dir: {folder} has no sub-folder with an adapter_config.json.")
        found.extend(of_folder.items())
    for name, _ in found:
        check_name(name, base_name)
    names = [name for name, _ in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"serve: got two deltas named {twice[0]!r}, expected each name once.")
    return dict(found)


def _place(path: str) -> Path:
    """The folder of a delta: as it is given, or of one that ships with metier."""
    if not path.startswith(EMBEDDED):
        return Path(path)
    from metier import embedded

    return embedded.delta_path(path.removeprefix(EMBEDDED))


def _warn(host: str, settings: HttpSettings) -> None:
    if host not in LOCAL and settings.api_key is None:
        typer.echo(
            f"Warning: listening at {host}, this server answers anybody who can reach this machine, because no API "
            "key is set. Set METIER_API_KEY, or listen at 127.0.0.1.",
            err=True,
        )
