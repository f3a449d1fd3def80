"""Merge a delta into its base and save the result as an ordinary model, which needs neither metier nor PEFT."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from metier import __version__
from metier.deltas.card import licence_of, merged_card
from metier.deltas.changes import changed_parameters, merged_rows
from metier.deltas.format import CARD_FILE
from metier.deltas.on_base import check_experts, check_fingerprint, check_tensors, rows_not_finite
from metier.deltas.read import Delta, read_delta
from metier.deltas.whole_folder import check_replaceable, written_whole
from metier.errors import ConfigError, CorruptDeltaError
from metier.models.load import LoadedModel, load
from metier.models.moe import moe_layers

MERGE_FILE = "metier_merge.json"
"""What was merged into what; by this file a former merge is known."""


def merge(
    delta: str | Path,
    base: str | Path | LoadedModel,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write the base with a delta's rows in place of its own.

    The folder has the checkpoint's own layout (transformers turns its stacked experts back into what the family
    publishes), the tokenizer, the generation configuration and a model card. It appears whole or not at all.

    Args:
        delta: the adapter's folder.
        base: a folder, a hub id, "embedded", or a model from `metier.load`, which is given back as it was.
        output: new, empty, or a former merge's folder, which is then replaced.
        dtype: to load the base in; None keeps its own. Only where `base` is not loaded yet.
        trust_remote_code: as `metier.load`.

    Returns:
        `output`.

    Raises:
        ConfigError: `output` holds other things, or is the base; `dtype` is given for a loaded base.
        CorruptDeltaError: as `read_delta`; or the delta's tensors do not fit the base's, or are not finite.
        BaseMismatchError: the delta was trained on another base.
        SelectionError: the delta replaces an expert that the base does not have.
        ModelError: the base cannot be loaded.
    """
    output = Path(output)
    check_replaceable(output, known=None, marker=MERGE_FILE, what="a former merge")
    files = read_delta(delta)
    if isinstance(base, LoadedModel):
        if dtype is not None:
            raise ConfigError(f"dtype: got {dtype} for a base that is loaded already; give it to `metier.load`.")
        loaded = base
    else:
        loaded = load(base, dtype=dtype or "auto", trust_remote_code=trust_remote_code)
    base_folder = Path(loaded.model.name_or_path)
    if output.exists() and base_folder.is_dir() and output.samefile(base_folder):
        raise ConfigError(f"{output}: got the base's own folder as output, which would be lost. Choose another place.")
    check_fingerprint(files, loaded.model, loaded.source)
    check_experts(files, loaded.model, loaded.source)
    check_tensors(files, loaded.model)
    bad = rows_not_finite(files)
    if bad:
        raise CorruptDeltaError(
            f"{files.folder}: {bad[0]} holds values that are not finite; nothing was merged.\n"
            "The run diverged: train it again with a lower learning rate."
        )
    with written_whole(output) as new, _rows_in_place(files, loaded.model):
        loaded.model.save_pretrained(new)
        loaded.tokenizer.save_pretrained(new)
        _describe(new, files, loaded, licence_of(base_folder))
    return output


@contextmanager
def _rows_in_place(delta: Delta, model: nn.Module) -> Iterator[None]:
    """The delta's rows in the base's own tensors while the block runs, then the base's bits again."""
    rows, saved = delta.load_rows(), []
    try:
        with torch.no_grad():
            for layer in moe_layers(model):
                ids = list(delta.config.experts.get(layer.index, ()))
                for name in changed_parameters(delta, layer) if ids else ():
                    weight = getattr(layer.experts, name)
                    merged = merged_rows(delta, rows, layer, name)
                    saved.append((weight, ids, weight[ids].clone()))
                    weight[ids] = merged
        yield
    finally:
        with torch.no_grad():
            for weight, ids, base_rows in saved:
                weight[ids] = base_rows


def _describe(folder: Path, delta: Delta, base: LoadedModel, licence: str) -> None:
    fingerprint = delta.config.base_fingerprint
    assert fingerprint is not None, "check_fingerprint refuses a delta without one"
    facts = {
        "metier_version": __version__,
        "base": base.source,
        "base_fingerprint": fingerprint,
        "delta": str(delta.folder),
        "experts": {str(layer): list(ids) for layer, ids in delta.config.experts.items()},
        "licence_of_base": licence,
    }
    (folder / MERGE_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    card = merged_card(
        base=base.source,
        fingerprint=fingerprint,
        delta=str(delta.folder),
        experts=delta.config.experts,
        licence=licence,
    )
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
