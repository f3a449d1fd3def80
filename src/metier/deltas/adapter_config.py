"""Read `adapter_config.json` without PEFT: only what decides what a delta means, each value checked.

PEFT's own reading imports torch, drops keys that it does not know and raises whatever a broken file provokes.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from metier.deltas.format import CONFIG_FILE, DAMAGED, ESFT, EXPERT_LORA, TENSORS_FILE
from metier.deltas.low_rank import LowRankSettings, read_low_rank
from metier.errors import CorruptDeltaError
from metier.models.spellings import LAYER_INDEX

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """What `adapter_config.json` says of a delta. Other keys are names and notes that may be edited."""

    method: str
    base_name: str | None
    base_fingerprint: str | None
    """64 hexadecimal digits; None only where the adapter was never on a model."""
    experts: dict[int, tuple[int, ...]]
    """Expert ids by decoder layer, both ascending: row i of a layer's tensors is the layer's i-th expert."""
    num_experts: int | None
    """Routed experts a layer of the base."""
    paths: dict[int, str]
    """Path of the base's experts module, by decoder layer."""
    low_rank: LowRankSettings | None = None
    """Of a LoRA on experts; None where rows replace the base's."""
    also_train: tuple[str, ...] = ()
    """Groups of modules that are replaced whole, as names for people."""
    whole_modules: tuple[str, ...] = ()
    """Paths of the base's modules whose parameters are all replaced."""


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The configuration of the delta in `folder`.

    Raises:
        CorruptDeltaError: there is no delta, it is of another method, or a value makes no sense.
    """
    path, values = folder / CONFIG_FILE, _read_json(folder)
    method = values.get("peft_type")
    if method == "MEFT":
        raise CorruptDeltaError(
            f"{path}: got a MEFT adapter, expected {ESFT!r} or {EXPERT_LORA!r}.\n"
            "It replaces no weights of its base, so there is nothing to merge, and it has no sums to check yet: load "
            "it with `peft.PeftModel.from_pretrained`, which checks its base and its shapes."
        )
    if method not in (ESFT, EXPERT_LORA):
        raise CorruptDeltaError(
            f"{path}: got a PEFT adapter of type {method!r}, expected {ESFT!r} or {EXPERT_LORA!r}.\n"
            "metier reads, verifies and merges its own deltas. Load others with `peft.PeftModel.from_pretrained` and "
            "merge them with its `merge_and_unload`."
        )
    num_experts = values.get("num_experts")
    _expect(path, "num_experts", num_experts, num_experts is None or _is_count(num_experts), "a positive number")
    fingerprint = values.get("base_fingerprint")
    is_fingerprint = isinstance(fingerprint, str) and _FINGERPRINT.fullmatch(fingerprint) is not None
    _expect(path, "base_fingerprint", fingerprint, fingerprint is None or is_fingerprint, "64 hexadecimal digits")
    name = values.get("base_model_name_or_path")
    _expect(path, "base_model_name_or_path", name, name is None or isinstance(name, str), "text")
    experts = _experts(path, values.get("experts"), num_experts)
    return AdapterConfig(
        method=method,
        base_name=name,
        base_fingerprint=fingerprint,
        experts=experts,
        num_experts=num_experts,
        paths=_paths(path, values.get("target_modules"), experts),
        low_rank=read_low_rank(path, values, experts) if method == EXPERT_LORA else None,
        also_train=_names(path, "also_train", values.get("also_train")),
        whole_modules=_names(path, "whole_modules", values.get("whole_modules")),
    )


def adapter_type(folder: Path) -> str:
    """The `peft_type` of the adapter in `folder`, of ours or of PEFT's own.

    Raises:
        CorruptDeltaError: there is no adapter, or it does not say what it is.
    """
    method = _read_json(folder).get("peft_type")
    _expect(folder / CONFIG_FILE, "peft_type", method, isinstance(method, str) and bool(method), "a method's name")
    return str(method)


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise _no_delta(folder)
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise CorruptDeltaError(f"{path}: got no readable JSON ({error}).\n{DAMAGED}") from error
    if not isinstance(values, dict):
        raise CorruptDeltaError(f"{path}: got a {type(values).__name__}, expected a JSON object.\n{DAMAGED}")
    return values


def _experts(path: Path, value: Any, num_experts: int | None) -> dict[int, tuple[int, ...]]:
    _expect(path, "experts", value, isinstance(value, dict) and bool(value), "expert ids by layer")
    experts: dict[int, tuple[int, ...]] = {}
    for layer, ids in value.items():
        where = f"experts of layer {layer}"
        # isascii: int() takes digits of every script
        _expect(path, where, ids, layer.isascii() and layer.isdigit(), "a layer's number")
        _expect(path, where, ids, isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids), "expert ids")
        ascending = bool(ids) and all(a < b for a, b in pairwise(ids))
        _expect(path, where, ids, ascending, "ids in ascending order, each once, for that is the order of the rows")
        in_range = num_experts is None or ids[-1] < num_experts
        _expect(path, where, ids, in_range, f"ids under num_experts={num_experts}")
        experts[int(layer)] = tuple(ids)
    _expect(path, "experts", value, len(experts) == len(value), "each layer once")
    return dict(sorted(experts.items()))


def _paths(path: Path, value: Any, experts: dict[int, tuple[int, ...]]) -> dict[int, str]:
    is_list = isinstance(value, list) and all(isinstance(item, str) for item in value)
    _expect(path, "target_modules", value, is_list, "a list of module paths")
    numbers = {item: int(found[-1]) for item in value if (found := LAYER_INDEX.findall(item))}
    # an encoder-decoder's decoder counts on from its encoder, and the highest layer is one of the decoder's
    decoder = {item for item in numbers if "decoder" in item.split(".")}
    num_before = max(experts) - max(numbers[item] for item in decoder) if decoder else 0
    paths = {number + (num_before if item in decoder else 0): item for item, number in numbers.items()}
    one_each = paths.keys() == experts.keys() and len(value) == len(experts)
    _expect(path, "target_modules", value, one_each, f"one path for each of the layers {list(experts)}")
    return dict(sorted(paths.items()))


def _names(path: Path, key: str, value: Any) -> tuple[str, ...]:
    """A list of names, each once; none where the key is missing or null."""
    is_list = value is None or (isinstance(value, list) and all(isinstance(item, str) and item for item in value))
    _expect(path, key, value, is_list, "a list of names, or null")
    _expect(path, key, value, len(set(value or ())) == len(value or ()), "each name once")
    return tuple(value or ())


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _expect(path: Path, key: str, value: Any, is_right: bool, expected: str) -> None:
    if not is_right:
        raise CorruptDeltaError(f"{path}: {key}: got {_short(value)}, expected {expected}.\n{DAMAGED}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _no_delta(folder: Path) -> CorruptDeltaError:
    expected = f"expected a delta: {CONFIG_FILE} and {TENSORS_FILE}"
    if not folder.exists():
        got, then = "no such folder", "Give the folder that a run wrote, such as runs/NAME/adapter."
    elif not folder.is_dir():
        got, then = "a file", f"Give the folder that holds {CONFIG_FILE}."
    elif (folder / "config.json").is_file():
        got = "a whole model"
        then = "Full fine-tuning leaves a model, not a delta: load it with `metier.load`; there is nothing to merge."
    elif (folder / "adapter" / CONFIG_FILE).is_file():
        got, then = "a run's folder", f"Give {folder / 'adapter'} instead."
    else:
        got, then = f"no {CONFIG_FILE}", "Give the folder that a run wrote, such as runs/NAME/adapter."
    return CorruptDeltaError(f"{folder}: got {got}, {expected}.\n{then}")
