"""Put our methods into PEFT's registry, so that PEFT's own functions build, save and load them.

PEFT's `register_peft_method` only takes names from its closed `PeftType` enum. The registry itself is four plain
dictionaries keyed by that string enum, and a string enum of our own is as good a key: the saved `peft_type` is the
string. `tests/methods/test_peft_types.py` pins this against the installed PEFT.
"""

from __future__ import annotations

from enum import StrEnum

from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner


class MetierPeftType(StrEnum):
    """The `peft_type` of our methods, as it stands in `adapter_config.json`."""

    ESFT = "ESFT"
    EXPERT_LORA = "EXPERT_LORA"
    MEFT = "MEFT"
    LADDER = "LADDER"
    MIXLORA = "MIXLORA"
    BOTTLENECK = "BOTTLENECK"
    METIER_PREFIX = "METIER_PREFIX"
    MAM = "MAM"
    UNIPELT = "UNIPELT"
    SPARSE_DELTA = "SPARSE_DELTA"
    DIFF_PRUNING = "DIFF_PRUNING"


def register(peft_type: MetierPeftType, config_class: type[PeftConfig], tuner_class: type[BaseTuner]) -> None:
    """Make PEFT know a method; a second call changes nothing.

    Methods that are made of the same layers have one prefix, by which transformers knows an adapter's parameters.

    Raises:
        RuntimeError: the name or the prefix is taken by a method of the installed PEFT.
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if known is config_class:
        return
    ours = list(MetierPeftType)
    prefixes = {prefix for name, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items() if name not in ours}
    if known is not None or tuner_class.prefix in prefixes:
        raise RuntimeError(
            f"PEFT already has a method '{peft_type.value}' or the prefix '{tuner_class.prefix}'.\n"
            "This version of metier does not fit the installed PEFT; install the versions of its constraints file."
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner_class
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = tuner_class.prefix
