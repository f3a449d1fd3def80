"""What `save_delta` writes: loadable by PEFT, as small as the base's dtype, with sums, whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import metier
from deltas.made import FAMILIES, assert_untouched, logits, made_adapter, made_base, rows_of, state, stored_rows
from metier.deltas import write
from metier.deltas.save import save_delta
from metier.errors import ConfigError, DeltaError
from metier.methods.esft import EsftConfig
from metier.models.fingerprint import fingerprint

TENSORS_FILE = "adapter_model.safetensors"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_delta_in_the_bases_dtype_answers_as_its_float32_masters_to_the_bit(family: str, tmp_path: Path) -> None:
    base = made_base(tmp_path / "base", family, dtype=torch.bfloat16)
    before = state(base.model)
    unchanged = logits(base.model)
    wrapped = made_adapter(base.model)
    assert {p.dtype for p in rows_of(wrapped).values()} == {torch.float32}
    want = logits(wrapped)
    assert not torch.equal(want, unchanged), "the delta does nothing: the rest of this test would prove nothing"
    save_delta(wrapped, tmp_path / "small")
    save_delta(wrapped, tmp_path / "large", dtype=torch.float32)
    assert_untouched(wrapped.unload(), before)
    for name, dtype in (("small", torch.bfloat16), ("large", torch.float32)):
        assert {t.dtype for t in stored_rows(tmp_path / name).values()} == {dtype}
        loaded = peft.PeftModel.from_pretrained(metier.load(tmp_path / "base").model, tmp_path / name)
        assert torch.equal(logits(loaded.eval()), want)


def test_float32_keeps_the_masters_to_the_bit(tmp_path: Path) -> None:
    wrapped = made_adapter(made_base(tmp_path / "base", dtype=torch.bfloat16).model)
    save_delta(wrapped, tmp_path / "adapter", dtype=torch.float32)
    stored, masters = stored_rows(tmp_path / "adapter"), rows_of(wrapped)
    assert stored.keys() == masters.keys()
    for name, master in masters.items():
        assert torch.equal(stored[name], master), name


def test_metadata_say_what_the_delta_is_and_hold_a_sum_of_every_tensor(delta_folder: Path, base_folder: Path) -> None:
    with safe_open(delta_folder / TENSORS_FILE, framework="pt") as file:
        metadata = file.metadata()
    header_sum = metadata.pop("header_sha256")
    assert header_sum == hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()
    sums = json.loads(metadata.pop("sha256"))
    base = metier.load(base_folder).model
    assert metadata == {
        "format": "pt",
        "metier_delta": "2",
        "metier_version": metier.__version__,
        "peft_type": "ESFT",
        "base_fingerprint": fingerprint(base),
        "base_expert_parameters": str(2 * 8 * 3 * 32 * 32),
        "num_experts": "8",
        "experts": '{"1": [1, 3], "2": [1, 3]}',
    }
    tensors = load_file(delta_folder / TENSORS_FILE)
    assert sums == {
        name: hashlib.sha256(
            f"{'I64' if 'ids' in name else 'F32'} {list(t.shape)}\n".encode() + t.numpy().tobytes()
        ).hexdigest()
        for name, t in tensors.items()
    }


def test_the_file_says_of_each_layer_which_experts_its_rows_are(tmp_path: Path) -> None:
    wrapped = made_adapter(made_base(tmp_path / "base").model, experts={1: [7, 0], 2: [3]})
    save_delta(wrapped, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / TENSORS_FILE)
    ids = {name: tensor for name, tensor in stored.items() if name.endswith("esft_expert_ids")}
    assert {name: tensor.tolist() for name, tensor in ids.items()} == {
        "base_model.model.model.layers.1.mlp.experts.esft_expert_ids": [0, 7],
        "base_model.model.model.layers.2.mlp.experts.esft_expert_ids": [3],
    }
    assert {tensor.dtype for tensor in ids.values()} == {torch.int64}


def test_a_configuration_that_was_changed_behind_the_adapter_is_refused(tmp_path: Path) -> None:
    wrapped = made_adapter(made_base(tmp_path / "base").model)
    wrapped.peft_config["default"].experts = {1: [1, 4], 2: [1, 3]}
    with pytest.raises(
        DeltaError, match=r"layers\.1.*: adapter 'default' replaces experts \[1, 3\], but its conf.* says \[1, 4\]"
    ):
        save_delta(wrapped, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_the_same_delta_gives_the_same_bytes(tmp_path: Path) -> None:
    wrapped = made_adapter(made_base(tmp_path / "base").model)
    for name in ("a", "b"):
        save_delta(wrapped, tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["README.md", "adapter_config.json", TENSORS_FILE]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_configuration_is_the_one_that_peft_would_save(tmp_path: Path) -> None:
    wrapped = made_adapter(made_base(tmp_path / "base").model)
    save_delta(wrapped, tmp_path / "ours")
    wrapped.save_pretrained(tmp_path / "pefts")
    ours, pefts = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "pefts"))
    assert ours == pefts
    assert ours["base_model_name_or_path"] == str(tmp_path / "base")


def test_an_adapter_is_saved_by_its_name_and_alone(tmp_path: Path) -> None:
    wrapped = made_adapter(made_base(tmp_path / "base").model)
    wrapped.add_adapter("second", EsftConfig(experts={2: [0, 5, 7]}))
    save_delta(wrapped, tmp_path / "adapter", adapter_name="second")
    stored, masters = stored_rows(tmp_path / "adapter"), rows_of(wrapped, "second")
    assert stored.keys() == masters.keys()
    assert {t.shape[0] for t in stored.values()} == {3}


def test_a_former_delta_is_replaced_and_nothing_is_left_beside(tmp_path: Path) -> None:
    wrapped = made_adapter(made_base(tmp_path / "base").model)
    save_delta(wrapped, tmp_path / "adapter", dtype=torch.float32)
    rows = rows_of(wrapped)
    name = min(rows)
    with torch.no_grad():
        rows[name].fill_(0.5)
    save_delta(wrapped, tmp_path / "adapter")
    assert torch.equal(load_file(tmp_path / "adapter" / TENSORS_FILE)[name], rows[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_save_that_breaks_off_leaves_the_former_delta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = made_adapter(made_base(tmp_path / "base").model)
    save_delta(wrapped, tmp_path / "adapter")
    former = (tmp_path / "adapter" / TENSORS_FILE).read_bytes()

    def broken(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(write, "write_tensors", broken)
    with pytest.raises(OSError, match="No space left"):
        save_delta(wrapped, tmp_path / "adapter")
    assert (tmp_path / "adapter" / TENSORS_FILE).read_bytes() == former
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_adapter_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    wrapped = made_adapter(made_base(tmp_path / "base").model)
    with pytest.raises(DeltaError, match=r"got adapter 'law', expected one of the model's: \['default'\]"):
        save_delta(wrapped, tmp_path / "adapter", adapter_name="law")


def test_an_adapter_of_another_method_is_refused(tmp_path: Path) -> None:
    lora = peft.get_peft_model(made_base(tmp_path / "base").model, peft.LoraConfig(target_modules=["o_proj"]))
    with pytest.raises(
        DeltaError, match=r"is LoraConfig, expected EsftConfig or ExpertLoraConfig.\nSave adapters of PEFT's own"
    ):
        save_delta(lora, tmp_path / "adapter")


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), None), (1e30, torch.float16)])
def test_a_value_that_is_not_finite_in_the_files_dtype_is_refused(
    value: float, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    wrapped = made_adapter(made_base(tmp_path / "base").model)
    with torch.no_grad():
        next(iter(rows_of(wrapped).values()))[0, 0, 0] = value
    with pytest.raises(DeltaError, match=r"esft_\w+: the rows hold values that are not finite in torch\.float"):
        save_delta(wrapped, tmp_path / "adapter", dtype=dtype)
    assert not (tmp_path / "adapter").exists()


def test_a_dtype_that_a_delta_cannot_have_is_refused(tmp_path: Path) -> None:
    wrapped = made_adapter(made_base(tmp_path / "base").model)
    with pytest.raises(ConfigError, match=r"dtype: got torch.int8, expected one of torch.float32, torch.bfloat16"):
        save_delta(wrapped, tmp_path / "adapter", dtype=torch.int8)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    wrapped = made_adapter(made_base(tmp_path / "base").model)
    before = sorted((tmp_path / "base").iterdir())
    with pytest.raises(
        ConfigError, match=r"base: got a folder with .*, expected none, an empty one, or a former delta"
    ):
        save_delta(wrapped, tmp_path / "base")
    save_delta(wrapped, tmp_path / "adapter")
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"got a folder with notes\.txt, expected none"):
        save_delta(wrapped, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "notes.txt").read_text() == "mine"
    assert sorted((tmp_path / "base").iterdir()) == before
