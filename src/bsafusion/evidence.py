"""The evidence of a result: what can be measured on it without knowing the right answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from bsafusion.deformation import jacobian_determinant, lengths
from bsafusion.image import Geometry
from bsafusion.metrics import head_mask
from bsafusion.models.alignment import Alignment
from bsafusion.preprocessing import has_partner, match_grids

Array = NDArray[np.float32]

DARK = 0.02
"""Luminance up to which an image shows nothing, and the share of an area that may show something and still be black."""


@dataclass(frozen=True)
class Evidence:
    """Measured facts on which the verdict stands; means inside the head, lengths in pixels of the grid that the network
    saw (see :mod:`bsafusion.canonical`), which are those of the fixed grid where they are square.

    Attributes:
        similarity_before, similarity_after: mean cosine of the learned descriptors, before and after alignment; None
            where the preset has none, and after an alignment that was skipped.
        expected_error: mean of the network's own estimate of the field's error; None where the preset has none.
        displacement_mean, displacement_max: size of the field.
        folded_share: share of all pixels with a Jacobian determinant of at most 0.
        outside_share: share of the head whose partner lies outside the moving frame.
        similarity_low: 10th percentile of the similarity after alignment, None where there is none.
        similarity_spread: how far the mean similarity after alignment is above that.
        nonaffine_mean: mean size of what is left of the field after the affine map that fits it best.
        assessed_error: the mean error as judged from the aligned pair as a whole, at most 12 px of the working size
            (:mod:`bsafusion.models.assessment`); None where the weights were not trained to.
        disagreement: mean of how far the answers for the images and for their mirror images are from their mean, which
            is the field; None where the mirror images were not looked at.
        cut_share: share of the head beyond a straight line at which the aligned moving image ends, as where a field of
            view does; 0 where there is none.
    """

    similarity_before: float | None
    similarity_after: float | None
    expected_error: float | None
    displacement_mean: float
    displacement_max: float
    folded_share: float
    outside_share: float
    similarity_low: float | None = None
    similarity_spread: float | None = None
    nonaffine_mean: float = 0.0
    assessed_error: float | None = None
    disagreement: float | None = None
    cut_share: float = 0.0


def measure_evidence(
    alignment: Alignment,
    luma_fixed: Array,
    luma_aligned: Array,
    *,
    partner: NDArray[np.bool_] | None = None,
    aligned_already: bool = False,
) -> Evidence:
    """The evidence of one alignment (batch of one) at full resolution, on the grid that the network saw.

    Args:
        luma_fixed, luma_aligned: ``H W`` in [0, 1], of the fixed and of the aligned moving image.
        partner: ``H W``, from :func:`bsafusion.preprocessing.has_partner`; left out for two images on one grid.
        aligned_already: of images that were taken as aligned there is no similarity after alignment.
    """
    displacement = alignment.displacement.float().cpu()
    mask = torch.from_numpy(head_mask(luma_fixed * 255))
    size = lengths(displacement)[0, 0]
    if partner is None:
        grid = Geometry.picture(tuple(mask.shape))
        partner = has_partner(displacement[0], match_grids(grid, grid), grid)

    def inside(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[0, 0].float().cpu()[mask]

    def mean(values: torch.Tensor | None) -> float | None:
        return None if values is None else float(values.mean())

    before, after = map(inside, alignment.similarity or (None, None))
    after = None if aligned_already else after
    low = None if after is None else float(np.percentile(after.numpy(), 10))
    mean_after = mean(after)
    return Evidence(
        similarity_before=mean(before),
        similarity_after=mean_after,
        expected_error=mean(inside(alignment.expected_error)),
        displacement_mean=float(size[mask].mean()),
        displacement_max=float(size[mask].max()),
        folded_share=float((jacobian_determinant(displacement) <= 0).float().mean()),
        outside_share=float((~partner[mask.numpy()]).mean()),
        similarity_low=low,
        similarity_spread=None if mean_after is None or low is None else mean_after - low,
        nonaffine_mean=_nonaffine_mean(displacement[0], mask),
        assessed_error=None if alignment.assessed_error is None else float(alignment.assessed_error),
        disagreement=mean(inside(alignment.disagreement)),
        cut_share=_cut_share(luma_aligned, mask.numpy()),
    )


def _cut_share(luma_aligned: Array, mask: NDArray[np.bool_]) -> float:
    """Share of the head ``mask`` (``H W``) that a straight cut takes out of the view of the aligned moving image.

    For lines in 32 directions: beyond it the image (``H W``, luminance in [0, 1]) is black, and of a strip along it,
    6 % of the head, at least half is not. A brain without its skull is black beyond lines, too, but round. Black is
    what lies near the level of the background, be that noisy.
    """
    every = max(round(max(mask.shape) / 128), 1)  # pixels: what is half a head needs no more than every so many
    luma, inside = ndimage.uniform_filter(luma_aligned, every)[::every, ::every], mask[::every, ::every]
    steady = ndimage.median_filter(luma, 5)  # edges stay where they are
    above = steady - np.percentile(steady, 10)
    seen, points = (above > DARK)[inside], np.argwhere(inside)
    count, strip = len(points), round(0.06 * len(points))
    largest = 0.0
    for angle in np.arange(32) * (np.pi / 16):
        outermost = np.argsort(-(points @ (np.sin(angle), np.cos(angle))), kind="stable")
        shown = np.concatenate([[0], np.cumsum(seen[outermost])])
        beyond = int(np.flatnonzero(shown <= DARK * np.arange(count + 1)).max())
        if beyond + strip <= count and shown[beyond + strip] - shown[beyond] >= strip / 2:
            largest = max(largest, beyond / count)
    return largest


def _nonaffine_mean(displacement: torch.Tensor, mask: torch.Tensor) -> float:
    """Mean length, where ``mask`` (``H W``, bool) is true, of a field ``2 H W`` less its best affine fit."""
    points = mask.nonzero().double()
    terms = torch.cat([points - points.mean(0), torch.ones(len(points), 1, dtype=points.dtype)], dim=1)
    moved = displacement[:, mask].T.double()
    fitted = torch.linalg.lstsq(terms, moved).solution
    return float((moved - terms @ fitted).norm(dim=1).mean())
