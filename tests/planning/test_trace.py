"""A step under fake tensors counts what the real step computes and allocates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from metier.config import RunConfig
from metier.methods.wrap import wrap
from metier.models.moe import moe_layers
from metier.models.skeleton import skeleton_of
from metier.planning.trace import LARGE, Tracer
from metier.routing.selection import ExpertSelection
from tiny_models import tiny_model

SELECTION = ExpertSelection(experts={1: (2, 5), 2: (0, 3)})
IDS = torch.arange(3, 3 + 4 * 40).view(4, 40) % 200


def step(model: nn.Module, tracer: Tracer) -> tuple[int, int, int]:
    """Peak bytes, operations and floating-point operations of a forward and a backward pass."""
    for tensor in (*model.parameters(), *model.buffers()):
        tracer.memory.known(tensor)
    with tracer:
        hidden_BTD: Tensor = model(input_ids=IDS, use_cache=False).logits
        hidden_BTD.float().log_softmax(-1).sum().backward()
    return tracer.memory.peak, tracer.operations.count, tracer.operations.flops


def without_numbers(model: nn.Module, routes: dict[str, Tensor]) -> FakeTensorMode:
    """Make a skeleton's parameters fake, and let its experts have those routes."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def faked(tensor: Tensor) -> Tensor:
        return fake.fake_tensor_converter.from_meta_and_device(fake, tensor.detach(), torch.device("cpu"))

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(faked(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = faked(buffer)
    for layer in moe_layers(model):
        layer.entry.register_forward_pre_hook(lambda _, args, path=layer.path: (args[0], routes[path], *args[2:]))
    return fake


@pytest.mark.parametrize("method", ["esft", "expert_lora"])
def test_a_fake_step_counts_what_the_real_one_does(method: str) -> None:
    config = RunConfig(
        model="m", dataset="d", output_dir="o", method=method, **({"lora_r": 4} if "lora" in method else {})
    )
    base = tiny_model("deepseek_v2")
    model = wrap(base, config, SELECTION).train()
    routes: dict[str, Tensor] = {}
    hooks = [
        layer.entry.register_forward_pre_hook(lambda _, args, path=layer.path: routes.update({path: args[1]}))
        for layer in moe_layers(model)
    ]
    model(input_ids=IDS)
    for hook in hooks:
        hook.remove()
    skeleton = skeleton_of(base.config, name="tiny", dtype=torch.float32)
    with torch.device("meta"):
        wrapped = wrap(skeleton, config, SELECTION).train()
    for layer in moe_layers(wrapped):
        for name in layer.entry._ids():
            layer.entry._ids()[name] = torch.tensor(SELECTION.experts[layer.index])
    fake = without_numbers(wrapped, routes)
    peak, count, flops = step(model, Tracer(None))
    fake_peak, fake_count, fake_flops = step(wrapped, Tracer(fake))
    assert (fake_count, fake_flops) == (count, flops)
    assert fake_peak == pytest.approx(peak, rel=0.01)
    assert all(parameter.grad is not None for parameter in wrapped.parameters() if parameter.requires_grad)


def test_memory_is_what_is_held_and_the_most_that_was() -> None:
    kept, tracer = torch.ones(1000), Tracer(None)
    tracer.memory.known(kept)
    with tracer:
        doubled = kept * 2
        view = doubled.view(10, 100)
        summed = view + 1
        assert tracer.memory.live == tracer.memory.peak == 2 * 4000
        del doubled, view
        assert tracer.memory.live == 4000
        kept.add_(1)
        smaller = summed[:10].sum()
    assert (tracer.memory.live, tracer.memory.peak) == (4000 + smaller.nbytes, 2 * 4000)
    # a product, a sum, one in place and a sum over all; views move nothing
    assert tracer.operations.count == 4
    assert tracer.operations.bytes_moved == 2 * 8000 + 8000 + 4000 + 4


def test_large_blocks_are_counted_each_time_they_are_made_and_small_ones_while_they_are_held() -> None:
    tracer = Tracer(None)
    with tracer:
        for _ in range(3):
            large = torch.ones(LARGE // 4)
            small = torch.ones(100)
            del large
    assert tracer.memory.made_large == 3 * LARGE
    assert tracer.memory.live_small == small.nbytes
    assert tracer.memory.live == small.nbytes


def test_what_is_made_takes_whole_multiples():
    tracer = Tracer(None, granularity=512)
    with tracer:
        kept = [torch.ones(size) for size in (1, 128, 129)]
    assert tracer.memory.live == 512 + 512 + 1024
    del kept
    assert tracer.memory.live == 0
