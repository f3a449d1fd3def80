"""A source package belongs to one use, whole and in every language."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from packages import Description, bucket, read_packages, use_of
from sources import LANGUAGES, Sources

from .conftest import MakePackage, source_in


def test_buckets_are_even_and_never_change() -> None:
    counts = Counter(bucket(f"text {number}") for number in range(20_000))
    assert set(counts) == set(range(100))
    assert max(counts.values()) < 2 * min(counts.values())
    assert [bucket(name) for name in ("dpkg", "linux", "python3.11")] == GOLDEN_BUCKETS


GOLDEN_BUCKETS = [36, 92, 66]
"""Of dpkg, linux and python3.11: if one changes, the shipped model has seen what the tasks hold out."""


@pytest.mark.parametrize(
    ("buckets", "has_slovak", "use"),
    [
        (range(4), False, "heldout"),
        (range(4), True, "heldout"),
        (range(4, 14), False, "sections"),
        (range(14, 24), False, "synopsis"),
        (range(24, 100), False, "pretrain"),
        (range(4, 50), True, "translate"),
        (range(50, 100), True, "pretrain"),
    ],
)
def test_a_source_goes_where_its_bucket_says(buckets: range, has_slovak: bool, use: str) -> None:
    sources = [f"made-up-{number}" for number in range(2000) if bucket(f"made-up-{number}") in buckets]
    assert {bucket(source) for source in sources} == set(buckets)
    assert {use_of(source, has_slovak=has_slovak) for source in sources} == {use}


def test_a_package_described_in_slovak_serves_translation(make_package: MakePackage) -> None:
    source = source_in(range(4, 14))
    assert make_package(source).use == "sections"
    assert make_package(source, sk=("nástroj",)).use == "translate"


INDEX = """\
Package: libfoo1
Source: foo (1.2)
Section: libs
Tag: role::shared-lib, devel::library,
 implemented-in::c
Description-md5: aaa

Package: foo
Section: utils
Description-md5: bbb

Package: foo-clone
Source: foo
Section: utils
Description-md5: bbb

Package: bar
Section: net
Description-md5: ccc

Package: unknown
Section: net
Description-md5: ddd
"""

ENGLISH = """\
Package: libfoo1
Description-md5: aaa
Description-en: foo's library
 The first paragraph
 goes on:
  * one
  * two
 .
 The second one.

Package: foo
Description-md5: bbb
Description-en: foo itself
 It does foo.

Package: bar
Description-md5: ccc
Description-en: bar itself
 It does bar.
"""

SLOVAK = """\
Package: libfoo1
Description-md5: aaa
Description-sk: knižnica foo
 <trans>

Package: bar
Description-md5: ccc
Description-sk: samotný bar
 Robí bar.
"""


@pytest.fixture
def archive(tmp_path: Path) -> Sources:
    texts = {"packages": INDEX, **dict.fromkeys(LANGUAGES, ""), "en": ENGLISH, "sk": SLOVAK}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return Sources(
        packages_index=tmp_path / "packages",
        descriptions={language: tmp_path / language for language in LANGUAGES},
        unpacked={},
    )


def test_the_index_is_read_with_sources_tags_and_descriptions(archive: Sources) -> None:
    packages = {package.name: package for package in read_packages(archive)}
    assert sorted(packages) == ["bar", "foo", "libfoo1"]
    library = packages["libfoo1"]
    assert (library.source, library.section) == ("foo", "libs")
    assert library.tags == ("role::shared-lib", "devel::library", "implemented-in::c")
    assert library.descriptions["en"] == Description(
        "foo's library", ("The first paragraph goes on:\n* one\n* two", "The second one.")
    )


def test_an_unfinished_translation_does_not_count(archive: Sources) -> None:
    packages = {package.name: package for package in read_packages(archive)}
    assert set(packages["libfoo1"].descriptions) == {"en"}
    assert packages["bar"].descriptions["sk"] == Description("samotný bar", ("Robí bar.",))


def test_packages_whose_sibling_alone_is_described_in_slovak_are_dropped(archive: Sources) -> None:
    text = archive.descriptions["sk"].read_text(encoding="utf-8")
    archive.descriptions["sk"].write_text(text.replace(" <trans>", " Knižnica."), encoding="utf-8")
    assert [package.name for package in read_packages(archive)] == ["bar", "libfoo1"]
