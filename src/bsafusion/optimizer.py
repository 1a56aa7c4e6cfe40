"""Muon: momentum whose direction is made orthogonal, for every weight that is a matrix.

Jordan et al., *Muon: an optimizer for hidden layers in neural networks* (2024), scaled as in Liu et al., *Muon is
scalable for LLM training* (arXiv 2502.16982), so that learning rates mean what they mean for AdamW. A convolution is
the matrix ``C_out x (C_in k k)``; what is no matrix (biases, norms, single numbers) and what is too thin to be one
takes AdamW's step. torch has a Muon of its own from 2.9 on, for linear layers only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

ROUNDS = 5  # of the Newton-Schulz iteration
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of its polynomial: singular values end between 0.7 and 1.2
UPDATE_RMS = 0.2  # of a step's entries, per unit of learning rate: what AdamW's steps have
THINNEST = 8  # rows or columns of what counts as a matrix


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthogonal rows (or columns, whichever are fewer), roughly: every singular value becomes
    about 1. ``M N`` -> ``M N``."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide.float()
    x = x / (x.norm() + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    level: Tensor = x if matrix.shape[0] <= matrix.shape[1] else x.T
    return level.to(matrix.dtype)


def is_matrix(parameter: Tensor) -> bool:
    """Whether :class:`Muon` makes this parameter's step orthogonal."""
    return parameter.dim() in (2, 4) and min(parameter.shape[0], parameter[0].numel()) >= THINNEST


class Muon(torch.optim.Optimizer):
    """Orthogonal steps for matrices, AdamW's for the rest, with decoupled weight decay.

    Args:
        parameters: what to train.
        lr: learning rate, of AdamW's order of magnitude.
        momentum: of the matrices (Nesterov's).
        betas, eps: of the rest.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(parameters, defaults | {"betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step along the gradients that are there."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"])
                direction = self._orthogonal if is_matrix(p) else self._adam
                p.add_(direction(p, p.grad, group), alpha=-group["lr"])

    def _orthogonal(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[p]
        mean: Tensor = state.setdefault("exp_avg", torch.zeros_like(p))
        mean.lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(mean, group["momentum"]).flatten(1)
        scale: float = UPDATE_RMS * max(ahead.shape) ** 0.5
        return scale * orthogonalise(ahead).view_as(p)

    def _adam(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[p]
        step: Tensor = state.setdefault("step", torch.zeros(()))
        mean: Tensor = state.setdefault("exp_avg", torch.zeros_like(p))
        square: Tensor = state.setdefault("exp_avg_sq", torch.zeros_like(p))
        step += 1
        first, second = group["betas"]
        mean.lerp_(gradient, 1 - first)
        square.lerp_(gradient.square(), 1 - second)
        unbiased, spread = mean / (1 - first ** float(step)), (square / (1 - second ** float(step))).sqrt()
        direction: Tensor = unbiased / (spread + group["eps"])
        return direction
