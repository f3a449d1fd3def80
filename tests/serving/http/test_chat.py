"""/v1/chat/completions, asked by the openai client."""

from __future__ import annotations

import openai
import pytest

from serving.fake_engine import FakeEngine
from serving.http.serving_app import BASE

MESSAGES = [{"role": "user", "content": "Why?"}]


def test_a_whole_answer(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.chat.completions.create(model="law", messages=MESSAGES)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "Answer of law.")
    assert (choice.finish_reason, choice.logprobs, answer.model) == ("stop", None, "law")
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"


def test_a_stream_joins_to_the_whole_answer(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="law", messages=MESSAGES, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Answer of law."
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all("usage" not in chunk.model_fields_set and chunk.object == "chat.completion.chunk" for chunk in chunks)


def test_a_stream_comes_token_by_token(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.hold_after = 2
    chunks = iter(client.chat.completions.create(model="law", messages=MESSAGES, stream=True))
    texts = [next(chunks).choices[0].delta.content for _ in range(3)]
    assert "Answer of law.".startswith("".join(filter(None, texts)))
    assert texts[1:] != ["", ""]
    engine.hold_after = None
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"


def test_the_base_answers_by_its_own_name(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.chat.completions.create(model=BASE, messages=MESSAGES)
    assert answer.choices[0].message.content == "Answer of the base."
    assert engine.generations[0].delta is None


def test_the_prompt_is_that_of_the_chat_template(client: openai.OpenAI, engine: FakeEngine) -> None:
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]
    client.chat.completions.create(model="law", messages=[{"role": "user", "content": parts, "name": "Ada"}])
    prompt = engine.tokenizer.decode(engine.generations[0].prompt_ids)
    assert prompt == "<|endoftext|><|user|>\nWhy?<|end|>\n<|assistant|>\n"


def test_usage_counts_prompt_answer_and_what_was_cached(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.num_cached_tokens = 5
    usage = client.chat.completions.create(model="law", messages=MESSAGES).usage
    num_prompt, num_answer = len(engine.generations[0].prompt_ids), engine.generations[0].num_given
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (num_prompt, num_answer)
    assert usage.total_tokens == num_prompt + num_answer
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 5


def test_a_stream_ends_with_the_usage_if_asked(client: openai.OpenAI, engine: FakeEngine) -> None:
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(model="law", messages=MESSAGES, stream=True, stream_options=options))
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == engine.generations[0].num_given
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks[:-1])


def test_sampling_settings_reach_the_engine(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.chat.completions.create(
        model="law", messages=MESSAGES, temperature=0.5, top_p=0.9, seed=7, max_completion_tokens=3, user="ada"
    )
    settings = engine.generations[0].settings
    assert (settings.temperature, settings.top_p, settings.seed, settings.max_tokens) == (0.5, 0.9, 7, 3)
    assert settings.num_top_logprobs is None
    assert not settings.counts_experts


def test_without_settings_the_answer_may_fill_the_model(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.chat.completions.create(model="law", messages=MESSAGES)
    generation = engine.generations[0]
    assert generation.settings.max_tokens == engine.max_length - len(generation.prompt_ids)
    assert (generation.settings.temperature, generation.settings.top_p, generation.settings.seed) == (1.0, 1.0, None)


def test_a_cut_answer_says_so(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(model="law", messages=MESSAGES, max_tokens=1).choices[0]
    assert choice.finish_reason == "length"


@pytest.mark.parametrize("stop", ["of law", ["never", "of law"]])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer(
    client: openai.OpenAI, engine: FakeEngine, stop: str | list[str], stream: bool
) -> None:
    engine.reply = lambda generation: "Answer of law. " * 30
    created = client.chat.completions.create(model="law", messages=MESSAGES, stop=stop, stream=stream)  # type: ignore[call-overload]
    if stream:
        chunks = list(created)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        text, reason = created.choices[0].message.content, created.choices[0].finish_reason
    assert (text, reason) == ("Answer ", "stop")
    assert engine.generations[0].is_cancelled
    assert engine.generations[0].num_given < 20


def test_n_answers_have_seeds_of_their_own(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.reply = lambda generation: f"Drawn by {generation.settings.seed}."
    answer = client.chat.completions.create(model="law", messages=MESSAGES, n=3, seed=10)
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [
        (0, "Drawn by 10."),
        (1, "Drawn by 11."),
        (2, "Drawn by 12."),
    ]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(engine.generations[0].prompt_ids)
    assert answer.usage.completion_tokens == sum(generation.num_given for generation in engine.generations)


def test_n_answers_stream_side_by_side(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.reply = lambda generation: f"Drawn by {generation.settings.seed}."
    engine.token_seconds = 0.001
    texts, ends, order = {0: "", 1: ""}, {}, []
    for chunk in client.chat.completions.create(model="law", messages=MESSAGES, n=2, seed=1, stream=True):
        choice = chunk.choices[0]
        order.append(choice.index)
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert texts == {0: "Drawn by 1.", 1: "Drawn by 2."}
    assert ends == {0: "stop", 1: "stop"}
    assert order != sorted(order)


def test_log_probabilities_stand_beside_their_tokens(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(model="law", messages=MESSAGES, logprobs=True, top_logprobs=2).choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    assert "".join(entry.token for entry in content) == "Answer of law.<|end|>"
    assert bytes(value for entry in content for value in entry.bytes or ()) == b"Answer of law.<|end|>"
    assert [entry.logprob for entry in content] == [-0.5] * len(content)
    assert [[top.logprob for top in entry.top_logprobs] for entry in content] == [[-0.5, -1.5]] * len(content)


def test_log_probabilities_stream_with_their_text(client: openai.OpenAI) -> None:
    chunks = client.chat.completions.create(model="law", messages=MESSAGES, logprobs=True, stream=True)
    choices = [chunk.choices[0] for chunk in chunks]
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content or ()]
    assert "".join(entry.token for entry in entries) == "Answer of law.<|end|>"
    assert all(entry.top_logprobs == [] for entry in entries)


def test_characters_of_several_tokens_stream_whole(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.reply = lambda generation: "日本 🤖 naïve"
    chunks = client.chat.completions.create(model="law", messages=MESSAGES, stream=True)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == "日本 🤖 naïve"
    assert not any("�" in text for text in texts)


@pytest.mark.parametrize("include_usage", [False, True])
def test_experts_and_speed_come_in_the_last_chunk_if_asked(
    client: openai.OpenAI, engine: FakeEngine, include_usage: bool
) -> None:
    chunks = list(
        client.chat.completions.create(
            model="law",
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": include_usage},
            extra_body={"metier": {"experts": True}},
        )
    )
    assert all("metier" not in chunk.model_dump() for chunk in chunks[:-1])
    shown = chunks[-1].model_dump()["metier"]
    num_given, num_prompt = engine.generations[0].num_given, len(engine.generations[0].prompt_ids)
    assert shown["experts"] == {
        "layers": [1, 3],
        "counts": [[num_given, 2, 0], [1, 0, num_prompt]],
        "replaced": [[0], [0, 2]],
    }
    assert shown["seconds"] > 0
    assert shown["tokens_per_second"] == pytest.approx(num_given / shown["seconds"])


def test_experts_of_several_answers_are_added_up(client: openai.OpenAI, engine: FakeEngine) -> None:
    body = {"metier": {"experts": True}}
    answer = client.chat.completions.create(model="law", messages=MESSAGES, n=2, extra_body=body)
    counts = answer.model_dump()["metier"]["experts"]["counts"]
    assert counts[0] == [sum(generation.num_given for generation in engine.generations), 4, 0]


def test_without_asking_nothing_is_said_of_experts(client: openai.OpenAI) -> None:
    assert "metier" not in client.chat.completions.create(model="law", messages=MESSAGES).model_dump()
