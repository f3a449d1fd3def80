"""/v1/completions, asked by the openai client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from serving.fake_engine import FakeEngine


def test_a_whole_answer(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="law", prompt="Once")
    assert (answer.object, answer.model) == ("text_completion", "law")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("Answer of law.", "stop")


def test_a_stream_joins_to_the_whole_answer(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="law", prompt="Once", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Answer of law."
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_an_answer_has_sixteen_tokens_unless_told(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.completions.create(model="law", prompt="Once")
    assert engine.generations[0].settings.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("one two", ["one two"]),
        (["one", "two"], ["one", "two"]),
        ([46, 2541], [[46, 2541]]),
        ([[46], [2541, 305]], [[46], [2541, 305]]),
    ],
)
def test_a_prompt_may_be_texts_or_token_ids(
    client: openai.OpenAI, engine: FakeEngine, prompt: Any, prompts: list[Any]
) -> None:
    answer = client.completions.create(model="law", prompt=prompt)
    expected = [engine.tokenizer(each)["input_ids"] if isinstance(each, str) else each for each in prompts]
    assert [generation.prompt_ids for generation in engine.generations] == expected
    assert [choice.index for choice in answer.choices] == list(range(len(prompts)))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(map(len, expected))


def test_each_prompt_has_its_n_answers_in_a_row(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.reply = lambda generation: engine.tokenizer.decode(generation.prompt_ids)
    answer = client.completions.create(model="law", prompt=["one", "two"], n=2)
    assert [choice.text for choice in answer.choices] == ["one", "one", "two", "two"]


def test_what_was_cached_of_each_prompt_counts_once(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.num_cached_tokens = 3
    usage = client.completions.create(model="law", prompt=["one", "two"], n=2).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 6


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_before_the_answer(client: openai.OpenAI, engine: FakeEngine, stream: bool) -> None:
    prompt = engine.tokenizer("Once upon")["input_ids"]
    asked = {"model": "law", "prompt": [prompt, [46, 2541]], "n": 2, "echo": True}
    texts = [""] * 4
    for part in client.completions.create(stream=True, **asked) if stream else [client.completions.create(**asked)]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert texts == [f"{echo}Answer of law." for echo in ("Once upon", "Once upon", "Hello", "Hello")]


def test_log_probabilities_are_in_lists(client: openai.OpenAI) -> None:
    logprobs = client.completions.create(model="law", prompt="Once", logprobs=2).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == "Answer of law.<|end|>"
    assert logprobs.token_logprobs == [-0.5] * len(logprobs.tokens)
    assert logprobs.top_logprobs is not None
    assert all(tops[token] == -0.5 for tops, token in zip(logprobs.top_logprobs, logprobs.tokens, strict=True))
    assert logprobs.text_offset is not None
    text = "Answer of law."
    assert [text[offset:][: len(t)] for offset, t in zip(logprobs.text_offset, logprobs.tokens[:-1], strict=False)] == (
        logprobs.tokens[:-1]
    )


def test_an_impossible_token_has_a_log_probability_that_json_can_hold(
    client: openai.OpenAI, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from metier.serving.contract import GeneratedToken
    from serving.fake_engine import FakeGeneration

    tops = ((9, float("-inf")),)
    monkeypatch.setattr(FakeGeneration, "_token", lambda _, token_id: GeneratedToken(token_id, float("-inf"), tops))
    logprobs = client.completions.create(model="law", prompt="Once", logprobs=1).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert set(logprobs.token_logprobs) == {-9999.0}


def test_no_logprobs_field_is_no_log_probabilities(client: openai.OpenAI) -> None:
    assert client.completions.create(model="law", prompt="Once").choices[0].logprobs is None


def test_a_stop_string_is_not_in_the_text(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.reply = lambda generation: "one\n\ntwo"
    answer = client.completions.create(model="law", prompt="Once", stop="\n\n", logprobs=0)
    assert answer.choices[0].text == "one"
    assert answer.choices[0].logprobs is not None
    assert "".join(answer.choices[0].logprobs.tokens or ()) == "one"
