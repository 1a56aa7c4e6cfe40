"""The composite loss: the published terms by their names, and supervision by the known field.

Images are ``B 1 H W`` in [0, 1]; fields pull back, in voxels of their grid (see ``deformation``). The known
field ``p`` (``known``) is the one that made the moving image, ``moving(x) = truth(x + p(x))``; a pair of
fields out of the middle grid is right where ``x_moving + p(x_moving) = x_fixed``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from bsafusion.deformation import identity_grid, invert, lengths, roughness, sample
from bsafusion.fusion_losses import ssim
from bsafusion.models.alignment import STEP_STRIDES, Alignment, Step
from bsafusion.models.assessment import WORST
from bsafusion.models.encoder import STRIDE
from bsafusion.models.representation import MODALITIES, Representation


@dataclass(frozen=True)
class LossWeights:
    """Weight of each named term; 0 switches it off. The defaults are those of the default preset."""

    ce1: float = 0.2  # the classifier tells the modality from the MFRH
    ce2: float = 0.2  # its frozen copy cannot tell it after transfer
    consistency: float = 0.0  # aligned against the truth: (1 - SSIM) + L1
    smooth: float = 0.05  # squared differences of step fields and total
    structure: float = 1.0  # (1 - SSIM) of fused against both sources
    gradient: float = 0.0  # Sobel magnitude of fused against the larger of the sources'
    intensity: float = 0.0  # fused against the larger of the sources
    highlight: float = 0.0  # what is bright in either source and dark in the fused image
    edge: float = 2.0  # 1 - Q_AB/F
    visibility: float = 0.2  # log(1 + Q_CV / 100)
    salience: float = 1.0  # 1 - Q_S
    information: float = 2.0  # 1 - VIFF
    fidelity: float = 1.0  # 1 - VIF_sum / 2
    field: float = 1.0  # distance of every step's field from the known one, pixels
    match: float = 0.5  # cross-entropy of what the steps compare against the known partner
    error: float = 0.1  # likelihood of the expected-error map
    assessment: float = 1.0  # the error that the assessment says, against the actual one

    def __post_init__(self) -> None:
        for f in fields(self):
            if not 0 <= getattr(self, f.name) < math.inf:
                raise ValueError(f"weight {f.name} {getattr(self, f.name)}: expected 0 (off) or more")

    @classmethod
    def published(cls) -> LossWeights:
        """The paper's own composite loss: no supervision by the known field."""
        ours = dict.fromkeys(
            ("field", "match", "error", "assessment", "edge", "visibility", "salience", "information", "fidelity"), 0.0
        )
        return cls(ce1=1, ce2=1, consistency=1, smooth=1, gradient=8, intensity=0.5, **ours)  # 8: a plain Sobel kernel


def total_loss(terms: Mapping[str, Tensor], weights: LossWeights) -> Tensor:
    """Weighted sum of the named terms that are there."""
    return torch.stack([getattr(weights, name) * value for name, value in terms.items()]).sum()


def active(weights: LossWeights) -> set[str]:
    return {f.name for f in fields(weights) if getattr(weights, f.name) > 0}


# --- images ---------------------------------------------------------------------------------------


def consistency_loss(aligned: Tensor, truth: Tensor) -> Tensor:
    """L_consis: the aligned moving image against the moving image as it was before it was deformed."""
    return (1 - ssim(aligned, truth)).mean() + (aligned - truth).abs().mean()


# --- modality -------------------------------------------------------------------------------------


def modality_losses(
    representation: Representation, modality_fixed: Tensor, modality_moving: Tensor, *, confuse: bool = True
) -> tuple[Tensor, Tensor]:
    """L_ce1 and L_ce2; the latter is 0 without ``confuse``, and then needs no judge.

    Modalities ``B`` index ``MODALITIES``; -1 where there is none (a remapped contrast).
    """
    target = torch.cat([modality_fixed, modality_moving])
    ce1 = _mean_where(_cross_entropy(representation.logits, _one_hot(target)), target >= 0)
    if not confuse:
        return ce1, ce1 * 0
    if representation.judge_logits is None:
        raise ValueError("the judge was not asked; put the network in training mode to compute L_ce2")
    # Confusion means even odds between the modalities that the two images have.
    odds = (_one_hot(modality_fixed) + _one_hot(modality_moving)).repeat(2, 1) / 2
    both = ((modality_fixed >= 0) & (modality_moving >= 0)).repeat(2)
    return ce1, _mean_where(_cross_entropy(representation.judge_logits, odds), both)


def _one_hot(modality: Tensor) -> Tensor:
    """``B`` -> ``B 4``, 0 where there is none."""
    return (modality[:, None] == torch.arange(len(MODALITIES), device=modality.device)).float()


def _cross_entropy(logits: tuple[Tensor, Tensor], odds: Tensor) -> Tensor:
    return -(odds * torch.cat(logits).float().log_softmax(1)).sum(1)


def _mean_where(values: Tensor, there: Tensor) -> Tensor:
    """0 where none is: no answer of the device is needed to tell."""
    return (values * there).sum() / there.sum().clamp(min=1)


# --- fields ---------------------------------------------------------------------------------------


STEP_SMOOTHNESS = {"affine": 0.0, "1/16": 1e-4, "1/8": 1e-3, "1/4": 1e-2, "1/2": 0.1, "1/1": 1.0}


def smooth_loss(alignment: Alignment) -> Tensor:
    """L_smooth: the step fields, finer ones weighted more, and the total field."""
    steps = [STEP_SMOOTHNESS[step.name] * roughness(step.velocity).mean() for step in alignment.steps]
    return torch.stack([*steps, roughness(alignment.displacement).mean()]).sum()


def middle_residual(field_fixed: Tensor, field_moving: Tensor, known: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """How far a pair of middle-grid fields is from the known field.

    Args:
        field_fixed, field_moving: ``B 2 h w``, voxels of a grid whose voxel ``i`` is pixel ``stride i``.
        known: ``B 2 H W``, pixels.

    Returns:
        ``x_moving + p(x_moving) - x_fixed`` in pixels and ``x_fixed``, both ``B 2 h w``.
    """
    grid = identity_grid((field_fixed.shape[-2], field_fixed.shape[-1]), field_fixed)
    points_fixed, points_moving = stride * (grid + field_fixed), stride * (grid + field_moving)
    return points_moving + sample(known, points_moving) - points_fixed, points_fixed


def _step_residual(step: Step, known: Tensor, *, before: bool = False) -> tuple[Tensor, Tensor]:
    pair = step.before if before else (step.field_fixed, step.field_moving)
    return middle_residual(*pair, known, STEP_STRIDES[step.name])


def _weighted_mean(value: Tensor, weight: Tensor) -> Tensor:
    return (value * weight).sum() / weight.sum().clamp(min=1e-6)


def field_loss(alignment: Alignment, known: Tensor, mask: Tensor, *, decay: float) -> tuple[Tensor, Tensor]:
    """Supervision by the known field at every step; later steps count more.

    Args:
        mask: ``B 1 H W``, how much each pixel of the fixed image counts.
        decay: what each step counts against the one after it.

    Returns:
        The loss in pixels and the mean error of the last step where ``mask`` is 1, pixels.
    """
    terms, error = [], mask.new_zeros(())
    for index, step in enumerate(reversed(alignment.steps)):
        residual, points = _step_residual(step, known)
        distance = (residual.square().sum(1, keepdim=True) + 1e-3).sqrt()
        weight = sample(mask, points.detach())
        terms.append(decay**index * _weighted_mean(distance, weight))
        if index == 0:
            error = _weighted_mean(distance.detach(), (weight > 0.99).float())
    return torch.stack(terms).sum(), error


def _tent(distance: Tensor) -> Tensor:
    """Bilinear interpolation weights from coordinate differences."""
    return (1 - distance.abs()).clamp(min=0)


def match_loss(alignment: Alignment, known: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy between what each step compares and the known partner, inside the head.

    Labels are soft: the bilinear weights of the partner's position.
    """
    terms = [
        _affine_match(step, known, mask) if step.name == "affine" else _window_match(step, known, mask)
        for step in alignment.steps
        if step.match_logits is not None
    ]
    return torch.stack(terms).mean()


def _affine_match(step: Step, known: Tensor, mask: Tensor) -> Tensor:
    logits = step.match_logits
    assert logits is not None
    shape = (step.velocity.shape[-2], step.velocity.shape[-1])
    grid = identity_grid(shape, known)
    points = (grid.flatten(1).T).expand(len(known), -1, -1)  # B N 2
    to_fixed = sample(known, (STRIDE * grid).expand(len(known), -1, -1, -1)) / STRIDE
    to_moving = invert(to_fixed, tolerance=None, iterations=8)
    weight_fixed = sample(mask, (STRIDE * grid).expand(len(known), -1, -1, -1)).flatten(1)
    weight_moving = sample(mask, STRIDE * (grid + to_fixed)).flatten(1)
    losses = []
    # Partners of the fixed tokens among the moving ones, then the other way.
    for field, scores, weight in (
        (to_moving, logits, weight_fixed),
        (to_fixed, logits.transpose(1, 2), weight_moving),
    ):
        partner = points + field.flatten(2).transpose(1, 2)
        difference = partner[:, :, None] - points[:, None]  # B N N 2
        label = _tent(difference[..., 0]) * _tent(difference[..., 1])
        cross_entropy = -(label * scores.log_softmax(2)).sum(2)
        losses.append(_weighted_mean(cross_entropy, weight * (label.sum(2) > 0.5)))
    return (losses[0] + losses[1]) / 2


def _window_match(step: Step, known: Tensor, mask: Tensor) -> Tensor:
    logits = step.match_logits
    assert logits is not None
    stride = STEP_STRIDES[step.name]
    residual, points = _step_residual(step, known, before=True)
    partner = -residual / stride  # to first order in the gradient of the fields
    span = round(logits.shape[1] ** 0.5)
    offsets = torch.arange(span, dtype=known.dtype, device=known.device) - span // 2
    rows = _tent(partner[:, 0:1] - offsets.view(1, -1, 1, 1))
    columns = _tent(partner[:, 1:2] - offsets.view(1, -1, 1, 1))
    label = (rows[:, :, None] * columns[:, None]).flatten(1, 2)
    cross_entropy = -(label * logits.log_softmax(1)).sum(1, keepdim=True)
    inside = (partner.abs().amax(1, keepdim=True) <= span // 2).float()
    return _weighted_mean(cross_entropy, sample(mask, points) * inside)


def _actual_error(alignment: Alignment, known: Tensor, mask: Tensor, *, every: int) -> tuple[Tensor, Tensor]:
    """How far the field is off, and how much each place counts, at every so many pixels: ``B 1 h w`` twice."""
    field = alignment.displacement.detach()
    grid = identity_grid((field.shape[-2], field.shape[-1]), known)[..., ::every, ::every]
    field = field[..., ::every, ::every]
    actual = lengths(field + sample(known, grid + field))
    return actual, sample(mask, grid.expand(len(known), -1, -1, -1))


def error_loss(alignment: Alignment, known: Tensor, mask: Tensor) -> Tensor:
    """Laplace likelihood of the field's actual error under ``expected_error``.

    The field itself is not moved by it.
    """
    if alignment.expected_error is None:
        return mask.sum() * 0
    every = 4  # pixels; both maps are smooth, all of them would only cost time
    actual, weight = _actual_error(alignment, known, mask, every=every)
    expected = alignment.expected_error[..., ::every, ::every].clamp(min=1e-2)
    return _weighted_mean(actual / expected + expected.log(), weight)


def assessment_loss(alignment: Alignment, known: Tensor, mask: Tensor, hopeless: Tensor) -> Tensor:
    """Huber distance of the logarithms of ``assessed_error`` and the mean error inside the head.

    ``hopeless``: ``B``, bool, pairs that no field aligns; they count as off by :data:`WORST`.
    """
    if alignment.assessed_error is None:
        raise ValueError("this network has no assessment; train the default preset with alignment.assessment above 0")
    actual, weight = _actual_error(alignment, known, mask, every=4)
    weight = (weight > 0.5).float()
    mean = (actual * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp(min=1)
    target = torch.where(hopeless, WORST, mean.clamp(0.1, WORST))
    return F.smooth_l1_loss(alignment.assessed_error.log(), target.log(), beta=0.3)
