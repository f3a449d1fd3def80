"""Before a server answers anybody: does each delta, served beside others, say what its merged model says?

The merged model is made the other way, by the code that merges: the delta's files are read again and its rows written
over the base's own, which are put back after. So it is a test of all that serving does, and of this base.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn
from transformers import PreTrainedModel

from metier.deltas.merge import rows_in_place
from metier.deltas.probe import TOLERANCES, largest_difference, logits_of, probe_tokens
from metier.deltas.read import read_delta
from metier.errors import VerificationError
from metier.models.unwrap import base_module
from metier.serving.served_delta import ServedDelta
from metier.serving.step import make_step, running

_NUM_TOKENS = 32
"""Of each of the two sequences that are compared."""


def self_test(model: PreTrainedModel, delta: ServedDelta, number: int, name: str) -> float:
    """Compare a delta that is placed with its merged model. Nobody else may use the model meanwhile.

    Args:
        number: by which it is placed.
        name: what people call it, for errors.

    Returns:
        the largest difference of two logits, as a share of the largest logit.

    Raises:
        VerificationError: the difference is larger than rounding explains.
    """
    tokens_BS = probe_tokens(model)[:2, :_NUM_TOKENS]
    with running(make_step([(number, tokens_BS.numel())], device=model.device)):
        served_BSV = logits_of(model, tokens_BS)
    with _merged(model, delta):
        merged_BSV = logits_of(model, tokens_BS)
    difference = largest_difference(served_BSV, merged_BSV) / float(merged_BSV.abs().max())
    tolerance = TOLERANCES[model.dtype]
    if not difference <= tolerance:
        raise VerificationError(
            f"delta {name!r} ({delta.folder}): served, its logits differ from those of its merged model by "
            f"{difference:.1e} of the largest, where {tolerance:.0e} counts as rounding.\n"
            "It would be answered wrongly, so the server does not start. `metier verify` checks the delta by itself; "
            "if that passes, please report this."
        )
    return difference


def _merged(model: PreTrainedModel, delta: ServedDelta) -> AbstractContextManager[None]:
    if delta.kind == "lora":
        return _linears_in_place(model, delta)
    return rows_in_place(read_delta(delta.folder), model)


@contextmanager
def _linears_in_place(model: PreTrainedModel, delta: ServedDelta) -> Iterator[None]:
    """A LoRA's changes in the base's own weights while the block runs, then the base's bits again."""
    loaded = delta.load().loaded
    assert loaded is not None, "loaded just now"
    saved: list[tuple[nn.Module, nn.Parameter]] = []
    try:
        for path in dict.fromkeys(x.path for x in delta.tensors):
            own = {x.parameter: loaded[x.name].double() for x in delta.tensors if x.path == path}
            module = base_module(model, path)
            assert module is not None, "the delta was opened on this base"
            weight: nn.Parameter = module.weight  # type: ignore[assignment]
            saved.append((module, weight))
            (scale,) = delta.scales[path]
            change = (scale * (own["B"] @ own["A"])).to(weight)
            # another parameter: the base may use the same weight for its embeddings, which the LoRA does not change
            module.weight = nn.Parameter(weight + change, requires_grad=False)
        yield
    finally:
        for module, weight in saved:
            module.weight = weight
