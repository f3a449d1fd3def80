"""`/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI, Request
from starlette.responses import Response

from metier.serving.http.answering import answer
from metier.serving.http.chat_request import ChatRequest
from metier.serving.http.chat_shape import ChatShape
from metier.serving.http.completion_request import CompletionRequest
from metier.serving.http.completion_shape import CompletionShape
from metier.serving.http.service import Service


def add_generating(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request, asked: ChatRequest) -> Response:
        service.delta_of(asked.model)
        messages = [message.for_template() for message in asked.messages]
        # in threads: a long prompt takes a while, and other answers must stream on
        prompt = await asyncio.to_thread(service.encoder.encode_chat, messages)
        shape = ChatShape(service.spelling, has_logprobs=asked.num_top_logprobs is not None)
        return await answer(request, asked, service.begin(asked, [prompt]), shape)

    @app.post("/v1/completions")
    async def complete(request: Request, asked: CompletionRequest) -> Response:
        service.delta_of(asked.model)
        # before any work: a request may name a million prompts, or answers
        service.check_number(len(asked.prompt) * asked.num_answers)
        prompts = await asyncio.to_thread(_encoded, service, asked.prompt)
        echoes = []
        if asked.echo:
            texts = await asyncio.to_thread(_texts, service, asked.prompt)
            echoes = [text for text in texts for _ in range(asked.num_answers)]
        shape = CompletionShape(service.spelling, has_logprobs=asked.num_top_logprobs is not None, echoes=echoes)
        return await answer(request, asked, service.begin(asked, prompts), shape)


def _encoded(service: Service, prompts: list[str | list[int]]) -> list[list[int]]:
    encoder = service.encoder
    return [encoder.encode_text(p) if isinstance(p, str) else encoder.check_ids(p) for p in prompts]


def _texts(service: Service, prompts: list[str | list[int]]) -> list[str]:
    return [p if isinstance(p, str) else service.detokenizer.decode(p) for p in prompts]
