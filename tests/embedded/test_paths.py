"""Everything embedded has a path, and asking for what is not there says what is."""

from __future__ import annotations

from pathlib import Path

import pytest

from metier import embedded
from metier.errors import ConfigError, ModelError


def test_tasks_and_domains_are_listed() -> None:
    assert embedded.task_names() == ("sections", "synopsis", "translate")
    assert embedded.general_domains() == tuple(
        sorted(["packages", "danish", "german", "french", "italian", "slovak", "python", "manual", "wordnet", "prose"])
    )


@pytest.mark.parametrize("split", embedded.SPLITS)
@pytest.mark.parametrize("name", ["sections", "synopsis", "translate"])
def test_every_split_of_a_task_is_a_file(name: str, split: str) -> None:
    assert embedded.task_path(name, split).is_file()


def test_every_delta_is_named_after_its_task_and_is_a_folder_of_peft() -> None:
    assert embedded.delta_names() == ("synopsis", "translate")
    assert set(embedded.delta_names()) <= set(embedded.task_names())
    for name in embedded.delta_names():
        assert (embedded.delta_path(name) / "adapter_model.safetensors").is_file()


def test_general_text_has_a_folder_and_a_file_a_domain() -> None:
    assert embedded.general_path("prose") == embedded.general_path() / "prose.txt"
    assert embedded.general_path("prose").is_file()
    assert embedded.cloze_path().is_file()


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError,
        match=r"unknown embedded task: got 'section', expected one of sections, synopsis, translate\. "
        r"Did you mean 'sections'\?",
    ):
        embedded.task_path("section", "test")


def test_an_unknown_split_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError,
        match=r"unknown split of the embedded task 'synopsis': got 'valid', "
        r"expected one of train, validation, test\. Did you mean 'validation'\?",
    ):
        embedded.task_path("synopsis", "valid")


def test_an_unknown_domain_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown embedded domain: got 'germn', .* Did you mean 'german'\?"):
        embedded.general_path("germn")


def test_an_unknown_delta_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError,
        match=r"unknown embedded delta: got 'sinopsis', expected one of synopsis, translate\. Did you mean 'synopsis'\?",
    ):
        embedded.delta_path("sinopsis")


def test_a_name_that_resembles_nothing_lists_all() -> None:
    with pytest.raises(ConfigError, match=r"expected one of sections, synopsis, translate\.$"):
        embedded.task_path("0", "test")


def test_the_model_s_folder_needs_its_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "ROOT", tmp_path)
    with pytest.raises(ModelError, match=r"model: got no config\.json, expected the embedded model there\.\nReinstall"):
        embedded.model_path()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert embedded.model_path() == tmp_path / "model"
