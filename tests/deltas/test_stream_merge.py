"""Merging in the base's files: the same tensors as through the model in memory, with one layer of values at a time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import metier
from metier.deltas.checkpoint_files import CheckpointFiles, open_checkpoint
from metier.deltas.merge import merge
from metier.deltas.save import save_delta
from metier.errors import BaseMismatchError, CorruptDeltaError, ModelError
from metier.methods.esft import EsftConfig
from metier.methods.expert_lora import ExpertLoraConfig
from tiny_models import tiny_model, tiny_tokenizer

FAMILIES = ("deepseek_v2", "mixtral", "gpt_oss", "olmoe", "qwen3_moe", "llama4_text")
WHOLE = ["router", "attention", "norms"]


def made_folder(folder: Path, family: str, dtype: torch.dtype = torch.float32, shard: str = "20KB") -> Path:
    """A base in several shards, in the layout that the family publishes."""
    tiny_model(family).to(dtype).save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_size": 8}')
    (folder / "pytorch_model.bin").write_text("a pickle")
    return folder


def made_delta(base: Path, folder: Path, config: peft.PeftConfig) -> Path:
    """A delta of which every trained value has moved."""
    torch.manual_seed(4)
    wrapped = peft.get_peft_model(metier.load(base).model, config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    save_delta(wrapped, folder)
    return folder


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make_config", [EsftConfig, partial(ExpertLoraConfig, ranks={1: {3: 2}})], ids=["esft", "expert_lora"]
)
def test_the_files_are_those_that_a_merge_in_memory_writes(
    family: str, dtype: torch.dtype, make_config: Callable[..., peft.PeftConfig], tmp_path: Path
) -> None:
    base = made_folder(tmp_path / "base", family, dtype)
    config = make_config(experts={1: [0, 3], 2: [2]}, also_train=WHOLE)
    delta = made_delta(base, tmp_path / "delta", config)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="merge: ")
        merge(delta, base, tmp_path / "streamed")
    merge(delta, metier.load(base), tmp_path / "in_memory")
    got, before = tensors_in(tmp_path / "streamed"), tensors_in(base)
    assert_equal(got, tensors_in(tmp_path / "in_memory"))
    assert any(not torch.equal(got[name], tensor) for name, tensor in before.items())


def test_what_lies_beside_the_weights_comes_along_but_no_other_weights(tmp_path: Path) -> None:
    base = made_folder(tmp_path / "base", "deepseek_v2")
    delta = made_delta(base, tmp_path / "delta", EsftConfig(experts={1: [0]}))
    merge(delta, base, tmp_path / "merged")
    expected = {path.name for path in base.iterdir()} - {"pytorch_model.bin"} | {"README.md", "metier_merge.json"}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == expected
    assert len(list(base.glob("*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.config.model_type == "deepseek_v2"


def test_at_most_one_layers_values_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = made_folder(tmp_path / "base", "deepseek_v2")
    delta = made_delta(base, tmp_path / "delta", ExpertLoraConfig(experts={1: [0, 3], 2: [2]}))
    read, plain = [], CheckpointFiles.read

    def recorded(self: CheckpointFiles, name: str) -> Tensor:
        read.append(name)
        return plain(self, name)

    monkeypatch.setattr(CheckpointFiles, "read", recorded)
    merge(delta, base, tmp_path / "merged")
    matrices = {f"layers.{layer}.mlp.experts.{e}." for layer, e in ((1, 0), (1, 3), (2, 2))}
    rest = [name for name in read if not any(part in name for part in matrices)]
    assert {name.rpartition("mlp.")[2] for name in rest} == {"gate.weight"}


def test_a_merge_grows_by_less_than_the_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "moe_intermediate_size": 512, "num_hidden_layers": 9, "n_routed_experts": 32}
    tiny_model("deepseek_v2", **sizes).save_pretrained(tmp_path / "base", max_shard_size="100MB")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    made_delta(tmp_path / "base", tmp_path / "delta", EsftConfig(experts={3: [0, 9]}))
    model_bytes = sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    layer_bytes = 32 * 3 * 256 * 512 * 4
    assert model_bytes > 7.9 * layer_bytes
    # pages of the two files count as long as they are mapped; what is asked is what the process itself holds
    script = (
        "import sys, metier, torch, transformers\n"
        "import metier.deltas.merge, metier.deltas.stream_merge, transformers.models.deepseek_v2.modeling_deepseek_v2\n"
        "def peak():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return int(next(x for x in lines if x.startswith('VmHWM')).split()[1]) * 1024\n"
        "before = peak()\n"
        "metier.merge(sys.argv[1], sys.argv[2], sys.argv[3])\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "delta"), str(tmp_path / "base"), str(tmp_path / "merged")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    # one layer's new values, their mask and a copy in the files' form, and what imports take: less than half the model
    assert grown < 0.5 * model_bytes


def test_files_in_another_form_than_the_familys_are_merged_in_memory_with_a_warning(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "base", save_original_format=False)
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    delta = made_delta(tmp_path / "base", tmp_path / "delta", EsftConfig(experts={1: [0]}))
    with pytest.warns(
        UserWarning, match=r"merge: \S+base is loaded as a whole, because the base's files have no model"
    ):
        merge(delta, tmp_path / "base", tmp_path / "merged")
    merge(delta, metier.load(tmp_path / "base"), tmp_path / "in_memory")
    assert_equal(tensors_in(tmp_path / "merged"), tensors_in(tmp_path / "in_memory"))


def test_another_base_is_refused_before_a_file_is_written(tmp_path: Path) -> None:
    base = made_folder(tmp_path / "base", "deepseek_v2")
    delta = made_delta(base, tmp_path / "delta", EsftConfig(experts={1: [0]}))
    tiny_model("deepseek_v2", seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match="was trained on"):
        merge(delta, tmp_path / "other", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    base = made_folder(tmp_path / "base", "deepseek_v2")
    wrapped = peft.get_peft_model(metier.load(base).model, EsftConfig(experts={1: [0]}))
    wrapped.save_pretrained(tmp_path / "delta")
    file = tmp_path / "delta" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("down_proj"))
    tensors[name][0, 0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(CorruptDeltaError, match="not finite; nothing was merged"):
        merge(tmp_path / "delta", base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("how", ["truncated", "missing", "index", "elsewhere"])
def test_damaged_files_of_a_base_are_refused(how: str, tmp_path: Path) -> None:
    base = made_folder(tmp_path / "base", "deepseek_v2")
    delta = made_delta(base, tmp_path / "delta", EsftConfig(experts={1: [0]}))
    shard, index = next(base.glob("*.safetensors")), base / "model.safetensors.index.json"
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-3])
    elif how == "missing":
        shard.unlink()
    elif how == "index":
        index.write_text("{}")
    else:
        shutil.copyfile(shard, tmp_path / shard.name)
        values = json.loads(index.read_text())
        values["weight_map"] = dict.fromkeys(values["weight_map"], f"../{shard.name}")
        index.write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"could not be read|expected one of the same folder"):
        merge(delta, base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_base_without_safetensors_files_is_none(tmp_path: Path) -> None:
    assert open_checkpoint(tmp_path) is None


def test_shards_keep_their_metadata(tmp_path: Path) -> None:
    base = made_folder(tmp_path / "base", "deepseek_v2")
    merge(made_delta(base, tmp_path / "delta", EsftConfig(experts={1: [0]})), base, tmp_path / "merged")
    for path in base.glob("*.safetensors"):
        with safe_open(path, "pt") as old, safe_open(tmp_path / "merged" / path.name, "pt") as new:
            assert new.metadata() == old.metadata()


def test_only_the_selected_experts_tensors_differ_from_the_bases(tmp_path: Path) -> None:
    base = made_folder(tmp_path / "base", "qwen3_moe")
    delta = made_delta(base, tmp_path / "delta", EsftConfig(experts={1: [2]}))
    merge(delta, base, tmp_path / "merged")
    changed = [n for n, t in tensors_in(tmp_path / "merged").items() if not torch.equal(t, tensors_in(base)[n])]
    assert sorted(n.partition("layers.")[2] for n in changed) == [
        f"1.mlp.experts.2.{name}_proj.weight" for name in ("down", "gate", "up")
    ]
