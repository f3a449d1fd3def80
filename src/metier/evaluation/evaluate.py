"""`evaluate`: one call that scores a model on a task and in general ability, and leaves no trace in it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from metier import embedded
from metier.errors import ConfigError
from metier.evaluation.general import (
    CLOZE_FILE,
    WINDOW_TOKENS,
    cloze_score,
    domain_files,
    domain_loss,
    load_cloze,
    read_documents,
)
from metier.evaluation.generate import Prompt, Reply, encode_prompts, generate_replies
from metier.evaluation.inference import inference
from metier.evaluation.metrics import METRICS, check_code_execution, score_replies
from metier.evaluation.result import ClozeScore, DomainLoss, Evaluation, MetricScore, SampleReply
from metier.evaluation.sandbox import namespaces
from metier.evaluation.tasks import TaskSpec, load_task
from metier.models.encoder_decoder import is_encoder_decoder, refuse_encoder_decoder

OnProgress = Callable[[str, int, int], None]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: TaskSpec | str | Path | None,
    split: str = "test",
    limit: int | None = None,
    general: bool | str | Path = True,
    general_bytes: int | None = None,
    cloze_items: int | None = None,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    num_samples: int = 8,
    seed: int = 0,
    allow_code_execution: bool = False,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Score a model's greedy replies on a task, and its general ability.

    The model runs in the dtype it has, in inference mode; train/eval mode of every module is as before
    afterwards.

    Args:
        model: a language model, PEFT-wrapped or not; of an encoder-decoder the task alone can be measured.
        tokenizer: the model's, with a chat template where there is a task.
        task: a TaskSpec, an embedded task's name, a task folder, or None for general ability alone.
        split: which of the task's splits.
        limit: only the first items of the split.
        general: whether to measure general ability on the embedded held-out text, or a folder of one's own
            with `<domain>.txt` files and, if it has one, `cloze.jsonl`.
        general_bytes: only so many UTF-8 bytes of each domain, from its beginning.
        cloze_items: only so many cloze items, evenly over the file.
        batch_size: prompts in a batch; by default 16 on the CPU, where larger batches only wait longer for
            their last reply, and 64 elsewhere.
        max_new_tokens: a reply's limit; the task's own when not given.
        num_samples: how many items, evenly over the split, to keep with prompt, reference and reply.
        seed: of the bootstrap; replies are greedy and depend on no seed.
        allow_code_execution: whether the metric `code_tests` may run what the model wrote.
        on_progress: called with (what, done, total).

    Raises:
        ConfigError: nothing to evaluate, an unknown task, split or metric, or a metric that runs code and may not.
        UnsupportedModelError: general ability of an encoder-decoder.
        DataError: an empty split, or a record that cannot be evaluated.
    """
    if task is None and general is False:
        raise ConfigError("evaluate: got task=None and general=False, so there is nothing to evaluate. Give one.")
    if general is not False:
        refuse_encoder_decoder(
            model,
            "evaluate: general ability",
            "It is a loss on plain text. Measure the task alone, with general=False.",
        )
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"evaluate: batch_size must be at least 1, got {batch_size}.")
    spec = task if isinstance(task, TaskSpec) or task is None else load_task(task)
    if spec is not None:
        check_code_execution(spec.metrics, allowed=allow_code_execution)
    length = max_new_tokens if max_new_tokens is not None else (spec.max_new_tokens if spec else None)
    batch_size = batch_size or (16 if model.device.type == "cpu" else 64)
    answered = _Answered(metrics={}, samples=(), num_items=0, num_cut=0, fingerprint="")
    domains: dict[str, DomainLoss] = {}
    cloze: ClozeScore | None = None
    seconds: dict[str, float] = {}
    with inference(model):
        if spec is not None:
            assert length is not None
            start = time.perf_counter()
            prompts = encode_prompts(
                spec.records(split, limit=limit),
                tokenizer,
                max_new_tokens=length,
                max_length=_context_tokens(model),
                for_encoder=is_encoder_decoder(model),
            )
            replies = generate_replies(
                model,
                tokenizer,
                prompts,
                max_new_tokens=length,
                batch_size=batch_size,
                on_progress=None if on_progress is None else _staged(on_progress, "replies"),
            )
            answered = _score(
                spec,
                prompts,
                replies,
                num_samples=num_samples,
                seed=seed,
                allow_code_execution=allow_code_execution,
            )
            seconds["task"] = time.perf_counter() - start
        if general is not False:
            folder = embedded.general_path() if general is True else Path(general)
            start = time.perf_counter()
            domains = _measure_domains(
                model, tokenizer, folder, max_bytes=general_bytes, seed=seed, on_progress=on_progress
            )
            seconds["general"] = time.perf_counter() - start
            if (folder / CLOZE_FILE).exists():
                start = time.perf_counter()
                items = load_cloze(folder / CLOZE_FILE, limit=cloze_items)
                cloze = cloze_score(model, tokenizer, items, seed=seed)
                seconds["cloze"] = time.perf_counter() - start
    return Evaluation(
        task=spec.name if spec else None,
        split=split if spec else None,
        num_items=answered.num_items,
        num_cut=answered.num_cut,
        fingerprint=answered.fingerprint,
        metrics=answered.metrics,
        samples=answered.samples,
        domains=domains,
        cloze=cloze,
        seconds=seconds,
        settings=_settings(
            model,
            limit=limit,
            general_bytes=general_bytes,
            cloze_items=cloze_items,
            batch_size=batch_size,
            max_new_tokens=length,
            seed=seed,
            **_code_settings(spec),
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answered:
    metrics: dict[str, MetricScore]
    samples: tuple[SampleReply, ...]
    num_items: int
    num_cut: int
    fingerprint: str


def _score(
    spec: TaskSpec,
    prompts: Sequence[Prompt],
    replies: Sequence[Reply],
    *,
    num_samples: int,
    seed: int,
    allow_code_execution: bool,
) -> _Answered:
    references = [prompt.reference for prompt in prompts]
    texts = [reply.text for reply in replies]
    num_kept = min(max(num_samples, 0), len(prompts))
    kept = [position * len(prompts) // num_kept for position in range(num_kept)]
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.text}\0{prompt.reference}\0".encode())
        if prompt.extra:
            digest.update(json.dumps(dict(prompt.extra), sort_keys=True, default=str).encode())
    extras = [prompt.extra for prompt in prompts]
    return _Answered(
        metrics={
            metric: score_replies(
                metric, texts, references, extras=extras, allow_code_execution=allow_code_execution, seed=seed
            )
            for metric in spec.metrics
        },
        samples=tuple(
            SampleReply(
                prompt=prompts[index].text,
                reference=references[index],
                reply=texts[index],
                origin=prompts[index].origin,
            )
            for index in kept
        ),
        num_items=len(prompts),
        num_cut=sum(reply.is_cut for reply in replies),
        fingerprint=digest.hexdigest()[:16],
    )


def _measure_domains(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    max_bytes: int | None,
    seed: int,
    on_progress: OnProgress | None,
) -> dict[str, DomainLoss]:
    files = domain_files(folder)
    window_tokens = min(WINDOW_TOKENS, _context_tokens(model) or WINDOW_TOKENS)
    domains: dict[str, DomainLoss] = {}
    for name, path in files.items():
        documents = read_documents(path, max_bytes=max_bytes)
        domains[name] = domain_loss(model, tokenizer, documents, window_tokens=window_tokens, seed=seed)
        if on_progress is not None:
            on_progress("domains", len(domains), len(files))
    return domains


def _staged(on_progress: OnProgress, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: on_progress(stage, done, total)


def _context_tokens(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _code_settings(spec: TaskSpec | None) -> dict[str, Any]:
    if spec is None or not any(METRICS[metric].runs_code for metric in spec.metrics):
        return {}
    return {"code_isolation": "namespaces" if namespaces() else "process"}


def _settings(model: PreTrainedModel, **values: Any) -> dict[str, Any]:
    return {
        **values,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "decoding": "greedy",
        "interval": "95% bootstrap over items",
        "general_unit": "bits per UTF-8 byte",
    }
