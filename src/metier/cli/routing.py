"""Verbs on what a router does: profile, select, analyse."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from metier.cli.app import Model, TrustRemoteCode, app, with_adapter


class Score(StrEnum):
    """How an expert's relevance is measured."""

    gate = "gate"
    token = "token"
    output_norm = "output_norm"


class Scale(StrEnum):
    """Whether a layer's scores sum to 1, or are the mean a token."""

    normalised = "normalised"
    raw = "raw"


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
        with_adapter(loaded.model, adapter),
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
