"""A tiny base in a folder, and deltas of each kind that a server takes, as their files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import torch
from peft import LoraConfig, PeftModel

from deltas.made import made_base
from metier.deltas.save import save_delta
from metier.methods.esft import EsftConfig
from metier.methods.expert_lora import ExpertLoraConfig
from metier.models.load import LoadedModel
from metier.models.moe import moe_layers

STEP = 0.3
"""By which a value moves: far enough for other tokens to be the likeliest."""


def base_in(folder: Path, family: str = "mixtral", **changes: object) -> LoadedModel:
    return made_base(folder, family, **changes)


def esft_in(folder: Path, base: LoadedModel, *, seed: int = 0, experts: dict[int, list[int]] | None = None) -> Path:
    experts = experts or {layer.index: [0, 2] for layer in moe_layers(base.model)}
    return _saved(folder, base, EsftConfig(experts=experts), save_delta, seed=seed)


def expert_lora_in(folder: Path, base: LoadedModel, *, seed: int = 0) -> Path:
    experts = {layer.index: [1, 2] for layer in moe_layers(base.model)}
    return _saved(folder, base, ExpertLoraConfig(experts=experts, r=4, lora_alpha=8), save_delta, seed=seed)


def lora_in(
    folder: Path, base: LoadedModel, *, seed: int = 0, target_modules: Sequence[str] = ("q_proj", "o_proj")
) -> Path:
    config = LoraConfig(target_modules=list(target_modules), r=4, lora_alpha=8)
    return _saved(
        folder, base, config, lambda model, path: model.save_pretrained(path, save_embedding_layers=False), seed=seed
    )


KINDS: dict[str, Callable[..., Path]] = {"esft": esft_in, "expert_lora": expert_lora_in, "lora": lora_in}


def merged(base: LoadedModel, folder: Path) -> torch.nn.Module:
    """The base with a delta merged by PEFT."""
    model = PeftModel.from_pretrained(copy.deepcopy(base.model), folder)
    return model.merge_and_unload().eval()


def _saved(folder: Path, base: LoadedModel, config: object, save: Callable[..., None], *, seed: int) -> Path:
    model = peft.get_peft_model(copy.deepcopy(base.model), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(STEP * torch.randn(parameter.shape, generator=generator))
    save(model, folder)
    return folder
