"""What a method goes on is what was meant, or an error: nothing is covered or skipped in silence."""

from __future__ import annotations

from typing import Any

import peft
import pytest

from metier.config import RunConfig
from metier.errors import ConfigError
from metier.methods.coverage import check_coverage, coverage
from metier.methods.from_catalogue import put_on
from tiny_models import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*target_parameters:UserWarning")


def lora_on(family: str, **options: Any) -> peft.PeftModel:
    config = RunConfig(model="unused", dataset="unused", output_dir="unused", method="lora", method_options=options)
    return put_on(tiny_model(family), config)


def covered(model: peft.PeftModel) -> dict[str, tuple[str, ...]]:
    return {row.part: row.kinds for row in coverage(model) if row.num_covered}


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe", "llama"])
def test_modules_that_are_named_are_all_that_is_covered(family: str) -> None:
    assert covered(lora_on(family, target_modules=["q_proj"])) == {"attention": ("q_proj",)}


def test_parameters_that_are_named_are_all_that_is_covered() -> None:
    model = lora_on("deepseek_v2", target_parameters=["mlp.experts.down_proj"])
    assert covered(model) == {"routed": ("experts",)}
    trained = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"base_model.model.model.layers.{layer}.mlp.experts" for layer in (1, 2)}


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe", "llama"])
def test_a_name_that_no_module_has_is_an_error(family: str) -> None:
    with pytest.raises(ConfigError, match=r"nothing_proj.* not found"):
        lora_on(family, target_modules=["nothing_proj"])


def test_an_adapter_of_which_nothing_would_be_trained_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"lora: nothing of the model would be trained\. Check what its options name"):
        lora_on("llama", inference_mode=True)


def test_names_that_reach_feed_forward_layers_of_one_kind_alone_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"silently skip another: .*shared: none of 6; routed: 2 of 2(.|\n)*: routed"):
        lora_on("deepseek_v2", target_modules=["down_proj"])


def test_a_part_that_was_wanted_and_is_not_covered_is_an_error() -> None:
    model = lora_on("deepseek_v2", target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="was to go on shared, but nothing of it is covered: attention: 3 of 12"):
        check_coverage(model, ("attention", "shared"), names_modules=False, method="lora")
