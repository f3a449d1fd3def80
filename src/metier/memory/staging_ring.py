"""Send pieces of host memory to a device through a few pinned buffers, on a stream of its own.

Pinning a whole store can take all of a machine's memory, and fail; so only the buffers are pinned. While one is on its
way, the next is filled. Where there is no CUDA, a piece is copied and that is all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

_BUFFER_BYTES = 16 << 20
_NUM_BUFFERS = 3


class StagingRing:
    """Pinned buffers to one device, used in turn. The stream and the buffers are made once: per-step ones pile up."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: list[Tensor] = []
        self._sent: list[torch.cuda.Event] = []
        self._next = 0

    @torch.no_grad()
    def send(self, pieces: Sequence[Tensor]) -> Tensor:
        """Pieces of one shape and dtype, stacked on the device; the current stream waits for them, the host not."""
        first = pieces[0]
        out = torch.empty(len(pieces), *first.shape, dtype=first.dtype, device=self.device)
        if self._stream is None:
            return torch.stack(list(pieces), out=out)
        # `out` may be memory that the current stream has not finished with
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        at_once = max(1, _BUFFER_BYTES // first.nbytes)
        with torch.cuda.stream(self._stream):
            for start in range(0, len(pieces), at_once):
                part = pieces[start : start + at_once]
                buffer, number = self._free_buffer(at_once * first.nbytes)
                packed = buffer[: len(part) * first.nbytes].view(first.dtype).view(len(part), *first.shape)
                torch.stack(list(part), out=packed)
                out[start : start + len(part)].copy_(packed, non_blocking=True)
                self._sent[number].record(self._stream)
        out.record_stream(self._stream)
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        return out

    def _free_buffer(self, num_bytes: int) -> tuple[Tensor, int]:
        number = self._next
        self._next = (number + 1) % _NUM_BUFFERS
        if number == len(self._buffers):
            self._buffers.append(torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True))
            self._sent.append(torch.cuda.Event())
        self._sent[number].synchronize()
        if self._buffers[number].nbytes < num_bytes:
            self._buffers[number] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        return self._buffers[number], number


@cache
def staging_ring(device: torch.device) -> StagingRing:
    """The one of that device: layers are sent in turn, and pinned memory is scarce."""
    return StagingRing(device)
