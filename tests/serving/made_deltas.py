"""A tiny base, and a delta of each kind on it, in folders."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import PreTrainedModel

from deltas.made import FAMILIES, made_adapter
from metier.deltas.save import save_delta
from metier.methods.expert_lora import ExpertLoraConfig
from tiny_models import tiny_model

EXPERTS = {1: [0, 3, 5], 2: [2]}


def made_model(family: str = "deepseek_v2", *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    model = tiny_model(family, seed=seed, **FAMILIES.get(family, {})).to(dtype)
    model.name_or_path = "tiny"
    return model.eval()


def move(wrapped: nn.Module, marker: str) -> None:
    """Give every value of an adapter whose name has `marker` a random one."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if marker in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def save_esft(
    model: nn.Module,
    folder: Path,
    *,
    experts: dict[int, list[int]] = EXPERTS,
    step: float = 0.05,
    dtype: torch.dtype | None = None,
) -> Path:
    wrapped = made_adapter(model, experts=experts, step=step)
    save_delta(wrapped, folder, dtype=dtype)
    wrapped.unload()
    return folder


def save_expert_lora(model: nn.Module, folder: Path, **options: Any) -> Path:
    options = {"r": 4, "lora_alpha": 8, "ranks": {1: {3: 2}}, **options}
    wrapped = peft.get_peft_model(model, ExpertLoraConfig(experts=EXPERTS, **options))
    move(wrapped, "_B.")
    save_delta(wrapped, folder)
    wrapped.unload()
    return folder


def save_lora(model: nn.Module, folder: Path, *, saves_embeddings: bool = False, **options: Any) -> Path:
    """PEFT's own LoRA, with every factor moved."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj", "kv_b_proj"], **options}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    move(wrapped, "lora_")
    wrapped.save_pretrained(str(folder), save_embedding_layers=saves_embeddings)
    wrapped.unload()
    return folder


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def alter_last_byte(folder: Path) -> None:
    """Of the tensors, leaving no trace but in the content."""
    path = folder / "adapter_model.safetensors"
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
