"""The recipe's scripts import each other by name, as they do when they are run; made-up packages to run them on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "embedded"
sys.path.append(str(RECIPE))

from packages import Description, Package, bucket  # noqa: E402

MakePackage = Callable[..., Package]


def source_in(buckets: range, *, number: int = 0) -> str:
    """The `number`th made-up source name whose bucket is one of these."""
    names = (f"source-{count}" for count in range(100_000))
    return [name for name, _ in zip((n for n in names if bucket(n) in buckets), range(number + 1), strict=False)][-1]


@pytest.fixture
def make_package() -> MakePackage:
    def make(
        source: str,
        *paragraphs: str,
        synopsis: str = "a made-up tool that does nothing at all",
        name: str | None = None,
        section: str = "utils",
        tags: tuple[str, ...] = (),
        **translations: tuple[str, ...],
    ) -> Package:
        descriptions = {"en": Description(synopsis, paragraphs)}
        for language, (first, *rest) in translations.items():
            descriptions[language] = Description(first, tuple(rest))
        return Package(name or source, source, section, tags, descriptions)

    return make
