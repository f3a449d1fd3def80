"""What the gradients of some batches say of each entry: their mean square (Fisher), and their sum.

Gradients are added up parameter by parameter while the backward pass runs, and freed at once: beside the scores there
is never more than one parameter's gradient.

Papers: FishMask, arXiv:2111.09839 (mean squared gradient); SPT, arXiv:2303.08566, and RoSA, arXiv:2401.04679 (the
sum's magnitude).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from metier.errors import ConfigError, DataError

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a transformers model gives where a batch has labels."""
    loss: Tensor = model(**batch).loss
    return loss


def fisher(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: Iterable[Batch],
    loss: Loss,
    *,
    per_sample: bool = True,
) -> dict[str, Tensor]:
    """The mean of squared gradients, float32: the diagonal of the empirical Fisher information.

        F_i = mean over samples of (d loss / d w_i)²

    With `per_sample`, each row of a batch has a backward pass of its own, which is the paper's quantity. The square of
    a batch's mean gradient is cheaper, but lets samples that pull in opposite directions cancel, and is near 0 at a
    minimum, where Fisher information is not.
    """
    return _over_batches(
        model, parameters, _samples(batches) if per_sample else batches, loss, Tensor.square, mean=True
    )


def gradient_sums(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], batches: Iterable[Batch], loss: Loss
) -> dict[str, Tensor]:
    """|sum over batches of the gradient|, float32: where one step of descent would go furthest."""
    sums = _over_batches(model, parameters, batches, loss, lambda gradient: gradient, mean=False)
    return {name: total.abs_() for name, total in sums.items()}


def _over_batches(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: Iterable[Batch],
    loss: Loss,
    of_gradient: Callable[[Tensor], Tensor],
    *,
    mean: bool,
) -> dict[str, Tensor]:
    totals = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    wanted = {id(parameter) for parameter in parameters.values()}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    was_training, number = model.training, 0
    with ExitStack() as stack:
        stack.callback(model.train, was_training)
        stack.callback(lambda: [parameter.requires_grad_(flag) for parameter, flag in before])
        model.eval()  # dropout would add its own noise to the squares
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
        for name, parameter in parameters.items():
            hook = parameter.register_post_accumulate_grad_hook(_adding(totals[name], of_gradient))
            stack.callback(hook.remove)
        for batch in batches:
            loss(model, batch).backward()
            number += 1
    if not number:
        raise DataError("batches: got none, expected at least one to take gradients of.\nPass a list of batches.")
    return {name: total.div_(number) if mean else total for name, total in totals.items()}


def _adding(total: Tensor, of_gradient: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None, "called once it is there"
        total.add_(of_gradient(parameter.grad.float()))
        parameter.grad = None

    return add


def _samples(batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        sizes = {len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()}
        if len(sizes) != 1:
            raise ConfigError(
                f"batches: tensors of {sorted(sizes)} rows cannot be parted into samples, expected one number of rows "
                "in all of them.\nSet fisher_per='batch' and give batches of one sample."
            )
        for row in range(sizes.pop()):
            yield {
                name: value[row : row + 1] if isinstance(value, Tensor) and value.dim() else value
                for name, value in batch.items()
            }
