"""Models whose large weights live in a store: the same numbers, the same training, fewer bytes in memory."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import random
import subprocess
import sys
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import metier
from metier.data.message import Message, Record
from metier.errors import ConfigError, ModelError, RowStoreError, UnsupportedModelError
from metier.memory import frozen_store
from metier.memory.disk_cache import DiskCache
from metier.memory.frozen_model import frozen_weights, load_frozen
from metier.memory.frozen_store import FrozenStore
from metier.memory.frozen_weight import FrozenWeight
from metier.memory.row_adamw import RowAdamW
from metier.methods.esft import EsftConfig
from metier.methods.expert_lora import ExpertLoraConfig
from metier.methods.meft import MeftConfig
from metier.models.unwrap import base_path
from metier.models.weight_by_weight import from_pretrained_by_weight
from tiny_models import VOCAB_SIZE, tiny_model, tiny_tokenizer

TIERS = ("device", "host", "disk")


def _saved(family: str, folder: Path, **changes: object) -> Path:
    tiny_model(family, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _tokens(step: int = 0) -> torch.Tensor:
    return torch.randint(6, VOCAB_SIZE, (2, 17), generator=torch.Generator().manual_seed(step))


def _losses(model: nn.Module, num_steps: int = 3) -> list[float]:
    """Of some steps of training; the last one says what the others did."""
    optimizer = RowAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(num_steps):
        loss = model(input_ids=_tokens(step), labels=_tokens(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_weight_of_another_shape_than_the_models_is_told_by_name(tmp_path):
    base = _saved("llama", tmp_path / "base")
    tensors, name = load_file(base / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"base: model\.layers\.1\.mlp\.up_proj\.weight has shape .* in the checkpoint"
    ):
        load_frozen(base)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_transformers_keeps_in_float32_stays_a_parameter_in_it(dtype, tmp_path, monkeypatch):
    base = _saved("llama", tmp_path / "base")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["self_attn.o_proj"])
    plain, stored = metier.load(base, dtype=dtype).model, load_frozen(base, dtype=dtype).model
    for model in (plain, stored):
        weight = model.model.layers[0].self_attn.o_proj.weight
        assert weight.dtype == torch.float32
        assert not isinstance(weight, FrozenWeight)
    assert isinstance(stored.model.layers[0].self_attn.q_proj.weight, FrozenWeight)


def test_what_wants_an_array_of_a_weight_in_a_store_gets_a_copy(tmp_path):
    base = _saved("llama", tmp_path / "base")
    weight = load_frozen(base).model.model.layers[0].mlp.up_proj.weight
    weight.detach().numpy()[:] = 0
    assert torch.equal(weight.detach().numbers(), metier.load(base).model.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss", "qwen3_moe", "nemotron_h", "llama"])
def test_logits_are_those_of_the_model_in_memory_to_the_bit(family, tier, tmp_path):
    base = _saved(family, tmp_path / "base")
    with torch.no_grad():
        want = metier.load(base).model(_tokens()).logits
        loaded = load_frozen(base, store=tier, folder=tmp_path / "weights")
        got = loaded.model(_tokens()).logits
    assert torch.equal(got, want)
    assert {weight.store.tier for weight in frozen_weights(loaded.model)} == {tier}
    assert list((tmp_path / "weights").iterdir()) == []


@pytest.mark.parametrize("family", ["deepseek_v2", "llama"])
def test_generation_in_inference_mode_writes_the_same(family, tmp_path):
    base = _saved(family, tmp_path / "base")
    texts = []
    for loaded in (metier.load(base), load_frozen(base, store="disk")):
        with torch.inference_mode():
            texts.append(loaded.model.generate(_tokens(), max_new_tokens=8, do_sample=False))
    assert torch.equal(*texts)


ADAPTERS = {
    "esft": lambda: EsftConfig(experts={1: [0, 2]}),
    "expert_lora": lambda: ExpertLoraConfig(experts={1: [0, 2]}, r=2),
    "meft": lambda: MeftConfig(r=64, num_key_experts=8, num_active_key_experts=4, top_k=8),
    "lora": lambda: peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False),
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss"])
def test_an_adapter_on_it_answers_the_same_in_inference_mode(family, kind, tmp_path):
    base, answers = _saved(family, tmp_path / "base"), []
    for loaded in (metier.load(base), load_frozen(base, store="host")):
        torch.manual_seed(0)
        model = peft.get_peft_model(loaded.model, ADAPTERS[kind]())
        _losses(model, 2)
        model.eval()
        with torch.inference_mode():
            answers.append(model(_tokens()).logits)
            answers.append(model.generate(input_ids=_tokens(), max_new_tokens=4, do_sample=False))
    assert torch.equal(answers[0], answers[2])
    assert torch.equal(answers[1], answers[3])


def test_linear_layers_and_experts_are_in_the_store_and_nothing_else(tmp_path):
    model = load_frozen(_saved("deepseek_v2", tmp_path / "base")).model
    names = {name.rpartition("layers.")[2] for name, p in model.named_parameters() if isinstance(p, FrozenWeight)}
    assert "1.mlp.experts.gate_up_proj" in names
    assert "1.mlp.shared_experts.up_proj.weight" in names
    assert "0.mlp.down_proj.weight" in names
    assert "0.self_attn.o_proj.weight" in names
    others = {name for name, p in model.named_parameters() if not isinstance(p, FrozenWeight)}
    assert all("norm" in name or "mlp.gate." in name or "embed" in name or "lm_head" in name for name in others), others
    assert len(others) < len(names)
    # trainers refuse models that are spread over devices
    assert not hasattr(model, "hf_device_map")
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="of Linux alone")
def test_no_file_of_the_checkpoint_is_held(tmp_path):
    loaded = load_frozen(_saved("deepseek_v2", tmp_path / "base"), store="disk")
    mapped = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "base") not in mapped
    assert loaded.model.get_parameter("model.norm.weight").isfinite().all()


def test_experts_biases_stay_in_memory(tmp_path):
    model = load_frozen(_saved("gpt_oss", tmp_path / "base")).model
    experts = model.get_submodule("model.layers.0.mlp.experts")
    assert isinstance(experts.gate_up_proj, FrozenWeight)
    assert not isinstance(experts.gate_up_proj_bias, FrozenWeight)
    assert not isinstance(model.get_submodule("model.layers.0.self_attn.q_proj").bias, FrozenWeight)


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("deepseek_v2", EsftConfig(experts={1: [0, 5], 2: [3]})),
        ("deepseek_v2", EsftConfig(experts={2: [3, 4]})),
        ("deepseek_v2", EsftConfig(experts={1: [0]}, also_train=("attention", "shared_experts", "router", "norms"))),
        ("deepseek_v2", ExpertLoraConfig(experts={1: [0, 5], 2: [3]}, r=4)),
        ("gpt_oss", EsftConfig(experts={0: [1], 2: [0, 3]})),
        ("llama", peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4)),
        ("llama", MeftConfig(r=64)),
    ],
)
def test_training_has_the_same_losses_to_the_bit(family, config, tier, tmp_path):
    base = _saved(family, tmp_path / "base")
    losses, rows = [], []
    for loaded in (metier.load(base), load_frozen(base, store=tier)):
        torch.manual_seed(0)
        model = peft.get_peft_model(loaded.model, copy.deepcopy(config)).train()
        losses.append(_losses(model))
        rows.append([p.detach() for p in model.parameters() if p.requires_grad])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][-1]
    assert all(torch.equal(one, other) for one, other in zip(*rows, strict=True))


def test_a_tuned_layer_reads_the_experts_that_have_tokens_alone(tmp_path, monkeypatch):
    read: set[int] = set()
    want = FrozenStore._want

    def spy(self, indices):
        if "layers.1.mlp.experts." in self.name:
            read.update(indices)
        want(self, indices)

    model = peft.get_peft_model(
        load_frozen(_saved("deepseek_v2", tmp_path / "base")).model, EsftConfig(experts={1: [0]})
    )
    monkeypatch.setattr(FrozenStore, "_want", spy)
    model(input_ids=_tokens()[:1, :1]).logits.sum().backward()
    assert 2 <= len(read) <= 3  # the router picks three of eight, and one may be the adapter's


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_reads_again(use_reentrant, tmp_path):
    base = _saved("deepseek_v2", tmp_path / "base")
    losses = []
    for loaded in (metier.load(base), load_frozen(base, store="disk")):
        model = peft.get_peft_model(loaded.model, EsftConfig(experts={1: [0, 5], 2: [3]})).train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        losses.append(_losses(model))
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("format_name", "distance"), [("int8", 0.02), ("nf4", 0.25)])
def test_fewer_bits_give_about_the_same_logits(format_name, distance, tmp_path):
    if format_name == "nf4":
        pytest.importorskip("bitsandbytes")
    base = _saved("deepseek_v2", tmp_path / "base")
    with torch.no_grad():
        want = metier.load(base).model(_tokens()).logits
        model = load_frozen(base, weight_format=format_name).model
        got = model(_tokens()).logits
    difference = (got - want).norm() / want.norm()
    assert 0 < difference < distance


@pytest.mark.parametrize("format_name", ["int8", "nf4"])
def test_training_on_fewer_bits_trains_on_what_they_stand_for(format_name, tmp_path):
    if format_name == "nf4":
        pytest.importorskip("bitsandbytes")
    base = _saved("deepseek_v2", tmp_path / "base")
    quantised = load_frozen(base, weight_format=format_name).model
    plain = metier.load(base).model
    for name, parameter in quantised.named_parameters():
        if isinstance(parameter, FrozenWeight):
            plain.get_parameter(name).data.copy_(parameter.detach().numbers())
    losses = [
        _losses(peft.get_peft_model(model, EsftConfig(experts={1: [0, 5], 2: [3]})).train())
        for model in (plain, quantised)
    ]
    assert losses[0] == losses[1]


def test_int8_takes_a_quarter_of_float32(tmp_path):
    base = _saved("llama", tmp_path / "base", hidden_size=64, intermediate_size=256)
    stores = [
        [weight.store for weight in frozen_weights(load_frozen(base, weight_format=f).model)] for f in (None, "int8")
    ]
    plain, int8 = (sum(store.num_bytes for store in some) for some in stores)
    assert 0.25 < int8 / plain < 0.3


def test_a_run_in_a_store_gives_the_delta_that_one_in_memory_gives(tmp_path):
    base = _saved("deepseek_v2", tmp_path / "base")
    model = peft.get_peft_model(load_frozen(base, store="disk").model, EsftConfig(experts={1: [0, 5]}))
    _losses(model.train())
    model.save_pretrained(tmp_path / "delta")
    on_memory = peft.PeftModel.from_pretrained(metier.load(base).model, tmp_path / "delta").eval()
    on_disk = peft.PeftModel.from_pretrained(load_frozen(base, store="disk").model, tmp_path / "delta").eval()
    with torch.no_grad():
        want, got = on_memory(_tokens()).logits, on_disk(_tokens()).logits
        base_logits = metier.load(base).model(_tokens()).logits
    assert torch.equal(got, want)
    assert not torch.equal(want, base_logits)


def test_merging_into_weights_in_a_store_is_refused(tmp_path):
    base = _saved("deepseek_v2", tmp_path / "base")
    model = peft.get_peft_model(load_frozen(base).model, EsftConfig(experts={1: [0, 5]}))
    with pytest.raises(ModelError, match="is frozen in a store"):
        model.merge_and_unload()


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=2),
        peft.LoraConfig(r=2, use_dora=True),
        peft.IA3Config(feedforward_modules=["up_proj"]),
        peft.LoHaConfig(r=2),
        peft.LoKrConfig(r=2),
        peft.OFTConfig(oft_block_size=4),
        peft.BOFTConfig(boft_block_size=4),
        peft.HRAConfig(r=2),
        peft.MissConfig(r=2),
        peft.VeraConfig(r=2),
        peft.FourierFTConfig(n_frequency=5),
        peft.ShiraConfig(r=2),
    ],
    ids=lambda config: config.peft_type.value + "_DORA" * getattr(config, "use_dora", False),
)
def test_no_peft_method_merges_into_weights_in_a_store(config, safe, tmp_path):
    config = copy.deepcopy(config)
    config.target_modules = {"q_proj", "up_proj"}
    model = peft.get_peft_model(load_frozen(_saved("llama", tmp_path / "base")).model, config).eval()
    with pytest.raises(ModelError, match="is frozen in a store"):
        model.merge_and_unload(safe_merge=safe)


def test_an_adapter_that_changes_the_base_at_its_start_is_refused(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    with pytest.raises(ModelError, match=r"q_proj\.weight: is frozen in a store \(host\) and cannot be written"):
        peft.get_peft_model(load_frozen(_saved("llama", tmp_path / "base")).model, config)


def test_a_model_in_a_store_cannot_be_saved_whole_and_says_so(tmp_path):
    model = load_frozen(_saved("llama", tmp_path / "base"), store="disk").model
    with pytest.raises(ModelError, match=r"save the adapter alone and merge it into the model's files: metier merge"):
        model.save_pretrained(tmp_path / "copy")


def test_a_pickled_model_is_an_ordinary_one(tmp_path):
    model = load_frozen(_saved("deepseek_v2", tmp_path / "base"), store="disk").model
    loaded = pickle.loads(pickle.dumps(model))
    assert frozen_weights(loaded) == []
    with torch.no_grad():
        assert torch.equal(loaded(_tokens()).logits, model(_tokens()).logits)


def test_a_profile_is_the_one_of_the_model_in_memory(tmp_path):
    base = _saved("deepseek_v2", tmp_path / "base")
    profiles = []
    for loaded in (metier.load(base), load_frozen(base, store="disk")):
        question = Message(role="user", content="What?")
        messages = [(question, Message(role="assistant", content=f"It is {number}.")) for number in range(9)]
        records = [Record(messages=both, origin="test") for both in messages]
        profiles.append(metier.profile(loaded.model, loaded.tokenizer, records, num_tokens=64))
    assert torch.equal(profiles[0].scores_LE("token"), profiles[1].scores_LE("token"))


def test_the_same_paths_whether_in_memory_or_in_a_store(tmp_path):
    base = _saved("qwen3_moe", tmp_path / "base")
    plain, stored = metier.load(base).model, load_frozen(base).model
    assert [base_path(n) for n, _ in plain.named_parameters()] == [base_path(n) for n, _ in stored.named_parameters()]
    assert [tuple(p.shape) for p in plain.parameters()] == [tuple(p.shape) for p in stored.parameters()]


def test_a_family_that_is_stacked_after_loading_is_refused(tmp_path):
    base = _saved("llama4_text", tmp_path / "base")
    with pytest.raises(UnsupportedModelError, match="cannot be loaded weight by weight"):
        load_frozen(base)


def test_a_family_with_another_kind_of_linear_layer_goes_into_a_store(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).eval().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model = load_frozen(tmp_path / "base", store="disk").model
    assert len(frozen_weights(model)) == 2 * 4
    with torch.no_grad():
        assert torch.equal(model(_tokens()).logits, metier.load(tmp_path / "base").model(_tokens()).logits)


def test_a_model_without_such_layers_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("metier.models.weight_by_weight.large_modules", lambda model: {})
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no linear layers or experts inside numbered"):
        load_frozen(_saved("llama", tmp_path / "base"))


def test_code_beside_the_weights_is_that_of_the_revision(monkeypatch):
    asked = {}

    class Network:
        @staticmethod
        def from_config(config, **options):
            asked.update(options)
            raise UnsupportedModelError("seen")

    def code_revision(auto_map: dict[str, str], **options: object) -> object:
        asked.clear()
        config = transformers.LlamaConfig(auto_map=auto_map)
        with pytest.raises(UnsupportedModelError, match="seen"):
            from_pretrained_by_weight(Network, "org/model", config, None, **options)
        return asked.get("code_revision")

    own, others = {"Network": "modeling.Model"}, {"Network": "org/code--modeling.Model"}
    assert code_revision(own, trust_remote_code=True, revision="abc") == "abc"
    assert code_revision(own, trust_remote_code=True) is None
    assert code_revision(own, trust_remote_code=False, revision="abc") is None
    assert code_revision(others, trust_remote_code=True, revision="abc") is None


def test_memory_is_free_again_as_soon_as_nobody_has_the_model(tmp_path):
    gc.collect()
    gc.disable()
    try:
        model = load_frozen(_saved("deepseek_v2", tmp_path / "base"), store="disk").model
        model(_tokens())
        stores = [weakref.ref(weight.store) for weight in frozen_weights(model)]
        del model
        assert [store() for store in stores] == [None] * len(stores)
    finally:
        gc.enable()


def test_several_threads_may_use_one_model_on_disk(tmp_path, monkeypatch):
    cache = DiskCache(most_bytes=1 << 16)
    monkeypatch.setattr(frozen_store, "disk_cache", lambda: cache)
    monkeypatch.setattr("metier.memory.disk_cache.BATCH_BYTES", 0)
    model = load_frozen(_saved("deepseek_v2", tmp_path / "base", hidden_size=64), store="disk").model
    weights = frozen_weights(model)
    want = [weight.detach().numbers().clone() for weight in weights]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            places = [random.Random(thread).randrange(len(weights)) for thread in range(2000)]
            same = pool.map(lambda place: torch.equal(weights[place].detach().numbers(), want[place]), places)
            assert all(same)
    finally:
        sys.setswitchinterval(interval)
    assert cache.num_bytes == sum(len(file.last_call) * file.piece_bytes for file in cache._files)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="of Unix alone")
def test_a_forked_process_reads_from_the_disk_too(tmp_path):
    # in a process of its own: one whose OpenMP has threads cannot compute after a fork, whatever the model
    program = f"""
import os, signal, sys, torch
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
torch.set_num_threads(1)
from metier.memory.disk_cache import disk_cache
from metier.memory.frozen_model import frozen_weights, load_frozen
model = load_frozen({str(_saved("llama", tmp_path / "base", hidden_size=64))!r}, store="disk").model
tokens = torch.arange(6, 40)[None]
with torch.no_grad():
    want = model(tokens).logits
    for weight in frozen_weights(model):
        if weight.store._file is not None:
            disk_cache().forget(weight.store._file, 0)
            weight.store._file.last_call.clear()
    child = os.fork()
    if not child:
        signal.alarm(60)
        os._exit(0 if torch.equal(model(tokens).logits, want) else 1)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_folder_in_memory_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr("metier.memory.scratch_folder.is_in_memory", lambda folder: True)
    base = _saved("llama", tmp_path / "base")
    with pytest.warns(UserWarning, match=r"is kept in memory.* Name a folder on a disk: base_folder"):
        load_frozen(base, store="disk", folder=tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is kept in memory")
        load_frozen(base, store="host", folder=tmp_path)


def test_a_disk_that_fills_while_weights_are_converted_is_told(tmp_path, monkeypatch):
    def full(*args: object, **options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    base = _saved("deepseek_v2", tmp_path / "base")
    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.from_pretrained", full)
    with pytest.raises(
        RowStoreError, match=r"(?s)cannot hold the weights that are converted .*name a folder on another"
    ):
        load_frozen(base, folder=tmp_path / "weights")
    assert list((tmp_path / "weights").iterdir()) == []


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    base = _saved("llama", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the model's tensors, such as 'model\.layers\.1\.mlp\.up_proj"):
        load_frozen(base, store="disk", folder=tmp_path / "weights")
    assert list((tmp_path / "weights").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store": "tape"}, "store: got 'tape', expected one of device, host, disk"),
        ({"weight_format": "int3"}, "weight_format: got 'int3', expected one of int8, nf4, or none"),
    ],
)
def test_unknown_names_are_refused_before_anything_is_loaded(options, message):
    with pytest.raises(ConfigError, match=message):
        load_frozen("no/such/folder/at/all", **options)
