"""Requests in transformers' batch: what the batch knows of one, and that each of them has a last output.

By itself transformers says nothing of a request that is cancelled, and its scheduler takes no new ones after a full
cache until somebody finishes, which nobody does if all who run are cancelled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import FIFOScheduler

from metier.serving.contract import SamplingSettings
from metier.serving.sampling import Draw


@dataclass(kw_only=True, slots=True)
class BatchRequest:
    """One request as the batch sees it."""

    request_id: str
    prompt_ids: list[int]
    number: int
    """Of its delta, as the layers know it."""
    key: int
    """Of its delta's weights, as the cache knows them: another one each time that a delta is loaded."""
    settings: SamplingSettings
    eos_token_ids: list[int]
    draw: Draw | None = None
    is_cancelled: bool = False
    """Whether nobody wants its answer any more; it is taken out before the next step."""
    num_cached_tokens: int = 0
    counts: dict[int, Tensor] = field(default_factory=dict)
    """How often each expert was used, by layer; where that is asked for."""


Outputs = Callable[[list[Any]], None]
"""Takes transformers' outputs of one step, in the thread that runs the model."""


def failed(state: RequestState, error: Exception) -> Any:
    """The last output of a request that is not finished."""
    state.status = RequestStatus.FAILED
    # some exceptions have no text, such as Python's own MemoryError
    state.error = str(error) or repr(error)
    return state.to_generation_output()


class Router:
    """Takes the place of transformers' output router."""

    def __init__(self, on_outputs: Outputs) -> None:
        self._on_outputs = on_outputs

    def deliver(self, output: Any) -> None:
        self._on_outputs([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        self._on_outputs(outputs)

    def fail_and_deliver(self, state: RequestState, error: Exception) -> None:
        self._on_outputs([failed(state, error)])


class Scheduler(FIFOScheduler):
    """transformers' own, which also says that a cancelled request is out of the batch, and goes on without it."""

    def __init__(
        self, cache: PagedAttentionCache, max_requests: int, requests: dict[str, BatchRequest], router: Router
    ) -> None:
        super().__init__(cache=cache, safety_margin=None, max_requests_per_batch=max_requests)
        self._requests, self._router = requests, router

    def clear_cancelled_requests(self) -> list[RequestState]:
        for request_id in (*self.active_requests, *self.waiting_requests):
            if self._requests[request_id].is_cancelled:
                self.set_request_cancellation(request_id)
        states: list[RequestState] = super().clear_cancelled_requests()
        if states:
            # else those that a full cache put back would wait for somebody to finish, and there may be nobody left
            self.block_new_requests = False
            self._router.deliver_batch([failed(state, RuntimeError("cancelled")) for state in states])
        return states
