"""Our entries in the installed PEFT's registry, and the ways in which they get there."""

from __future__ import annotations

import subprocess
import sys

import pytest
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from metier.methods.esft import EsftConfig, EsftModel
from metier.methods.peft_types import MetierPeftType, register


def test_peft_finds_our_method_by_the_string_in_adapter_config() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING["ESFT"] is EsftConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["ESFT"] is EsftModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["ESFT"] == "esft_"
    assert "ESFT" not in list(PeftType), "PEFT has a method of this name now: drop ours or rename it"


def test_registering_twice_changes_nothing_and_a_taken_name_is_an_error() -> None:
    register(MetierPeftType.ESFT, EsftConfig, EsftModel)
    with pytest.raises(RuntimeError, match="already has a method 'ESFT'"):
        register(MetierPeftType.ESFT, PeftConfig, EsftModel)


@pytest.mark.parametrize(
    "order",
    [
        "import metier; import peft",
        "import peft; import metier",
        "import metier, peft.tuners",
        "import metier, importlib.util as u; assert u.find_spec('peft') and u.find_spec('peft'); import peft",
    ],
)
def test_importing_metier_registers_whichever_is_imported_first(order: str) -> None:
    check = (
        f"{order}\nfrom peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as m\nassert m['ESFT'].prefix == 'esft_'\n"
        "import sys; assert not [f for f in sys.meta_path if type(f).__module__.startswith('metier')]"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
