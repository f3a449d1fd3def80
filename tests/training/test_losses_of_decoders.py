"""What a run lowers is the loss of the logits that the model answers with: of every decoder that transformers has."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

from families.chain import made_model
from families.configs import tiny_config
from labelled_items import ITEMS, NUM_LABELLED, batch_of
from metier.config import RunConfig
from metier.training.trainer import make_trainer
from tiny_models import tiny_tokenizer

ANSWER_NOTHING = {
    # as they are made here
    "dbrx", "glm46v", "glm4v", "glm_ocr", "glmga", "longcat_flash", "paddleocr_vl", "qwen2_5_omni_thinker", "qwen2_5_vl", "xmod",
    # to text alone, or one token after the other
    "blip", "blip-2", "diffusion_gemma", "instructblip", "instructblipvideo", "pi0", "voxtral_realtime",
}  # fmt: skip
LEAST = 200


def made() -> Iterator[tuple[str, PreTrainedModel]]:
    """Every decoder that can be made tiny by a table of names."""
    for kind in {**MODEL_FOR_CAUSAL_LM_MAPPING, **MODEL_FOR_MULTIMODAL_LM_MAPPING}:
        try:
            if kind().is_encoder_decoder:
                continue
            model = made_model(tiny_config(kind.model_type))
        except Exception:  # what belongs together in some families, no table knows
            continue
        yield kind.model_type, model.eval()


def loss_of_logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> float:
    given = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**given, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    return float(torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=-100))


@pytest.mark.slow
def test_every_decoder_trains_on_its_own_logits(configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    batch = batch_of(ITEMS)
    losses, failed = {}, {}
    logging.disable(logging.WARNING)
    try:
        for kind, model in made():
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                # so that what is done to logits shows: they are large
                for parameter in getattr(model.get_output_embeddings(), "parameters", list)():
                    parameter.mul_(30)
                try:
                    wanted = loss_of_logits(model, batch)
                except Exception as error:
                    failed[kind] = error
                    continue
                config, folder = configure(method="full"), tmp_path / kind
                trainer = make_trainer(model, tiny_tokenizer(), ITEMS, config, folder, eval_items=None, callbacks=[])
                trainer.model.eval()
                got = float(
                    trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(NUM_LABELLED))
                )
            losses[kind] = (got, wanted)
    finally:
        logging.disable(logging.NOTSET)
    assert failed.keys() == ANSWER_NOTHING, failed
    assert len(losses) >= LEAST, sorted(losses)
    others = {kind: pair for kind, pair in losses.items() if pair[0] != pytest.approx(pair[1], rel=1e-4)}
    assert not others
