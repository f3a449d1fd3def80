"""Mixtures of LoRA experts in tiny dense models: against whole weights, routed, selected, saved, and what is refused."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PhiConfig,
    Qwen3Config,
)

from metier.errors import (
    BaseMismatchError,
    ConfigError,
    CorruptDeltaError,
    DeltaError,
    SelectionError,
    UnsupportedModelError,
)
from metier.methods.mixlora import MixLoraConfig, MixLoraLayer
from metier.methods.mixlora.layer import balance_loss
from metier.models.fingerprint import mark_skeleton
from tiny_models import tiny_model

_spec = importlib.util.spec_from_file_location("mixlora_reference", Path(__file__).with_name("reference.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

DENSE = {
    "llama": LlamaConfig, "qwen3": Qwen3Config, "gemma": GemmaConfig, "phi": PhiConfig, "phi3": Phi3Config,
    "gpt2": GPT2Config,
}  # fmt: skip
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""float32, sums in another order."""


OF_THE_LARGEST = 2e-5
"""The same for gradients of upstream values near 1, whose small entries are differences of large ones; with `top_k=1`
a router's are 0."""


def dense_model(kind: str = "llama", *, dtype: torch.dtype = torch.float32, **changes):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "hidden_size": 32}
    if kind != "gpt2":
        sizes |= {"intermediate_size": 48, "num_key_value_heads": 2}
    if kind in ("llama", "qwen3", "gemma"):
        sizes["head_dim"] = 8
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    config = DENSE[kind](**sizes, **no_dropout, **changes)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def config(**changes) -> MixLoraConfig:
    return MixLoraConfig(**{"num_experts": 4, "top_k": 2, "r": 3, **changes})


def tokens(seed: int = 0, num_rows: int = 2, length: int = 11):
    return torch.randint(3, 64, (num_rows, length), generator=torch.Generator().manual_seed(seed))


def shaken(model: nn.Module, seed: int = 1) -> nn.Module:
    """With values of an adapter that do something, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mixlora_" in name:
                std = 0.5 if "router" in name else 0.1
                parameter.add_(std * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def mixed(kind: str = "llama", **changes):
    torch.manual_seed(0)
    return shaken(peft.get_peft_model(dense_model(kind), config(**changes))).eval()


def layers(model) -> list[MixLoraLayer]:
    return [module for module in model.modules() if isinstance(module, MixLoraLayer)]


def adapter_parameters(model):
    return {name: p for name, p in model.named_parameters() if "mixlora_" in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", DENSE)
def test_a_new_mixture_changes_no_bit(kind, dtype):
    model = dense_model(kind, dtype=dtype)
    batches = [tokens(length=length) for length in (1, 7, 11)]
    logits = [model(batch).logits for batch in batches]
    wrapped = peft.get_peft_model(model, config())
    assert len(layers(wrapped)) == 2
    assert {p.dtype for p in adapter_parameters(wrapped).values()} == {torch.float32}
    assert all(torch.equal(wrapped(batch).logits, wanted) for batch, wanted in zip(batches, logits, strict=True))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_trains_balances_and_leaves_the_base_alone(kind):
    model = dense_model(kind)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    logits = model(tokens()).logits
    wrapped = peft.get_peft_model(model, config(router_aux_loss_coef=0.5)).train()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    assert len(trained) == len(adapter_parameters(wrapped))
    first = {name: parameter.clone() for name, parameter in adapter_parameters(wrapped).items()}
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1), []
    for _ in range(8):
        losses.append(wrapped(input_ids=tokens(), labels=tokens()).loss)
        (losses[-1] + wrapped.base_model.auxiliary_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    assert all(not torch.equal(p, first[name]) for name, p in adapter_parameters(wrapped).items())
    base = {n.replace("base_layer.", ""): p for n, p in wrapped.get_base_model().named_parameters()}
    assert all(torch.equal(base[name], tensor) for name, tensor in before.items())
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(tokens()).logits, logits)
    assert torch.equal(wrapped.unload()(tokens()).logits, logits)


@pytest.mark.parametrize(
    ("kind", "num_tokens", "top_k"),
    [("llama", 1, 2), ("llama", 63, 1), ("llama", 63, 2), ("llama", 63, 4), ("gemma", 1, 4), ("gemma", 63, 2)]
    + [(kind, 63, 2) for kind in ("phi", "phi3", "gpt2")],
)
def test_a_block_is_its_tokens_through_whole_changed_weights(kind, num_tokens, top_k):
    layer = layers(mixed(kind, top_k=top_k))[1]
    hidden_TD = torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    upstream_TD = torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(1))
    found = []
    for run in (layer, lambda x: reference.mixed(layer, "default", x)):
        out_TD = run(hidden_TD)
        inputs = [hidden_TD, *adapter_parameters(layer).values()]
        found.append((out_TD, *torch.autograd.grad(out_TD, inputs, upstream_TD, materialize_grads=True)))
    for name, one, other in zip(("out", "hidden", *adapter_parameters(layer)), *found, strict=True):
        assert (one - other).abs().max() <= OF_THE_LARGEST * max(1, other.abs().max()), name


def test_an_expert_without_tokens_and_one_with_all():
    layer = layers(mixed(top_k=1))[0]
    with torch.no_grad():
        layer.mixlora_router["default"].zero_()
    out_TD = layer(torch.randn(5, 32))
    out_TD.sum().backward()
    grads = [pairs.down_a.grad.abs().max().item() for pairs in layer.mixlora_mixture["default"].pairs]
    assert sorted(grad > 0 for grad in grads) == [False, False, False, True]


def test_one_product_of_each_base_projection_for_each_token():
    wrapped, rows = mixed(), {"gate_proj": 0, "up_proj": 0, "down_proj": 0}
    for name in rows:
        projection = layers(wrapped)[0].base_layer.get_submodule(name)
        projection.register_forward_hook(
            lambda _, args, __, name=name: rows.__setitem__(name, rows[name] + args[0].numel() // args[0].shape[-1])
        )
    wrapped(tokens())
    assert rows == {"gate_proj": 22, "up_proj": 22, "down_proj": 22}


def test_autograd_keeps_no_row_of_a_pair():
    layer, shapes = layers(mixed(num_experts=4, top_k=4))[0], []
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(10, 32))
    assert shapes
    assert max(shape[0] for shape in shapes) == 10


def test_padding_and_neighbours_change_no_answer():
    wrapped, batch = mixed(), tokens()
    alone = wrapped(batch[1:, :6]).logits[0]
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[1, 6:] = 0
    torch.testing.assert_close(wrapped(batch, attention_mask=mask).logits[1, :6], alone, **CLOSE)
    row = torch.cat([batch[:1, :5], batch[1:, :6]], dim=1)
    positions = torch.tensor([[*range(5), *range(6)]])
    packed = wrapped(input_ids=row, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[0, 5:], alone, **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generation_with_a_cache_is_generation_without(kind):
    wrapped = mixed(kind)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    with_cache = wrapped.generate(input_ids=tokens(length=5), **options, use_cache=True)
    assert torch.equal(with_cache, wrapped.generate(input_ids=tokens(length=5), **options, use_cache=False))


def test_gradient_checkpointing_keeps_no_graph_of_its_second_forward_pass():
    wrapped = mixed(router_aux_loss_coef=0.5).train()
    wrapped.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped.enable_input_require_grads()
    loss = wrapped(input_ids=tokens(), labels=tokens()).loss
    kept = [layer.balance["default"].value for layer in layers(wrapped)]
    (loss + wrapped.base_model.auxiliary_loss()).backward()
    assert all(layer.balance["default"].value is of for layer, of in zip(layers(wrapped), kept, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    found = []
    for checkpointing in (False, True):
        wrapped = mixed(router_aux_loss_coef=0.0 if use_reentrant else 0.5).train()
        if checkpointing:
            wrapped.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            wrapped.enable_input_require_grads()
        loss = wrapped(input_ids=tokens(), labels=tokens()).loss
        (loss + wrapped.base_model.auxiliary_loss()).backward()
        found.append([p.grad for p in adapter_parameters(wrapped).values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_base_in_bfloat16_computes_in_its_own_dtype_and_trains_float32_masters():
    wrapped = shaken(peft.get_peft_model(dense_model(dtype=torch.bfloat16), config()))
    out = wrapped(input_ids=tokens(), labels=tokens())
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert {p.grad.dtype for p in adapter_parameters(wrapped).values()} == {torch.float32}


def test_under_autocast_the_gradients_are_nearly_those_of_float32():
    found = []
    for enabled in (False, True):
        wrapped = mixed()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = wrapped(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for n, p in adapter_parameters(wrapped).items() if "down_b" in n]))
    # bfloat16 has 8 bits, and a token near a tie may get another expert
    assert nn.functional.cosine_similarity(*found, dim=0) > 0.95


def test_balance_is_1_where_experts_are_even_and_e_where_one_has_all():
    even_TE = torch.full((8, 4), 0.25)
    ids_TK = torch.tensor([[0, 1], [2, 3]]).repeat(4, 1)
    assert balance_loss(even_TE, ids_TK) == pytest.approx(1)
    one_TE = torch.tensor([[1.0, 0, 0, 0]]).repeat(8, 1)
    assert balance_loss(one_TE, torch.zeros(8, 1, dtype=torch.int64)) == pytest.approx(4)


def test_the_auxiliary_loss_is_the_mean_over_layers_by_the_formula():
    wrapped, seen = mixed(router_aux_loss_coef=0.5).train(), []
    for layer in layers(wrapped):
        layer.register_forward_pre_hook(lambda layer, args: seen.append((layer, args[0].flatten(0, 1))))
    wrapped(input_ids=tokens(), labels=tokens())
    losses = []
    for layer, hidden_TD in seen:
        probabilities_TE = (hidden_TD @ layer.mixlora_router["default"].T).softmax(1)
        chosen = [row.argsort(descending=True)[:2].tolist() for row in probabilities_TE]
        shares = [sum(e in row for row in chosen) / (2 * len(chosen)) for e in range(4)]
        losses.append(4 * sum(share * probabilities_TE[:, e].mean() for e, share in enumerate(shares)))
    found = wrapped.base_model.auxiliary_loss()
    torch.testing.assert_close(found, 0.5 * sum(losses) / 2)
    found.backward()
    assert all(layer.mixlora_router["default"].grad.abs().max() > 0 for layer in layers(wrapped))


def test_an_auxiliary_loss_that_nobody_can_give_is_refused():
    wrapped = mixed()
    wrapped(tokens())
    with pytest.raises(ConfigError, match="through no forward pass in training mode"):
        wrapped.base_model.auxiliary_loss()
    wrapped.train().gradient_checkpointing_enable({"use_reentrant": True})
    wrapped.enable_input_require_grads()
    wrapped(tokens())
    with pytest.raises(ConfigError, match='use_reentrant": False'):
        wrapped.base_model.auxiliary_loss()


def test_it_can_be_made_on_the_meta_device():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(dense_model().config)
        mark_skeleton(model)
        wrapped = peft.get_peft_model(model, config())
    assert all(p.is_meta for p in wrapped.parameters())


def test_only_selected_experts_are_trained_and_nothing_else_moves():
    wrapped = shaken(peft.get_peft_model(dense_model(), config(experts={1: [3, 0]}))).train()
    before = {name: parameter.clone() for name, parameter in wrapped.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5)
    for _ in range(2):
        wrapped(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in wrapped.named_parameters() if not torch.equal(p, before[name])}
    prefix = "base_model.model.model.layers.1.mlp.mixlora_mixture.default.pairs"
    matrices = ("up_a", "up_b", "down_a", "down_b")
    assert moved == {f"{prefix}.{expert}.{matrix}" for expert in (0, 3) for matrix in matrices}


@pytest.mark.parametrize("switch", ["enable", "set", "train", "load"])
def test_a_selection_holds_whatever_peft_switches(switch, tmp_path):
    wrapped = mixed(experts={0: [2]})
    if switch == "enable":
        with wrapped.disable_adapter():
            pass
    elif switch == "set":
        wrapped.add_adapter("second", config())
        wrapped.set_adapter("second")
        wrapped.set_adapter("default")
    elif switch == "train":
        wrapped.set_requires_grad("default", True)
    else:
        wrapped.save_pretrained(tmp_path)
        wrapped = peft.PeftModel.from_pretrained(dense_model(), tmp_path, is_trainable=True)
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert len(trained) == 4
    assert all(".layers.0.mlp.mixlora_mixture.default.pairs.2." in name for name in trained)


_FRESH = """
import sys, torch, metier, peft
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = peft.PeftModel.from_pretrained(base, sys.argv[2]).eval()
torch.save(model(torch.load(sys.argv[3])).logits.detach(), sys.argv[4])
"""


def test_a_saved_mixture_gives_the_same_logits_in_a_fresh_process(tmp_path):
    model = dense_model()
    model.save_pretrained(tmp_path / "base")
    wrapped = shaken(peft.get_peft_model(model, config())).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    torch.save(tokens(), tmp_path / "tokens")
    arguments = [str(tmp_path / name) for name in ("base", "adapter", "tokens", "logits")]
    subprocess.run([sys.executable, "-c", _FRESH, *arguments], check=True)
    assert torch.equal(torch.load(tmp_path / "logits"), wrapped(tokens()).logits)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_restores_every_bit(low_cpu_mem_usage, tmp_path):
    wrapped = mixed("phi", experts={1: [0]})
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(dense_model("phi"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(again(tokens()).logits, wrapped(tokens()).logits)
    assert again.peft_config["default"].experts == {1: [0]}
    assert not any("default" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    again.load_adapter(str(tmp_path), "second")
    again.set_adapter("second")
    assert torch.equal(again(tokens()).logits, wrapped(tokens()).logits)


@pytest.mark.parametrize("breakage", ["missing", "foreign", "shape"])
def test_a_file_that_does_not_fit_is_refused_before_anything_is_loaded(breakage, tmp_path):
    mixed().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    name = "base_model.model.model.layers.1.mlp.mixlora_mixture.pairs.2.up_a"
    if breakage == "missing":
        del state["base_model.model.model.layers.0.mlp.mixlora_router"]
    elif breakage == "foreign":
        state[name.replace("pairs.2", "pairs.7")] = state[name].clone()
    else:
        state[name] = state[name][:, :-1].contiguous()
    save_file(state, path)
    fresh = mixed()
    before = fresh(tokens()).logits
    with pytest.raises(CorruptDeltaError, match="nothing was loaded"):
        fresh.load_adapter(str(tmp_path), "default")
    assert torch.equal(fresh(tokens()).logits, before)


def test_another_base_is_refused(tmp_path):
    mixed().save_pretrained(tmp_path)
    other = dense_model()
    other.model.norm.weight.data.mul_(2)
    with pytest.raises(BaseMismatchError, match="Load the base that it was trained on"):
        peft.PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_by_name(verb):
    with pytest.raises(DeltaError, match="no one set of weights"):
        getattr(mixed(), verb)()


def test_two_adapters_switched_summed_and_deleted():
    wrapped = mixed()
    first = wrapped(tokens()).logits
    wrapped.add_adapter("second", config(num_experts=3, top_k=1, r=2))
    assert torch.equal(wrapped(tokens()).logits, first)
    wrapped.base_model.set_adapter(["default", "second"])
    assert torch.equal(wrapped(tokens()).logits, first)  # what is new adds nothing
    shaken(wrapped, seed=2)
    layer, hidden_TD = layers(wrapped)[0], torch.randn(5, 32)
    ones = [reference.mixed(layer, name, hidden_TD) for name in ("default", "second")]
    torch.testing.assert_close(layer(hidden_TD), sum(ones) - layer.base_layer(hidden_TD), **CLOSE)
    wrapped.set_adapter("default")
    kept = wrapped(tokens()).logits
    wrapped.delete_adapter("second")
    assert torch.equal(wrapped(tokens()).logits, kept)
    assert not any("second" in name for name in adapter_parameters(wrapped))


def test_a_copied_model_is_a_model_of_its_own_even_after_a_step():
    wrapped = mixed().train()
    wrapped(input_ids=tokens(), labels=tokens()).loss.backward()
    copied = copy.deepcopy(wrapped).eval()
    assert all(layer.balance["default"].value is None for layer in layers(copied))
    shaken(wrapped, seed=5)
    assert torch.equal(copied(tokens()).logits, mixed()(tokens()).logits)


def test_a_lora_on_the_same_projections_is_seen():
    model = dense_model()
    wrapped = shaken(peft.get_peft_model(model, config())).eval()
    before = wrapped(tokens()).logits
    with torch.no_grad():  # whatever stands at the projections, or has been done to them, is called
        layers(wrapped)[0].base_layer.up_proj = nn.Linear(32, 48, bias=False)
    assert not torch.equal(wrapped(tokens()).logits, before)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_an_moe_model_is_refused(family):
    with pytest.raises(UnsupportedModelError, match=r"(?s)mixtures of experts already.*expert_lora"):
        peft.get_peft_model(tiny_model(family), config())


def test_a_block_of_another_make_is_refused_before_anything_is_replaced():
    model = dense_model()
    model.model.layers[1].mlp.forward = lambda hidden: hidden
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp: LlamaMLP computes something else than"):
        peft.get_peft_model(model, config())
    assert not layers(model)
    del model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.down_proj
    with pytest.raises(UnsupportedModelError, match="expected the projections and the activation"):
        peft.get_peft_model(model, config())


def test_a_block_with_dropout_is_refused():
    model = dense_model("gpt2")
    model.transformer.h[1].mlp.dropout.p = 0.1
    with pytest.raises(UnsupportedModelError, match=r"GPT2MLP has dropout=0\.1"):
        peft.get_peft_model(model, config())


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({7: [0]}, r"layers\.7: .* its mixtures are in layers \[0, 1\]"),
        ({0: [4]}, r"num_experts=4 \(ids 0 to 3\)"),
        ({0: []}, "with at least one expert"),
        ({0: [1, 1]}, "names an expert twice"),
    ],
)
def test_a_selection_that_names_what_is_not_there_is_refused(experts, message):
    model = dense_model()
    with pytest.raises(SelectionError, match=message):
        peft.get_peft_model(model, config(experts=experts))
    assert not layers(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts must be a whole number of at least 1, got 0"),
        ({"top_k": 9}, "top_k=9 is more than num_experts=8"),
        ({"r": 0}, "r must be a whole number"),
        ({"lora_alpha": 0.0}, "lora_alpha must be greater than 0"),
        ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef must be at least 0"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        MixLoraConfig(**options)
