"""Started by a launcher: loads a model under transformers' expert parallelism, and asks metier for its experts.

    python expert_parallel.py MODEL

Prints what it is told, from the main process.
"""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import metier
from metier.distributed.ranks import join_ranks, leave_ranks


def main(path: str) -> None:
    """Load and ask."""
    ranks = join_ranks()
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(ep_size=2, fsdp_size=2))
    try:
        said = f"found {len(metier.moe_layers(model))} layers"
    except metier.UnsupportedModelError as error:
        said = str(error)
    if ranks.is_main:
        print(f"\nSAID {said}", flush=True)
    leave_ranks()


if __name__ == "__main__":
    main(sys.argv[1])
