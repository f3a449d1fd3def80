"""Selective methods: some of the model's own parameters, the others frozen."""

from __future__ import annotations

from metier.catalogue.method import LINEAR, MOE, Method

_STRUCTURAL = ("Selective", "Structural")
_UNSTRUCTURAL = ("Selective", "Unstructural")

METHODS = (
    Method(
        name="esft",
        title="ESFT: expert-specialized fine-tuning",
        branch=_STRUCTURAL,
        paper="arXiv:2407.01906",
        provider="metier",
        trains="the routed experts that the task uses, whole",
        inference="nothing once merged; unmerged one pass over the delta's experts",
        merges=True,
        fits=(MOE,),
    ),
    Method(
        name="ln_tuning",
        title="LN tuning",
        branch=_STRUCTURAL,
        paper="arXiv:2312.11420",
        provider="PEFT",
        trains="the norms",
        inference="nothing once merged",
        merges=True,
        config="peft.LNTuningConfig",
        targets=("norms",),
        can_target=("norms",),
    ),
    Method(
        name="osf",
        title="OSF: orthogonal subspace fine-tuning",
        branch=_UNSTRUCTURAL,
        paper="arXiv:2504.07097",
        provider="PEFT",
        trains="the singular directions of each matrix that matter least to what the model knows",
        inference="nothing once merged",
        merges=True,
        config="peft.OSFConfig",
        targets=LINEAR,
    ),
    Method(
        name="shira",
        title="SHiRA: sparse high-rank adapter",
        branch=_UNSTRUCTURAL,
        paper="arXiv:2406.13175",
        provider="PEFT",
        trains="entries of each matrix that are drawn at random",
        inference="nothing once merged",
        merges=True,
        config="peft.ShiraConfig",
        targets=LINEAR,
    ),
    Method(
        name="supertuning",
        title="Supertuning: the largest or smallest entries",
        branch=_UNSTRUCTURAL,
        paper="arXiv:2607.09287",
        provider="PEFT",
        trains="entries of each matrix by their magnitude",
        inference="nothing once merged",
        merges=True,
        config="peft.SupertuningConfig",
        targets=LINEAR,
    ),
)
