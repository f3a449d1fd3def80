"""PEFT's own LoRA: what is served is what PEFT computes, and whatever PEFT would compute otherwise is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from metier.errors import BaseMismatchError, CorruptDeltaError, DeltaError
from metier.serving.checked_reader import CheckedReader
from metier.serving.delta_source import open_served_delta, read_served_delta
from metier.serving.model_facts import ModelFacts, model_facts
from serving.made_deltas import change_config, made_model, save_lora

TOLERANCE = {"rtol": 1e-5, "atol": 1e-7}
"""float32: one product of the same factors, scaled before or after."""
Open = Callable[[Path], object]


@pytest.fixture
def opened(facts: ModelFacts, reader: CheckedReader) -> Open:
    return lambda folder: open_served_delta(folder, facts=facts, reader=reader)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "o_proj", "kv_b_proj"], "exclude_modules": ["kv_b_proj"]},
        {"target_modules": ["o_proj", "q_proj"], "layers_to_transform": [0, 2]},
        {"rank_pattern": {"layers.1.self_attn.o_proj": 2, "kv_b_proj": 3}, "alpha_pattern": {"kv_b_proj": 5}},
        {"rank_pattern": {r"^model\.layers\.[01]\.self_attn\.o_proj": 2, "proj": 9}},
        {"rank_pattern": {r".*\.1\..*": 2}, "alpha_pattern": {"o_proj": 1, "o_proj|kv_b_proj": 2}},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.5},
    ],
    ids=str,
)
def test_scale_times_b_a_is_what_peft_adds(
    model: PreTrainedModel, facts: ModelFacts, tmp_path: Path, options: dict[str, Any]
) -> None:
    # PEFT puts patterns in another order when it saves them, and takes the first that fits
    wrapped = peft.PeftModel.from_pretrained(model, save_lora(model, tmp_path, **options))
    want = {
        path.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for path, module in wrapped.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    wrapped.unload()
    delta = read_served_delta(tmp_path, facts=facts)
    assert delta.kind == "lora"
    assert delta.loaded is not None
    factors = {(x.path, x.parameter): delta.loaded[x.name] for x in delta.tensors}
    assert delta.scales.keys() == want.keys()
    assert len(want) > 2
    for path, change in want.items():
        got = delta.scales[path][0] * (factors[path, "B"] @ factors[path, "A"])
        torch.testing.assert_close(got, change, **TOLERANCE)


def test_a_lora_fits_a_dense_base_too(tmp_path: Path) -> None:
    model = made_model("llama")
    folder = save_lora(model, tmp_path / "lora", target_modules="all-linear")
    delta = read_served_delta(folder, facts=model_facts(model, "llama"))
    assert len(delta.scales) == 3 * 7  # layers and their linear ones


def test_a_copy_of_an_embedding_beside_the_factors_is_refused(
    model: PreTrainedModel, tmp_path: Path, opened: Open
) -> None:
    folder = save_lora(model, tmp_path / "lora", target_modules=["q_proj", "lm_head"], saves_embeddings=True)
    with pytest.raises(
        DeltaError, match=r"lm_head\.base_layer\.weight'.*\n.*, save it with `save_embedding_layers=False`"
    ):
        opened(folder)


@pytest.mark.parametrize(
    ("options", "then"),
    [
        ({"use_dora": True}, "Merge it into its base"),
        ({"bias": "lora_only"}, "Merge it into its base"),
        ({"lora_bias": True}, "Merge it into its base"),
        ({"fan_in_fan_out": True}, "Merge it into its base"),
        ({"modules_to_save": ["lm_head"]}, "Merge it into its base"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "Merge it into its base"),
        ({"trainable_token_indices": [1, 2]}, "Merge it into its base"),
        ({"megatron_config": {"a": 1}}, "Merge it into its base"),
        ({"ensure_weight_tying": True}, "Merge it into its base"),
        ({"use_qalora": True}, "Merge it into its base"),
        ({"kasa_config": {"a": 1}}, "Merge it into its base"),
        ({"an_option_to_come": 3}, "Merge it into its base"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, r"Read it as a LoRA on experts \(.*import_peft_lora"),
        ({"alora_invocation_tokens": [5]}, "It does not merge either"),
    ],
    ids=str,
)
def test_an_option_that_makes_another_thing_of_it_is_refused_by_name(
    copy_of: Callable[..., Path], opened: Open, options: dict[str, Any], then: str
) -> None:
    folder = copy_of("lora")
    change_config(folder, **options)
    (name,) = options
    with pytest.raises(
        DeltaError, match=rf"got a LoRA with {name}=.*, expected one that is W \+ scale \* B A.*\n{then}"
    ):
        opened(folder)


def test_every_option_of_the_installed_peft_is_let_pass_at_its_default(
    model: PreTrainedModel, tmp_path: Path, opened: Open
) -> None:
    opened(save_lora(model, tmp_path / "lora"))


@pytest.mark.parametrize("beginning", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "another"])
def test_a_beginning_that_changes_the_base_is_refused(
    copy_of: Callable[..., Path], opened: Open, beginning: str
) -> None:
    folder = copy_of("lora")
    change_config(folder, init_lora_weights=beginning)
    with pytest.raises(
        DeltaError, match=rf"init_lora_weights='{beginning}', which begins by changing the base's weights"
    ):
        opened(folder)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


Q = "base_model.model.model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda x: x.clear(), CorruptDeltaError, "got no tensor, expected the factors of a LoRA"),
        (lambda x: x.pop(f"{Q}.lora_B.weight"), CorruptDeltaError, "got lora_A alone, expected lora_A and lora_B"),
        (
            lambda x: x.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)}),
            DeltaError,
            r"got tensor 'base_model\.model\.lm_head\.weight', expected factors of linear layers alone",
        ),
        (
            lambda x: x.update({f"{Q}.lora_A.weight": torch.zeros(5, 32)}),
            CorruptDeltaError,
            r"got A F32 \[5, 32\], B F32 \[32, 4\], expected A \(r, in\) and B \(out, r\)",
        ),
        (
            lambda x: x.update({f"{Q}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int64)}),
            CorruptDeltaError,
            r"got A I64 \[4, 32\]",
        ),
        (
            lambda x: x.update({f"{Q}.lora_A.weight": torch.zeros(5, 32), f"{Q}.lora_B.weight": torch.zeros(32, 5)}),
            CorruptDeltaError,
            r"got rank 5, expected 4 by adapter_config\.json",
        ),
        (
            lambda x: x.update({f"{Q}.lora_A.weight": torch.zeros(4, 31)}),
            BaseMismatchError,
            r"got a change of shape \[32, 31\], but the layer of base 'tiny' has \[32, 32\]",
        ),
        (
            lambda x: x.update({n.replace("o_proj", "w_proj"): x.pop(n) for n in list(x) if n.startswith(Q)}),
            BaseMismatchError,
            r"model\.layers\.0\.self_attn\.w_proj: base 'tiny' has no linear layer there",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    copy_of: Callable[..., Path],
    opened: Open,
    change: Callable[[dict[str, torch.Tensor]], None],
    kind: type[Exception],
    message: str,
) -> None:
    folder = copy_of("lora")
    rewrite(folder, change)
    with pytest.raises(kind, match=message):
        opened(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "r: got 0, expected a whole number over 0"),
        ({"r": True}, "r: got True, expected a whole number"),
        ({"lora_alpha": "8"}, "lora_alpha: got '8', expected a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha: got nan, expected a number"),
        ({"rank_pattern": [1]}, r"rank_pattern: got \[1\], expected values by pattern"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern: got '\(', which is no pattern"),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(
    copy_of: Callable[..., Path], opened: Open, values: dict[str, Any], message: str
) -> None:
    folder = copy_of("lora")
    change_config(folder, **values)
    with pytest.raises(CorruptDeltaError, match=message):
        opened(folder)


@pytest.mark.parametrize("pattern", ["(a*)*b", "(a|aa)+b", ".*.*.*x", "a" * 301])
def test_patterns_that_could_take_years_are_refused(copy_of: Callable[..., Path], opened: Open, pattern: str) -> None:
    folder = copy_of("lora")
    change_config(folder, rank_pattern={pattern: 4})
    with pytest.raises(DeltaError, match="expected a pattern with at most two repetitions, none of them of a group"):
        opened(folder)


def test_a_lora_on_a_quantised_layer_is_refused(
    model: PreTrainedModel, saved: Path, facts: ModelFacts, reader: CheckedReader
) -> None:
    from dataclasses import replace

    left = {path: linear for path, linear in facts.linears.items() if "kv_b_proj" not in path}
    with pytest.raises(
        BaseMismatchError, match=r"kv_b_proj: base 'tiny' has no linear layer there, or it is quantised"
    ):
        open_served_delta(saved / "lora", facts=replace(facts, linears=left), reader=reader)
