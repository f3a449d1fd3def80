"""Where the small model, its tasks, two deltas of it and the held-out general text lie in the package.

Torch-free: only paths, checked, so that asking for what is not there says what is. `docs/embedded.md` describes the
contents; `recipes/embedded/` made them.

```
model/                                    a transformers folder: weights, config, tokenizer, model card
tasks/<name>/{train,validation,test}.jsonl  records with the source package they come from; task.json names the metrics
deltas/<name>/                            a delta of the model, trained on the task of that name
general/<domain>.txt                      held-out text, documents parted by a line `<|endoftext|>`
general/cloze.jsonl                       {"context", "options", "answer", "domain"}
general/mix.jsonl                         text and dialogue of pretraining, to mix into a task's records
```
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from metier.errors import ConfigError, ModelError

__all__ = [
    "SPLITS",
    "cloze_path",
    "delta_names",
    "delta_path",
    "general_domains",
    "general_path",
    "mix_path",
    "model_path",
    "task_names",
    "task_path",
]

ROOT = Path(__file__).parent
SPLITS = ("train", "validation", "test")


def model_path() -> Path:
    """The folder of the embedded model, as `transformers` reads it.

    Raises:
        ModelError: the installation has no model.
    """
    folder = ROOT / "model"
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder}: got no config.json, expected the embedded model there.\n"
            "Reinstall metier, or make the model as recipes/embedded/README.md says."
        )
    return folder


def task_names() -> tuple[str, ...]:
    """The embedded tasks, sorted by name."""
    return tuple(sorted(path.parent.name for path in (ROOT / "tasks").glob("*/task.json")))


def task_path(name: str, split: str) -> Path:
    """The JSONL file of a task's split.

    Args:
        name: one of `task_names()`.
        split: train, validation or test.

    Raises:
        ConfigError: there is no such task or split.
    """
    _check("embedded task", name, task_names())
    _check(f"split of the embedded task {name!r}", split, SPLITS)
    return ROOT / "tasks" / name / f"{split}.jsonl"


def delta_names() -> tuple[str, ...]:
    """The embedded deltas, sorted by name; each is named after the task that it was trained on."""
    return tuple(sorted(path.parent.name for path in (ROOT / "deltas").glob("*/adapter_config.json")))


def delta_path(name: str) -> Path:
    """The folder of a delta of the embedded model, as PEFT and `metier serve` read it.

    Args:
        name: one of `delta_names()`.

    Raises:
        ConfigError: there is no such delta.
    """
    _check("embedded delta", name, delta_names())
    return ROOT / "deltas" / name


def general_domains() -> tuple[str, ...]:
    """The domains with held-out general text, sorted by name; they are those of pretraining but its dialogues."""
    return tuple(sorted(path.stem for path in (ROOT / "general").glob("*.txt")))


def general_path(domain: str | None = None) -> Path:
    """The held-out text of a domain; without a domain the folder that has all of them and the cloze test.

    Raises:
        ConfigError: there is no such domain.
    """
    if domain is None:
        return ROOT / "general"
    _check("embedded domain", domain, general_domains())
    return ROOT / "general" / f"{domain}.txt"


def cloze_path() -> Path:
    """The cloze test: one JSON object a line with context, options, answer (an index) and domain."""
    return ROOT / "general" / "cloze.jsonl"


def mix_path() -> Path:
    """Records of the pretraining domains, as a `general_dataset`: the paper mixes such data 1:1 against forgetting."""
    return ROOT / "general" / "mix.jsonl"


def _check(what: str, got: str, known: Sequence[str]) -> None:
    if got not in known:
        nearest = difflib.get_close_matches(got, known, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ConfigError(f"unknown {what}: got {got!r}, expected one of {', '.join(known)}.{hint}")
