"""One expert layer with ESFT adapters on it: the base bank, and each adapter's bank of experts that it replaces."""

# T tokens, D hidden_size, K top_k, E experts of the base, R requests of a batch

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from metier.errors import DeltaError
from metier.methods.expert_bank import ExpertBank
from metier.methods.expert_layer import ExpertTunerLayer
from metier.methods.virtual_experts import virtual_experts
from metier.models.moe import MoELayer


class EsftExperts(ExpertTunerLayer):
    """Stands in a model for an experts module of transformers' contract, which it keeps as `base_layer`.

    An adapter's rows are float32 parameters `esft_<name>.<adapter>` of shape `(k, …)`, in the layout of the base's
    stacked parameter `<name>`; row i replaces expert `expert_ids(adapter)[i]`. They begin as copies of the base's rows.
    """

    ids_name = "esft_expert_ids"

    def __init__(self, view: MoELayer) -> None:
        super().__init__(view, tuple(f"esft_{name}" for name in view.parameter_names()))
        self._base_rows: dict[str, dict[str, Tensor]] = {}

    def update_layer(self, adapter_name: str, expert_ids: list[int]) -> None:
        """Add an adapter whose rows begin as copies of the base's: a delta of zero."""
        first = getattr(self.base_layer, self.base_names[0])
        # merged rows are not the base's
        self.unmerge()
        ids = torch.tensor(expert_ids, dtype=torch.int64, device=first.device)
        self._ids()[adapter_name] = ids
        for name in self.base_names:
            rows = getattr(self.base_layer, name).detach()[ids].float().clone()
            getattr(self, f"esft_{name}")[adapter_name] = nn.Parameter(rows)
        BaseTunerLayer.set_adapter(self, self._active())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the experts contract has it: (T, D), (T, K) int64, (T, K) → (T, D)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        by_request = self._adapters_by_request or (tuple(self._active()),)
        names = [name for name in dict.fromkeys(n for r in by_request for n in r) if name in self._ids()]
        if self.disable_adapters or self.merged or not names:
            out_TD: Tensor = self.base_layer(hidden_states, top_k_index, top_k_weights)
            return out_TD
        table_RE = torch.stack([self._virtual_ids(names, adapters) for adapters in by_request])
        num_tokens = top_k_index.shape[0]
        if num_tokens % len(by_request):
            raise DeltaError(
                f"{self.path}: {num_tokens} tokens cannot be parted among {len(by_request)} requests; "
                "adapter_names needs one name a row of the batch."
            )
        request_T = torch.arange(num_tokens, device=top_k_index.device) // (num_tokens // len(by_request))
        return virtual_experts(
            hidden_states,
            top_k_index,
            table_RE[request_T.unsqueeze(-1), top_k_index],
            top_k_weights,
            base=self._base(),
            deltas=tuple(self._bank(self._rows(adapter)) for adapter in names),
            activation=self._activation(),
            is_transposed=self.is_transposed,
            output_norm=self._output_norm(),
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapters' rows over the base's, which are kept for `unmerge`.

        Raises:
            DeltaError: two of the adapters replace the same expert, or (with `safe_merge`) a row is not finite.
        """
        for adapter in self.check_merge(adapter_names, safe_merge=safe_merge):
            rows = self._rows(adapter)
            ids = self._ids()[adapter]
            self._base_rows[adapter] = {n: getattr(self.base_layer, n).detach()[ids].clone() for n in rows}
            self._write(ids, rows)
            self.merged_adapters.append(adapter)

    def check_merge(self, adapter_names: list[str] | None, *, safe_merge: bool) -> list[str]:
        """Which adapters a merge would write here; raises what `merge` raises, and writes nothing."""
        names = [n for n in (adapter_names or self._active()) if self.expert_ids(n)]
        names = [n for n in names if n not in self.merged_adapters]
        self._virtual_ids([*self.merged_adapters, *names], (*self.merged_adapters, *names))
        for adapter in names if safe_merge else ():
            if not all(torch.isfinite(tensor).all() for tensor in self._rows(adapter).values()):
                raise DeltaError(
                    f"{self.path}: adapter '{adapter}' holds values that are not finite; nothing was merged."
                )
        return names

    def unmerge(self) -> None:
        """Put the base's rows back, to the bit."""
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            self._write(self._ids()[adapter], self._base_rows.pop(adapter))

    @torch.no_grad()
    def _write(self, ids: Tensor, rows: dict[str, Tensor]) -> None:
        for name, tensor in rows.items():
            weight = getattr(self.base_layer, name)
            weight[ids] = tensor.detach().to(weight)

    def _rows(self, adapter: str) -> dict[str, Tensor]:
        return {name: getattr(self, f"esft_{name}")[adapter] for name in self.base_names}

    def _bank(self, tensors: dict[str, Tensor]) -> ExpertBank:
        up = self.base_names[0]
        return ExpertBank(tensors[up], tensors["down_proj"], tensors.get(f"{up}_bias"), tensors.get("down_proj_bias"))

    def _virtual_ids(self, names: list[str], adapters: tuple[str, ...]) -> Tensor:
        """(E,) int64: the virtual id of every expert for a request that uses `adapters`, the banks being `names`."""
        device = getattr(self.base_layer, self.base_names[0]).device
        table_E, first = torch.arange(self.num_experts, device=device), self.num_experts
        owner: dict[int, str] = {}
        for name in names:
            ids = self._ids()[name]
            if name in adapters:
                for expert in ids.tolist() if len(adapters) > 1 else ():
                    if owner.setdefault(expert, name) != name:
                        raise DeltaError(
                            f"layers.{self.layer_index}: adapters '{owner[expert]}' and '{name}' both replace expert "
                            f"{expert}, and an expert can be replaced once. Activate one of them."
                        )
                table_E[ids] = torch.arange(first, first + len(ids), device=device)
            first += len(ids)
        return table_E
