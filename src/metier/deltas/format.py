"""The names and sums in a delta's files: what `save.py` writes and `read.py` checks.

docs/delta-format.md describes the same for people. Torch-free, so that looking at a delta takes no time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
COMPRESSED_FILE = "compressed_delta.safetensors"
"""In place of `TENSORS_FILE` where a delta is compressed."""

ESFT = "ESFT"
EXPERT_LORA = "EXPERT_LORA"
"""The `peft_type` of the deltas that are read, verified and merged: rows of experts, or low-rank changes of them."""
DAMAGED = "The file was altered or is damaged; copy the delta again from where it was made, or train it again."
"""The next step in errors about a delta's files."""
FORMAT_VERSION = "2"
COMPRESSED_VERSION = "1"

NAME_PREFIX = "base_model.model."
"""What PEFT puts before every path of the base."""
ROWS_PREFIXES = {ESFT: "esft_", EXPERT_LORA: "expert_lora_"}
"""What stands, by method, before the name of a layer's tensor: the base parameter's, or that of a factor."""
EXPERT_IDS = "expert_ids"
"""What stands in a parameter's place in the name of the tensor that says which experts a layer's rows are."""

HEADER_SUM = "header_sha256"
LOW_RANK = "low_rank"
"""Metadata key of a LoRA's ranks and scales."""
METADATA_KEYS = frozenset(
    {
        "format",
        "metier_delta",
        "metier_version",
        "peft_type",
        "base_fingerprint",
        "base_expert_parameters",
        "num_experts",
        "experts",
        "sha256",
        HEADER_SUM,
    }
)
"""Keys of the safetensors metadata that `save_delta` writes, all of them, and no others but `LOW_RANK` in a LoRA."""


def rows_name(path: str, parameter: str, method: str = ESFT) -> str:
    """The stored name of an expert layer's rows, such as
    `base_model.model.model.layers.1.mlp.experts.esft_down_proj`."""
    return f"{NAME_PREFIX}{path}.{ROWS_PREFIXES[method]}{parameter}"


def tensor_sum(dtype: str, shape: Sequence[int], chunks: Iterable[bytes | memoryview]) -> str:
    """sha256 of one stored tensor, in hexadecimal: a line `BF16 [2, 64, 32]`, then the bytes as they lie in the file.

    Args:
        dtype: as safetensors spells it.
        shape: as safetensors gives it.
        chunks: the tensor's bytes, little-endian, in order.
    """
    digest = hashlib.sha256(f"{dtype} {list(shape)}\n".encode())
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def header_sum(metadata: Mapping[str, str]) -> str:
    """sha256 of all metadata but this sum itself, as JSON with sorted keys: it covers the tensors' sums, and they the
    rest of the file."""
    rest = {key: value for key, value in metadata.items() if key != HEADER_SUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def experts_text(experts: Mapping[int, Sequence[int]]) -> str:
    """Expert ids by layer as the metadata has them, such as `{"1": [8, 26]}`."""
    return json.dumps({str(layer): list(ids) for layer, ids in sorted(experts.items())})
