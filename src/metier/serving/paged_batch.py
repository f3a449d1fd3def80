"""transformers' continuous batching for many deltas: its scheduler, paged cache and loop, and whose each token is.

What is put in place of transformers' own parts: the cache (prefixes by delta), the last logits processor (one sampler
for all settings), the scheduler and the router of outputs (each request has a last output, whatever it ends of), and
on a CPU the attention. A hook before each forward pass tells the layers which token uses which delta.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
from transformers.generation.continuous_batching.initialization import update_cb_config_after_cache_creation
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import RequestState

from metier.errors import ServingError, UnsupportedModelError
from metier.serving import paged_attention
from metier.serving.paged_cache import NOBODY, DeltaCache, cache_config
from metier.serving.paged_requests import BatchRequest, Outputs, Router, Scheduler, failed
from metier.serving.sampling import RequestSampler
from metier.serving.side_work import SIDE_WORK
from metier.serving.step import NO_DELTA, Step, make_step, running

PAGE_TOKENS = 128
"""Tokens of a block of the cache: the unit in which prefixes are shared. On a CPU the keys and values of a request that
fits in one are not copied for attention."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLimits:
    max_requests: int
    """In one batch."""
    max_batch_tokens: int
    """Of one step: a longer prompt is taken in parts, between which others go on."""
    cache_tokens: int
    """Keys and values of so many tokens are kept."""
    fewer_will_do: bool = False
    """Where transformers holds that so many do not fit, as many as it holds do."""


class PagedBatch:
    """The running batch. `add` and `cancel` may be called from any thread.

    Each request that was added has exactly one output that `is_finished()`: after it no step has the request in it, and
    its delta is free of it. `on_outputs` is called once more, maybe with nothing, when the loop has ended.
    """

    def __init__(self, model: PreTrainedModel, limits: BatchLimits, on_outputs: Outputs) -> None:
        """Raises:
        UnsupportedModelError: it has layers of a kind that the batch does not have.
        ServingError: the cache does not fit.
        """
        self.requests: dict[str, BatchRequest] = {}
        self._on_outputs = on_outputs
        self._lock = threading.Lock()
        self._is_running = False
        self._sampler = RequestSampler()
        self._model = model
        self._former_attention: str = model.config._attn_implementation
        try:
            self._manager = _manager(model, limits)
            processors = self._manager.logit_processor
            processors.logits_processor.append(self._sampler)
            processors.tensors_required, processors.do_processing = 1, True
            self._manager.output_router = Router(self._deliver)
            self._manager.batch_processor = self._processor(limits)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ServingError(
                f"serve: a KV cache of {limits.cache_tokens:,} tokens does not fit: {error}.\n"
                "Give it fewer (--cache-tokens), or a step fewer (--max-batch-tokens)."
            ) from error
        except (AttributeError, ValueError, RuntimeError) as error:
            raise unsupported(model, str(error)) from error
        self._cache: DeltaCache = self._manager.batch_processor.cache
        self.max_length = int(infer_max_single_request_tokens(self._cache))
        """Most tokens of one request that the cache can hold."""
        self._loop = self._manager._run_generation_loop
        self._manager._run_generation_loop = self._run
        self._entered: AbstractContextManager[Step] | None = None
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    @property
    def cache_tokens(self) -> int:
        """Whose keys and values the cache has room for, of all requests together."""
        num_blocks: int = self._cache.num_blocks
        return num_blocks * PAGE_TOKENS

    @property
    def cache_used(self) -> float:
        """Share of the cache's blocks that running requests hold; prefixes that are kept for later make way."""
        return self._cache.share_held()

    @property
    def is_alive(self) -> bool:
        return self._is_running and self.error is None

    @property
    def error(self) -> Exception | None:
        """What the loop died of."""
        error: Exception | None = self._manager.background_thread_status.fatal_error
        return error

    def start(self) -> None:
        self._is_running = True
        manager = self._manager
        manager.background_thread_status.clear()
        # as the manager starts it, but that a process which has to end at once does not wait for it
        manager._generation_thread = threading.Thread(target=manager._run_generation_loop, daemon=True)
        manager._generation_thread.start()

    def stop(self) -> None:
        """End the loop after the running step; requests that are not done fail."""
        status = self._manager.background_thread_status
        status.request_stop(status.HARD_STOP, 0)
        self._manager._wake_up_loop.set()  # one that has nothing to do would look again in a tenth of a second
        self._manager.stop(block=True, hard_stop=True)
        for hook in self._hooks:
            hook.remove()
        self._model.set_attn_implementation(self._former_attention)

    def add(self, request: BatchRequest) -> None:
        """Let a request take part from the next step on.

        Raises:
            ServingError: the loop has ended.
        """
        request.draw = self._sampler.add(request.request_id, request.settings)
        with self._lock:  # so that the loop does not end between the two
            self.requests[request.request_id] = request
            is_added = self._is_running and self._manager.add_request(
                request.prompt_ids,
                request_id=request.request_id,
                max_new_tokens=request.settings.max_tokens,
                streaming=True,
                eos_token_id=request.eos_token_ids or -1,
            )
        if not is_added:
            self._forget(request.request_id)
            raise ServingError("the engine's loop has ended; no request can be added. Start the server again.")

    def cancel(self, request_id: str) -> None:
        """Take a request out before the next step; nothing happens if it is over."""
        request = self.requests.get(request_id)
        if request is not None:
            request.is_cancelled = True

    def _run(self) -> None:
        """transformers' loop. Whatever it ends of, nobody goes on waiting for an output."""
        try:
            self._loop()
        finally:
            SIDE_WORK.end()
            with self._lock:
                self._is_running = False
                left = list(self.requests.values())
            error = self.error or RuntimeError("the engine's loop has ended")
            self._deliver([failed(RequestState(each.request_id, each.prompt_ids), error) for each in left])

    def _deliver(self, outputs: list[Any]) -> None:
        for output in outputs:
            if output.is_finished():
                self._forget(output.request_id)
        self._on_outputs(outputs)

    def _forget(self, request_id: str) -> None:
        self._sampler.remove(request_id)
        with self._lock:
            self.requests.pop(request_id, None)
        processor = self._manager.batch_processor
        if processor is not None:
            # once the cache was full, transformers lets nobody in before a request has finished: where all that ran
            # were cancelled, it would be nobody ever again
            processor.scheduler.block_new_requests = False

    def _made_cache(self) -> DeltaCache:
        """Of as many tokens as the manager's configuration has, or None for as many as fit."""
        manager, model = self._manager, self._model
        return DeltaCache(
            config=cache_config(model.config.get_text_config()),
            continuous_batching_config=manager.continuous_batching_config,
            device=model.device,
            distributed_helper=manager.distributed_helper,
            dtype=model.dtype,
            model_supports_logits_to_keep=model._supports_logits_to_keep(),
        )

    def _processor(self, limits: BatchLimits) -> ContinuousBatchProcessor:
        """As the manager makes it, but with our cache."""
        manager, model = self._manager, self._model
        config = model.config.get_text_config()
        try:
            cache = self._made_cache()
        except MemoryError:
            if not limits.fewer_will_do:
                raise
            manager.continuous_batching_config.num_blocks = None
            cache = self._made_cache()
        cache.key_of, cache.on_match = self._key_of, self._note_match
        manager._use_prefix_sharing = cache.use_prefix_sharing
        update_cb_config_after_cache_creation(
            cb_config=manager.continuous_batching_config,
            num_blocks=cache.num_blocks,
            max_batch_tokens=cache.max_batch_tokens,
        )
        most = manager.continuous_batching_config.max_requests_per_batch
        return ContinuousBatchProcessor(
            cache=cache,
            config=config,
            generation_config=manager.generation_config,
            continuous_batching_config=manager.continuous_batching_config,
            logit_processor=manager.logit_processor,
            input_queue=manager.input_queue,
            cancel_queue=manager.cancel_queue,
            output_router=manager.output_router,
            background_thread_status=manager.background_thread_status,
            model_device=model.device,
            model_dtype=model.dtype,
            scheduler=Scheduler(cache, most, self.requests, manager.output_router),
            distributed_helper=manager.distributed_helper,
        )

    def _key_of(self, request_id: str) -> int:
        request = self.requests.get(request_id)
        return NOBODY if request is None else request.key

    def _note_match(self, request_id: str, num_tokens: int) -> None:
        request = self.requests[request_id]
        assert request.draw is not None, "set before it was added"
        # one that was put back because the cache was full is looked up again, with its answer so far
        if not request.draw.has_begun:
            request.num_cached_tokens = num_tokens

    def _before(self, _: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Tell the layers which token is whose."""
        if kwargs.get("cache") is None:
            return
        SIDE_WORK.begin_step()
        states = self._manager.batch_processor.inputs_and_outputs.requests_in_batch
        requests = [self.requests[each.state.request_id] for each in states]
        parts = [(request.number, each.query_length) for request, each in zip(requests, states, strict=True)]
        self._counted = [request for request in requests if request.settings.counts_experts]
        rows = {request.request_id: row for row, request in enumerate(self._counted)}
        counted = [rows.get(request.request_id) for request in requests]
        kept: list[int] = []
        if "logits_to_keep" in kwargs:
            kept = [r.number for r, each in zip(requests, states, strict=True) if each.has_new_token]
            # a row for each request: those that get no token are padded at the end
            kept += [NO_DELTA] * (len(states) - len(kept))
        self._entered = running(make_step(parts, kept=kept, counted=counted, device=self._model.device))
        self._step = self._entered.__enter__()

    def _after(self, *_: Any) -> None:
        if self._entered is None:
            return
        SIDE_WORK.end_step()
        self._entered.__exit__(None, None, None)
        self._entered = None
        for row, request in enumerate(self._counted):
            for layer, counts in self._step.counts.items():
                before = request.counts.get(layer)
                request.counts[layer] = counts[row] if before is None else before + counts[row]


def unsupported(model: PreTrainedModel, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__}: transformers' continuous batching does not serve it: {why.rstrip('.')}.\n"
        "Serve merged models with another server (`metier export --to merged`)."
    )


def _manager(model: PreTrainedModel, limits: BatchLimits) -> Any:
    """transformers' own, not started: it is given other parts first."""
    generation = GenerationConfig(do_sample=False, max_new_tokens=16, eos_token_id=-1, pad_token_id=0)
    config = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=-(-limits.cache_tokens // PAGE_TOKENS),
        max_batch_tokens=limits.max_batch_tokens,
        max_requests_per_batch=limits.max_requests,
        # tokens are drawn by requests' own generators, which a recorded graph cannot do
        use_cuda_graph=False,
        use_async_batching=False,
    )
    manager = model.init_continuous_batching(generation, config)
    if model.device.type == "cpu":
        paged_attention.register()
        model.set_attn_implementation(paged_attention.NAME)
    return manager
