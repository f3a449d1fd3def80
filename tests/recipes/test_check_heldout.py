"""The guard finds what leaked, and nothing that ships has leaked."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from check_heldout import held_out_texts, leaked, misplaced
from tasks.build import EMBEDDED, INSTRUCTIONS, pretraining_documents

from .conftest import source_in

CACHE = os.environ.get("METIER_RECIPE_CACHE")
PARAGRAPH = "This paragraph of the prompt is long enough that nobody writes it twice."
ANSWER = "an answer of more than thirty characters"
HELDOUT = "This paragraph of the held-out text is long enough that nobody writes it twice."
ITEM = {"context": "the quick brown fox jumps over the", "options": ["lazy dog", "big hare"], "answer": 0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    buckets = {"sections": range(4, 14), "synopsis": range(14, 24), "translate": range(4, 50)}
    for task, instruction in INSTRUCTIONS.items():
        (tmp_path / "tasks" / task).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            record = {
                "messages": [
                    {"role": "user", "content": f"{instruction}{split}\n\n{PARAGRAPH}"},
                    {"role": "assistant", "content": ANSWER},
                ],
                "origin": source_in(buckets[task]),
            }
            (tmp_path / "tasks" / task / f"{split}.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    (tmp_path / "general").mkdir()
    (tmp_path / "general" / "prose.txt").write_text(f"short\n<|endoftext|>\nfirst\n\n{HELDOUT}\n", encoding="utf-8")
    (tmp_path / "general" / "cloze.jsonl").write_text(json.dumps({**ITEM, "domain": "prose"}), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("document", "where"),
    [
        (f"before {PARAGRAPH.upper()} after", "sections"),
        (f"before\n{ANSWER}\nafter", "translate"),
        (f"before {HELDOUT}", "general, prose.txt"),
        ("the quick brown fox jumps over the lazy dog", "cloze, prose"),
    ],
)
def test_a_leak_is_found_wherever_it_came_from(folder: Path, document: str, where: str) -> None:
    assert leaked(folder, ["a clean document, long enough to be looked at"]) == []
    assert any(leak.startswith(where) for leak in leaked(folder, ["a clean document", document]))


def test_a_record_of_a_foreign_source_is_found(folder: Path) -> None:
    assert misplaced(folder) == []
    path = folder / "tasks" / "sections" / "test.jsonl"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["origin"] = source_in(range(24, 100))
    path.write_text(json.dumps(record), encoding="utf-8")
    assert misplaced(folder) == [f"sections: {record['origin']} belongs to pretrain"]


def test_every_shipped_record_comes_from_a_source_of_its_task() -> None:
    assert misplaced(EMBEDDED) == []
    assert sum(1 for _ in held_out_texts(EMBEDDED)) > 10_000


@pytest.mark.slow
@pytest.mark.skipif(CACHE is None, reason="METIER_RECIPE_CACHE does not name the cache folder that corpus.py wrote to")
def test_nothing_that_ships_stands_in_pretraining() -> None:
    assert CACHE is not None
    assert leaked(EMBEDDED, pretraining_documents(Path(CACHE))) == []
