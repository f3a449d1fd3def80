"""Families that do not pass the whole chain: the step that they stop at, and a part of the reason that the user reads.

A family that is in here and passes fails its test too, so that this list never grows stale.
"""

from __future__ import annotations

_FOREIGN = "is an MoE layer that does not follow transformers' experts contract"

UNSUPPORTED: dict[str, tuple[str, str]] = {
    # in the contract
    "diffusion_gemma": ("load", "two MoE layers have this index"),
    "openai_privacy_filter": ("load", "has no model for language"),
    # outside it
    "dbrx": ("load", f"DbrxExperts {_FOREIGN}"),
    "doge": ("load", f"DogeCDMoE {_FOREIGN}"),
    "jetmoe": ("load", f"JetMoeMoE {_FOREIGN}"),
    "longcat_flash": ("load", f"LongcatFlashMoE {_FOREIGN}"),
    "nllb_moe": ("load", "got an encoder-decoder (NllbMoeForConditionalGeneration)"),
    "vitpose_backbone": ("load", "has no model for language"),
}
