"""By which score and policy a run selects its experts."""

from __future__ import annotations

from metier.config import RunConfig
from metier.routing.routing_profile import PAPER_SELECTION
from metier.routing.selection import SelectionConfig


def selection_config(config: RunConfig) -> SelectionConfig:
    """The run's score and policy: where it names none, the paper's for token scores."""
    policies = (config.top_p, config.select_top_k, config.select_top_fraction, config.select_budget_bytes)
    is_open = all(value is None for value in policies)
    return SelectionConfig(
        score=config.score,
        scale=config.score_scale,
        minus_general=config.minus_general,
        top_p=PAPER_SELECTION.top_p if is_open else config.top_p,
        top_k=config.select_top_k,
        top_fraction=config.select_top_fraction,
        budget_bytes=config.select_budget_bytes,
    )
