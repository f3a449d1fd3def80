"""`evaluate_harness`: EleutherAI's lm-evaluation-harness on a model that metier has loaded, with or without a delta.

The harness is called, not rewritten: tasks, prompts, filters and metrics are its own, so that a number can be compared
with others' of the same task version. What is added: the model is the object at hand (a PEFT model with its delta, or a
merged one), and the result says which versions and which base it was measured with.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from metier.errors import ConfigError
from metier.evaluation.harness_tasks import HarnessTasks, load_harness_tasks
from metier.evaluation.inference import inference, random_state_kept
from metier.models.fingerprint import fingerprint_of_any

FORMAT = 1
_PACKAGES = ("metier", "lm_eval", "transformers", "torch", "peft", "datasets")
_BOOTSTRAP_ITERS = 1000  # of the few metrics whose standard error has no formula; the harness's 100,000 take minutes


@dataclass(frozen=True, kw_only=True, slots=True)
class HarnessScore:
    """One metric of one task or group, in the harness's own unit (most are 0 to 1)."""

    task: str
    metric: str
    filter: str
    """What was done to the reply before it was scored; "none" where nothing was."""
    value: float
    stderr: float | None
    higher_is_better: bool | None
    num_items: int | None
    num_fewshot: int | None
    version: str
    """Of the task: scores of different versions are not comparable."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HarnessResult:
    """Everything that one call of the harness found."""

    scores: tuple[HarnessScore, ...]
    versions: Mapping[str, str]
    """Of the packages that the scores depend on."""
    fingerprint: str
    """Of the base: its sizes and routers. A merged model has that of its base."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Name and kind of each delta that was active."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    configs: Mapping[str, Any] = field(default_factory=dict)
    """Each task's whole configuration."""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"format": FORMAT, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write it as JSON; the folder is made if it is missing."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # a task's configuration may hold functions
        text = json.dumps(self.to_dict(), ensure_ascii=False, indent=1, default=str)
        path.write_text(text + "\n", encoding="utf-8")


def evaluate_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: HarnessTasks | str | Sequence[str],
    *,
    include_path: str | Path | Sequence[str | Path] | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    apply_chat_template: bool = False,
    allow_code_execution: bool = False,
    seed: int = 0,
) -> HarnessResult:
    """Run tasks of lm-evaluation-harness on a model.

    Each module's train or eval mode and the state of all random generators are as before afterwards.

    Args:
        model: a language model, PEFT-wrapped or not; the active adapters take part.
        tokenizer: the model's.
        tasks: what `load_harness_tasks` found, or what it takes.
        include_path: as there; not with tasks that were found already.
        num_fewshot: worked examples in each prompt; the task's own number when not given.
        limit: only the first items of each task; such scores are for trying things out.
        batch_size: prompts in a batch.
        apply_chat_template: put prompts into the tokenizer's chat template. Off as in the harness.
        allow_code_execution: whether tasks that run what the model wrote may do so; it runs in this process.
        seed: of few-shot examples and sampling.

    Raises:
        ConfigError: as `load_harness_tasks`; a task that fixes its number of examples, runs code or needs images; no
            chat template.
        DataError: a task's data cannot be loaded.
    """
    if isinstance(tasks, HarnessTasks) and include_path is not None:
        raise ConfigError("harness: got include_path for tasks that were found already. Give it when finding them.")
    found = tasks if isinstance(tasks, HarnessTasks) else load_harness_tasks(tasks, include_path=include_path)
    _check(found, tokenizer, num_fewshot, limit, batch_size, apply_chat_template, allow_code_execution)
    from lm_eval import simple_evaluate

    start = time.perf_counter()
    with inference(model), random_state_kept():
        raw = simple_evaluate(
            model=_wrap(model, tokenizer, batch_size),
            tasks=list(found.built),
            task_manager=found.manager,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=apply_chat_template,
            confirm_run_unsafe_code=allow_code_execution,
            bootstrap_iters=_BOOTSTRAP_ITERS,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    assert raw is not None, "the harness gives results in the first process, and there is one"
    return HarnessResult(
        scores=tuple(_scores(raw)),
        versions={package: importlib.metadata.version(package) for package in _PACKAGES},
        fingerprint=fingerprint_of_any(model),
        adapters=_active_adapters(model),
        settings={
            "tasks": list(found.names),
            "num_fewshot": num_fewshot,
            "limit": limit,
            "batch_size": batch_size,
            "apply_chat_template": apply_chat_template,
            "seed": seed,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
        },
        configs=raw["configs"],
        seconds=time.perf_counter() - start,
    )


def _check(
    found: HarnessTasks,
    tokenizer: PreTrainedTokenizerBase,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
    apply_chat_template: bool,
    allow_code_execution: bool,
) -> None:
    """Refuse what the harness would refuse late or pass over."""
    for name, value, least in (("num_fewshot", num_fewshot, 0), ("limit", limit, 1), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise ConfigError(f"harness: {name} must be at least {least}, got {value}.")
    if apply_chat_template and tokenizer.chat_template is None:
        raise ConfigError(
            f"harness: the tokenizer {tokenizer.name_or_path!r} has no chat template to apply. Leave it off, or "
            "evaluate the chat version of the model."
        )
    for name, task in found.tasks.items():
        if num_fewshot and task.get_config("num_fewshot") == 0:
            raise ConfigError(
                f"harness: got num_fewshot={num_fewshot}, but task {name!r} fixes it at 0. Leave it out for this task."
            )
        if getattr(task, "UNSAFE_CODE", False) and not allow_code_execution:
            raise ConfigError(
                f"harness: task {name!r} runs code that the model wrote, which is off unless asked for.\n"
                "In a container or a virtual machine, give allow_code_execution=True (--allow-code-execution)."
            )
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"harness: task {name!r} has images or sound, expected text alone. Choose another task.")


def _wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    # it warns that its options for loading are not used, which is the point
    logger.setLevel(logging.ERROR)
    try:
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    finally:
        logger.setLevel(level)


def _active_adapters(model: PreTrainedModel) -> dict[str, str]:
    configs = getattr(model, "peft_config", None)
    if configs is None:
        return {}
    return {name: str(getattr(kind := configs[name].peft_type, "value", kind)) for name in model.active_adapters}


def _scores(raw: Mapping[str, Any]) -> Iterator[HarnessScore]:
    for task, values in raw["results"].items():
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            yield HarnessScore(
                task=task,
                metric=metric,
                filter=filter_name,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                higher_is_better=raw["higher_is_better"].get(task, {}).get(metric),
                num_items=values.get("sample_len"),
                num_fewshot=raw["n-shot"].get(task),
                version=str(raw["versions"].get(task)),
            )
