"""One training step of a run, traced without a number: what each part of it computes, keeps and holds at most.

The run's own model code runs under fake tensors, with our autograd functions, checkpointing and TRL's loss in it.
Layers repeat, so of each kind one is traced, and stands for the others (`StepTrace.repeated`).
"""

# B rows of a batch, T tokens, K top_k

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from trl.trainer import utils as trl_head

from metier.catalogue.tree import method_of
from metier.config import RunConfig
from metier.data.encode import IGNORED
from metier.errors import UnsupportedModelError
from metier.memory.step_gradients import step_gradients_of
from metier.methods.expert_layer import ExpertTunerLayer
from metier.methods.meft import MeftLayer
from metier.models.labelled_output import labelled_output
from metier.models.layers import layer_stacks
from metier.models.load import first_line
from metier.models.moe import MoELayer, is_dense, moe_layers
from metier.planning.from_config import Skeleton
from metier.planning.routes import Chances, drawn
from metier.planning.segments import Segment, StepTrace
from metier.planning.trace import Operations, Tracer


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward and backward pass gets."""

    num_rows: int
    num_tokens: int
    """Of a row, padding included."""
    labelled_share: float = 1.0
    """Of the tokens, those that have a loss; the output layer computes no others."""

    def labels_BT(self) -> Tensor:
        labels = torch.full((self.num_rows, self.num_tokens), IGNORED)
        num_labelled = max(1, round(self.labelled_share * self.num_tokens))
        labels[:, self.num_tokens - num_labelled :] = 1
        return labels


def trace_step(
    config: RunConfig,
    skeleton: Skeleton,
    batch: Batch,
    *,
    chances: Chances | None = None,
    seed: int = 0,
    is_reserved: bool = False,
) -> StepTrace:
    """Forward and backward pass over one batch, with every layer's part; the optimizer's step is not in it.

    Args:
        config: the run; its `gradient_checkpointing` counts.
        skeleton: of `run_skeleton`; it is used up.
        batch: its size. Each token's experts are drawn at random.
        chances: of a layer's experts; those of layers that are not there are all as likely.
        seed: of the draw.
        is_reserved: whether tensors take memory before they are written, as on an accelerator.

    Raises:
        UnsupportedModelError: the model's step cannot be traced.
    """
    try:
        return _traced(config, skeleton, batch, chances or {}, seed, is_reserved)
    except UnsupportedModelError:
        raise
    except Exception as error:  # a family's own code meets tensors without numbers: whatever it does then
        name = type(skeleton.model).__name__
        raise UnsupportedModelError(f"{name}: its step cannot be traced ({first_line(error)}).") from error


def _traced(
    config: RunConfig, skeleton: Skeleton, batch: Batch, chances: Chances, seed: int, is_reserved: bool
) -> StepTrace:
    if config.method == "meft" and config.meft_semantics == "union":
        raise UnsupportedModelError(
            "which rows a batch has in common depends on numbers, which a trace has none of: the step of a sparse "
            "adapter with meft_semantics: union cannot be traced."
        )
    if reason := method_of(config.method).not_traced:
        raise UnsupportedModelError(f"{config.method}: its step is not foreseen, for {reason}.")
    model = skeleton.model.train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if isinstance(model, PeftModel):
            model.enable_input_require_grads()
    _fill_ids(model, skeleton)
    fake = _without_numbers(model)
    experts = [] if is_dense(model) else moe_layers(model)
    tracer = Tracer(fake)
    bare: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    trl_head.add_fused_lm_head(bare, outputs=("log_probs", "entropy", "is_top1"))
    stores = [store for m in model.modules() if isinstance(m, MeftLayer) for store in m.stores.values()]
    rows = [room for store in stores for room in (store.arrays["rows"], store.gradients) if room is not None]
    for tensor in (*model.parameters(), *model.buffers(), *rows, *_gradient_rooms(model, fake)):
        tracer.memory.known(tensor)
    marks = _Marks(tracer)
    order = _cut_to_some_of_a_kind(model, marks)
    routed = _route([layer for layer in experts if layer.index in order], batch, chances, seed)
    labels_BT = batch.labels_BT()
    inputs = {"input_ids": torch.ones_like(labels_BT), "attention_mask": torch.ones_like(labels_BT)}
    hook = bare.base_model.register_forward_hook(labelled_output(labels_BT[:, 1:] != IGNORED))
    try:
        with tracer, nullcontext() if is_reserved else columns_that_are_written(bare):
            # as accelerate has it: around the model alone
            with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
                # made in the step, as the trainer has it
                shift_labels = labels_BT[:, 1:][labels_BT[:, 1:] != IGNORED][None]
                outputs = model(**inputs, shift_labels=shift_labels, fused_lm_head=True)
                del shift_labels
            loss = -outputs.log_probs.sum()
            entropy, is_top1 = outputs.entropy.detach().sum(), outputs.is_top1.sum()
            marks.come_to("backward", None)
            loss.backward()
            del outputs, loss, entropy, is_top1
        marks.come_to("end", None)
    finally:
        hook.remove()
        routed()
    return StepTrace(tuple(marks.segments), tuple(order))


@contextmanager
def columns_that_are_written(model: PreTrainedModel) -> Iterator[None]:
    """TRL makes room for logits of 32,768 tokens of a vocabulary at a time, which a smaller one writes a part of.

    On a CPU the rest takes no memory.
    """
    width = trl_head._CHUNKED_LOGPROB_CHUNK_SIZE
    trl_head._CHUNKED_LOGPROB_CHUNK_SIZE = min(width, model.config.get_text_config().vocab_size)
    try:
        yield
    finally:
        trl_head._CHUNKED_LOGPROB_CHUNK_SIZE = width


def _fill_ids(model: nn.Module, skeleton: Skeleton) -> None:
    """Which experts an adapter has is real, as all integers are; so is the order of a prompt's virtual tokens."""
    prompts = getattr(model, "prompt_tokens", {})
    for name, tokens in prompts.items():
        prompts[name] = torch.arange(len(tokens))
    for module in model.modules():
        if isinstance(module, ExpertTunerLayer) and skeleton.selection is not None:
            ids = getattr(module, module.ids_name)
            for name in ids:
                ids[name] = torch.tensor(skeleton.selection.experts[module.layer_index])


def _without_numbers(model: nn.Module) -> FakeTensorMode:
    """Make every parameter and every floating-point buffer fake, shared ones as shared as they were."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Any] = {}

    def faked(tensor: Tensor) -> Tensor:
        converter = fake.fake_tensor_converter
        return converter.from_meta_and_device(fake, tensor.detach(), torch.device("cpu"))

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                # the old one is kept too, so that no other gets its id
                new = nn.Parameter(faked(parameter), requires_grad=parameter.requires_grad)
                made[id(parameter)] = (new, parameter)
                gradients = step_gradients_of(parameter)
                if gradients is not None:
                    gradients.holder = new
                    new.step_gradients = gradients  # type: ignore[attr-defined]
            module._parameters[name] = made[id(parameter)][0]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = faked(buffer)
        for store in module.stores.values() if isinstance(module, MeftLayer) else ():
            rows = store.arrays["rows"]
            store.arrays["rows"] = faked(rows)
            if store.tier == "disk":
                # it would be made as a file
                store.gradients = faked(torch.empty_like(rows, dtype=torch.float32))
    return fake


def _gradient_rooms(model: nn.Module, fake: FakeTensorMode) -> list[Tensor]:
    """Where rows of a sparse adapter have their gradients: room that is there from the second step on."""
    found = (step_gradients_of(parameter) for parameter in model.parameters())
    with fake:
        return [gradients.reserve(torch.device("cpu")) for gradients in found if gradients is not None]


def _route(layers: Sequence[MoELayer], batch: Batch, chances: Chances, seed: int) -> Callable[[], None]:
    """Give layers' experts routes of their own; returns what takes them away again."""
    num_tokens = batch.num_rows * batch.num_tokens
    hooks = []
    for layer in layers:
        generator = torch.Generator().manual_seed(seed + layer.index)
        if layer.index in chances:
            expert_ids_TK = drawn(chances[layer.index], num_tokens, layer.top_k, generator)
        else:
            chances_TE = torch.ones(num_tokens, layer.num_experts)
            expert_ids_TK = torch.multinomial(chances_TE, layer.top_k, generator=generator)
        hooks.append(layer.entry.register_forward_pre_hook(_with_routes(expert_ids_TK)))

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    return remove


def _with_routes(expert_ids_TK: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def put(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0], expert_ids_TK, *args[2:])

    return put


class _Marks:
    """Cuts what a tracer sees into segments."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer, self.segments = tracer, list[Segment]()
        self._now: tuple[str, int | None] = ("forward", None)
        self._start()

    def _start(self) -> None:
        memory = self.tracer.memory
        memory.peak = self._live = memory.live
        self._small, self._large = memory.live_small, memory.made_large
        self.tracer.operations = Operations()

    def come_to(self, phase: str, layer: int | None) -> None:
        """What comes now is another part."""
        memory = self.tracer.memory
        self.segments.append(
            Segment(
                phase=self._now[0],
                layer=self._now[1],
                kept_bytes=memory.live - self._live,
                peak_bytes=memory.peak - self._live,
                fresh_bytes=memory.made_large - self._large + max(0, memory.live_small - self._small),
                operations=self.tracer.operations,
            )
        )
        self._now = (phase, layer)
        self._start()


class _InPlace(nn.Module):
    """Stands where a layer stood: calls it and says when it begins and ends, both ways; without marks skips it."""

    def __init__(self, layer: nn.Module, number: int, marks: _Marks | None) -> None:
        super().__init__()
        self.layer, self.number, self._marks = layer, number, marks

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        marks, number = self._marks, self.number
        hidden = args[0] if args else kwargs["hidden_states"]
        if marks is None:
            return hidden
        if number == 0 and hidden.requires_grad:
            hidden.register_hook(lambda _: marks.come_to("backward", None))
        marks.come_to("forward", number)
        out = self.layer(*args, **kwargs)
        hidden = out[0] if isinstance(out, tuple) else out
        if hidden.requires_grad:
            hidden.register_hook(lambda _: marks.come_to("backward", number))
        marks.come_to("forward", None)
        return out


def _cut_to_some_of_a_kind(model: nn.Module, marks: _Marks) -> list[int]:
    """Leave two layers of each kind, and the last one; returns which of them stands for each layer.

    The first of a kind frees what it shared with those after it, and what comes after the last one is different, so
    those stand for themselves alone.
    """
    layers = _layers(model)
    kinds = list(_kinds(model, layers))
    last = len(kinds) - 1
    firsts = {kind: number for number, kind in reversed(list(enumerate(kinds)))}
    alone = {*firsts.values(), last}
    others = {kind: number for number, kind in enumerate(kinds) if number not in alone}
    order = [number if number in alone else others[kind] for number, kind in enumerate(kinds)]
    for number, layer in enumerate(layers):
        layers[number] = _InPlace(layer, number, marks if number in order else None)
    return order


def _layers(model: nn.Module) -> nn.ModuleList:
    found = layer_stacks(model)
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__}: has {len(found)} stacks of layers, expected one; its step cannot be traced."
        )
    return found[0]


def _kinds(model: nn.Module, layers: nn.ModuleList) -> Iterator[Hashable]:
    """What a layer's part in a step depends on."""
    first = id(next(layers.parameters()))
    is_trained_before = False
    for parameter in model.parameters():
        if id(parameter) == first:
            break
        is_trained_before |= parameter.requires_grad
    for layer in layers:
        named = tuple(
            (name, tuple(parameter.shape), parameter.dtype, parameter.requires_grad)
            for name, parameter in layer.named_parameters()
        )
        kind = getattr(layer, "attention_type", getattr(layer, "layer_type", None))
        windows = tuple(getattr(module, "sliding_window", None) for module in layer.modules())
        yield type(layer), named, kind, windows, is_trained_before
        is_trained_before |= any(parameter.requires_grad for parameter in layer.parameters())
