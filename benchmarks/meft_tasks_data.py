"""The tasks of `meft_tasks.py`: what is trained and tested on, and how a reply is scored."""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from metier.evaluation.final_number import gsm8k

DATA = Path(__file__).parents[2] / "shared" / "data"
TASKS = ("squad", "nq", "tool", "gsm8k")
NUM_TRAIN = {"squad": 1500, "nq": 400, "tool": 400, "gsm8k": 200}
NUM_VALIDATION = 100
NUM_TEST = {"squad": 500, "nq": 500, "tool": 1000, "gsm8k": 100}
MAX_NEW_TOKENS = {"squad": 24, "nq": 24, "tool": 64, "gsm8k": 224}
SYSTEM = {
    "squad": "Answer with a short phrase.",
    "nq": "Answer with a short phrase.",
    "tool": "Answer with one call of torch.hub.load.",
    "gsm8k": "Solve the problem step by step. End with the line 'The answer is: ' and the number.",
}

Question = tuple[str, str, tuple[str, ...]]
"""A question, the answer to train on, and every answer that counts."""


@dataclass(frozen=True)
class Split:
    """The questions of a task, parted for good: the same ones for every side and seed."""

    task: str
    train: list[Question]
    validation: list[Question]
    test: list[Question]

    @property
    def max_new_tokens(self) -> int:
        return MAX_NEW_TOKENS[self.task]

    @property
    def golds(self) -> list[tuple[str, ...]]:
        return [golds for _, _, golds in self.test]

    def records(self) -> dict[str, list[dict]]:
        """Conversations of each part."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {part: [self._record(*question) for question in questions] for part, questions in parts.items()}

    def _record(self, question: str, answer: str, _: tuple[str, ...]) -> dict:
        turns = (("system", SYSTEM[self.task]), ("user", question), ("assistant", answer))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}


def load_split(task: str) -> Split:
    """A task's questions after a shuffle that is the same every time."""
    trained, tested = _QUESTIONS[task]()
    random.Random(0).shuffle(trained)
    if tested:
        random.Random(0).shuffle(tested)
    else:
        tested = trained[: NUM_TEST[task]]
        trained = trained[NUM_TEST[task] :]
    known = {question for question, _, _ in tested}
    trained = [question for question in trained if question[0] not in known]
    return Split(
        task,
        train=trained[NUM_VALIDATION : NUM_VALIDATION + NUM_TRAIN[task]],
        validation=trained[:NUM_VALIDATION],
        test=tested[: NUM_TEST[task]],
    )


def _json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _open_questions(*names: str) -> list[Question]:
    rows = [row for name in names for row in _json_lines(DATA / name)]
    return [(row["question"], row["answer"][0], tuple(row["answer"])) for row in rows]


def _natural_questions() -> tuple[list[Question], list[Question]]:
    return _open_questions("nq_open/NQ-open.dev.jsonl"), _open_questions("nq_open/NQ-open.efficientqa.test.1.1.jsonl")


def _squad() -> tuple[list[Question], list[Question]]:
    return _open_questions("closedbook_qa/squad_dev.jsonl"), []


def _torch_hub() -> tuple[list[Question], list[Question]]:
    return _calls("torchhub_train.json"), _calls("torchhub_eval.json")


def _calls(name: str) -> list[Question]:
    found: list[Question] = []
    for row in _json_lines(DATA / "gorilla_tools" / name):
        said = re.search(r"Instruction'?:\s*(.*?)(?:,?\s*'Output'|\s*###\s*Output)", row["code"], re.DOTALL)
        assert said is not None, f"{name}: a record without an instruction"
        found.append((said.group(1).strip(), row["api_call"], (row["api_call"],)))
    return found


def _gsm8k() -> tuple[list[Question], list[Question]]:
    return _problems("train.jsonl"), _problems("test.jsonl")


def _problems(name: str) -> list[Question]:
    found: list[Question] = []
    for row in _json_lines(DATA / "gsm8k" / name):
        # the calculator's marks, which the set has for models that have a calculator
        steps, number = re.sub(r"<<.*?>>", "", row["answer"]).split("\n#### ")
        found.append((row["question"], f"{steps}\nThe answer is: {number}", (number.replace(",", ""),)))
    return found


_QUESTIONS: dict[str, Callable[[], tuple[list[Question], list[Question]]]] = {
    "squad": _squad,
    "nq": _natural_questions,
    "tool": _torch_hub,
    "gsm8k": _gsm8k,
}


def normalised(text: str) -> str:
    """As SQuAD's own evaluation: lower case, no punctuation, no articles, single spaces."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(reply: str, golds: Sequence[str]) -> float:
    return float(normalised(reply) in {normalised(gold) for gold in golds})


def contains(reply: str, golds: Sequence[str]) -> float:
    """Whether the words of an answer stand in the reply one behind another."""
    words = f" {normalised(reply)} "
    return float(any(f" {answer} " in words for gold in golds if (answer := normalised(gold))))


def call_iou(reply: str, golds: Sequence[str]) -> float:
    """Intersection over union of the first three arguments: repository, model, whether it is pretrained.

    Those of the reply's first call of `torch.hub.load`, up to the bracket that closes it; names of arguments, quotes
    and white space do not count. A reply that is cut inside the call has the arguments that it wrote.
    """
    said, wanted = _arguments(reply), _arguments(golds[0])
    return len(said & wanted) / len(said | wanted) if said | wanted else 0.0


def same_call(reply: str, golds: Sequence[str]) -> float:
    return float(call_iou(reply, golds) == 1.0)


def _arguments(text: str) -> frozenset[str]:
    _, call, rest = text.partition("torch.hub.load(")
    if not call:
        return frozenset()
    depth, pieces = 0, [""]
    for letter in rest:
        if letter == ")" and not depth:
            break
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            pieces.append("")
        else:
            pieces[-1] += letter
    named = (re.sub(r"^(repo_or_dir|model|pretrained)\s*=\s*", "", piece.strip()) for piece in pieces[:3])
    return frozenset(piece.strip("'\"") for piece in named if piece)


def same_number(reply: str, golds: Sequence[str]) -> float:
    """Whether the reply ends in the answer, as the metric `gsm8k` reads it."""
    return gsm8k([reply], golds).items[0] / 100


Score = Callable[[str, Sequence[str]], float]
SCORES: dict[str, dict[str, Score]] = {
    "squad": {"exact match": exact_match, "containment": contains},
    "nq": {"exact match": exact_match, "containment": contains},
    "tool": {"API IoU": call_iou, "same call": same_call},
    "gsm8k": {"answer": same_number},
}
