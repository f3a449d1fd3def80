"""Check that pretraining has seen nothing of the tasks' records and of the general text; fail with a list if it has.

    python recipes/embedded/check_heldout.py --cache CACHE

Three things are checked: each record's source package belongs to the record's task and to no other use; no long
answer and no long paragraph of a prompt stands anywhere in what pretraining read, in any domain (`hidden_texts` says
what is long); and neither does a long paragraph of the held-out general text, nor a context of the cloze test.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from corpus import DOMAINS, normalise
from general import SEPARATOR, long_paragraphs
from leaks import sought, standing_in
from packages import use_of
from tasks.build import EMBEDDED, INSTRUCTIONS, SPLITS, hidden_texts, pretraining_documents


def task_records(embedded: Path) -> Iterator[tuple[str, str, str, str]]:
    """(task, source package, prompt without its instruction, answer) of every record that ships."""
    for task, instruction in INSTRUCTIONS.items():
        for split in SPLITS:
            for line in (embedded / "tasks" / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                prompt, answer = (message["content"] for message in record["messages"])
                yield task, record["origin"], prompt.removeprefix(instruction), answer


def misplaced(embedded: Path) -> list[str]:
    """The records whose source package belongs to another use."""
    return [
        f"{task}: {origin} belongs to {use}"
        for task, origin, _, _ in task_records(embedded)
        if (use := use_of(origin, has_slovak=task == "translate")) != task
    ]


def held_out_texts(embedded: Path) -> Iterator[tuple[str, str]]:
    """(where it stands, text) of everything that pretraining must not have seen."""
    for task, origin, text, answer in task_records(embedded):
        for hidden in hidden_texts(text, answer):
            yield f"{task}, {origin}", hidden
    for path in sorted((embedded / "general").glob("*.txt")):
        for document in path.read_text(encoding="utf-8").split(SEPARATOR):
            for paragraph in long_paragraphs(document):
                yield f"general, {path.name}", paragraph
    for line in (embedded / "general" / "cloze.jsonl").read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        yield f"cloze, {item['domain']}", normalise(f"{item['context']} {item['options'][item['answer']]}")


def leaked(embedded: Path, documents: Iterable[str]) -> list[str]:
    """The held-out texts that stand in the documents, each with its place."""
    texts = list(held_out_texts(embedded))
    seen = standing_in(documents, sought(text for _, text in texts))
    return [f"{where}: {text[:100]!r}" for where, text in texts if text in seen]


def main() -> None:
    """Print what is wrong, if anything is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="the folder that corpus.py wrote to")
    parser.add_argument("--embedded", type=Path, default=EMBEDDED, help="default: the package's own data")
    arguments = parser.parse_args()
    wrong = misplaced(arguments.embedded)
    wrong += leaked(arguments.embedded, pretraining_documents(arguments.cache))
    if wrong:
        sys.exit("\n".join((f"pretraining has seen {len(wrong)} held-out texts:", *wrong)))
    num_texts = sum(1 for _ in held_out_texts(arguments.embedded))
    print(f"none of {num_texts} held-out texts stands in the {len(DOMAINS)} domains of pretraining")


if __name__ == "__main__":
    main()
