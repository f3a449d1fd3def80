"""What the soak on Ray is about: sixteen ESFT deltas of the embedded model, questions, and their right answers.

The right answers are those of the models that PEFT merges, each alone and in float32, by transformers' own `generate`.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from serving_deltas import embedded_deltas
from serving_soak_answers import Question, Right, right_answer
from serving_soak_world import make_questions, merged

BASE = "embedded"
_MOST, _PROMPT_TOKENS, _ANSWER_TOKENS = 60, 96, 10
"""Of the embedded tasks' questions, short ones with short answers: what is asked here is where requests go."""
STEP = 0.1
"""By which a value moves on average: far enough for each delta to answer otherwise than all others."""


@dataclass
class RayWorld:
    folder: Path
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each delta as it is served, by name."""
    questions: list[Question] = field(default_factory=list)
    rights: dict[tuple[str, int], Right] = field(default_factory=dict)
    """By model and question's number; none where it hangs on a rounding."""

    @property
    def names(self) -> list[str]:
        return list(self.sizes)


def make_ray_world(folder: Path, num_deltas: int, num_questions: int) -> RayWorld:
    """Deltas in `folder`, and the right answers; those that are there are taken."""
    kept = folder / "answers.json"
    if not kept.exists():
        _make(folder, num_deltas, num_questions, kept)
    values = json.loads(kept.read_text())
    world = RayWorld(
        folder,
        values["sizes"],
        [Question(**question) for question in values["questions"]],
        {(name, number): Right(**right) for name, number, right in values["rights"]},
    )
    assert (len(world.sizes), len(world.questions)) == (num_deltas, num_questions), f"{kept}: take another folder"
    return world


def _make(folder: Path, num_deltas: int, num_questions: int, kept: Path) -> None:
    from metier.serving.delta_source import read_served_delta
    from metier.serving.model_facts import model_facts

    base = embedded_deltas(folder, num_deltas, step=STEP)
    base.model.eval()
    facts = model_facts(base.model, base.source)
    names = [f"delta-{number:02d}" for number in range(num_deltas)]
    short = [
        question for question in make_questions(base.tokenizer, _MOST) if len(question.prompt_ids) <= _PROMPT_TOKENS
    ]
    questions = [replace(each, max_tokens=min(each.max_tokens, _ANSWER_TOKENS)) for each in short[:num_questions]]
    rights = []
    for name in (BASE, *names):
        model = merged(base.model, None if name == BASE else folder / name)
        for question in questions:
            right = right_answer(model, base.tokenizer, question)
            if right is not None:
                rights.append([name, question.number, asdict(right)])
    _check_that_answers_differ([BASE, *names], {(name, number): right["text"] for name, number, right in rights})
    values = {
        "sizes": {name: read_served_delta(folder / name, facts=facts).num_bytes for name in names},
        "questions": [asdict(question) for question in questions],
        "rights": rights,
    }
    kept.write_text(json.dumps(values))


def _check_that_answers_differ(names: list[str], texts: dict[tuple[str, int], str]) -> None:
    """An answer of a wrong delta must be seen: any two say the same to less than half of the questions."""
    for one, other in itertools.combinations(names, 2):
        both = [number for name, number in texts if name == one and (other, number) in texts]
        same = sum(texts[one, number] == texts[other, number] for number in both)
        assert same < len(both) / 2, f"{one} and {other} say the same to {same} of {len(both)} questions"
