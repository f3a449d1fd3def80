"""Options of PEFT's methods that follow from the model: sizes that must divide its widths, names, numbers of layers.

Each function gets the model, the method's defaults and what the run says, `target_parts`, the parts of the layers
that the method goes on, and `names_modules`, whether the run names modules instead. What it gives stands in place of
defaults; what the run says goes before both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from metier.errors import ConfigError, UnsupportedModelError
from metier.models.moe import moe_layers
from metier.models.parts import modules_of, part_paths

Options = Mapping[str, Any]


def lora(model: PreTrainedModel, options: Options) -> dict[str, Any]:
    """Linear layers by their names, stacked experts by those of their parameters."""
    found: dict[str, Any] = {"target_modules": []}
    parts = () if options["names_modules"] else options["target_parts"]
    linear = tuple(part for part in parts if part != "routed")
    if linear:
        found["target_modules"] = modules_of(model, linear)
    if "routed" in parts:
        if options.get("lora_dropout"):
            raise ConfigError(
                f"lora_dropout: got {options['lora_dropout']}, but PEFT needs 0 where stacked experts are adapted."
            )
        found["target_parameters"] = [
            f"{layer.path}.{name}"
            for layer in moe_layers(model)
            for name in layer.parameter_names()
            if "bias" not in name
        ]
    return found


def ia3(model: PreTrainedModel, options: Options) -> dict[str, Any]:
    """Keys, values and what the feed-forward blocks' last layer reads, as the paper has it."""
    there = part_paths(model)
    wanted = options["target_parts"]
    keys = [
        path
        for path in (there.get("attention", ()) if "attention" in wanted else ())
        if path.rpartition(".")[2] in (*_KEYS, *_VALUES)
    ]
    blocks = [path for part in ("dense", "shared") if part in wanted for path in there.get(part, ())]
    last = [path for path in blocks if path.rpartition(".")[2] in _LAST]
    if not keys and not last:
        raise UnsupportedModelError(
            f"{type(model).__name__}: no keys, values or last feed-forward layers under a known name. Name them by "
            "target_modules and feedforward_modules."
        )
    return {"target_modules": [*keys, *last], "feedforward_modules": last}


_KEYS = ("k_proj", "key", "qkv_proj", "query_key_value", "c_attn", "kv_b_proj", "Wqkv")
_VALUES = ("v_proj", "value")
_LAST = ("down_proj", "fc2", "w2", "dense_4h_to_h", "c_proj", "fc_out")


def beft(model: PreTrainedModel, options: Options) -> dict[str, Any]:
    """Value projections."""
    found = [p for p in modules_of(model, ("attention",)) if p.rpartition(".")[2] in (*_VALUES, "kv_b_proj")]
    if not found:
        raise UnsupportedModelError(f"{type(model).__name__}: no value projections. Name some by target_modules.")
    return {"target_modules": found}


def adaption_prompt(model: PreTrainedModel, options: Options) -> dict[str, Any]:
    """All layers but the first two, as the paper has it; at least one."""
    return {"adapter_layers": max(1, model.config.get_text_config().num_hidden_layers - 2)}


def prefix(model: PreTrainedModel, options: Options) -> dict[str, Any]:
    """Nothing, but a refusal where keys and values are not cached as such."""
    text = model.config.get_text_config()
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{type(model).__name__}: its KV cache holds latent vectors, which PEFT's prefixes are no match for. "
            "Use method prefix_attention or prompt."
        )
    return {}


def layers(model: PreTrainedModel, options: Options) -> dict[str, Any]:
    """The last one, where none are named."""
    return {} if options.get("layers") or options.get("last_layers") else {"last_layers": 1}


def cpt(model: PreTrainedModel, options: Options) -> dict[str, Any]:
    """Masks of a context that is one example."""
    ids = options.get("cpt_token_ids")
    if not ids:
        raise ConfigError(
            "cpt: got no cpt_token_ids, expected the tokens of the context that the prompt begins as. Give them as a "
            "list of numbers."
        )
    num = len(ids)
    return {
        "num_virtual_tokens": num,
        "cpt_mask": [1] * num,
        # of an example: the first half as its input, the second as its output
        "cpt_tokens_type_mask": [2] * (num // 2) + [4] * (num - num // 2),
    }


def trainable_tokens(model: PreTrainedModel, options: Options) -> dict[str, Any]:
    """The module of the embeddings."""
    if not options.get("token_indices"):
        raise ConfigError(
            "trainable_tokens: got no token_indices, expected the numbers of the tokens to train, such as those that "
            "were added to the vocabulary."
        )
    embeddings = model.get_input_embeddings()
    return {"target_modules": [next(path for path, module in model.named_modules() if module is embeddings)]}


def adalora(model: PreTrainedModel, options: Options) -> dict[str, Any]:
    """A number of steps that stands until the run knows it; ranks that begin half as high again as they end."""
    rank = options.get("target_r") or options["lora_r"]
    return {"total_step": 1_000, "target_r": rank, "init_r": math.ceil(1.5 * rank)}


def vblora(model: PreTrainedModel, options: Options) -> dict[str, Any]:
    """The largest length up to PEFT's own that divides all widths."""
    return {"vector_length": _divisor(model, options, 256)}


def c3a(model: PreTrainedModel, options: Options) -> dict[str, Any]:
    """The largest block up to PEFT's own that divides all widths."""
    return {"block_size": _divisor(model, options, 256)}


def without_latents(model: PreTrainedModel, options: Options) -> dict[str, Any]:
    """All but the layer that turns latent vectors into keys and values, which gets an axis more than it can take."""
    return {"target_modules": _without_latents(options)}


def boft(model: PreTrainedModel, options: Options) -> dict[str, Any]:
    """The same of BOFT."""
    return {"boft_block_size": _divisor(model, options, 4)}


def oft(model: PreTrainedModel, options: Options) -> dict[str, Any]:
    """The same of OFT, which cannot take that layer either."""
    return {"target_modules": _without_latents(options), "oft_block_size": _divisor(model, options, 32)}


def road(model: PreTrainedModel, options: Options) -> dict[str, Any]:
    """The same of RoAd, whose groups have to be even."""
    return {"group_size": _divisor(model, options, 64)}


def fourierft(model: PreTrainedModel, options: Options) -> dict[str, Any]:
    """No more frequencies than the smallest matrix has entries."""
    return {"n_frequency": min(1_000, _smallest(model, options))}


def waveft(model: PreTrainedModel, options: Options) -> dict[str, Any]:
    """The same of WaveFT."""
    return {"n_frequency": min(2_592, _smallest(model, options))}


def _without_latents(options: Options) -> Any:
    targets = options["target_modules"]
    return [target for target in targets if not target.endswith("kv_b_proj")] if isinstance(targets, list) else targets


def _linear(model: PreTrainedModel, options: Options) -> list[nn.Linear]:
    """The layers that the method goes on."""
    targets = options["target_modules"]
    return [
        module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (not isinstance(targets, list | set) or any(f".{path}".endswith(f".{target}") for target in targets))
    ]


def _divisor(model: PreTrainedModel, options: Options, most: int) -> int:
    """Of all widths of those layers, the largest common divisor that is at most so large."""
    widths = [width for layer in _linear(model, options) for width in (layer.in_features, layer.out_features)]
    common = math.gcd(*widths)
    return next(size for size in range(min(most, common), 0, -1) if common % size == 0)


def _smallest(model: PreTrainedModel, options: Options) -> int:
    """Entries of the smallest of those layers' matrices."""
    return min(layer.weight.numel() for layer in _linear(model, options))
