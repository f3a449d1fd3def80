"""Export a LoRA on experts as an ordinary LoRA, for PEFT and for servers that read one.

The base's weights are not loaded: its configuration gives the shapes, and its routers the fingerprint.
"""

from __future__ import annotations

import json
from pathlib import Path

import peft
from safetensors.torch import save_file
from transformers import PreTrainedModel

from metier import __version__
from metier.deltas.adapter_config import adapter_type
from metier.deltas.card import lora_card
from metier.deltas.checkpoint_files import open_checkpoint
from metier.deltas.format import CARD_FILE, CONFIG_FILE, ESFT, EXPERT_LORA, TENSORS_FILE
from metier.deltas.lora_layouts import highest_rank, per_expert_layout, stacked_layout
from metier.deltas.on_base import check_experts, check_fingerprint, check_tensors, rows_not_finite
from metier.deltas.read import Delta, read_delta
from metier.deltas.served_families import SERVED, LoraLayout
from metier.deltas.stream_merge import CannotStreamError, load_routers
from metier.deltas.whole_folder import check_replaceable, written_whole
from metier.errors import CorruptDeltaError, DeltaError
from metier.methods.expert_lora.peft_layout import check_peft_sees, lora_config
from metier.models.encoder_decoder import is_encoder_decoder
from metier.models.load import load
from metier.models.moe import moe_layers
from metier.models.skeleton import checkpoint_folder, skeleton

EXPORT_FILE = "metier_export.json"
"""What was exported; by this file a former export is known."""
_VLLM = {"parameters": "0.12.0", "per-expert": "0.11.2"}
"""The first version that has LoRA on experts in a layout."""
MIN_PEFT = "0.19.1"
"""Before it, PEFT took the axes of a stacked weight `(E, out, in)` the other way round."""


def export_lora(
    delta: Path, base: str | Path, output: Path, *, layout: LoraLayout, trust_remote_code: bool
) -> list[str]:
    """Write a LoRA on experts in one of the two layouts, whole or not at all.

    The scale of each expert goes into its `B`, and ranks under the highest are filled up with zeros.

    Args:
        delta: a delta of type EXPERT_LORA.
        base: the one it was trained on: a folder, a hub id, or "embedded".
        output: new, empty, or a former export's folder, which is then replaced.
        layout: `parameters` or `per-expert`.
        trust_remote_code: as `metier.load`.

    Returns:
        what was written and what is known of who reads it, as sentences.

    Raises:
        DeltaError: the delta is no LoRA, replaces whole modules too, or its base has no such layout.
        ConfigError, CorruptDeltaError, BaseMismatchError, SelectionError, ModelError: as `metier.merge`.
    """
    known = frozenset({CONFIG_FILE, TENSORS_FILE, CARD_FILE, EXPORT_FILE})
    check_replaceable(output, known=known, marker=EXPORT_FILE, what="a former export")
    files = _read(delta)
    model = _with_routers(base, trust_remote_code=trust_remote_code)
    check_fingerprint(files, model, str(base))
    check_experts(files, model, str(base))
    check_tensors(files, model)
    _check_finite(files)
    layers = [layer for layer in moe_layers(model) if layer.index in files.config.experts]
    rank = highest_rank(files)
    if layout == "parameters":
        check_peft_sees(model)
        tensors, targets = stacked_layout(files, layers, rank)
        lora = lora_config(rank, target_parameters=targets, base_model_name_or_path=str(base))
    else:
        tensors, targets = per_expert_layout(files, model, layers, rank)
        lora = lora_config(rank, target_modules=targets, base_model_name_or_path=str(base))
    lora.task_type = peft.TaskType.SEQ_2_SEQ_LM if is_encoder_decoder(model) else peft.TaskType.CAUSAL_LM
    with written_whole(output) as new:
        save_file(tensors, new / TENSORS_FILE, metadata={"format": "pt"})
        lora.save_pretrained(str(new))
        _describe(new, files, str(base), layout, rank)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    written = f"LoRA of rank {rank} on {len(layers)} layers, {num_bytes:,} bytes, layout {layout}: {output}"
    return [written, _readers(str(model.config.model_type), layout, rank)]


def _read(delta: Path) -> Delta:
    method = adapter_type(delta)
    if method == "LORA":
        raise DeltaError(f"{delta}: got a LoRA of PEFT's own, which needs no export: serve the folder as it is.")
    if method == ESFT:
        raise DeltaError(
            f"{delta}: got a delta of type {ESFT}, expected {EXPERT_LORA}: its rows replace whole experts, and a LoRA "
            "of a rank worth its size would be another model.\n"
            "Export it with `--to merged`, serve it beside its base with `metier serve`, or train it again with "
            "`--method expert_lora`."
        )
    if method != EXPERT_LORA:
        raise DeltaError(
            f"{delta}: got an adapter of type {method}, expected {EXPERT_LORA}: it is no LoRA.\n"
            "Export it with `--to merged` if its method merges, or serve it beside its base."
        )
    files = read_delta(delta)
    if files.config.whole_modules:
        raise DeltaError(
            f"{delta}: the delta replaces {files.config.whole_modules[0]} too, which a LoRA on experts cannot hold, "
            "and leaving it out would be another model.\nExport it with `--to merged`, or serve it beside its base."
        )
    return files


def _with_routers(base: str | Path, *, trust_remote_code: bool) -> PreTrainedModel:
    """The base with its routers' values, which its fingerprint needs, and as few others as its files allow."""
    model, files = skeleton(base, trust_remote_code=trust_remote_code), open_checkpoint(checkpoint_folder(base))
    try:
        if files is None:
            raise CannotStreamError("it has no safetensors files")
        load_routers(model, files)
    except CannotStreamError:
        return load(base, trust_remote_code=trust_remote_code).model
    return model


def _check_finite(files: Delta) -> None:
    bad = rows_not_finite(files)
    if bad:
        raise CorruptDeltaError(
            f"{files.folder}: {bad[0]} holds values that are not finite; nothing was exported.\n"
            "The run diverged: train it again with a lower learning rate."
        )


def _describe(folder: Path, files: Delta, base: str, layout: str, rank: int) -> None:
    fingerprint = str(files.config.base_fingerprint)
    facts = {
        "metier_version": __version__,
        "base": base,
        "base_fingerprint": fingerprint,
        "delta": str(files.folder),
        "layout": layout,
        "rank": rank,
        "experts": {str(layer): list(ids) for layer, ids in files.config.experts.items()},
    }
    (folder / EXPORT_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    card = lora_card(
        base=base,
        fingerprint=fingerprint,
        delta=str(files.folder),
        layout=layout,
        rank=rank,
        changed=files.config.experts,
    )
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def _readers(kind: str, layout: LoraLayout, rank: int) -> str:
    """Who reads the layout, as far as that is known."""
    family = SERVED.get(kind)
    peft_reads = f"PEFT from {MIN_PEFT} on loads it without metier."
    if layout == "per-expert":
        peft_reads = "PEFT loads it as a LoRA from before transformers stacked experts, where it knows the family so."
    if family is None:
        return f"{peft_reads} Whether vLLM reads it for {kind} was not checked."
    if family.lora_layout != layout:
        return f"{peft_reads} vLLM takes {family.architecture}'s in the layout {family.lora_layout}: see `--layout`."
    return (
        f"{peft_reads} vLLM, which has LoRA on experts in this layout from {_VLLM[layout]} on, takes it for "
        f"{family.architecture} with `--max-lora-rank` of at least {rank}. Its loader was read; the server was not run."
    )
