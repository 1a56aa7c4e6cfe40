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


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest matrices with orthogonal rows (or columns, whichever are fewer), roughly: every singular value
    becomes about 1. ``... M N`` -> ``... M N``."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).float()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    level: Tensor = x.mT if tall else x
    return level.to(matrices.dtype)


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
        """One step along the gradients that are there.

        Tensors are worked on in lists, matrices of one shape in one stack: a GPU takes as long for one that is small as
        for a hundred.
        """
        for group in self.param_groups:
            reached = [p for p in group["params"] if p.grad is not None]
            if not reached:
                continue
            torch._foreach_mul_(reached, 1 - group["lr"] * group["weight_decay"])
            self._orthogonal([p for p in reached if is_matrix(p)], group)
            self._adam([p for p in reached if not is_matrix(p)], group)

    def _orthogonal(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        if not matrices:
            return
        gradients, means = _gradients(matrices), self._states(matrices, "exp_avg")
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, means, group["momentum"])
        alike: dict[tuple[int, int], list[int]] = {}
        for index, p in enumerate(matrices):
            alike.setdefault((len(p), p[0].numel()), []).append(index)
        for (rows, columns), places in alike.items():
            directions = orthogonalise(torch.stack([ahead[i].flatten(1) for i in places]))
            level = [d.view_as(matrices[i]) for i, d in zip(places, directions, strict=True)]
            scale = UPDATE_RMS * max(rows, columns) ** 0.5
            torch._foreach_add_([matrices[i] for i in places], level, alpha=-group["lr"] * scale)

    def _adam(self, others: list[Tensor], group: dict[str, Any]) -> None:
        if not others:
            return
        first, second = group["betas"]
        gradients = _gradients(others)
        means, squares = self._states(others, "exp_avg"), self._states(others, "exp_avg_sq")
        counts = []
        for p in others:
            count: Tensor = self.state[p].setdefault("step", torch.zeros(()))
            count += 1
            counts.append(float(count))
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 1 - second)
        spread = torch._foreach_sqrt(squares)
        torch._foreach_div_(spread, [(1 - second**n) ** 0.5 for n in counts])
        torch._foreach_add_(spread, group["eps"])
        directions = torch._foreach_div(means, spread)
        torch._foreach_mul_(directions, [-group["lr"] / (1 - first**n) for n in counts])
        torch._foreach_add_(others, directions)

    def _states(self, parameters: list[Tensor], name: str) -> list[Tensor]:
        return [self.state[p].setdefault(name, torch.zeros_like(p)) for p in parameters]


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
