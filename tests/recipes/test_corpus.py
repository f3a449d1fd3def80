"""What pretraining reads holds no text of a task, and no source that belongs to one."""

from __future__ import annotations

import pytest
from corpus import SLOVAK_BUCKETS, chat_documents, describe, is_clean, normalise, package_documents, task_texts
from packages import Package

from .conftest import MakePackage, source_in

SECRET = "This very paragraph belongs to a task and nobody else."
SHORT = "This package is small."


def test_normalise_forgets_case_and_white_space() -> None:
    assert normalise("  Größe\tof \n\n Things ") == "größe of things"


def test_task_texts_hold_every_language_of_every_use_but_pretraining(make_package: MakePackage) -> None:
    task = make_package(source_in(range(4, 14)), SECRET, synopsis="One", da=("Et værktøj", "Afsnittet."))
    heldout = make_package(source_in(range(4)), "Held out.", synopsis="Two")
    pretrain = make_package(source_in(range(24, 100)), "Read.", synopsis="Three")
    texts = task_texts([task, heldout, pretrain])
    assert texts == {normalise(SECRET), "one", "et værktøj", "afsnittet.", "two", "held out."}


@pytest.mark.parametrize(
    ("paragraphs", "synopsis", "clean"),
    [
        (("Something else altogether, and long enough.",), "a tool", True),
        ((SECRET,), "a tool", False),
        ((SECRET.upper().replace(" ", "\n "),), "a tool", False),
        (("A first paragraph.", SECRET), "a tool", False),
        ((), SECRET, False),
        ((SHORT,), "a tool", True),
    ],
)
def test_a_description_is_clean_without_a_long_text_of_a_task(
    make_package: MakePackage, paragraphs: tuple[str, ...], synopsis: str, clean: bool
) -> None:
    package = make_package("any", *paragraphs, synopsis=synopsis)
    assert is_clean(package, "en", {normalise(SECRET), normalise(SHORT)}) is clean


def test_documents_leave_out_tasks_and_what_repeats_them(make_package: MakePackage) -> None:
    task = make_package(source_in(range(4, 14)), SECRET)
    sibling = make_package(source_in(range(24, 100)), SECRET, synopsis="same text")
    other = make_package(
        source_in(range(24, 100), number=1), "Free.", synopsis="free text", de=("Freier Text", "Frei.")
    )
    heldout = make_package(source_in(range(4)), "Held out.", synopsis="held-out text")
    assert list(package_documents([task, sibling, other, heldout])) == [
        ("packages", False, describe(other, "en")),
        ("german", False, f"{other.name}: Freier Text\n\nFrei."),
        ("packages", True, f"{heldout.name}: held-out text\n\nHeld out."),
    ]


def test_pretraining_sees_a_part_of_the_slovak_text_only(make_package: MakePackage) -> None:
    seen = make_package(source_in(SLOVAK_BUCKETS), synopsis="one", sk=("jeden",))
    unseen = make_package(source_in(range(SLOVAK_BUCKETS.stop, 100)), synopsis="two", sk=("dva",))
    documents = list(package_documents([seen, unseen]))
    assert [text for domain, _, text in documents if domain == "slovak"] == [f"{seen.name}: jeden"]


def test_dialogues_translate_clean_packages_of_pretraining_alone(make_package: MakePackage) -> None:
    def packages(buckets: range, synopsis: str, german: str = "ein Werkzeug") -> list[Package]:
        sources = [source_in(buckets, number=number) for number in range(30)]
        return [make_package(source, synopsis=synopsis, de=(german,)) for source in sources]

    german_secret = "Diese Zeile gehört einer Aufgabe und sonst niemandem."
    made = [
        *packages(range(24, 100), "free text"),
        *packages(range(4, 14), SECRET, german_secret),
        *packages(range(4, 14), "short text of a task"),
        *packages(range(24, 100), SECRET),
        *packages(range(24, 100), "free in English", german_secret),
    ]
    prompts = {dialogue[0]["content"] for dialogue in chat_documents(made, [])}
    assert prompts == {"Translate to German: free text"}
