"""What can be served on a base, and what is refused with which words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
from transformers import PreTrainedModel

from metier.deltas.save import save_delta
from metier.errors import BaseMismatchError, CorruptDeltaError, DeltaError, SelectionError
from metier.methods.esft import EsftConfig
from metier.serving.checked_reader import CheckedReader
from metier.serving.delta_source import open_served_delta
from metier.serving.model_facts import ModelFacts, model_facts
from serving.made_deltas import alter_last_byte, change_config, made_model, save_esft

Open = Callable[[Path], object]


@pytest.fixture
def opened(facts: ModelFacts, reader: CheckedReader) -> Open:
    return lambda folder: open_served_delta(folder, facts=facts, reader=reader)


def test_opening_reads_no_values(copy_of: Callable[..., Path], opened: Open) -> None:
    folder = copy_of("esft")
    alter_last_byte(folder)
    opened(folder)


def test_ids_that_were_altered_are_found_at_once(copy_of: Callable[..., Path], opened: Open) -> None:
    folder = copy_of("esft")
    path = folder / "adapter_model.safetensors"
    length = int.from_bytes(path.read_bytes()[:8], "little")
    data = bytearray(path.read_bytes())
    data[8 + length] ^= 1  # the ids stand first, as the widest dtype
    path.write_bytes(data)
    with pytest.raises(CorruptDeltaError, match="the rows are those of experts"):
        opened(folder)


def test_metadata_that_were_altered_are_found_at_once(copy_of: Callable[..., Path], opened: Open) -> None:
    folder = copy_of("esft")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"num_experts":"8"', b'"num_experts":"9"'))
    with pytest.raises(CorruptDeltaError, match="the metadata does not fit its own header_sha256"):
        opened(folder)


@pytest.mark.parametrize("kind", ["esft", "expert_lora"])
def test_a_delta_of_another_base_is_refused(saved: Path, reader: CheckedReader, kind: str) -> None:
    other = model_facts(made_model(seed=1), "other")
    with pytest.raises(BaseMismatchError, match=r"trained on 'tiny' with fingerprint .*, but base 'other' has"):
        open_served_delta(saved / kind, facts=other, reader=reader)


def test_a_delta_of_experts_is_refused_by_a_dense_base(saved: Path, reader: CheckedReader) -> None:
    dense = model_facts(made_model("llama"), "dense")
    with pytest.raises(BaseMismatchError, match="the delta is of experts, but base 'dense' has no MoE layer"):
        open_served_delta(saved / "esft", facts=dense, reader=reader)


def peft_saved(model: PreTrainedModel, folder: Path) -> Path:
    """An ESFT delta without sums, so that tests can alter its configuration."""
    wrapped = peft.get_peft_model(model, EsftConfig(experts={1: [0]}))
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    wrapped.unload()
    return folder


def test_shapes_that_are_not_the_bases_are_refused(tmp_path: Path, facts: ModelFacts, opened: Open) -> None:
    from tiny_models import tiny_model

    narrow = tiny_model("deepseek_v2", moe_intermediate_size=16)
    folder = peft_saved(narrow, tmp_path / "delta")
    change_config(folder, base_fingerprint=facts.fingerprint)
    with pytest.raises(CorruptDeltaError, match=r"got shape \[1, 32, 16\], expected shape \[1, 32, 32\] by the base's"):
        opened(folder)


def test_a_layer_that_the_base_does_not_have_is_refused(model: PreTrainedModel, tmp_path: Path, opened: Open) -> None:
    from safetensors.torch import load_file, save_file

    folder = peft_saved(model, tmp_path / "delta")
    path = folder / "adapter_model.safetensors"
    save_file({name.replace("layers.1", "layers.9"): x for name, x in load_file(path).items()}, path, {"format": "pt"})
    change_config(folder, experts={"9": [0]}, target_modules=["model.layers.9.mlp.experts"])
    with pytest.raises(SelectionError, match=r"layers\.9: base 'tiny' has no MoE layer there"):
        opened(folder)


def test_whole_modules_are_refused(model: PreTrainedModel, tmp_path: Path, opened: Open) -> None:
    wrapped = peft.get_peft_model(model, EsftConfig(experts={1: [0]}, also_train=["norms"]))
    save_delta(wrapped, tmp_path / "delta")
    wrapped.unload()
    with pytest.raises(
        DeltaError,
        match=r"the delta replaces whole modules beside the experts \(norms, model\..*\), which requests of other "
        r"deltas in the batch need as they are\.\nMerge it into its base \(`metier export --to merged`\)",
    ):
        opened(tmp_path / "delta")


def test_a_merged_model_is_refused(tmp_path: Path, opened: Open) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        DeltaError,
        match=r"got a whole model, expected a delta: adapter_config.json and adapter_model.safetensors\.\n"
        "A merged model is a base of its own: serve it by `metier serve --model`",
    ):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("folder", "message"),
    [("none", "got no such folder, expected a delta"), ("", "got no adapter_config.json, expected a delta")],
)
def test_a_folder_without_a_delta_is_refused(tmp_path: Path, opened: Open, folder: str, message: str) -> None:
    with pytest.raises(CorruptDeltaError, match=message):
        opened(tmp_path / folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}'])
def test_a_configuration_that_says_nothing_is_refused(copy_of: Callable[..., Path], opened: Open, text: str) -> None:
    folder = copy_of("esft")
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(CorruptDeltaError, match=r"adapter_config\.json: got"):
        opened(folder)


@pytest.mark.parametrize("kind", ["esft", "expert_lora", "lora"])
def test_pickled_tensors_are_refused(copy_of: Callable[..., Path], opened: Open, kind: str) -> None:
    folder = copy_of(kind)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(
        CorruptDeltaError, match=r"got adapter_model\.bin, a pickle, which can run code when it is read"
    ):
        opened(folder)


def test_a_compressed_delta_is_refused(copy_of: Callable[..., Path], opened: Open) -> None:
    folder = copy_of("esft")
    (folder / "adapter_model.safetensors").rename(folder / "compressed_delta.safetensors")
    with pytest.raises(CorruptDeltaError, match=r"got a compressed delta, .*\nDecompress it first: metier decompress"):
        opened(folder)


@pytest.mark.parametrize(
    ("method", "then"),
    [
        ("IA3", "Merge it into its base"),
        ("SOMETHING_NEW", "Merge it into its base"),
        ("MEFT", r"It does not merge either: load it with `peft\.PeftModel\.from_pretrained`"),
        (["LORA"], "Merge it into its base"),
    ],
)
def test_other_methods_are_refused_by_name(
    copy_of: Callable[..., Path], opened: Open, method: object, then: str
) -> None:
    folder = copy_of("esft")
    change_config(folder, peft_type=method)
    with pytest.raises(
        DeltaError, match=rf"got an adapter of type .*, expected one of ESFT, EXPERT_LORA.*\n{then}"
    ) as e:
        opened(folder)
    assert repr(method) in str(e.value)


def test_a_delta_whose_file_is_replaced_after_it_was_opened_has_another_stamp(
    copy_of: Callable[..., Path], model: PreTrainedModel, facts: ModelFacts, reader: CheckedReader
) -> None:
    folder = copy_of("esft")
    delta = open_served_delta(folder, facts=facts, reader=reader)
    save_esft(model, folder, step=0.1)
    with pytest.raises(DeltaError, match="the file was altered or replaced since the delta was put into service"):
        delta.load()
