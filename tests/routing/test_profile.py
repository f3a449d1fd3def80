"""Measuring a model: the counts against what its routers say themselves, and the model left as it was."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from metier.data.message import Message, Record
from metier.errors import ConfigError, DataError, UnsupportedModelError
from metier.models.fingerprint import fingerprint
from metier.models.moe import moe_layers
from metier.routing.profile import UnreliableProfileWarning, count_sequences, profile
from tiny_models import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::metier.routing.profile.UnreliableProfileWarning")

# weights are rounded to multiples of 2^-26 before they are added
STEP = 2.0**-26


def records(number: int = 20, words: int = 8) -> list[Record]:
    return [
        Record(
            messages=(
                Message(role="user", content=f"question {i}: " + "why so? " * words),
                Message(role="assistant", content=f"answer {i * i}"),
            ),
            origin=f"made:{i}",
        )
        for i in range(number)
    ]


def sequences_NS(num_sequences: int = 5, length: int = 16) -> Tensor:
    return torch.randint(3, 260, (num_sequences, length), generator=torch.Generator().manual_seed(1))


def routed_by_the_routers(model: PreTrainedModel, ids_BS: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """What each router returns, by layer: ids_TK and weights_TK. Routers return (logits, weights, ids)."""
    seen = {}
    handles = [
        model.get_submodule(str(layer.router_path)).register_forward_hook(
            lambda module, args, output, index=layer.index: seen.__setitem__(index, (output[2], output[1]))
        )
        for layer in moe_layers(model)
    ]
    model.eval()
    with torch.no_grad():
        model(input_ids=ids_BS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe", "mixtral", "olmoe", "gpt_oss"])
def test_counts_are_what_the_routers_chose(family: str) -> None:
    model = tiny_model(family)
    ids_NS = sequences_NS()
    measured = count_sequences(model, ids_NS, batch_size=2)
    routed = routed_by_the_routers(model, ids_NS)
    assert measured.layer_ids == tuple(routed)
    assert measured.num_tokens_H == (48, 32)
    odd_T = (torch.arange(5) % 2).repeat_interleave(16).bool()
    for row, (ids_TK, weights_TK) in enumerate(routed.values()):
        for half, chosen_T in enumerate((~odd_T, odd_T)):
            for expert in range(measured.num_experts):
                mine_TK = ids_TK[chosen_T] == expert
                assert measured.token_counts_HLE[half, row, expert] == mine_TK.sum()
                mass = weights_TK[chosen_T][mine_TK].double().sum()
                # 1e-5: a batch of two and a batch of five differ in the last bits of float32
                assert measured.gate_mass_HLE[half, row, expert] == pytest.approx(mass.item(), abs=1e-5)
    slots = measured.token_counts_HLE.sum(dim=2)
    assert torch.equal(slots, torch.tensor([[48], [32]]).expand_as(slots) * measured.top_k)


def test_gates_that_are_renormalised_have_a_raw_scale_of_one() -> None:
    measured = count_sequences(tiny_model("qwen3_moe"), sequences_NS(), batch_size=4)
    torch.testing.assert_close(measured.raw_gate_scores_LE().sum(dim=1), torch.ones(3))


def test_gates_that_are_not_renormalised_have_a_smaller_raw_scale() -> None:
    plain = count_sequences(tiny_model("deepseek_v2"), sequences_NS(), batch_size=4)
    scaled = count_sequences(tiny_model("deepseek_v2", routed_scaling_factor=4.0), sequences_NS(), batch_size=4)
    assert (plain.raw_gate_scores_LE().sum(dim=1) < 0.99).all()
    # the first MoE layer sees the same input in both
    torch.testing.assert_close(scaled.raw_gate_scores_LE()[0], plain.raw_gate_scores_LE()[0] * 4)
    torch.testing.assert_close(scaled.gate_score_LE[0], plain.gate_score_LE[0])
    torch.testing.assert_close(plain.gate_score_LE.sum(dim=1), torch.ones(2))


def test_the_batch_size_does_not_change_the_counts() -> None:
    model = tiny_model("olmoe")
    one, all_at_once = (count_sequences(model, sequences_NS(), batch_size=size) for size in (1, 5))
    assert torch.equal(one.token_counts_HLE, all_at_once.token_counts_HLE)
    torch.testing.assert_close(one.gate_mass_HLE, all_at_once.gate_mass_HLE, rtol=0, atol=1e-5)


def test_a_profile_of_records_counts_full_sequences_only() -> None:
    model = tiny_model("olmoe")
    measured = profile(model, tiny_tokenizer(), records(), num_tokens=512, max_length=64, batch_size=3)
    assert measured.num_tokens_H == (256, 256)
    assert int(measured.token_counts_HLE.sum()) == 512 * 3 * measured.top_k
    assert measured.meta["sequence_length"] == "64"
    assert measured.meta["num_records"] == "20"
    assert measured.meta["model_type"] == "olmoe"
    assert measured.meta["dtype"] == "float32"
    assert measured.meta["adapter"] == "none"
    assert measured.meta["fingerprint"] == fingerprint(model)


def test_the_seed_decides_which_records_are_measured() -> None:
    model, tokenizer = tiny_model("olmoe"), tiny_tokenizer()
    first, again, other = (
        profile(model, tokenizer, records(), num_tokens=256, max_length=64, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first.token_counts_HLE, again.token_counts_HLE)
    assert torch.equal(first.gate_mass_HLE, again.gate_mass_HLE)
    assert not torch.equal(first.token_counts_HLE, other.token_counts_HLE)


def test_short_data_is_cut_into_shorter_sequences_for_two_halves() -> None:
    measured = profile(tiny_model("olmoe"), tiny_tokenizer(), records(2), max_length=1024)
    assert min(measured.num_tokens_H) > 0
    assert int(measured.meta["sequence_length"]) < 1024
    assert measured.num_tokens <= 200


def test_few_tokens_asked_for_are_two_halves_too() -> None:
    measured = profile(tiny_model("olmoe"), tiny_tokenizer(), records(), num_tokens=100, max_length=1024)
    assert measured.num_tokens_H == (50, 50)


def test_too_little_data_is_an_error() -> None:
    short = [Record(messages=(Message(role="user", content="hi"),), origin="made:0")]
    with pytest.raises(DataError, match="got 1 records, num_tokens=131072 and max_length=1024, which do not fill two"):
        profile(tiny_model("olmoe"), tiny_tokenizer(), short)


@pytest.mark.parametrize("name", ["num_tokens", "max_length", "batch_size"])
def test_a_size_below_one_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: got 0, expected at least 1"):
        profile(tiny_model("olmoe"), tiny_tokenizer(), records(), **{name: 0})


def test_an_unreliable_profile_warns() -> None:
    with pytest.warns(UnreliableProfileWarning, match=r"profile of 32 tokens: .*\n?.*Profile more tokens"):
        profile(tiny_model("olmoe"), tiny_tokenizer(), records(), num_tokens=32)


def state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, object]]:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    rest: dict[str, object] = {}
    for name, module in model.named_modules():
        hooks = {key: len(value) for key, value in vars(module).items() if "hooks" in key and value is not None}
        rest[name] = (module.training, hooks, sorted(vars(module)))
    for name, parameter in model.named_parameters():
        rest[f"{name} grad"] = (parameter.requires_grad, parameter.grad)
    return tensors, rest


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("deepseek_v2")
    model.train()
    model.model.layers[1].eval()  # so that one flag for all would show
    model.model.layers[2].mlp.gate.weight.requires_grad_(False)
    tensors, rest = state(model)
    profile(model, tiny_tokenizer(), records(), num_tokens=128, max_length=32)
    tensors_after, rest_after = state(model)
    assert rest_after == rest
    assert tensors_after.keys() == tensors.keys()
    assert all(torch.equal(tensors_after[name], tensor) for name, tensor in tensors.items())


def test_the_model_is_left_as_it_was_after_an_error_too() -> None:
    model = tiny_model("olmoe")
    model.train()
    model.model.layers[2].mlp.experts.register_forward_pre_hook(_fail)
    _, rest = state(model)
    with pytest.raises(RuntimeError, match="on purpose"):
        count_sequences(model, sequences_NS(), batch_size=2)
    assert state(model)[1] == rest


def _fail(*args: object) -> None:
    raise RuntimeError("on purpose")


def test_a_tuned_model_is_measured_through_its_wrappers() -> None:
    model = tiny_model("olmoe")
    bare = count_sequences(model, sequences_NS(), batch_size=2)
    lora = LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    wrapped = get_peft_model(model, lora)
    untrained = count_sequences(wrapped, sequences_NS(), batch_size=2)
    assert torch.equal(untrained.token_counts_HLE, bare.token_counts_HLE)
    assert untrained.meta["adapter"] == "default"
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    tuned = count_sequences(wrapped, sequences_NS(), batch_size=2)
    assert torch.equal(tuned.token_counts_HLE[:, 0], bare.token_counts_HLE[:, 0])
    assert not torch.equal(tuned.token_counts_HLE[:, 1:], bare.token_counts_HLE[:, 1:])


class _OwnForward(nn.Module):
    """Stands for a PEFT layer that computes by itself and never calls the module that it wraps."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.base_layer = experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return type(self.base_layer).forward(self.base_layer, hidden_states, top_k_index, top_k_weights)


def test_a_wrapper_that_does_not_call_what_it_wraps_is_measured_too() -> None:
    model = tiny_model("olmoe")
    bare = count_sequences(model, sequences_NS(), batch_size=2)
    for block in model.model.layers:
        block.mlp.experts = _OwnForward(block.mlp.experts)
    wrapped = count_sequences(model, sequences_NS(), batch_size=2)
    assert torch.equal(wrapped.token_counts_HLE, bare.token_counts_HLE)
    assert torch.equal(wrapped.gate_mass_HLE, bare.gate_mass_HLE)


def test_a_layer_that_is_never_called_is_an_error() -> None:
    model = tiny_model("olmoe")
    model.model.layers[1].mlp.forward = lambda hidden_states: hidden_states
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.experts: the experts received 0 tokens in a"):
        count_sequences(model, sequences_NS(), batch_size=2)


def test_a_layer_that_is_called_twice_is_an_error() -> None:
    model = tiny_model("olmoe")
    block = model.model.layers[1].mlp
    once = block.forward
    block.forward = lambda hidden_states: once(once(hidden_states))
    with pytest.raises(UnsupportedModelError, match="received 64 tokens in a batch of 32"):
        count_sequences(model, sequences_NS(), batch_size=2)


def test_layers_of_different_sizes_are_an_error() -> None:
    model = tiny_model("olmoe")
    model.model.layers[2].mlp = tiny_model("olmoe", num_experts=6).model.layers[2].mlp
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.mlp\.experts: got num_experts=6, but model\.layers"):
        count_sequences(model, sequences_NS(), batch_size=2)


def test_a_dense_model_cannot_be_profiled() -> None:
    with pytest.raises(UnsupportedModelError, match="has no MoE layer"):
        profile(tiny_model("llama"), tiny_tokenizer(), records())


def test_only_the_last_logits_are_computed() -> None:
    model = tiny_model("olmoe")
    shapes = []
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    count_sequences(model, sequences_NS(), batch_size=5)
    handle.remove()
    assert shapes == [(5, 1, 32)]
