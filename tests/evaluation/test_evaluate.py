"""`evaluate` end to end on a random model, and that it leaves the model as it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV2ForCausalLM, PreTrainedTokenizerFast

from metier.errors import ConfigError, DataError
from metier.evaluation.evaluate import evaluate
from metier.evaluation.generate import Prompt, Reply
from metier.evaluation.result import Evaluation


def test_an_evaluation_holds_task_and_general_scores(
    model: DeepseekV2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task_folder: Path,
    general_folder: Path,
) -> None:
    result = evaluate(model, tokenizer, task=task_folder, general=general_folder, num_samples=2)
    assert (result.task, result.split, result.num_items) == ("foxes", "test", 5)
    assert list(result.metrics) == ["chrf", "exact_match"]
    assert result.score is result.metrics["chrf"]
    assert all(len(score.item_scores) == 5 for score in result.metrics.values())
    assert [sample.reference for sample in result.samples] == ["the lazy dog", "größer"]
    assert sorted(result.domains) == ["foxes", "words"]
    assert result.bits_per_byte == pytest.approx(
        (result.domains["foxes"].bits_per_byte + result.domains["words"].bits_per_byte) / 2
    )
    assert result.cloze is not None
    assert len(result.cloze.item_scores) == 3
    assert result.cloze.chance == 25.0
    assert sorted(result.seconds) == ["cloze", "general", "task"]
    assert result.settings["max_new_tokens"] == 6
    assert result.settings["dtype"] == "float32"
    assert result.settings["batch_size"] == 16


@pytest.fixture
def code_folder(tmp_path: Path) -> Path:
    """A task of two records with tests, of which the second's reference does not pass."""
    folder = tmp_path / "code"
    folder.mkdir()
    rows = [
        {"prompt": "the fox", "completion": "x = 42", "tests": ["assert x == y"], "test_setup": "y = 42"},
        {"prompt": "the dog", "completion": "x = 42", "tests": "assert x == 43"},
    ]
    (folder / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "task.json").write_text(json.dumps({"name": "code", "metrics": ["code_tests"]}))
    return folder


def test_code_is_run_with_the_tests_of_its_record(
    model: DeepseekV2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    code_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answer_rightly(_model: Any, _tokenizer: Any, prompts: list[Prompt], **_: Any) -> list[Reply]:
        return [Reply(text=prompt.reference, is_cut=False) for prompt in prompts]

    module = sys.modules[evaluate.__module__]
    monkeypatch.setattr(module, "generate_replies", answer_rightly)
    result = evaluate(model, tokenizer, task=code_folder, general=False, allow_code_execution=True)
    assert result.metrics["code_tests"].item_scores == (100.0, 0.0)
    assert result.settings["code_isolation"] in ("process", "namespaces")
    rows = (code_folder / "test.jsonl").read_text()
    (code_folder / "test.jsonl").write_text(rows.replace("43", "42"))
    other = evaluate(model, tokenizer, task=code_folder, general=False, allow_code_execution=True)
    assert other.metrics["code_tests"].value == 100.0
    assert other.fingerprint != result.fingerprint  # other tests are another task


def test_code_is_refused_before_the_model_runs(
    model: DeepseekV2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    code_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model, "generate", None)
    with pytest.raises(ConfigError, match="metric 'code_tests' runs code that the model wrote, which is off"):
        evaluate(model, tokenizer, task=code_folder, general=False)


def test_cut_replies_are_counted(
    model: DeepseekV2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert evaluate(model, tokenizer, task=task_folder, general=False).num_cut == 5
    monkeypatch.setattr(model.generation_config, "eos_token_id", list(range(model.config.vocab_size)))
    assert evaluate(model, tokenizer, task=task_folder, general=False).num_cut == 0


def test_sizes_are_limited(
    model: DeepseekV2ForCausalLM, tokenizer: PreTrainedTokenizerFast, task_folder: Path, general_folder: Path
) -> None:
    result = evaluate(
        model, tokenizer, task=task_folder, limit=2, general=general_folder, general_bytes=7, cloze_items=1
    )
    assert result.num_items == 2
    assert all(sum(loss.document_bytes) <= 7 for loss in result.domains.values())
    assert result.cloze is not None
    assert len(result.cloze.item_scores) == 1


def test_general_ability_alone_needs_no_task(
    model: DeepseekV2ForCausalLM, tokenizer: PreTrainedTokenizerFast, general_folder: Path
) -> None:
    result = evaluate(model, tokenizer, task=None, general=general_folder)
    assert (result.task, result.score, result.num_items) == (None, None, 0)
    assert result.bits_per_byte is not None


def test_the_embedded_text_is_the_default(
    model: DeepseekV2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    general_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("metier.embedded.general_path", lambda: general_folder)
    assert sorted(evaluate(model, tokenizer, task=None).domains) == ["foxes", "words"]


def test_the_model_is_left_as_it_was(
    make_model: Any, tokenizer: PreTrainedTokenizerFast, task_folder: Path, general_folder: Path
) -> None:
    model = make_model()
    model.train()
    model.lm_head.eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    modes_in_forward = set()
    model.register_forward_pre_hook(lambda module, args: modes_in_forward.add(module.training))
    evaluate(model, tokenizer, task=task_folder, general=general_folder)
    assert modes_in_forward == {False}
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert not model.model.embed_tokens.weight.requires_grad
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])
    ids = torch.tensor([[5, 6, 7, 8]])
    model(ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_the_modes_come_back_after_an_error(
    make_model: Any, tokenizer: PreTrainedTokenizerFast, task_folder: Path
) -> None:
    model = make_model()
    model.train()
    with pytest.raises(DataError, match="do not fit the model's context of 128"):
        evaluate(model, tokenizer, task=task_folder, general=False, max_new_tokens=500)
    assert model.training
    assert torch.is_grad_enabled()


def test_an_evaluation_survives_its_file(
    model: DeepseekV2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task_folder: Path,
    general_folder: Path,
    tmp_path: Path,
) -> None:
    result = evaluate(model, tokenizer, task=task_folder, general=general_folder)
    result.save(tmp_path / "deep" / "evaluation.json")
    assert Evaluation.load(tmp_path / "deep" / "evaluation.json") == result


def test_the_same_seed_gives_the_same_evaluation(
    model: DeepseekV2ForCausalLM, tokenizer: PreTrainedTokenizerFast, task_folder: Path
) -> None:
    first, second = (evaluate(model, tokenizer, task=task_folder, general=False, seed=4) for _ in range(2))
    assert (first.metrics, first.samples) == (second.metrics, second.samples)


def test_progress_names_the_stage(
    model: DeepseekV2ForCausalLM, tokenizer: PreTrainedTokenizerFast, task_folder: Path, general_folder: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    evaluate(
        model,
        tokenizer,
        task=task_folder,
        general=general_folder,
        on_progress=lambda stage, done, total: seen.append((stage, done, total)),
    )
    assert seen == [("replies", 5, 5), ("domains", 1, 2), ("domains", 2, 2)]


def test_nothing_to_evaluate_is_refused(model: DeepseekV2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="there is nothing to evaluate"):
        evaluate(model, tokenizer, task=None, general=False)


def test_a_batch_of_nothing_is_refused(
    model: DeepseekV2ForCausalLM, tokenizer: PreTrainedTokenizerFast, task_folder: Path
) -> None:
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        evaluate(model, tokenizer, task=task_folder, batch_size=0)


def test_an_unknown_task_is_refused_before_the_model_runs(
    model: DeepseekV2ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'translate'"):
        evaluate(model, tokenizer, task="transalte")
