"""Debian's package descriptions as records: who they belong to, and which part of the project may see them.

A source package goes, whole and in every language, to exactly one use: pretraining, one of the three tasks, or the
held-out text. So no sibling binary package (`libfoo1`, `libfoo-dev`) carries a task's text into pretraining.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from sources import Sources

Use = Literal["pretrain", "sections", "synopsis", "translate", "heldout"]

_FIELD = re.compile(r"^([A-Za-z0-9-]+):[ ]?(.*(?:\n[ \t].*)*)", re.MULTILINE)


@dataclass(frozen=True)
class Description:
    """One package's description in one language: the synopsis and the paragraphs of the long text."""

    synopsis: str
    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class Package:
    """A binary package: its source, its place in the archive, and its description in each language it has."""

    name: str
    source: str
    section: str
    tags: tuple[str, ...]
    descriptions: dict[str, Description] = field(default_factory=dict)

    @property
    def use(self) -> Use:
        """The only part of the project that may see this package."""
        return use_of(self.source, has_slovak="sk" in self.descriptions)


def bucket(text: str) -> int:
    """A stable number in [0, 100) for a text, by which everything is split."""
    return int.from_bytes(hashlib.sha256(f"metier:{text}".encode()).digest()[:4], "big") % 100


def use_of(source: str, *, has_slovak: bool) -> Use:
    """To which use a source package goes. Sources described in Slovak are few, and serve the translation task."""
    number = bucket(source)
    if number < 4:
        return "heldout"
    if has_slovak:
        return "translate" if number < 50 else "pretrain"
    if number < 14:
        return "sections"
    return "synopsis" if number < 24 else "pretrain"


def _description(text: str) -> Description:
    """Unfold Debian's format: the first line is the synopsis, ' .' parts paragraphs, two blanks keep the line."""
    synopsis, *lines = text.split("\n")
    paragraphs: list[str] = []
    current = ""
    for line in lines:
        body = line[1:]
        if body.strip() == ".":
            paragraphs.append(current)
            current = ""
        elif body.startswith((" ", "\t", "* ", "- ")) and current:
            current += "\n" + body.strip()
        else:
            current += (" " if current else "") + body.strip()
    return Description(synopsis.strip(), tuple(p.strip() for p in (*paragraphs, current) if p.strip()))


def read_packages(sources: Sources) -> list[Package]:
    """All packages of the index with their descriptions, sorted by name; one entry a distinct description text."""
    translations: dict[str, dict[str, Description]] = {}
    for language, path in sources.descriptions.items():
        for block in path.read_text(encoding="utf-8").split("\n\n"):
            fields = dict(_FIELD.findall(block))
            if (text := fields.get(f"Description-{language}")) and "<trans>" not in text:
                translations.setdefault(fields["Description-md5"].strip(), {})[language] = _description(text)
    packages: dict[str, Package] = {}
    slovak_sources: set[str] = set()
    for block in sources.packages_index.read_text(encoding="utf-8").split("\n\n"):
        fields = dict(_FIELD.findall(block))
        key = fields.get("Description-md5", "").strip()
        if not key or "en" not in translations.get(key, {}):
            continue
        source = fields.get("Source", fields["Package"]).split(" ")[0]
        tags = tuple(tag.strip() for tag in fields.get("Tag", "").replace("\n", " ").split(",") if tag.strip())
        if "sk" in translations[key]:
            slovak_sources.add(source)
        packages.setdefault(
            key, Package(fields["Package"], source, fields.get("Section", "misc"), tags, translations[key])
        )
    return sorted(_with_one_use(packages.values(), slovak_sources), key=lambda package: package.name)


def _with_one_use(packages: Iterable[Package], slovak_sources: set[str]) -> list[Package]:
    """Drop the packages whose source is used otherwise because a sibling is described in Slovak and they are not."""
    return [p for p in packages if ("sk" in p.descriptions) == (p.source in slovak_sources)]
