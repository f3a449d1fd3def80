"""The command line's application, how it ends on an error, and what verbs have in common."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from metier.errors import MetierError

app = typer.Typer(
    help="Specialise a language model for a task by training only the part that the task uses.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Argument(help="A local folder, a hub id, or 'embedded'.")]
Delta = Annotated[Path, typer.Argument(help="An adapter's folder, e.g. runs/NAME/adapter.")]
Base = Annotated[str, typer.Argument(help="The base model: a local folder, a hub id, or 'embedded'.")]
NewDelta = Annotated[Path, typer.Option("--output", "-o", help="Folder of the new delta.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]


def main() -> None:
    """Run the command line. An error of ours is printed without a traceback and ends with exit code 2."""
    try:
        app()
    except MetierError as error:
        if os.environ.get("METIER_DEBUG"):
            raise
        if getattr(error, "was_told", False):
            # by the process that speaks for all
            sys.exit(2)
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


def with_adapter(model: Any, adapter: Path | None) -> Any:
    """The model with a delta on it; as it is where there is none."""
    if adapter is None:
        return model
    from peft import PeftModel

    from metier.methods.single_task import with_one_task

    return with_one_task(PeftModel.from_pretrained(model, str(adapter)))


def show(renderable: object) -> None:
    from rich.console import Console

    Console().print(renderable)
