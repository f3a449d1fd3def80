"""What a request may not ask: refused by name, in OpenAI's error format, before anything is generated."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import openai
import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from metier.errors import EngineError, OverloadedError, RequestError
from metier.serving.http.chat_request import ChatRequest
from serving.fake_engine import FakeEngine
from serving.http.serving_app import chat, client_of
from serving.made_tokenizers import byte_level

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def app_engine() -> FakeEngine:
    return FakeEngine(byte_level())


@pytest.fixture(scope="module")
def app(app_engine: FakeEngine) -> TestClient:
    return client_of(app_engine)


def error_of(response: httpx2.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("functions", [{}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("logit_bias", {"5": 1}),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("audio", {"voice": "a"}),
        ("modalities", ["text", "audio"]),
        ("prediction", {"type": "content", "content": "a"}),
        ("reasoning_effort", "low"),
        ("web_search_options", {}),
        ("top_k", 5),
        ("guided_json", {}),
        ("chat_template_kwargs", {"enable_thinking": False}),
    ],
)
def test_fields_that_would_change_the_answer_are_refused_by_name(app: TestClient, field: str, value: Any) -> None:
    error = error_of(app.post(CHAT, json=chat(**{field: value})), 400)
    assert error["message"].startswith(f"{field}: this server does not support it.")
    assert (error["type"], error["param"]) == ("invalid_request_error", field)


@pytest.mark.parametrize(("field", "value"), [("suffix", "end"), ("presence_penalty", 1), ("best_of", 2)])
def test_completions_refuse_theirs_by_name(app: TestClient, field: str, value: Any) -> None:
    error = error_of(app.post(COMPLETIONS, json={"model": "law", "prompt": "a", field: value}), 400)
    assert error["message"].startswith(f"{field}: this server ")
    assert error["param"] == field


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "ada", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "x"},
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {}},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "parallel_tool_calls": True, "top_k": -1},
        {"tools": None, "stop": None, "temperature": None, "n": None, "stream": None, "seed": None, "logprobs": False},
        {"stop": []},
    ],
)
def test_fields_that_change_nothing_are_accepted(app: TestClient, fields: dict[str, Any]) -> None:
    assert app.post(CHAT, json=chat(**fields)).status_code == 200


@pytest.mark.parametrize(
    ("field", "nearest"), [("temprature", "temperature"), ("max_token", "max_tokens"), ("logit_bia", "logit_bias")]
)
def test_an_unknown_field_names_the_nearest(app: TestClient, field: str, nearest: str) -> None:
    error = error_of(app.post(CHAT, json=chat(**{field: 1})), 400)
    assert error["message"] == f"{field}: unknown field. Did you mean {nearest!r}?"
    assert error["param"] == field


def test_an_unknown_field_like_no_other_is_refused(app: TestClient) -> None:
    error = error_of(app.post(CHAT, json=chat(**{"q" * 5000: 1})), 400)
    assert error["message"] == "q" * 60 + ": unknown field."


def test_an_unknown_field_that_is_no_text_is_refused(app: TestClient) -> None:
    body = b'{"model": "law", "messages": [], "\\ud83e": 1}'
    error = error_of(app.post(CHAT, content=body, headers={"Content-Type": "application/json"}), 400)
    assert error["param"] == "\\ud83e"


def test_an_unknown_field_of_a_message_is_named_with_its_place(app: TestClient) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "a", "contents": "b"}]
    error = error_of(app.post(CHAT, json=chat(messages=messages)), 400)
    assert error["message"] == "messages[1].contents: unknown field. Did you mean 'content'?"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 2.5}, "temperature: Input should be less than or equal to 2"),
        ({"temperature": "1"}, "temperature: Input should be a valid number"),
        ({"top_p": 0}, "top_p: Input should be greater than 0"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens: Input should be a valid integer"),
        ({"n": 0}, "n: Input should be greater than or equal to 1"),
        ({"seed": 2**70}, "seed: Input should be less than 9223372036854775808"),
        ({"stop": ""}, "stop: expected a text that is not empty"),
        ({"stop": [1]}, "stop: expected a text that is not empty, or a list of such texts"),
        ({"stop": list("abcde")}, "stop: got 5 texts, expected at most 4"),
        ({"top_logprobs": 2}, "top_logprobs: expected only with logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: Input should be less than or equal to 20"),
        ({"stream_options": {"include_usage": True}}, "stream_options: expected only with stream: true"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens: it differs from max_completion_tokens"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role: Input should be 'system', "),
        ({"messages": [{"role": "user"}]}, "messages[0].content: it is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content: Input should be a valid string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content: part 0 has type 'image_url'; this server takes parts of type 'text' alone",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages[0].tool_calls: this server does not support it.",
        ),
        ({"messages": ["Why?"]}, "messages[0]: expected an object"),
        ({"messages": [{"role": "user", "content": "\ud83e"}]}, "messages: got half of a UTF-16 pair"),
        ({"metier": {"expert": True}}, "metier.expert: unknown field. Did you mean 'experts'?"),
        ({"model": 5}, "model: Input should be a valid string"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(app: TestClient, fields: dict[str, Any], message: str) -> None:
    error = error_of(
        app.post(CHAT, content=json.dumps(chat(**fields)), headers={"Content-Type": "application/json"}), 400
    )
    assert error["message"].startswith(message)


@pytest.mark.parametrize("prompt", [None, [], ["a", 1], [1, True], [[]], [[1], []], [1.0], {"a": 1}, 5])
def test_a_prompt_of_another_form_is_refused(app: TestClient, prompt: Any) -> None:
    error = error_of(app.post(COMPLETIONS, json={"model": "law", "prompt": prompt}), 400)
    assert error["message"].startswith("prompt: expected a text, a list of texts, a list of token ids, or a list of")


def test_a_token_id_outside_of_the_vocabulary_is_refused(app: TestClient) -> None:
    error = error_of(app.post(COMPLETIONS, json={"model": "law", "prompt": [8192]}), 400)
    assert error["message"] == "prompt: got token id 8192, expected ids from 0 to 8191."


def test_echo_with_log_probabilities_is_refused(app: TestClient) -> None:
    error = error_of(app.post(COMPLETIONS, json={"model": "law", "prompt": "a", "echo": True, "logprobs": 1}), 400)
    assert error["message"].startswith("echo: this server has no log probabilities of prompts.")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"model": ', "The body is no JSON: Expecting value at character 10."),
        (b"\xff\x00{", "POST /v1/chat/completions: There was an error parsing the body"),
        (b"[" * 100_000, "POST /v1/chat/completions: There was an error parsing the body"),
        (b'{"model": "law", "messages": ' + b'{"a":' * 50_000, "POST /v1/chat/completions: There was an error parsing"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "POST /v1/chat/completions: There was an error parsing the body"),
        (b"", "Got no body, expected a JSON object"),
        (b"[]", "Got something else, expected a JSON object"),
        (b"null", "Got something else, expected a JSON object"),
        (b'"text"', "Got something else, expected a JSON object"),
        (b'{"model": "law", "temperature": NaN, "messages": []}', "temperature: Input should be a finite number"),
    ],
)  # fmt: skip
def test_a_body_that_is_no_request_is_refused(app: TestClient, body: bytes, message: str) -> None:
    error = error_of(app.post(CHAT, content=body, headers={"Content-Type": "application/json"}), 400)
    assert error["message"].startswith(message)


def test_a_body_without_its_type_is_refused_as_pages_of_others_would_send_it(app: TestClient) -> None:
    body = json.dumps(chat())
    assert app.post(CHAT, content=body, headers={"Content-Type": "text/plain"}).status_code == 400
    assert app.post(CHAT, content=body).status_code == 400


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_an_unknown_model_is_not_found(app: TestClient, path: str) -> None:
    body = chat(model="lwa\ud83e") if path == CHAT else {"model": "lwa\ud83e", "prompt": "a"}
    response = app.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = error_of(response, 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "expected one of org/base, law, medicine" in error["message"]


def test_the_openai_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="got 'lwa', expected one of") as raised:
        client.chat.completions.create(model="lwa", messages=[{"role": "user", "content": "a"}])
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="presence_penalty: this server does not support it"):
        client.completions.create(model="law", prompt="a", presence_penalty=1)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RequestError("too long"), 400, None),
        (OverloadedError("too many wait"), 429, "overloaded"),
        (EngineError("the engine has died\nTraceback: ..."), 503, "unavailable"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_is_told_with_its_status(
    error: Exception, status: int, code: str | None, stream: bool
) -> None:
    engine = FakeEngine(byte_level(), submit_error=error)
    response = client_of(engine).post(CHAT, json=chat(stream=stream))
    told = error_of(response, status)
    assert (told["message"], told["code"]) == (str(error).splitlines()[0], code)
    assert ("retry-after" in response.headers) == (status == 429)


def test_when_one_of_several_answers_is_refused_the_others_are_cancelled() -> None:
    engine = FakeEngine(byte_level())
    submit, num_submitted = engine.submit, 0

    def submit_two(*arguments: Any, **options: Any) -> Any:
        nonlocal num_submitted
        num_submitted += 1
        if num_submitted > 2:
            raise OverloadedError("too many wait")
        return submit(*arguments, **options)

    engine.submit = submit_two  # type: ignore[method-assign]
    error_of(client_of(engine).post(CHAT, json=chat(n=3)), 429)
    assert [generation.is_cancelled for generation in engine.generations] == [True, True]


def test_a_prompt_and_answer_longer_than_the_model_are_refused(app: TestClient, app_engine: FakeEngine) -> None:
    num_prompt = len(byte_level().apply_chat_template(chat()["messages"], add_generation_prompt=True)["input_ids"])
    room = app_engine.max_length - num_prompt
    assert app.post(CHAT, json=chat(max_tokens=room)).status_code == 200
    error = error_of(app.post(CHAT, json=chat(max_tokens=room + 1)), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith(f"The prompt has {num_prompt} tokens and its answer may have {room + 1}, but")


def test_a_prompt_that_fills_the_model_is_refused(app: TestClient, app_engine: FakeEngine) -> None:
    body = {"model": "law", "prompt": [9] * app_engine.max_length, "max_tokens": 1}
    assert error_of(app.post(COMPLETIONS, json=body), 400)["code"] == "context_length_exceeded"


def test_a_prompt_over_the_servers_limit_is_refused() -> None:
    app = client_of(max_prompt_tokens=5)
    assert app.post(COMPLETIONS, json={"model": "law", "prompt": [9] * 5}).status_code == 200
    error = error_of(app.post(COMPLETIONS, json={"model": "law", "prompt": [9] * 6}), 400)
    assert error["message"] == "The prompt has 6 tokens, but this server takes prompts of at most 5."


def test_more_answers_than_one_request_may_have_are_refused() -> None:
    app = client_of(max_n=4)
    assert app.post(COMPLETIONS, json={"model": "law", "prompt": ["a", "b"], "n": 2}).status_code == 200
    error = error_of(app.post(COMPLETIONS, json={"model": "law", "prompt": ["a", "b"], "n": 3}), 400)
    assert error["message"].startswith("n: got 6 answers (prompts times n), expected at most 4")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", CHAT, 405)])
def test_what_is_not_there_is_told_in_the_same_format(app: TestClient, method: str, path: str, status: int) -> None:
    assert path in error_of(app.request(method, path), status)["message"]


@pytest.mark.parametrize(
    "asked",
    [
        {"prompt": "a", "echo": True, "n": 10**9},
        {"prompt": ["a"] * 200_000, "echo": True},
    ],
)
def test_more_answers_than_one_request_may_have_are_refused_before_any_work(
    app: TestClient, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object) -> None:
        raise AssertionError("nothing was to be encoded")

    monkeypatch.setattr("metier.serving.http.generating._encoded", work)
    error = error_of(app.post(COMPLETIONS, json={"model": "law", **asked}), 400)
    assert error["message"].startswith("n: got ")


def test_a_stop_that_is_a_book_is_refused(app: TestClient) -> None:
    error = error_of(app.post(COMPLETIONS, json={"model": "law", "prompt": "a", "stop": "a" * 1001}), 400)
    assert "got a text of 1001 characters, expected at most 1000" in error["message"]


def test_of_many_wrong_messages_the_first_is_told_and_the_others_are_not_read(app: TestClient) -> None:
    read = []

    class Counted(dict[str, Any]):
        def items(self) -> Any:
            read.append(1)
            return super().items()

    with pytest.raises(ValidationError) as told:
        ChatRequest.model_validate({"model": "law", "messages": [Counted(rol=0) for _ in range(100)]})
    assert told.value.error_count() == 1
    assert len(read) == 1
    error_of(app.post(CHAT, json={"model": "law", "messages": [0] * 1000}), 400)
