"""What a model's layers give, cut down to the positions that have a label, before its output layer reads it."""

# B rows, T tokens, L positions with a label, D hidden_size

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def labelled_output(is_labelled_BT: Tensor) -> Callable[[nn.Module, Any, Any], Any]:
    """A forward hook for all of a model before its output layer: of its last hidden states (1, L, D) are left.

    Args:
        is_labelled_BT: whether the token after a position has a label, bool, (B, T - 1).
    """
    num_tokens = is_labelled_BT.shape[1] + 1

    def cut(_module: nn.Module, _args: Any, output: Any) -> Any:
        # a prompt's virtual tokens stand before the record
        hidden_BTD = output.last_hidden_state[:, -num_tokens:]
        output.last_hidden_state = hidden_BTD[:, :-1][is_labelled_BT].unsqueeze(0)
        return output

    return cut
