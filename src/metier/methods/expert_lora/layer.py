"""One expert layer with LoRAs on some of its experts: the base's experts, and each adapter's low-rank changes."""

# T tokens, D hidden_size, F moe_intermediate_size, K top_k, E experts of the base, C changed experts, R highest rank

from __future__ import annotations

import math

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from metier.errors import DeltaError
from metier.methods.expert_layer import ExpertTunerLayer
from metier.methods.expert_lora.config import ExpertLoraConfig
from metier.methods.low_rank import LowRankBank, low_rank_experts
from metier.models.moe import MoELayer

_NAMES = ("expert_lora_up_A", "expert_lora_up_B", "expert_lora_down_A", "expert_lora_down_B")


class LoraExperts(ExpertTunerLayer):
    """Stands in a model for an experts module of transformers' contract, which it keeps as `base_layer`.

    An adapter's matrices are float32 parameters over its C experts of this layer, in the order of `expert_ids`:
    `up_A (C, R, D)`, `up_B (C, U, R)`, `down_A (C, R, F)`, `down_B (C, D, R)`, whatever the layout of the base's
    weights. An expert of a rank under R has 0 beyond it, and keeps it: the gradients there are 0.
    """

    ids_name = "expert_lora_expert_ids"

    def __init__(self, view: MoELayer) -> None:
        super().__init__(view, _NAMES)
        self.hidden_size, self.moe_intermediate_size = view.hidden_size, view.moe_intermediate_size
        self.scales: dict[str, tuple[float, ...]] = {}
        self.dropout: dict[str, float] = {}
        self._base_rows: list[tuple[Tensor, dict[str, Tensor]]] = []

    def rank(self, adapter_name: str) -> int:
        """The highest rank of an expert here."""
        return int(self.get_parameter(f"{_NAMES[0]}.{adapter_name}").shape[1])

    def update_layer(self, adapter_name: str, config: ExpertLoraConfig) -> None:
        """Add an adapter: A uniform as PEFT's LoRA has it, B zero, so a change of zero."""
        assert config.experts is not None, "the configuration refuses to be made without experts"
        # a change is of the base's rows, not of merged ones
        self.unmerge()
        ids = config.experts[self.layer_index]
        ranks = [config.rank(self.layer_index, expert) for expert in ids]
        self.scales[adapter_name] = tuple(config.scale(self.layer_index, expert) for expert in ids)
        self.dropout[adapter_name] = config.lora_dropout
        device = getattr(self.base_layer, self.base_names[0]).device
        self._ids()[adapter_name] = torch.tensor(ids, dtype=torch.int64, device=device)
        up_size = self.moe_intermediate_size * (2 if self.has_gate else 1)
        sizes = {"up": (self.hidden_size, up_size), "down": (self.moe_intermediate_size, self.hidden_size)}
        for projection, (in_size, out_size) in sizes.items():
            a_CRI = torch.zeros(len(ids), max(ranks), in_size, device=device)
            for row, rank in enumerate(ranks):
                nn.init.uniform_(a_CRI[row, :rank], -1 / math.sqrt(in_size), 1 / math.sqrt(in_size))
            b_COR = torch.zeros(len(ids), out_size, max(ranks), device=device)
            getattr(self, f"expert_lora_{projection}_A")[adapter_name] = nn.Parameter(a_CRI)
            getattr(self, f"expert_lora_{projection}_B")[adapter_name] = nn.Parameter(b_COR)
        BaseTunerLayer.set_adapter(self, self._active())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the experts contract has it: (T, D), (T, K) int64, (T, K) → (T, D)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        by_request = self._adapters_by_request or (tuple(self._active()),)
        by_request = tuple(tuple(n for n in names if n in self._ids()) for names in by_request)
        used = [names for names in dict.fromkeys(by_request) if names]
        if self.disable_adapters or self.merged or not used:
            out_TD: Tensor = self.base_layer(hidden_states, top_k_index, top_k_weights)
            return out_TD
        num_tokens = top_k_index.shape[0]
        if num_tokens % len(by_request):
            raise DeltaError(
                f"{self.path}: {num_tokens} tokens cannot be parted among {len(by_request)} requests; "
                "adapter_names needs one name a row of the batch."
            )
        numbers = [used.index(names) if names else len(used) for names in by_request]
        bank_ids_T = torch.tensor(numbers, device=top_k_index.device).repeat_interleave(num_tokens // len(by_request))
        return low_rank_experts(
            hidden_states,
            top_k_index,
            bank_ids_T,
            top_k_weights,
            base=self._base(),
            banks=tuple(self._bank(names) for names in used),
            activation=self._activation(),
            is_transposed=self.is_transposed,
            output_norm=self._output_norm(),
            dropout=self._dropout(used) if self.training else 0.0,
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' changes to the base's rows, which are kept for `unmerge`.

        Raises:
            DeltaError: with `safe_merge`, a changed row is not finite.
        """
        for adapter in self.check_merge(adapter_names, safe_merge=safe_merge):
            ids, changes = self._ids()[adapter], self.changes(adapter)
            before = {name: getattr(self.base_layer, name).detach()[ids].clone() for name in changes}
            self._base_rows.append((ids, before))
            for name, change in changes.items():
                getattr(self.base_layer, name).data[ids] = (before[name].float() + change).to(before[name].dtype)
            self.merged_adapters.append(adapter)

    def check_merge(self, adapter_names: list[str] | None, *, safe_merge: bool) -> list[str]:
        """Which adapters a merge would add here; raises what `merge` raises, and writes nothing."""
        names = [n for n in (adapter_names or self._active()) if self.expert_ids(n) and n not in self.merged_adapters]
        for adapter in names if safe_merge else ():
            if not all(torch.isfinite(change).all() for change in self.changes(adapter).values()):
                raise DeltaError(
                    f"{self.path}: adapter '{adapter}' changes rows to values that are not finite; nothing was merged."
                )
        return names

    def unmerge(self) -> None:
        """Put the base's rows back, to the bit."""
        while self.merged_adapters:
            self.merged_adapters.pop()
            ids, before = self._base_rows.pop()
            for name, rows in before.items():
                getattr(self.base_layer, name).data[ids] = rows

    @torch.no_grad()
    def changes(self, adapter: str) -> dict[str, Tensor]:
        """`scale * B A` of each changed expert in float32, by the base's parameter, (C, …) in its layout."""
        up_a, up_b, down_a, down_b = (getattr(self, name)[adapter].float() for name in _NAMES)
        scales_C11 = torch.tensor(self.scales[adapter], device=up_a.device).view(-1, 1, 1)
        found = {self.base_names[0]: scales_C11 * (up_b @ up_a), "down_proj": scales_C11 * (down_b @ down_a)}
        return {name: change.mT if self.is_transposed else change for name, change in found.items()}

    def _dropout(self, used: list[tuple[str, ...]]) -> float:
        shares = {name: self.dropout[name] for names in used for name in names}
        if len(set(shares.values())) > 1:
            raise DeltaError(
                f"{self.path}: the active adapters have different dropouts {shares}, and a layer trains with one. "
                "Give them the same, or train one at a time."
            )
        return next(iter(shares.values()))

    def _bank(self, names: tuple[str, ...]) -> LowRankBank:
        """One adapter's matrices; those of several put side by side, which adds their changes up."""
        if len(names) == 1:
            (name,) = names
            return LowRankBank(
                tuple(self.expert_ids(name)), self.scales[name], *(getattr(self, n)[name] for n in _NAMES)
            )
        ids = sorted({expert for name in names for expert in self.expert_ids(name)})
        matrices = []
        for number, parameter in enumerate(_NAMES):
            is_b = number % 2 == 1
            parts = [self._spread(name, getattr(self, parameter)[name], ids, scaled=is_b) for name in names]
            matrices.append(torch.cat(parts, dim=-1 if is_b else -2))
        return LowRankBank(tuple(ids), (1.0,) * len(ids), *matrices)

    def _spread(self, adapter: str, matrix_C: Tensor, ids: list[int], *, scaled: bool) -> Tensor:
        """An adapter's matrices in the places of `ids`, 0 where it has none."""
        if scaled:
            matrix_C = matrix_C * torch.tensor(self.scales[adapter], device=matrix_C.device).view(-1, 1, 1)
        places = torch.tensor([ids.index(expert) for expert in self.expert_ids(adapter)], device=matrix_C.device)
        return matrix_C.new_zeros(len(ids), *matrix_C.shape[1:]).index_copy(0, places, matrix_C)
