"""How much of a machine's memory a run's process takes: what it is to be given where others place it."""

from __future__ import annotations

from metier.config import RunConfig
from metier.errors import MetierError
from metier.memory.memory_limit import held_bytes
from metier.models.load import ignore_renamed_options
from metier.models.skeleton import model_config
from metier.planning.budget import workspace_bytes
from metier.planning.estimate import Estimator


def host_memory_bytes(config: RunConfig, has_accelerator: bool) -> int | None:
    """At the peak of a training step, the process's own included; None where that cannot be said.

    Args:
        config: the run; neither its data nor the model's weights need be there.
        has_accelerator: whether one computes it; the host then has what is kept there, and once the weights, which
            come through it. What the accelerator's own libraries take of the host is not known here.
    """
    ignore_renamed_options()
    try:
        base = model_config(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
        found = Estimator(base, has_host=has_accelerator)(config)
    except MetierError:
        return None
    if has_accelerator:
        return found.state.base_bytes + found.host_bytes + held_bytes()
    if found.trace is None:
        return None
    return found.total_bytes + held_bytes() + workspace_bytes()
