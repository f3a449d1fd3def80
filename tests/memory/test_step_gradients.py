"""Room for gradients of rows: made as it is needed, or all at once."""

from __future__ import annotations

import torch

from metier.memory.row_store import RowStore
from metier.memory.step_gradients import StepGradients

CPU = torch.device("cpu")


def test_what_is_reserved_is_room_for_every_block_and_stays_where_it_is() -> None:
    gradients = StepGradients(RowStore(6, 2, 4))
    room = gradients.reserve(CPU)
    assert room.shape == (6, 2, 2, 4)
    for block_ids in ([3], [1, 5], [0, 2, 4]):
        places, fired, _ = gradients.places(block_ids, CPU)
        for block, place, rows in zip(block_ids, places, fired, strict=True):
            place.fill_(block)
            rows.fill_(True)
    assert gradients.holder.grad is not None
    assert gradients.holder.grad.data_ptr() == room.data_ptr()
    assert gradients.holder.grad[:, 0, 0, 0].tolist() == gradients.block_ids == [3, 1, 5, 0, 2, 4]
