"""The task `synopsis`: a package's long English description to its synopsis, the one line that lists show.

    PYTHONPATH=recipes/embedded python -m tasks.synopsis --cache CACHE

Left out: synopses that stand word for word in the long description (copying is another task), and long descriptions
that say nothing about the package itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from corpus import normalise
from packages import Package

from tasks.build import TRANSITIONAL, Candidate, TaskSize, chosen_candidates, parse_arguments, split_by_source, write

SIZE = TaskSize(train=1500, validation=200, test=300, max_per_source=3, max_tokens=130)
MIN_CHARS = 120
MIN_WORDS = 3
BOILERPLATE = re.compile(r"packaged by debcargo|haskell programming language", re.IGNORECASE)
"""Long descriptions that are the same, name apart, for hundreds of packages."""


def candidates(packages: Iterable[Package]) -> Iterator[Candidate]:
    """The whole long description, to the synopsis."""
    for package in packages:
        if package.use != "synopsis":
            continue
        description = package.descriptions["en"]
        text = "\n\n".join(description.paragraphs)
        is_copied = normalise(description.synopsis) in normalise(text)
        is_short = len(text) < MIN_CHARS or len(description.synopsis.split()) < MIN_WORDS
        is_empty = TRANSITIONAL.search(f"{description.synopsis}\n{text}") or BOILERPLATE.search(text)
        if not is_copied and not is_short and not is_empty:
            yield Candidate(text=text, answer=description.synopsis, origin=package.source)


def main() -> None:
    """Write the task's files."""
    cache, output = parse_arguments(__doc__)
    write(
        output / "synopsis",
        split_by_source(chosen_candidates(cache, candidates, SIZE), SIZE),
        metrics=("rouge_l", "exact_match"),
        description="A Debian package's long English description to its one-line synopsis.",
        max_new_tokens=40,
    )


if __name__ == "__main__":
    main()
