"""Run a model over ready sequences and count what its routers do, until all are done or enough is known."""

# N sequences, B sequences a batch, S sequence_length, T tokens, G blocks of sequences

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metier import __version__
from metier.data.pairs import Pair, PairCollator
from metier.distributed.ranks import Ranks, ranks_here, summed
from metier.errors import ConfigError, DataError, UnsupportedModelError
from metier.models.encoder_decoder import decoder_start_token, is_encoder_decoder, refuse_encoder_decoder
from metier.models.fingerprint import fingerprint_of_any
from metier.models.moe import MoELayer
from metier.models.routed import routed_layers
from metier.models.unwrap import bare_model
from metier.routing.blocks import BlockCounts
from metier.routing.capture import RoutingCapture, evaluating
from metier.routing.counter import RoutingCounter
from metier.routing.inputs import NOT_COUNTED, FullSequences, Inputs, Pairs
from metier.routing.routing_profile import RoutingProfile, UnreliableProfileWarning
from metier.routing.stability import (
    MIN_SEQUENCES,
    NUM_BLOCKS,
    Stability,
    StabilityConfig,
    check_points,
    measure_stability,
)


def count_sequences(
    model: nn.Module,
    sequences_NS: Tensor,
    *,
    batch_size: int,
    output_norms: bool = False,
    until_stable: StabilityConfig | None = None,
    over_ranks: bool = False,
) -> RoutingProfile:
    """The profile of ready sequences of token ids.

    Args:
        model: a transformers MoE model, bare or wrapped by PEFT; or a dense one with a mixture of experts on it.
        sequences_NS: token ids without padding, int64, (num_sequences, sequence_length).
        batch_size: sequences a forward pass.
        output_norms: measure the norms of the experts' outputs too, which runs the experts once more.
        until_stable: stop as soon as the selection is stable; looked at after 16 sequences, 32, 64 … The
            profile then has `stable_after_tokens` and `split_half_interval` in its meta.
        over_ranks: each of the processes that work together runs its share of the batches, and each gets the profile
            of them all. All of them must call this.

    Warns:
        UnreliableProfileWarning: `until_stable`, but the selection was not stable after all sequences.

    Raises:
        UnsupportedModelError: as `metier.routing.profile.profile`; or an encoder-decoder.
        ConfigError: `until_stable` selects by output norms, which are not measured.
        DataError: no sequence; or a single one, which has no second half, with `until_stable`.
    """
    refuse_encoder_decoder(model, "count_sequences", "Give its prompts and replies to `count_pairs`.")
    inputs = FullSequences(sequences_NS)
    return _count(
        model,
        inputs,
        batch_size=batch_size,
        output_norms=output_norms,
        until_stable=until_stable,
        over_ranks=over_ranks,
    )


def count_pairs(
    model: nn.Module,
    pairs: Sequence[Pair],
    *,
    pad_token_id: int,
    batch_size: int,
    output_norms: bool = False,
    until_stable: StabilityConfig | None = None,
    over_ranks: bool = False,
) -> RoutingProfile:
    """The profile of an encoder-decoder on prompts and their replies; padding is not counted.

    The encoder's layers count the prompts' tokens, the decoder's the replies'; `num_tokens` is all of them, so that
    scores on the raw scale, a mean a token, do not exist. Otherwise as `count_sequences`.

    Args:
        model: an encoder-decoder of transformers, bare or wrapped by PEFT.
        pairs: in the order that makes even and odd ones the two halves.
        pad_token_id: the tokenizer's.
        batch_size: pairs a forward pass.
        output_norms: as `count_sequences`.
        until_stable, over_ranks: as `count_sequences`.
    """
    inputs = Pairs(pairs, PairCollator(pad_token_id, decoder_start_token(model)))
    return _count(
        model,
        inputs,
        batch_size=batch_size,
        output_norms=output_norms,
        until_stable=until_stable,
        over_ranks=over_ranks,
    )


def _count(
    model: nn.Module,
    inputs: Inputs,
    *,
    batch_size: int,
    output_norms: bool,
    until_stable: StabilityConfig | None,
    over_ranks: bool,
) -> RoutingProfile:
    num_tokens_N = inputs.num_tokens_N
    num_sequences = len(num_tokens_N)
    _check(until_stable, num_sequences=num_sequences, output_norms=output_norms)
    layers = routed_layers(model)
    num_experts, top_k = _uniform(layers, "num_experts"), _uniform(layers, "top_k")
    num_blocks = 2 if until_stable is None else NUM_BLOCKS
    counter = RoutingCounter(
        num_layers=len(layers), num_experts=num_experts, num_groups=num_blocks, with_output_norms=output_norms
    )
    capture = RoutingCapture(layers, counter, with_output_norms=output_norms)
    block_N = torch.arange(num_sequences) % num_blocks
    meta = _describe(model, sequence_length=inputs.sequence_length)
    ranks = ranks_here() if over_ranks else Ranks()
    start = 0
    with evaluating(model), capture.watch():
        for end in [num_sequences] if until_stable is None else check_points(num_sequences):
            # a pass at a time and process: the very batches of one process, so the routers see the same bits
            for first in range(start + ranks.rank * batch_size, end, ranks.size * batch_size):
                _run(model, inputs, first, min(first + batch_size, end), block_N, capture)
            blocks = BlockCounts.counted(
                counter,
                layer_ids=tuple(layer.index for layer in layers),
                num_experts=num_experts,
                top_k=top_k,
                num_tokens_G=torch.zeros(num_blocks, dtype=torch.int64).index_add_(
                    0, block_N[:end], num_tokens_N[:end]
                ),
                meta=meta,
                over=summed if over_ranks else None,
            )
            if until_stable is not None:
                stability = measure_stability(blocks, until_stable, num_sequences=end)
                if stability.is_stable or end == num_sequences:
                    _report(stability, until_stable, meta)
                    break
            start = end
    return blocks.profile()


def _check(until_stable: StabilityConfig | None, *, num_sequences: int, output_norms: bool) -> None:
    if num_sequences < 1 or (until_stable is not None and num_sequences < 2):
        raise DataError(
            f"sequences: got {num_sequences}, expected at least {1 if until_stable is None else 2} to measure.\n"
            f"Give more data."
        )
    if until_stable is not None and until_stable.selection.score == "output_norm" and not output_norms:
        raise ConfigError(
            "until_stable: got a selection by output_norm scores, but output_norms=False, so they are not "
            "measured.\nPass output_norms=True."
        )


def _run(model: nn.Module, inputs: Inputs, start: int, end: int, block_N: Tensor, capture: RoutingCapture) -> None:
    device = next(model.parameters()).device
    # the logits of every position would be the largest tensor of the pass, and nobody looks at them
    accepted = inspect.signature(bare_model(model).forward).parameters
    extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    batch, block_B1 = inputs.batch(start, end), block_N[start:end, None]

    def groups(is_token_BS: Tensor) -> Tensor:
        return torch.where(is_token_BS, block_B1, NOT_COUNTED).flatten().to(device)

    encoder = None if batch.is_encoder_token_BS is None else groups(batch.is_encoder_token_BS)
    with capture.batch(groups(batch.is_token_BT), encoder):
        model(**{name: tensor.to(device) for name, tensor in batch.inputs.items()}, use_cache=False, **extra)


def _report(stability: Stability, config: StabilityConfig, meta: dict[str, str]) -> None:
    """Write into `meta` when the selection was stable, or warn that it was not."""
    found = f"{stability} of {config.selection.score_name}, {config.selection.policy_name}"
    meta["split_half_interval"] = found
    meta["stable_after_tokens"] = str(stability.num_tokens) if stability.is_stable else "never"
    if stability.is_stable:
        return
    few = stability.num_sequences < MIN_SEQUENCES
    why = f"fewer than {MIN_SEQUENCES} sequences say nothing" if few else f"expected at least {stability.threshold}"
    warnings.warn(
        f"routing profile: the selection is not stable after all {stability.num_tokens} tokens in "
        f"{stability.num_sequences} sequences: {found}; {why}.\n"
        f"Profile more tokens of the task{', or shorter sequences' if few else ''}.",
        UnreliableProfileWarning,
        stacklevel=4,
    )


def _uniform(layers: Sequence[MoELayer], name: str) -> int:
    values = {getattr(layer, name): layer for layer in layers}
    if len(values) > 1:
        first, second, *_ = values.items()
        raise UnsupportedModelError(
            f"{second[1].path}: got {name}={second[0]}, but {first[1].path} has {name}={first[0]}.\n"
            f"A profile is one table and needs the same {name} in all layers."
        )
    return int(next(iter(values)))


def _describe(model: nn.Module, *, sequence_length: int) -> dict[str, str]:
    bare = bare_model(model)
    config = getattr(bare, "config", None)
    adapters = getattr(model, "active_adapters", []) if bare is not model else []
    return {
        "model": getattr(config, "_name_or_path", "") or type(bare).__name__,
        "model_type": str(getattr(config, "model_type", type(bare).__name__)),
        "fingerprint": fingerprint_of_any(model),
        "adapter": ", ".join(adapters) or "none",
        "dtype": str(next(bare.parameters()).dtype).removeprefix("torch."),
        "sequence_length": str(sequence_length),
        **({"encoder_decoder": "true"} if is_encoder_decoder(model) else {}),
        "metier": __version__,
    }
