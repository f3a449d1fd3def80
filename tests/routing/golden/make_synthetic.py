"""Makes synthetic.npz, a small made-up routing log, and synthetic.json, what is to be measured and selected
on it.

    python tests/routing/golden/make_synthetic.py

Three layers, 500 tokens, top-4 of 32 experts. The first two layers are drawn at random, the second with gates
that are not renormalised. The third is laid out by hand: its four-decimal scores reach 0.2 exactly, with a
tie just there. The expected values are counted with plain loops and exact fractions, without a line of
metier.
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np

NUM_EXPERTS, TOP_K, NUM_TOKENS = 32, 4, 500
LAYER_IDS = [1, 2, 5]
TOP_P = Fraction(1, 5)
# Of 2000 slots, 118 + 102 + 90 + 90 are exactly a fifth, and experts 9, 2 and 24 tie for the last two places. Added
# up in floating point, 0.059 + 0.051 + 0.045 + 0.045 is 0.19999999999999996.
HAND_MADE = {6: 118, 19: 102, 9: 90, 2: 90, 24: 90}


def draw(rng: np.random.Generator, *, renormalised: bool) -> tuple[np.ndarray, np.ndarray]:
    logits = rng.normal(size=(NUM_TOKENS, NUM_EXPERTS)) + rng.normal(size=NUM_EXPERTS) * 0.7
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ids = np.argsort(-probabilities, axis=1)[:, :TOP_K]
    weights = np.take_along_axis(probabilities, ids, axis=1)
    if renormalised:
        weights /= weights.sum(axis=1, keepdims=True)
    return ids.astype(np.int8), weights.astype(np.float32)


def lay_out() -> tuple[np.ndarray, np.ndarray]:
    others = [expert for expert in range(NUM_EXPERTS) if expert not in HAND_MADE]
    rest = NUM_TOKENS * TOP_K - sum(HAND_MADE.values())
    counts = {**HAND_MADE, **{expert: rest // len(others) for expert in others}}
    counts[others[0]] += rest % len(others)
    slots = [expert for expert, count in counts.items() for _ in range(count)]
    # dealt out column by column, so that no token has an expert twice
    ids = np.array(slots, dtype=np.int8).reshape(TOP_K, NUM_TOKENS).T
    return ids.copy(), np.full((NUM_TOKENS, TOP_K), 0.25, dtype=np.float32)


def measure(ids: np.ndarray, weights: np.ndarray) -> tuple[list[float], list[float], list[int]]:
    counts, mass = [0] * NUM_EXPERTS, [0.0] * NUM_EXPERTS
    for token in range(NUM_TOKENS):
        for slot in range(TOP_K):
            counts[ids[token, slot]] += 1
            mass[ids[token, slot]] += float(weights[token, slot])
    scores = [round(count / (NUM_TOKENS * TOP_K), 4) for count in counts]
    exact = [Fraction(str(score)) for score in scores]
    selected: list[int] = []
    for expert in sorted(range(NUM_EXPERTS), key=lambda e: (-exact[e], e)):
        if sum((exact[e] for e in selected), Fraction(0)) >= TOP_P:
            break
        selected.append(expert)
    return scores, [round(value / NUM_TOKENS, 4) for value in mass], selected


def main() -> None:
    rng = np.random.default_rng(20240706)
    layers = [draw(rng, renormalised=True), draw(rng, renormalised=False), lay_out()]
    lengths = [40, 60, 25, 75, 100, 50, 30, 120]
    folder = Path(__file__).parent
    np.savez_compressed(
        folder / "synthetic.npz",
        expert_ids_LTK=np.stack([ids for ids, _ in layers]),
        routing_weights_LTK=np.stack([weights for _, weights in layers]),
        sample_lengths=np.array(lengths, dtype=np.int64),
    )
    measured = {layer: measure(*layers[position]) for position, layer in enumerate(LAYER_IDS)}
    expected = {
        "layer_ids": LAYER_IDS,
        "num_experts": NUM_EXPERTS,
        "token_scores": {str(layer): tokens for layer, (tokens, _, _) in measured.items()},
        "raw_gate_scores": {str(layer): gates for layer, (_, gates, _) in measured.items()},
        "selected": {str(layer): selected for layer, (_, _, selected) in measured.items()},
    }
    (folder / "synthetic.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main()
