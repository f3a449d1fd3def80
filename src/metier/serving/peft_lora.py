"""PEFT's own LoRA as a delta that can be served: `W + scale * B A` on linear layers, and nothing else.

PEFT has some twenty options that make another thing of a LoRA, and more with every release. So what is known to leave
the sum as it is may be set; any other option that is set is refused by its name, one that is not known yet included.
"""

# r rank

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from metier.deltas.format import CONFIG_FILE, DAMAGED, NAME_PREFIX, TENSORS_FILE
from metier.deltas.tensors_file import DTYPES, StoredTensor, read_header
from metier.errors import BaseMismatchError, CorruptDeltaError, DeltaError
from metier.serving.checked_reader import CheckedReader, FileStamp, TensorFile
from metier.serving.model_facts import ModelFacts
from metier.serving.served_delta import MERGE_INSTEAD, ServedDelta, ServedTensor

LORA = "LORA"
_FACTORS = re.compile(re.escape(NAME_PREFIX) + r"(.+)\.lora_([AB])\.weight")
_READ_HERE = frozenset({"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"})
_WITHOUT_EFFECT = frozenset(
    {
        # names and notes
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_version",
        "revision",
        "task_type",
        # what was trained, which the tensors say themselves
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        "target_modules",
        # of training alone
        "lora_dropout",
        # sizes and names of what another option would switch on
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
    }
)
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Of `init_lora_weights`; the others begin by taking something out of the base's weights."""
_INSTEAD = {
    "target_parameters": "Read it as a LoRA on experts (`metier.methods.expert_lora.import_peft_lora`), save that by "
    "`metier.save_delta`, and serve it.",
    "alora_invocation_tokens": "It does not merge either: load it with `peft.PeftModel.from_pretrained`.",
    "arrow_config": "It does not merge either: load it with `peft.PeftModel.from_pretrained`.",
}
_LONGEST_PATTERN = 300


def read_peft_lora(folder: Path, values: dict[str, Any], *, facts: ModelFacts, reader: CheckedReader) -> ServedDelta:
    """The LoRA in `folder`, checked in all but its values.

    Args:
        folder: with PEFT's `adapter_config.json` and `adapter_model.safetensors`.
        values: of the first, whose `peft_type` is LORA.
        facts: of the base.
        reader: reads the values later.

    Raises:
        CorruptDeltaError: the files are truncated or do not fit together.
        BaseMismatchError: it does not fit the base.
        DeltaError: an option makes another thing of it than can be served.
    """
    _check_options(folder, values)
    path = folder / TENSORS_FILE
    stamp = FileStamp.of(path) if path.exists() else None
    stored, _ = read_header(folder)
    assert stamp is not None, "read_header raises where there is no file"
    factors: dict[str, dict[str, str]] = {}
    for name in stored:
        match = _FACTORS.fullmatch(name)
        if match is None:
            raise DeltaError(
                f"{path}: got tensor {name!r}, expected factors of linear layers alone, named "
                f"{NAME_PREFIX}….lora_A.weight and lora_B.weight.\nIf it is the base's own, which PEFT saves beside "
                f"embeddings, save it with `save_embedding_layers=False`.\n{MERGE_INSTEAD}"
            )
        factors.setdefault(match[1], {})[match[2]] = name
    if not factors:
        raise CorruptDeltaError(f"{path}: got no tensor, expected the factors of a LoRA.\n{DAMAGED}")
    tensors, scales = [], {}
    for module, names in factors.items():
        _check_factors(f"{path}: {module}", {letter: stored[name] for letter, name in names.items()}, module, facts)
        rank, scales[module] = _rank_and_scale(folder, values, module)
        if stored[names["A"]].shape[0] != rank:
            raise CorruptDeltaError(
                f"{path}: {module}: got rank {stored[names['A']].shape[0]}, expected {rank} by {CONFIG_FILE}.\n"
                "One of the two files was altered or comes from another delta; copy both again."
            )
        dtype = facts.linears[module].dtype
        for letter in "AB":
            name = names[letter]
            tensors.append(
                ServedTensor(name=name, path=module, layer=None, parameter=letter, stored=stored[name], dtype=dtype)
            )
    return ServedDelta(
        kind="lora",
        folder=folder,
        file=TensorFile(path=path, tensors=stored, sums={}, stamp=stamp),
        reader=reader,
        tensors=tuple(tensors),
        experts={},
        scales={module: (scale,) for module, scale in scales.items()},
    )


def _check_options(folder: Path, values: dict[str, Any]) -> None:
    beginning = values.get("init_lora_weights")
    if beginning not in _PLAIN_BEGINNINGS:
        raise DeltaError(
            f"{folder}: got a LoRA with init_lora_weights={beginning!r:.40}, which begins by changing the base's "
            "weights, so that it is no change of the base that is served.\n"
            f"{MERGE_INSTEAD}"
        )
    if values.get("bias") not in (None, "none"):
        raise _option(folder, "bias", values["bias"])
    for name, value in sorted(values.items()):
        if value and name not in _READ_HERE | _WITHOUT_EFFECT | {"init_lora_weights", "bias"}:
            raise _option(folder, name, value)


def _option(folder: Path, name: str, value: Any) -> DeltaError:
    return DeltaError(
        f"{folder}: got a LoRA with {name}={value!r:.60}, expected one that is W + scale * B A on linear layers and "
        f"nothing else.\n{_INSTEAD.get(name, MERGE_INSTEAD)}"
    )


def _check_factors(where: str, factors: dict[str, StoredTensor], module: str, facts: ModelFacts) -> None:
    if factors.keys() != {"A", "B"}:
        raise CorruptDeltaError(f"{where}: got lora_{min(factors)} alone, expected lora_A and lora_B.\n{DAMAGED}")
    shapes = {letter: factor.shape for letter, factor in factors.items()}
    bad = [factor.dtype for factor in factors.values() if factor.dtype not in DTYPES]
    if bad or any(len(shape) != 2 or 0 in shape for shape in shapes.values()) or shapes["A"][0] != shapes["B"][1]:
        got = ", ".join(f"{letter} {factor.dtype} {list(factor.shape)}" for letter, factor in sorted(factors.items()))
        raise CorruptDeltaError(f"{where}: got {got}, expected A (r, in) and B (out, r).\n{DAMAGED}")
    linear = facts.linears.get(module)
    if linear is None:
        raise BaseMismatchError(
            f"{where}: base {facts.name!r} has no linear layer there, or it is quantised.\n"
            "Serve the LoRA on the base that it was trained on, without quantisation."
        )
    got_shape = (shapes["B"][0], shapes["A"][1])
    if got_shape != linear.shape:
        raise BaseMismatchError(
            f"{where}: got a change of shape {list(got_shape)}, but the layer of base {facts.name!r} has "
            f"{list(linear.shape)}.\nServe the LoRA on the base that it was trained on."
        )


def _rank_and_scale(folder: Path, values: dict[str, Any], module: str) -> tuple[int, float]:
    """What PEFT would give a module, its patterns included."""
    rank = _of_pattern(folder, values, "rank_pattern", module, values.get("r"))
    alpha = _of_pattern(folder, values, "alpha_pattern", module, values.get("lora_alpha"))
    if type(rank) is not int or rank < 1:
        raise CorruptDeltaError(
            f"{folder / CONFIG_FILE}: r: got {rank!r:.60}, expected a whole number over 0.\n{DAMAGED}"
        )
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise CorruptDeltaError(f"{folder / CONFIG_FILE}: lora_alpha: got {alpha!r:.60}, expected a number.\n{DAMAGED}")
    return rank, alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


def _of_pattern(folder: Path, values: dict[str, Any], key: str, module: str, default: Any) -> Any:
    """The value of the first pattern that fits the end of a module's path, as PEFT looks it up."""
    patterns = values.get(key) or {}
    where = f"{folder / CONFIG_FILE}: {key}"
    if not isinstance(patterns, dict):
        raise CorruptDeltaError(f"{where}: got {patterns!r:.60}, expected values by pattern.\n{DAMAGED}")
    for pattern, value in patterns.items():
        # some patterns take years to match, and nothing else would run meanwhile
        num_repeats = sum(map(pattern.count, "*+{"))
        if len(pattern) > _LONGEST_PATTERN or num_repeats > 2 or re.search(r"\)[*+?{]", pattern):
            raise DeltaError(
                f"{where}: got {pattern!r:.60}, expected a pattern with at most two repetitions, none of them of a "
                f"group, and {_LONGEST_PATTERN} characters.\nName the modules in it."
            )
        try:
            fits = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise CorruptDeltaError(
                f"{where}: got {pattern!r:.60}, which is no pattern ({error}).\n{DAMAGED}"
            ) from error
        if fits:
            return value
    return default
