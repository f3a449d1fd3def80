"""From packages to records: what each builder takes, and how records are chosen and split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tasks import sections, synopsis, translate
from tasks.build import Candidate, TaskSize, distinct, hidden_texts, split_by_source, unseen, write

from .conftest import MakePackage, source_in

LONG = "A paragraph that is long enough to be recognised wherever it may stand again."


def candidate(text: str, answer: str = "short", origin: str = "a") -> Candidate:
    return Candidate(text=text, answer=answer, origin=origin)


def test_long_paragraphs_and_long_answers_must_be_hidden() -> None:
    assert hidden_texts(f"synopsis\n\n{LONG}", "short") == [LONG.lower()]
    assert hidden_texts("text", "An answer of thirty characters!") == ["an answer of thirty characters!"]


def test_records_that_pretraining_has_seen_are_dropped() -> None:
    free, seen = candidate(f"one\n\n{LONG}"), candidate("two", "An answer of thirty characters!")
    assert unseen([free, seen], ["it says: AN ANSWER of thirty\ncharacters! and more"]) == [free]
    assert unseen([free, seen], [f"it says: {LONG} and more"]) == [seen]


@pytest.mark.parametrize(
    ("other", "is_kept"),
    [
        (candidate("text 1", origin="b"), False),
        (candidate("another text", origin="b"), True),
        (candidate("another text", "An answer that is long enough to repeat.", origin="b"), False),
        (candidate(f"new\n\n{LONG}", origin="b"), False),
        (candidate(f"new\n\n{LONG}", origin="a"), True),
    ],
)
def test_records_that_say_the_same_are_dropped(other: Candidate, is_kept: bool) -> None:
    first = candidate("text 2", "An answer that is long enough to repeat!"), candidate(f"old\n\n{LONG}")
    assert len(distinct([*first, other], max_per_source=9)) == 2 + is_kept


def test_a_source_gives_only_so_many_records() -> None:
    texts = ("one", "two", "three", "four")
    assert len(distinct([candidate(text) for text in texts], max_per_source=3)) == 3


def test_equal_json_answers_are_no_duplicates() -> None:
    answer = '{"section":"utils","role":"program"}'
    assert len(distinct([candidate("one", answer), candidate("two", answer, "b")], max_per_source=1)) == 2


SIZE = TaskSize(train=40, validation=5, test=10, max_per_source=3, max_tokens=99)


def test_no_source_is_in_two_splits() -> None:
    found = [candidate(f"text {number}", origin=f"source {number // 3}") for number in range(90)]
    splits = split_by_source(found, SIZE)
    origins = [{c.origin for c in candidates} for candidates in splits.values()]
    assert len(set.union(*origins)) == sum(map(len, origins))
    sizes = {split: len(candidates) for split, candidates in splits.items()}
    assert sizes == {"test": 12, "validation": 6, "train": 42}
    assert split_by_source(found[::-1], SIZE).keys() == splits.keys()


def test_too_few_records_are_refused() -> None:
    found = [candidate(f"text {number}", origin=f"source {number}") for number in range(20)]
    with pytest.raises(ValueError, match="split 'train': got 5 records, expected 40"):
        split_by_source(found, SIZE)


def test_records_are_written_as_conversations_with_their_source(tmp_path: Path) -> None:
    splits = {"test": [candidate("a tool", "nástroj", "tool")]}
    write(tmp_path / "translate", splits, metrics=["chrf"], description="d", max_new_tokens=9)
    assert json.loads((tmp_path / "translate" / "test.jsonl").read_text(encoding="utf-8")) == {
        "messages": [
            {"role": "user", "content": "Translate to Slovak: a tool"},
            {"role": "assistant", "content": "nástroj"},
        ],
        "origin": "tool",
    }
    assert json.loads((tmp_path / "translate" / "task.json").read_text(encoding="utf-8")) == {
        "name": "translate",
        "metrics": ["chrf"],
        "description": "d",
        "max_new_tokens": 9,
    }


@pytest.mark.parametrize(
    ("name", "section", "tags", "role"),
    [
        ("libfoo-dev", "libdevel", (), "devel-lib"),
        ("librust-foo-dev", "rust", (), "devel-lib"),
        ("libfoo1", "libs", (), "shared-lib"),
        ("libfoo-perl", "perl", ("role::devel-lib",), "module"),
        ("libdancer-plugin-foo-perl", "perl", (), "module"),
        ("python3-foo", "python", (), "module"),
        ("python-foo-doc", "doc", (), "documentation"),
        ("foo-guide", "doc", (), "documentation"),
        ("foo-data", "games", (), "data"),
        ("fonts-foo", "fonts", (), "data"),
        ("elpa-foo", "lisp", (), "plugin"),
        ("foo", "utils", (), "program"),
        ("foo", "python", ("role::program",), "program"),
        ("foo", "utils", ("role::program", "role::plugin"), None),
        ("foo", "python", (), None),
    ],
)
def test_a_role_follows_from_name_and_section(
    make_package: MakePackage, name: str, section: str, tags: tuple[str, ...], role: str | None
) -> None:
    assert sections.role_of(make_package("foo", name=name, section=section, tags=tags)) == role


def test_a_plugin_in_disguise_has_no_role(make_package: MakePackage) -> None:
    assert sections.role_of(make_package("foo", synopsis="QGIS plug-in for caves")) is None


def test_sections_takes_its_own_packages(make_package: MakePackage) -> None:
    own = make_package(source_in(range(4, 14)), LONG, synopsis="tool for made-up work")
    other = make_package(source_in(range(14, 24)), LONG)
    transitional = make_package(own.source, LONG, "This is a dummy package.")
    assert list(sections.candidates([own, other, transitional])) == [
        candidate(f"tool for made-up work\n\n{LONG}", '{"section":"utils","role":"program"}', own.source)
    ]


def test_sections_caps_the_common_answers_and_drops_the_rare() -> None:
    num_common, num_rare = sections.MAX_PER_ANSWER + 5, sections.MIN_PER_ANSWER - 1
    chosen = [candidate(f"{number}", "common") for number in range(num_common)]
    kept = sections.balanced([*chosen, *(candidate(f"{number}", "rare") for number in range(num_rare))])
    assert kept == chosen[: sections.MAX_PER_ANSWER]


def test_the_majority_baseline_is_measured_on_the_test_split() -> None:
    splits = {
        "train": [candidate("1", "a"), candidate("2", "a"), candidate("3", "b")],
        "test": [candidate("4", "a"), candidate("5", "b"), candidate("6", "b"), candidate("7", "b")],
    }
    assert sections.majority_baseline(splits) == 25


def test_synopsis_drops_copies_boilerplate_and_short_texts(make_package: MakePackage) -> None:
    source, text = source_in(range(14, 24)), f"{LONG} {LONG}"
    own = make_package(source, text, synopsis="Finder of paragraphs")
    others = [
        make_package(source_in(range(4, 14)), text),
        make_package(source, text, synopsis="Long enough to be"),
        make_package(source, text, "It is packaged by debcargo."),
        make_package(source, text, "This is a transitional package."),
        make_package(source, LONG),
        make_package(source, text, synopsis="Two words"),
    ]
    assert list(synopsis.candidates([own, *others])) == [candidate(text, "Finder of paragraphs", source)]


@pytest.mark.parametrize(
    ("english", "slovak", "is_pair"),
    [
        ("a tool for text files", "nástroj na textové súbory", True),
        ("a tool for text files", "a tool for  TEXT files", False),
        ("a tool for text files", "nástroj", False),
        ("a tool for text files", "nástroj na textové súbory a na mnoho iného", False),
        ("a list:\n- of things", "zoznam:\n- vecí sem", False),
        ("tool", "nástroj", False),
        ("a tool " * 30, "nástroj " * 30, False),
    ],
)
def test_a_pair_of_texts_can_be_a_translation(english: str, slovak: str, is_pair: bool) -> None:
    assert translate.is_pair(english, slovak) is is_pair


def test_translate_pairs_paragraphs_where_both_sides_have_as_many(make_package: MakePackage) -> None:
    source = source_in(range(4, 50))
    english, slovak = ("It does one thing.", "It also does another."), ("Robí jednu vec.", "Robí tiež inú vec.")
    even = make_package(source, *english, synopsis="made-up tool", sk=("vymyslený nástroj", *slovak))
    odd = make_package(source, *english, synopsis="second made-up tool", sk=("druhý vymyslený nástroj", slovak[0]))
    assert [(c.text, c.answer) for c in translate.candidates([even, odd])] == [
        ("made-up tool", "vymyslený nástroj"),
        *zip(english, slovak, strict=True),
        ("second made-up tool", "druhý vymyslený nástroj"),
    ]
