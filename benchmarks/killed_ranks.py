"""Kill a process of a run in two processes at random moments, and see what is lost.

    python benchmarks/killed_ranks.py [--kills 20] [--seed 0]     writes results/killed_ranks.md and .json

A tiny Mixture-of-Experts model is tuned by ESFT under `torchrun --nproc-per-node 2 --max-restarts 1`, in turn with
copies of the weights (DDP) and with shards (FSDP2). At a random moment one of the two processes, drawn too, gets
SIGKILL: after a step that is drawn evenly, and up to a second later; step 0 is the start, of which a moment is drawn
evenly. Then: how long until torchrun has ended the others and begun again; whether each
checkpoint that was complete is so still, and the run goes on from the newest; and its last loss beside that of a run
that nobody killed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

TESTS = Path(__file__).parents[1] / "tests"
RESULTS = Path(__file__).parent / "results"
STEPS, SAVE_STEPS = 40, 5
START_SECONDS = 10
"""From a process to its first step, about."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--kills", type=int, default=20)
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    sys.path.insert(0, str(TESTS))
    with tempfile.TemporaryDirectory(prefix="metier-killed-") as folder:
        rows = measure(Path(folder), given.kills, random.Random(given.seed))
    (RESULTS / "killed_ranks.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "killed_ranks.md").write_text(report(rows), encoding="utf-8")


def measure(folder: Path, num_kills: int, chance: random.Random) -> list[dict]:
    """One row a kill."""
    from distributed.launch import losses

    write_world(folder)
    expected = {}
    for sharding in ("ddp", "fsdp"):
        run = start(folder, f"straight-{sharding}", sharding, restarts=0)
        assert run.wait() == 0, (folder / f"straight-{sharding}.log").read_text()
        expected[sharding] = losses(folder / f"straight-{sharding}")[STEPS]["loss"]
    rows = []
    while len(rows) < num_kills:
        sharding = ("ddp", "fsdp")[len(rows) % 2]
        row = one_kill(folder, sharding, chance.randrange(STEPS), chance.random(), chance.randrange(2))
        if row is not None:
            apart = None if row["loss"] is None else row["loss"] / expected[sharding] - 1
            rows.append(row | {"loss_beside_straight": apart})
            print(rows[-1], flush=True)
    return rows


def one_kill(folder: Path, sharding: str, step: int, later: float, victim: int) -> dict | None:
    """What came of it; None where the run was over before its moment."""
    from distributed.killing import kill, wait_until, workers
    from distributed.launch import losses

    name = f"run-{time.monotonic_ns()}"
    run = start(folder, name, sharding, restarts=1)
    checkpoints, metrics = folder / name / "checkpoints", folder / name / "metrics.jsonl"
    if not wait_until(lambda: len(workers(run.pid)) == 2, run):
        return None
    if step and not wait_until(lambda: metrics.exists() and num_steps(metrics) >= step, run):
        return None
    ends = time.monotonic() + (later if step else START_SECONDS * later)
    if not wait_until(lambda: time.monotonic() >= ends and len(workers(run.pid)) == 2, run):
        return None
    before = {path.parent.name for path in checkpoints.glob("*/complete")}
    old = workers(run.pid)
    killed = time.monotonic()
    kill(old[victim])
    begun = wait_until(lambda: len(now := workers(run.pid)) == 2 and not set(now) & set(old), run)
    seconds = time.monotonic() - killed
    code = run.wait()
    said = (folder / f"{name}.log").read_text()
    after = {path.parent.name for path in checkpoints.glob("*/complete")}
    newest = max(before, key=lambda name: int(name.rpartition("-")[2]), default=None)
    return {
        "sharding": sharding,
        "victim": victim,
        "after_step": step,
        "seconds_later": later if step else START_SECONDS * later,
        "seconds_until_begun_again": seconds if begun else None,
        "exit_code": code,
        "complete_before": sorted(before),
        "lost": sorted(before - after),
        # a path may be wrapped, and a run that has got further goes on from there
        "went_on_from_newest": newest is None or went_on_from(said) >= int(newest.rpartition("-")[2]),
        "loss": losses(folder / name)[STEPS]["loss"] if code == 0 else None,
    }


def num_steps(metrics: Path) -> int:
    """Steps that a run has logged, the last line perhaps not whole."""
    return metrics.read_text().count('"loss"')


def went_on_from(said: str) -> int:
    """The step of the checkpoint that a run says it goes on from; 0 for the beginning."""
    found = re.findall(r"Resuming from \S*checkpoint-(\d+)", said.replace("\n", ""))
    return int(found[-1]) if found else 0


def start(folder: Path, name: str, sharding: str, *, restarts: int):
    """A run under torchrun."""
    from distributed.killing import launched

    path = folder / f"{name}.yaml"
    path.write_text((folder / "run.yaml").read_text() + f"output_dir: {folder / name}\n")
    options = ("--fsdp",) if sharding == "fsdp" else ()
    return launched(path, 2, folder / f"{name}.log", restarts=restarts, options=options)


def write_world(folder: Path) -> None:
    """A tiny model, records and what all runs have in common."""
    from tiny_models import tiny_model, tiny_tokenizer

    tiny_model("deepseek_v2").save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    with (folder / "records.jsonl").open("w") as file:
        for number in range(200):
            messages = [
                {"role": "user", "content": f"What is {number} and {number}?"},
                {"role": "assistant", "content": f"It is {2 * number}."},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    (folder / "run.yaml").write_text(
        f"model: {folder / 'base'}\ndataset: {folder / 'records.jsonl'}\nlearning_rate: 1.0e-2\nmax_steps: {STEPS}\n"
        f"logging_steps: 1\nsave_steps: {SAVE_STEPS}\nmax_length: 128\nprofile_tokens: 2048\nselect_top_k: 3\n"
        "per_device_train_batch_size: 2\nglobal_batch_size: 8\n"
    )


def report(rows: list[dict]) -> str:
    """The page."""
    waits = [row["seconds_until_begun_again"] for row in rows if row["seconds_until_begun_again"] is not None]
    worst = max(abs(row["loss_beside_straight"]) for row in rows if row["loss"] is not None)
    lines = [
        "# Killed processes",
        "",
        "`python benchmarks/killed_ranks.py`: ESFT on a tiny Mixture-of-Experts model under torchrun, two processes,",
        f"{STEPS} steps, a checkpoint every {SAVE_STEPS}; in each run one process is killed (SIGKILL) at a random",
        "moment: within a second of a step drawn evenly.",
        "",
        f"- {len(rows)} kills, {sum(row['exit_code'] == 0 for row in rows)} runs that reached their end by themselves.",
        f"- Complete checkpoints that were lost: {sum(len(row['lost']) for row in rows)}; runs that went on from the "
        f"newest: {sum(row['went_on_from_newest'] for row in rows)}.",
        f"- From the kill until both processes had begun again: {median(waits):.1f} s, {max(waits):.1f} s at most.",
        f"- Last loss beside that of the run that nobody killed: {worst:.1e} apart at most, relative.",
        "",
        "| weights | killed | after step | complete before | until begun again, s | last loss beside straight |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        kept = row["complete_before"]
        newest = max((int(name.rpartition("-")[2]) for name in kept), default=None)
        wait = row["seconds_until_begun_again"]
        loss = "not reached" if row["loss"] is None else f"{row['loss_beside_straight']:+.1e}"
        lines.append(
            f"| {row['sharding']} | {row['victim']} | {row['after_step']} | "
            f"{'none' if newest is None else f'to step {newest}'} | {'-' if wait is None else f'{wait:.1f}'} | {loss} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
