"""A LoRA on experts as an ordinary LoRA: in PEFT's layout with the same logits, and by expert with the same matrices."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import metier
from deltas.made import logits, tokens
from deltas.test_stream_merge import made_delta, made_folder, tensors_in
from metier.deltas.checkpoint_files import CheckpointFiles
from metier.deltas.export import export
from metier.errors import BaseMismatchError, ConfigError, CorruptDeltaError, DeltaError
from metier.methods.bottleneck import BottleneckConfig
from metier.methods.esft import EsftConfig
from metier.methods.expert_lora import ExpertLoraConfig, export_peft_lora
from models.test_quantised_checkpoints import checkpoint  # noqa: F401 - a fixture
from tiny_models import tiny_model

SINGLE = ("deepseek_v2", "mixtral", "olmoe", "qwen3_moe", "nemotron_h")
"""They publish an expert's matrices one by one; nemotron_h's have no gate."""
FAMILIES = (*SINGLE, "gpt_oss")
EXPERTS = {1: [0, 3], 2: [2]}
LORA = partial(ExpertLoraConfig, experts=EXPERTS, r=4, lora_alpha=6.0, ranks={1: {3: 2}, 2: {2: 3}})
"""Scales of 1.5, 3 and 2: each expert has its own."""
# float32; PEFT forms the changed weights, and sums come in another order
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}

# what a user without metier runs
SCRIPT = """
import sys, peft, torch, transformers
for base, adapter in zip(sys.argv[2::2], sys.argv[3::2]):
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        torch.save(model(input_ids=torch.load(sys.argv[1])).logits, adapter + ".pt")
assert "metier" not in sys.modules, "the adapter needs metier"
"""


def adapter_file(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture
def olmoe(tmp_path: Path) -> tuple[Path, Path]:
    """A base and a LoRA on its experts."""
    base = made_folder(tmp_path / "base", "olmoe")
    return base, made_delta(base, tmp_path / "delta", LORA())


def test_plain_peft_in_a_fresh_process_gives_the_deltas_logits(tmp_path: Path) -> None:
    want, arguments = {}, []
    for family in FAMILIES:
        base = made_folder(tmp_path / family / "base", family)
        delta = made_delta(base, tmp_path / family / "delta", LORA())
        want[family] = logits(peft.PeftModel.from_pretrained(metier.load(base).model, delta).eval())
        assert not torch.allclose(want[family], logits(metier.load(base).model), **TOLERANCE)
        export(delta, base, tmp_path / family / "out", to="peft-lora")
        arguments += [str(base), str(tmp_path / family / "out")]
    torch.save(tokens(), tmp_path / "tokens.pt")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "tokens.pt"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for family in FAMILIES:
        torch.testing.assert_close(torch.load(tmp_path / family / "out.pt"), want[family], **TOLERANCE)


def test_the_file_is_that_of_the_adapter_on_the_model(tmp_path: Path) -> None:
    for family in ("qwen3_moe", "gpt_oss"):
        base = made_folder(tmp_path / family / "base", family)
        delta = made_delta(base, tmp_path / family / "delta", LORA())
        export(delta, base, tmp_path / family / "out", to="peft-lora")
        on_the_model = peft.PeftModel.from_pretrained(metier.load(base).model, delta)
        export_peft_lora(on_the_model, tmp_path / family / "want")
        got, want = adapter_file(tmp_path / family / "out"), adapter_file(tmp_path / family / "want")
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
        configs = [json.loads((tmp_path / family / x / "adapter_config.json").read_text()) for x in ("out", "want")]
        for values in configs:
            values["target_parameters"].sort()
        assert configs[0] == {**configs[1], "base_model_name_or_path": str(base), "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("family", SINGLE)
def test_by_expert_each_matrix_is_that_of_the_merged_checkpoint(family: str, tmp_path: Path) -> None:
    base = made_folder(tmp_path / "base", family)
    delta = made_delta(base, tmp_path / "delta", LORA())
    export(delta, base, tmp_path / "out", to="peft-lora", layout="per-expert")
    export(delta, base, tmp_path / "merged", to="merged")
    factors, before, merged = adapter_file(tmp_path / "out"), tensors_in(base), tensors_in(tmp_path / "merged")
    changes = {}
    for name in [name for name in factors if ".lora_A." in name]:
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        assert factors[name].shape[0] == 4, "vLLM stacks the experts' matrices, which takes one rank"
        changes[f"{path}.weight"] = factors.pop(name.replace("lora_A", "lora_B")) @ factors.pop(name)
    assert not factors
    # a layer that has any is complete, as vLLM wants it, and no other layer has any
    layers = {layer for layer in EXPERTS if any(f"layers.{layer}." in name for name in before if ".experts." in name)}
    assert changes.keys() == {n for n in before if ".experts." in n and any(f"layers.{x}." in n for x in layers)}
    for name, change in changes.items():
        torch.testing.assert_close(before[name] + change, merged[name], **TOLERANCE)
    changed = {name for name, change in changes.items() if change.any()}
    assert changed == {name for name in before if not torch.equal(before[name], merged[name])}


def test_stacked_experts_come_as_vllm_takes_them_apart(tmp_path: Path) -> None:
    # vllm/lora/model_manager.py, `_stack_moe_lora_weights`: `experts.base_layer` is gate_up_proj and `experts` is
    # down_proj; A is (E * R, in), and B is (out, R * E) with the experts innermost
    base = made_folder(tmp_path / "base", "gpt_oss")
    delta = made_delta(base, tmp_path / "delta", LORA())
    export(delta, base, tmp_path / "out", to="peft-lora")
    export(delta, base, tmp_path / "merged", to="merged")
    factors, before, merged = adapter_file(tmp_path / "out"), tensors_in(base), tensors_in(tmp_path / "merged")
    assert len(factors) == 2 * 2 * 2
    for layer in EXPERTS:
        path = f"model.layers.{layer}.mlp.experts"
        for name, middle in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
            a, b = (factors[f"base_model.model.{path}{middle}.lora_{letter}.weight"] for letter in "AB")
            a_ERI, b_EOR = a.reshape(4, -1, a.shape[1]), b.reshape(b.shape[0], -1, 4).permute(2, 0, 1)
            change_EIO = (b_EOR @ a_ERI).mT  # GPT-OSS stores (E, in, out)
            torch.testing.assert_close(before[f"{path}.{name}"] + change_EIO, merged[f"{path}.{name}"], **TOLERANCE)


@pytest.mark.parametrize("family", SINGLE[:-1])
def test_plain_peft_takes_the_layout_by_expert_as_a_lora_from_before_stacked_experts(
    family: str, tmp_path: Path
) -> None:
    base = made_folder(tmp_path / "base", family)
    delta = made_delta(base, tmp_path / "delta", LORA())
    want = logits(peft.PeftModel.from_pretrained(metier.load(base).model, delta).eval())
    said = export(delta, base, tmp_path / "out", to="peft-lora", layout="per-expert")
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert not torch.allclose(logits(plain), want, **TOLERANCE)
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(plain, tmp_path / "out").eval()), want, **TOLERANCE
    )
    assert "in this layout from 0.11.2 on, takes it for" in said[1]
    assert "with `--max-lora-rank` of at least 4. Its loader was read; the server was not run." in said[1]


def test_plain_peft_refuses_the_layout_by_expert_where_it_does_not_know_the_family(tmp_path: Path) -> None:
    base = made_folder(tmp_path / "base", "nemotron_h")
    export(made_delta(base, tmp_path / "delta", LORA()), base, tmp_path / "out", to="peft-lora", layout="per-expert")
    with pytest.raises(ValueError, match="not found in the base model"):
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")


def test_it_is_said_who_reads_what_was_written(olmoe: tuple[Path, Path], tmp_path: Path) -> None:
    base, delta = olmoe
    said = export(delta, base, tmp_path / "out", to="peft-lora")
    assert said[0].startswith("LoRA of rank 4 on 2 layers, 34,816 bytes, layout parameters: ")
    assert sum(tensor.nbytes for tensor in adapter_file(tmp_path / "out").values()) == 34_816
    assert said[1] == (
        "PEFT from 0.19.1 on loads it without metier. vLLM takes OlmoeForCausalLM's in the layout per-expert: see "
        "`--layout`."
    )
    base = made_folder(tmp_path / "nemotron", "nemotron_h")
    delta = made_delta(base, tmp_path / "other", LORA())
    assert "Whether vLLM reads it for nemotron_h was not checked" in export(
        delta, base, tmp_path / "out2", to="peft-lora"
    )[1]  # fmt: skip


def test_bf16_factors_stay_bf16_where_they_hold_the_scaled_values(tmp_path: Path) -> None:
    base = made_folder(tmp_path / "base", "olmoe", torch.bfloat16)
    for alpha, dtypes in ((8.0, {torch.bfloat16}), (6.0, {torch.bfloat16, torch.float32})):
        config = ExpertLoraConfig(experts=EXPERTS, r=4, lora_alpha=alpha)
        delta = made_delta(base, tmp_path / f"delta{alpha}", config)
        export(delta, base, tmp_path / f"out{alpha}", to="peft-lora")
        file = adapter_file(tmp_path / f"out{alpha}")
        assert {tensor.dtype for tensor in file.values()} == dtypes
        stored = next(
            t for n, t in adapter_file(delta).items() if n.endswith("layers.1.mlp.experts.expert_lora_down_B")
        )
        b_OR = file["base_model.model.model.layers.1.mlp.experts.lora_B.weight"].view(32, 4, 8)[:, :, 3]
        assert torch.equal(b_OR.float(), stored[1].float() * alpha / 4)


def test_the_bases_weights_are_not_loaded(
    olmoe: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, delta = olmoe
    monkeypatch.setattr("metier.deltas.export_lora.load", None)
    read, plain = [], CheckpointFiles.read

    def recorded(self: CheckpointFiles, name: str) -> Tensor:
        read.append(name)
        return plain(self, name)

    monkeypatch.setattr(CheckpointFiles, "read", recorded)
    for layout in ("parameters", "per-expert"):
        export(delta, base, tmp_path / layout, to="peft-lora", layout=layout)
    assert {name.rpartition("mlp.")[2] for name in read} == {"gate.weight"}


def test_a_base_in_few_bits_will_do(
    checkpoint: Path,  # noqa: F811 - the fixture
    tmp_path: Path,
) -> None:
    delta = made_delta(checkpoint, tmp_path / "delta", LORA())
    export(delta, checkpoint, tmp_path / "out", to="peft-lora")
    want = logits(peft.PeftModel.from_pretrained(metier.load(checkpoint).model, delta).eval())
    got = logits(peft.PeftModel.from_pretrained(metier.load(checkpoint).model, tmp_path / "out").eval())
    # bfloat16: PEFT rounds the changed weight, metier adds the change to the product
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


def test_a_base_without_safetensors_is_loaded(olmoe: tuple[Path, Path], tmp_path: Path) -> None:
    base, delta = olmoe
    export(delta, base, tmp_path / "want", to="peft-lora")
    torch.save(tensors_in(base), base / "pytorch_model.bin")
    for path in [*base.glob("*.safetensors"), base / "model.safetensors.index.json"]:
        path.unlink()
    export(delta, base, tmp_path / "out", to="peft-lora")
    got, want = adapter_file(tmp_path / "out"), adapter_file(tmp_path / "want")
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_what_a_lora_cannot_hold_is_refused_with_the_way_out(tmp_path: Path) -> None:
    base = made_folder(tmp_path / "base", "olmoe")
    esft = made_delta(base, tmp_path / "esft", EsftConfig(experts=EXPERTS))
    with pytest.raises(DeltaError, match=r"got a delta of type ESFT, expected EXPERT_LORA[\s\S]*`--to merged`"):
        export(esft, base, tmp_path / "out", to="peft-lora")
    whole = made_delta(base, tmp_path / "whole", LORA(also_train=["norms"]))
    with pytest.raises(DeltaError, match=r"the delta replaces \S+norm too, which a LoRA[\s\S]*`--to merged`"):
        export(whole, base, tmp_path / "out", to="peft-lora")
    lora = peft.get_peft_model(metier.load(base).model, peft.LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(DeltaError, match="got a LoRA of PEFT's own, which needs no export"):
        export(tmp_path / "lora", base, tmp_path / "out", to="peft-lora")
    peft.get_peft_model(tiny_model("llama"), BottleneckConfig(r=4)).save_pretrained(tmp_path / "bottleneck")
    with pytest.raises(DeltaError, match="got an adapter of type BOTTLENECK, expected EXPERT_LORA: it is no LoRA"):
        export(tmp_path / "bottleneck", base, tmp_path / "out", to="peft-lora")
    assert not (tmp_path / "out").exists()


def test_families_without_the_layout_are_refused(tmp_path: Path) -> None:
    base = made_folder(tmp_path / "gpt", "gpt_oss")
    delta = made_delta(base, tmp_path / "gpt_delta", LORA())
    with pytest.raises(DeltaError, match=r"gpt_oss publishes its experts stacked[\s\S]*`--layout parameters`"):
        export(delta, base, tmp_path / "out", to="peft-lora", layout="per-expert")
    base = made_folder(tmp_path / "llama4", "llama4_text")
    delta = made_delta(base, tmp_path / "llama4_delta", LORA())
    with pytest.raises(DeltaError, match=r"Llama4ForCausalLM: transformers stacks its experts outside the contract"):
        export(delta, base, tmp_path / "out", to="peft-lora")
    with pytest.raises(DeltaError, match="Llama4ForCausalLM"):
        export_peft_lora(peft.PeftModel.from_pretrained(metier.load(base).model, delta), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_base_values_that_are_not_finite_and_a_full_folder_are_refused(
    olmoe: tuple[Path, Path], tmp_path: Path
) -> None:
    base, delta = olmoe
    other = made_folder(tmp_path / "other", "olmoe")
    tiny_model("olmoe", seed=1).save_pretrained(other, max_shard_size="20KB")
    with pytest.raises(BaseMismatchError, match="was trained on"):
        export(delta, other, tmp_path / "out", to="peft-lora")
    before = {path.name: path.read_bytes() for path in delta.iterdir()}
    with pytest.raises(ConfigError, match="expected none, an empty one, or a former export"):
        export(delta, base, delta, to="peft-lora")
    assert {path.name: path.read_bytes() for path in delta.iterdir()} == before
    wrapped = peft.PeftModel.from_pretrained(metier.load(base).model, delta)
    with torch.no_grad():
        next(p for n, p in wrapped.named_parameters() if "expert_lora_up_B" in n)[0, 0, 0] = torch.nan
    wrapped.save_pretrained(tmp_path / "nan")
    with pytest.raises(CorruptDeltaError, match="not finite; nothing was exported"):
        export(tmp_path / "nan", base, tmp_path / "out", to="peft-lora")
    assert not (tmp_path / "out").exists()


def test_a_former_export_is_replaced_and_one_that_breaks_off_leaves_it(
    olmoe: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, delta = olmoe
    export(delta, base, tmp_path / "out", to="peft-lora", layout="per-expert")
    export(delta, base, tmp_path / "out", to="peft-lora")
    facts = json.loads((tmp_path / "out" / "metier_export.json").read_text())
    assert (facts["layout"], facts["rank"], facts["experts"]) == ("parameters", 4, {"1": [0, 3], "2": [2]})
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def broken(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("metier.deltas.export_lora._describe", broken)
    with pytest.raises(OSError, match="No space"):
        export(delta, base, tmp_path / "out", to="peft-lora", layout="per-expert")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta", "out"]
