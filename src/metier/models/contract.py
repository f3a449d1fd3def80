"""Which modules follow transformers' experts contract, and with which layout of their stacks.

The contract (`transformers/integrations/moe.py`): a module that is called as `experts(hidden_states_TD,
top_k_index_TK, top_k_weights_TK)`, holds its weights stacked as `(E, …)` and bears five flags that say how.
"""

# T tokens, D hidden_size, E experts, K top_k

from __future__ import annotations

import inspect

from torch import nn

FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")

_CALL = ["self", "hidden_states", "top_k_index", "top_k_weights"]
_BARE = dict.fromkeys(FLAGS, False) | {"has_gate": True, "is_concatenated": True}
"""The layout of experts that keep to the contract without its decorator, as Step 3.7's: the decorator's defaults."""


def contract_flags(module: nn.Module) -> dict[str, bool] | None:
    """The five flags of an experts module that follows the contract; None for any other module."""
    # vars(), not hasattr(): PEFT's wrappers may answer for what they wrap
    attributes = vars(module)
    if "num_experts" not in attributes:
        return None
    flags = {name: attributes.get(name) for name in FLAGS}
    if all(isinstance(flag, bool) for flag in flags.values()):
        return {name: bool(flag) for name, flag in flags.items()}
    return dict(_BARE) if _is_bare(module) else None


def _is_bare(module: nn.Module) -> bool:
    kind = type(module)
    return (
        hasattr(kind, "_apply_gate")  # else what lies between the products is hidden in its `forward`
        and set(module._parameters) == {"gate_up_proj", "down_proj"}
        and list(inspect.signature(kind.forward).parameters) == _CALL
    )
