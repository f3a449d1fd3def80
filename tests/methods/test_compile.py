"""`torch.compile` of a model with an adapter: the same results, and no new graph when the router changes its mind."""

from __future__ import annotations

import peft
import pytest
import torch
from torch._dynamo.utils import counters

from metier.methods.esft import EsftConfig
from metier.methods.expert_lora import ExpertLoraConfig
from tiny_models import VOCAB_SIZE, tiny_model

EXPERTS = {1: [0, 5], 2: [3]}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}
"""float32; compiled graphs may add in another order."""


def adapted(config: peft.PeftConfig) -> peft.PeftModel:
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model("deepseek_v2"), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "_B." in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def loss_and_gradients(model: torch.nn.Module, input_ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = model(input_ids=input_ids, labels=input_ids).loss
    return loss.detach(), list(torch.autograd.grad(loss, trained))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(EsftConfig(experts=EXPERTS), id="esft"),
        pytest.param(ExpertLoraConfig(experts=EXPERTS, r=4), id="expert_lora", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_model_trains_as_the_plain_one_and_soon_stops_compiling(config: peft.PeftConfig) -> None:
    torch._dynamo.reset()
    plain, compiled = adapted(config), adapted(config)
    compiled.compile(backend="aot_eager")
    batches = [torch.randint(3, VOCAB_SIZE, (2, 33), generator=torch.Generator().manual_seed(n)) for n in range(4)]
    counters.clear()
    graphs = []
    for input_ids in batches:
        loss, gradients = loss_and_gradients(compiled, input_ids)
        want_loss, want_gradients = loss_and_gradients(plain, input_ids)
        torch.testing.assert_close(loss, want_loss, **TOLERANCE)
        assert all(gradient.any() for gradient in gradients)
        torch.testing.assert_close(gradients, want_gradients, **TOLERANCE)
        graphs.append(counters["stats"]["unique_graphs"])
    # the second batch may show the compiler what changes from batch to batch; after it nothing is new
    assert 0 < graphs[1] < 20
    assert graphs[1:] == [graphs[1]] * (len(batches) - 1)
