"""The task `sections`: an English package description to JSON with the package's section and role.

    PYTHONPATH=recipes/embedded python -m tasks.sections --cache CACHE

The section is Debian's own. The role has the vocabulary of Debian's `role::` tags, but not their values: two thirds of
the packages have none, and like packages have different ones (a Perl module is `shared-lib` here and `devel-lib`
there). It follows from the package's name by Debian's naming rules instead (`libfoo-dev`, `python3-foo`, `foo-doc`);
the name is not in the prompt, so it has to be read off the description. What no rule decides is left out.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from packages import Package

from tasks.build import (
    TRANSITIONAL,
    Candidate,
    Splits,
    TaskSize,
    chosen_candidates,
    parse_arguments,
    split_by_source,
    write,
)

SIZE = TaskSize(train=1500, validation=200, test=300, max_per_source=4, max_tokens=150)
MAX_PER_ANSWER = 160
"""So that no answer is common enough to be worth guessing."""
MIN_PER_ANSWER = 6
"""An answer that is rarer cannot be learned, only missed."""

MIN_CHARS = 100
NO_PROGRAM = re.compile(
    r"plug-?ins?|extensions?|add-?ons?|modules?|librar(y|ies)|data|documentation|themes?|meta-?package", re.IGNORECASE
)
"""A synopsis with such a word is left out where only the section speaks for a program."""

ROLE_RULES = (
    ("documentation", re.compile(r"-(doc|docs|manual)$")),
    ("debug-symbols", re.compile(r"-(dbg|dbgsym)$")),
    ("devel-lib", re.compile(r"-dev$")),
    ("data", re.compile(r"^(fonts|xfonts|ttf|dict|aspell|hunspell|myspell|hyphen)-|-(data|common|l10n|i18n|themes?)$")),
    ("module", re.compile(r"^(python3|ruby|node|r-cran|r-bioc|r-other|php|lua|cl|gir1\.2|libjs)-")),
    ("module", re.compile(r"^lib.+-(perl|java|clojure|ocaml|guile)$")),
    ("plugin", re.compile(r"-plugins?(-|$)|^(gimp|collectd|nagios|gedit|vim|elpa|xul-ext|webext)-.+|-el$")),
)
"""First match wins; the names of Debian's packages follow its policy and the policies of its language teams."""
PROGRAM_SECTIONS = (
    *("admin", "comm", "database", "devel", "editors", "electronics", "games", "gnome", "graphics", "hamradio"),
    *("httpd", "interpreters", "kde", "mail", "math", "misc", "net", "news", "otherosfs", "science", "shells"),
    *("sound", "text", "utils", "vcs", "video", "web", "x11", "xfce"),
)


def role_of(package: Package) -> str | None:
    """The role that a package's name and section imply, or None where they leave it open."""
    if package.section == "doc":
        return "documentation"
    for role, pattern in ROLE_RULES:
        if pattern.search(package.name):
            return role
    if package.section == "libs" and package.name.startswith("lib"):
        return "shared-lib"
    if package.section in ("fonts", "localization"):
        return "data"
    if package.section == "metapackages":
        return "metapackage"
    roles = {tag for tag in package.tags if tag.startswith("role::")}
    if roles == {"role::program"}:
        return "program"
    is_likely = not roles and not NO_PROGRAM.search(package.descriptions["en"].synopsis)
    return "program" if is_likely and package.section in PROGRAM_SECTIONS else None


def candidates(packages: Iterable[Package]) -> Iterator[Candidate]:
    """Synopsis and whole long description, to section and role."""
    for package in packages:
        role = role_of(package)
        if package.use != "sections" or role is None:
            continue
        description = package.descriptions["en"]
        text = "\n\n".join((description.synopsis, *description.paragraphs))
        if len(text) >= MIN_CHARS and not TRANSITIONAL.search(text):
            answer = json.dumps({"section": package.section, "role": role}, separators=(",", ":"))
            yield Candidate(text=text, answer=answer, origin=package.source)


def balanced(chosen: Sequence[Candidate]) -> list[Candidate]:
    """Without answers that are too rare, and no more than MAX_PER_ANSWER records of any other."""
    total = Counter(candidate.answer for candidate in chosen)
    taken: Counter[str] = Counter()
    kept = []
    for candidate in chosen:
        if total[candidate.answer] >= MIN_PER_ANSWER and taken[candidate.answer] < MAX_PER_ANSWER:
            taken[candidate.answer] += 1
            kept.append(candidate)
    return kept


def majority_baseline(splits: Splits) -> float:
    """Exact match on the test split, in percent, of always giving the commonest answer of the training split."""
    ((commonest, _),) = Counter(candidate.answer for candidate in splits["train"]).most_common(1)
    return 100 * sum(candidate.answer == commonest for candidate in splits["test"]) / len(splits["test"])


def main() -> None:
    """Write the task's files."""
    cache, output = parse_arguments(__doc__)
    splits = split_by_source(balanced(chosen_candidates(cache, candidates, SIZE)), SIZE)
    num_answers = len({candidate.answer for candidate in splits["train"]})
    write(
        output / "sections",
        splits,
        metrics=("json_exact_match",),
        description=(
            f"A Debian package's English description to JSON with its section and role, {num_answers} different "
            f"answers. Always giving the commonest answer scores {majority_baseline(splits):.1f}."
        ),
        max_new_tokens=24,
    )


if __name__ == "__main__":
    main()
