"""How a request that has begun is answered: in a stream, or whole."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import Request
from starlette.responses import Response

from metier.serving.http.answers import AnswerPiece, Answers
from metier.serving.http.disconnect import ClientGoneError, unless_disconnected
from metier.serving.http.errors import json_response
from metier.serving.http.event_stream import EventStream
from metier.serving.http.sampling_fields import SamplingRequest
from metier.serving.http.shape import Json, Shape

_CLIENT_CLOSED_REQUEST = 499


async def answer(request: Request, asked: SamplingRequest, answers: Answers, shape: Shape) -> Response:
    """The response to a request whose answers have been begun."""
    head = {"id": shape.id_prefix + uuid.uuid4().hex, "created": int(time.time()), "model": answers.model}
    if asked.stream:
        return EventStream(_chunks(head, asked, answers, shape), answers.close)
    try:
        whole = await unless_disconnected(request.receive, _whole(head, asked, answers, shape))
    except ClientGoneError:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    finally:
        answers.close()
    return json_response(whole)


async def _chunks(head: Json, asked: SamplingRequest, answers: Answers, shape: Shape) -> AsyncGenerator[Json, None]:
    head = {**head, "object": shape.chunk_object}
    if asked.includes_usage:
        head["usage"] = None
    openings = [shape.opening(index) for index in range(len(answers))]
    for opening in openings:
        if opening is not None:
            yield {**head, "choices": [opening]}
    num_open = len(answers)
    async with aclosing(answers.pieces()) as pieces:
        async for piece in pieces:
            num_open -= piece.finish_reason is not None
            choice = shape.piece(piece.index, piece.text, piece.tokens, piece.finish_reason)
            chunk: Json = {**head, "choices": [choice]}
            if asked.shows_experts and not num_open and not asked.includes_usage:
                chunk["metier"] = answers.speed_and_experts()
            yield chunk
    if asked.includes_usage:
        yield {**head, "choices": [], "usage": answers.usage(), **_extension(asked, answers)}


async def _whole(head: Json, asked: SamplingRequest, answers: Answers, shape: Shape) -> Json:
    pieces: list[list[AnswerPiece]] = [[] for _ in range(len(answers))]
    async with aclosing(answers.pieces()) as all_pieces:
        async for piece in all_pieces:
            pieces[piece.index].append(piece)
    choices = []
    for index, parts in enumerate(pieces):
        text = "".join(part.text for part in parts)
        tokens = [token for part in parts for token in part.tokens]
        choices.append(shape.choice(index, text, tokens, parts[-1].finish_reason or "stop"))
    return {
        **head,
        "object": shape.whole_object,
        "choices": choices,
        "usage": answers.usage(),
        **_extension(asked, answers),
    }


def _extension(asked: SamplingRequest, answers: Answers) -> Json:
    return {"metier": answers.speed_and_experts()} if asked.shows_experts else {}
