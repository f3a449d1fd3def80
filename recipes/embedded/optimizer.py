"""Muon for the matrices and AdamW for the rest, over fp32 masters of a bf16 model.

Muon (Jordan et al., 2024) orthogonalises the momentum of every matrix; on so few tokens it reaches a given loss in
clearly fewer of them than AdamW. A stack of experts counts as that many matrices, gate and up apart.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def orthogonalise(matrices_BMN: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices, by a quintic Newton-Schulz iteration in bf16; M <= N."""
    x = matrices_BMN.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.float()


class MuonWithAdamW:
    """The optimizer of the recipe. `step(lr_scale)` reads bf16 grads, updates the masters and writes bf16 back."""

    def __init__(self, model: nn.Module, *, muon_lr: float, adamw_lr: float, weight_decay: float) -> None:
        self.muon_lr, self.adamw_lr, self.weight_decay = muon_lr, adamw_lr, weight_decay
        self.parameters = dict(model.named_parameters())
        self.masters = {name: p.detach().float().clone() for name, p in self.parameters.items()}
        self.is_muon = {
            n: p.ndim >= 2 and "embed" not in n and "gate.weight" not in n for n, p in self.parameters.items()
        }
        self.first = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        self.second = {n: torch.zeros_like(m) for n, m in self.masters.items() if not self.is_muon[n]}
        self.num_steps = 0

    def state_dict(self) -> dict[str, object]:
        kept = {"masters": self.masters, "first": self.first, "second": self.second, "num_steps": self.num_steps}
        return dict(kept)

    def load_state_dict(self, state: dict) -> None:
        for mine, theirs in ((self.masters, "masters"), (self.first, "first"), (self.second, "second")):
            for name, tensor in mine.items():
                tensor.copy_(state[theirs][name])
        self.num_steps = state["num_steps"]
        self._write_back()

    @torch.no_grad()
    def step(self, lr_scale: float) -> None:
        self.num_steps += 1
        matrices: dict[tuple[int, int], list[tuple[str, Tensor]]] = {}
        for name, parameter in self.parameters.items():
            grad = parameter.grad.float()
            if not self.is_muon[name]:
                self._adamw(name, grad, lr_scale)
                continue
            momentum = self.first[name].lerp_(grad, 0.05)
            update = grad.lerp_(momentum, 0.95)
            shape = update.shape
            stack = update.view(-1, shape[-2] // 2 if "gate_up" in name else shape[-2], shape[-1])
            stack = stack.mT if stack.shape[-2] > stack.shape[-1] else stack
            matrices.setdefault((stack.shape[-2], stack.shape[-1]), []).append((name, stack))
        for group in matrices.values():
            done = orthogonalise(torch.cat([stack for _, stack in group]))
            for (name, _), update in zip(group, done.split([len(stack) for _, stack in group]), strict=True):
                self._muon(name, update, lr_scale)
        self._write_back()
        for parameter in self.parameters.values():
            parameter.grad = None

    def _muon(self, name: str, update: Tensor, lr_scale: float) -> None:
        master = self.masters[name]
        rows = master.shape[-2] // 2 if "gate_up" in name else master.shape[-2]
        update = update if update.shape[-2] == rows and update.shape[-1] == master.shape[-1] else update.mT
        scale = max(1.0, rows / master.shape[-1]) ** 0.5
        lr = self.muon_lr * lr_scale
        master.mul_(1 - lr * self.weight_decay).sub_(update.reshape(master.shape), alpha=lr * scale)

    def _adamw(self, name: str, grad: Tensor, lr_scale: float) -> None:
        first, second, master = self.first[name], self.second[name], self.masters[name]
        first.lerp_(grad, 0.1)
        second.lerp_(grad.square(), 0.05)
        step = first / (1 - 0.9**self.num_steps)
        master.sub_(step / ((second / (1 - 0.95**self.num_steps)).sqrt() + 1e-8), alpha=self.adamw_lr * lr_scale)

    @torch.no_grad()
    def _write_back(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(self.masters[name])
