"""What a report shows, as plain values: made by a run, or by hand, or in a test without any model."""

# L MoE layers, E experts

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from metier.errors import ConfigError
from metier.evaluation.compare import ComparisonRow
from metier.evaluation.result import Evaluation

METHOD_TITLES: Mapping[str, str] = {
    "base": "Base model",
    "esft": "ESFT",
    "full": "Full fine-tuning",
    "expert_lora": "LoRA, selected experts",
    "lora": "LoRA, all experts",
    "random": "Random experts",
}


def method_title(name: str) -> str:
    """How a method is called in front of people; unknown names stay as they are."""
    return METHOD_TITLES.get(name, name)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportData:
    """Everything in a report. What is empty or None is left out of the page with a sentence that says so."""

    title: str
    model: str | None = None
    task: str | None = None
    task_description: str = ""

    scores_LE: Sequence[Sequence[float]] | None = None
    """Relevance of each expert, one row a MoE layer, each row summing to 1."""
    layer_ids: Sequence[int] | None = None
    """Decoder layer of each row of `scores_LE`."""
    score_name: str = "token"
    top_p: float | None = None
    top_k: int | None = None
    """Experts that the router picks for a token."""
    selected: Mapping[int, Sequence[int]] | None = None
    """Decoder layer to the experts that were trained there."""
    reliability: float | None = None
    """Split-half Jaccard of the selected sets, mean over layers."""
    num_profiled_tokens: int | None = None

    metrics: Mapping[str, Sequence[Mapping[str, object]]] = field(default_factory=dict)
    """Method to the lines of its metrics.jsonl; those with a step and a loss are drawn."""
    key_expert_tokens: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Layer of a sparse adapter to how many tokens each of its Key-Experts had."""
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)
    """Method to what its model scored; the untouched model is "base"."""
    rows: Sequence[ComparisonRow] = ()
    """The comparison, from `metier.evaluation.compare`."""
    total_parameters: int | None = None
    model_bytes: int | None = None

    plans: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Method to its plan.json: what was predicted, and what was measured."""

    config: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str | None = None

    def __post_init__(self) -> None:
        if self.scores_LE is None:
            return
        widths = {len(row) for row in self.scores_LE}
        if not self.scores_LE or len(widths) != 1 or 0 in widths:
            raise ConfigError(
                f"report: scores_LE must have rows of one length, got lengths {sorted(widths)}. "
                "Give one row for each MoE layer."
            )
        if self.layer_ids is None or len(self.layer_ids) != len(self.scores_LE):
            got = "none" if self.layer_ids is None else str(len(self.layer_ids))
            raise ConfigError(
                f"report: got {len(self.scores_LE)} rows of scores and {got} layer_ids, expected one of each."
            )
        num_experts = widths.pop()
        for layer, experts in (self.selected or {}).items():
            if layer not in self.layer_ids:
                raise ConfigError(
                    f"report: layer {layer} of the selection has no scores; scores are of layers "
                    f"{', '.join(map(str, self.layer_ids))}. Give the profile that was selected from."
                )
            strangers = sorted(expert for expert in experts if not 0 <= expert < num_experts)
            if strangers:
                raise ConfigError(
                    f"report: layer {layer} of the selection names expert {strangers[0]}, but scores have "
                    f"{num_experts} experts. Give the profile that was selected from."
                )
