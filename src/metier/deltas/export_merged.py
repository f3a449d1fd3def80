"""Export a merged checkpoint for tools that know nothing of metier: vLLM, SGLang, transformers, llama.cpp.

The weights are those of a merge, in the family's published layout. All that lies beside them is the base's own, as its
publisher wrote it: a configuration that transformers writes anew may be in a form that a server's older transformers
does not read, and would then serve with defaults.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from metier.deltas.adapter_config import adapter_type
from metier.deltas.checkpoint_files import CheckpointFiles, copy_beside, open_checkpoint
from metier.deltas.format import CARD_FILE, ESFT, EXPERT_LORA
from metier.deltas.merge import MERGE_FILE, merge
from metier.deltas.merge_adapter import check_answers, check_merges, merge_adapter
from metier.deltas.read import read_delta
from metier.deltas.served_families import SERVED, expert_shapes
from metier.deltas.shards import reshard
from metier.deltas.whole_folder import check_replaceable, written_whole
from metier.errors import ConfigError, DeltaError, UnsupportedModelError
from metier.models.load import resolve_source
from metier.models.moe import moe_layers
from metier.models.skeleton import checkpoint_folder, skeleton

_CONFIG = "config.json"
_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def export_merged(
    delta: Path, base: str | Path, output: Path, *, max_shard_bytes: int | None, trust_remote_code: bool
) -> list[str]:
    """Write base and delta as one checkpoint, whole or not at all.

    Args:
        delta: of experts, or any PEFT adapter whose method merges.
        base: a folder, a hub id, or "embedded".
        output: new, empty, or a former merge's folder, which is then replaced.
        max_shard_bytes: most bytes of tensors in a file; None keeps the files as the merge writes them.
        trust_remote_code: as `metier.load`.

    Returns:
        what was written and what was checked, as sentences.

    Raises:
        ConfigError, CorruptDeltaError, BaseMismatchError, SelectionError, ModelError: as `merge`.
        DeltaError: the adapter's method does not merge, or the result is not what a server would look for.
    """
    check_replaceable(output, known=None, marker=MERGE_FILE, what="a former merge")
    _refuse_base(base, output)
    is_of_experts = adapter_type(delta) in (ESFT, EXPERT_LORA)
    if is_of_experts:
        read_delta(delta)  # before a base is downloaded
    else:
        check_merges(delta)
    with written_whole(output) as new:
        if is_of_experts:
            merge(delta, base, new, trust_remote_code=trust_remote_code)
            made = None
        else:
            made = merge_adapter(delta, base, new, trust_remote_code=trust_remote_code)
        model = skeleton(base, trust_remote_code=trust_remote_code)
        _put_bases_own_beside(checkpoint_folder(base), new)
        _mend_config(new, type(model).__name__, {} if made is None else made.config_changes)
        if max_shard_bytes is not None:
            reshard(new, max_shard_bytes)
        files = open_checkpoint(new)
        assert files is not None, "a merge writes safetensors files"
        sentences = [_size(files, output), _served(files, model)]
        if made is not None:
            check_answers(new, delta, made, trust_remote_code=trust_remote_code)
            sentences.append("Loaded again, the checkpoint answers a fixed batch of tokens as base and adapter did.")
    return sentences


def _refuse_base(base: str | Path, output: Path) -> None:
    source = Path(resolve_source(base))
    if output.exists() and source.is_dir() and output.samefile(source):
        raise ConfigError(f"{output}: got the base's own folder as output, which would be lost. Choose another place.")


def _put_bases_own_beside(base: Path, folder: Path) -> None:
    """Replace what a merge wrote beside the weights by the base's files; what tells of the merge stays."""
    own = {path.name: path.read_bytes() for path in (folder / MERGE_FILE, folder / CARD_FILE)}
    for path in folder.iterdir():
        if path.is_file() and not path.name.endswith((".safetensors", ".index.json")):
            path.unlink()
    copy_beside(base, folder)
    for name, data in own.items():
        (folder / name).write_bytes(data)


def _mend_config(folder: Path, class_name: str, changes: dict[str, Any]) -> None:
    """Write `config.json` anew where a merge changed it, where it lacks what a server goes by, or where it tells of a
    quantisation that is gone."""
    path, files = folder / _CONFIG, open_checkpoint(folder)
    assert files is not None, "a merge writes safetensors files"
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    before = json.dumps(values)
    values |= changes
    parts = [values, values.get("text_config") or {}]
    for part in parts:
        part.pop("quantization_config", None)
    if not values.get("architectures"):
        values["architectures"] = [class_name]
    if not any(name in part for part in parts for name in ("dtype", "torch_dtype")):
        stored = Counter(tensor.dtype for _, tensor in files.tensors.values() if tensor.dtype in _DTYPES)
        values["dtype"] = _DTYPES[stored.most_common(1)[0][0]]
    if json.dumps(values) != before:
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _size(files: CheckpointFiles, output: Path) -> str:
    num_bytes = sum(tensor.end_byte - tensor.first_byte for _, tensor in files.tensors.values())
    num_files = len(files.file_names())
    return f"Merged checkpoint of {num_bytes:,} bytes in {num_files} file{'s' * (num_files > 1)}: {output}"


def _served(files: CheckpointFiles, model: PreTrainedModel) -> str:
    """Hold the written names and shapes to what the servers' loaders look for, where that is known."""
    kind = str(model.config.model_type)
    family = SERVED.get(kind)
    if family is None:
        return (
            f"The names and shapes are the base's. Whether vLLM and SGLang serve {kind} was not checked: their loaders "
            "of it were not read."
        )
    try:
        layers = moe_layers(model)
    except UnsupportedModelError:  # a configuration of the family without a sparse layer
        layers = []
    for layer in layers:
        expected = expert_shapes(
            family,
            layer.index,
            num_experts=layer.num_experts,
            hidden_size=layer.hidden_size,
            moe_intermediate_size=layer.moe_intermediate_size,
        )
        for name, shape in expected.items():
            got = files.tensors[name][1].shape if name in files.tensors else None
            if got != shape:
                raise DeltaError(
                    f"{name}: got {'no such tensor' if got is None else f'shape {list(got)}'} in the merged "
                    f"checkpoint, expected {list(shape)}, which vLLM's and SGLang's {family.architecture} look for."
                    "\nNothing was written. Install the versions of metier's constraints file."
                )
    return (
        f"The experts' names and shapes are those that the loaders of {family.architecture} in vLLM and SGLang look "
        "for. The loaders were read; the servers were not run."
    )
