"""The ways out of metier: a delta in the form that other tools take, by one call."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from metier.deltas.served_families import LoraLayout
from metier.errors import ConfigError

Target = Literal["merged", "peft-lora", "esft"]


def export(
    delta: str | Path,
    base: str | Path,
    output: str | Path,
    *,
    to: Target,
    layout: LoraLayout | None = None,
    max_shard_size: str | None = None,
    trust_remote_code: bool = False,
) -> list[str]:
    """Write a delta for other tools. The folder appears whole or not at all. `docs/exporting.md` tells which to use.

    Args:
        delta: the adapter's folder.
        base: the one it was trained on: a folder, a hub id, or "embedded".
        output: new, empty, or a former export's of the same kind, which is then replaced.
        to: `merged`, base and delta as one checkpoint for vLLM, SGLang, transformers and llama.cpp's converter;
            `peft-lora`, a LoRA on experts as an ordinary LoRA; `esft`, a checkpoint of ESFT's own code.
        layout: of `peft-lora`: `parameters`, PEFT's own and the default, or `per-expert`, vLLM's.
        max_shard_size: of `merged`: most bytes of tensors in a file, such as "5GB"; None keeps the base's files.
        trust_remote_code: as `metier.load`.

    Returns:
        what was written and what was checked, as sentences.

    Raises:
        ConfigError: an option does not go with `to`, or `output` holds other things.
        DeltaError: the delta cannot have that form; the message says what it can have.
        CorruptDeltaError, BaseMismatchError, SelectionError, ModelError: as `metier.merge`.
    """
    for name, value, wanted in (("layout", layout, "peft-lora"), ("max_shard_size", max_shard_size, "merged")):
        if value is not None and to != wanted:
            raise ConfigError(f"{name}: got {value!r}, which goes with {wanted} and not with {to}. Leave it out.")
    delta, output = Path(delta), Path(output)
    if to == "merged":
        from metier.deltas.export_merged import export_merged
        from metier.deltas.shards import shard_bytes

        max_shard_bytes = None if max_shard_size is None else shard_bytes(max_shard_size)
        return export_merged(delta, base, output, max_shard_bytes=max_shard_bytes, trust_remote_code=trust_remote_code)
    if to == "peft-lora":
        from metier.deltas.export_lora import export_lora

        return export_lora(delta, base, output, layout=layout or "parameters", trust_remote_code=trust_remote_code)
    if to == "esft":
        from metier.deltas.esft_checkpoint import write_esft_checkpoint

        write_esft_checkpoint(delta, base, output, trust_remote_code=trust_remote_code)
        return [f"ESFT checkpoint: {output}"]
    raise ConfigError(f"to: got {to!r}, expected one of {', '.join(get_args(Target))}.")
