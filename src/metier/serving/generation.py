"""One answer as it comes out of the engine: what the event loop waits for, and how it ends."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from metier.serving.contract import Finish, GeneratedToken


class Answer:
    """A `Generation`. All of it belongs to the event loop's thread.

    Attributes:
        finish: how it ended; None while it goes on.
        num_tokens: that came so far.
    """

    def __init__(self, request_id: str, delta: str | None, cancel: Callable[[Answer], None]) -> None:
        self.request_id, self.delta = request_id, delta
        self.finish: Finish | None = None
        self.num_tokens = 0
        self._cancel = cancel
        self._tokens: deque[GeneratedToken] = deque()
        self._has_news = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[GeneratedToken]:
        while True:
            while self._tokens:
                yield self._tokens.popleft()
            if self.finish is not None:
                return
            self._has_news.clear()
            await self._has_news.wait()

    def cancel(self) -> None:
        """Stop it. Nothing happens if it is over."""
        if self.finish is None:
            self._cancel(self)

    def add(self, tokens: Sequence[GeneratedToken]) -> None:
        """Tokens that came; after the end they are nobody's."""
        if self.finish is None:
            self.num_tokens += len(tokens)
            self._tokens.extend(tokens)
            self._has_news.set()

    def end(self, finish: Finish) -> None:
        """It is over; the first reason counts."""
        if self.finish is None:
            self.finish = finish
            self._has_news.set()
