"""Sparse deltas: training chosen entries of a model's own parameters alone, the selective branch of the survey."""

from metier.methods.peft_types import MetierPeftType, register
from metier.methods.sparse_delta.choose import choose_entries, prepare
from metier.methods.sparse_delta.config import SparseDeltaConfig
from metier.methods.sparse_delta.diff_config import DiffPruningConfig
from metier.methods.sparse_delta.diff_model import DiffPruningModel, prune
from metier.methods.sparse_delta.layer import SparseDeltaLayer
from metier.methods.sparse_delta.model import SparseDeltaModel

register(MetierPeftType.SPARSE_DELTA, SparseDeltaConfig, SparseDeltaModel)
register(MetierPeftType.DIFF_PRUNING, DiffPruningConfig, DiffPruningModel)

__all__ = [
    "DiffPruningConfig",
    "DiffPruningModel",
    "SparseDeltaConfig",
    "SparseDeltaLayer",
    "SparseDeltaModel",
    "choose_entries",
    "prepare",
    "prune",
]
