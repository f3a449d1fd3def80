"""One block with bottleneck adapters after it or beside it."""

# D hidden_size, r width of the bottleneck; hidden states are (…, D)

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from metier.methods.block_layer import BlockLayer, block_input, block_output, computed, with_output
from metier.methods.bottleneck.config import BottleneckConfig
from metier.methods.gate import gate_values, new_gate
from metier.models.layers import index_of_owner

CANNOT_MERGE = (
    "a bottleneck adapter has an activation between its two layers, which no weights of the base could stand for, so "
    "it cannot be merged. Serve it beside its base."
)


class BottleneckLayer(BlockLayer):
    """Stands in a model for an attention module or a feed-forward block, and adds the adapters' outputs to its own.

        serial:    y + scaling · up(act(down(y))),  y the block's output
        parallel:  y + scaling · up(act(down(x))),  x the block's input

    Parameters are kept in float32 and computed with in the dtype of the hidden states. `up` begins as 0, so that a
    fresh adapter changes no bit.
    """

    adapter_layer_names = (
        "tuned_bottleneck_norm",
        "tuned_bottleneck_down",
        "tuned_bottleneck_up",
        "tuned_bottleneck_gate",
    )
    other_param_names = ("configs", "dropped_in_step")
    cannot_merge = CANNOT_MERGE

    def __init__(self, base_layer: nn.Module, path: str, hidden_size: int) -> None:
        super().__init__(base_layer, path)
        self.hidden_size, self.layer_index = hidden_size, index_of_owner(path)
        self.tuned_bottleneck_norm, self.tuned_bottleneck_gate = nn.ModuleDict(), nn.ModuleDict()
        self.tuned_bottleneck_down, self.tuned_bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.num_dropped_layers = 0
        self.dropped_in_step: dict[str, int] = {}

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter that changes nothing yet."""
        device = self.base_device()
        down = nn.Linear(self.hidden_size, config.r, device=device)
        up = nn.Linear(config.r, self.hidden_size, device=device)
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        self.tuned_bottleneck_down[adapter_name], self.tuned_bottleneck_up[adapter_name] = down, up
        if config.layer_norm:
            self.tuned_bottleneck_norm[adapter_name] = nn.LayerNorm(self.hidden_size, device=device)
        if config.gated:
            self.tuned_bottleneck_gate[adapter_name] = new_gate(self.hidden_size, device)
        self.configs[adapter_name] = config
        self.set_gradients()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block that it stands for; where that returns a tuple, the adapters' outputs are added to its first."""
        out = self.base_layer(*args, **kwargs)
        names = [name for name in self.answering() if not self._is_dropped(name)]
        if not names:
            return out
        hidden = block_output(out)
        total = hidden
        for name in names:
            read = block_input(args, kwargs) if self.configs[name].variant == "parallel" else hidden
            total = total + self.added(name, read).to(hidden.dtype)
        return with_output(out, total)

    def added(self, adapter_name: str, hidden: Tensor) -> Tensor:
        """What one adapter adds to the block's output, of the shape of what it reads."""
        config: BottleneckConfig = self.configs[adapter_name]
        dtype = hidden.dtype
        read = hidden
        if config.layer_norm:
            norm = self.tuned_bottleneck_norm[adapter_name]
            assert isinstance(norm, nn.LayerNorm), "made by update_layer"
            read = F.layer_norm(
                hidden, list(norm.normalized_shape), norm.weight.to(dtype), norm.bias.to(dtype), norm.eps
            )
        inner = ACT2FN[config.activation](computed(self.tuned_bottleneck_down[adapter_name], read))
        inner = F.dropout(inner, config.dropout, training=self.training)
        out = computed(self.tuned_bottleneck_up[adapter_name], inner)
        if config.gated:
            out = out * gate_values(self.tuned_bottleneck_gate[adapter_name], hidden)
        return out if config.scaling == 1 else out * config.scaling

    def _is_dropped(self, adapter_name: str) -> bool:
        in_step = self.dropped_in_step.get(adapter_name, 0) if self.training else 0
        return self.layer_index < max(self.num_dropped_layers, in_step)
