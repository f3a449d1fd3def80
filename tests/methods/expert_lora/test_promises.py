"""The promises about what a LoRA on experts trains, saves, serves and leaves alone, on unlike families."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from metier.errors import ConfigError, CorruptDeltaError, DeltaError, SelectionError
from metier.methods.expert_lora import ExpertLoraConfig
from metier.models.moe import moe_layers
from tiny_models import VOCAB_SIZE, tiny_model

FAMILIES = ("deepseek_v2", "qwen3_moe", "mixtral", "gpt_oss", "olmoe", "nemotron_h")

# float32; merged weights are added up before the product, thin ones after it
MERGED_TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def tokens(batch: int = 2, length: int = 21, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor, **kwargs: object) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def config(model: nn.Module, **options: object) -> ExpertLoraConfig:
    """Two experts of each MoE layer but the last, one of the last."""
    layers = moe_layers(model)
    experts = {layer.index: [1, 3] if layer is not layers[-1] else [2] for layer in layers}
    return ExpertLoraConfig(experts=experts, r=4, **options)


def trained(family: str, *, seed: int = 0, **options: object) -> peft.PeftModel:
    base = tiny_model(family)
    wrapped = peft.get_peft_model(base, config(base, **options))
    train(wrapped, seed=seed)
    return wrapped


def train(model: nn.Module, seed: int = 0) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2, weight_decay=0.5)
    for step in range(3):
        ids = tokens(4, 33, seed=seed + step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_changes_no_bit(family: str, dtype: torch.dtype) -> None:
    sizes = {"moe_intermediate_size": 32} if "moe_intermediate_size" in tiny_model(family).config.to_dict() else {}
    model = tiny_model(family, **(sizes or {"intermediate_size": 32})).to(dtype)
    ids = [tokens(1, 1), tokens(3, 21), tokens(1, 86)]
    wanted = [logits(model, i) for i in ids]
    wrapped = peft.get_peft_model(model, config(model))
    for i, want in zip(ids, wanted, strict=True):
        assert torch.equal(logits(wrapped, i), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_moves_and_every_other_parameter_is_the_base_to_the_bit(family: str) -> None:
    before = tiny_model(family).state_dict()
    wrapped = trained(family)
    for name, parameter in wrapped.named_parameters():
        assert parameter.requires_grad == ("expert_lora_" in name), name
    for layer in moe_layers(wrapped):
        for matrix in ("up_B", "down_B"):
            moved_C = layer.entry.get_submodule(f"expert_lora_{matrix}")["default"].flatten(1).any(1)
            assert moved_C.all(), f"{layer.path}.{matrix}: {moved_C.tolist()}"
    after = wrapped.unload().state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_loaded_in_a_fresh_process_merged_and_unmerged_give_the_same_logits(family: str, tmp_path: Path) -> None:
    base, ids = tiny_model(family), tokens()
    base.save_pretrained(tmp_path / "base")
    plain = logits(base, ids)
    wrapped = peft.get_peft_model(base, config(base))
    train(wrapped)
    want = logits(wrapped, ids)
    assert (want - plain).abs().max() > 1e-3
    wrapped.save_pretrained(tmp_path / "adapter")
    torch.save({"ids": ids, "want": want}, tmp_path / "probe.pt")
    code = (
        "import sys, torch, metier, peft; from transformers import AutoModelForCausalLM\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/base')\n"
        "model = peft.PeftModel.from_pretrained(base, sys.argv[1] + '/adapter').eval()\n"
        "probe = torch.load(sys.argv[1] + '/probe.pt')\n"
        "assert torch.equal(model(input_ids=probe['ids']).logits, probe['want'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wrapped.merge_adapter()
    merged = logits(wrapped, ids)
    torch.testing.assert_close(merged, want, **MERGED_TOLERANCE)
    wrapped.unmerge_adapter()
    assert torch.equal(logits(wrapped, ids), want)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped, ids), plain)
    whole = wrapped.merge_and_unload()
    assert torch.equal(logits(whole, ids), merged)
    assert not any("lora" in name for name in whole.state_dict())


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss"])
def test_a_batch_that_mixes_adapters_and_the_base_answers_each_row_as_if_alone(family: str) -> None:
    model = trained(family)
    model.add_adapter("other", ExpertLoraConfig(experts={moe_layers(model)[-1].index: [0, 2]}, r=2))
    model.set_adapter("other")
    train(model, seed=7)
    ids, names = tokens(4), ["other", "__base__", "default", "other"]
    mixed = logits(model, ids, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = logits(model, ids[row : row + 1])
        else:
            model.set_adapter(name)
            alone = logits(model, ids[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_two_active_adapters_add_their_changes_up() -> None:
    model = trained("deepseek_v2")
    last = moe_layers(model)[-1].index
    model.add_adapter("other", ExpertLoraConfig(experts={last: [0, 2]}, r=2, ranks={last: {0: 1}}))
    model.set_adapter("other")
    train(model, seed=7)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model, tokens())
    model.merge_adapter(adapter_names=["default", "other"])
    torch.testing.assert_close(logits(model, tokens()), both, **MERGED_TOLERANCE)
    model.unmerge_adapter()
    assert torch.equal(logits(model, tokens()), both)


def test_an_expert_of_a_lower_rank_keeps_it() -> None:
    base = tiny_model("deepseek_v2")
    wrapped = peft.get_peft_model(base, ExpertLoraConfig(experts={1: [2, 5]}, r=4, ranks={1: {5: 1}}))
    train(wrapped)
    layer = moe_layers(wrapped)[0].entry
    for projection in ("up", "down"):
        a_CRI = getattr(layer, f"expert_lora_{projection}_A")["default"]
        b_COR = getattr(layer, f"expert_lora_{projection}_B")["default"]
        assert a_CRI[0].any(1).all()
        assert a_CRI[1].any(1).tolist() == [True, False, False, False]
        assert b_COR[1].any(0).tolist() == [True, False, False, False]
    assert layer.scales["default"] == (4.0, 16.0)


def test_gradients_and_state_exist_for_the_matrices_alone_in_float32_on_a_bf16_base() -> None:
    base = tiny_model("qwen3_moe").bfloat16()
    wrapped = peft.get_peft_model(base, config(base))
    ids = tokens(8, 64)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in wrapped.named_parameters():
        assert (parameter.grad is not None) == ("expert_lora_" in name), name
        if parameter.grad is not None:
            assert parameter.dtype == parameter.grad.dtype == torch.float32


def test_dropout_acts_in_training_alone() -> None:
    model = trained("deepseek_v2", lora_dropout=0.5)
    ids = tokens()
    assert torch.equal(logits(model, ids), logits(model, ids))
    model.train()
    one, other = (model(input_ids=ids).logits for _ in range(2))
    assert not torch.equal(one, other)


def test_gradient_checkpointing_gives_the_same_gradients_even_with_dropout() -> None:
    grads = []
    for checkpointing in (False, True):
        base = tiny_model("deepseek_v2")
        wrapped = peft.get_peft_model(base, config(base, lora_dropout=0.3))
        if checkpointing:
            wrapped.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data.uniform_(-0.3, 0.3)
        wrapped.train()
        wrapped(input_ids=tokens(), labels=tokens()).loss.backward()
        grads.append([p.grad for p in wrapped.parameters() if p.requires_grad])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_a_delta_with_a_tensor_too_few_or_of_another_shape_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    trained("deepseek_v2").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    for wrong in ({k: v for k, v in tensors.items() if k != name}, {**tensors, name: tensors[name][:1].clone()}):
        save_file(wrong, path, metadata={"format": "pt"})
        with pytest.raises(CorruptDeltaError, match="nothing was loaded"):
            peft.PeftModel.from_pretrained(tiny_model("deepseek_v2"), tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"experts": {}}, SelectionError, "got {}, expected a mapping of decoder layers"),
        ({"experts": {1: [2, 2]}}, SelectionError, "names an expert twice"),
        ({"experts": {1: [2]}, "r": 0}, ConfigError, "r must be a whole number of at least 1, got 0"),
        ({"experts": {1: [2]}, "ranks": {1: {2: -1}}}, ConfigError, r"ranks\[1\]\[2\] must be a whole number"),
        ({"experts": {1: [2]}, "ranks": {1: {3: 1}}}, ConfigError, "ranks names expert 3 of layer 1"),
        ({"experts": {1: [2]}, "ranks": {2: {2: 1}}}, ConfigError, "ranks names expert 2 of layer 2"),
        ({"experts": {1: [2]}, "lora_dropout": 1.0}, ConfigError, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"experts": {1: [2]}, "lora_alpha": 0}, ConfigError, "lora_alpha must be greater than 0, got 0"),
    ],
)
def test_a_wrong_configuration_is_refused(options: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ExpertLoraConfig(**options)


def test_experts_that_the_base_does_not_have_are_refused() -> None:
    with pytest.raises(SelectionError, match=r"layers\.1: the adapter trains expert 71, .*num_experts=8"):
        peft.get_peft_model(tiny_model("deepseek_v2"), ExpertLoraConfig(experts={1: [71]}))
    with pytest.raises(SelectionError, match=r"layers\.0: .* has no MoE layer there"):
        peft.get_peft_model(tiny_model("deepseek_v2"), ExpertLoraConfig(experts={0: [1]}))


def test_different_dropouts_in_one_training_pass_are_refused() -> None:
    model = trained("deepseek_v2", lora_dropout=0.5)
    model.add_adapter("other", ExpertLoraConfig(experts={2: [0]}, r=2))
    model.base_model.set_adapter(["default", "other"])
    model.train()
    with pytest.raises(DeltaError, match="different dropouts"):
        model(input_ids=tokens())


def test_a_change_that_is_not_finite_is_not_merged() -> None:
    model = trained("deepseek_v2")
    before = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
    moe_layers(model)[-1].entry.expert_lora_up_B["default"].data[0, 0, 0] = float("nan")
    with pytest.raises(DeltaError, match="not finite; nothing was merged"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
