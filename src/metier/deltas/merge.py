"""Merge a delta into its base and save the result as an ordinary model, which needs neither metier nor PEFT."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from metier import __version__
from metier.deltas.card import licence_of, merged_card
from metier.deltas.changes import changed_parameters, merged_rows
from metier.deltas.checkpoint_files import open_checkpoint
from metier.deltas.format import CARD_FILE
from metier.deltas.on_base import check_experts, check_fingerprint, check_tensors, rows_not_finite
from metier.deltas.read import Delta, read_delta
from metier.deltas.stream_merge import CannotStreamError, load_routers, stream_merge
from metier.deltas.whole_folder import check_replaceable, written_whole
from metier.errors import ConfigError, CorruptDeltaError
from metier.models.load import LoadedModel, load
from metier.models.moe import moe_layers
from metier.models.skeleton import checkpoint_folder, skeleton
from metier.models.unwrap import bare_model

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

    The folder has the checkpoint's own layout, the tokenizer, the generation configuration and all else that lies
    beside the base's weights, and a model card. It appears whole or not at all.

    Where `base` is a folder or a hub id, its files are copied and written over, with no more than one layer in memory.
    Files that do not allow this (quantised, no safetensors, stored in another form than the family's), a `dtype`, or a
    `base` that is loaded already are merged through the model in memory; transformers then turns its stacked experts
    back into what the family publishes.

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
    if not isinstance(base, LoadedModel) and dtype is None and _streamed(files, base, output, trust_remote_code):
        return output
    if isinstance(base, LoadedModel):
        if dtype is not None:
            raise ConfigError(f"dtype: got {dtype} for a base that is loaded already; give it to `metier.load`.")
        loaded = base
    else:
        loaded = load(base, dtype=dtype or "auto", trust_remote_code=trust_remote_code)
    base_folder = Path(loaded.model.name_or_path)
    _check(files, loaded.model, loaded.source, base_folder, output)
    with written_whole(output) as new, rows_in_place(files, loaded.model):
        loaded.model.save_pretrained(new)
        loaded.tokenizer.save_pretrained(new)
        _describe(new, files, loaded.source, licence_of(base_folder))
    return output


def _streamed(delta: Delta, base: str | Path, output: Path, trust_remote_code: bool) -> bool:
    """Merge in the base's files, a layer at a time; False where they do not allow it, which a warning says."""
    model, folder = skeleton(base, trust_remote_code=trust_remote_code), checkpoint_folder(base)
    try:
        files = open_checkpoint(folder)
        if files is None:
            raise CannotStreamError("it has no safetensors files")
        if getattr(model.config, "quantization_config", None) is not None:
            raise CannotStreamError("it is quantised")
        load_routers(model, files)
        _check(delta, model, str(base), folder, output)
        with written_whole(output) as new:
            stream_merge(delta, model, files, new)
            _describe(new, delta, str(base), licence_of(folder))
    except CannotStreamError as reason:
        warnings.warn(f"merge: {base} is loaded as a whole, because {reason}.", stacklevel=3)
        return False
    return True


def _check(delta: Delta, model: nn.Module, source: str, base_folder: Path, output: Path) -> None:
    """Everything that is refused before a file is written."""
    if output.exists() and base_folder.is_dir() and output.samefile(base_folder):
        raise ConfigError(f"{output}: got the base's own folder as output, which would be lost. Choose another place.")
    check_fingerprint(delta, model, source)
    check_experts(delta, model, source)
    check_tensors(delta, model)
    bad = rows_not_finite(delta)
    if bad:
        raise CorruptDeltaError(
            f"{delta.folder}: {bad[0]} holds values that are not finite; nothing was merged.\n"
            "The run diverged: train it again with a lower learning rate."
        )


@contextmanager
def rows_in_place(delta: Delta, model: nn.Module) -> Iterator[None]:
    """The delta's rows in the base's own tensors while the block runs, then the base's bits again."""
    rows, saved, whole = delta.load_rows(), [], []
    try:
        with torch.no_grad():
            for layer in moe_layers(model):
                ids = list(delta.config.experts.get(layer.index, ()))
                for name in changed_parameters(delta, layer) if ids else ():
                    weight = getattr(layer.experts, name)
                    merged = merged_rows(delta, rows, layer, name)
                    saved.append((weight, ids, weight[ids].clone()))
                    weight[ids] = merged
            for path, values in delta.load_whole().items():
                for name, parameter in bare_model(model).get_submodule(path).named_parameters():
                    whole.append((parameter, parameter.detach().clone()))
                    parameter.copy_(values[name])
        yield
    finally:
        with torch.no_grad():
            for weight, ids, base_rows in saved:
                weight[ids] = base_rows
            for parameter, before in whole:
                parameter.copy_(before)


def _describe(folder: Path, delta: Delta, source: str, licence: str) -> None:
    fingerprint = delta.config.base_fingerprint
    assert fingerprint is not None, "check_fingerprint refuses a delta without one"
    facts = {
        "metier_version": __version__,
        "base": source,
        "base_fingerprint": fingerprint,
        "delta": str(delta.folder),
        "experts": {str(layer): list(ids) for layer, ids in delta.config.experts.items()},
        "licence_of_base": licence,
    }
    (folder / MERGE_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    card = merged_card(
        base=source,
        fingerprint=fingerprint,
        delta=str(delta.folder),
        experts=delta.config.experts,
        licence=licence,
    )
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
