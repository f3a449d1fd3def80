"""Compressed deltas: smaller, as near as they say, and decompressed to ordinary deltas with the measured bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import metier
from deltas.made import assert_untouched, made_base, state, stored_rows
from metier.deltas.compress import compress, decompress
from metier.deltas.encode import relative_error
from metier.deltas.format import header_sum
from metier.deltas.merge import merge
from metier.deltas.read import read_delta
from metier.deltas.save import save_delta
from metier.deltas.tensors_file import read_file_header, write_tensors
from metier.deltas.verify import verify
from metier.errors import BaseMismatchError, ConfigError, CorruptDeltaError, DeltaError, MetierError
from metier.methods.esft import EsftConfig
from metier.models.load import LoadedModel
from metier.models.moe import moe_layers

FILE = "compressed_delta.safetensors"
LIMIT = 0.2
METHODS: list[dict[str, Any]] = [{"method": "int8"}, {"method": "low_rank", "max_relative_error": LIMIT}]


def low_rank_delta(folder: Path, family: str = "deepseek_v2", *, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A delta in `folder`/delta whose matrices moved by rank 2 (one of them by full rank) and whose biases moved; and its base."""
    base = made_base(folder / "base", family, dtype=dtype)
    experts = {layer.index: [1, 3] for layer in moe_layers(base.model)}
    wrapped = peft.get_peft_model(base.model, EsftConfig(experts=experts))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, rows in wrapped.named_parameters():
            if "esft_" not in name:
                continue
            for row in rows:
                if row.dim() == 1:
                    row.add_(torch.randn(row.shape, generator=generator))
                else:
                    left = torch.randn(row.shape[0], 2, generator=generator)
                    row.add_(0.3 * left @ torch.randn(2, row.shape[1], generator=generator))
        layer = wrapped.base_model.model.model.layers[1].mlp.experts.esft_down_proj["default"]
        layer[1].add_(torch.randn(layer[1].shape, generator=generator))
    save_delta(wrapped, folder / "delta")
    return metier.load(folder / "base")


@pytest.mark.parametrize("arguments", METHODS, ids=["int8", "low_rank"])
@pytest.mark.parametrize(("family", "dtype"), [("deepseek_v2", torch.float32), ("gpt_oss", torch.bfloat16)])
def test_what_is_decompressed_is_as_near_as_reported(
    arguments: dict[str, Any], family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = low_rank_delta(tmp_path, family, dtype=dtype)
    before = state(base.model)
    report = compress(tmp_path / "delta", base, tmp_path / "small", **arguments)
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["adapter_config.json", FILE]
    delta = decompress(tmp_path / "small", str(tmp_path / "base"), tmp_path / "again")
    assert_untouched(base.model, before)
    assert delta.config == read_delta(tmp_path / "delta").config
    rows, again = stored_rows(tmp_path / "delta"), stored_rows(tmp_path / "again")
    errors = []
    for layer in moe_layers(base.model):
        for name in layer.parameter_names():
            stored = f"base_model.model.{layer.path}.esft_{name}"
            assert again[stored].dtype == dtype
            ours = getattr(layer.experts, name).detach()[[1, 3]]
            errors += [relative_error(*three) for three in zip(rows[stored], ours, again[stored], strict=True)]
    assert report.max_error == max(errors)
    assert report.mean_error == pytest.approx(sum(errors) / len(errors))
    assert 0 < report.max_error <= (LIMIT if report.method == "low_rank" else 0.02 if dtype == torch.float32 else LIMIT)
    assert report.bytes_before == (tmp_path / "delta" / "adapter_model.safetensors").stat().st_size
    assert report.bytes_after == (tmp_path / "small" / FILE).stat().st_size
    assert sum(report.encodings.values()) == len(errors)


def test_a_decompressed_delta_is_verified_and_merged(tmp_path: Path) -> None:
    base = low_rank_delta(tmp_path)
    compress(tmp_path / "delta", base, tmp_path / "small", method="int8")
    decompress(tmp_path / "small", base, tmp_path / "again")
    report = verify(tmp_path / "again", base)
    assert report.passed, report.checks
    merge(tmp_path / "again", base, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")["model.layers.2.mlp.experts.3.down_proj.weight"]
    rows = stored_rows(tmp_path / "again")["base_model.model.model.layers.2.mlp.experts.esft_down_proj"]
    assert torch.equal(merged, rows[1])


def test_ranks_are_chosen_for_each_matrix_and_what_has_none_stays_plain(tmp_path: Path) -> None:
    base = low_rank_delta(tmp_path)
    report = compress(tmp_path / "delta", base, tmp_path / "small", method="low_rank", max_relative_error=0.01)
    assert report.encodings == {"low rank 2": 7, "plain": 1}
    names = set(load_file(tmp_path / "small" / FILE))
    start = "base_model.model.model.layers.1.mlp.experts.esft_down_proj"
    assert {name.removeprefix(start) for name in names if name.startswith(start)} == {".1.left", ".1.right", ".3.plain"}
    assert report.bytes_after < report.bytes_before / 2


def test_int8_is_about_a_quarter_of_float32(tmp_path: Path) -> None:
    base = low_rank_delta(tmp_path)
    report = compress(tmp_path / "delta", base, tmp_path / "small", method="int8")
    stored = load_file(tmp_path / "small" / FILE)
    assert sum(t.nbytes for t in stored.values()) < 0.3 * sum(
        t.nbytes for t in stored_rows(tmp_path / "delta").values()
    )
    assert report.encodings.keys() <= {"int8", "int8 of the difference"}


def test_bf16_is_an_ordinary_delta(tmp_path: Path) -> None:
    base = low_rank_delta(tmp_path)
    report = compress(tmp_path / "delta", base, tmp_path / "small", method="bf16")
    delta = read_delta(tmp_path / "small")
    assert delta.has_sums
    rows, small = stored_rows(tmp_path / "delta"), stored_rows(tmp_path / "small")
    assert all(torch.equal(small[name], tensor.bfloat16()) for name, tensor in rows.items())
    assert report.encodings == {"plain": 8}
    assert 0 < report.mean_error <= report.max_error < 0.05
    assert report.bytes_after == (tmp_path / "small" / "adapter_model.safetensors").stat().st_size
    assert report.bytes_after < 0.6 * report.bytes_before


@pytest.fixture
def small(delta_folder: Path, base_folder: Path, tmp_path: Path) -> Path:
    compress(delta_folder, base_folder, tmp_path / "small", method="int8")
    return tmp_path / "small"


def refused(folder: Path, base: Path, match: str, error: type[MetierError] = CorruptDeltaError) -> None:
    output = folder.parent / "output-of-refused"
    with pytest.raises(error, match=match) as caught:
        decompress(folder, base, output)
    assert "\n" in str(caught.value), "the message has no next step"
    assert not output.exists()


def rewrite(folder: Path, drop: str = "", rename: tuple[str, str] = ("", ""), **changes: str | None) -> None:
    """The file with other tensors or metadata, and sums that fit."""
    path = folder / FILE
    data = path.read_bytes()
    tensors, metadata = read_file_header(path)
    kept = {name.replace(*rename): tensor for name, tensor in tensors.items() if not drop or drop not in name}
    sums = {name.replace(*rename): value for name, value in json.loads(metadata["sha256"]).items()}
    metadata["sha256"] = json.dumps({name: sums[name] for name in kept})
    metadata = {key: value for key, value in {**metadata, **changes}.items() if value is not None}
    metadata["header_sha256"] = header_sum(metadata)
    write_tensors(path, {n: (t, memoryview(data)[t.first_byte : t.end_byte]) for n, t in kept.items()}, metadata)


def test_the_base_must_have_the_very_experts(small: Path, base_folder: Path, tmp_path: Path) -> None:
    """A base whose routers were left alone has the same fingerprint."""
    base = metier.load(base_folder)
    with torch.no_grad():
        base.model.model.layers[2].mlp.experts.down_proj.add_(0.01)
    base.model.save_pretrained(tmp_path / "other")
    base.tokenizer.save_pretrained(tmp_path / "other")
    match = r"layers\.2.*esft_down_proj: decoding on base '.*other' does not give the rows.*nothing was written\.\nThe experts of"
    refused(small, tmp_path / "other", match, BaseMismatchError)


def test_another_base_is_refused(small: Path, tmp_path: Path) -> None:
    made_base(tmp_path / "other", seed=1)
    refused(small, tmp_path / "other", "the delta was trained on .* with fingerprint", BaseMismatchError)


def test_a_compressed_delta_is_not_taken_for_a_plain_one(small: Path, base_folder: Path, delta_folder: Path) -> None:
    with pytest.raises(
        CorruptDeltaError, match=r"got a compressed delta, expected adapter_model\.safetensors\.\nDecompress"
    ):
        read_delta(small)
    refused(delta_folder, base_folder, r"compressed_delta\.safetensors: got no such file, expected a compressed delta")


def test_every_altered_byte_of_the_data_is_seen(small: Path, base_folder: Path) -> None:
    path = small / FILE
    data = path.read_bytes()
    for at in (9, 500, len(data) // 2, -1):
        changed = bytearray(data)
        changed[at] ^= 1
        path.write_bytes(changed)
        refused(small, base_folder, r"got sha256|no valid safetensors|does not fit its own")
    path.write_bytes(data[:-1])
    refused(small, base_folder, "no valid safetensors")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"drop": "layers.1.mlp.experts.esft_down_proj.3.scale"}, r"esft_down_proj of expert 3: got the parts .*do not make a matrix F32 \[32, 32\]"),
        ({"drop": "layers.1.mlp.experts.esft_down_proj.3."}, r"expert 3: got the parts \{\}"),
        ({"rename": ("down_proj.3.", "down_proj.4.")}, r"expert 3: got the parts \{\}"),
        ({"rename": ("layers.2.", "layers.7.")}, r"layers\.2.*expert 1: got the parts \{\}"),
        ({"note": "x"}, "metadata keys are missing or unknown: note"),
        ({"rows": None}, "metadata keys are missing or unknown: rows"),
        ({"experts": "{}"}, r"experts: adapter_config\.json says .* but the tensors were written with"),
        ({"num_experts": "9"}, "num_experts: adapter_config"),
        ({"base_fingerprint": "0" * 64}, "base_fingerprint: adapter_config"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_together(changes: dict[str, Any], match: str, small: Path, base_folder: Path) -> None:
    rewrite(small, **changes)
    refused(small, base_folder, match)


def test_parts_that_nobody_asked_for(small: Path, base_folder: Path) -> None:
    path = small / "adapter_config.json"
    experts = {"1": [1, 3], "2": [1]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "experts": experts}))
    rewrite(small, experts=json.dumps(experts))
    refused(small, base_folder, r"got tensor '.*layers\.2.*\.3\.\w+', which is no part of a selected row")


def test_a_later_format(small: Path, base_folder: Path) -> None:
    rewrite(small, metier_compressed_delta="2", metier_version="9.1")
    refused(
        small,
        base_folder,
        r"got a compressed delta of format '2', expected '1'\.\nIt was written by metier 9\.1",
        DeltaError,
    )


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"method": "zip"}, "method: got 'zip', expected 'bf16', 'int8' or 'low_rank'"),
        ({"method": "low_rank"}, "max_relative_error: got None for method 'low_rank'"),
        ({"method": "int8", "max_relative_error": 0.1}, "max_relative_error: got 0.1 for method 'int8'"),
        ({"method": "low_rank", "max_relative_error": 0.0}, "got 0.0, expected a share over 0 and under 1"),
        ({"method": "low_rank", "max_relative_error": 1.0}, "got 1.0, expected a share over 0"),
    ],
)
def test_arguments_that_make_no_sense(
    arguments: dict[str, Any], match: str, delta_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=match):
        compress(delta_folder, "/nowhere", tmp_path / "small", **arguments)


def test_other_files_are_not_overwritten(small: Path, delta_folder: Path, base_folder: Path) -> None:
    compress(delta_folder, base_folder, small, method="int8")
    for method, folder in (("int8", delta_folder), ("bf16", small)):
        with pytest.raises(ConfigError, match="expected none, an empty one, or a former"):
            compress(delta_folder, base_folder, folder, method=method)
