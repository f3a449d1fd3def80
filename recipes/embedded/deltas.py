"""Put the deltas of two runs into the package: rows in the base's bfloat16, the base by its name instead of a path.

    python recipes/embedded/deltas.py --runs RUNS      reads RUNS/<task>/adapter, writes src/metier/embedded/deltas/

RUNS has the runs of the two `metier train` commands in README.md. They train in float32, which is quicker than bfloat16
on many CPUs; the embedded model is in bfloat16, so the rows are as well wherever they are used.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import peft
import torch

import metier
from metier import embedded
from metier.deltas.save import save_delta

TASKS = ("synopsis", "translate")


def put_into_package(adapter: Path, task: str) -> Path:
    """The folder of the delta in the package."""
    model, _ = metier.load("embedded", dtype="float32")
    model = peft.PeftModel.from_pretrained(model, str(adapter))
    # a run has the folder that the base was loaded from, which is another one on each machine
    model.peft_config["default"].base_model_name_or_path = "embedded"
    folder = embedded.ROOT / "deltas" / task
    save_delta(model, folder, dtype=torch.bfloat16)
    with (folder / "README.md").open("a", encoding="utf-8") as card:
        card.write(f"\nTrained on the task `{task}` that ships with metier, as `recipes/embedded/README.md` says.\n")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the two runs, each named after its task")
    runs = parser.parse_args().runs
    for task in TASKS:
        folder = put_into_package(runs / task / "adapter", task)
        print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
