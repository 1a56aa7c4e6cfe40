"""Training pairs whose alignment will often fail, for the head that has to tell (``models.assessment``).

A share of each batch is spoilt: deformed beyond what alignment was trained for, shown beside another patient's image,
cut off, or replaced by texture. What comes out wrong is known: the error of the field that the network gives, or that
no field can be right.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bsafusion.datasets import Batch, Misalignment, Mix, PairSet, blur, draw_batch, smooth_noise
from bsafusion.deformation import warp
from bsafusion.models.bsafusion import in_colour

SHARES = {"as drawn": 0.42, "deformed": 0.28, "other patient": 0.14, "cut": 0.1, "texture": 0.06}
"""What becomes of the pairs of a batch."""

BEYOND = (
    Misalignment(translation=10, rotation=10, scale=0.05, elastic=900),  # elastic: 11 px on average
    Misalignment(translation=6, elastic=600),
    Misalignment(translation=45, rotation=60, scale=0.3, elastic=313),
)
"""Families past what alignment is trained for; one is drawn, and how much of it."""

HALF = 0.38
"""Share of the moving head that is cut off from which the result is not to be believed, whatever its error."""


class Doubtful(NamedTuple):
    """A batch, and which of its pairs no field can align (``B``, bool)."""

    batch: Batch
    hopeless: Tensor


def draw_doubtful(data: PairSet, size: int, mix: Mix, generator: torch.Generator, *, device: torch.device) -> Doubtful:
    """One training batch of :func:`bsafusion.datasets.draw_batch`, a part of it spoilt; see :data:`SHARES`."""
    batch = draw_batch(data, size, mix, generator, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    names = list(SHARES)
    odds = torch.tensor([SHARES[name] for name in names], device=device)
    kind = torch.multinomial(odds, size, replacement=True, generator=generator)

    def of(name: str) -> Tensor:
        return kind == names.index(name)

    shape = (batch.fixed.shape[-2], batch.fixed.shape[-1])
    known = batch.known.clone()
    for index in of("deformed").nonzero().flatten().tolist():
        family = BEYOND[int(len(BEYOND) * uniform(1))]
        known[index] = (0.4 + 0.6 * uniform(1)) * family.draw(1, shape, generator)[0]
    moving = warp(batch.truth, known)

    partner, found = _other_patient(data, batch, uniform(size, size))
    other = of("other patient") & found
    moving = torch.where(_as_map(other), moving[partner], moving)

    gone, lost = _cut(moving, warp(batch.mask, known), uniform(size, 2))
    cut = of("cut")
    moving = torch.where(_as_map(cut), gone, moving)

    texture = of("texture")
    moving = torch.where(_as_map(texture), in_colour(_textures(moving[:, :1], generator)), moving)
    return Doubtful(batch._replace(known=known, moving=moving), other | texture | (cut & (lost > HALF)))


def _as_map(of_samples: Tensor) -> Tensor:
    return of_samples.view(-1, 1, 1, 1)


def _other_patient(data: PairSet, batch: Batch, order: Tensor) -> tuple[Tensor, Tensor]:
    """For each sample the place in the batch of one of another case in its task, ``B``, and whether there is one."""
    pairs = [data.pairs[index] for index in batch.pair.tolist()]
    fits = torch.tensor([[a.task == b.task and a.case != b.case for b in pairs] for a in pairs], device=order.device)
    best, partner = torch.where(fits, order, -1.0).max(1)
    return partner, best >= 0


def _cut(image: Tensor, mask: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
    """Black beyond a straight line at any angle; the image and the share of the head that is lost, 0.1 to 0.7."""
    angle = draw[:, 0] * 2 * math.pi
    rows, columns = (torch.arange(n, device=image.device, dtype=image.dtype) for n in image.shape[-2:])
    along = angle.sin().view(-1, 1, 1, 1) * rows.view(-1, 1) + angle.cos().view(-1, 1, 1, 1) * columns
    gone = torch.zeros_like(image)
    for index, (values, head, share) in enumerate(zip(along, mask > 0.5, 0.1 + 0.6 * draw[:, 1], strict=True)):
        inside = values[head]
        line = inside.quantile(1 - share) if len(inside) else values.new_tensor(math.inf)
        gone[index] = image[index] * (values <= line)
    return gone, 0.1 + 0.6 * draw[:, 1]


def _textures(like: Tensor, generator: torch.Generator) -> Tensor:
    """Noise at a random scale, from white to cloudy, in the range [0, 1]."""
    count, shape = len(like), (like.shape[-2], like.shape[-1])
    fine = torch.rand(like.shape, generator=generator, device=like.device)
    fine = blur(fine, 3 * torch.rand(count, generator=generator, device=like.device))
    cloudy = smooth_noise(count, shape, 8.0, generator)[:, :1]
    part = torch.rand(count, 1, 1, 1, generator=generator, device=like.device)
    mixed = _stretched(fine).lerp(_stretched(cloudy), part)
    return _stretched(mixed)


def _stretched(image: Tensor) -> Tensor:
    low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
    return (image - low) / (high - low).clamp(min=1e-6)
