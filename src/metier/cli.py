"""The command line: one short function a verb. Heavy imports happen inside the verbs, to stay quick."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from metier.config import RunConfig
from metier.config_reading import describe_fields, load_run_config
from metier.errors import MetierError

app = typer.Typer(
    help="Specialise a language model for a task by training only the part that the task uses.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)

RUN_KEYS = "\n\n".join(
    ["The keys of a run, in the YAML file or as options (--key value):"]
    + [f"{name}: {meaning} [{kind}; {default}]" for name, kind, default, meaning in describe_fields()]
)

Model = Annotated[str, typer.Argument(help="A local folder, a hub id, or 'embedded'.")]
Delta = Annotated[Path, typer.Argument(help="An adapter's folder, e.g. runs/NAME/adapter.")]
Base = Annotated[str, typer.Argument(help="The base model: a local folder, a hub id, or 'embedded'.")]
NewDelta = Annotated[Path, typer.Option("--output", "-o", help="Folder of the new delta.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]


class Score(StrEnum):
    """How an expert's relevance is measured."""

    gate = "gate"
    token = "token"
    output_norm = "output_norm"


class Scale(StrEnum):
    """Whether a layer's scores sum to 1, or are the mean a token."""

    normalised = "normalised"
    raw = "raw"


class Compression(StrEnum):
    """How a compressed delta stores its rows."""

    bf16 = "bf16"
    int8 = "int8"
    low_rank = "low_rank"


def main() -> None:
    """Run the command line. An error of ours is printed without a traceback and ends with exit code 2."""
    try:
        app()
    except MetierError as error:
        if os.environ.get("METIER_DEBUG"):
            raise
        from rich.console import Console
        from rich.text import Text

        Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), (str(error), "red")))
        sys.exit(2)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (or METIER_DEBUG=1).")] = False,
) -> None:
    if debug:
        os.environ["METIER_DEBUG"] = "1"


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


@app.command()
def profile(
    model: Model,
    dataset: Annotated[str, typer.Argument(help="The task's records: a file, a folder or a `datasets` name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for profile.safetensors and profile.json.")],
    split: Annotated[str | None, typer.Option(help="Split of the data set.")] = None,
    num_tokens: Annotated[int, typer.Option(help="Tokens to profile.")] = 131_072,
    max_length: Annotated[int, typer.Option(help="Tokens in one packed sequence.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Sequences at once.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    adapter: Annotated[Path | None, typer.Option(help="A delta of the model, to profile it as trained.")] = None,
    output_norms: Annotated[bool, typer.Option(help="Measure the experts' outputs too; runs them twice.")] = False,
    until_stable: Annotated[
        bool, typer.Option(help="Stop when both halves select the same experts (token scores, top_p 0.2).")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure which experts a task uses."""
    from metier.data.records import load_records
    from metier.models.load import load
    from metier.routing.profile import StabilityConfig
    from metier.routing.profile import profile as profile_routing

    records = load_records(dataset, split=split)
    loaded = load(model, trust_remote_code=trust_remote_code)
    result = profile_routing(
        _with_adapter(loaded.model, adapter),
        loaded.tokenizer,
        records,
        num_tokens=num_tokens,
        max_length=max_length,
        batch_size=batch_size,
        seed=seed,
        output_norms=output_norms,
        until_stable=StabilityConfig() if until_stable else None,
    )
    result.save(output)
    typer.echo(f"Profiled {sum(result.num_tokens_H):,} tokens in {len(result.layer_ids)} MoE layers: {output}")


@app.command()
def select(
    profile: Annotated[Path, typer.Argument(help="The folder that `metier profile` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The selection's file.")] = Path("selection.json"),
    score: Annotated[Score, typer.Option(help="Measure by gates' mass, routed tokens or outputs.")] = Score.token,
    scale: Annotated[Scale, typer.Option(help="Scores that sum to 1, or the paper's raw ones.")] = Scale.normalised,
    top_p: Annotated[float | None, typer.Option(help="Cover this share of each layer's score; else 0.2.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Take so many experts in each layer.")] = None,
    top_fraction: Annotated[float | None, typer.Option(help="Take this share of each layer's experts.")] = None,
    budget_bytes: Annotated[int | None, typer.Option(help="Take experts of so many bytes in all.")] = None,
    general: Annotated[Path | None, typer.Option(help="A general profile, whose scores are subtracted.")] = None,
    model: Annotated[str | None, typer.Option(help="The model, whose expert sizes a budget needs.")] = None,
) -> None:
    """Choose the experts to train from a profile."""
    from metier.routing.profile import RoutingProfile
    from metier.routing.selection import SelectionConfig, expert_bytes
    from metier.routing.selection import select as select_experts

    if top_p is top_k is top_fraction is budget_bytes is None:
        top_p = 0.2
    config = SelectionConfig(
        score=score.value,
        scale=scale.value,
        top_p=top_p,
        top_k=top_k,
        top_fraction=top_fraction,
        budget_bytes=budget_bytes,
        minus_general=general is not None,
    )
    sizes = None
    if model is not None:
        from metier.models.load import load

        sizes = expert_bytes(load(model).model)
    selection = select_experts(
        RoutingProfile.load(profile),
        config,
        general=None if general is None else RoutingProfile.load(general),
        expert_bytes=sizes,
    )
    selection.save(output)
    num_experts = sum(len(experts) for experts in selection.experts.values())
    typer.echo(f"Selected {num_experts} experts in {len(selection.experts)} layers: {output}")


@app.command()
def analyse(
    profiles: Annotated[list[str], typer.Argument(help="Profiles of one model, as NAME=FOLDER.")],
    drift: Annotated[
        list[str] | None, typer.Option(help="Two of the names, as BEFORE=AFTER: how routing moved.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for analysis.html and .json.")] = Path(
        "analysis"
    ),
    score: Annotated[Score, typer.Option(help="Measure by gates' mass, routed tokens or outputs.")] = Score.token,
    top: Annotated[int | None, typer.Option(help="Experts that count as top ones; else the router's top_k.")] = None,
) -> None:
    """Show what the router does: how concentrated, what tasks share, and what training moved."""
    from metier.errors import ConfigError
    from metier.reports.analysis import write_analysis
    from metier.routing.analysis import analyse as analyse_profiles
    from metier.routing.profile import RoutingProfile

    def parted(text: str, what: str) -> tuple[str, str]:
        name, sign, value = text.partition("=")
        if not (name and sign and value):
            raise ConfigError(f"analyse: got {text!r}, expected {what}.")
        return name, value

    folders = [parted(text, "NAME=FOLDER, such as law=profiles/law") for text in profiles]
    if len(dict(folders)) != len(folders):
        raise ConfigError(f"analyse: got names {[name for name, _ in folders]}, expected each once.")
    loaded = {name: RoutingProfile.load(folder) for name, folder in folders}
    pairs = [parted(text, "BEFORE=AFTER, two of the profiles' names") for text in drift or ()]
    analysis = analyse_profiles(loaded, drifts=pairs, score=score.value, top=top)
    typer.echo(f"Analysis: {write_analysis(output, analysis, loaded)}")


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
    from metier.training.run import train as train_run

    train_run(config, force=force)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, epilog=RUN_KEYS)
def plan(
    context: typer.Context,
    run: Annotated[str | None, typer.Argument(metavar="[RUN.YAML]", help="YAML file of a run's keys.")] = None,
    method: Annotated[
        str | None, typer.Option(help="Instead of the run's own: one, several (esft,lora,full) or all.")
    ] = None,
    device_memory: Annotated[str | None, typer.Option(help="Such as 24GiB; this machine's if not given.")] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="Beside the device's; without either, device and host are one memory.")
    ] = None,
    labelled_share: Annotated[float, typer.Option(help="Of a batch's tokens, those that have a loss.")] = 0.5,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan as JSON, too.")] = None,
    chart: Annotated[Path | None, typer.Option(help="Draw memory by kind: a .png or .html file.")] = None,
    device: Annotated[str | None, typer.Option(help="An accelerator to plan for, such as rtx-4090.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Folder of a routing profile of the data.")] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Learn from the runs in --runs; without any, measure this machine anew.")
    ] = False,
    runs: Annotated[Path, typer.Option(help="Folder of former runs, for --calibrate.")] = Path("runs"),
) -> None:
    """Say what a run will take before it starts, from the model's configuration alone.

    A config.json, or a folder with one, is enough for --model; no data are read. With --calibrate alone nothing is
    planned.
    """
    if calibrate:
        from metier.errors import ConfigError
        from metier.planning.learning import calibrate as learn

        is_alone = run is None and not context.args
        of_a_plan = (method, device_memory, host_memory, output, chart, device, profile)
        if is_alone and any(option is not None for option in of_a_plan):
            raise ConfigError("plan: --calibrate without a run plans nothing. Name the run, or its --model.")
        _print(learn(runs))
        if is_alone:
            return
    config = _run_config(context, run, not_needed={"dataset": "-", "output_dir": "-"})
    from metier.planning.plan import METHODS
    from metier.planning.plan import plan as plan_runs
    from metier.reports.plan import check_chart, save_chart
    from metier.routing.routing_profile import RoutingProfile

    if chart is not None:
        check_chart(chart)
    chosen = None if method is None else list(METHODS) if method == "all" else method.split(",")
    made = plan_runs(
        config,
        methods=chosen,
        device_memory=device_memory,
        host_memory=host_memory,
        labelled_share=labelled_share,
        device=device,
        profile=None if profile is None else RoutingProfile.load(profile),
    )
    _print(made)
    if output is not None:
        made.save(output)
    if chart is not None:
        save_chart(made, chart)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, to see all of it.")] = None,
) -> None:
    """List every method in the order of the survey, or say all about one."""
    from metier.catalogue.tree import method_of
    from metier.reports.methods import methods_tree, one_method

    _print(methods_tree() if name is None else one_method(method_of(name)))


@app.command()
def compare(
    comparison: Annotated[Path, typer.Argument(metavar="COMPARISON.YAML", help="Model, tasks, methods and seeds.")],
    jobs: Annotated[int, typer.Option(help="Runs at once, each in a process of its own.")] = 1,
    minutes: Annotated[float | None, typer.Option(help="Begin no run after so many; the next call goes on.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run again what failed before.")] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help="Run nothing; report what is there.")] = False,
) -> None:
    """Compare methods on tasks: scores, forgetting, memory, time, size, with seeds and intervals.

    Runs that are done are not run again.
    """
    from rich.console import Console

    from metier.evaluation.comparison.cells import Cells, forget_failures
    from metier.evaluation.comparison.config import load_comparison
    from metier.evaluation.comparison.schedule import run_cells
    from metier.reports.comparison import write_comparison

    cells = Cells(load_comparison(comparison))
    if retry:
        forget_failures(cells, cells.failed())
    if not report_only:
        run_cells(cells, console=Console(), num_jobs=jobs, minutes=minutes)
    typer.echo(f"Report: {write_comparison(cells)}")


@app.command()
def search(
    file: Annotated[Path, typer.Argument(metavar="SEARCH.YAML", help="Model, task, methods, places and rounds.")],
    jobs: Annotated[int, typer.Option(help="Runs at once, each in a process of its own.")] = 1,
) -> None:
    """Search over methods and places: what fits the memory runs briefly, the better half runs on."""
    from rich.console import Console

    from metier.evaluation.comparison.search import load_search
    from metier.evaluation.comparison.search import search as run_search
    from metier.planning.plan import why_not

    config = load_search(file)
    best = run_search(config, lambda run: why_not(run, config.memory), console=Console(), num_jobs=jobs)
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
        _print(_harness_scores(harness, include_path, model, adapter, trust_remote_code, output, common))
        return
    if include_path is not None or fewshot is not None or chat_template:
        raise ConfigError(
            "evaluate: --include-path, --fewshot and --chat-template are for --harness, which is missing."
        )
    from metier.evaluation.compare import compare
    from metier.evaluation.evaluate import evaluate as evaluate_model
    from metier.models.load import load
    from metier.reports.console import comparison_table

    loaded = load(model, trust_remote_code=trust_remote_code)
    scored = _with_adapter(loaded.model, adapter)
    scores = evaluate_model(scored, loaded.tokenizer, task=task, general=general, **common)
    if output is not None:
        scores.save(output)
    _print(comparison_table(compare(scores, [], base_name=model if adapter is None else str(adapter))))
    for domain, loss in scores.domains.items():
        typer.echo(f"{domain}: {loss.bits_per_byte:.3f} bits a byte ({loss.low:.3f} to {loss.high:.3f})")


@app.command()
def inspect(delta: Delta) -> None:
    """Show what a delta holds: its base, layers, experts and size."""
    from metier.deltas.inspect import inspect as inspect_delta

    _print(inspect_delta(delta))


@app.command()
def verify(
    delta: Delta,
    base: Annotated[str, typer.Argument(help="The base model.")],
    tolerance: Annotated[
        float | None, typer.Option(help="Difference of logits that counts as none, as a share of the largest.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Check a delta against its base: right base, nothing else moved, every selected row did.

    Ends with exit code 1 if a check fails.
    """
    from metier.deltas.verify import verify as verify_delta

    report = verify_delta(delta, base, tolerance=tolerance, trust_remote_code=trust_remote_code)
    _print(report)
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def merge(
    delta: Delta,
    base: Annotated[str, typer.Argument(help="The base model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the merged model.")],
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write the base with a delta's rows in place of its own, as an ordinary model."""
    from metier.deltas.merge import merge as merge_delta

    merge_delta(delta, base, output, trust_remote_code=trust_remote_code)
    typer.echo(f"Merged model: {output}")


@app.command("import-esft")
def import_esft(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with expert_cfg.json and safetensors of ESFT's own code.")],
    base: Base,
    output: NewDelta,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Turn an adapter checkpoint of ESFT's own code into a delta, to the bit."""
    from metier.deltas.esft_checkpoint import read_esft_checkpoint

    delta = read_esft_checkpoint(checkpoint, base, output, trust_remote_code=trust_remote_code)
    typer.echo(f"Delta of {sum(map(len, delta.config.experts.values()))} experts: {output}")


@app.command("export-esft")
def export_esft(
    delta: Delta,
    base: Base,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the checkpoint.")],
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a delta as an adapter checkpoint that ESFT's own code reads."""
    from metier.deltas.esft_checkpoint import write_esft_checkpoint

    write_esft_checkpoint(delta, base, output, trust_remote_code=trust_remote_code)
    typer.echo(f"ESFT checkpoint: {output}")


@app.command()
def compress(
    delta: Delta,
    base: Base,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the compressed delta.")],
    method: Annotated[Compression, typer.Option(help="How rows are stored.")] = Compression.int8,
    max_relative_error: Annotated[
        float | None, typer.Option(help="For low_rank: most of a row's change that may be lost, such as 0.1.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Store a delta in fewer bytes, and say what is lost."""
    from metier.deltas.compress import compress as compress_delta

    report = compress_delta(
        delta,
        base,
        output,
        method=method.value,
        max_relative_error=max_relative_error,
        trust_remote_code=trust_remote_code,
    )
    typer.echo(
        f"{report.bytes_before:,} bytes are now {report.bytes_after:,}; of a row's change {report.mean_error:.2%} are "
        f"lost on average, {report.max_error:.2%} at most: {output}"
    )


@app.command()
def decompress(
    compressed: Annotated[Path, typer.Argument(help="Folder that `metier compress` wrote.")],
    base: Base,
    output: NewDelta,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Turn a compressed delta back into an ordinary one."""
    from metier.deltas.compress import decompress as decompress_delta

    decompress_delta(compressed, base, output, trust_remote_code=trust_remote_code)
    typer.echo(f"Delta: {output}")


@app.command()
def compose(
    base: Base,
    deltas: Annotated[list[Path], typer.Argument(help="Deltas of that base.")],
    output: NewDelta,
    weight: Annotated[list[float] | None, typer.Option(help="One a delta; negative to negate.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make one delta of several: their union, and where they collide the mean (or a weighted sum) of their changes."""
    from metier.deltas.compose import compose as compose_deltas
    from metier.deltas.compose import conflicts
    from metier.models.load import load

    loaded = load(base, trust_remote_code=trust_remote_code)
    delta = compose_deltas(deltas, loaded, output, weights=weight)
    for conflict in conflicts(deltas, loaded):
        typer.echo(
            f"layer {conflict.layer}, expert {conflict.expert}: changed by {conflict.first} and {conflict.second}, "
            f"cosine {conflict.cosine:+.2f}"
        )
    typer.echo(f"Delta of {sum(map(len, delta.config.experts.values()))} experts: {output}")


def _run_config(context: typer.Context, run: str | None, **options: Any) -> RunConfig:
    """A run's file and the options that go before it."""
    # Options that typer does not know are left in order: without a file the first of them lands in `run`.
    tokens = [*([run] if run else []), *context.args]
    path = tokens.pop(0) if tokens and not tokens[0].startswith("--") else None
    return load_run_config(path, tokens, **options)


def _preview(config: RunConfig) -> None:
    from metier.data.preview import preview
    from metier.data.records import load_records
    from metier.training.run import encode_for, load_base

    records = load_records(config.dataset)
    loaded = load_base(config)
    _print(preview(encode_for(loaded, records, config), loaded.tokenizer))


def _harness_scores(
    tasks: str,
    include_path: Path | None,
    model: str,
    adapter: Path | None,
    trust_remote_code: bool,
    output: Path | None,
    options: dict[str, Any],
) -> object:
    """The table of what lm-evaluation-harness finds; its tasks are looked for before the model is loaded."""
    from metier.evaluation.harness import evaluate_harness
    from metier.evaluation.harness_tasks import load_harness_tasks
    from metier.models.load import load
    from metier.reports.harness import harness_table

    found = load_harness_tasks(tasks, include_path=include_path)
    loaded = load(model, trust_remote_code=trust_remote_code)
    result = evaluate_harness(_with_adapter(loaded.model, adapter), loaded.tokenizer, found, **options)
    if output is not None:
        result.save(output)
    return harness_table(result)


def _with_adapter(model: Any, adapter: Path | None) -> Any:
    """The model with a delta on it; as it is where there is none."""
    if adapter is None:
        return model
    from peft import PeftModel

    from metier.methods.single_task import with_one_task

    return with_one_task(PeftModel.from_pretrained(model, str(adapter)))


def _print(renderable: object) -> None:
    from rich.console import Console

    Console().print(renderable)
