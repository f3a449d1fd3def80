"""What each mask chooses on a model, against the obvious way to find it; and what cannot be chosen."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, Phi3Config

from metier.errors import ConfigError, DataError, UnsupportedModelError
from metier.methods.sparse_delta import SparseDeltaConfig, choose_entries, prepare
from metier.models.base_parameters import base_parameters
from tiny_models import tiny_model


def model_of(kind: str = "llama", **changes):
    return tiny_model(kind, num_hidden_layers=2, **changes).eval()


def batches(count: int = 2):
    found = [torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(seed)) for seed in range(count)]
    return [{"input_ids": tokens, "labels": tokens} for tokens in found]


def targets(model) -> dict[str, torch.Tensor]:
    return {found.path: found.parameter for found in base_parameters(model) if found.kind in ("linear", "experts")}


def plain_top(scores, count, *, largest=True):
    flat = torch.cat([score.detach().flatten().float() for score in scores.values()])
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[flat.sort(descending=largest, stable=True).indices[:count]] = True
    parts = chosen.split([score.numel() for score in scores.values()])
    found = {name: part.nonzero().squeeze(1) for name, part in zip(scores, parts, strict=True)}
    return {name: indices for name, indices in found.items() if len(indices)}


def same(got, expected) -> None:
    assert {name: indices.tolist() for name, indices in got.items()} == {
        name: indices.tolist() for name, indices in expected.items()
    }


@pytest.mark.parametrize("kind", ["llama", "deepseek_v2", "mixtral"])
@pytest.mark.parametrize("mask", ["magnitude_smallest", "magnitude_largest"])
def test_magnitudes_over_all_parameters_or_in_each(kind, mask):
    model = model_of(kind)
    scores = {name: parameter.abs() for name, parameter in targets(model).items()}
    total = sum(score.numel() for score in scores.values())
    largest = mask == "magnitude_largest"
    got = choose_entries(model, SparseDeltaConfig(mask=mask, density=0.03))
    same(got, plain_top(scores, round(0.03 * total), largest=largest))
    got = choose_entries(model, SparseDeltaConfig(mask=mask, num_entries=777, scope="per_parameter"))
    assert sum(map(len, got.values())) == 777
    for name, indices in got.items():
        assert abs(len(indices) - 777 * scores[name].numel() / total) < 1
        same({name: indices}, plain_top({name: scores[name]}, len(indices), largest=largest))


def test_the_default_targets_are_linear_layers_and_experts_and_nothing_else():
    model = model_of("deepseek_v2")
    kinds = {found.path: found.kind for found in base_parameters(model)}
    assert kinds["model.layers.1.mlp.experts.gate_up_proj"] == "experts"
    assert kinds["model.layers.1.mlp.shared_experts.up_proj.weight"] == "linear"
    assert kinds["model.layers.1.mlp.gate.weight"] == "router"
    assert kinds["model.layers.0.self_attn.kv_a_layernorm.weight"] == "norm"
    assert (kinds["model.embed_tokens.weight"], kinds["lm_head.weight"]) == ("embedding", "output")
    got = choose_entries(model, SparseDeltaConfig(density=1.0))
    assert set(got) == {name for name, kind in kinds.items() if kind in ("linear", "experts")}


def gradients_of(model, batch, names):
    gradients = torch.autograd.grad(model(**batch).loss, [dict(model.named_parameters())[name] for name in names])
    return dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_fisher_takes_the_largest_mean_squares_of_each_samples_gradient(kind):
    model = model_of(kind)
    names = list(targets(model))
    scores = dict.fromkeys(names, 0)
    for batch in batches():
        for row in range(2):
            sample = {name: value[row : row + 1] for name, value in batch.items()}
            for name, gradient in gradients_of(model, sample, names).items():
                scores[name] = scores[name] + gradient.square() / 4
    total = sum(score.numel() for score in scores.values())
    got = choose_entries(model, SparseDeltaConfig(mask="fisher", density=0.01), batches())
    expected = plain_top(scores, round(0.01 * total))
    flat = {(name, place) for name, indices in got.items() for place in indices.tolist()}
    wanted = {(name, place) for name, indices in expected.items() for place in indices.tolist()}
    # sums in another order may swap entries whose scores are equal but for rounding
    assert len(flat) == len(wanted)
    assert len(flat & wanted) >= len(wanted) - 1
    per_batch = choose_entries(model, SparseDeltaConfig(mask="fisher", density=0.01, fisher_per="batch"), batches())
    assert {name: x.tolist() for name, x in per_batch.items()} != {name: x.tolist() for name, x in got.items()}


def test_gradient_takes_the_largest_sums():
    model = model_of()
    names = list(targets(model))
    sums = [gradients_of(model, batch, names) for batch in batches()]
    scores = {name: (sums[0][name] + sums[1][name]).abs() for name in names}
    got = choose_entries(model, SparseDeltaConfig(mask="gradient", num_entries=300), batches())
    same(got, plain_top(scores, 300))


def test_change_is_a_pass_of_full_fine_tuning_rewound():
    model = model_of().train()
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    config = SparseDeltaConfig(mask="change", num_entries=300, change_learning_rate=1e-3)
    got = choose_entries(model, config, batches(3))
    dense = copy.deepcopy(model)
    trained = targets(dense)
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.0)
    for batch in batches(3):
        dense(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    scores = {name: (parameter - before[name][0]).abs() for name, parameter in trained.items()}
    least = min(scores[name].flatten()[indices.long()].min() for name, indices in got.items())
    threshold = torch.cat([score.detach().flatten() for score in scores.values()]).topk(300).values[-1]
    # weights near 0.1 hold their change to 1e-8
    torch.testing.assert_close(least.detach(), threshold, rtol=0, atol=1e-6)
    assert sum(map(len, got.values())) == 300
    assert model.training
    assert all(type(module).__module__.split(".")[0] != "metier" for module in model.modules())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]


@pytest.mark.parametrize("mask", ["change", "fisher", "gradient", "head"])
def test_an_error_while_choosing_leaves_the_model_as_it_was(mask):
    model = model_of()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def loss(model, batch):
        loss.calls += 1
        if loss.calls == 2:
            raise RuntimeError("out of memory")
        return model(**batch).loss

    loss.calls = 0
    with pytest.raises(RuntimeError, match="out of memory"):
        choose_entries(model, SparseDeltaConfig(mask=mask), batches(), loss)
    assert before.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())


def test_random_entries_are_shared_by_size():
    got = choose_entries(model_of(), SparseDeltaConfig(mask="random", num_entries=500, seed=3))
    sizes = {name: parameter.numel() for name, parameter in targets(model_of()).items()}
    for name, size in sizes.items():
        assert abs(len(got[name]) - 500 * size / sum(sizes.values())) < 1


def test_norms_are_all_norms():
    got = choose_entries(model_of(), SparseDeltaConfig(mask="norm"))
    names = ["model.norm.weight"]
    for layer in range(2):
        names += [f"model.layers.{layer}.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")]
    assert set(got) == set(names)
    assert all(indices.tolist() == list(range(32)) for indices in got.values())
    wrapped = peft.get_peft_model(model_of(), SparseDeltaConfig(mask="norm"))
    assert not any("indices" in name for name in peft.get_peft_model_state_dict(wrapped)), (
        "all entries need no positions"
    )


@pytest.mark.parametrize(("options", "expected"), [({"last_layers": 1}, {1}), ({"layers": [0]}, {0})])
def test_layers_are_whole(options, expected):
    model = model_of("mixtral")
    got = choose_entries(model, SparseDeltaConfig(mask="layer", **options))
    wanted = {name: p.numel() for name, p in model.named_parameters() if f"layers.{min(expected)}." in name}
    assert {name: len(indices) for name, indices in got.items()} == wanted


def test_modules_and_parameters_may_be_named():
    for names, expected in (
        (["q_proj"], {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"}),
        (["layers.1.self_attn"], None),
        ("model.layers.1.self_attn.(k|v)_proj", {f"model.layers.1.self_attn.{x}_proj.weight" for x in "kv"}),
        (["model.norm.weight"], {"model.norm.weight"}),
    ):
        config = SparseDeltaConfig(mask="random", density=1.0, target_modules=names)
        if expected is None:
            with pytest.raises(ConfigError, match=r"target_modules names 'layers.1.self_attn', which no parameter"):
                choose_entries(model_of(), config)
        else:
            assert set(choose_entries(model_of(), config)) == expected


def head_rows(model, layer, head):
    """Every entry of a head, found by asking which rows and columns a head of the attention reads and writes."""
    attention, size = model.model.layers[layer].self_attn, model.config.hidden_size // model.config.num_attention_heads
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    prefix, found = f"model.layers.{layer}.self_attn", {}
    for name, number in (("q_proj", head), ("k_proj", head // groups), ("v_proj", head // groups)):
        mask = torch.zeros_like(getattr(attention, name).weight)
        mask[number * size : (number + 1) * size] = 1
        found[f"{prefix}.{name}.weight"] = mask
    mask = torch.zeros_like(attention.o_proj.weight)
    mask[:, head * size : (head + 1) * size] = 1
    return {**found, f"{prefix}.o_proj.weight": mask}


def test_named_heads_are_their_rows_and_columns():
    model = model_of(num_attention_heads=4, num_key_value_heads=2)
    got = choose_entries(model, SparseDeltaConfig(mask="head", heads={1: [3, 2], 0: [0]}))
    expected = head_rows(model, 0, 0)
    for name, mask in head_rows(model, 1, 2).items():
        expected[name] = mask + head_rows(model, 1, 3)[name]
    same(got, {name: mask.view(-1).nonzero().squeeze(1) for name, mask in expected.items()})


def test_a_heads_parts_are_all_that_its_output_depends_on():
    """With every part of a head at 0 but its siblings' whole, its columns of the output read only zeros."""
    model = model_of("deepseek_v2")
    got = choose_entries(model, SparseDeltaConfig(mask="head", heads={0: [1]}))
    attention = model.model.layers[0].self_attn
    assert {name.rsplit(".", 2)[1] for name in got} == {"q_proj", "kv_b_proj", "o_proj"}
    seen = []
    attention.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    tokens = batches()[0]["input_ids"]
    model(tokens)
    with torch.no_grad():
        for name, indices in got.items():
            model.get_parameter(name).view(-1)[indices.long()] = 0
    model(tokens)
    size = attention.o_proj.weight.shape[1] // 2
    assert torch.equal(seen[0][..., :size], seen[1][..., :size]), "the other head was touched"
    assert not seen[1][..., size:].any()
    assert not attention.o_proj.weight[:, size:].any()
    assert attention.o_proj.weight[:, :size].all()


@pytest.mark.parametrize("score", ["fisher", "gradient"])
def test_heads_are_taken_by_their_score(score):
    model = model_of(num_attention_heads=4, num_key_value_heads=4)
    names = [name for name in targets(model) if "self_attn" in name]
    scores = dict.fromkeys(names, 0)
    if score == "fisher":
        rows = [{k: v[i : i + 1] for k, v in batch.items()} for batch in batches() for i in range(2)]
        for row in rows:
            for name, gradient in gradients_of(model, row, names).items():
                scores[name] = scores[name] + gradient.square()
    else:
        for batch in batches():
            for name, gradient in gradients_of(model, batch, names).items():
                scores[name] = scores[name] + gradient
        scores = {name: total.square() for name, total in scores.items()}
    totals = {
        (layer, head): sum((scores[n] * mask).sum() for n, mask in head_rows(model, layer, head).items())
        for layer in range(2)
        for head in range(4)
    }
    best = sorted(totals, key=totals.get, reverse=True)[:3]
    size = sum(int(mask.sum()) for mask in head_rows(model, 0, 0).values())
    # a little more than three heads
    config = SparseDeltaConfig(mask="head", head_score=score, num_entries=int(3.5 * size))
    got = choose_entries(model, config, batches())
    wanted: dict[str, torch.Tensor] = {}
    for layer, head in best:
        for name, mask in head_rows(model, layer, head).items():
            wanted[name] = wanted.get(name, 0) + mask
    found = {name: mask.view(-1).nonzero().squeeze(1).tolist() for name, mask in wanted.items()}
    assert {name: indices.tolist() for name, indices in got.items()} == found


def test_heads_that_cannot_be_told_apart_are_refused():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    fused = Phi3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    with pytest.raises(UnsupportedModelError, match=r"attention has .*qkv_proj, expected q_proj"):
        choose_entries(AutoModelForCausalLM.from_config(fused), SparseDeltaConfig(mask="head", heads={0: [0]}))
    for heads, message in (
        ({7: [0]}, r"layer 7, but layers with attention are \[0, 1\]"),
        ({0: [9]}, "head 9 of layer 0, which has num_heads=2"),
    ):
        with pytest.raises(ConfigError, match=message):
            choose_entries(model_of(), SparseDeltaConfig(mask="head", heads=heads))


def test_transposed_linear_layers_of_gpt2_are_linear_layers():
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    model = AutoModelForCausalLM.from_config(config).eval()
    got = choose_entries(model, SparseDeltaConfig(density=1.0))
    assert "transformer.h.0.attn.c_attn.weight" in got
    assert len(got) == 8


@pytest.mark.parametrize("mask", ["fisher", "gradient", "change", "head"])
def test_a_mask_that_looks_at_data_wants_some(mask):
    with pytest.raises(ConfigError, match=r"looks at data, and got none.\nCall prepare\(model, config, batches\)"):
        peft.get_peft_model(model_of(), SparseDeltaConfig(mask=mask))
    with pytest.raises(DataError, match="batches: got none"):
        prepare(model_of(), SparseDeltaConfig(mask=mask), [])


def test_data_is_not_looked_at_through_an_adapter():
    wrapped = peft.get_peft_model(model_of(), SparseDeltaConfig(mask="norm"))
    config = SparseDeltaConfig(mask="gradient", num_entries=50)
    with pytest.raises(ConfigError, match="takes gradients of the base, but 5 of its modules have an adapter on"):
        choose_entries(wrapped, config, batches())
    with wrapped.disable_adapter():
        got = choose_entries(wrapped, config, batches())
    same(got, choose_entries(model_of(), config, batches()))
    assert [p.requires_grad for n, p in wrapped.named_parameters() if "sparse_delta" in n] == [True] * 5


def test_a_second_adapter_chooses_on_the_base_and_not_on_the_first():
    wrapped = peft.get_peft_model(model_of(), SparseDeltaConfig(mask="magnitude_smallest", num_entries=100))
    for name, parameter in wrapped.named_parameters():
        if "sparse_delta" in name:
            parameter.data += 1
    with torch.no_grad():
        wrapped.train()
        wrapped(batches()[0]["input_ids"])
    config = SparseDeltaConfig(mask="magnitude_smallest", num_entries=100)
    wrapped.add_adapter("second", config)
    same(config.entries, choose_entries(model_of(), SparseDeltaConfig(mask="magnitude_smallest", num_entries=100)))


def test_weights_that_are_no_numbers_are_refused():
    model = model_of()
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(48, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(ConfigError, match=r"up_proj.weight: a parameter of torch.int8, expected floating-point"):
        choose_entries(model, SparseDeltaConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "best"}, "mask must be magnitude_smallest or .*, got 'best'"),
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"density": 1.5}, r"density must be in \(0, 1\], got 1.5"),
        ({"density": 0.1, "num_entries": 5}, "got density=0.1 and num_entries=5; give one"),
        ({"num_entries": 0}, "num_entries must be at least 1, got 0"),
        ({"mask": "norm", "density": 0.1}, "density and num_entries do not go with mask='norm'"),
        ({"mask": "head", "heads": {0: [0]}, "density": 0.1}, "do not go with heads"),
        ({"mask": "layer"}, "needs either layers or last_layers"),
        ({"mask": "layer", "layers": [0], "last_layers": 1}, "needs either layers or last_layers"),
        ({"last_layers": 1}, "are mask='layer' alone's, got mask='magnitude_smallest'"),
        ({"mask": "layer", "last_layers": 0}, "last_layers must be at least 1, got 0"),
        ({"heads": {0: [0]}, "mask": "random"}, "heads is mask='head' alone's"),
        ({"scope": "layer"}, "scope must be global or per_parameter, got 'layer'"),
        ({"target_kinds": ["attention"]}, "target_kinds: got 'attention', expected some of linear, experts"),
        ({"target_kinds": ["norm"], "target_modules": ["q_proj"]}, "both say where to choose; give one"),
        ({"mask": "given"}, "mask='given' needs entries"),
        ({"entries": {}}, "entries must map parameter paths to flat positions"),
        ({"change_learning_rate": 0.0}, "change_learning_rate must be greater than 0, got 0.0"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        SparseDeltaConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["query"]}, "target_modules names 'query', which no parameter of the model"),
        ({"target_modules": "model.layers.9.*"}, "no module's path matches the regular expression"),
        ({"mask": "layer", "layers": [5]}, "layers names layer 5, but the model has layers 0 to 1"),
        ({"mask": "layer", "last_layers": 3}, "last_layers=3 is more than the 2 layers"),
        ({"num_entries": 10**9}, "num_entries must be between 1 and the"),
        ({"mask": "random", "num_entries": 10**9}, "num_entries=1000000000 is more than the"),
        ({"mask": "random", "target_kinds": ["experts"]}, "among its target parameters are no parameters"),
        ({"mask": "bias", "new_biases": "never"}, "among its target parameters are no biases"),
    ],
)
def test_what_the_model_does_not_have_is_refused(options, message):
    with pytest.raises((ConfigError, UnsupportedModelError), match=message):
        peft.get_peft_model(model_of(), SparseDeltaConfig(**options))
