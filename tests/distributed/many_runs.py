"""Started by a launcher: runs one configuration after another in the same processes, which saves their start.

    python many_runs.py CONFIG.yaml … [--fsdp]

Prints a line `RESULT NAME ok` or `RESULT NAME error` a run, from the main process.
"""

from __future__ import annotations

import sys
from pathlib import Path

from metier.config_reading import load_run_config
from metier.distributed.ranks import join_ranks, leave_ranks, wait_for_all
from metier.errors import MetierError
from metier.training import run as run_module
from metier.training.run import train


def main(paths: list[str], options: list[str]) -> None:
    """Run each file."""
    # what a run would take is foreseen elsewhere
    run_module.Foresight.before_loading = lambda self: None  # type: ignore[method-assign]
    run_module.Foresight.before_training = lambda self, *_, **__: {"not_traced": "left out"}  # type: ignore[method-assign]
    ranks = join_ranks()
    for path in paths:
        try:
            train(load_run_config(path, options))
            said = "ok"
        except MetierError as error:
            said = f"{type(error).__name__}: {error}"
        wait_for_all()
        if ranks.is_main:
            print(f"\nRESULT {Path(path).stem} {said}", flush=True)
    leave_ranks()


if __name__ == "__main__":
    main([word for word in sys.argv[1:] if not word.startswith("--")], [w for w in sys.argv[1:] if w.startswith("--")])
