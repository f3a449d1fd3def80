"""Diff pruning: gates against their formulas, the penalty, and the sparse delta that is left."""

from __future__ import annotations

import math

import peft
import pytest
import torch

from metier.errors import ConfigError, DeltaError, UnsupportedModelError
from metier.methods.sparse_delta import DiffPruningConfig, SparseDeltaConfig, prune
from metier.methods.sparse_delta.diff_layer import DiffPruningLayer
from tiny_models import tiny_model


def model_of(kind: str = "llama", dtype: torch.dtype = torch.float32, **changes):
    return tiny_model(kind, num_hidden_layers=2, **changes).to(dtype).eval()


def tokens(seed: int = 0):
    return torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(seed))


def trained(model, steps: int = 3, config: DiffPruningConfig | None = None, *, lr: float = 1e-2):
    wrapped = peft.get_peft_model(model, config or DiffPruningConfig()).train()
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    for step in range(steps):
        (wrapped(input_ids=tokens(step), labels=tokens(step)).loss + wrapped.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return wrapped.eval()


def layers(model) -> list[DiffPruningLayer]:
    return [module for module in model.modules() if isinstance(module, DiffPruningLayer)]


@pytest.mark.parametrize("kind", ["llama", "deepseek_v2", "mixtral"])
@pytest.mark.parametrize("structured", [False, True])
def test_a_fresh_adapter_changes_nothing_then_trains_and_leaves_the_base_alone(kind, structured):
    for dtype in (torch.float32, torch.bfloat16):
        model = model_of(kind, dtype)
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        logits = model(tokens()).logits
        wrapped = peft.get_peft_model(model, DiffPruningConfig(structured=structured))
        assert torch.equal(wrapped.train()(tokens()).logits, logits)
        wrapped.unload()
        wrapped = trained(model, config=DiffPruningConfig(structured=structured))
        assert not torch.equal(wrapped(tokens()).logits, logits)
        with wrapped.disable_adapter():
            assert torch.equal(wrapped(tokens()).logits, logits)
        assert all(torch.equal(p, before[name]) for name, p in wrapped.unload().named_parameters())


@pytest.mark.parametrize("structured", [False, True])
def test_evaluation_uses_fixed_gates_and_training_draws_them(structured):
    wrapped = trained(model_of(), config=DiffPruningConfig(structured=structured, alpha_init=0.3))
    expected = model_of()
    for layer in layers(wrapped):
        gates = [torch.sigmoid(layer.diff_pruning_alpha_weight["default"])]
        gates += [torch.sigmoid(layer.diff_pruning_group_weight["default"])] if structured else []
        added = layer.diff_pruning_values_weight["default"] * math.prod((3 * gate - 1.5).clamp(0, 1) for gate in gates)
        expected.get_parameter(f"{layer.path}.weight").data += added.detach()
    torch.testing.assert_close(wrapped(tokens()).logits, expected(tokens()).logits, rtol=0, atol=1e-5)
    assert torch.equal(wrapped(tokens()).logits, wrapped(tokens()).logits)
    wrapped.train()
    assert not torch.equal(wrapped(tokens()).logits, wrapped(tokens()).logits)


@pytest.mark.parametrize("structured", [False, True])
def test_the_penalty_is_the_expected_number_of_open_gates(structured):
    config = DiffPruningConfig(structured=structured, alpha_init=0.4, lower=-0.1, upper=1.1, penalty_weight=0.01)
    wrapped = peft.get_peft_model(model_of(), config)
    count = sum(p.numel() for n, p in model_of().named_parameters() if "_proj" in n)
    chance = 1 / (1 + math.exp(-(0.4 - math.log(0.1 / 1.1))))
    expected = count * chance ** (2 if structured else 1)
    assert wrapped.expected_entries() == pytest.approx(expected, rel=1e-4)
    penalty = wrapped.penalty()
    assert float(penalty.detach()) == pytest.approx(0.01 * expected, rel=1e-4)
    penalty.backward()
    alpha = layers(wrapped)[0].diff_pruning_alpha_weight["default"]
    factor = chance if structured else 1
    torch.testing.assert_close(alpha.grad, torch.full_like(alpha, 0.01 * chance * (1 - chance) * factor))


def test_the_penalty_closes_gates():
    few, many = (
        trained(model_of(), 20, DiffPruningConfig(alpha_init=0.5, penalty_weight=weight), lr=0.1).expected_entries()
        for weight in (1e-2, 0.0)
    )
    assert few < 0.5 * many


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_pruning_leaves_a_sparse_delta_of_the_largest(kind, tmp_path):
    wrapped = trained(model_of(kind))
    gated = {f"{x.path}.{n}": x.gated("default", n, drawn=False).detach() for x in layers(wrapped) for n in x.names}
    flat = torch.cat([difference.flatten() for difference in gated.values()])
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[flat.abs().sort(descending=True, stable=True).indices[:400]] = True
    expected = model_of(kind)
    sizes = [difference.numel() for difference in gated.values()]
    for name, part, mask in zip(gated, flat.split(sizes), kept.split(sizes), strict=True):
        expected.get_parameter(name).data += (part * mask).view_as(gated[name])
    pruned = prune(wrapped, num_entries=400).eval()
    assert isinstance(pruned.peft_config["default"], SparseDeltaConfig)
    assert pruned.get_nb_trainable_parameters()[0] == 400
    assert torch.equal(pruned(tokens()).logits, expected(tokens()).logits)
    pruned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(model_of(kind), tmp_path).eval()
    assert torch.equal(again(tokens()).logits, expected(tokens()).logits)
    assert torch.equal(again.merge_and_unload()(tokens()).logits, expected(tokens()).logits)


def test_everything_kept_is_what_evaluation_gave():
    wrapped = trained(model_of())
    logits = wrapped(tokens()).logits
    assert torch.equal(prune(wrapped, density=1.0).eval()(tokens()).logits, logits)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    wrapped = trained(model_of(), config=DiffPruningConfig(structured=True))
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(model_of(), tmp_path).eval()
    assert torch.equal(again(tokens()).logits, wrapped(tokens()).logits)
    assert again.expected_entries() == wrapped.expected_entries()


def test_two_adapters_and_deleting_one():
    wrapped = trained(model_of())
    first = wrapped(tokens()).logits
    wrapped.add_adapter("second", DiffPruningConfig(structured=True))
    assert torch.equal(wrapped(tokens()).logits, first)
    wrapped.set_adapter("second")
    assert torch.equal(wrapped(tokens()).logits, model_of()(tokens()).logits)
    wrapped.set_adapter("default")
    wrapped.delete_adapter("second")
    assert torch.equal(wrapped(tokens()).logits, first)
    assert all(layer.adapter_names == ["default"] for layer in layers(wrapped))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_draws_the_same_gates_again(use_reentrant):
    found = []
    for checkpointing in (False, True):
        wrapped = trained(model_of()).train()
        if checkpointing:
            wrapped.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            wrapped.base_model.model.enable_input_require_grads()
        torch.manual_seed(7)
        wrapped(input_ids=tokens(), labels=tokens()).loss.backward()
        found.append([p.grad for p in wrapped.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_by_name(verb):
    with pytest.raises(DeltaError, match=r"its gates are still open in part, so it is not merged\. Call `prune"):
        getattr(peft.get_peft_model(model_of(), DiffPruningConfig()), verb)()


def test_what_cannot_be_pruned_is_refused():
    wrapped = peft.get_peft_model(model_of(), DiffPruningConfig())
    with pytest.raises(DeltaError, match=r"no diff-pruning adapter 'law', but \['default'\]"):
        prune(wrapped, density=0.1, adapter_name="law")
    for options in ({}, {"density": 0.1, "num_entries": 5}):
        with pytest.raises(ConfigError, match="give either density or num_entries"):
            prune(wrapped, **options)
    with pytest.raises(ConfigError, match="must be between 1 and the"):
        prune(wrapped, num_entries=10**9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty_weight": -1.0}, "penalty_weight must be at least 0, got -1.0"),
        ({"lower": 0.0}, "lower must be under 0 and upper over 1, got 0.0 and 1.5"),
        ({"upper": 1.0}, "lower must be under 0 and upper over 1"),
        ({"target_kinds": ["attention"]}, "target_kinds: got 'attention'"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        DiffPruningConfig(**options)


def test_what_the_model_does_not_have_or_shares_is_refused():
    with pytest.raises(UnsupportedModelError, match="no parameters of the kinds that are wanted"):
        peft.get_peft_model(model_of(), DiffPruningConfig(target_kinds=["experts"]))
    with pytest.raises(ConfigError, match="self_attn: LlamaAttention holds no parameter itself"):
        peft.get_peft_model(model_of(), DiffPruningConfig(target_modules=["self_attn"]))
    with pytest.raises(ConfigError, match="lm_head: diff pruning of a parameter that is tied"):
        peft.get_peft_model(model_of(tie_word_embeddings=True), DiffPruningConfig(target_modules=["lm_head"]))
