"""AdamW for models with rows in stores: an ordinary optimizer to a trainer, which updates the rows that a step used.

Ordinary parameters get what `torch.optim.AdamW` gives them. A parameter that stands for the rows of a store (see
`step_gradients.py`) has gradients of the used blocks only, and its rows are updated where they live.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from metier.errors import ConfigError, NotFiniteError, RowStoreError
from metier.memory.device_rows import HotBlocks
from metier.memory.row_state import STATE_DTYPES, RowBank, add_state
from metier.memory.row_update import RowChunks, StepHistory, StepSettings, catch_up, update_rows
from metier.memory.step_gradients import StepGradients, is_finite, step_gradients_of

UpdateMode = Literal["lazy", "exact"]
UPDATE_MODES: tuple[str, ...] = get_args(UpdateMode)
_SEED_STRIDE = 1 << 20


class RowAdamW(Optimizer):
    """AdamW over ordinary parameters and rows in stores.

    Args:
        params: parameters or groups, as for any optimizer.
        lr, betas, eps, weight_decay: AdamW's.
        mode: "lazy" lets rows rest that a step did not use; "exact" has them catch up on the decay and the momentum
            that they missed before they are used again, which gives dense AdamW's numbers for more time.
        state_dtype: how the moments of rows are kept: "float32", "bfloat16" (rounded at random) or "int8".
        seed: of the random rounding.

    Raises:
        ConfigError: an unknown mode or dtype, or a number out of range.
        RowStoreError: rows lie on a disk that has no room for the moments.
    """

    updates_stores = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        mode: str = "lazy",
        state_dtype: str = "float32",
        seed: int = 0,
    ) -> None:
        if mode not in UPDATE_MODES:
            raise ConfigError(f"RowAdamW: mode must be one of {', '.join(UPDATE_MODES)}, got {mode!r}.")
        if state_dtype not in STATE_DTYPES:
            raise ConfigError(f"RowAdamW: state_dtype must be one of {', '.join(STATE_DTYPES)}, got {state_dtype!r}.")
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(
                f"RowAdamW: lr, eps and weight_decay must be at least 0 and betas in [0, 1), got lr={lr}, "
                f"eps={eps}, weight_decay={weight_decay}, betas={betas}."
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.mode, self.state_dtype, self.seed = mode, state_dtype, seed
        self._rows: dict[int, _TrainedRows] = {}
        self._reserve()

    def _reserve(self) -> None:
        """Where rows lie on disk, make room there for all that a step writes, so that a full disk is told of now."""
        for _, gradients in self._row_parameters():
            if gradients.store.tier == "disk":
                self._trained(gradients)
                if not torch.accelerator.is_available():
                    gradients.store.gradient_room(gradients.store.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take a step.

        Raises:
            NotFiniteError: a gradient is not finite; nothing was updated, and the step can be left out by `zero_grad`.
            RowStoreError: the disk could not take rows; some were updated, and some are lost.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_finite()
        for group in self.param_groups:
            settings = _settings_of(group)
            ordinary = []
            for parameter in group["params"]:
                gradients = step_gradients_of(parameter)
                if gradients is None:
                    ordinary.append(parameter)
                elif parameter.grad is not None:
                    self._trained(gradients).step(settings)
            self._step_ordinary([p for p in ordinary if p.grad is not None], settings)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer; the state of rows are the stores' own tensors, every owed update done."""
        packed: dict[str, Any] = super().state_dict()
        for index, gradients in self._row_parameters():
            trained = self._rows.get(id(gradients))
            # before the first update there are zeros, and much of them
            if trained is not None and trained.is_begun:
                packed["state"][index] = trained.state_dict()
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take on a state; that of rows is copied into their stores.

        Raises:
            RowStoreError: the state is that of other rows, or was kept in another dtype or mode.
        """
        states = dict(state_dict["state"])
        of_rows = {index: states.pop(index) for index, _ in self._row_parameters() if index in states}
        loaded = [(self._trained(rows), of_rows[index]) for index, rows in self._row_parameters() if index in of_rows]
        for trained, state in loaded:
            trained.check(state)
        super().load_state_dict({**state_dict, "state": states})
        for trained, state in loaded:
            trained.load_state_dict(state)
        for index, rows in self._row_parameters():
            # a state of before their first update
            if index not in of_rows and self._trained(rows).is_begun:
                seed = self._rows[id(rows)].seed
                self._rows[id(rows)] = _TrainedRows(rows, self.mode, self.state_dtype, seed)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of any optimizer; of rows no gradients are left either way, or those that rest would be moved by zeros."""
        super().zero_grad(set_to_none)
        for _, gradients in self._row_parameters():
            if gradients.block_ids:
                gradients.clear()

    def _row_parameters(self) -> list[tuple[int, StepGradients]]:
        """Index in `state_dict` and gradients of each parameter that stands for rows."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        found = [(index, step_gradients_of(parameter)) for index, parameter in enumerate(parameters)]
        return [(index, gradients) for index, gradients in found if gradients is not None]

    def _trained(self, gradients: StepGradients) -> _TrainedRows:
        if id(gradients) not in self._rows:
            seed = self.seed + _SEED_STRIDE * len(self._rows)
            self._rows[id(gradients)] = _TrainedRows(gradients, self.mode, self.state_dtype, seed)
        return self._rows[id(gradients)]

    def _check_finite(self) -> None:
        for group_number, group in enumerate(self.param_groups):
            for number, parameter in enumerate(group["params"]):
                gradients = step_gradients_of(parameter)
                if parameter.grad is None:
                    continue
                if is_finite(parameter.grad) if gradients is None else gradients.are_finite():
                    continue
                where = (
                    f"parameter {number} of group {group_number}, of shape {list(parameter.shape)}"
                    if gradients is None
                    else gradients.store.name
                )
                raise NotFiniteError(
                    f"{where}: got a gradient with values that are not finite; nothing was updated.\n"
                    "What was trained before is good. Lower the learning rate, clip gradients, or compute in a wider "
                    "dtype."
                )

    def _step_ordinary(self, parameters: Sequence[nn.Parameter], settings: StepSettings) -> None:
        if not parameters:
            return
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            # a trainer reads checkpoints into the host's memory
            state["step"] = state["step"].to(parameter.device)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            list(parameters),
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=settings.beta1,
            beta2=settings.beta2,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            eps=settings.eps,
            maximize=False,
        )


class _TrainedRows:
    """One store under training: its state, how many steps there were, and what each was taken with."""

    def __init__(self, gradients: StepGradients, mode: str, state_dtype: str, seed: int) -> None:
        self.gradients, self.store, self.mode, self.seed = gradients, gradients.store, mode, seed
        # a former optimizer, whose state ends here, may owe updates
        self.store.settle(None)
        self.store.leave_device()
        self.state_dtype, self.state_names = state_dtype, add_state(self.store, state_dtype)
        self.history = StepHistory()
        self.num_updates = 0
        """Calls so far, each with random numbers of its own."""
        self._chunks: dict[torch.device | None, RowChunks] = {}
        self.store.before_use = self.catch_up if mode == "exact" else None

    @property
    def is_begun(self) -> bool:
        """Whether anything was ever updated."""
        return self.num_updates > 0 or len(self.history) > 0

    def step(self, settings: StepSettings) -> None:
        block_ids = self.gradients.block_ids
        # those that another process has used were not asked for here
        if self.mode == "exact":
            self.store.settle(self._owed(block_ids))
        for group in self.gradients.groups("optimizer", self._read_ahead):
            self._step_group(group, settings)
            self.store.changed(block_ids[group])
        if self.mode == "exact":
            # before this step the rows were up to date, so what counts for them is the number of the step
            self.history.append(settings)
        self.store.end_step(block_ids)

    def _step_group(self, group: slice, settings: StepSettings) -> None:
        grad, block_ids = self.gradients.holder.grad, self.gradients.block_ids[group]
        assert grad is not None, "rows without a gradient are left out"
        grad, fired_GM = grad[group], self.gradients.fired_GM[group]
        if self.gradients.scale != 1:
            grad = grad * self.gradients.scale
        for bank, slots, places in self._where(block_ids):
            part = slice(None) if len(slots) == len(block_ids) else slots
            fired, grads = fired_GM[part], grad[part].flatten(0, 1).flatten(1)
            if grads.device != bank.device or self.store.is_remote:
                self.store.meter.bytes_from_device += grads.nbytes if bank is self.store else 0
                fired, grads = fired.to(bank.device), grads.to(bank.device)
            fired_rows = fired.flatten().nonzero().squeeze(1)
            row_ids = self._row_ids(places, bank)[fired_rows]
            update_rows(self._chunks_of(bank), row_ids, grads, fired_rows, settings, self._seed())
            self.store.meter.num_rows_updated += len(row_ids)

    def _read_ahead(self, group: slice) -> None:
        self.store.wanted(self.gradients.block_ids[group], self.store.arrays, to_write=True)
        self.gradients.read_ahead(group)

    def catch_up(self, block_ids: Sequence[int] | None) -> None:
        """Do the updates that blocks (None: all) are owed."""
        wanted = list(range(self.store.num_blocks) if block_ids is None else block_ids)
        at_once = self.gradients.num_together
        for first in range(0, len(wanted), at_once):
            group = wanted[first : first + at_once]
            owed = self._owed(group)
            if block_ids is None:
                # of all blocks those done with may be given up; a pass is in need of all that it asks for
                self.store.come_to("optimizer")
            self.store.wanted(owed, self.store.arrays, to_write=True)
            self.store.wait_for(self.store.arrays)
            for bank, _, places in self._where(group):
                seed = self.seed + self.num_updates + 1
                # where nothing was owed the next seed is as it was: to look at rows changes no later number
                row_ids = self._row_ids(places, bank)
                self.num_updates += catch_up(self._chunks_of(bank), row_ids, self.history, seed)
            self.store.changed(owed)

    def _owed(self, block_ids: Sequence[int]) -> list[int]:
        """Of those blocks the ones in the store of which a row has missed a step."""
        steps_NM = self.store.array("steps").view(self.store.num_blocks, -1)[list(block_ids)]
        return [block_ids[i] for i in (steps_NM < len(self.history)).any(1).nonzero().flatten().tolist()]

    def state_dict(self) -> dict[str, Any]:
        if self.mode == "exact":
            with torch.inference_mode(False), torch.no_grad():  # as `RowStore.settle`
                self.catch_up(None)
        self.store.write_back()
        self.store.wait_until_written()
        self.store.expect(in_order=True)
        settings = [
            [past.learning_rate, past.weight_decay, past.beta1, past.beta2, past.eps] for past in self.history.settings
        ]
        return {
            **{name: self.store.array(name) for name in self.state_names},
            "history": torch.tensor(settings, dtype=torch.float64).reshape(-1, 5),
            "num_updates": torch.tensor(self.num_updates),
            "is_exact": torch.tensor(self.mode == "exact"),
            **_packed(self.store.hot()),
        }

    def check(self, state: dict[str, Any]) -> None:
        """Raise a RowStoreError where the state is of other rows, or was kept in another way."""
        expected = {name: (tuple((a := self.store.array(name)).shape), a.dtype) for name in self.state_names}
        got = {name: (tuple(state[name].shape), state[name].dtype) for name in expected if name in state}
        if got != expected or "history" not in state:
            raise RowStoreError(
                f"{self.store.name}: got optimizer state {_described(got)}, expected {_described(expected)}; nothing "
                "was loaded.\nResume with the adapter, mode and state_dtype of the run that it belongs to."
            )
        if "is_exact" in state and bool(state["is_exact"]) != (self.mode == "exact"):
            was = "exact" if state["is_exact"] else "lazy"
            raise RowStoreError(
                f"{self.store.name}: got optimizer state of mode {was!r}, whose steps count something else than those "
                f"of {self.mode!r}; nothing was loaded.\nResume with mode {was!r}."
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take on a state that `check` has let pass; arrays that are the store's own are left."""
        names = [name for name in self.state_names if state[name].data_ptr() != self.store.array(name).data_ptr()]
        # hot blocks have moments of their own, which are not these
        self.store.write_back()
        self.store.forget_copies()
        rows = self.store.rows_per_block
        for block in range(self.store.num_blocks):
            part = slice(block * rows, (block + 1) * rows)
            for name in names:
                self.store.array(name)[part].copy_(state[name][part])
            self.store.changed([block], names)
        self.history = StepHistory(StepSettings(*row) for row in state["history"].tolist())
        self.num_updates = int(state["num_updates"])
        self.store.hot_to_be = _unpacked(state)

    def _where(self, block_ids: Sequence[int]) -> Iterator[tuple[RowBank, list[int], list[int]]]:
        """Banks that the blocks are in; for each which of `block_ids` those are, and their places in the bank."""
        hot = {} if self.store.on_device is None else self.store.on_device.slots
        slots = [i for i, block in enumerate(block_ids) if block not in hot]
        if slots:
            yield self.store, slots, [block_ids[i] for i in slots]
        if self.store.on_device is not None and len(slots) < len(block_ids):
            slots = [i for i, block in enumerate(block_ids) if block in hot]
            yield self.store.on_device, slots, [hot[block_ids[i]] for i in slots]

    def _row_ids(self, places: Sequence[int], bank: RowBank) -> Tensor:
        first = torch.tensor(places, device=bank.device) * self.store.rows_per_block
        return (first[:, None] + torch.arange(self.store.rows_per_block, device=bank.device)).flatten()

    def _chunks_of(self, bank: RowBank) -> RowChunks:
        key = None if bank is self.store else bank.device
        if key not in self._chunks or self._chunks[key].bank is not bank:
            self._chunks[key] = RowChunks(bank, self.state_dtype)
        return self._chunks[key]

    def _seed(self) -> int:
        self.num_updates += 1
        return self.seed + self.num_updates


def _packed(hot: HotBlocks | None) -> dict[str, Tensor]:
    """For a state: hot blocks with their slots, (blocks, 2), and all blocks' uses, (blocks, 2)."""
    if hot is None:
        return {}
    return {
        "hot": torch.tensor(list(hot.slots.items()), dtype=torch.int64).reshape(-1, 2),
        "uses": torch.tensor(list(hot.uses.items()), dtype=torch.float64).reshape(-1, 2),
    }


def _unpacked(state: dict[str, Any]) -> HotBlocks | None:
    if "hot" not in state:
        return None
    return HotBlocks(dict(state["hot"].tolist()), {int(block): uses for block, uses in state["uses"].tolist()})


def _settings_of(group: dict[str, Any]) -> StepSettings:
    beta1, beta2 = group["betas"]
    return StepSettings(float(group["lr"]), float(group["weight_decay"]), beta1, beta2, group["eps"])


def _described(arrays: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> str:
    if not arrays:
        return "of no rows"
    return ", ".join(f"{n} {list(shape)} {str(t).removeprefix('torch.')}" for n, (shape, t) in arrays.items())
