"""One module of the base with sparse deltas on its parameters: values and positions around the module's own forward."""

# M entries of an adapter in one parameter

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call

from metier.errors import DeltaError
from metier.methods.sparse_delta.in_place import Delta, EntriesInPlace
from metier.methods.sparse_delta.masks.shares import evenly_spaced

VALUES, INDICES = "sparse_delta_values_", "sparse_delta_indices_"
"""Before a parameter's name: attributes of a layer, and names in a file."""


class SparseDeltaLayer(nn.Module, BaseTunerLayer):
    """Stands in a model for a module, which it keeps as `base_layer`, and trains entries of that module's parameters.

    For parameter `<name>` an adapter's differences are the float32 parameter `sparse_delta_values_<name>.<adapter>`,
    (M,), and their flat positions the buffer `sparse_delta_indices_<name>.<adapter>`, which does not exist where M is
    all of them. While the adapter is active, base plus differences stand in the base's own parameter, rounded to its
    dtype.

    A parameter that the base does not have is a linear layer's bias, which begins at 0 and is added to its output.
    """

    def __init__(self, base_layer: nn.Module, path: str) -> None:
        super().__init__()
        self.base_layer, self.path = base_layer, path
        self.adapter_layer_names: tuple[str, ...] = ()
        self.other_param_names: tuple[str, ...] = ()
        self.places: dict[str, EntriesInPlace] = {}
        """By the name of each of the base layer's parameters that some adapter touches."""
        self.owners: dict[str, tuple[SparseDeltaLayer, str]] = {}
        """Parameters that are another layer's, to which they are tied: that layer, and the name there."""
        self.merged_adapters: list[str] = []
        self._without_entries: set[str] = set()
        # who reads or writes the base's tensors under its own names is to meet the base's own bits
        self.register_state_dict_pre_hook(lambda module, prefix, keep_vars: module.restore_base())
        self.register_load_state_dict_pre_hook(lambda module, *args: module.restore_base())

    @property
    def adapter_names(self) -> list[str]:
        """The adapters that stand here."""
        return list(dict.fromkeys(adapter for name in self.names for adapter in self.values_of(name)))

    @property
    def names(self) -> list[str]:
        """The base layer's parameters that some adapter trains here."""
        return [name.removeprefix(VALUES) for name in self.adapter_layer_names]

    def values_of(self, name: str) -> nn.ParameterDict:
        """One parameter's differences, by adapter."""
        found = getattr(self, f"{VALUES}{name}")
        assert isinstance(found, nn.ParameterDict), "made by update_layer"
        return found

    def indices_of(self, name: str) -> BufferDict:
        """One parameter's positions, by adapter; without those whose positions are all."""
        found: BufferDict = getattr(self, f"{INDICES}{name}")
        return found

    def update_layer(self, adapter_name: str, counts: Mapping[str, int], entries: Mapping[str, Tensor] | None) -> None:
        """Add an adapter whose differences are 0, so that it changes nothing yet.

        Args:
            adapter_name: the new adapter's.
            counts: how many entries of each parameter.
            entries: which; None where a file is going to say, or where only their number matters.
        """
        self.unmerge()
        for name, count in counts.items():
            self._make_room(name)
            parameter, device = self.base_layer._parameters.get(name), self._device()
            size = self.size_of(name)
            if parameter is not None and name not in self.places:
                self.places[name] = EntriesInPlace(self.base_layer, name, f"{self.path}.{name}")
            self.values_of(name)[adapter_name] = nn.Parameter(torch.zeros(count, dtype=torch.float32, device=device))
            if count == size:
                continue
            if entries is None:
                self.indices_of(name)[adapter_name] = evenly_spaced(size, count, device=device)
                self._without_entries.add(adapter_name)
            else:
                indices_M = entries[name]
                self.indices_of(name)[adapter_name] = (
                    indices_M.to(device) if device.type != "meta" else indices_M.to("meta")
                )
        self.set_adapter(BaseTunerLayer.active_adapters.fget(self))

    def take_entries(self, adapter_name: str, name: str, indices_M: Tensor) -> None:
        """Other positions for an adapter's values, as many as it has."""
        self.restore_base()
        self.indices_of(name)[adapter_name] = indices_M.to(self._device())

    def entries_are_known(self, adapter_name: str) -> None:
        """Say that an adapter's positions are those of its file."""
        self._without_entries.discard(adapter_name)

    def size_of(self, name: str) -> int:
        """Entries of one of the base layer's parameters, or of the bias that it lacks."""
        parameter = self.base_layer._parameters.get(name)
        return int(self.base_layer.out_features) if parameter is None else parameter.numel()  # type: ignore[arg-type]

    def replaced_bytes(self) -> int:
        """Of the base's entries that are kept while an adapter's stand in their place, one adapter being active."""
        return sum(
            max((len(values) for values in self.values_of(name).values()), default=0) * place.parameter.element_size()
            for name, place in self.places.items()
        )

    def deltas(self, name: str, adapters: list[str] | None = None) -> list[Delta]:
        """What the active adapters (or those named) add to one parameter."""
        values, indices = self.values_of(name), dict(self.indices_of(name).items())
        wanted = BaseTunerLayer.active_adapters.fget(self) if adapters is None else adapters
        found = [adapter for adapter in dict.fromkeys(wanted) if adapter in values]
        return [Delta(a, indices.get(a), values[a]) for a in found]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base layer's, with the active adapters' entries in its parameters."""
        if self.disable_adapters or self.merged:
            if self.disable_adapters:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        self.show()
        proxies = {name: proxy for name in (*self.places, *self.owners) if (proxy := self._proxy(name)) is not None}
        out = functional_call(self.base_layer, proxies, args, kwargs) if proxies else self.base_layer(*args, **kwargs)
        for name in self.names:
            if name not in self.places:
                # not by the base's own forward, whose kernel for products with a bias need not round as that without
                out = sum((delta.values_M.to(out.dtype) for delta in self.deltas(name)), start=out)
        return out

    def show(self) -> None:
        """Have the active adapters' entries stand in the base's parameters, where they do not already."""
        for owner, _ in self.owners.values():
            owner.show()
        if self.disable_adapters or self.merged:
            return
        for name, place in self.places.items():
            deltas = self.deltas(name)
            for delta in deltas:
                if delta.values_M.is_meta or place.parameter.is_meta:
                    return
                if delta.adapter in self._without_entries and delta.indices_M is not None:
                    self._refuse(delta.adapter)
            place.show(deltas)

    def restore_base(self) -> None:
        """Have the base's own bits stand in its parameters, until the next forward pass; what is merged stays."""
        for owner, _ in self.owners.values():
            owner.restore_base()
        if not self.merged:
            for place in self.places.values():
                place.restore()

    def enable_adapters(self, enabled: bool) -> None:
        """PEFT's own; then the base's bits, or the adapters', stand in the parameters at once.

        At once, so that a look at the base between a forward pass and its backward pass leaves nothing changed.
        """
        BaseTunerLayer.enable_adapters(self, enabled)
        if enabled:
            self._show_if_known()
        else:
            self.unmerge()
            self.restore_base()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """PEFT's own; then those adapters stand in the parameters."""
        BaseTunerLayer.set_adapter(self, adapter_names, inference_mode=inference_mode)
        self._show_if_known()

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's own, which makes another adapter active, or none."""
        self._without_entries.discard(adapter_name)
        BaseTunerLayer.delete_adapter(self, adapter_name)

    def train(self, mode: bool = True) -> SparseDeltaLayer:
        """As any module's; between training and evaluation values may have been exchanged unseen (averages of them)."""
        for place in self.places.values():
            place.values_may_have_moved()
        super().train(mode)
        return self

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Leave the values in the base's parameters, whose originals are kept for `unmerge`.

        Raises:
            DeltaError: with `safe_merge`, a value is not finite.
        """
        adapters = self.check_merge(adapter_names, safe_merge=safe_merge)
        if not adapters:
            return
        wanted = [*self.merged_adapters, *adapters]
        for name in self.names:
            deltas = self.deltas(name, wanted)
            if name in self.places:
                self.places[name].values_may_have_moved()
                self.places[name].show(deltas)
            elif deltas:
                total_M = sum((delta.values_M.detach() for delta in deltas[1:]), start=deltas[0].values_M.detach())
                weight = self.base_layer._parameters["weight"]
                assert weight is not None, "a linear layer's"
                self.base_layer.bias = nn.Parameter(total_M.to(weight), requires_grad=False)
        self.merged_adapters = wanted

    def check_merge(self, adapter_names: list[str] | None, *, safe_merge: bool) -> list[str]:
        """Which adapters a merge would write here; raises what `merge` raises, and writes nothing."""
        wanted = BaseTunerLayer.active_adapters.fget(self) if adapter_names is None else adapter_names
        adapters = [a for a in wanted if a in self.adapter_names and a not in self.merged_adapters]
        for name in self.names:
            for delta in self.deltas(name, adapters):
                if delta.adapter in self._without_entries:
                    self._refuse(delta.adapter)
                if safe_merge and not bool(torch.isfinite(delta.values_M).all()):
                    raise DeltaError(
                        f"{self.path}.{name}: adapter '{delta.adapter}' holds values that are not finite; nothing was "
                        "merged."
                    )
        return adapters

    def added_biases(self, adapter_names: list[str] | None) -> list[str]:
        """Paths of the biases that a merge would give to a base layer that has none."""
        adapters = self.check_merge(adapter_names, safe_merge=False)
        return [f"{self.path}.{n}" for n in self.names if n not in self.places and self.deltas(n, adapters)]

    def unmerge(self) -> None:
        """Put the base's own bits back."""
        if not self.merged_adapters:
            return
        self.merged_adapters = []
        for name in self.names:
            if name in self.places:
                self.places[name].restore()
            else:
                self.base_layer.register_parameter("bias", None)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer: with the active (or named) adapters' values in it for good, or as it was."""
        for path, module in list(self.base_layer.named_modules()):
            if isinstance(module, SparseDeltaLayer) and path:
                parent_path, _, name = path.rpartition(".")
                unloaded = module.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
                setattr(self.base_layer.get_submodule(parent_path), name, unloaded)
        if merge:
            # of an active adapter that is not merged, nothing stays
            self.restore_base()
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            for place in self.places.values():
                place.forget()
        else:
            self.unmerge()
            self.restore_base()
        return self.base_layer

    @property
    def weight(self) -> Tensor:
        """The base layer's, for models that read it without a call: as the forward pass sees it."""
        return self._read("weight")

    @property
    def bias(self) -> Tensor:
        """As `weight`."""
        return self._read("bias")

    def _read(self, name: str) -> Tensor:
        if name not in self.places and name not in self.owners:
            found: Tensor = getattr(self.base_layer, name)
            return found
        self.show()
        proxy = None if self.disable_adapters or self.merged else self._proxy(name)
        return self.base_layer._parameters[name] if proxy is None else proxy  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # models read sizes and the like of the modules that they call
            if name == "base_layer" or name.startswith("sparse_delta_"):
                raise
            return getattr(self.base_layer, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseDeltaLayer:
        # originals are kept as they were, so what moves or is cast has to be the base's own
        self.unmerge()
        self.restore_base()
        super()._apply(fn, recurse)
        return self

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own would round the differences to the base's dtype
        for name in self.names:
            if adapter_name in self.values_of(name) and not self.values_of(name)[adapter_name].is_meta:
                values = self.values_of(name)
                values[adapter_name] = nn.Parameter(
                    values[adapter_name].detach().to(device or self._device()), values[adapter_name].requires_grad
                )

    def _proxy(self, name: str) -> Tensor | None:
        owner, own_name = self.owners.get(name, (self, name))
        deltas = [] if owner.disable_adapters or owner.merged else owner.deltas(own_name)
        return owner.places[own_name].proxy(deltas) if deltas else None

    def _make_room(self, name: str) -> None:
        if f"{VALUES}{name}" in self.adapter_layer_names:
            return
        setattr(self, f"{VALUES}{name}", nn.ParameterDict())
        # not in `state_dict`, of which accelerate shards every entry; `state.py` puts them into what PEFT saves
        setattr(self, f"{INDICES}{name}", BufferDict({}, persistent=False))
        self.adapter_layer_names = (*self.adapter_layer_names, f"{VALUES}{name}")
        self.other_param_names = (*self.other_param_names, f"{INDICES}{name}")

    def _show_if_known(self) -> None:
        active = BaseTunerLayer.active_adapters.fget(self)
        if not any(
            layer._without_entries.intersection(active) for layer in (self, *(x for x, _ in self.owners.values()))
        ):
            self.show()

    def _device(self) -> torch.device:
        return next(self.base_layer.parameters(recurse=False)).device

    def _refuse(self, adapter_name: str) -> None:
        raise DeltaError(
            f"{self.path}: adapter '{adapter_name}' was made from a configuration that says how many entries it has, "
            "and not which.\nLoad its file with PeftModel.from_pretrained, or choose with prepare(model, config, …)."
        )
