"""A random two-layer MoE model and a byte-pair tokenizer, small enough to make for every test session."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, PreTrainedTokenizerFast

TEXT = "the quick brown fox jumps over the lazy dog and says: why, 42 foxes? größer als gut; что это такое\n"
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

MakeModel = Callable[[], DeepseekV2ForCausalLM]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([TEXT] * 4, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    made.chat_template = CHAT_TEMPLATE
    return made


@pytest.fixture(scope="session")
def make_model(tokenizer: PreTrainedTokenizerFast) -> MakeModel:
    config = DeepseekV2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        kv_lora_rank=16,
        q_lora_rank=None,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.3,  # large, so that greedy choices are far from ties
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

    def make() -> DeepseekV2ForCausalLM:
        torch.manual_seed(0)
        return DeepseekV2ForCausalLM(config).float().eval()

    return make


@pytest.fixture(scope="session")
def model(make_model: MakeModel) -> DeepseekV2ForCausalLM:
    """Shared: no test may change it."""
    return make_model()


PAIRS = [
    ("why", "the lazy dog"),
    ("the quick brown fox jumps over the lazy dog and says", "42 foxes"),
    ("gut", "größer"),
    ("что это такое? the fox", "dog"),
    ("over", "the brown fox"),
]


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """A task of five records with two metrics."""
    folder = tmp_path / "foxes"
    folder.mkdir()
    lines = [
        json.dumps({"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]})
        for a, b in PAIRS
    ]
    (folder / "test.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "validation.jsonl").write_text(lines[0] + "\n", encoding="utf-8")
    (folder / "task.json").write_text(
        json.dumps({"name": "foxes", "metrics": ["chrf", "exact_match"], "description": "d", "max_new_tokens": 6})
    )
    return folder


@pytest.fixture
def general_folder(tmp_path: Path) -> Path:
    """Two domains and three cloze items."""
    folder = tmp_path / "general"
    folder.mkdir()
    (folder / "foxes.txt").write_text(
        "the quick brown fox\njumps\n<|endoftext|>\nover the lazy dog\n", encoding="utf-8"
    )
    (folder / "words.txt").write_text("größer als gut\n<|endoftext|>\nчто это\n", encoding="utf-8")
    items = [
        {"context": "the quick", "options": ["brown", "lazy", "over", "dog"], "answer": 0, "domain": "foxes"},
        {"context": "the lazy", "options": ["fox", "dog", "why", "says"], "answer": 1, "domain": "foxes"},
        {"context": "größer als ", "options": ["gut", "the", "und", "42"], "answer": 0, "domain": "words"},
    ]
    (folder / "cloze.jsonl").write_text("\n".join(json.dumps(item) for item in items), encoding="utf-8")
    return folder
