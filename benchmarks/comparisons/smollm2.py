"""What the comparison on SmolLM2 needs: the model as a folder, and Snips' utterances as a task, both under runs/.

    python benchmarks/comparisons/smollm2.py && metier compare benchmarks/comparisons/smollm2.yaml

Run from the repository's folder; the data stand beside it in ../shared/data and are no part of it. The task: an
utterance to JSON with its intent and slots. Train and test are Snips' own files for the two; validation is cut off the
training utterances. Utterances are shuffled over the seven intents by a fixed seed.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import smollm2

DATA = Path(__file__).parents[3] / "shared" / "data" / "snips_intent"
FOLDER = Path("runs/smollm2")
SIZES = {"train": 4000, "validation": 100, "test": 300}


def utterances(pattern: str) -> list[dict]:
    """Conversations of the files whose names fit."""
    records = []
    for path in sorted(DATA.glob(pattern)):
        # the training files are not all UTF-8
        for intent, rows in json.loads(path.read_text(encoding="utf-8", errors="replace")).items():
            for row in rows:
                text = "".join(piece["text"] for piece in row["data"]).strip()
                slots = {piece["entity"]: piece["text"].strip() for piece in row["data"] if "entity" in piece}
                reply = json.dumps({"intent": intent, "slots": slots}, ensure_ascii=False)
                turns = (("user", text), ("assistant", reply))
                records.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    random.Random(0).shuffle(records)
    return records


def main() -> None:
    task = FOLDER / "snips"
    task.mkdir(parents=True, exist_ok=True)
    known = utterances("train_*_full.json")
    parts = {"train": known[SIZES["validation"] :], "validation": known, "test": utterances("validate_*.json")}
    for part, records in parts.items():
        lines = [json.dumps(record, ensure_ascii=False) for record in records[: SIZES[part]]]
        (task / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {"name": "snips", "metrics": ["chrf", "json_exact_match"], "max_new_tokens": 64}
    (task / "task.json").write_text(json.dumps(settings), encoding="utf-8")
    if not (FOLDER / "model").exists():
        shutil.copytree(smollm2.as_safetensors(), FOLDER / "model")
    print(f"{task}: {len(known):,} utterances to choose from; the model is {FOLDER / 'model'}")


if __name__ == "__main__":
    main()
