"""Where the rows of wide adapters live: on the device, in host memory or on disk, and how they are trained there."""

from metier.memory.clipping import clip_grad_norm_
from metier.memory.row_adamw import RowAdamW
from metier.memory.row_store import RowStore

__all__ = ["RowAdamW", "RowStore", "clip_grad_norm_"]
