"""Bases and deltas to test on: tiny models in folders, with rows moved as training would."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import metier
from metier.methods.esft import EsftConfig
from metier.models.load import LoadedModel
from metier.models.moe import moe_layers
from tiny_models import VOCAB_SIZE, tiny_model, tiny_tokenizer

# rows of an expert are multiples of 64 bytes, as in every real model: then a delta of zero changes no bit
FAMILIES = {
    "deepseek_v2": {"moe_intermediate_size": 32},
    "mixtral": {"intermediate_size": 32},
    "gpt_oss": {"intermediate_size": 32},
}


def made_base(
    folder: Path,
    family: str = "deepseek_v2",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: object,
) -> LoadedModel:
    """A base that `metier.load` loaded from `folder`, where it is written first."""
    model = tiny_model(family, seed=seed, **FAMILIES[family], **changes).to(dtype)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return metier.load(folder)


def made_adapter(
    model: nn.Module, *, experts: dict[int, list[int]] | None = None, step: float = 0.05
) -> peft.PeftModel:
    """`model` with an adapter of which every value has moved, by about `step`."""
    experts = experts or {layer.index: [1, 3] for layer in moe_layers(model)}
    wrapped = peft.get_peft_model(model, EsftConfig(experts=experts))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "esft_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(step * (noise + noise.sign()))
    return wrapped.eval()


def rows_of(wrapped: nn.Module, adapter_name: str = "default") -> dict[str, nn.Parameter]:
    """The adapter's rows by their name in a delta."""
    end = f".{adapter_name}"
    return {n.removesuffix(end): p for n, p in wrapped.named_parameters() if "esft_" in n and n.endswith(end)}


def stored_rows(folder: Path) -> dict[str, Tensor]:
    """What a delta's file holds, without the expert ids."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(".esft_expert_ids")}


def tokens() -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (3, 40), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=tokens()).logits
    return result


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert [name for name in after if not torch.equal(after[name], before[name])] == []
