"""Which of transformers' decoders have feed-forward blocks that an adapter can stand beside."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from metier.errors import UnsupportedModelError
from metier.models.feed_forward import feed_forward_paths, hidden_size_of

ENCODERS_AS_DECODERS = {
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "git", "megatron-bert",
    "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "trocr", "xlm", "xlm-roberta",
    "xlm-roberta-xl", "xlnet", "xmod",
}  # fmt: skip
COMPUTED_BY_THE_LAYER = {"biogpt", "opt", "xglm"}
WITHOUT_BLOCKS = {"falcon_mamba", "mamba", "mamba2"}
BUILT_OTHERWISE = {"blt", "nemotron_h", "zamba", "zamba2"}
REFUSED = ENCODERS_AS_DECODERS | COMPUTED_BY_THE_LAYER | WITHOUT_BLOCKS | BUILT_OTHERWISE
"""As docs/meft.md says."""
LEAST_SUPPORTED = 130


def made() -> Iterator[tuple[str, torch.nn.Module]]:
    """Every decoder that its default configuration can make, with two layers where one number says how many."""
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        try:
            config: PreTrainedConfig = kind()
            if config.is_encoder_decoder:
                continue
            for name in ("num_hidden_layers", "n_layer", "num_layers"):
                if isinstance(getattr(config, name, None), int) and not getattr(config, "layer_types", None):
                    setattr(config, name, 2)
                    break
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except Exception:  # some defaults belong together with no model
            continue
        yield kind.model_type, model


@pytest.mark.slow
def test_decoders_have_blocks_but_for_those_that_the_docs_name() -> None:
    logging.disable(logging.WARNING)
    supported, refused = set(), set()
    try:
        for kind, model in made():
            try:
                assert len(feed_forward_paths(model)) >= 1
                assert hidden_size_of(model) > 0
                supported.add(kind)
            except UnsupportedModelError:
                refused.add(kind)
    finally:
        logging.disable(logging.NOTSET)
    assert refused == REFUSED
    assert len(supported) >= LEAST_SUPPORTED
