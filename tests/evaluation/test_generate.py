"""Batched greedy replies against a loop that grows one prompt token by token without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import DeepseekV2ForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from families.chain import made_model
from families.configs import tiny_config
from metier.data.encode import encode
from metier.errors import DataError
from metier.evaluation import generate
from metier.evaluation.generate import Prompt, encode_prompts, generate_replies
from metier.evaluation.inference import inference
from metier.evaluation.tasks import load_task
from tiny_models import tiny_model, tiny_tokenizer

NEW_TOKENS = 12


@pytest.fixture
def prompts(task_folder: Path, tokenizer: PreTrainedTokenizerFast) -> list[Prompt]:
    records = load_task(task_folder).records("test")
    return encode_prompts(records, tokenizer, max_new_tokens=NEW_TOKENS, max_length=128)


@torch.inference_mode()
def slow_reply(model: DeepseekV2ForCausalLM, token_ids: tuple[int, ...], stop_id: int) -> list[int]:
    ids = list(token_ids)
    for _ in range(NEW_TOKENS):
        next_id = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        ids.append(next_id)
        if next_id == stop_id:
            break
    return ids[len(token_ids) :]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_batch_answers_each_prompt_as_if_it_were_alone(
    model: DeepseekV2ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt], batch_size: int
) -> None:
    assert len({len(prompt.token_ids) for prompt in prompts}) >= 4
    expected = [slow_reply(model, prompt.token_ids, tokenizer.eos_token_id) for prompt in prompts]
    assert len({tuple(ids) for ids in expected}) == 5
    with torch.inference_mode():
        replies = generate_replies(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS, batch_size=batch_size)
    assert [reply.text for reply in replies] == [
        tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in expected
    ]


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_behind_an_adapters_own_tokens_a_batch_answers_each_prompt_as_if_it_were_alone(
    kind: str, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]
) -> None:
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    config = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind](**options)
    torch.manual_seed(0)
    base = tiny_model("llama", vocab_size=len(tokenizer))
    with torch.no_grad():
        # so that what is before a token, and how far, matters to it
        for name, parameter in base.named_parameters():
            if "_proj" in name:
                parameter.mul_(20)
    model = peft.get_peft_model(base, config).eval()
    together, alone = (
        generate_replies(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS, batch_size=size) for size in (5, 1)
    )
    assert len({len(prompt.token_ids) for prompt in prompts}) >= 4
    assert [reply.text for reply in together] == [reply.text for reply in alone]


def test_a_reply_ends_at_the_stop_token_and_otherwise_is_cut(
    model: DeepseekV2ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]
) -> None:
    free = slow_reply(model, prompts[1].token_ids, tokenizer.eos_token_id)
    stop_id = free[3]
    others = [slow_reply(model, prompt.token_ids, stop_id) for prompt in prompts]
    tokenizer_that_stops = _with_eos(tokenizer, stop_id)
    with torch.inference_mode():
        replies = generate_replies(model, tokenizer_that_stops, prompts, max_new_tokens=NEW_TOKENS, batch_size=5)
    assert [reply.is_cut for reply in replies] == [ids[-1] != stop_id for ids in others]
    assert not replies[1].is_cut
    assert replies[1].text == tokenizer.decode(free[: free.index(stop_id)], skip_special_tokens=True).strip()


def _with_eos(tokenizer: PreTrainedTokenizerFast, stop_id: int) -> Any:
    class Stopping:
        pad_token_id = tokenizer.pad_token_id
        eos_token_id = stop_id
        decode = staticmethod(tokenizer.decode)

    return Stopping()


def test_the_models_own_generation_settings_do_not_matter(
    make_model: Any, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]
) -> None:
    model = make_model()
    with torch.inference_mode():
        plain = generate_replies(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS, batch_size=5)
        for name, value in {
            "do_sample": True,
            "temperature": 5.0,
            "top_k": 3,
            "top_p": 0.4,
            "repetition_penalty": 3.0,
            "no_repeat_ngram_size": 1,
            "num_beams": 3,
            "max_length": 4,
        }.items():
            setattr(model.generation_config, name, value)
        assert generate_replies(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS, batch_size=5) == plain


def test_generating_warns_of_nothing(
    model: DeepseekV2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[Prompt],
    capfd: pytest.CaptureFixture[str],
) -> None:
    transformers_logging.set_verbosity_warning()
    with torch.inference_mode():
        generate_replies(model, tokenizer, prompts, max_new_tokens=2, batch_size=5)
    assert capfd.readouterr().err == ""


def test_batches_hold_similar_lengths_and_bounded_tokens(
    prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [len(prompt.token_ids) for prompt in prompts]
    batches = generate._batches_by_length(prompts, batch_size=2)
    flat = [index for batch in batches for index in batch]
    assert sorted(flat) == list(range(5))
    assert [lengths[index] for index in flat] == sorted(lengths, reverse=True)
    assert [len(batch) for batch in batches] == [2, 2, 1]
    monkeypatch.setattr(generate, "MAX_PROMPT_TOKENS_IN_BATCH", max(lengths))
    assert len(generate._batches_by_length(prompts, batch_size=5)[0]) == 1


def test_prompts_end_where_the_reply_begins(prompts: list[Prompt]) -> None:
    assert prompts[0].text == "<user>why<eos><assistant>"
    assert prompts[0].reference == "the lazy dog"


def test_progress_counts_prompts(
    model: DeepseekV2ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]
) -> None:
    seen: list[tuple[int, int]] = []
    with torch.inference_mode():
        generate_replies(
            model,
            tokenizer,
            prompts,
            max_new_tokens=1,
            batch_size=2,
            on_progress=lambda done, total: seen.append((done, total)),
        )
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_a_prompt_that_does_not_fit_is_refused(task_folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    records = load_task(task_folder).records("test")
    with pytest.raises(DataError, match=r"test\.jsonl:2: a prompt of \d+ tokens .* context of 40"):
        encode_prompts(records, tokenizer, max_new_tokens=20, max_length=40)


@pytest.mark.parametrize("is_chat", [True, False])
def test_the_prompt_is_what_training_put_before_the_reply(
    task_folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    is_chat: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (task_folder / "test.jsonl").write_text('{"prompt": "why the fox", "completion": " lazy dog"}\n')
    if not is_chat:
        monkeypatch.setattr(tokenizer, "chat_template", None)
    records = load_task(task_folder).records("test")
    trained = encode(records[0], tokenizer)
    num_before = sum(label == -100 for label in trained.labels[:-2])
    [prompt] = encode_prompts(records, tokenizer, max_new_tokens=2, max_length=None)
    assert list(prompt.token_ids) == trained.input_ids[:num_before]
    assert prompt.reference.strip() == "lazy dog"


@pytest.mark.parametrize(
    ("line", "roles"),
    [
        (
            '{"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "a"}, '
            '{"role": "user", "content": "b"}]}',
            "user, assistant, user",
        ),
        ('{"text": "a"}', "plain text"),
    ],
)
def test_a_record_must_end_with_the_assistants_reply(
    task_folder: Path, tokenizer: PreTrainedTokenizerFast, line: str, roles: str
) -> None:
    (task_folder / "test.jsonl").write_text(line + "\n")
    records = load_task(task_folder).records("test")
    with pytest.raises(DataError, match=rf"test\.jsonl:1: got {roles}; a test record needs a prompt"):
        encode_prompts(records, tokenizer, max_new_tokens=2, max_length=40)


def test_a_tokenizer_without_chat_template_is_refused(
    task_folder: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    records = load_task(task_folder).records("test")
    with pytest.raises(DataError, match=r"test\.jsonl:1: the tokenizer '' has no chat template"):
        encode_prompts(records, tokenizer, max_new_tokens=2, max_length=None)


def test_an_evaluation_leaves_no_tensors_that_cannot_be_trained_with(model: DeepseekV2ForCausalLM) -> None:
    with inference(model):
        kept = model.lm_head.weight * 2
        assert not kept.requires_grad
    assert not kept.is_inference()


def test_no_positions_of_the_last_batch_are_left() -> None:
    model = made_model(tiny_config("qwen3_vl_moe")).eval()
    prompts = [Prompt(text="", token_ids=tuple(range(5, 9 + n)), reference="", origin="") for n in range(3)]
    with torch.no_grad():
        generate_replies(model, tiny_tokenizer(), prompts, max_new_tokens=2, batch_size=3)
        # as an adapter's virtual tokens are handed over
        embeddings = model.get_input_embeddings()(torch.arange(5, 15).view(2, 5))
        assert model(inputs_embeds=embeddings, attention_mask=torch.ones(2, 5)).logits.shape[:2] == (2, 5)
