"""MEFT through PEFT: on dense and MoE decoders, saved and loaded, beside a dense adapter, and what is refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GraniteMoeHybridConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen3Config,
    RecurrentGemmaConfig,
)

from metier.errors import (
    BaseMismatchError,
    ConfigError,
    CorruptDeltaError,
    DeltaError,
    RowStoreError,
    UnsupportedModelError,
)
from metier.memory import RowAdamW, RowStore
from metier.methods.meft import MeftConfig, MeftLayer
from metier.methods.meft.defaults import router_scale
from tiny_models import tiny_model

DENSE = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen3": Qwen3Config, "gemma": GemmaConfig}
MOE = ("deepseek_v2", "mixtral", "gpt_oss", "qwen3_moe")


def dense_model(kind: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32):
    torch.manual_seed(seed)
    config = DENSE[kind](
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def granite_without_experts():
    torch.manual_seed(0)
    config = GraniteMoeHybridConfig(
        vocab_size=64, hidden_size=32, shared_intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=0, layer_types=["attention", "mamba"], mamba_n_heads=4, mamba_d_head=16,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def recurrent_gemma():
    torch.manual_seed(0)
    config = RecurrentGemmaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, lru_width=32
    )
    return AutoModelForCausalLM.from_config(config).eval()


def any_model(kind: str):
    if kind == "recurrent_gemma":
        return recurrent_gemma()
    if kind == "granite":
        return granite_without_experts()
    return dense_model(kind) if kind in DENSE else tiny_model(kind).eval()


def tokens(seed: int = 0):
    return torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(seed))


def trained(model, steps: int = 3, *, config: MeftConfig | None = None, **options):
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, config or MeftConfig(r=64, num_active_key_experts=4, top_k=8))
    optimizer = RowAdamW(wrapped.parameters(), lr=3e-2, **options)
    for step in range(steps):
        wrapped(input_ids=tokens(step), labels=tokens(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return wrapped.eval()


def layers(model) -> list[MeftLayer]:
    return [module for module in model.modules() if isinstance(module, MeftLayer)]


@pytest.mark.parametrize("kind", [*DENSE, *MOE, "recurrent_gemma", "granite"])
def test_an_adapter_changes_nothing_at_first_then_trains_and_leaves_the_base_alone(kind):
    model = any_model(kind)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    logits = model(tokens()).logits
    wrapped = peft.get_peft_model(model, MeftConfig(r=64, num_active_key_experts=4, top_k=8))
    assert torch.equal(wrapped(tokens()).logits, logits)
    assert len(layers(wrapped)) == model.config.num_hidden_layers
    optimizer = RowAdamW(wrapped.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(8):
        losses.append(wrapped(input_ids=tokens(), labels=tokens()).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    base = {n.replace(".base_layer", ""): p for n, p in wrapped.get_base_model().named_parameters() if "meft_" not in n}
    assert all(torch.equal(base[name], tensor) for name, tensor in before.items())
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(tokens()).logits, logits)


class ParallelAdapter(nn.Module):
    """The dense adapter that MEFT is sparse of: FFN(h) + ReLU(h A) B."""

    def __init__(self, block, keys_RD, values_RD):
        super().__init__()
        self.block, self.keys, self.values = block, nn.Parameter(keys_RD), nn.Parameter(values_RD)

    def forward(self, hidden):
        return self.block(hidden) + (hidden @ self.keys.T).relu() @ self.values


def test_with_all_rows_and_no_gate_it_is_the_dense_parallel_adapter():
    sizes = {"r": 24, "num_key_experts": 4, "num_active_key_experts": 4, "top_k": 24, "gate": "none"}
    sparse, dense = trained(dense_model(), config=MeftConfig(**sizes)), dense_model()
    for layer, block in zip(layers(sparse), dense.model.layers, strict=True):
        rows = layer.stores["default"].saved().clone()
        block.mlp = ParallelAdapter(block.mlp, rows[:, 0].contiguous(), rows[:, 1].contiguous())
    torch.testing.assert_close(sparse(tokens()).logits, dense(tokens()).logits, rtol=1e-5, atol=1e-5)

    sparse(input_ids=tokens(), labels=tokens()).loss.backward()
    dense(input_ids=tokens(), labels=tokens()).loss.backward()
    for layer, block in zip(layers(sparse), dense.model.layers, strict=True):
        gradients = layer.meft_gradients["default"].step_gradients
        order = torch.tensor(gradients.block_ids).argsort()
        got = gradients.holder.grad[order].flatten(0, 1)
        torch.testing.assert_close(got[:, 0], block.mlp.keys.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(got[:, 1], block.mlp.values.grad, rtol=1e-4, atol=1e-6)


def test_the_router_learns_with_a_gate_and_rests_without_one():
    for gate, moves in (("logit", True), ("none", False)):
        config = MeftConfig(r=64, num_active_key_experts=4, top_k=8, gate=gate)
        before = layers(trained(dense_model(), steps=0, config=config))[0].meft_router["default"]
        after = layers(trained(dense_model(), config=config))[0].meft_router["default"]
        assert torch.equal(before, after) != moves


def test_a_batch_of_any_size_answers_alike():
    wrapped = trained(dense_model())
    together = wrapped(tokens()).logits
    for row in range(2):
        torch.testing.assert_close(wrapped(tokens()[row : row + 1]).logits, together[row : row + 1])


def test_the_union_of_a_batch_depends_on_it():
    config = MeftConfig(r=64, num_active_key_experts=2, top_k=4, semantics="union")
    wrapped = trained(dense_model(), config=config)
    together = wrapped(tokens()).logits
    assert not torch.allclose(wrapped(tokens()[:1]).logits, together[:1], atol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        model = dense_model().train()
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, MeftConfig(r=64, num_active_key_experts=4, top_k=8))
        for layer in layers(wrapped):
            layer.stores["default"].rows_NMWD.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        wrapped(input_ids=tokens(), labels=tokens()).loss.backward()
        found.append([p.grad for p in wrapped.parameters() if p.grad is not None])
    assert len(found[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


_FRESH = """
import sys, torch, metier, peft
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = peft.PeftModel.from_pretrained(base, sys.argv[2]).eval()
torch.save(model(torch.load(sys.argv[3])).logits.detach(), sys.argv[4])
"""


def test_a_saved_adapter_gives_the_same_logits_in_a_fresh_process(tmp_path):
    model = dense_model()
    model.save_pretrained(tmp_path / "base")
    wrapped = trained(model)
    wrapped.save_pretrained(tmp_path / "adapter")
    torch.save(tokens(), tmp_path / "tokens")
    arguments = [str(tmp_path / name) for name in ("base", "adapter", "tokens", "logits")]
    subprocess.run([sys.executable, "-c", _FRESH, *arguments], check=True)
    assert torch.equal(torch.load(tmp_path / "logits"), wrapped(tokens()).logits)


@pytest.mark.parametrize("store", ["host", "disk"])
def test_rows_on_the_host_and_on_disk_give_the_same_bits(store, tmp_path):
    on_device = trained(dense_model(), weight_decay=0.1)
    config = MeftConfig(r=64, num_active_key_experts=4, top_k=8, store=store, store_folder=str(tmp_path / "rows"))
    elsewhere = trained(dense_model(), config=config, weight_decay=0.1)
    assert torch.equal(elsewhere(tokens()).logits, on_device(tokens()).logits)
    assert (tmp_path / "rows").exists() == (store == "disk")
    elsewhere.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["store_folder"] is None
    again = peft.PeftModel.from_pretrained(dense_model(), tmp_path / "adapter").eval()
    assert torch.equal(again(tokens()).logits, on_device(tokens()).logits)


def test_another_base_is_refused(tmp_path):
    trained(dense_model()).save_pretrained(tmp_path)
    other = dense_model()
    other.model.norm.weight.data.mul_(2)
    with pytest.raises(BaseMismatchError, match="Load the base that it was trained on"):
        peft.PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("breakage", ["missing", "foreign", "shape", "router"])
def test_a_file_that_does_not_fit_is_refused_before_anything_is_loaded(breakage, tmp_path):
    wrapped = trained(dense_model())
    wrapped.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    name = "base_model.model.model.layers.1.mlp.meft_rows"
    if breakage == "missing":
        del state[name]
    elif breakage == "foreign":
        state["base_model.model.model.layers.7.mlp.meft_rows"] = state[name].clone()
    elif breakage == "shape":
        state[name] = state[name][:-1].contiguous()
    else:
        del state["base_model.model.model.layers.0.mlp.meft_router"]
    save_file(state, path)
    fresh = trained(dense_model(), steps=1)
    before = fresh(tokens()).logits
    with pytest.raises(CorruptDeltaError, match="nothing was loaded"):
        fresh.load_adapter(str(tmp_path), "default")
    assert torch.equal(fresh(tokens()).logits, before)


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_by_name(verb):
    wrapped = trained(dense_model(), steps=1)
    with pytest.raises(DeltaError, match="cannot be merged"):
        getattr(wrapped, verb)()


def test_unloading_gives_the_base_back():
    model = dense_model()
    logits = model(tokens()).logits
    assert torch.equal(trained(model).unload()(tokens()).logits, logits)


def test_two_adapters_and_deleting_one():
    wrapped = trained(dense_model())
    first = wrapped(tokens()).logits
    wrapped.add_adapter("second", MeftConfig(r=32, num_active_key_experts=4, top_k=8))
    assert torch.equal(wrapped(tokens()).logits, first)
    wrapped.set_adapter("second")
    assert not torch.equal(wrapped(tokens()).logits, first)
    wrapped.set_adapter("default")
    wrapped.delete_adapter("second")
    assert all(list(layer.stores) == ["default"] for layer in layers(wrapped))
    assert torch.equal(wrapped(tokens()).logits, first)


def test_only_the_active_adapter_trains():
    wrapped = trained(dense_model())
    wrapped.add_adapter("second", MeftConfig(r=32, num_active_key_experts=4, top_k=8))
    wrapped.base_model.set_adapter(["default", "second"], inference_mode=True)
    loss = wrapped(input_ids=tokens(), labels=tokens()).loss
    assert not loss.requires_grad


def test_mixing_adapters_in_a_batch_is_refused():
    with pytest.raises(ConfigError, match="one adapter at a time"):
        trained(dense_model())(tokens(), adapter_names=["default", "__base__"])


def test_modules_may_be_named():
    wrapped = peft.get_peft_model(dense_model(), MeftConfig(r=64, target_modules=["layers.1.mlp"]))
    assert [layer.path for layer in layers(wrapped)] == ["model.layers.1.mlp"]
    assert wrapped.peft_config["default"].target_modules == ["model.layers.1.mlp"]


def test_a_model_without_feed_forward_blocks_is_refused():
    model = dense_model()
    for layer in model.model.layers:
        layer.other, layer.mlp = layer.mlp, None
        del layer.mlp
    with pytest.raises(UnsupportedModelError, match=r"(?s)have .*other.*target_modules"):
        peft.get_peft_model(model, MeftConfig(r=64))
    assert len(layers(peft.get_peft_model(model, MeftConfig(r=64, target_modules=["other"])))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "^MeftConfig: r must be at least 1, got 0"),
        ({"r": 97}, "^MeftConfig: r=97 cannot be split: .*, and no number near it divides 97.\nTake r=84, or"),
        (
            {"r": 64, "num_key_experts": 7},
            "^MeftConfig: r=64 cannot .*\nTake r=63 or r=70, or leave num_key_experts out",
        ),
        ({"r": 5, "num_key_experts": 7}, "Take r=7, or leave"),
        ({"r": 64, "num_key_experts": 4, "num_active_key_experts": 5}, "^MeftConfig: .* more than num_key_experts=4"),
        ({"r": 64, "num_key_experts": 16, "num_active_key_experts": 2, "top_k": 9}, "^MeftConfig: .* 8 candidates"),
        ({"r": 64, "gate": "softmax"}, "gate must be logit or none, got 'softmax'"),
        ({"r": 64, "semantics": "batch"}, "semantics must be"),
        ({"r": 64, "store": "tape"}, "store must be device or host or disk"),
        ({"r": 64, "scaling": 0.0}, "scaling must be greater than 0"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        MeftConfig(**options)


def test_layers_that_compute_the_block_themselves_are_refused():
    config = OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    with pytest.raises(UnsupportedModelError, match="as OPT's do, nothing can stand beside it"):
        peft.get_peft_model(AutoModelForCausalLM.from_config(config), MeftConfig(r=64))


@pytest.mark.parametrize("mode", ["lazy", "exact"])
def test_a_state_dict_has_the_rows_and_gives_them_back(mode, tmp_path):
    model = trained(dense_model(), mode=mode)
    wanted = model(input_ids=tokens()).logits
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = peft.get_peft_model(dense_model(), MeftConfig(r=64, num_active_key_experts=4, top_k=8)).eval()
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert sum(name.endswith("meft_rows.default") for name in state) == 2
    assert other.load_state_dict(state).missing_keys == []
    assert torch.equal(other(input_ids=tokens()).logits, wanted)


def test_rows_of_another_shape_in_a_state_dict_are_refused_and_the_layer_keeps_its_own():
    state = dict(peft.get_peft_model(dense_model(), MeftConfig(r=32, num_active_key_experts=4, top_k=8)).state_dict())
    other = peft.get_peft_model(dense_model(), MeftConfig(r=64, num_active_key_experts=4, top_k=8))
    foreign = next(name for name in state if ".1.mlp.meft_rows" in name)
    state = {**other.state_dict(), foreign: state[foreign]}
    other(input_ids=tokens(), labels=tokens()).loss.backward()
    first, second = layers(other)
    kept = second.stores["default"].saved().clone()
    with pytest.raises(
        RuntimeError, match=r"rows of shape \[32, 2, 32\], expected \[64, 2, 32\]; those that are here stay"
    ):
        other.load_state_dict(state)
    assert torch.equal(second.stores["default"].saved(), kept)
    assert second.meft_gradients["default"].grad is not None
    assert first.meft_gradients["default"].grad is None


def test_keys_begin_small_values_at_zero_and_routers_as_the_mean_of_keys():
    model = peft.get_peft_model(dense_model(), MeftConfig(r=512))
    for layer in layers(model):
        store, sizes = layer.stores["default"], layer.configs["default"].sizes
        keys_NMD = store.rows_NMWD[:, :, 0]
        assert not store.rows_NMWD[:, :, 1].any()
        assert keys_NMD.std() == pytest.approx(0.02, rel=0.02)
        assert keys_NMD.mean() == pytest.approx(0, abs=0.001)
        expected = router_scale(sizes, 32) * keys_NMD.mean(1)
        torch.testing.assert_close(layer.meft_router["default"].detach(), expected)
    assert not torch.equal(*(layer.stores["default"].rows_NMWD for layer in layers(model)))


def test_rows_that_a_state_dict_lacks_are_missing():
    model = trained(dense_model(), steps=1)
    state = {name: tensor for name, tensor in model.state_dict().items() if "meft_rows" not in name}
    with pytest.raises(RuntimeError, match=r"meft_rows\.default"):
        model.load_state_dict(state)


def test_an_evaluation_without_gradients_leaves_an_adapter_that_can_be_turned_off_and_on():
    model = trained(dense_model(), steps=1)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    model.zero_grad()
    with torch.inference_mode():
        model(input_ids=tokens())
    with model.disable_adapter():
        pass
    assert all(layer.meft_gradients["default"].requires_grad for layer in layers(model))


def test_what_stands_for_rows_takes_no_room_in_a_state_dict():
    model = trained(dense_model(), steps=1)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    holders = [tensor for name, tensor in model.state_dict().items() if "meft_gradients" in name]
    assert len(holders) == 2
    assert not any(holder.numel() for holder in holders)


def test_an_optimizers_zero_grad_forgets_a_steps_rows_at_once():
    model = trained(dense_model(), steps=1)
    optimizer = RowAdamW(model.parameters())
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(layer.meft_gradients["default"].step_gradients.block_ids for layer in layers(model))
    optimizer.zero_grad()
    assert not any(layer.meft_gradients["default"].step_gradients.block_ids for layer in layers(model))


def test_a_state_dict_may_take_the_place_of_parameters():
    model = trained(dense_model(), steps=1)
    wanted = model(input_ids=tokens()).logits
    model.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(model(input_ids=tokens()).logits, wanted)


def test_torchs_distributed_checkpoints_find_every_entry():
    model = trained(dense_model(), steps=1)
    state = get_model_state_dict(model)
    assert sum(name.endswith("meft_rows.default") for name in state) == 2


def test_a_layer_that_was_copied_without_its_rows_says_what_can_be_done():
    model = peft.get_peft_model(dense_model(), MeftConfig(r=64, num_active_key_experts=4, top_k=8))
    holders = layers(model)[0].meft_gradients
    holders["default"] = nn.Parameter(torch.empty(0))  # as DataParallel leaves it
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp: .*DataParallel.*\nShow it one"):
        model(input_ids=tokens())


def test_a_model_with_rows_in_stores_cannot_be_copied_and_says_what_can_be_done():
    model = trained(dense_model(), steps=1)
    with pytest.raises(RowStoreError, match="save_pretrained"):
        copy.deepcopy(model)


def test_loading_with_low_cpu_mem_usage_is_refused_by_name(tmp_path):
    trained(dense_model(), steps=1).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="low_cpu_mem_usage"):
        peft.PeftModel.from_pretrained(dense_model(), tmp_path, low_cpu_mem_usage=True)


def test_layers_that_are_computed_again_have_the_disk_read_what_comes_next(monkeypatch):
    """On the way back that is the layer before, not the one after."""
    model = peft.get_peft_model(dense_model(), MeftConfig(r=64, num_active_key_experts=4, top_k=8)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    asked: list[tuple[str, str]] = []
    plain = RowStore.blocks

    def blocks(store, block_ids, device, *, keep, phase="forward"):
        asked.append((store.name.split(".")[2], phase))
        return plain(store, block_ids, device, keep=keep, phase=phase)

    monkeypatch.setattr(RowStore, "blocks", blocks)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    back = [("1", "backward")] * 2 + [("0", "backward")] * 2
    assert asked == [("0", "forward"), ("1", "forward"), *back]


def test_transformers_own_loader_has_the_rows_too(tmp_path):
    model = trained(dense_model())
    wanted = model(input_ids=tokens()).logits
    model.save_pretrained(tmp_path)
    bare = dense_model()
    bare.load_adapter(str(tmp_path))
    torch.testing.assert_close(bare.eval()(input_ids=tokens()).logits, wanted, rtol=0, atol=1e-6)
