"""Break metier's promises and errors one at a time, and see that a test fails.

    python scripts/break_promises.py [NUMBER …]

A test that cannot fail is no test. Each line of `BREAKS` takes one thing away from a copy of the sources (a check, a
copy of rows, a mask) and names the tests that are to notice. The script ends with 1 if they pass all the same, and with
an error if the sources no longer have what a line takes away.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Break:
    """One thing that is taken away."""

    what: str
    path: str
    """Below src/metier."""
    before: str
    after: str
    tests: str


BREAKS = (
    Break(
        "rows begin as the base's: a zero delta is a no-op",
        "methods/esft/layer.py",
        ".detach()[ids].float().clone()",
        ".detach()[ids].float().clone() + 1e-3",
        "tests/methods/esft",
    ),
    Break(
        "merging writes the rows",
        "methods/esft/layer.py",
        "            self._write(ids, rows)\n",
        "",
        "tests/methods/esft",
    ),
    Break(
        "the base's rows come back to the bit",
        "methods/esft/layer.py",
        "self._base_rows.pop(adapter))",
        "self._rows(adapter))",
        "tests/methods/esft",
    ),
    Break(
        "what is not selected does not move",
        "methods/expert_tuner.py",
        "        del self._views\n",
        "        del self._views\n        self.model.requires_grad_(True)\n",
        "tests/methods/esft",
    ),
    Break(
        "rows have gradients", "methods/bank_passes.py", "if places[0] is not None:", "if False:", "tests/methods/esft"
    ),
    Break(
        "each request of a batch has its own delta",
        "methods/esft/layer.py",
        "table_RE[request_T.unsqueeze(-1), top_k_index]",
        "table_RE[0][top_k_index]",
        "tests/methods/esft",
    ),
    Break(
        "two adapters do not replace one expert",
        "methods/esft/layer.py",
        "if owner.setdefault(expert, name) != name:",
        "if False:",
        "tests/methods/esft",
    ),
    Break(
        "an expert that does not exist",
        "methods/expert_tuner.py",
        "bad = [expert for expert in ids if not 0 <= expert < num_experts]",
        "bad = []",
        "tests/methods/esft",
    ),
    Break(
        "a layer that does not exist",
        "methods/expert_tuner.py",
        "if index not in layers:",
        "if False:",
        "tests/methods/esft",
    ),
    Break(
        "a selection of nothing",
        "methods/expert_ids.py",
        "if not isinstance(experts, dict) or not any(experts.values()):",
        "if False:",
        "tests/methods/esft",
    ),
    Break(
        "an adapter that attaches to nothing",
        "methods/coverage.py",
        "if not any(parameter.requires_grad for parameter in model.parameters()):",
        "if False:",
        "tests/methods tests/training",
    ),
    Break(
        "a dense model has no experts to train",
        "models/moe.py",
        "    if not layers:\n        raise",
        "    if False:\n        raise",
        "tests/models/test_moe.py",
    ),
    Break(
        "MoE layers outside the contract",
        "models/moe.py",
        "    _refuse_foreign(bare, layers)\n    if not layers:",
        "    if not layers:",
        "tests/models/test_moe.py",
    ),
    Break(
        "an unknown key",
        "config_reading.py",
        "        if key not in known:\n",
        "        if False:\n",
        "tests/test_config.py",
    ),
    Break(
        "the nearest key",
        "config_reading.py",
        "return f\"Did you mean '{nearest[0]}'?\"",
        "return ''",
        "tests/test_config.py",
    ),
    Break(
        "a record that is not JSON: its line",
        "data/sources.py",
        'f"{origin}: not JSON:',
        'f"not JSON:',
        "tests/data/test_sources.py",
    ),
    Break("a missing role", "data/formats.py", "if role_key not in item:", "if False:", "tests/data/test_formats.py"),
    Break("an unknown role", "data/formats.py", "    if role is None:", "    if False:", "tests/data/test_formats.py"),
    Break(
        "an empty completion",
        "data/formats.py",
        "    if not text.strip():",
        "    if False:",
        "tests/data/test_formats.py",
    ),
    Break(
        "a batch without a label",
        "data/collate.py",
        "if not any(item.num_trained_tokens for item in items):",
        "if False:",
        "tests/data/test_collate.py",
    ),
    Break(
        "a record that is too long is counted",
        "data/encode.py",
        "too_long=tuple(item.origin for item in encoded if item.length > max_length)",
        "too_long=()",
        "tests/data/test_encode.py",
    ),
    Break(
        "a record that is too long is not cut",
        "data/encode.py",
        "items = tuple(item for item in encoded if item.length <= max_length)",
        "items = tuple(encoded)",
        "tests/data/test_encode.py",
    ),
    Break("a delta of another base", "deltas/on_base.py", "    if expected != got:", "    if False:", "tests/deltas"),
    Break(
        "a profile does not change with the batch",
        "routing/counter.py",
        ".mul(_STEPS_PER_UNIT).round_()",
        ".mul(_STEPS_PER_UNIT)",
        "tests/routing",
    ),
    Break(
        "the expert that crosses top_p is in",
        "routing/policy.py",
        "math.fsum(scores[e] for e in picked) >= top_p",
        "math.fsum(scores[e] for e in [*picked, expert]) >= top_p",
        "tests/routing",
    ),
    Break(
        "ties break by expert id",
        "routing/policy.py",
        "(-scores[expert], expert)",
        "(-scores[expert], -expert)",
        "tests/routing",
    ),
    Break(
        "only whole checkpoints are resumed",
        "training/checkpoints.py",
        'checkpoints.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{_MARKER}")',
        'checkpoints.glob(f"{PREFIX_CHECKPOINT_DIR}-*/README.md")',
        "tests/training/test_run.py",
    ),
    Break(
        "a run is resumed as it was",
        "training/folder.py",
        "    if different:\n",
        "    if False:\n",
        "tests/training/test_run.py",
    ),
    Break(
        "a folder that holds a run is not written over",
        "training/folder.py",
        "        if folder.config.exists():\n",
        "        if False:\n",
        "tests/training/test_run.py",
    ),
)


def main(numbers: list[int]) -> int:
    """Run those breaks, or all; how many were not noticed."""
    unnoticed = 0
    for number, one in enumerate(BREAKS):
        if not numbers or number in numbers:
            noticed = is_noticed(one)
            unnoticed += not noticed
            print(f"{number:3} {'a test failed' if noticed else 'NO TEST FAILED'}: {one.what}", flush=True)
    return unnoticed


def is_noticed(one: Break) -> bool:
    """Whether a test fails on sources that are broken so."""
    with tempfile.TemporaryDirectory(prefix="metier-broken-") as folder:
        sources = Path(folder) / "src"
        shutil.copytree(ROOT / "src", sources, ignore=shutil.ignore_patterns("__pycache__"))
        path = sources / "metier" / one.path
        text = path.read_text(encoding="utf-8")
        if one.before not in text:
            raise SystemExit(f"{one.path}: has no longer {one.before!r}; change the line of BREAKS on {one.what!r}.")
        path.write_text(text.replace(one.before, one.after), encoding="utf-8")
        words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *one.tests.split()]
        done = subprocess.run(
            words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(sources)}, capture_output=True, text=True, check=False
        )
    if done.returncode not in (0, 1):
        raise SystemExit(f"{one.what}: the tests could not be run:\n{done.stdout}{done.stderr}")
    return done.returncode == 1


if __name__ == "__main__":
    sys.exit(1 if main([int(word) for word in sys.argv[1:]]) else 0)
