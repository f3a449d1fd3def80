"""A LoRA on one linear layer whose strength each token decides by itself."""

# (…, I) in_features, (…, O) out_features

from __future__ import annotations

from torch import Tensor, nn

from metier.errors import UnsupportedModelError
from metier.methods.block_layer import BlockLayer, computed
from metier.methods.gate import gate_values, new_gate

CANNOT_MERGE = (
    "the strength of a gated LoRA depends on the token, which no weights of the base could stand for, so it cannot be "
    "merged. Serve it beside its base."
)


class GatedLoraLayer(BlockLayer):
    """Stands in an attention module for a projection:  W x + gate(x) · B A x,  with B 0 at first.

    PEFT's LoRA has a constant scaling where UniPELT has the gate, which reads what the projection reads.
    """

    adapter_layer_names = ("tuned_lora_a", "tuned_lora_b", "tuned_lora_gate")
    cannot_merge = CANNOT_MERGE

    def __init__(self, base_layer: nn.Module, path: str) -> None:
        super().__init__(base_layer, path)
        in_features, out_features = (getattr(base_layer, name, None) for name in ("in_features", "out_features"))
        if not (isinstance(in_features, int) and isinstance(out_features, int)):
            raise UnsupportedModelError(
                f"{path}: got a {type(base_layer).__name__}, expected a linear layer to put a LoRA on.\n"
                "Name other projections by lora_targets."
            )
        self.in_features, self.out_features = in_features, out_features
        self.tuned_lora_a, self.tuned_lora_b, self.tuned_lora_gate = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()

    def update_layer(self, adapter_name: str, r: int) -> None:
        """Add a LoRA of rank `r` that changes nothing yet."""
        device = self.base_device()
        self.tuned_lora_a[adapter_name] = nn.Linear(self.in_features, r, bias=False, device=device)
        up = nn.Linear(r, self.out_features, bias=False, device=device)
        nn.init.zeros_(up.weight)
        self.tuned_lora_b[adapter_name] = up
        self.tuned_lora_gate[adapter_name] = new_gate(self.in_features, device)
        self.configs[adapter_name] = r
        self.set_gradients()

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, I) to (…, O)."""
        out: Tensor = self.base_layer(hidden)
        for name in self.answering():
            low_rank = computed(self.tuned_lora_b[name], computed(self.tuned_lora_a[name], hidden))
            out = out + (low_rank * gate_values(self.tuned_lora_gate[name], hidden)).to(out.dtype)
        return out
