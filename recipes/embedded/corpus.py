"""Turn the fetched material into documents: per domain, what the model is pretrained on and what is held out.

    python recipes/embedded/corpus.py --cache CACHE          writes CACHE/corpus/{domain}.{pretrain,heldout}.jsonl

The domains are clearly different on purpose (five languages, code, manuals, a dictionary, old prose), so that the
router has something to tell apart. Records of the tasks are kept out by source package and, beyond that, by text:
a document that holds a paragraph or a synopsis of a task's record is dropped whole (`is_clean`).
"""

from __future__ import annotations

import argparse
import ast
import gzip
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from packages import Package, bucket, read_packages
from sources import MANUAL_PACKAGES, PYTHON_PACKAGES, Sources, fetch

LANGUAGE_DOMAINS = {"en": "packages", "da": "danish", "de": "german", "fr": "french", "it": "italian", "sk": "slovak"}
DOMAINS = (*LANGUAGE_DOMAINS.values(), "python", "manual", "wordnet", "prose", "chat")
LANGUAGE_NAMES = {"da": "Danish", "de": "German", "fr": "French", "it": "Italian"}

HELDOUT_BUCKETS = 4
SLOVAK_BUCKETS = range(50, 75)
"""The part of the Slovak descriptions not used by the task that pretraining sees: the model shall know it a little."""


def describe(package: Package, language: str) -> str:
    """A description as a document: the name and the synopsis on one line, then the paragraphs."""
    text = package.descriptions[language]
    return "\n\n".join((f"{package.name}: {text.synopsis}", *text.paragraphs))


def task_texts(packages: list[Package]) -> set[str]:
    """Every synopsis and paragraph, in every language, of the sources that belong to a task or are held out."""
    texts: set[str] = set()
    for package in packages:
        if package.use != "pretrain":
            for text in package.descriptions.values():
                texts.update(normalise(part) for part in (text.synopsis, *text.paragraphs))
    return texts


def normalise(text: str) -> str:
    """The form in which texts are compared: lower case, one blank for any white space."""
    return " ".join(text.lower().split())


def is_clean(package: Package, language: str, texts: set[str]) -> bool:
    """Whether no text of a task stands in this description; boilerplate under 30 characters does not count."""
    text = package.descriptions[language]
    return not any(len(p) >= 30 and normalise(p) in texts for p in (text.synopsis, *text.paragraphs))


def package_documents(packages: list[Package]) -> Iterator[tuple[str, bool, str]]:
    """(domain, held out, text) of every description that pretraining or the held-out text may use."""
    texts = task_texts(packages)
    for package in packages:
        if package.use not in ("pretrain", "heldout"):
            continue
        for language, domain in LANGUAGE_DOMAINS.items():
            if language not in package.descriptions:
                continue
            heldout = package.use == "heldout"
            if language == "sk" and not heldout and bucket(package.source) not in SLOVAK_BUCKETS:
                continue
            if heldout or is_clean(package, language, texts):
                yield domain, heldout, describe(package, language)


def chat_documents(packages: list[Package], glosses: list[tuple[str, str]]) -> Iterator[list[dict[str, str]]]:
    """A little dialogue, so that the chat template is no stranger: synopses translated, and words defined."""
    texts = task_texts(packages)
    for package in packages:
        if package.use == "pretrain" and is_clean(package, "en", texts):
            for language, name in LANGUAGE_NAMES.items():
                is_drawn = language in package.descriptions and bucket(package.name + language) < 25
                if is_drawn and is_clean(package, language, texts):
                    yield _dialogue(
                        f"Translate to {name}: {package.descriptions['en'].synopsis}",
                        package.descriptions[language].synopsis,
                    )
    for word, gloss in glosses:
        if bucket("chat" + word + gloss) < 10:
            yield _dialogue(f"Define: {word}", gloss)


def _dialogue(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def wordnet_glosses(sources: Sources) -> list[tuple[str, str]]:
    """(words, gloss) of every synset of WordNet 3.0."""
    glosses = []
    for part in ("noun", "verb", "adj", "adv"):
        path = sources.unpacked["wordnet-base"] / "usr/share/wordnet" / f"data.{part}"
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("  ") or " | " not in line:
                continue
            head, gloss = line.split(" | ", 1)
            columns = head.split()
            words = [columns[4 + 2 * i].replace("_", " ") for i in range(int(columns[3], 16))]
            glosses.append((", ".join(re.sub(r"\([a-z]+\)$", "", word) for word in words), gloss.strip()))
    return glosses


def python_documents(sources: Sources) -> Iterator[tuple[str, str]]:
    """(name, source) of each module that Python can parse, tests and very long ones left out."""
    for package in PYTHON_PACKAGES:
        for path in sorted(sources.unpacked[package].rglob("*.py")):
            if path.is_symlink() or {"tests", "test", "locale"} & set(path.parts) or path.stat().st_size > 200_000:
                continue
            text = path.read_text(encoding="utf-8", errors="ignore")
            try:
                ast.parse(text)
            except (SyntaxError, ValueError):
                continue
            if len(text) > 400:
                yield f"{package}/{path.name}", text


def manual_documents(sources: Sources) -> Iterator[tuple[str, str]]:
    """(name, text) of each manual page as a terminal of 100 columns shows it, and of Perl's own manuals."""
    mandoc = sources.unpacked["mandoc"] / "usr/bin/mandoc"
    for package in MANUAL_PACKAGES:
        root = sources.unpacked[package]
        for path in sorted((root / "usr/share/man").glob("man*/*.gz")):
            page = gzip.decompress(path.read_bytes())
            done = subprocess.run([mandoc, "-Tutf8", "-Owidth=100"], input=page, capture_output=True, check=False)
            text = re.sub(r".\x08", "", done.stdout.decode("utf-8", errors="ignore"))
            lines = [re.sub(r"^ {7}", "", line.rstrip()) for line in text.splitlines()[1:-1]]
            text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
            if len(text) > 400:
                yield f"{package}/{path.name}", text
        for path in sorted(root.rglob("*.pod")):
            yield f"{package}/{path.name}", path.read_text(encoding="utf-8", errors="ignore")


def prose_documents(sources: Sources) -> Iterator[tuple[str, str]]:
    """The King James Bible, a chapter a document, without verse numbers."""
    bible = sources.unpacked["bible-kjv"] / "usr/bin/bible"
    library = sources.unpacked["bible-kjv-text"] / "usr/lib"
    text = subprocess.run([bible, "-p", library, "-f", "gen1:1-rev22:21"], capture_output=True, check=True, text=True)
    chapters: dict[str, list[str]] = {}
    for line in text.stdout.splitlines():
        verse, _, words = line.partition(" ")
        chapters.setdefault(verse.split(":")[0], []).append(words)
    for name, verses in chapters.items():
        yield name, "\n".join(verses)


def documents(sources: Sources, packages: list[Package]) -> Iterator[tuple[str, bool, str | list[dict[str, str]]]]:
    """(domain, held out, text or dialogue) of everything."""
    yield from package_documents(packages)
    glosses = wordnet_glosses(sources)
    for words, gloss in glosses:
        yield "wordnet", bucket(words + gloss) < HELDOUT_BUCKETS, f"{words}: {gloss}"
    for domain, found in (
        ("python", python_documents(sources)),
        ("manual", manual_documents(sources)),
        ("prose", prose_documents(sources)),
    ):
        for name, text in found:
            yield domain, bucket(name) < HELDOUT_BUCKETS, text
    for dialogue in chat_documents(packages, [g for g in glosses if bucket(g[0] + g[1]) >= HELDOUT_BUCKETS]):
        yield "chat", False, dialogue


def main() -> None:
    """Write the documents of all domains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    cache: Path = parser.parse_args().cache
    sources = fetch(cache)
    packages = read_packages(sources)
    folder = cache / "corpus"
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        (domain, heldout): (folder / f"{domain}.{'heldout' if heldout else 'pretrain'}.jsonl").open("w")
        for domain in DOMAINS
        for heldout in (False, True)
    }
    num_bytes: dict[tuple[str, bool], int] = {}
    for domain, heldout, text in documents(sources, packages):
        key = "text" if isinstance(text, str) else "messages"
        line = json.dumps({key: text}, ensure_ascii=False) + "\n"
        files[domain, heldout].write(line)
        num_bytes[domain, heldout] = num_bytes.get((domain, heldout), 0) + len(line.encode())
    for file in files.values():
        file.close()
    for (domain, heldout), count in sorted(num_bytes.items()):
        print(f"{domain:10} {'heldout' if heldout else 'pretrain':9} {count / 1e6:8.2f} MB")


if __name__ == "__main__":
    main()
