"""A merged checkpoint as servers want it: published names and shapes, the base's own files, and the adapter's answers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import metier
from deltas.made import logits, tokens
from deltas.test_merge import SCRIPT
from deltas.test_stream_merge import made_delta, made_folder, tensors_in
from metier.deltas.export import export
from metier.errors import BaseMismatchError, ConfigError, CorruptDeltaError, DeltaError
from metier.methods.esft import EsftConfig
from metier.methods.expert_lora import ExpertLoraConfig
from models.test_quantised_checkpoints import checkpoint  # noqa: F401 - a fixture
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer

# What vLLM's loaders map to an expert's w1, w2 and w3, and the sizes in tests/tiny_models.py: D is 32.
# deepseek_v2, olmoe, qwen3_moe: vllm/model_executor/models/NAME.py, `get_expert_mapping` with gate_proj, down_proj and
#   up_proj; SGLang's python/sglang/srt/models/NAME.py, `make_expert_params_mapping` with the same.
# mixtral: the same files' mapping with w1, w2 and w3.
# gpt_oss: vLLM's `hf_to_vllm_mapper`, ".gate_up_proj": ".w13_weight", and `_load_weights_other`, which turns (E, D, 2F)
#   into (E, 2F, D).
SINGLE = ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.down_proj.weight", "mlp.experts.{}.up_proj.weight")
W123 = tuple(f"block_sparse_moe.experts.{{}}.w{number}.weight" for number in (1, 2, 3))
LOADERS = {
    "deepseek_v2": (SINGLE, 8, 16, (1, 2)),
    "olmoe": (SINGLE, 8, 24, (0, 1, 2)),
    "qwen3_moe": (SINGLE, 6, 20, (0, 1, 2)),
    "mixtral": (W123, 4, 24, (0, 1, 2)),
}
GPT_OSS = {
    "gate_up_proj": (4, 32, 48),
    "gate_up_proj_bias": (4, 48),
    "down_proj": (4, 24, 32),
    "down_proj_bias": (4, 32),
}
SERVED = (*LOADERS, "gpt_oss")
ESFT = partial(EsftConfig, experts={1: [0, 3], 2: [2]})
EXPERT_LORA = partial(ExpertLoraConfig, experts={1: [0, 3], 2: [2]}, ranks={1: {3: 2}})
# float32; merged rows give the same sums in another order
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def looked_for(family: str) -> dict[str, tuple[int, ...]]:
    if family == "gpt_oss":
        return {f"model.layers.{n}.mlp.experts.{name}": shape for n in range(3) for name, shape in GPT_OSS.items()}
    (first, second, third), num_experts, size, layers = LOADERS[family]
    shapes = {first: (size, 32), second: (32, size), third: (size, 32)}
    return {
        f"model.layers.{n}.{name.format(e)}": shape
        for n in layers
        for e in range(num_experts)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("make_config", [ESFT, EXPERT_LORA], ids=["esft", "expert_lora"])
def test_the_experts_are_named_and_shaped_as_the_servers_loaders_want_them(
    make_config: Callable[[], peft.PeftConfig], tmp_path: Path
) -> None:
    for family in SERVED:
        base = made_folder(tmp_path / family / "base", family)
        delta = made_delta(base, tmp_path / family / "delta", make_config())
        said = export(delta, base, tmp_path / family / "out", to="merged")
        tensors = tensors_in(tmp_path / family / "out")
        routed = {n: tuple(t.shape) for n, t in tensors.items() if ".experts." in n}
        assert routed == looked_for(family), family
        assert tensors.keys() == tensors_in(base).keys(), family
        assert "The loaders were read; the servers were not run." in said[1]


def test_plain_transformers_in_a_fresh_process_gives_the_adapters_logits(tmp_path: Path) -> None:
    want, folders = {}, []
    for family in SERVED:
        base = made_folder(tmp_path / family / "base", family)
        delta = made_delta(base, tmp_path / family / "delta", EXPERT_LORA())
        want[family] = logits(peft.PeftModel.from_pretrained(metier.load(base).model, delta).eval())
        assert not torch.allclose(want[family], logits(metier.load(base).model), **TOLERANCE)
        export(delta, base, tmp_path / family / "out", to="merged", max_shard_size="30KB")
        folders.append(str(tmp_path / family / "out"))
    torch.save(tokens(), tmp_path / "tokens.pt")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "tokens.pt"), *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for family in SERVED:
        torch.testing.assert_close(torch.load(tmp_path / family / "out.pt"), want[family], **TOLERANCE)


def test_a_family_whose_loaders_were_not_read_is_said_to_be_unchecked(tmp_path: Path) -> None:
    base = made_folder(tmp_path / "base", "nemotron_h")
    delta = made_delta(base, tmp_path / "delta", EsftConfig(experts={1: [0]}))
    said = export(delta, base, tmp_path / "out", to="merged")
    assert "Whether vLLM and SGLang serve nemotron_h was not checked" in said[1]


def test_names_that_no_loader_looks_for_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = made_folder(tmp_path / "base", "olmoe")
    delta = made_delta(base, tmp_path / "delta", ESFT())
    sizes = {**FAMILIES["olmoe"], "num_experts": 9}
    monkeypatch.setattr("metier.deltas.export_merged.skeleton", lambda *_, **__: tiny_model("olmoe", **sizes))
    with pytest.raises(DeltaError, match=r"experts\.8\.gate_proj\.weight: got no such tensor in the merged checkpoint"):
        export(delta, base, tmp_path / "out", to="merged")
    assert not (tmp_path / "out").exists()


def test_what_lies_beside_the_weights_is_the_bases_own_though_the_model_was_loaded(tmp_path: Path) -> None:
    base = made_folder(tmp_path / "base", "olmoe")
    # as a publisher of years ago would have written it
    values = json.loads((base / "config.json").read_text())
    theta = values.pop("rope_parameters")["rope_theta"]
    old = {**values, "rope_theta": theta, "torch_dtype": values.pop("dtype")}
    (base / "config.json").write_text(json.dumps(old))
    (base / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true}')
    lora = peft.get_peft_model(metier.load(base).model, peft.LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    export(tmp_path / "lora", base, tmp_path / "out", to="merged")
    made_by_us = {"README.md", "metier_merge.json"}
    beside = {path.name: path.read_bytes() for path in base.iterdir() if ".safetensors" not in path.name}
    got = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if ".safetensors" not in p.name}
    assert got.keys() == beside.keys() - {"pytorch_model.bin"} | made_by_us
    assert all(got[name] == beside[name] for name in got.keys() - made_by_us)


def test_a_configuration_without_architectures_and_dtype_gets_them(tmp_path: Path) -> None:
    base = made_folder(tmp_path / "base", "olmoe", torch.bfloat16)
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps({k: v for k, v in values.items() if k not in ("architectures", "dtype")})
    )
    export(made_delta(base, tmp_path / "delta", ESFT()), base, tmp_path / "out", to="merged")
    got = json.loads((tmp_path / "out" / "config.json").read_text())
    assert got == {**values, "architectures": ["OlmoeForCausalLM"], "dtype": "bfloat16"}


@pytest.mark.parametrize("kind", ["esft", "lora"])
def test_a_base_in_few_bits_is_exported_in_the_floating_point_that_it_stands_for(
    kind: str,
    checkpoint: Path,  # noqa: F811 - the fixture
    tmp_path: Path,
) -> None:
    if kind == "esft":
        delta = made_delta(checkpoint, tmp_path / "delta", ESFT())
        with pytest.warns(UserWarning, match="because it is quantised"):
            export(delta, checkpoint, tmp_path / "out", to="merged")
    else:
        delta = tmp_path / "delta"
        lora = peft.get_peft_model(metier.load(checkpoint).model, peft.LoraConfig(target_modules=["q_proj"]))
        lora.save_pretrained(delta)
        export(delta, checkpoint, tmp_path / "out", to="merged")
    before, after = (json.loads((x / "config.json").read_text()) for x in (checkpoint, tmp_path / "out"))
    assert after == {name: value for name, value in before.items() if name != "quantization_config"}
    want = peft.PeftModel.from_pretrained(metier.load(checkpoint).model, delta).eval()
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {tensor.dtype for tensor in tensors_in(tmp_path / "out").values()} == {torch.bfloat16}
    # bfloat16, and the stored experts are the very same; the order of sums is not
    torch.testing.assert_close(logits(got), logits(want), rtol=0.02, atol=0.02)


def test_another_base_a_full_folder_and_the_base_itself_are_refused(tmp_path: Path) -> None:
    base = made_folder(tmp_path / "base", "deepseek_v2")
    delta = made_delta(base, tmp_path / "delta", ESFT())
    tiny_model("deepseek_v2", seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(BaseMismatchError, match="was trained on"):
        export(delta, tmp_path / "other", tmp_path / "out", to="merged")
    with pytest.raises(ConfigError, match=r"got a folder with thesis\.tex"):
        export(delta, base, tmp_path / "thesis", to="merged")
    merged = tmp_path / "out"
    export(delta, base, merged, to="merged")
    before = {path.name: path.read_bytes() for path in merged.iterdir()}
    with pytest.raises(ConfigError, match="got the base's own folder as output"):
        export(delta, merged, merged, to="merged")
    assert {path.name: path.read_bytes() for path in merged.iterdir()} == before
    export(delta, base, merged, to="merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta", "other", "out", "thesis"]


def test_shards_hold_no_more_than_was_asked_for(tmp_path: Path) -> None:
    base = made_folder(tmp_path / "base", "olmoe", shard="10GB")
    delta = made_delta(base, tmp_path / "delta", ESFT())
    export(delta, base, tmp_path / "whole", to="merged")
    export(delta, base, tmp_path / "parts", to="merged", max_shard_size="30KB")
    whole, parts = tensors_in(tmp_path / "whole"), tensors_in(tmp_path / "parts")
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    files = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 3
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) == 1
    for path in files:
        assert sum(tensor.nbytes for tensor in load_file(path).values()) <= 36_000  # the embedding has 33,536
    weight_map = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: path.name for path in files for name in load_file(path)} == weight_map


def test_an_export_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = made_folder(tmp_path / "base", "olmoe")
    delta = made_delta(base, tmp_path / "delta", ESFT())

    def broken(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("metier.deltas.export_merged.reshard", broken)
    with pytest.raises(OSError, match="No space"):
        export(delta, base, tmp_path / "out", to="merged", max_shard_size="1MB")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta"]


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    base = made_folder(tmp_path / "base", "olmoe")
    wrapped = peft.get_peft_model(metier.load(base).model, ESFT())
    with torch.no_grad():
        next(p for p in wrapped.parameters() if p.requires_grad)[0, 0, 0] = torch.inf
    wrapped.save_pretrained(tmp_path / "delta")
    with pytest.raises(CorruptDeltaError, match="not finite; nothing was merged"):
        export(tmp_path / "delta", base, tmp_path / "out", to="merged")
    assert not (tmp_path / "out").exists()
