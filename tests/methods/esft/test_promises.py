"""The promises about what ESFT trains, saves, serves and leaves alone, on unlike families of tiny models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from metier.methods.esft import EsftConfig
from metier.models.moe import moe_layers
from tiny_models import VOCAB_SIZE, tiny_model

FAMILIES = ("deepseek_v2", "qwen3_moe", "mixtral", "gpt_oss", "olmoe")

# float32; a mixed batch has other group sizes than a single request, so sums are ordered otherwise
MIXED_TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


# rows of an expert are multiples of 64 bytes, as in every real model
WIDE = {"mixtral": {"intermediate_size": 32}, "olmoe": {"intermediate_size": 32}, "gpt_oss": {"intermediate_size": 32}}
WIDE |= {"qwen3_moe": {"moe_intermediate_size": 32}, "deepseek_v2": {"moe_intermediate_size": 32}}


def selection(model: nn.Module) -> dict[int, list[int]]:
    """Two experts of each MoE layer but the last, one of the last."""
    layers = moe_layers(model)
    return {layer.index: [1, 3] if layer is not layers[-1] else [2] for layer in layers}


def tokens(batch: int = 2, length: int = 21, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor, **kwargs: object) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


LEARNING_RATE, WEIGHT_DECAY, NUM_STEPS = 1e-2, 0.5, 3


def train(model: nn.Module, steps: int = NUM_STEPS, seed: int = 0) -> None:
    """A few AdamW steps with a heavy weight decay over all parameters that want gradients."""
    model.train()
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for step in range(steps):
        ids = tokens(4, 33, seed=seed + step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(family: str, **changes: object) -> tuple[peft.PeftModel, dict[str, Tensor]]:
    """A trained adapter, and the base's state from before."""
    model = tiny_model(family, **changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = peft.get_peft_model(model, EsftConfig(experts=selection(model)))
    train(wrapped)
    return wrapped, before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_delta_changes_no_bit(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, **WIDE[family]).to(dtype)
    ids = [tokens(1, 1), tokens(3, 21), tokens(1, 86)]
    wanted = [logits(model, i) for i in ids]
    wrapped = peft.get_peft_model(model, EsftConfig(experts=selection(model)))
    for i, want in zip(ids, wanted, strict=True):
        assert torch.equal(logits(wrapped, i), want)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 70), st.sets(st.integers(0, 7), min_size=1))
def test_a_zero_delta_changes_no_bit_whatever_is_selected(length: int, experts: set[int]) -> None:
    model = tiny_model("deepseek_v2", **WIDE["deepseek_v2"])
    want = logits(model, tokens(1, length))
    wrapped = peft.get_peft_model(model, EsftConfig(experts={1: sorted(experts)}))
    assert torch.equal(logits(wrapped, tokens(1, length)), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_selected_row_moves_and_every_other_parameter_is_the_base_to_the_bit(family: str) -> None:
    wrapped, before = trained(family)
    chosen = wrapped.peft_config["default"].experts
    for name, parameter in wrapped.named_parameters():
        assert parameter.requires_grad == ("esft_" in name), name
    for layer in moe_layers(wrapped):
        for name in layer.parameter_names():
            rows = layer.entry.get_submodule(f"esft_{name}")["default"].detach()
            base = before[f"{layer.path}.{name}"][chosen[layer.index]]
            # decay moves a row too; a step along a gradient is as large as the learning rate
            decayed = base * (1 - LEARNING_RATE * WEIGHT_DECAY) ** NUM_STEPS
            moved = ((rows - decayed).abs() > LEARNING_RATE / 10).flatten(1).any(1)
            assert moved.all(), f"{layer.path}.{name}: rows {chosen[layer.index]} moved: {moved.tolist()}"
    after = wrapped.unload().state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name


def test_only_selected_rows_have_gradients_and_float32_masters_on_a_bf16_base() -> None:
    model = tiny_model("qwen3_moe", **WIDE["qwen3_moe"]).bfloat16()
    wrapped = peft.get_peft_model(model, EsftConfig(experts={1: [0, 5]}))
    with_gradient = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert {tuple(p.shape) for p in with_gradient.values()} == {(2, 64, 32), (2, 32, 32)}
    assert {p.dtype for p in with_gradient.values()} == {torch.float32}
    ids = tokens(8, 64)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in with_gradient.values())
    assert all(p.grad is None for p in wrapped.parameters() if not p.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_loaded_in_a_fresh_process_merged_and_unmerged_give_the_same_logits(family: str, tmp_path: Path) -> None:
    base = tiny_model(family, **WIDE[family])
    base.save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(base, EsftConfig(experts=selection(base)))
    unchanged = logits(wrapped, tokens())
    train(wrapped)
    want = logits(wrapped, tokens())
    assert (want - unchanged).abs().max() > 1e-3, "the delta does nothing: the rest of this test would prove nothing"
    wrapped.save_pretrained(tmp_path / "adapter")
    script = f"""
import metier, peft, torch, transformers
base = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
model = peft.PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}).eval()
ids = torch.load({str(tmp_path / "ids.pt")!r})
with torch.no_grad():
    served = model(input_ids=ids).logits
    model.merge_adapter(); merged = model(input_ids=ids).logits
    model.unmerge_adapter(); unmerged = model(input_ids=ids).logits
    with model.disable_adapter(): off = model(input_ids=ids).logits
    final = model.merge_and_unload()(input_ids=ids).logits
torch.save([served, merged, unmerged, final, off], {str(tmp_path / "out.pt")!r})
"""
    torch.save(tokens(), tmp_path / "ids.pt")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *same, off = torch.load(tmp_path / "out.pt")
    for got in same:
        assert torch.equal(got, want)
    assert torch.equal(off, unchanged)


def test_merge_and_unload_leaves_a_plain_model_that_transformers_saves_and_loads(tmp_path: Path) -> None:
    wrapped, _ = trained("mixtral")
    want = logits(wrapped, tokens())
    merged = wrapped.merge_and_unload()
    assert not [m for m in merged.modules() if "Esft" in type(m).__name__]
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path), tokens()), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_that_mixes_deltas_answers_each_request_as_if_alone(family: str) -> None:
    wrapped, _ = trained(family)
    wrapped.add_adapter("second", EsftConfig(experts={2: [0, 1]}))
    wrapped.set_adapter("second")
    train(wrapped, seed=50)
    ids = tokens(5, 13)
    names = ["default", "__base__", "second", "default", "second"]
    mixed = logits(wrapped, ids, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with wrapped.disable_adapter():
                alone = logits(wrapped, ids[row : row + 1])
        else:
            wrapped.set_adapter(name)
            alone = logits(wrapped, ids[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, **MIXED_TOLERANCE)
    assert (mixed[0] - logits(wrapped, ids[:1])[0]).abs().max() > 1e-3, (
        "both adapters answer alike: this proves nothing"
    )


def test_adapters_switch_on_and_off_and_can_be_deleted() -> None:
    wrapped, _ = trained("olmoe")
    with wrapped.disable_adapter():
        base = logits(wrapped, tokens())
    first = logits(wrapped, tokens())
    wrapped.add_adapter("second", EsftConfig(experts={0: [7]}))
    assert torch.equal(logits(wrapped, tokens()), first), "adding an adapter activated it"
    assert not [name for name, p in wrapped.named_parameters() if p.requires_grad and "second" in name]
    wrapped.set_adapter("second")
    assert torch.equal(logits(wrapped, tokens()), base), "a new adapter is a zero delta"
    train(wrapped, seed=9)
    second = logits(wrapped, tokens())
    wrapped.set_adapter("default")
    assert torch.equal(logits(wrapped, tokens()), first)
    wrapped.delete_adapter("default")
    wrapped.set_adapter("second")
    assert torch.equal(logits(wrapped, tokens()), second)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        model = tiny_model("deepseek_v2")
        wrapped = peft.get_peft_model(model, EsftConfig(experts=selection(model))).train()
        if checkpointing:
            wrapped.gradient_checkpointing_enable({"use_reentrant": False})
        ids = tokens(3, 40)
        wrapped(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad for p in wrapped.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_switching_off_a_merged_adapter_gives_the_base_and_a_new_one_begins_as_its_copy() -> None:
    wrapped, _ = trained("deepseek_v2")
    with wrapped.disable_adapter():
        base = logits(wrapped, tokens())
    wrapped.merge_adapter()
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped, tokens()), base)
    wrapped.merge_adapter()
    wrapped.add_adapter("second", EsftConfig(experts=selection(wrapped)))
    wrapped.set_adapter("second")
    assert torch.equal(logits(wrapped, tokens()), base)


def test_a_delta_over_many_layers_names_each_of_them(tmp_path: Path) -> None:
    model = tiny_model("olmoe", num_hidden_layers=24)
    wrapped = peft.get_peft_model(model, EsftConfig(experts={index: [index % 8] for index in range(24)}))
    wrapped.save_pretrained(tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert config.target_modules == [f"model.layers.{index}.mlp.experts" for index in range(24)]
    assert len([m for m in wrapped.modules() if type(m).__name__ == "EsftExperts"]) == 24
