"""Which experts a run trains: read from a file, kept from the run that is resumed, or selected from a new profile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from metier.config import RunConfig
from metier.data.message import Record
from metier.data.records import load_records
from metier.distributed.ranks import ranks_here
from metier.routing.configured import selection_config
from metier.routing.profile import StabilityConfig, profile
from metier.routing.routing_profile import RoutingProfile
from metier.routing.selection import ExpertSelection, expert_bytes, select
from metier.training.folder import RunFolder


def run_selection(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    config: RunConfig,
    folder: RunFolder,
) -> ExpertSelection:
    """The configured selection, the one of the run that is resumed, or a new one from a profile of the records."""
    if config.resume_from_checkpoint is not None and folder.selection.exists():
        return ExpertSelection.load(folder.selection)
    if config.selection is not None:
        selection = ExpertSelection.load(config.selection)
    else:
        selection = _from_profile(model, tokenizer, records, config, folder)
    if ranks_here().is_main:
        # whole or not at all: a run may be killed at any moment, and would then go on with half of it
        half = folder.root / ".selection.json"
        selection.save(half)
        half.replace(folder.selection)
    return selection


def _from_profile(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    config: RunConfig,
    folder: RunFolder,
) -> ExpertSelection:
    wanted = selection_config(config)
    options: dict[str, Any] = {
        "num_tokens": config.profile_tokens,
        "max_length": config.max_length,
        "seed": config.seed,
        "output_norms": config.score == "output_norm",
        "over_ranks": ranks_here().are_several,
    }
    general: RoutingProfile | None = None
    if config.minus_general:
        assert config.general_dataset is not None, "RunConfig refuses minus_general without it"
        general = profile(model, tokenizer, load_records(config.general_dataset), **options)
    sizes = expert_bytes(model) if wanted.budget_bytes is not None else None
    if config.profile_until_stable:
        options["until_stable"] = StabilityConfig(
            selection=wanted, threshold=config.stability_threshold, general=general, expert_bytes=sizes
        )
    measured = profile(model, tokenizer, records, **options)
    if ranks_here().is_main:
        measured.save(folder.root)
    return select(measured, wanted, general=general, expert_bytes=sizes)
