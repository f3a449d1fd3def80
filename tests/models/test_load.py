"""Loading: what comes back, and each thing that can be wrong with a folder, in words that help."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from metier.errors import ConfigError, ModelError
from metier.models.load import LoadedModel, load
from tiny_models import VOCAB_SIZE, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("olmoe")
    tiny_model("olmoe").to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def _edit(path: Path, **changes: object) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_a_folder_gives_its_model_and_tokenizer(saved: Path) -> None:
    loaded = load(saved, device="cpu")
    model, tokenizer = loaded
    assert isinstance(loaded, LoadedModel)
    assert (loaded.model, loaded.tokenizer, loaded.source) == (model, tokenizer, str(saved))
    assert model.dtype == torch.bfloat16
    assert model.device.type == "cpu"
    assert not model.training
    assert tokenizer("hi")["input_ids"]
    expected = tiny_model("olmoe").to(torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", torch.float32])
def test_the_dtype_can_be_chosen(saved: Path, dtype: str | torch.dtype) -> None:
    assert load(str(saved), dtype=dtype, device="cpu").model.dtype == torch.float32


def test_embedded_is_the_package_s_own_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = ModuleType("metier.embedded")
    embedded.model_path = lambda: saved  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "metier.embedded", embedded)
    loaded = load("embedded", device="cpu")
    assert loaded.source == "embedded"
    assert loaded.model.config.vocab_size == VOCAB_SIZE


@pytest.mark.parametrize(("in_vocabulary", "expected"), [("<|pad|>", "<|pad|>"), ("<blank>", "<eos>")])
def test_a_missing_pad_token_is_one_of_the_vocabulary(folder: Path, in_vocabulary: str, expected: str) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<pad>", in_vocabulary))
    _edit(folder / "tokenizer_config.json", pad_token=None)
    model, tokenizer = load(folder, device="cpu")
    assert tokenizer.pad_token == expected
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert len(tokenizer) == VOCAB_SIZE
    assert model.get_input_embeddings().num_embeddings == VOCAB_SIZE


def test_no_pad_and_no_end_token_is_an_error(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<pad>", "<blank>"))
    _edit(folder / "tokenizer_config.json", pad_token=None, eos_token=None)
    with pytest.raises(ModelError, match="neither a padding nor an end-of-text token"):
        load(folder)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "~/nowhere/at/all", "a/b/c"])
def test_a_missing_folder_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(ModelError, match=r"nowhere.*got no such folder|a/b/c: got no such folder"):
        load(name)


def test_a_missing_path_is_never_taken_for_a_hub_id() -> None:
    with pytest.raises(ModelError, match="org/name: got no such folder, expected a model folder"):
        load(Path("org/name"))


def test_a_hub_id_that_cannot_be_reached_says_what_to_give() -> None:
    message = r"(?s)nobody/nothing: the configuration could not be read.*hub id that can be reached"
    with pytest.raises(ModelError, match=message):
        load("nobody/nothing")


def test_a_file_is_not_a_folder(saved: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: got a file, expected a model folder"):
        load(saved / "config.json")


def test_a_folder_without_config_is_an_error(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"got no config\.json, expected a model folder"):
        load(folder)


def test_an_adapter_is_told_from_a_model(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(ModelError, match=r"(?s)got a PEFT adapter.*Load the adapter's base"):
        load(folder)


def test_a_folder_without_tokenizer_is_an_error(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match=r"(?s)got no tokenizer, expected one of.*save_pretrained"):
        load(folder)


def test_a_broken_tokenizer_is_an_error(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="the tokenizer could not be loaded"):
        load(folder)


def test_a_broken_config_is_an_error(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="the configuration could not be read"):
        load(folder)


def test_a_folder_without_weights_is_an_error(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="the model could not be loaded"):
        load(folder)


def test_a_truncated_checkpoint_is_an_error(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="the model could not be loaded"):
        load(folder)


def test_a_checkpoint_that_lacks_a_tensor_is_an_error(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.gate.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the model's tensors, such as 'model\.layers\.1\.mlp\.gate"):
        load(folder)


def test_remote_code_is_not_run_unless_asked(folder: Path) -> None:
    _edit(
        folder / "config.json",
        model_type="homemade",
        auto_map={"AutoConfig": "homemade.Homemade", "AutoModelForCausalLM": "homemade.Model"},
    )
    (folder / "homemade.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(ModelError, match="needs Python code from its own repository"):
        load(folder)


def test_an_encoder_is_not_a_causal_model(folder: Path) -> None:
    _edit(folder / "config.json", model_type="vit", architectures=None)
    with pytest.raises(ModelError, match="could not be loaded"):
        load(folder)


@pytest.mark.parametrize("dtype", ["float31", "int8", "Tensor"])
def test_an_unknown_dtype_is_an_error(saved: Path, dtype: str) -> None:
    with pytest.raises(ConfigError, match=f"dtype: got '{dtype}', expected 'auto', 'float32'"):
        load(saved, dtype=dtype)


def test_an_unknown_device_is_an_error(saved: Path) -> None:
    with pytest.raises(ConfigError, match="device: got 'gpu', expected a device of torch"):
        load(saved, device="gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_cuda_device_is_an_error(saved: Path) -> None:
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        load(saved, device="cuda")


def test_a_revision_of_a_folder_is_an_error(saved: Path) -> None:
    with pytest.raises(ConfigError, match="revision: got 'main' for the local folder"):
        load(saved, revision="main")
