"""Measure what a model's router does on a task: run the model over the task's records and count.

`profile` takes the counts from the experts' inputs while the model runs; `profile_routing` takes them from a
routing log that somebody else wrote. Both count with the same `RoutingCounter`.
"""

# L MoE layers, T tokens, K top_k, N sequences, S sequence_length

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from metier.data.pack import pack
from metier.data.pairs import Pair, encode_pairs
from metier.errors import ConfigError, DataError
from metier.models.encoder_decoder import is_encoder_decoder
from metier.routing.counter import RoutingCounter
from metier.routing.measure import count_pairs, count_sequences
from metier.routing.routing_profile import PAPER_SELECTION, RoutingProfile, UnreliableProfileWarning
from metier.routing.stability import StabilityConfig

if TYPE_CHECKING:
    from metier.data.records import Record

__all__ = [
    "RoutingProfile",
    "StabilityConfig",
    "UnreliableProfileWarning",
    "count_pairs",
    "count_sequences",
    "profile",
    "profile_routing",
]

_SHORTEST_SEQUENCE = 8


def profile(
    model: nn.Module,
    tokenizer: Any,
    records: Sequence[Record],
    *,
    num_tokens: int = 131_072,
    max_length: int = 1024,
    batch_size: int = 4,
    seed: int = 0,
    output_norms: bool = False,
    until_stable: StabilityConfig | None = None,
    over_ranks: bool = False,
) -> RoutingProfile:
    """Count, by layer and expert, what the router chooses on `records`, and how strongly.

    The records' conversations are shuffled, joined and cut into full sequences, so no padding is ever
    counted. Data shorter than two sequences is cut into shorter ones. The model is left as it was: no
    gradient, no hook, and every module in the mode that it was in.

    An encoder-decoder reads each record's prompt and reply as in training, padded, and padding is not counted;
    `max_length` then limits prompt and reply, and longer records are left out with a warning.

    Args:
        model: a transformers MoE model, bare or wrapped by PEFT (then what is measured is the tuned model); or a
            dense one that an adapter has made a mixture of (then its routers are).
        tokenizer: the model's, with a chat template.
        records: conversations of the task, from its training data.
        num_tokens: how many tokens to measure at most; the paper finds 131,072 enough.
        max_length: tokens a sequence.
        batch_size: sequences a forward pass; changes the speed only.
        seed: of the shuffling.
        output_norms: measure what the score "output_norm" needs too. The experts then run twice, so a profile
            takes longer by their part of a forward pass.
        until_stable: stop before `num_tokens` as soon as the selection is stable: the lower end of the
            interval of split-half agreement reaches the threshold. It is looked at after 16 sequences, 32, 64
            and so on, so `max_length` decides how early. None measures all `num_tokens`.
        over_ranks: the processes of a distributed run share the sequences out, and each gets the profile that one
            process would have measured, to the bit. All of them must call this.

    Returns:
        A profile; even and odd sequences are kept apart in it. Fewer tokens than asked for where the data is
        short, or where the selection was stable before: `meta["stable_after_tokens"]` says after how many
        tokens, or "never", and `meta["split_half_interval"]` how stable.

    Warns:
        UnreliableProfileWarning: the two halves of the data select different experts with the paper's setting
            (token scores, top_p=0.2); or, with `until_stable`, its selection was never stable.

    Raises:
        UnsupportedModelError: the model has no MoE layer that follows the contract, or calls it in another
            way.
        ConfigError: a size below 1, or `until_stable` selects by output norms, which are not measured.
        DataError: there are too few tokens to measure two sequences.

    Paper: ESFT, arXiv:2407.01906, section 3 and appendix C ("32 concatenated samples, each L=4096").
    """
    for name, value in (("num_tokens", num_tokens), ("max_length", max_length), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name}: got {value}, expected at least 1.")
    options: dict[str, Any] = {"batch_size": batch_size, "output_norms": output_norms, "until_stable": until_stable}
    options["over_ranks"] = over_ranks
    if is_encoder_decoder(model):
        pairs = _pairs(records, tokenizer, num_tokens=num_tokens, max_length=max_length, seed=seed)
        measured = count_pairs(model, pairs, pad_token_id=int(tokenizer.pad_token_id), **options)
    else:
        sequences_NS = _full_sequences(records, tokenizer, num_tokens=num_tokens, max_length=max_length, seed=seed)
        measured = count_sequences(model, sequences_NS, **options)
    measured.meta.update(num_records=str(len(records)), seed=str(seed))
    if until_stable is None:
        measured.warn_if_unreliable(PAPER_SELECTION)
    return measured


def profile_routing(
    expert_ids_LTK: Tensor,
    routing_weights_LTK: Tensor,
    *,
    layer_ids: Sequence[int],
    num_experts: int,
    sample_lengths: Sequence[int],
    meta: dict[str, str] | None = None,
) -> RoutingProfile:
    """The profile of a routing log: what a router chose, written down token by token.

    Args:
        expert_ids_LTK: chosen experts, any integer dtype, (num_layers, num_tokens, top_k).
        routing_weights_LTK: their weights, any floating dtype, (num_layers, num_tokens, top_k).
        layer_ids: the decoder layer of each row.
        num_experts: routed experts a layer.
        sample_lengths: tokens of each sample, in order; even and odd samples are the two halves.
        meta: what the log is of.

    Raises:
        DataError: the shapes do not fit each other.
    """
    num_layers, num_tokens, top_k = expert_ids_LTK.shape
    if routing_weights_LTK.shape != expert_ids_LTK.shape or len(layer_ids) != num_layers:
        raise DataError(
            f"routing log: got ids {tuple(expert_ids_LTK.shape)}, weights {tuple(routing_weights_LTK.shape)} "
            f"and {len(layer_ids)} layer ids, expected (num_layers, num_tokens, top_k) twice and num_layers."
        )
    if sum(sample_lengths) != num_tokens:
        raise DataError(f"routing log: got samples of {sum(sample_lengths)} tokens in all, expected {num_tokens}.")
    lengths_N = torch.as_tensor(list(sample_lengths), dtype=torch.int64)
    half_T = (torch.arange(len(lengths_N)) % 2).repeat_interleave(lengths_N)
    counter = RoutingCounter(num_layers=num_layers, num_experts=num_experts)
    for position in range(num_layers):
        counter.add(position, expert_ids_LTK[position], routing_weights_LTK[position], half_T)
    return RoutingProfile(
        layer_ids=tuple(layer_ids),
        num_experts=num_experts,
        top_k=top_k,
        token_counts_HLE=counter.token_counts_HLE(),
        gate_mass_HLE=counter.gate_mass_HLE(),
        num_tokens_H=(int((half_T == 0).sum()), int((half_T == 1).sum())),
        meta=dict(meta or {}),
    )


def _pairs(records: Sequence[Record], tokenizer: Any, *, num_tokens: int, max_length: int, seed: int) -> list[Pair]:
    """Pairs of shuffled records up to `num_tokens`, prompts and replies together; at least two."""
    if not records:
        raise DataError("profile: got no records. Expected at least two; check the data set.")
    shuffled = random.Random(seed).sample(records, len(records))
    pairs: list[Pair] = []
    total = 0
    for pair in encode_pairs(shuffled, tokenizer, max_length=max_length).items:
        total += pair.num_tokens
        if total > num_tokens and len(pairs) >= 2:
            break
        pairs.append(pair)
    if len(pairs) < 2:
        raise DataError(
            f"profile: got {len(records)} records, which make {len(pairs)} pair of prompt and reply.\n"
            f"A profile needs two halves to be compared; give more records."
        )
    return pairs


def _full_sequences(
    records: Sequence[Record], tokenizer: Any, *, num_tokens: int, max_length: int, seed: int
) -> Tensor:
    """At least two full sequences, shorter than `max_length` where there is too little data for that."""
    length = min(max_length, max(num_tokens // 2, 1))
    while length >= _SHORTEST_SEQUENCE:
        sequences_NS = pack(records, tokenizer, sequence_length=length, num_tokens=num_tokens, seed=seed)
        if len(sequences_NS) >= 2:
            return sequences_NS
        length //= 2
    raise DataError(
        f"profile: got {len(records)} records, num_tokens={num_tokens} and max_length={max_length}, which do "
        f"not fill two sequences of {_SHORTEST_SEQUENCE} tokens.\n"
        f"A profile needs two halves to be compared; give more records."
    )
