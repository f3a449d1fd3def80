"""The catalogue: every entry is whole, and every name leads to one."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from metier.catalogue.options import config_class, option_types
from metier.catalogue.tree import KINDS, METHODS, method_of, tree
from metier.errors import ConfigError


def test_there_are_at_least_45_methods_and_the_tree_has_each_once() -> None:
    assert len(METHODS) >= 45
    leaves = [method.name for groups in tree().values() for methods in groups.values() for method in methods]
    assert sorted(leaves) == sorted(METHODS)


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_an_entry_is_whole(method) -> None:
    assert method.kind in KINDS
    assert all((method.title, method.paper, method.trains, method.inference, method.fits))
    assert set(method.targets) <= set(method.can_target) | {"norms"}
    assert not (method.saves_whole_model and method.config)
    assert method.fixed <= method.defaults.keys()
    if method.config is not None:
        known = {field.name for field in dataclasses.fields(config_class(method))}
        assert method.defaults.keys() <= known | {"task_type"}
        assert method.targets == () or "target_modules" in known


def test_every_method_of_the_installed_peft_and_of_ours_is_in_the_catalogue() -> None:
    """A new version of PEFT with a new method fails here, so that nobody looks for it in vain."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    classes = {config_class(method).__name__ for method in METHODS.values() if method.config}
    # these have keys of a run in place of options
    classes |= {"EsftConfig", "ExpertLoraConfig", "MeftConfig"}
    # a saved X-LoRA does not load to the logits that it had, as PEFT 0.21 has it on transformers 5
    classes.add("XLoraConfig")
    assert {kind.__name__ for kind in PEFT_TYPE_TO_CONFIG_MAPPING.values()} - classes == set()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("LoRA", "lora"), ("lora-plus", "lora_plus"), ("vear", "vera"), ("PREFIX", "prefix")],
)
def test_an_unknown_method_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"got '{name}', which is no method. Did you mean '{nearest}'?"):
        method_of(name)


@pytest.mark.parametrize("name", ["xlora", "EVA", "lora-ga", "corda", "loftq", "monteclora"])
def test_what_peft_has_and_a_run_does_not_is_told_with_its_reason(name: str) -> None:
    with pytest.raises(ConfigError, match=f"method: got '{name}', which PEFT has and a run does not: "):
        method_of(name)


def test_what_makes_a_method_what_it_is_is_no_option() -> None:
    assert "use_dora" in option_types("lora")
    assert "use_dora" not in option_types("dora")


def test_the_tree_is_shown_without_torch() -> None:
    code = "import sys, metier.reports.methods as m; m.methods_tree(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
