"""Verbs of a run: the demo, train, plan."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metier.cli.app import app, show
from metier.config import RunConfig
from metier.config_reading import describe_fields, load_method_configs, load_run_config

if TYPE_CHECKING:
    from metier.planning.links import World

_RUNS = Path("runs")
RUN_KEYS = "\n\n".join(
    ["The keys of a run, in the YAML file or as options (--key value):"]
    + [f"{name}: {meaning} [{kind}; {default}]" for name, kind, default, meaning in describe_fields()]
)


@app.command()
def demo(
    task: Annotated[str, typer.Argument(help="The embedded task: sections, synopsis or translate.")] = "synopsis",
    output: Annotated[Path, typer.Option("--output", "-o", help="The run's folder.")] = Path("runs/demo"),
    baselines: Annotated[bool, typer.Option(help="Train full fine-tuning and LoRA too, to compare.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of the data's order.")] = 0,
) -> None:
    """Run the whole walk on the embedded model: profile, select, train, evaluate, report."""
    from metier.training.demo import run_demo

    run_demo(task, output, baselines, seed)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, epilog=RUN_KEYS)
def train(
    context: typer.Context,
    run: Annotated[str | None, typer.Argument(metavar="[RUN.YAML]", help="YAML file of a run's keys.")] = None,
    preview: Annotated[bool, typer.Option("--preview", help="Show what is trained on, and stop.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Train even what cannot fit into memory.")] = False,
) -> None:
    """Train a model on a task; every key of the run's file is also an option."""
    config = _run_config(context, run)
    if preview:
        _preview(config)
        return
    from metier.distributed.ranks import leave_ranks
    from metier.training.run import train as train_run

    try:
        train_run(config, force=force)
    finally:
        leave_ranks()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, epilog=RUN_KEYS)
def plan(
    context: typer.Context,
    run: Annotated[str | None, typer.Argument(metavar="[RUN.YAML]", help="YAML file of a run's keys.")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="Instead of the run's own: one, several (esft,lora,bitfit), all (the main five) or every."),
    ] = None,
    device_memory: Annotated[str | None, typer.Option(help="Such as 24GiB; this machine's if not given.")] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="Beside the device's; without either, device and host are one memory.")
    ] = None,
    labelled_share: Annotated[float, typer.Option(help="Of a batch's tokens, those that have a loss.")] = 0.5,
    records: Annotated[int | None, typer.Option(help="Of the data set, for the seconds in all.")] = None,
    vary: Annotated[
        list[str] | None, typer.Option(help="A key with several values, such as lora_r=8,64: a run for each.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan as JSON, too.")] = None,
    chart: Annotated[Path | None, typer.Option(help="Draw memory by kind: a .png or .html file.")] = None,
    device: Annotated[str | None, typer.Option(help="An accelerator to plan for, such as rtx-4090.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Folder of a routing profile of the data.")] = None,
    world_size: Annotated[
        int | None, typer.Option(help="Processes of the run; sizes are then those of one of them.")
    ] = None,
    link: Annotated[
        str | None, typer.Option(help="With --world-size, what is sent over: nvlink4, or nvlink4,infiniband-ndr.")
    ] = None,
    devices_per_node: Annotated[
        int | None, typer.Option(help="With --world-size, processes of a machine; 8 if not given.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Learn from the runs in --runs; without any, measure this machine anew.")
    ] = False,
    runs: Annotated[Path, typer.Option(help="Folder of former runs, for --calibrate.")] = _RUNS,
) -> None:
    """Say what a run will take before it starts, from the model's configuration alone.

    A config.json, or a folder with one, is enough for --model; no data are read. With --calibrate alone nothing is
    planned. With --world-size the run is planned for so many processes, with copies of the weights (DDP) and with
    shards (FSDP2); --device-memory is then a process's own, --host-memory a machine's.
    """
    from metier.errors import ConfigError

    if calibrate:
        from metier.planning.learning import calibrate as learn

        if runs != _RUNS and not runs.is_dir():
            raise ConfigError(f"plan: --runs: there is no folder {runs}, and nothing was forgotten. Name another.")
        is_alone = run is None and not context.args
        of_a_plan = (
            method, device_memory, host_memory, records, output, chart, device, profile, world_size, link,
            devices_per_node, vary,
        )  # fmt: skip
        if is_alone and any(option is not None for option in of_a_plan):
            raise ConfigError("plan: --calibrate without a run plans nothing. Name the run, or its --model.")
        show(learn(runs))
        if is_alone:
            return
    elif runs != _RUNS:
        raise ConfigError("runs: are learned from with --calibrate. Add it, or leave --runs out.")
    from rich.console import Console

    from metier.catalogue.tree import METHODS as CATALOGUE
    from metier.catalogue.tree import method_of
    from metier.planning.plan import METHODS
    from metier.planning.plan import plan as plan_runs
    from metier.reports.plan import check_chart, check_output, save_chart
    from metier.routing.routing_profile import RoutingProfile

    if chart is not None:
        check_chart(chart)
    world = _world(world_size, link, devices_per_node)
    several = {"all": METHODS, "every": tuple(CATALOGUE)}
    chosen = None if method is None else several.get(method, method.split(","))
    has_file = run is not None and not run.startswith("--")
    if method in CATALOGUE and not has_file:
        # the run's own method, with options of its own
        context.args, chosen = [*context.args, "--method", method], None
    for method_name in chosen or ():
        method_of(method_name)
    if output is not None:
        check_output(output)
    settings = _settings(vary)
    configs, refused = _runs(context, run, chosen, settings)
    with Console(stderr=True).status("reading the configuration") as status:
        made = plan_runs(
            configs,
            refused=refused,
            device_memory=device_memory,
            host_memory=host_memory,
            labelled_share=labelled_share,
            num_records=records,
            device=device,
            profile=None if profile is None else RoutingProfile.load(profile),
            world=world,
            begun=status.update,
        )
    show(made)
    if output is not None:
        made.save(output)
    if chart is not None:
        save_chart(made, chart)


def _world(size: int | None, link: str | None, devices_per_node: int | None) -> World | None:
    """The processes that a plan is for, where it is for several."""
    from metier.errors import ConfigError
    from metier.planning.links import DEVICES_PER_NODE, World, links_of

    links = () if link is None else links_of(link)
    if size is not None:
        return World(size, DEVICES_PER_NODE if devices_per_node is None else devices_per_node, links)
    if link is not None:
        raise ConfigError("link: one process sends nothing. Say how many there are: --world-size 8.")
    if devices_per_node is not None:
        raise ConfigError("devices_per_node: is for several processes. Say how many there are: --world-size 8.")
    return None


def _run_config(context: typer.Context, run: str | None, **options: Any) -> RunConfig:
    """A run's file and the options that go before it."""
    path, tokens = _path_and_tokens(context, run)
    return load_run_config(path, tokens, **options)


def _path_and_tokens(context: typer.Context, run: str | None) -> tuple[str | None, list[str]]:
    # Options that typer does not know are left in order: without a file the first of them lands in `run`.
    tokens = [*([run] if run else []), *context.args]
    path = tokens.pop(0) if tokens and not tokens[0].startswith("--") else None
    return path, tokens


def _settings(vary: Sequence[str] | None) -> list[list[str]]:
    """Command-line tokens of each combination of the values that keys are to have."""
    from metier.errors import ConfigError

    choices = []
    for one in vary or ():
        key, has_values, values = one.partition("=")
        if not has_values or not key or not all(value.strip() for value in values.split(",")):
            raise ConfigError(f"vary: got {one!r}, expected a key with its values, such as lora_r=8,64.")
        choices.append([f"--{key.strip().replace('-', '_')}={value.strip()}" for value in values.split(",")])
    return [list(chosen) for chosen in itertools.product(*choices)]


def _runs(
    context: typer.Context, run: str | None, methods: Sequence[str] | None, settings: Sequence[list[str]]
) -> tuple[list[RunConfig], dict[str, str]]:
    """The runs to plan, of the file's method or of several, with each setting; and who cannot have the keys."""
    from metier.planning.as_method import foreign_keys

    not_needed = {"dataset": "-", "output_dir": "-"}
    given, configs = list(context.args), list[RunConfig]()
    refused: dict[str, str] = {}
    for setting in settings:
        context.args = [*given, *setting]
        if methods is None:
            configs.append(_run_config(context, run, not_needed=not_needed))
            continue
        path, tokens = _path_and_tokens(context, run)
        made, impossible = load_method_configs(path, tokens, methods, left_out=foreign_keys, not_needed=not_needed)
        configs += made
        refused |= impossible
    # a key that a method does not have makes no other run of it
    found = list({config.to_yaml(): config for config in configs}.values())
    order = {name: number for number, name in enumerate(methods or ())}
    return sorted(found, key=lambda config: order.get(config.method, 0)), refused


def _preview(config: RunConfig) -> None:
    from metier.data.preview import preview
    from metier.data.records import load_records
    from metier.training.run import encode_for, load_base

    records = load_records(config.dataset)
    loaded = load_base(config)
    show(preview(encode_for(loaded, records, config), loaded.tokenizer))
