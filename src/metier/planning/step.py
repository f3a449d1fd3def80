"""One training step of a run, traced without a number: what each part of it computes, keeps and holds at most.

The run's own model code runs under fake tensors, with our autograd functions, checkpointing and TRL's loss in it.
Layers repeat, so of each kind one is traced, and stands for the others (`StepTrace.repeated`).
"""

# B rows of a batch, T tokens, K top_k

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer import utils as trl_head

from metier.catalogue.tree import method_of
from metier.config import RunConfig
from metier.data.encode import IGNORED
from metier.data.pairs import mean_cross_entropy
from metier.errors import UnsupportedModelError
from metier.memory.collector import at_rest
from metier.memory.frozen_weight import FrozenWeight
from metier.methods.added_terms import added_term
from metier.methods.meft import MeftLayer
from metier.methods.mixlora import MixLoraLayer
from metier.models.labelled_output import labelled_output
from metier.models.load import first_line
from metier.models.moe import is_dense, moe_layers
from metier.models.own_logits import has_plain_head, own_logits
from metier.planning.drawn_routes import route
from metier.planning.from_config import Skeleton
from metier.planning.marks import Marks, cut_to_some_of_a_kind, only_stack
from metier.planning.routes import Chances
from metier.planning.segments import StepTrace
from metier.planning.trace import Tracer
from metier.planning.without_numbers import fill_ids, gradient_rooms, originals, show_entries, without_numbers

Rows = Literal["whole", "padded", "shared"]


def uneven_rows(config: RunConfig) -> Rows:
    """How a run lays records into rows that are not all as long."""
    return "shared" if config.padding_free else "padded"


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward and backward pass gets."""

    num_rows: int
    num_tokens: int
    """Of a row, padding included."""
    labelled_share: float = 1.0
    """Of the tokens, those that have a loss; the output layer computes no others."""
    rows: Rows = "whole"
    """One record each and all as long; all but one a bit shorter and padded; or all but one shared by records. But for
    the first, attention gets a mask: each layer keeps it, and keys and values for every head of queries."""

    @property
    def has_mask(self) -> bool:
        """Whether attention has more to leave out than what comes later."""
        return self.rows != "whole" and self.num_rows > 1 and self.num_tokens > 1

    def labels_BT(self) -> Tensor:
        labels = torch.full((self.num_rows, self.num_tokens), IGNORED)
        num_labelled = max(1, round(self.labelled_share * self.num_tokens))
        labels[:, self.num_tokens - num_labelled :] = 1
        return labels

    def inputs(self) -> dict[str, Tensor]:
        """As a collator gives them, (B, T), but for the labels."""
        ids_BT = torch.ones(self.num_rows, self.num_tokens, dtype=torch.int64)
        if self.rows == "shared":
            place_T = torch.arange(self.num_tokens)
            positions_BT = place_T.repeat(self.num_rows, 1)
            positions_BT[1:] %= max(1, self.num_tokens // 2)
            return {"input_ids": ids_BT, "position_ids": positions_BT}
        mask_BT = torch.ones_like(ids_BT)
        if self.has_mask:
            mask_BT[1:, -1] = 0
        return {"input_ids": ids_BT, "attention_mask": mask_BT}


def trace_step(
    config: RunConfig,
    skeleton: Skeleton,
    batch: Batch,
    *,
    chances: Chances | None = None,
    seed: int = 0,
    is_reserved: bool = False,
    granularity: int = 1,
) -> StepTrace:
    """Forward and backward pass over one batch, with every layer's part; the optimizer's step is not in it.

    Args:
        config: the run; its `gradient_checkpointing` counts.
        skeleton: of `run_skeleton`; it is used up.
        batch: its size. Each token's experts are drawn at random.
        chances: of a layer's experts; those of layers that are not there are all as likely.
        seed: of the draw.
        is_reserved: whether tensors take memory before they are written, as on an accelerator.
        granularity: bytes of which what is made takes whole multiples.

    Raises:
        UnsupportedModelError: the model's step cannot be traced.
    """
    try:
        with at_rest():
            return _traced(config, skeleton, batch, chances or {}, seed, is_reserved, granularity)
    except UnsupportedModelError:
        raise
    except Exception as error:  # a family's own code meets tensors without numbers: whatever it does then
        name = type(skeleton.model).__name__
        raise UnsupportedModelError(f"{name}: its step cannot be traced ({first_line(error)}).") from error


def _traced(
    config: RunConfig,
    skeleton: Skeleton,
    batch: Batch,
    chances: Chances,
    seed: int,
    is_reserved: bool,
    granularity: int,
) -> StepTrace:
    if config.method == "meft" and config.meft_semantics == "union":
        raise UnsupportedModelError(
            "which rows a batch has in common depends on numbers, which a trace has none of: the step of a sparse "
            "adapter with meft_semantics: union cannot be traced."
        )
    model = skeleton.model.train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if isinstance(model, PeftModel):
            model.enable_input_require_grads()
    fill_ids(model, skeleton)
    fake = without_numbers(model, skeleton.decoded, config.base_format)
    with fake:
        show_entries(model)
    experts = [] if is_dense(model) else moe_layers(model)
    procedure = method_of(config.method).optimizer
    if procedure == "lisa":
        rest_layers(model, config.procedure_options["lisa_layers"])
    for adapter in model.peft_config.values() if isinstance(model, PeftModel) else ():
        if hasattr(adapter, "random_drop_layers"):
            adapter.random_drop_layers = 0  # a step may drop none
    tracer = Tracer(fake, granularity=granularity)
    bare: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    trl_head.add_fused_lm_head(bare, outputs=("log_probs", "entropy", "is_top1"))
    stores = [store for m in model.modules() if isinstance(m, MeftLayer) for store in m.stores.values()]
    rows = [room for store in stores for room in (store.arrays["rows"], store.gradients) if room is not None]
    parameters = [weight for weight in model.parameters() if not isinstance(weight, FrozenWeight)]
    for tensor in (*parameters, *model.buffers(), *rows, *gradient_rooms(model, fake), *originals(model)):
        tracer.memory.known(tensor)
    marks = Marks(tracer)
    order = cut_to_some_of_a_kind(model, marks)
    routed = route([layer for layer in experts if layer.index in order], chances, seed)
    labels_BT, hooks = batch.labels_BT(), []
    inputs = batch.inputs()
    if procedure != "own_loss" and has_plain_head(bare):
        hooks.append(bare.base_model.register_forward_hook(labelled_output(labels_BT[:, 1:] != IGNORED)))
    try:
        with tracer, nullcontext() if is_reserved else columns_that_are_written(bare):
            if procedure == "mezo":
                with torch.no_grad():
                    _move_all(model)
                    _loss_of(model, inputs, labels_BT, config)
            else:
                loss, alive = _loss_of(model, inputs, labels_BT, config)
                marks.come_to("backward", None)
                loss.backward()
                del loss, alive
        marks.come_to("end", None)
    finally:
        for one in hooks:
            one.remove()
        routed()
    return StepTrace(tuple(marks.segments), tuple(order), config.num_forward_passes)


def _loss_of(
    model: PreTrainedModel | PeftModel, inputs: dict[str, Tensor], labels_BT: Tensor, config: RunConfig
) -> tuple[Tensor, tuple[Any, ...]]:
    """As the trainer has it: TRL's over the labelled positions, that of the model's own logits, or the model's own; and
    what the method adds.

    Returns:
        the loss, and what lives as long as it does.
    """
    # as accelerate has it: around the model alone
    around = torch.autocast("cpu", torch.bfloat16, enabled=config.bf16)
    alive: tuple[Any, ...]
    if method_of(config.method).optimizer == "own_loss":
        with around:
            loss, alive = model(**inputs, labels=labels_BT, use_cache=False).loss, ()
    elif not has_plain_head(model):
        with around:
            _, logits_BTV = own_logits(model, inputs, labels_BT.shape[1])
        loss = mean_cross_entropy(logits_BTV[:, :-1], labels_BT[:, 1:], 1)
        alive = ()
    else:
        with around:
            # made in the step, as the trainer has it
            shift_labels = labels_BT[:, 1:][labels_BT[:, 1:] != IGNORED][None]
            outputs = model(**inputs, shift_labels=shift_labels, fused_lm_head=True)
            del shift_labels
        loss = -outputs.log_probs.sum()
        alive = outputs, outputs.entropy.detach().sum(), outputs.is_top1.sum()
    if (term := added_term(config.method)) is not None:
        _fill_balance(model)
        loss = loss + term(model.base_model)
    return loss, alive


def _fill_balance(model: nn.Module) -> None:
    """Layers that are passed over have no loss of their routers' balance."""
    for module in model.modules():
        for balance in module.balance.values() if isinstance(module, MixLoraLayer) else ():
            if balance.value is None:
                balance.value = torch.zeros((), requires_grad=True)


def rest_layers(model: nn.Module, num_trained: int) -> None:
    """LISA trains some layers at a time; which ones makes no difference, for gradients go through all of them."""
    for number, layer in enumerate(only_stack(model)):
        layer.requires_grad_(number < num_trained)


def _move_all(model: nn.Module) -> None:
    """What MeZO does to all that is trained, twice for each of the two passes of a direction."""
    for _ in range(2):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype))


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
