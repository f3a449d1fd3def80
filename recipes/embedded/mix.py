"""Write the general records that a run may mix into its task's: a little of everything the model was pretrained on.

    python recipes/embedded/mix.py --cache CACHE        writes src/metier/embedded/general/mix.jsonl

Every domain gives as many records, dialogues as `messages` and the rest as `text` of at most 700 characters. They come
from the pretraining text alone, so measuring forgetting on the held-out text stays fair.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from corpus import DOMAINS

OUTPUT = Path(__file__).parents[2] / "src" / "metier" / "embedded" / "general" / "mix.jsonl"
RECORDS_PER_DOMAIN = 150
MAX_CHARACTERS = 700
SEED = 5


def records(cache: Path, domain: str) -> list[dict[str, object]]:
    """A fixed sample of one domain, long texts cut at the last line that fits."""
    lines = (cache / "corpus" / f"{domain}.pretrain.jsonl").read_text(encoding="utf-8").splitlines()
    chosen: list[dict[str, object]] = []
    for line in random.Random(f"{SEED} {domain}").sample(lines, len(lines)):
        record = json.loads(line)
        if "text" in record:
            text = record["text"]
            record["text"] = text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS].rpartition("\n")[0]
            if len(record["text"]) < 60:
                continue
        chosen.append(record)
        if len(chosen) == RECORDS_PER_DOMAIN:
            break
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    cache: Path = parser.parse_args().cache
    chosen = [record for domain in DOMAINS for record in records(cache, domain)]
    random.Random(SEED).shuffle(chosen)
    OUTPUT.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in chosen), encoding="utf-8")
    print(f"{OUTPUT}: {len(chosen)} records, {OUTPUT.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
