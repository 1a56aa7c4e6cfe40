"""Refinement of one pair's alignment by a few gradient steps, after the network has answered.

The network leaves two fields out of a middle grid, ``u_fixed`` and ``u_moving`` (see ``models.alignment``). A residual
displacement ``v`` over that grid, zero at first, is found by Adam and shared like a step of the network:

    ``u_fixed' = compose(u_fixed, -v / 2)``,   ``u_moving' = compose(u_moving, v / 2)``

so that swapping the images still gives the inverse. ``v`` is a cubic B-spline (free-form deformation; Rueckert et al.,
IEEE Trans. Med. Imaging 18, 1999). What is minimised, in nats, is the contrast by which the descriptors were trained:
minus the log probability, under a softmax over a window, that descriptors which lie on one another belong together,
both ways; plus penalties on the differences of neighbouring ``v`` and on its size: the network's answer is a prior.
Intensities are never compared. ``docs/refinement.md`` has what was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bsafusion.deformation import compose, jacobian_determinant, roughness, warp
from bsafusion.models.alignment import Refined, Step, local_correlation, reverse_correlation

MOST_STEPS = 200


@dataclass(frozen=True)
class Refinement:
    """``refine`` of :meth:`bsafusion.models.bsafusion.BSAFusion.predict`: the same input gives the same fields.

    Attributes:
        steps: of Adam, 1 to 200.
        rate: Adam's step size, voxels of the middle grid.
        spacing: of the spline's knots, voxels of the middle grid.
        smoothness: weight of the mean squared difference of neighbouring displacements, nats a voxel squared.
        size: weight of the mean squared displacement, likewise.
        radius: of the window in which descriptors compete, voxels.
        halvings: how often ``v`` is halved where it makes a fold, before it is given up.

    Raises:
        ValueError: ``steps`` is not in that range.
    """

    steps: int
    rate: float = 0.02
    spacing: int = 8
    smoothness: float = 100.0
    size: float = 1.0
    radius: int = 1
    halvings: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS:
            raise ValueError(f"{self.steps} steps of refinement; expected 1 to {MOST_STEPS}")

    def __call__(
        self, step: Step, descriptors: tuple[Tensor, Tensor], scale: Tensor, share: tuple[float, float]
    ) -> Refined:
        """Refine the fields of the last step.

        Args:
            step: the network's last, its fields ``B 2 h w``.
            descriptors: of the fixed and the moving image, ``B C h w``, unit length, on the grid of that step.
            scale: of a cosine in the softmax.
            share: the parts of ``v`` that the fixed and the moving side take; -1/2 and 1/2 where both move.
        """
        # Gradients in the midst of inference: tensors made in inference mode cannot take part, their copies can.
        with torch.inference_mode(False), torch.enable_grad():
            fields = (step.field_fixed.detach().clone(), step.field_moving.detach().clone())
            a, b = (d.detach().float().clone() for d in descriptors)
            scale = scale.detach().clone()
            rows, columns = (bspline(n, self.spacing, like=fields[0]) for n in fields[0].shape[-2:])

            def displacement(coefficients: Tensor) -> Tensor:
                return rows @ coefficients @ columns.T

            def moved(v: Tensor) -> tuple[Tensor, Tensor]:
                return compose(fields[0], share[0] * v), compose(fields[1], share[1] * v)

            def objective(v: Tensor) -> Tensor:
                to_fixed, to_moving = moved(v)
                # Between voxels interpolation shortens descriptors, which would draw them back to voxels.
                apart = unlikeness(
                    F.normalize(warp(a, to_fixed), dim=1), F.normalize(warp(b, to_moving), dim=1), scale, self.radius
                )
                return apart + self.smoothness * roughness(v) + self.size * v.square().mean((1, 2, 3))

            best = fields[0].new_zeros(len(a), 2, rows.shape[1], columns.shape[1])
            coefficients = best.clone().requires_grad_()
            # Far above rounding, far below any gradient that says something: equal images stay where they are.
            adam = torch.optim.Adam([coefficients], lr=self.rate, eps=1e-5)
            lowest: Tensor | None = None
            before = fields[0].new_zeros(len(a))
            for taken in range(self.steps + 1):
                value = objective(displacement(coefficients))
                reached = value.detach()
                if lowest is None:
                    before, lowest = reached, reached
                better = reached < lowest
                best = torch.where(better.view(-1, 1, 1, 1), coefficients.detach(), best)
                lowest = torch.where(better, reached, lowest)
                if taken < self.steps:
                    adam.zero_grad()
                    value.sum().backward()  # type: ignore[no-untyped-call]
                    adam.step()
            with torch.no_grad():
                v = self._without_folds(displacement(best), fields, share)
                to_fixed, to_moving = moved(v)
                return Refined(to_fixed, to_moving, (before, objective(v)))

    def _without_folds(self, v: Tensor, fields: tuple[Tensor, Tensor], share: tuple[float, float]) -> Tensor:
        """``v``, for each pair halved until it adds no fold to either field, else 0."""

        def folded(v: Tensor) -> Tensor:
            # On the CPU: not every device has determinants.
            both = [jacobian_determinant(compose(u, s * v).cpu()) <= 0 for u, s in zip(fields, share, strict=True)]
            return torch.stack(both).sum((0, 2, 3)).to(v.device)

        allowed = folded(torch.zeros_like(v))
        for _ in range(self.halvings):
            v = torch.where((folded(v) > allowed).view(-1, 1, 1, 1), v / 2, v)
        return torch.where((folded(v) > allowed).view(-1, 1, 1, 1), 0.0, v)


def bspline(count: int, spacing: int, *, like: Tensor) -> Tensor:
    """Cubic B-splines with knots every ``spacing`` voxels, at ``count`` voxels: ``count K``, rows sum to 1.

    The knots are laid about the middle, so that the mirror image of a field is a field as well.
    """
    knots = math.ceil((count - 1) / spacing) + 3
    voxel = torch.arange(count, dtype=like.dtype, device=like.device) - (count - 1) / 2
    knot = torch.arange(knots, dtype=like.dtype, device=like.device) - (knots - 1) / 2
    distance = (voxel[:, None] / spacing - knot).abs()
    near = 2 / 3 - distance.square() + distance**3 / 2
    return torch.where(distance < 1, near, (2 - distance).clamp(min=0) ** 3 / 6)


def unlikeness(a: Tensor, b: Tensor, scale: Tensor, radius: int) -> Tensor:
    """Minus the mean log probability that descriptors at the same place belong together; ``B C h w`` twice -> ``B``.

    A softmax of ``scale`` times the cosine over the window, from ``a`` to ``b`` and from ``b`` to ``a``: swapping the
    two changes nothing.
    """
    correlation = local_correlation(a, b, radius)
    centre = correlation.shape[1] // 2
    both = (correlation, reverse_correlation(correlation, radius))
    there, back = ((scale * logits).log_softmax(1)[:, centre].mean((1, 2)) for logits in both)
    return -(there + back) / 2
