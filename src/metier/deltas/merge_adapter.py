"""Merge a PEFT adapter of any method that is a change of weights, and hold the result to the adapter's own answers.

PEFT merges some thirty methods in as many ways, and not all of them refuse what they cannot do. So the base answers a
fixed batch of tokens with the adapter on it before the merge, and the written folder has to answer the same.
"""

# B sequences, S tokens of one, V vocabulary

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from metier import __version__
from metier.deltas.card import adapter_merged_card, licence_of
from metier.deltas.format import CARD_FILE, CONFIG_FILE, DAMAGED, TENSORS_FILE
from metier.deltas.merge import MERGE_FILE
from metier.deltas.probe import TOLERANCES, largest_difference, logits_of, probe_tokens
from metier.errors import BaseMismatchError, CorruptDeltaError, DeltaError, MetierError, ModelError
from metier.methods.single_task import with_one_task
from metier.models.load import first_line, load
from metier.models.skeleton import checkpoint_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class MergedAdapter:
    """What the merged model is to be held to."""

    tokens_BS: Tensor
    base_BSV: Tensor
    """Logits of the base alone."""
    adapter_BSV: Tensor
    """Logits of the base with the adapter on it."""
    config_changes: dict[str, Any]
    """What the merge changed in the base's configuration, such as a switch for biases that were added."""


def check_merges(adapter: Path) -> None:
    """Raise a DeltaError where an adapter's method is no change of its base's weights, or a CorruptDeltaError where
    its files cannot be read. No base is needed."""
    config = _config(adapter)
    method = _method(config)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    reason = getattr(tuner, "cannot_merge", None)
    if reason is None and (config.is_prompt_learning or not hasattr(tuner, "merge_and_unload")):
        reason = (
            "it is no change of the base's weights, so it cannot be merged. Serve it beside its base, with "
            "`peft.PeftModel.from_pretrained`."
        )
    if reason is not None:
        raise DeltaError(f"{adapter}: {method}: {reason}")
    _check_tensors(adapter)


def merge_adapter(adapter: Path, base: str | Path, folder: Path, *, trust_remote_code: bool = False) -> MergedAdapter:
    """Write the base with an adapter merged in: the weights and what they were made of.

    Args:
        adapter: one that `check_merges` lets pass.
        base: as `metier.load`.
        folder: empty.
        trust_remote_code: as `metier.load`.

    Returns:
        what the merged model is to answer.

    Raises:
        BaseMismatchError, CorruptDeltaError: the adapter's tensors do not fit the base.
        DeltaError: PEFT cannot merge it.
        ModelError: the base cannot be loaded, or is quantised.
    """
    network = load(base, trust_remote_code=trust_remote_code).model
    if getattr(network, "is_quantized", False):
        raise ModelError(
            f"{base}: got a quantised base, expected its weights in floating point: merged into few bits, a change is "
            "rounded away.\nGive the base that it was quantised from."
        )
    tokens_BS = probe_tokens(network)
    base_BSV = logits_of(network, tokens_BS)
    config_before = network.config.to_dict()
    wrapped = _attached(adapter, network, str(base))
    adapter_BSV = logits_of(wrapped, tokens_BS)
    method = _method(wrapped.peft_config["default"])
    try:
        merged = wrapped.base_model.merge_and_unload(safe_merge=True)
    except MetierError as error:
        raise DeltaError(f"{adapter}: {error}") from error
    except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise DeltaError(
            f"{adapter}: {method}: PEFT cannot merge it: {first_line(error)}\nServe it beside its base."
        ) from error
    merged.save_pretrained(folder)
    _describe(folder, adapter, str(base), method)
    changes = {name: value for name, value in merged.config.to_dict().items() if config_before.get(name) != value}
    return MergedAdapter(tokens_BS=tokens_BS, base_BSV=base_BSV, adapter_BSV=adapter_BSV, config_changes=changes)


def check_answers(folder: Path, adapter: Path, made: MergedAdapter, *, trust_remote_code: bool = False) -> None:
    """Raise a DeltaError unless the model in a folder answers as its base did with the adapter on it."""
    merged = load(folder, trust_remote_code=trust_remote_code).model
    difference = largest_difference(logits_of(merged, made.tokens_BS), made.adapter_BSV)
    effect = largest_difference(made.adapter_BSV, made.base_BSV)
    limit = TOLERANCES.get(merged.dtype, TOLERANCES[torch.bfloat16]) * float(made.base_BSV.abs().max())
    # a module that was passed over costs more than that; rounding, where it grows through a model, may cost as much
    limit = max(min(limit, effect / 2) if effect else limit, effect / 100)
    if difference > limit:
        raise DeltaError(
            f"{adapter}: merged into its base it answers otherwise: logits differ by {difference:.2g}, expected at "
            f"most {limit:.2g} where the adapter changes them by {effect:.2g}. Nothing was written.\n"
            "Serve it beside its base."
        )


def _config(adapter: Path) -> peft.PeftConfig:
    try:
        return peft.PeftConfig.from_pretrained(str(adapter))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise CorruptDeltaError(
            f"{adapter / CONFIG_FILE}: PEFT {peft.__version__} cannot read it: {first_line(error)}\n{DAMAGED}"
        ) from error


def _method(config: peft.PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _check_tensors(adapter: Path) -> None:
    """The adapter has safetensors, of which every value is finite."""
    path = adapter / TENSORS_FILE
    if not path.is_file():
        pickled = (adapter / "adapter_model.bin").is_file()
        got = "adapter_model.bin, a pickle, which can run code when it is read" if pickled else "no such file"
        raise CorruptDeltaError(f"{path}: got {got}, expected the adapter's tensors as safetensors.\n{DAMAGED}")
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise CorruptDeltaError(
                        f"{path}: {name} holds values that are not finite; nothing was merged.\n"
                        "The run diverged: train it again with a lower learning rate."
                    )
    except (SafetensorError, OSError) as error:
        raise CorruptDeltaError(f"{path}: got no valid safetensors file ({error}).\n{DAMAGED}") from error


def _attached(adapter: Path, network: PreTrainedModel, base_name: str) -> peft.PeftModel:
    """The base with the adapter on it, each of whose tensors has found its place."""
    other_base = "Load the base that it was trained on."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message="Found missing adapter keys")
            wrapped = with_one_task(peft.PeftModel.from_pretrained(network, str(adapter)))
    except MetierError:
        raise
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, UserWarning) as error:
        raise BaseMismatchError(
            f"{adapter}: the adapter cannot be put on base {base_name!r}: {str(error).strip()[:300]}\n{other_base}"
        ) from error
    with safe_open(adapter / TENSORS_FILE, framework="np") as file:
        foreign = set(file.keys()) - peft.get_peft_model_state_dict(wrapped).keys()
    if foreign:
        raise BaseMismatchError(
            f"{adapter}: base {base_name!r} has no place for {len(foreign)} of the adapter's tensors, such as "
            f"{min(foreign)!r}.\n{other_base}"
        )
    return wrapped.eval()


def _describe(folder: Path, adapter: Path, base: str, method: str) -> None:
    licence = licence_of(checkpoint_folder(base))
    facts = {
        "metier_version": __version__,
        "base": base,
        "adapter": str(adapter),
        "peft_type": method,
        "licence_of_base": licence,
    }
    (folder / MERGE_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    card = adapter_merged_card(base=base, adapter=str(adapter), method=method, licence=licence)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
