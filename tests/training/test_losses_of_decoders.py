"""What a run lowers is the loss of the logits that the model answers with: every decoder that transformers has."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from families.chain import made_model
from families.configs import tiny_config
from metier.config import RunConfig
from metier.data.collate import Collator
from metier.data.encode import Encoded
from metier.training.trainer import make_trainer
from tiny_models import tiny_tokenizer

ITEMS = [
    Encoded(list(range(5, 25)), [-100] * 15 + list(range(20, 25)), "long"),
    Encoded(list(range(7, 14)), [-100] * 4 + list(range(11, 14)), "short"),
    Encoded(list(range(30, 36)), list(range(30, 36)), "all of it"),
]
NUM_LABELLED = 5 + 3 + 5


def made() -> Iterator[tuple[str, PreTrainedModel]]:
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        try:
            if kind().is_encoder_decoder:
                continue
            model = made_model(tiny_config(kind.model_type))
        except Exception:
            continue
        yield kind.model_type, model


def loss_of_logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    given = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**given, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=-100)


@pytest.mark.slow
def test_every_decoder_trains_on_its_own_logits(configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    logging.disable(logging.WARNING)
    rows = [{"input_ids": i.input_ids, "labels": i.labels, "origin": i.origin} for i in ITEMS]
    batch = {name: value for name, value in Collator(0)(rows).items() if isinstance(value, Tensor)}
    agree, differ, without = [], {}, {}
    for kind, model in made():
        output = model.get_output_embeddings()
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                for parameter in output.parameters() if output is not None else ():
                    parameter.mul_(30)
                model.eval()
                wanted = float(loss_of_logits(model, batch))
                config = configure(method="full")
                trainer = make_trainer(
                    model, tiny_tokenizer(), ITEMS, config, tmp_path / kind, eval_items=None, callbacks=[]
                )
                trainer.model.eval()
                got = float(trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(13)))
        except Exception as error:
            without[kind] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        if abs(got - wanted) < 1e-4 * max(1, abs(wanted)):
            agree.append(kind)
        else:
            differ[kind] = (got, wanted)
    print("agree", len(agree), agree)
    print("differ", differ)
    for kind, text in without.items():
        print("without", kind, text)
    assert not differ
