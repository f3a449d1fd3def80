"""Verbs on what a run leaves behind: inspect, verify, merge, export, compress, compose, ESFT's own checkpoints."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from metier.cli.app import Base, Delta, NewDelta, TrustRemoteCode, app, show


class Compression(StrEnum):
    """How a compressed delta stores its rows."""

    bf16 = "bf16"
    int8 = "int8"
    low_rank = "low_rank"


class Target(StrEnum):
    """What other tools take."""

    merged = "merged"
    peft_lora = "peft-lora"
    esft = "esft"


class Layout(StrEnum):
    """How a LoRA on experts is laid out."""

    parameters = "parameters"
    per_expert = "per-expert"


@app.command()
def inspect(delta: Delta) -> None:
    """Show what a delta holds: its base, layers, experts and size."""
    from metier.deltas.inspect import inspect as inspect_delta

    show(inspect_delta(delta))


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
    show(report)
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


@app.command()
def export(
    delta: Delta,
    base: Base,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    to: Annotated[Target, typer.Option(help="A checkpoint for vLLM, SGLang and others; a LoRA; ESFT's own form.")],
    layout: Annotated[
        Layout | None, typer.Option(help="For peft-lora: PEFT's own layout, which is the default, or vLLM's by expert.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="For merged: most bytes of tensors in a file, such as 5GB.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a delta in a form that other tools take, and say what was checked."""
    from metier.deltas.export import export as export_delta

    sentences = export_delta(
        delta,
        base,
        output,
        to=to.value,
        layout=None if layout is None else layout.value,
        max_shard_size=max_shard_size,
        trust_remote_code=trust_remote_code,
    )
    for sentence in sentences:
        typer.echo(sentence)


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
    """Write a delta as an adapter checkpoint that ESFT's own code reads; the same as `export --to esft`."""
    export(delta, base, output, to=Target.esft, trust_remote_code=trust_remote_code)


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
