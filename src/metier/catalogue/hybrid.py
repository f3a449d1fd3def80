"""Hybrid methods: several of the others at once, composed."""

from __future__ import annotations

from metier.catalogue.method import Method

_COMPOSED = ("Hybrid", "Composed by hand")

METHODS = (
    Method(
        name="mam",
        title="MAM adapter: prefix and parallel adapter",
        branch=_COMPOSED,
        paper="arXiv:2110.04366",
        provider="metier",
        trains="a short prefix in every attention, and a wide scaled adapter beside every feed-forward block",
        inference="some keys more in every attention, and two thin products beside every block",
        merges=False,
        config="metier.methods.hybrid.MamConfig",
    ),
    Method(
        name="unipelt",
        title="UniPELT: gated prefix, LoRA and adapter",
        branch=_COMPOSED,
        paper="arXiv:2110.07577",
        provider="metier",
        trains="a prefix, LoRAs on queries and values, an adapter after every feed-forward block, and a gate of each",
        inference="all three and their gates; attention at twice the width of a head",
        merges=False,
        config="metier.methods.hybrid.UnipeltConfig",
    ),
)
