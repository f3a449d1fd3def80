"""From a folder to a delta that can be served on a base: whatever cannot be served rightly is refused, and by name.

Opening reads headers alone, so that hundreds of deltas are in service at once and their sizes are known; their values
are read, and checked against their sums, each time that they are loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from metier.catalogue.tree import METHODS
from metier.deltas.adapter_config import AdapterConfig, read_adapter_config
from metier.deltas.format import CONFIG_FILE, ESFT, EXPERT_LORA, TENSORS_FILE, rows_name
from metier.deltas.on_base import compare_experts, compare_fingerprint, compare_tensors
from metier.deltas.read import Delta, read_delta
from metier.errors import BaseMismatchError, DeltaError
from metier.serving.checked_reader import CheckedReader, FileStamp, TensorFile
from metier.serving.model_facts import ModelFacts
from metier.serving.peft_lora import LORA, read_peft_lora
from metier.serving.served_delta import MERGE_INSTEAD, ServedDelta, ServedTensor


def open_served_delta(folder: str | Path, *, facts: ModelFacts, reader: CheckedReader) -> ServedDelta:
    """The delta in `folder`, checked in all but its values, none of which is loaded.

    Args:
        folder: a PEFT folder: metier's own ESFT and LoRA on experts, or PEFT's LoRA.
        facts: of the base.
        reader: reads the values later.

    Raises:
        CorruptDeltaError: as `read_delta`.
        BaseMismatchError, SelectionError: it was trained on another base, or does not fit this one.
        DeltaError: it cannot be served; the message says what can be done with it.
    """
    folder = Path(folder)
    values = _config_values(folder)
    method = values.get("peft_type")
    if method == LORA:
        return read_peft_lora(folder, values, facts=facts, reader=reader)
    if method not in (None, ESFT, EXPERT_LORA):
        raise _other_method(folder, method)
    if method is None and (folder / "config.json").is_file() and not (folder / CONFIG_FILE).exists():
        raise DeltaError(
            f"{folder}: got a whole model, expected a delta: {CONFIG_FILE} and {TENSORS_FILE}.\n"
            "A merged model is a base of its own: serve it by `metier serve --model`, or give the delta's folder."
        )
    _refuse_whole_modules(folder, read_adapter_config(folder))
    path = folder / TENSORS_FILE
    stamp = FileStamp.of(path) if path.exists() else None
    delta = read_delta(folder, sums_later=True)
    assert stamp is not None, "read_delta raises where there is no file"
    if not facts.layers:
        raise BaseMismatchError(
            f"{folder}: the delta is of experts, but base {facts.name!r} has no MoE layer.\n"
            "Serve it on the base that it was trained on."
        )
    compare_fingerprint(delta, facts.fingerprint, facts.name)
    compare_experts(delta, facts.layers, facts.name)
    compare_tensors(delta, facts.layers)
    return _served(delta, facts, stamp, reader)


def read_served_delta(folder: str | Path, *, facts: ModelFacts) -> ServedDelta:
    """The delta in `folder` with its values in the host's memory, checked in all.

    Args:
        folder: as `open_served_delta`.
        facts: of the base.

    Raises:
        CorruptDeltaError, BaseMismatchError, SelectionError, DeltaError: as `open_served_delta` and
            `ServedDelta.load`.
    """
    reader = CheckedReader()
    try:
        return open_served_delta(folder, facts=facts, reader=reader).load()
    finally:
        reader.close()


def _served(delta: Delta, facts: ModelFacts, stamp: FileStamp, reader: CheckedReader) -> ServedDelta:
    config = delta.config
    dtypes = {x.index: {n: getattr(x.experts, n).dtype for n in x.parameter_names()} for x in facts.layers}
    tensors = []
    for layer, path in config.paths.items():
        start = rows_name(path, "", config.method)
        for name in sorted(name for name in delta.tensors if name.startswith(start)):
            parameter = name.removeprefix(start)
            # low-rank changes are computed in the dtype of the weights that they change
            dtype = dtypes[layer].get(parameter) or next(iter(dtypes[layer].values()))
            tensors.append(
                ServedTensor(
                    name=name,
                    path=path,
                    layer=layer,
                    parameter=parameter,
                    stored=delta.tensors[name],
                    dtype=dtype,
                )
            )
    scales = {}
    if config.low_rank is not None:
        for layer, path in config.paths.items():
            scales[path] = tuple(config.low_rank.scale(layer, expert) for expert in config.experts[layer])
    return ServedDelta(
        kind="esft" if config.method == ESFT else "expert_lora",
        folder=delta.folder,
        file=TensorFile(path=delta.folder / TENSORS_FILE, tensors=delta.tensors, sums=delta.sums, stamp=stamp),
        reader=reader,
        tensors=tuple(tensors),
        experts=config.experts,
        scales=scales,
    )


def _config_values(folder: Path) -> dict[str, Any]:
    """Of `adapter_config.json`; none where it cannot be read, of which `read_adapter_config` says why."""
    try:
        values = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _other_method(folder: Path, method: Any) -> DeltaError:
    known = METHODS.get(str(method).lower())
    merges = known is None or known.merges
    then = MERGE_INSTEAD if merges else "It does not merge either: load it with `peft.PeftModel.from_pretrained`."
    return DeltaError(
        f"{folder}: got an adapter of type {method!r:.40}, expected one of {ESFT}, {EXPERT_LORA} and {LORA}, which a "
        f"server keeps apart in one batch.\n{then}"
    )


def _refuse_whole_modules(folder: Path, config: AdapterConfig) -> None:
    trained = [*config.also_train, *config.whole_modules]
    if trained:
        raise DeltaError(
            f"{folder}: the delta replaces whole modules beside the experts ({', '.join(trained[:3])}"
            f"{' …' if len(trained) > 3 else ''}), which requests of other deltas in the batch need as they are.\n"
            f"{MERGE_INSTEAD}"
        )
