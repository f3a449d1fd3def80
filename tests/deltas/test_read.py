"""Everything that `read_delta` refuses, and how it says so."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltas.made import made_adapter, made_base, rows_of
from metier.deltas.format import ESFT, header_sum
from metier.deltas.read import read_delta
from metier.deltas.save import save_delta
from metier.deltas.tensors_file import read_header, write_tensors
from metier.errors import CorruptDeltaError, DeltaError
from metier.methods.peft_types import MetierPeftType
from tiny_models import tiny_model

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
UP = "base_model.model.model.layers.1.mlp.experts.esft_gate_up_proj"
IDS = "base_model.model.model.layers.1.mlp.experts.esft_expert_ids"
DOWN = "base_model.model.model.layers.1.mlp.experts.esft_down_proj"


def refused(folder: Path, match: str) -> None:
    with pytest.raises(CorruptDeltaError, match=match) as caught:
        read_delta(folder)
    assert "\n" in str(caught.value), "the message has no next step"


def change_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**values, **changes}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Save other tensors as PEFT would, without sums, so that only the tensors' own checks can see it."""
    tensors = load_file(folder / TENSORS_FILE)
    change(tensors)
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, folder / TENSORS_FILE, metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["deepseek_v2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("writer", ["metier", "peft"])
def test_what_is_read_is_what_was_saved(family: str, writer: str, tmp_path: Path) -> None:
    wrapped = made_adapter(made_base(tmp_path / "base", family).model, experts={1: [3, 0], 2: [2]})
    if writer == "metier":
        save_delta(wrapped, tmp_path / "adapter")
    else:
        wrapped.save_pretrained(tmp_path / "adapter")
    delta = read_delta(str(tmp_path / "adapter"))
    assert delta.has_sums == (writer == "metier")
    assert delta.config.experts == {1: (0, 3), 2: (2,)}
    assert delta.config.base_name == str(tmp_path / "base")
    rows = {f"layers.{layer}.{name}": t for layer, tensors in delta.load_rows().items() for name, t in tensors.items()}
    masters = rows_of(wrapped)
    assert len(rows) == len(masters)
    for name, master in masters.items():
        layer, parameter = re.findall(r"layers\.(\d+)\..*esft_(\w+)", name)[0]
        assert torch.equal(rows[f"layers.{layer}.{parameter}"], master), name


def test_a_model_without_gates_is_read(tmp_path: Path) -> None:
    model = tiny_model("nemotron_h")
    save_delta(made_adapter(model, experts={1: [1, 2]}), tmp_path / "adapter")
    assert set(read_delta(tmp_path / "adapter").load_rows()[1]) == {"up_proj", "down_proj"}


def test_the_method_is_the_one_that_peft_knows() -> None:
    assert ESFT == MetierPeftType.ESFT


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "none", r"none: got no such folder, expected a delta: adapter_config\.json and adapter_model")


def test_a_file_instead_of_a_folder(delta_folder: Path) -> None:
    refused(delta_folder / CONFIG_FILE, r"got a file, expected a delta: .*\nGive the folder that holds")


def test_an_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, r"got no adapter_config\.json, expected a delta")


def test_a_whole_model(base_folder: Path) -> None:
    refused(base_folder, r"got a whole model, expected a delta.*\nFull fine-tuning leaves a model, not a delta")


def test_a_runs_folder(delta_folder: Path) -> None:
    refused(delta_folder.parent, rf"got a run's folder, .*\nGive {re.escape(str(delta_folder))} instead")


def test_a_lora_adapter(tmp_path: Path) -> None:
    lora = peft.get_peft_model(tiny_model("deepseek_v2"), peft.LoraConfig(target_modules=["o_proj"]))
    lora.save_pretrained(tmp_path)
    refused(tmp_path, r"got a PEFT adapter of type 'LORA', expected 'ESFT' or 'EXPERT_LORA'\.\nmetier reads")


def test_a_meft_adapter_is_named_as_what_cannot_be_merged(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "MEFT"}))
    refused(tmp_path, r"got a MEFT adapter.*\n.*nothing to merge")


def test_tensors_that_are_missing(delta_folder: Path) -> None:
    (delta_folder / TENSORS_FILE).unlink()
    refused(delta_folder, r"adapter_model\.safetensors: got no such file, expected the delta's tensors")


def test_a_pickle_is_not_opened(delta_folder: Path) -> None:
    (delta_folder / TENSORS_FILE).rename(delta_folder / "adapter_model.bin")
    refused(delta_folder, r"got adapter_model\.bin, a pickle, which can run code")


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"experts": 1' + b"0" * 5000 + b"}"])
def test_a_configuration_that_is_no_json(text: bytes, delta_folder: Path) -> None:
    (delta_folder / CONFIG_FILE).write_bytes(text)
    refused(delta_folder, r"adapter_config\.json: got no readable JSON")


def test_a_configuration_that_is_no_object(delta_folder: Path) -> None:
    (delta_folder / CONFIG_FILE).write_text("[]")
    refused(delta_folder, r"adapter_config\.json: got a list, expected a JSON object")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"experts": None}, "experts: got None, expected expert ids by layer"),
        ({"experts": {}}, "experts: got {}, expected expert ids by layer"),
        ({"experts": {"x": [1, 3], "2": [1, 3]}}, r"experts of layer x: got \[1, 3\], expected a layer's number"),
        ({"experts": {"²": [1, 3], "2": [1, 3]}}, "expected a layer's number"),
        ({"experts": {"1": [1, 3], "01": [1, 3]}}, "experts: got .*, expected each layer once"),
        ({"experts": {"1": "13", "2": [1, 3]}}, "experts of layer 1: got '13', expected expert ids"),
        ({"experts": {"1": [1, True], "2": [1, 3]}}, "expected expert ids"),
        ({"experts": {"1": [-1, 3], "2": [1, 3]}}, "expected expert ids"),
        ({"experts": {"1": [], "2": [1, 3]}}, r"layer 1: got \[\], expected ids in ascending order"),
        ({"experts": {"1": [3, 1], "2": [1, 3]}}, r"got \[3, 1\], expected ids in ascending order, each once"),
        ({"experts": {"1": [1, 1], "2": [1, 3]}}, r"got \[1, 1\], expected ids in ascending order, each once"),
        ({"experts": {"1": [1, 8], "2": [1, 3]}}, r"got \[1, 8\], expected ids under num_experts=8"),
        ({"num_experts": "8"}, "num_experts: got '8', expected a positive number"),
        ({"num_experts": 0}, "num_experts: got 0, expected a positive number"),
        ({"base_fingerprint": "abc"}, "base_fingerprint: got 'abc', expected 64 hexadecimal digits"),
        ({"base_model_name_or_path": 7}, "base_model_name_or_path: got 7, expected text"),
        ({"target_modules": "mlp"}, "target_modules: got 'mlp', expected a list of module paths"),
        ({"target_modules": ["model.layers.1.mlp.experts"]}, r"expected one path for each of the layers \[1, 2\]"),
    ],
)
def test_a_value_of_the_configuration_that_makes_no_sense(
    changes: dict[str, Any], match: str, delta_folder: Path
) -> None:
    change_config(delta_folder, **changes)
    refused(delta_folder, rf"adapter_config\.json: .*{match}")


@pytest.mark.parametrize(
    ("key", "value"),
    [("experts", {"1": [1, 4], "2": [1, 3]}), ("base_fingerprint", "0" * 64), ("num_experts", 9)],
)
def test_a_configuration_of_another_delta(key: str, value: object, delta_folder: Path) -> None:
    change_config(delta_folder, **{key: value})
    refused(delta_folder, rf"safetensors: {key}: adapter_config\.json says .*, but the tensors were written with")


def test_names_and_notes_of_the_configuration_may_be_edited(delta_folder: Path) -> None:
    change_config(delta_folder, base_model_name_or_path="org/moved", peft_version="9", task_type="CAUSAL_LM")
    assert read_delta(delta_folder).config.base_name == "org/moved"


@pytest.mark.parametrize("num_bytes", [0, 4, 8, 100, 2000, -5000, -1])
def test_a_truncated_file(num_bytes: int, delta_folder: Path) -> None:
    path = delta_folder / TENSORS_FILE
    path.write_bytes(path.read_bytes()[:num_bytes])
    refused(delta_folder, r"adapter_model\.safetensors: got no valid safetensors file")


def test_bytes_after_the_end(delta_folder: Path) -> None:
    path = delta_folder / TENSORS_FILE
    path.write_bytes(path.read_bytes() + b"\0")
    refused(delta_folder, "got no valid safetensors file")


def test_a_flipped_bit_in_the_data(delta_folder: Path) -> None:
    path = delta_folder / TENSORS_FILE
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    refused(delta_folder, r"experts\.esft_\w+: got sha256 \w{12}…, expected \w{12}…")


def test_flipped_bits_in_the_header(delta_folder: Path) -> None:
    path = delta_folder / TENSORS_FILE
    data = path.read_bytes()
    for word, match in (
        (b'"metier_version":"', "the metadata does not fit its own header_sha256"),
        (b'"header_sha256":"', "the metadata does not fit its own header_sha256"),
        (b'"dtype":"', "got no valid safetensors file"),
        (b'"__metadata_', "got no valid safetensors file"),
        (b"layers.1.mlp.exp", "got tensor 'base_model|got rows of|the metadata does not fit"),
    ):
        at = data.index(word) + len(word)
        path.write_bytes(data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :])
        refused(delta_folder, match)


def write_header(path: Path, data: bytes, header: bytes) -> None:
    """`data` with another header."""
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + int.from_bytes(data[:8], "little") :])


@pytest.mark.parametrize("key", [b'"__metadata__":{', b'"peft_type":', b"{"], ids=["metadata", "in metadata", "tensor"])
def test_a_key_that_stands_twice_in_the_header(key: bytes, delta_folder: Path) -> None:
    path = delta_folder / TENSORS_FILE
    data = path.read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")].rstrip()
    twice = {
        b'"__metadata__":{': b'"__metadata__":{"format":"pt"},' + key,
        b'"peft_type":': b'"peft_type":"LORA",' + key,
        b"{": b"{" + header[header.index(f'"{DOWN}":'.encode()) :].partition(b"}")[0] + b"},",
    }
    write_header(path, data, header.replace(key, twice[key], 1))
    refused(delta_folder, "got no valid safetensors file .*(stands twice|duplicate)")


def test_metadata_that_are_null_are_none(delta_folder: Path) -> None:
    path = delta_folder / TENSORS_FILE
    data = path.read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")].rstrip()
    first, last = header.index(b'{"base_expert'), header.index(b'},"base_model.')
    write_header(path, data, header[:first] + b"null" + header[last + 1 :])
    assert not read_delta(delta_folder).has_sums


def test_a_tensor_under_anothers_name(delta_folder: Path) -> None:
    """Two layers have tensors of one shape: only the sums see that they changed places."""
    path = delta_folder / TENSORS_FILE
    first, second = b"layers.1.mlp.experts.esft_down_proj", b"layers.2.mlp.experts.esft_down_proj"
    data = path.read_bytes()
    at, also = data.rindex(first), data.rindex(second)
    data = data[:at] + second + data[at + len(second) :]
    path.write_bytes(data[:also] + first + data[also + len(first) :])
    refused(delta_folder, "esft_down_proj: got sha256")


def test_a_delta_of_a_later_format(delta_folder: Path) -> None:
    rewrite_metadata(delta_folder, metier_delta="3", metier_version="7.0")
    with pytest.raises(DeltaError, match=r"got a delta of format '3', expected '2'\.\nIt was written by metier 7\.0"):
        read_delta(delta_folder)


def test_unknown_and_missing_metadata(delta_folder: Path) -> None:
    rewrite_metadata(delta_folder, note="x", num_experts=None)
    refused(delta_folder, "metadata keys are missing or unknown: note, num_experts")


def rewrite_metadata(folder: Path, **changes: str | None) -> None:
    path = folder / TENSORS_FILE
    data = path.read_bytes()
    tensors, metadata = read_header(folder)
    metadata = {key: value for key, value in {**metadata, **changes}.items() if value is not None}
    metadata["header_sha256"] = header_sum(metadata)
    views = {name: (t, memoryview(data)[t.first_byte : t.end_byte]) for name, t in tensors.items()}
    write_tensors(path, views, metadata)


def test_a_tensor_that_is_missing(delta_folder: Path) -> None:
    change_tensors(delta_folder, lambda tensors: tensors.__delitem__(UP))
    refused(delta_folder, r"layers\.1: got rows of \['down_proj'\], expected gate_up_proj \(or up_proj\) and down_proj")


def test_a_layer_that_is_missing(delta_folder: Path) -> None:
    change_tensors(delta_folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if "layers.1." in n])
    refused(delta_folder, r"layers\.1: got rows of no parameter")


@pytest.mark.parametrize("name", ["base_model.model.lm_head.weight", UP.replace("layers.1", "layers.9")])
def test_a_foreign_tensor(name: str, delta_folder: Path) -> None:
    change_tensors(delta_folder, lambda tensors: tensors.update({name: tensors[UP]}))
    refused(delta_folder, f"got tensor '{re.escape(name)}', which is none of the rows that adapter_config.json selects")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t[:1], r"gate_up_proj: got shape \[1, 64, 32\], expected 3 axes, the first of 2"),
        (lambda t: t[0], r"gate_up_proj: got shape \[64, 32\], expected 3 axes"),
        (lambda t: t[:, :, :0], r"gate_up_proj: got shape \[2, 64, 0\]"),
        (lambda t: t[:, :60], r"'gate_up_proj': \[2, 60, 32\].* do not belong to one expert layer"),
        (lambda t: t[:, :, :30], r"'gate_up_proj': \[2, 64, 30\].* do not belong to one expert layer"),
    ],
)
def test_a_wrong_shape(change: Callable[[Tensor], Tensor], match: str, delta_folder: Path) -> None:
    change_tensors(delta_folder, lambda tensors: tensors.update({UP: change(tensors[UP])}))
    refused(delta_folder, match)


def test_a_bias_of_a_wrong_shape(tmp_path: Path) -> None:
    made_adapter(tiny_model("gpt_oss"), experts={1: [0, 2]}).save_pretrained(tmp_path)
    read_delta(tmp_path)
    name = UP.replace("esft_gate_up_proj", "esft_down_proj_bias")
    change_tensors(tmp_path, lambda tensors: tensors.update({name: tensors[name][:, 1:]}))
    refused(tmp_path, r"'down_proj_bias': \[2, 31\].* do not belong to one expert layer")


def test_a_dtype_that_rows_cannot_have(delta_folder: Path) -> None:
    change_tensors(delta_folder, lambda tensors: tensors.update({UP: tensors[UP].to(torch.int32)}))
    refused(delta_folder, "got dtype I32, expected one of F64, F32, BF16, F16")


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (None, r"layers\.1: esft_expert_ids: got no such tensor, expected I64 \[2\], which says which experts"),
        (torch.tensor([1, 3], dtype=torch.int32), "got dtype I32|got I32"),
        (torch.tensor([1.0, 3.0]), r"esft_expert_ids: got F32 \[2\], expected I64 \[2\]"),
        (torch.tensor([1, 3, 4]), r"esft_expert_ids: got I64 \[3\], expected I64 \[2\]"),
        (torch.tensor([[1, 3]]), r"esft_expert_ids: got I64 \[1, 2\], expected I64 \[2\]"),
        (
            torch.tensor([1, 4]),
            r"layers\.1: the rows are those of experts \[1, 4\], but adapter_config.json says \[1, 3\]",
        ),
        (torch.tensor([3, 1]), r"layers\.1: the rows are those of experts \[3, 1\]"),
        (torch.tensor([1, -3]), r"the rows are those of experts \[1, -3\]"),
    ],
)
def test_rows_that_are_not_those_of_the_configurations_experts(
    ids: Tensor | None, match: str, delta_folder: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[IDS]
        if ids is not None:
            tensors[IDS] = ids

    change_tensors(delta_folder, change)
    refused(delta_folder, match)


def test_the_configuration_of_another_delta_that_peft_saved(tmp_path: Path) -> None:
    """PEFT writes no sums and no metadata: the rows themselves say which experts they are."""
    for name, experts in (("a", [1, 4]), ("b", [2, 3])):
        made_adapter(tiny_model("deepseek_v2"), experts={1: experts}).save_pretrained(tmp_path / name)
    (tmp_path / "a" / CONFIG_FILE).write_bytes((tmp_path / "b" / CONFIG_FILE).read_bytes())
    refused(
        tmp_path / "a", r"rows are those of experts \[1, 4\], but adapter_config\.json says \[2, 3\]\.\nOne of the two"
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8])
def test_rows_of_a_dtype_that_only_other_tensors_have(dtype: torch.dtype, delta_folder: Path) -> None:
    change_tensors(delta_folder, lambda tensors: tensors.update({UP: tensors[UP].to(dtype)}))
    refused(delta_folder, r"layers\.1: gate_up_proj: got dtype I\d+, expected one of F64, F32, BF16, F16")
