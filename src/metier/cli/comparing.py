"""Verbs that score and compare: methods, compare, search, evaluate."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from metier.cli.app import Model, TrustRemoteCode, app, show, with_adapter

if TYPE_CHECKING:
    from metier.evaluation.comparison.config import ComparisonConfig
    from metier.evaluation.comparison.schedule import Place
    from metier.models.load import LoadedModel


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, to see all of it.")] = None,
) -> None:
    """List every method in the order of the survey, or say all about one."""
    from metier.catalogue.tree import method_of
    from metier.reports.methods import methods_tree, one_method

    show(methods_tree() if name is None else one_method(method_of(name)))


@app.command()
def compare(
    comparison: Annotated[Path, typer.Argument(metavar="COMPARISON.YAML", help="Model, tasks, methods and seeds.")],
    jobs: Annotated[int, typer.Option(help="Runs at once, each in a process of its own.")] = 1,
    minutes: Annotated[float | None, typer.Option(help="Begin no run after so many; the next call goes on.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run again what failed before.")] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help="Run nothing; report what is there.")] = False,
    on: Annotated[
        Literal["here", "ray"], typer.Option(help="Where runs go: this machine, or a Ray cluster (--jobs: on a node).")
    ] = "here",
    ray_address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of the cluster, or auto; else RAY_ADDRESS, or a cluster on this machine."),
    ] = None,
) -> None:
    """Compare methods on tasks: scores, forgetting, memory, time, size, with seeds and intervals.

    Runs that are done are not run again.
    """
    from rich.console import Console

    from metier.errors import ConfigError
    from metier.evaluation.comparison.cells import Cells, forget_failures
    from metier.evaluation.comparison.config import load_comparison
    from metier.evaluation.comparison.schedule import run_cells
    from metier.evaluation.tasks import load_task
    from metier.reports.comparison import write_comparison

    if ray_address is not None and on != "ray":
        raise ConfigError("compare: --ray-address is for --on ray, which is missing. Add it, or leave the address out.")
    cells = Cells(load_comparison(comparison))
    if retry:
        forget_failures(cells, cells.failed())
    if not report_only and cells.pending():
        cells.config.check_runs()
        for task in cells.config.tasks:
            load_task(task)  # an unknown one is told before any run, not by every run of it
        with _place(cells.config, on, ray_address, jobs) as place:
            run_cells(cells, place, console=Console(), minutes=minutes)
    typer.echo(f"Report: {write_comparison(cells)}")


@app.command()
def search(
    file: Annotated[Path, typer.Argument(metavar="SEARCH.YAML", help="Model, task, methods, places and rounds.")],
    jobs: Annotated[int, typer.Option(help="Runs at once, each in a process of its own.")] = 1,
) -> None:
    """Search over methods and places: what fits the memory runs briefly, the better half runs on."""
    from rich.console import Console

    from metier.evaluation.comparison.here import Here
    from metier.evaluation.comparison.search import load_search
    from metier.evaluation.comparison.search import search as run_search
    from metier.planning.plan import why_not

    config = load_search(file)
    best = run_search(config, lambda run: why_not(run, config.memory), Here(jobs), console=Console())
    typer.echo(f"The best run, to be repeated at full length: metier train {best}")


@app.command()
def evaluate(
    model: Model,
    task: Annotated[
        str | None, typer.Option(help="An embedded task (sections, synopsis or translate) or a task's folder.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="A delta to put on the model.")] = None,
    general: Annotated[bool, typer.Option(help="Measure general ability too; not with --harness.")] = True,
    harness: Annotated[
        str | None,
        typer.Option(help="Instead, tasks of lm-evaluation-harness: names, YAML files or folders, by comma."),
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of tasks that --harness can name.")] = None,
    fewshot: Annotated[int | None, typer.Option(help="Worked examples in the prompts of --harness.")] = None,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Put --harness's prompts into it.")] = False,
    limit: Annotated[int | None, typer.Option(help="Only the first items of each task.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Prompts at once.")] = None,
    seed: Annotated[int, typer.Option(help="Of intervals, and of --harness's examples.")] = 0,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run what the model wrote, where a task asks for it.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File for the scores, as JSON.")] = None,
    base_format: Annotated[
        Literal["int8", "nf4"] | None, typer.Option(help="Keep the base's weights as a run with that key had them.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Score a model, with or without a delta, on a task and on general ability."""
    from metier.errors import ConfigError

    common: dict[str, Any] = {"limit": limit, "seed": seed, "allow_code_execution": allow_code_execution}
    common |= {} if batch_size is None else {"batch_size": batch_size}
    if harness is not None:
        if task is not None:
            raise ConfigError("evaluate: got --task and --harness, expected one of them. Call it twice.")
        common |= {"num_fewshot": fewshot, "apply_chat_template": chat_template}
        load_model = partial(_load_as, model, base_format, trust_remote_code)
        show(_harness_scores(harness, include_path, load_model, adapter, output, common))
        return
    if include_path is not None or fewshot is not None or chat_template:
        raise ConfigError(
            "evaluate: --include-path, --fewshot and --chat-template are for --harness, which is missing."
        )
    from metier.evaluation.compare import compare
    from metier.evaluation.evaluate import evaluate as evaluate_model
    from metier.reports.console import comparison_table

    loaded = _load_as(model, base_format, trust_remote_code)
    scored = with_adapter(loaded.model, adapter)
    scores = evaluate_model(scored, loaded.tokenizer, task=task, general=general, **common)
    if output is not None:
        scores.save(output)
    show(comparison_table(compare(scores, [], base_name=model if adapter is None else str(adapter))))
    for domain, loss in scores.domains.items():
        typer.echo(f"{domain}: {loss.bits_per_byte:.3f} bits a byte ({loss.low:.3f} to {loss.high:.3f})")


def _place(config: ComparisonConfig, on: str, address: str | None, num_jobs: int) -> AbstractContextManager[Place]:
    """Where a comparison's runs go."""
    from metier.evaluation.comparison.here import Here

    if on == "here":
        return nullcontext(Here(num_jobs))
    from metier.evaluation.comparison.on_ray.cluster import check_installed
    from metier.evaluation.comparison.on_ray.place import ray_place

    check_installed()
    from metier.planning.host_memory import host_memory_bytes

    return ray_place(config, host_memory_bytes, address=address, num_jobs=num_jobs)


def _load_as(model: str, base_format: str | None, trust_remote_code: bool) -> LoadedModel:
    """A model whose weights are as they were saved, or in fewer bits, as an adapter was trained beside them."""
    if base_format is None:
        from metier.models.load import load

        return load(model, trust_remote_code=trust_remote_code)
    from metier.memory.frozen_model import load_frozen

    return load_frozen(model, store="device", weight_format=base_format, trust_remote_code=trust_remote_code)


def _harness_scores(
    tasks: str,
    include_path: Path | None,
    load_model: Callable[[], LoadedModel],
    adapter: Path | None,
    output: Path | None,
    options: dict[str, Any],
) -> object:
    """The table of what lm-evaluation-harness finds; its tasks are looked for before the model is loaded."""
    from metier.evaluation.harness import evaluate_harness
    from metier.evaluation.harness_tasks import load_harness_tasks
    from metier.reports.harness import harness_table

    found = load_harness_tasks(tasks, include_path=include_path)
    loaded = load_model()
    result = evaluate_harness(with_adapter(loaded.model, adapter), loaded.tokenizer, found, **options)
    if output is not None:
        result.save(output)
    return harness_table(result)
