"""MeZO: the slope along a random direction from two forward passes, and a step along it; nothing is kept for backward.

Paper: arXiv:2305.17333. A direction is drawn again from its seed wherever it is needed, so that training takes the
memory of inference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer

from metier.errors import NotFiniteError
from metier.training.bare_optimizer import bare_optimizer


class Mezo(Optimizer):
    """Stochastic gradient descent along directions whose slopes it was told.

    Args:
        params: what is trained.
        lr: of a step, in the direction's own length.
        weight_decay: share of a parameter that a step takes away, times `lr`.
        epsilon: how far parameters are moved to both sides to measure a slope.
        seed: of the directions.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float = 0.0,
        epsilon: float = 1e-3,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "epsilon": epsilon, "seed": seed, "num_drawn": 0}
        super().__init__(params, defaults)
        self._measured: list[tuple[int, float]] = []

    @torch.no_grad()
    def measure(self, loss: Callable[[int], Tensor]) -> Tensor:
        """Draw a direction, measure the loss on both sides and remember the slope for the next step.

        Args:
            loss: computes it with the parameters as they are, all that is random in it from a seed.

        Returns:
            the mean of both losses.
        """
        group = self.param_groups[0]
        seed, epsilon = group["seed"] * 1_000_003 + group["num_drawn"], group["epsilon"]
        for each in self.param_groups:
            each["num_drawn"] += 1
        self._move(seed, epsilon)
        above = loss(seed)
        self._move(seed, -2 * epsilon)
        below = loss(seed)
        self._move(seed, epsilon)
        self._measured.append((seed, float(above - below) / (2 * epsilon)))
        return (above + below) / 2

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Go down the slopes that were measured since the last step, summed: their batches' losses are a sum too."""
        if not all(math.isfinite(slope) for _, slope in self._measured):
            self._measured.clear()
            raise NotFiniteError(
                "mezo: got a slope that is not finite; nothing was updated.\nWhat was trained before is good. Lower "
                "the learning rate or mezo_epsilon, or compute in a wider dtype."
            )
        for seed, slope in self._measured:
            for group, parameter, direction in self._directions(seed):
                parameter.add_(direction, alpha=-group["lr"] * slope)
        for group in self.param_groups if self._measured else ():
            for parameter in group["params"] if group["weight_decay"] else ():
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
        self._measured.clear()

    def _move(self, seed: int, distance: float) -> None:
        for _, parameter, direction in self._directions(seed):
            parameter.add_(direction, alpha=distance)

    def _directions(self, seed: int) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
        """Each parameter with its part of the direction, one at a time."""
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                device = parameter.device
                if device not in generators:
                    generators[device] = torch.Generator(device).manual_seed(seed)
                yield (
                    group,
                    parameter,
                    torch.randn(parameter.shape, generator=generators[device], device=device, dtype=parameter.dtype),
                )


def measure_by_forward_passes(trainer: Trainer, num_directions: int) -> None:
    """Have the trainer ask its optimizer to measure a batch's slopes instead of running the backward pass.

    Args:
        trainer: its optimizer is a `Mezo`.
        num_directions: measured for each batch; their slopes' mean is what counts.
    """

    def training_step(model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        model.train()
        inputs = trainer._prepare_inputs(inputs)
        optimizer = bare_optimizer(trainer.optimizer)
        assert isinstance(optimizer, Mezo), f"the procedure sets its own optimizer, got {type(optimizer).__name__}"

        def loss(seed: int) -> Tensor:
            with torch.random.fork_rng(), trainer.compute_loss_context_manager():
                # both sides of a slope see the same dropout
                torch.manual_seed(seed)
                found: Tensor = trainer.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
            return found.detach() / num_directions

        total = torch.stack([optimizer.measure(loss) for _ in range(num_directions)]).sum()
        return total.detach()

    trainer.training_step = training_step
