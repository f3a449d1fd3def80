"""Choose a sparse delta's entries on a base, with batches where the mask looks at data."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from metier.errors import ConfigError, DataError
from metier.methods.sparse_delta.candidates import candidates
from metier.methods.sparse_delta.config import WHOLE, SparseDeltaConfig
from metier.methods.sparse_delta.entries import checked_entries, planned_counts, sizes_of, whole_entries
from metier.methods.sparse_delta.layer import SparseDeltaLayer
from metier.methods.sparse_delta.masks.change import change
from metier.methods.sparse_delta.masks.gradients import Batch, Loss, fisher, gradient_sums, model_loss
from metier.methods.sparse_delta.masks.heads import best_heads, counts_of_heads, entries_of_heads
from metier.methods.sparse_delta.masks.magnitude import magnitude
from metier.methods.sparse_delta.masks.random import random_entries
from metier.methods.sparse_delta.masks.shares import evenly_spaced, shares
from metier.methods.sparse_delta.masks.top_entries import Scores, top_entries
from metier.models.attention_heads import attention_heads
from metier.models.base_parameters import BaseParameter
from metier.models.unwrap import bare_model, show_base


def prepare(
    model: nn.Module, config: SparseDeltaConfig, batches: Iterable[Batch] | None = None, loss: Loss | None = None
) -> SparseDeltaConfig:
    """`config` with its entries chosen on `model`, ready for `peft.get_peft_model`; arguments as `choose_entries`."""
    config.entries = choose_entries(model, config, batches, loss)
    config.num_entries_by_parameter = None
    return config


def choose_entries(
    model: nn.Module, config: SparseDeltaConfig, batches: Iterable[Batch] | None = None, loss: Loss | None = None
) -> dict[str, Tensor]:
    """The entries that a configuration trains: by parameter path, flat positions, sorted.

    Scores take 4 bytes for every entry of the target parameters (masks of magnitude: for those of one at a time), and
    mask `change` what full fine-tuning with AdamW takes. The model is as before when this returns or raises.

    Args:
        model: the base; under an adapter only inside `with model.disable_adapter():`. On the meta device entries are
            evenly spaced: only their number means anything.
        config: what to choose.
        batches: what the model is called with; needed by masks that look at data, unused by others.
        loss: from model and batch; the model's own by default.

    Raises:
        ConfigError: batches are missing, a target does not exist, or scores are not finite.
        DataError: there is no batch.
    """
    show_base(model)
    if config.mask == "given":
        assert config.entries is not None, "SparseDeltaConfig refuses to be made without"
        return checked_entries(config.entries, sizes_of(model))
    if config.mask in WHOLE or config.heads is not None:
        return whole_entries(model, config)
    found = candidates(model, config)
    if any(parameter.parameter.is_meta for parameter in found):
        sizes = {parameter.path: parameter.parameter.numel() for parameter in found}
        return {path: evenly_spaced(sizes[path], count) for path, count in planned_counts(model, config).items()}
    if config.needs_data:
        _check_data(model, config, batches)
    assert batches is not None or not config.needs_data, "just checked"
    if config.mask == "head":
        return _heads(model, config, found, batches or (), loss or model_loss)
    if config.mask == "random":
        return _random(config, found)
    return _best(_scores(model, config, found, batches or (), loss or model_loss), config, found)


def _check_data(model: nn.Module, config: SparseDeltaConfig, batches: Iterable[Batch] | None) -> None:
    if batches is None:
        raise ConfigError(
            f"SparseDeltaConfig: mask={config.mask!r} looks at data, and got none.\n"
            "Call prepare(model, config, batches) before the adapter is made."
        )
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    active = layers if config.mask == "change" else [layer for layer in layers if not layer.disable_adapters]
    if active:
        raise ConfigError(
            f"mask={config.mask!r} takes gradients of the base, but {len(active)} of its modules have an adapter on.\n"
            "Choose before an adapter is put on, or (but for mask change) inside `with model.disable_adapter():`."
        )


def _scores(
    model: nn.Module, config: SparseDeltaConfig, found: list[BaseParameter], batches: Iterable[Batch], loss: Loss
) -> Scores:
    parameters = {parameter.path: parameter.parameter for parameter in found}
    if config.mask in ("magnitude_smallest", "magnitude_largest"):
        return {path: _lazily(magnitude, parameter) for path, parameter in parameters.items()}
    if config.mask == "change":
        scores = _changes(model, config, found, batches, loss)
    elif config.mask == "gradient":
        scores = gradient_sums(model, parameters, batches, loss)
    else:
        scores = fisher(model, parameters, batches, loss, per_sample=config.fisher_per == "sample")
    return {path: _lazily(lambda score: score, score) for path, score in scores.items()}


def _lazily(of: Callable[[Tensor], Tensor], tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: of(tensor)


def _best(scores: Scores, config: SparseDeltaConfig, found: list[BaseParameter]) -> dict[str, Tensor]:
    sizes = {parameter.path: parameter.parameter.numel() for parameter in found}
    count, largest = config.budget(sum(sizes.values())), config.mask != "magnitude_smallest"
    if config.scope == "global":
        return top_entries(scores, count, largest=largest)
    chosen: dict[str, Tensor] = {}
    for path, part in shares(sizes, count).items():
        chosen |= top_entries({path: scores[path]}, part, largest=largest)
    return chosen


def _random(config: SparseDeltaConfig, found: list[BaseParameter]) -> dict[str, Tensor]:
    sizes = {parameter.path: parameter.parameter.numel() for parameter in found}
    count = config.budget(sum(sizes.values()))
    if count > sum(sizes.values()):
        raise ConfigError(f"num_entries={count} is more than the {sum(sizes.values())} entries of the targets.")
    return random_entries(sizes, count, seed=config.seed)


def _heads(
    model: nn.Module, config: SparseDeltaConfig, found: list[BaseParameter], batches: Iterable[Batch], loss: Loss
) -> dict[str, Tensor]:
    heads = attention_heads(model)
    paths = {part.path for block in heads for part in block.parts}
    inside = {parameter.path: parameter.parameter for parameter in found if parameter.path in paths}
    if config.head_score == "fisher":
        scores = fisher(model, inside, batches, loss, per_sample=config.fisher_per == "sample")
    else:
        scores = {path: total.square_() for path, total in gradient_sums(model, inside, batches, loss).items()}
    shapes = {path: tuple(parameter.shape) for path, parameter in inside.items()}
    budget = config.budget(sum(parameter.parameter.numel() for parameter in found))
    chosen = best_heads(heads, scores, budget, lambda these: sum(counts_of_heads(heads, these, shapes).values()))
    return entries_of_heads(heads, chosen, shapes)


def _changes(
    model: nn.Module, config: SparseDeltaConfig, found: list[BaseParameter], batches: Iterable[Batch], loss: Loss
) -> dict[str, Tensor]:
    """How far each entry moves in a pass of full fine-tuning, AdamW without decay, one step a batch.

    The pass trains all entries as one dense delta, whose float32 values are the differences, also where the base is
    kept in less; and the base's bits come back when it is taken off, whatever happens.
    """
    whole = {parameter.path: parameter.parameter.numel() for parameter in found}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    was_training, steps = model.training, 0
    tuned = get_peft_model(model, SparseDeltaConfig(mask="given", num_entries_by_parameter=whole), "change")
    try:
        values = {path: _values(tuned, path) for path in whole}
        optimizer = torch.optim.AdamW(values.values(), lr=config.change_learning_rate, weight_decay=0.0)
        model.train()
        for batch in batches:
            loss(tuned, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
        if not steps:
            raise DataError("batches: got none, expected at least one to train on.\nPass a list of batches.")
        return {path: change(value) for path, value in values.items()}
    finally:
        tuned.unload()
        model.train(was_training)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _values(tuned: nn.Module, path: str) -> nn.Parameter:
    module_path, _, name = path.rpartition(".")
    layer = bare_model(tuned).get_submodule(module_path)
    assert isinstance(layer, SparseDeltaLayer), f"{path} is trained"
    values = layer.values_of(name)["change"]
    assert isinstance(values, nn.Parameter), "made by update_layer"
    return values
