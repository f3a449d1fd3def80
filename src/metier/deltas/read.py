"""Read a delta with every check that its own files allow, before a tensor of it is used.

A delta that `save_delta` wrote carries sums over all its content, so no altered byte goes unseen but in the padding
of the header, where there is nothing to alter, and in the notes of `adapter_config.json` (its names and versions),
which may be edited. One that PEFT's own `save_pretrained` wrote has no sums: its tensors, which say what experts
they are, are checked against its configuration alone.
"""

# k selected experts of a layer, D hidden_size, F moe_intermediate_size, U = 2F where experts are gated, else F

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from metier.deltas.adapter_config import AdapterConfig, read_adapter_config
from metier.deltas.format import (
    DAMAGED,
    ESFT,
    EXPERT_IDS,
    FORMAT_VERSION,
    HEADER_SUM,
    LOW_RANK,
    METADATA_KEYS,
    NAME_PREFIX,
    ROWS_PREFIXES,
    TENSORS_FILE,
    experts_text,
    header_sum,
    rows_name,
)
from metier.deltas.low_rank import check_stacks
from metier.deltas.tensors_file import (
    DTYPES,
    IDS_DTYPE,
    StoredTensor,
    read_header,
    stored_integers,
    stored_sum,
)
from metier.errors import CorruptDeltaError, DeltaError

if TYPE_CHECKING:
    from torch import Tensor

_PARAMETERS = tuple(
    frozenset({up, "down_proj", *biases})
    for up in ("gate_up_proj", "up_proj")
    for biases in ((), (f"{up}_bias", "down_proj_bias"))
)
"""The sets of stacked parameters that transformers' experts contract knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """A delta whose files passed every check; its tensors are not loaded yet."""

    folder: Path
    config: AdapterConfig
    tensors: dict[str, StoredTensor]
    """The rows and whole modules, without the expert ids."""
    metadata: dict[str, str]
    """Of the safetensors file."""

    @property
    def has_sums(self) -> bool:
        """Whether the files carried sums and were checked against them."""
        return HEADER_SUM in self.metadata

    @property
    def sums(self) -> dict[str, str]:
        """`tensor_sum` of each stored tensor by its name; none where the files carry none."""
        sums: dict[str, str] = json.loads(self.metadata.get("sha256", "{}"))
        return sums

    def load_rows(self) -> dict[int, dict[str, Tensor]]:
        """The trained rows by decoder layer and the base parameter's name, in their stored dtype.

        Returns:
            tensors of shape (k, …) in the layout of the base's stacked parameter; row i replaces expert
            `config.experts[layer][i]`. Of a LoRA the four stacks `up_A`, `up_B`, `down_A`, `down_B` instead.
        """
        from safetensors.torch import load_file  # torch only when tensors are wanted

        loaded = load_file(self.folder / TENSORS_FILE)
        rows: dict[int, dict[str, Tensor]] = {}
        for layer, path in self.config.paths.items():
            start = rows_name(path, "", self.config.method)
            rows[layer] = {name.removeprefix(start): t for name, t in loaded.items() if name.startswith(start)}
            del rows[layer][EXPERT_IDS]
        return rows

    def load_whole(self) -> dict[str, dict[str, Tensor]]:
        """Parameters of the modules that are replaced whole: by module path, then by parameter name."""
        from safetensors import safe_open  # torch only when tensors are wanted

        whole: dict[str, dict[str, Tensor]] = {path: {} for path in self.config.whole_modules}
        if not whole:
            return whole
        with safe_open(self.folder / TENSORS_FILE, framework="pt") as file:
            for name in self.tensors:
                path = whole_module_of(name, self.config)
                if path is not None:
                    whole[path][name.removeprefix(f"{NAME_PREFIX}{path}.")] = file.get_tensor(name)
        return whole


def read_delta(folder: str | Path, *, whole_rows_for: str | None = None, sums_later: bool = False) -> Delta:
    """The delta in `folder`, checked.

    Args:
        folder: a PEFT folder with `adapter_config.json` and `adapter_model.safetensors`.
        whole_rows_for: what is to be done with it where only deltas that replace whole rows will do.
        sums_later: whoever reads the tensors compares them with `Delta.sums` while reading, so that they are read once.

    Raises:
        CorruptDeltaError: the folder holds no delta, or its files are truncated, altered, or do not fit together.
        DeltaError: another version of metier wrote it in another format; or it is a LoRA, and whole rows are needed.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    stored, metadata = read_header(folder)
    where = folder / TENSORS_FILE
    has_sums = not set(metadata) <= {"format"}  # else PEFT's own save_pretrained wrote it
    if has_sums:
        _check_metadata(where, metadata, config)
    if whole_rows_for is not None and config.method != ESFT:
        raise DeltaError(
            f"{folder}: got a delta of type {config.method}, but {whole_rows_for} needs one of type {ESFT}, whose rows "
            "replace whole experts.\nThis one is small as it is: serve it beside its base, or `metier merge` it."
        )
    if whole_rows_for is not None and config.whole_modules:
        raise DeltaError(
            f"{folder}: the delta replaces {config.whole_modules[0]} too, but {whole_rows_for} knows routed "
            "experts only.\n"
            "Serve it beside its base, or `metier merge` it."
        )
    ids = {rows_name(path, EXPERT_IDS, config.method) for path in config.paths.values()}
    rows = {name: tensor for name, tensor in stored.items() if name not in ids}
    _check_tensors(where, rows, config)
    _check_ids(where, stored, config)
    if has_sums:
        check_sums(where, stored, metadata, later=rows.keys() if sums_later else ())
    return Delta(folder=folder, config=config, tensors=rows, metadata=metadata)


def _check_metadata(where: Path, metadata: dict[str, str], config: AdapterConfig) -> None:
    # the sum first: the other values are compared only once they are known to be what was written
    if metadata.get(HEADER_SUM) != header_sum(metadata):
        raise CorruptDeltaError(f"{where}: the metadata does not fit its own {HEADER_SUM}.\n{DAMAGED}")
    if metadata.get("metier_delta") != FORMAT_VERSION:
        raise DeltaError(
            f"{where}: got a delta of format {metadata.get('metier_delta')!r}, expected {FORMAT_VERSION!r}.\n"
            f"It was written by metier {metadata.get('metier_version', 'of unknown version')}; install that."
        )
    expected_keys = METADATA_KEYS if config.low_rank is None else METADATA_KEYS | {LOW_RANK}
    if metadata.keys() != expected_keys:
        names = sorted(metadata.keys() ^ expected_keys)
        raise CorruptDeltaError(f"{where}: metadata keys are missing or unknown: {', '.join(names)}.\n{DAMAGED}")
    said = {
        "peft_type": config.method,
        "base_fingerprint": config.base_fingerprint,
        "num_experts": str(config.num_experts),
        "experts": experts_text(config.experts),
    }
    if config.low_rank is not None:
        said[LOW_RANK] = config.low_rank.text()
    for key, got in said.items():
        if metadata[key] != got:
            raise CorruptDeltaError(
                f"{where}: {key}: adapter_config.json says {got}, but the tensors were written with "
                f"{metadata[key]}.\nOne of the two files was altered or comes from another delta; copy both again."
            )


def _check_tensors(where: Path, tensors: dict[str, StoredTensor], config: AdapterConfig) -> None:
    """Each selected layer has the rows of one complete set of stacked parameters, and there is nothing else."""
    left = dict(tensors)
    for layer, path in config.paths.items():
        start = rows_name(path, "", config.method)
        rows = {name.removeprefix(start): left.pop(name) for name in tensors if name.startswith(start)}
        if config.low_rank is not None:
            ranks = [config.low_rank.rank(layer, expert) for expert in config.experts[layer]]
            check_stacks(f"{where}: layers.{layer}", rows, ranks)
            continue
        if frozenset(rows) not in _PARAMETERS:
            raise CorruptDeltaError(
                f"{where}: layers.{layer}: got rows of {sorted(rows) or 'no parameter'}, expected gate_up_proj (or "
                f"up_proj) and down_proj, and where the family has biases both of theirs.\n{DAMAGED}"
            )
        _check_shapes(f"{where}: layers.{layer}", rows, len(config.experts[layer]))
    for path in config.whole_modules:
        own = {name: left.pop(name) for name in tensors if whole_module_of(name, config) == path and name in left}
        bad = sorted(name for name, tensor in own.items() if tensor.dtype not in DTYPES or 0 in tensor.shape)
        if bad or not own:
            got = f"{bad[0]} as {own[bad[0]].dtype} {list(own[bad[0]].shape)}" if bad else "no tensor"
            raise CorruptDeltaError(
                f"{where}: {path}: got {got}, expected the parameters of a module that is replaced whole.\n{DAMAGED}"
            )
    if left:
        raise CorruptDeltaError(
            f"{where}: got tensor {min(left)!r}, which is none of the rows that adapter_config.json selects (they are "
            f"named {ROWS_PREFIXES[config.method]}… in layers {list(config.paths)}).\n{DAMAGED}"
        )


def whole_module_of(name: str, config: AdapterConfig) -> str | None:
    """The path of the whole module that a stored tensor is a parameter of, or None."""
    return next((path for path in config.whole_modules if name.startswith(f"{NAME_PREFIX}{path}.")), None)


def _check_ids(where: Path, stored: dict[str, StoredTensor], config: AdapterConfig) -> None:
    """Each selected layer says which experts its rows are, and they are the configuration's."""
    for layer, path in config.paths.items():
        ids = stored.get(rows_name(path, EXPERT_IDS, config.method))
        expected = list(config.experts[layer])
        if ids is None or ids.dtype != IDS_DTYPE or ids.shape != (len(expected),):
            got = "no such tensor" if ids is None else f"{ids.dtype} {list(ids.shape)}"
            raise CorruptDeltaError(
                f"{where}: layers.{layer}: {ROWS_PREFIXES[config.method]}{EXPERT_IDS}: got {got}, expected {IDS_DTYPE} "
                f"[{len(expected)}], which says which experts the rows are.\n{DAMAGED}"
            )
        got_ids = stored_integers(where, ids)
        if got_ids != expected:
            raise CorruptDeltaError(
                f"{where}: layers.{layer}: the rows are those of experts {got_ids}, but adapter_config.json says "
                f"{expected}.\nOne of the two files was altered or comes from another delta; copy both again."
            )


def _check_shapes(where: str, rows: dict[str, StoredTensor], num_selected: int) -> None:
    shapes = {name: tensor.shape for name, tensor in rows.items()}
    for name, shape in shapes.items():
        if rows[name].dtype not in DTYPES:
            raise CorruptDeltaError(
                f"{where}: {name}: got dtype {rows[name].dtype}, expected one of {', '.join(DTYPES)}.\n{DAMAGED}"
            )
        num_axes = 2 if name.endswith("_bias") else 3
        if len(shape) != num_axes or shape[0] != num_selected or 0 in shape:
            raise CorruptDeltaError(
                f"{where}: {name}: got shape {list(shape)}, expected {num_axes} axes, the first of {num_selected}: "
                f"one row for each expert in adapter_config.json.\n{DAMAGED}"
            )
    up_name = "gate_up_proj" if "gate_up_proj" in shapes else "up_proj"
    up, down = shapes[up_name][1:], shapes["down_proj"][1:]
    layouts = ((*up, *down), (*reversed(up), *reversed(down)))  # (U, D, D, F), plain and transposed
    factor = 2 if up_name == "gate_up_proj" else 1
    fits = any(d == d_down and u == factor * f and _bias_fits(shapes, up_name, u, d) for u, d, d_down, f in layouts)
    if not fits:
        raise CorruptDeltaError(
            f"{where}: got shapes { {name: list(shape) for name, shape in sorted(shapes.items())} }, which do not "
            f"belong to one expert layer: {up_name} is {factor} × moe_intermediate_size by hidden_size, down_proj "
            f"the other way round.\n{DAMAGED}"
        )


def _bias_fits(shapes: dict[str, tuple[int, ...]], up_name: str, up_size: int, hidden_size: int) -> bool:
    if "down_proj_bias" not in shapes:
        return True
    return shapes[f"{up_name}_bias"][1] == up_size and shapes["down_proj_bias"][1] == hidden_size


def check_sums(
    where: Path, tensors: dict[str, StoredTensor], metadata: dict[str, str], *, later: Collection[str] = ()
) -> None:
    """Raise a CorruptDeltaError unless the tensors of a file are those whose sums its metadata have.

    Args:
        where: the file.
        tensors: all of it.
        metadata: the file's.
        later: names of tensors of which only is looked at here that they have a sum.
    """
    sums = json.loads(metadata["sha256"])
    for name in sorted(tensors.keys() | sums.keys()):
        if name in later and name in sums:
            continue
        got = stored_sum(where, tensors[name]) if name in tensors else None
        if got != sums.get(name):
            raise wrong_sum(where, name, got, sums.get(name))


def wrong_sum(where: Path, name: str, got: str | None, expected: str | None) -> CorruptDeltaError:
    """What is wrong with a tensor whose sum is another than the file's metadata say."""
    return CorruptDeltaError(f"{where}: {name}: got sha256 {_digits(got)}, expected {_digits(expected)}.\n{DAMAGED}")


def _digits(value: str | None) -> str:
    return "none" if value is None else f"{value[:12]}…"
