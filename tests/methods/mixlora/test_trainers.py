"""A mixture of LoRA experts in TRL's SFTTrainer."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from metier.methods.mixlora import MixLoraConfig
from tiny_models import tiny_model, tiny_tokenizer


def test_sft_trainer_with_checkpointing_makes_the_adapter_from_its_configuration(tmp_path: Path) -> None:
    base = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    data = Dataset.from_list([{"prompt": f"say {n}", "completion": f" it is {n}"} for n in range(12)])
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            learning_rate=1e-2,
            weight_decay=0.5,
            report_to="none",
            bf16=False,
            gradient_checkpointing=True,
        ),
        train_dataset=data,
        processing_class=tiny_tokenizer(),
        peft_config=MixLoraConfig(num_experts=4, r=2),
    )
    trainer.train()
    now = {n.replace("base_layer.", ""): t for n, t in trainer.model.get_base_model().state_dict().items()}
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    pairs = [now[f"model.layers.1.mlp.mixlora_mixture.default.pairs.{expert}.down_b"] for expert in range(4)]
    assert all(matrix.abs().max() > 0 for matrix in pairs)
