"""One feed-forward block with MEFT adapters beside it: routers as parameters, rows in stores."""

# T tokens, D hidden_size, N Key-Experts, K Key-Experts a token

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metier.distributed.ranks import ranks_here
from metier.errors import ConfigError, RowStoreError
from metier.memory.row_store import RowStore
from metier.memory.step_gradients import StepGradients, step_gradients_of
from metier.methods.block_layer import BlockLayer, block_output, with_output
from metier.methods.meft.config import MeftConfig
from metier.methods.meft.defaults import KEY_STD, router_scale
from metier.methods.meft.sparse_rows import chosen_rows, sparse_rows

ROWS, HOLDER = "meft_rows", "meft_gradients"
"""Of a layer's entries in a `state_dict`: the rows, and what stands for them in an optimizer and is not read back."""
CANNOT_MERGE = (
    "a MEFT adapter is a second feed-forward block of its own, which no weights of the base could stand for, so it "
    "cannot be merged. Serve it beside its base."
)


class MeftLayer(BlockLayer):
    """Stands in a model for a feed-forward block, which it keeps as `base_layer`, and adds the adapters' outputs.

    An adapter's router is the parameter `meft_router.<adapter>` of shape (N, D). Its rows are no parameters: they lie
    in `stores[adapter]`, and `meft_gradients.<adapter>` stands for them in an optimizer.
    """

    adapter_layer_names = ("meft_router", "meft_gradients")
    other_param_names = ("stores", "configs")
    cannot_merge = CANNOT_MERGE

    def __init__(self, base_layer: nn.Module, path: str, hidden_size: int, *, num_layers: int = 1) -> None:
        super().__init__(base_layer, path)
        self.hidden_size, self.num_layers = hidden_size, num_layers
        self.meft_router, self.meft_gradients = nn.ParameterDict(), nn.ParameterDict()
        self.stores: dict[str, RowStore] = {}
        self.register_state_dict_post_hook(_with_rows)
        self.register_load_state_dict_pre_hook(_take_rows)

    @property
    def meft_rows(self) -> _Rows:
        """Rows by adapter, (r, 2, D): who looks a `state_dict`'s entries up by their names finds and sets them here."""
        return _Rows(self)

    def update_layer(self, adapter_name: str, config: MeftConfig) -> None:
        """Add an adapter whose values are 0, so that it changes nothing yet."""
        sizes = config.sizes
        base_device = self.base_device()
        made_on = torch.device("meta" if base_device.type == "meta" else "cpu")
        folder = None if config.store_folder is None else Path(config.store_folder) / adapter_name
        store = RowStore(
            sizes.num_key_experts,
            sizes.rows_per_key_expert,
            self.hidden_size,
            tier=config.store,
            dtype=getattr(torch, config.row_dtype),
            folder=folder,
            name=self.path,
            cache_bytes=config.cache_bytes // self.num_layers,
            device=made_on,
        )
        router_ND = torch.empty(sizes.num_key_experts, self.hidden_size, device=made_on)
        scale = router_scale(sizes, self.hidden_size)
        for block in range(0 if router_ND.is_meta else sizes.num_key_experts):
            keys_MD = torch.randn(sizes.rows_per_key_expert, self.hidden_size) * KEY_STD
            store.rows_NMWD[block, :, 0].copy_(keys_MD)
            store.changed([block])
            router_ND[block] = scale * keys_MD.mean(0)
        self.stores[adapter_name], self.configs[adapter_name] = store, config
        self.meft_router[adapter_name] = nn.Parameter(router_ND.to(base_device))
        try:
            self.meft_gradients[adapter_name] = StepGradients(store).holder
        except TypeError as error:  # under PEFT's low_cpu_mem_usage, which makes all parameters anew
            raise ConfigError(
                f"{self.path}: low_cpu_mem_usage cannot make the parameter that stands for rows in a store. Load the "
                "adapter without it: rows are read a layer at a time anyway."
            ) from error
        self.set_gradients()

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the block that it stands for; where that returns a tuple, the adapters' outputs are added to its first."""
        out = self.base_layer(hidden, *args, **kwargs)
        names = self.answering()
        if not names:
            return out
        hidden_TD = hidden.reshape(-1, self.hidden_size)
        added_TD = sum((self.added(name, hidden_TD) for name in names[1:]), start=self.added(names[0], hidden_TD))
        first = block_output(out)
        return with_output(out, first + added_TD.view(first.shape).to(first.dtype))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def added(self, adapter_name: str, hidden_TD: Tensor) -> Tensor:
        """What one adapter adds to the block's output, (T, D)."""
        config, store = self.configs[adapter_name], self.stores[adapter_name]
        router_ND = self.meft_router[adapter_name]
        gradients = step_gradients_of(self.meft_gradients[adapter_name])
        if gradients is None:
            raise ConfigError(
                f"{self.path}: what stands for rows in a store was copied without them, as torch.nn.DataParallel does "
                "where a process sees several devices.\nShow it one (CUDA_VISIBLE_DEVICES=0), or start one process for "
                "each: torchrun --nproc_per_node 2 -m metier train."
            )
        sizes = config.sizes
        logits_TN = F.linear(hidden_TD, router_ND.to(hidden_TD.dtype))
        gate_TK, key_experts_TK = logits_TN.topk(sizes.num_active_key_experts, dim=-1)
        gate: Tensor | None = gate_TK if config.gate == "logit" else None
        chosen_NM = None
        if config.semantics == "union":
            keep = gradients.is_wanted
            chosen_NM = chosen_rows(hidden_TD, key_experts_TK, gate, store, top_k=sizes.top_k, keep=keep)
            active_A = chosen_NM.any(1).nonzero().squeeze(1)
            key_experts_TK = active_A.expand(len(hidden_TD), -1)
            gate = logits_TN[:, active_A] if config.gate == "logit" else None
        out_TD = sparse_rows(hidden_TD, key_experts_TK, gate, gradients, top_k=sizes.top_k, chosen_NM=chosen_NM)
        return out_TD if config.scaling == 1 else out_TD * config.scaling


class _Rows(nn.Module):
    """As a module whose parameters are the rows of a layer's adapters."""

    _layer: MeftLayer

    def __init__(self, layer: MeftLayer) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)

    def __getattr__(self, name: str) -> Tensor:
        if name not in self._layer.stores:
            raise AttributeError(f"{self._layer.path}: there are no rows of an adapter {name!r}.")
        return self._layer.stores[name].saved()

    def __setattr__(self, name: str, value: Tensor) -> None:  # type: ignore[override]
        self._layer.stores[name].load(value)


def _with_rows(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """After a model's `state_dict`: with the rows, (r, 2, D), in a process that trains alone."""
    assert isinstance(layer, MeftLayer), "a hook of that layer"
    if ranks_here().are_several:
        return  # accelerate takes every entry for a parameter that it may shard; checkpoints have the rows anyway
    for name, store in layer.stores.items():
        state[f"{prefix}{ROWS}.{name}"] = store.saved()
        # the holder is as large as the step's gradients without a memory of its own, which who copies it would make
        state[f"{prefix}{HOLDER}.{name}"] = torch.empty(0)


def _take_rows(
    layer: nn.Module,
    state: dict[str, Any],
    prefix: str,
    _: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Before a model's `load_state_dict`: rows go into their stores; rows that are missing or do not fit are told of as
    parameters would be."""
    assert isinstance(layer, MeftLayer), "a hook of that layer"
    for name, store in layer.stores.items():
        rows_RWD = state.pop(f"{prefix}{ROWS}.{name}", None)
        if rows_RWD is None:
            missing.append(f"{prefix}{ROWS}.{name}")
        else:
            try:
                store.load(rows_RWD)
            except RowStoreError as error:
                errors.append(str(error))
            else:  # the gradients are of the former rows
                layer.meft_gradients[name].step_gradients.clear()
        state[f"{prefix}{HOLDER}.{name}"] = layer.meft_gradients[name]
