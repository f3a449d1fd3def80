"""ESFT in the trainers that people have: transformers' Trainer and TRL's SFTTrainer, without metier's run around it."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from metier.methods.esft import EsftConfig
from tiny_models import tiny_model, tiny_tokenizer

EXPERTS = {1: [1, 4], 2: [7]}


def check(model: peft.PeftModel, before: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.unload().state_dict().items():
        assert torch.equal(tensor, before[name]), name


def moved(model: peft.PeftModel) -> bool:
    base = model.get_base_model()
    rows = base.model.layers[1].mlp.experts.esft_down_proj["default"]
    return bool((rows != base.model.layers[1].mlp.experts.base_layer.down_proj[[1, 4]]).flatten(1).any(1).all())


def test_transformers_trainer(tmp_path: Path) -> None:
    base, tokenizer = tiny_model("deepseek_v2"), tiny_tokenizer()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = peft.get_peft_model(base, EsftConfig(experts=EXPERTS))
    data = Dataset.from_list([tokenizer(f"record {n} of a few") for n in range(12)])
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, learning_rate=1e-2, weight_decay=0.5, report_to="none", save_steps=3
        ),
        train_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    assert moved(model)
    again = peft.PeftModel.from_pretrained(tiny_model("deepseek_v2"), tmp_path / "checkpoint-3")
    assert moved(again)
    check(model, before)


def test_sft_trainer_makes_the_adapter_from_its_configuration(tmp_path: Path) -> None:
    base = tiny_model("deepseek_v2")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    data = Dataset.from_list([{"prompt": f"say {n}", "completion": f" it is {n}"} for n in range(12)])
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=str(tmp_path), max_steps=3, learning_rate=1e-2, weight_decay=0.5, report_to="none", bf16=False
        ),
        train_dataset=data,
        processing_class=tiny_tokenizer(),
        peft_config=EsftConfig(experts=EXPERTS),
    )
    trainer.train()
    assert moved(trainer.model)
    check(trainer.model, before)
