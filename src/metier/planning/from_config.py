"""The model that a run would train, from its configuration alone: wrapped by the method, without a byte of weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import peft
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from metier.catalogue.tree import method_of
from metier.config import RunConfig
from metier.errors import ConfigError
from metier.memory.frozen_model import StoredSizes, large_weights, stored_sizes
from metier.methods.from_catalogue import refuse_stored_stacks
from metier.methods.wrap import selects_experts, wrap
from metier.models.moe import is_dense, moe_layers
from metier.models.skeleton import model_config, skeleton_of
from metier.planning.refused import check_run
from metier.planning.routes import check_profile
from metier.planning.state import TrainingPlan, training_plan
from metier.routing.configured import selection_config
from metier.routing.routing_profile import RoutingProfile
from metier.routing.selection import ExpertSelection, expert_bytes, select

ASSUMED_SHARE = 0.1
"""Of a layer's experts that a run trains where no selection says it: ESFT's selections had 5 to 15%."""


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A run's model without weights."""

    model: PreTrainedModel | peft.PeftModel
    """Wrapped by the method, every parameter on the meta device."""
    selection: ExpertSelection | None
    assumptions: tuple[str, ...]
    """What was assumed where neither the run nor a profile says it, in words."""
    stored: StoredSizes | None
    """Of the base's weights that the run keeps in a store of their own."""
    decoded: tuple[nn.Parameter, ...] = ()
    """Those of them that are read back from a format of fewer bits whenever a product needs them."""

    def state(self, config: RunConfig) -> TrainingPlan:
        """Parameters and bytes, exact: what the same functions count of the model when it is built."""
        return training_plan(
            self.model,
            method=config.method,
            selection=self.selection,
            row_state_dtype=config.meft_state_dtype,
            stored=self.stored,
            options=config.method_options,
        )


def run_skeleton(
    config: RunConfig, base: PreTrainedConfig | None = None, profile: RoutingProfile | None = None
) -> Skeleton:
    """What `metier train` would load and wrap.

    Args:
        config: the run.
        base: the model's configuration; read from `config.model`, a folder, a config.json or a hub id, if not given.
        profile: of the data, by which experts are selected that the run does not name.

    Raises:
        ConfigError: more experts a layer than there are.
        MetierError: as loading, selecting and wrapping raise.
    """
    check_run(config)
    if base is None:
        base = model_config(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    bare = skeleton_of(base, name=config.model, dtype=dtype, trust_remote_code=config.trust_remote_code)
    if profile is not None:
        layers = {} if is_dense(bare) else {layer.index: layer.num_experts for layer in moe_layers(bare)}
        check_profile(profile, layers)
    stored = stored_sizes(bare, config.base_store, config.base_format) if config.has_frozen_base else None
    selection, assumptions = _selection(bare, config, profile) if selects_experts(config) else (None, ())
    large = tuple(large_weights(bare)) if stored is not None else ()
    with torch.device("meta"):
        model = wrap(bare, config, selection)
    # training finds them in their store
    refuse_stored_stacks(method_of(config.method), model, is_stored=lambda weight: any(weight is one for one in large))
    if isinstance(model, peft.PeftModel) and getattr(model.active_peft_config, "needs_data", False):
        said = "Which entries are trained, the data will say; they are taken to lie where a step costs most."
        assumptions = (*assumptions, said)
    return Skeleton(model, selection, assumptions, stored, large if config.base_format is not None else ())


def _selection(
    bare: PreTrainedModel, config: RunConfig, profile: RoutingProfile | None
) -> tuple[ExpertSelection, tuple[str, ...]]:
    """The run's own, or as many experts a layer as its policy says; which ones makes no difference to a size."""
    if config.selection is not None:
        selection = ExpertSelection.load(config.selection)
        selection.validate(bare)
        return selection, ()
    layers = moe_layers(bare)
    if profile is not None and not config.minus_general:
        wanted = selection_config(config)
        sizes = expert_bytes(bare) if wanted.budget_bytes is not None else None
        return select(profile, wanted, expert_bytes=sizes), ()
    said: tuple[str, ...] = ()
    if config.select_top_k is not None:
        counts = {layer.index: config.select_top_k for layer in layers}
    else:
        share = config.select_top_fraction or ASSUMED_SHARE
        counts = {layer.index: math.ceil(share * layer.num_experts - 1e-9) for layer in layers}
        if config.select_top_fraction is None:
            said = (_assumed(counts, config),)
    for layer in layers:
        if counts[layer.index] > layer.num_experts:
            raise ConfigError(
                f"select_top_k={counts[layer.index]} is more than the {layer.num_experts} experts of layers."
                f"{layer.index}. Lower it."
            )
    experts = {layer: tuple(range(count)) for layer, count in counts.items()}
    return ExpertSelection(experts=experts, num_experts=max(layer.num_experts for layer in layers)), said


def _assumed(counts: dict[int, int], config: RunConfig) -> str:
    policy = "select_budget_bytes" if config.select_budget_bytes is not None else "top_p"
    some = sorted(set(counts.values()))
    shown = str(some[0]) if len(some) == 1 else f"{some[0]} to {some[-1]}"
    return (
        f"{shown} experts a layer ({ASSUMED_SHARE:.0%}): how many {policy} picks depends on the task. Name a selection "
        "that `metier select` made, or select_top_k."
    )
