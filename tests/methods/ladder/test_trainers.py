"""A ladder in the trainers that people have: transformers' Trainer and TRL's SFTTrainer."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from metier.methods.ladder import LadderConfig
from tiny_models import tiny_model, tiny_tokenizer

OPTIONS = {"max_steps": 3, "learning_rate": 1e-2, "weight_decay": 0.5, "report_to": "none"}


def check(model: peft.PeftModel, before: dict[str, torch.Tensor]) -> None:
    """The head has moved from 0, and nothing of the base has."""
    base = model.get_base_model()
    assert base.model.norm.ladder_head["default"].up.abs().max() > 0
    now = {name.replace("base_layer.", ""): tensor for name, tensor in base.state_dict().items()}
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


def test_transformers_trainer(tmp_path: Path) -> None:
    base, tokenizer = tiny_model("llama"), tiny_tokenizer()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = peft.get_peft_model(base, LadderConfig(reduction=4))
    data = Dataset.from_list([tokenizer(f"record {n} of a few") for n in range(12)])
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), save_steps=3, use_cpu=True, bf16=True, **OPTIONS),
        train_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    check(model, before)
    again = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "checkpoint-3")
    check(again, before)


def test_sft_trainer_with_checkpointing_makes_the_adapter_from_its_configuration(tmp_path: Path) -> None:
    base = tiny_model("deepseek_v2")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    data = Dataset.from_list([{"prompt": f"say {n}", "completion": f" it is {n}"} for n in range(12)])
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(output_dir=str(tmp_path), bf16=False, gradient_checkpointing=True, **OPTIONS),
        train_dataset=data,
        processing_class=tiny_tokenizer(),
        peft_config=LadderConfig(reduction=4),
    )
    trainer.train()
    check(trainer.model, before)
