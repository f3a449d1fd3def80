"""Which MoE families the installed transformers has, read off its source, so that an update shows new ones by itself.

A family is a folder of `transformers/models`. It is in the contract if its modeling file decorates a class with
`use_experts_implementation`, and outside it if it holds MoE classes without that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

_DECORATED = re.compile(r"^@use_experts_implementation.*\n(?:@.*\n)*class (\w+)", re.MULTILINE)
_MOE_CLASS = re.compile(r"^class (\w*(?:Expert\w*|MoE|Mo[eE](?:Block|Layer)?))\(", re.MULTILINE)
_LANGUAGE_MODELS = (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
_NOT_THE_MODEL = ("talker", "code_predictor", "encoder", "vision", "audio")
_PARTS = {"qwen3_omni_moe": "qwen3_omni_moe_thinker", "inkling": "inkling_text"}
"""Families whose whole has no `forward`: the part that reads text."""


@cache
def contract_families() -> dict[str, tuple[str, ...]]:
    """The experts classes of every family that follows the contract."""
    found = {family: tuple(_DECORATED.findall(source)) for family, source in _sources()}
    return {family: classes for family, classes in found.items() if classes}


@cache
def foreign_families() -> dict[str, tuple[str, ...]]:
    """The MoE classes of every family that has some, but none that follows the contract."""
    found = {family: tuple(_MOE_CLASS.findall(source)) for family, source in _sources()}
    return {family: classes for family, classes in found.items() if classes and family not in contract_families()}


def model_type(family: str) -> str | None:
    """The `model_type` of the family's largest whole that models language; None if it has no such model."""
    if family in _PARTS:
        return _PARTS[family]
    types = [name for name in CONFIG_MAPPING_NAMES if model_type_to_module_name(name) == family]
    types = [name for name in types if any(name in mapping for mapping in _LANGUAGE_MODELS)]
    return min(types, key=lambda name: (name.endswith("_text"), len(name)), default=None)


def _sources() -> Iterator[tuple[str, str]]:
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        if path.parent.name != "auto":
            yield path.parent.name, path.read_text(encoding="utf-8")
