"""Fusions without a network: maximum, average, Laplacian pyramid and guided filter.

Each takes two aligned luminances ``H W`` float32 in [0, 1] and returns one. None knows which image is which: the
result is the same after a swap, except that the Laplacian pyramid keeps the fixed image's detail where both have the
same amount of opposite sign.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[np.float32]
_Array64 = NDArray[np.float64]

# Burt and Adelson's generating kernel with a = 0.4; its even and its odd taps sum to 1/2 each.
_KERNEL = np.array([0.05, 0.25, 0.4, 0.25, 0.05])
_LEVELS = 4
_SMALLEST_BASE = 4

# Table I and section III of Li, Kang and Hu; radii in pixels, intensities in [0, 1].
_AVERAGE_SIZE = 31
_SALIENCY_RADIUS, _SALIENCY_SIGMA = 5, 5.0
_BASE_RADIUS, _BASE_EPSILON = 45, 0.3
_DETAIL_RADIUS, _DETAIL_EPSILON = 7, 1e-6


def maximum(fixed: Array, moving: Array) -> Array:
    """The brighter of both in each pixel; ``H W`` in [0, 1], as are the arguments.

    Raises:
        ValueError: the two are not 2-D, not of one shape, or leave [0, 1].
    """
    a, b = _checked(fixed, moving)
    return np.maximum(a, b).astype(np.float32)


def average(fixed: Array, moving: Array) -> Array:
    """The mean of both in each pixel; arguments and errors as in :func:`maximum`."""
    a, b = _checked(fixed, moving)
    return (0.5 * (a + b)).astype(np.float32)


def laplacian(fixed: Array, moving: Array) -> Array:
    """Laplacian pyramid: in each coefficient the detail of larger magnitude, the mean of both bases.

    P. J. Burt and E. H. Adelson, "The Laplacian Pyramid as a Compact Image Code", IEEE Trans. Commun. 31 (1983),
    with a = 0.4; fusion by selection of coefficients after P. J. Burt, "The Pyramid as a Structure for Efficient
    Computation" (1984). Four levels (three for a side of 32 pixels), borders mirrored; what selection
    carries beyond [0, 1] is clipped. Arguments and errors as in :func:`maximum`.
    """
    a, b = _checked(fixed, moving)
    details: list[_Array64] = []
    while len(details) < _LEVELS and min(a.shape) > _SMALLEST_BASE:
        coarse_a, coarse_b = _reduce(a), _reduce(b)
        detail_a, detail_b = a - _expand(coarse_a, a.shape), b - _expand(coarse_b, b.shape)
        details.append(np.where(np.abs(detail_a) >= np.abs(detail_b), detail_a, detail_b))
        a, b = coarse_a, coarse_b
    fused: _Array64 = 0.5 * (a + b)
    for detail in reversed(details):
        fused = _expand(fused, detail.shape) + detail
    return np.clip(fused, 0, 1).astype(np.float32)


def guided(fixed: Array, moving: Array) -> Array:
    """Guided filter fusion: two scales, weights that follow the edges of the images.

    S. Li, X. Kang and J. Hu, "Image Fusion With Guided Filtering", IEEE Trans. Image Process. 22 (2013), with the
    parameters given there: base by a 31 x 31 mean, saliency the Laplacian's magnitude under an 11 x 11 Gaussian of
    sigma 5, weights guided with radius 45 and epsilon 0.3 for the base, 7 and 1e-6 for the detail. Not said there:
    borders are mirrored, negative weights become 0 before the weights are made to sum to 1, and the result is clipped
    to [0, 1]. Arguments and errors as in :func:`maximum`.
    """
    sources = _checked(fixed, moving)
    bases = [ndimage.uniform_filter(image, _AVERAGE_SIZE, mode="reflect") for image in sources]
    saliencies = [_saliency(image) for image in sources]
    highest = np.maximum(*saliencies)
    chosen = [(saliency == highest).astype(np.float64) for saliency in saliencies]
    weights_base = _weights(chosen, sources, _BASE_RADIUS, _BASE_EPSILON)
    weights_detail = _weights(chosen, sources, _DETAIL_RADIUS, _DETAIL_EPSILON)
    fused = np.zeros(sources[0].shape)
    for image, base, of_base, of_detail in zip(sources, bases, weights_base, weights_detail, strict=True):
        fused += of_base * base + of_detail * (image - base)
    return np.clip(fused, 0, 1).astype(np.float32)


FUSIONS: dict[str, Callable[[Array, Array], Array]] = {
    "maximum": maximum,
    "average": average,
    "laplacian": laplacian,
    "guided": guided,
}
"""Fixed and aligned luminance ``H W`` in [0, 1] to the fused one, by name."""


def _checked(fixed: Array, moving: Array) -> tuple[_Array64, _Array64]:
    if fixed.ndim != 2 or fixed.shape != moving.shape or fixed.size == 0:
        raise ValueError(
            f"fixed {fixed.shape} and moving {moving.shape}; expected both as H W of one shape; "
            "align the moving image first and take its luminance"
        )
    for name, image in (("fixed", fixed), ("moving", moving)):
        low, high = float(image.min()), float(image.max())
        if not (low >= 0 and high <= 1):  # also where they are not numbers
            raise ValueError(f"{name} luminance from {low:g} to {high:g}; expected [0, 1]; scale it first")
    return fixed.astype(np.float64), moving.astype(np.float64)


def _blur(image: _Array64) -> _Array64:
    for axis in range(2):
        image = ndimage.correlate1d(image, _KERNEL, axis=axis, mode="mirror")
    return image


def _reduce(image: _Array64) -> _Array64:
    """Blurred, every second pixel: ``H W`` to ``ceil(H / 2) ceil(W / 2)``."""
    return _blur(image)[::2, ::2]


def _expand(image: _Array64, shape: tuple[int, ...]) -> _Array64:
    """The interpolation that belongs to :func:`_reduce`, for the shape it came from, odd or even."""
    spread = np.zeros(shape)
    spread[::2, ::2] = image
    # A mirrored border keeps even pixels even, so a quarter of the weight meets values everywhere.
    return 4 * _blur(spread)


def _saliency(image: _Array64) -> _Array64:
    magnitude = np.abs(ndimage.laplace(image, mode="reflect"))
    smooth: _Array64 = ndimage.gaussian_filter(magnitude, _SALIENCY_SIGMA, radius=_SALIENCY_RADIUS, mode="reflect")
    return smooth


def _weights(
    chosen: list[_Array64], guides: tuple[_Array64, _Array64], radius: int, epsilon: float
) -> tuple[_Array64, _Array64]:
    first, second = (
        np.maximum(_guided_filter(map_, guide, radius, epsilon), 0) + 1e-12
        for map_, guide in zip(chosen, guides, strict=True)
    )
    total = first + second
    return first / total, second / total


def _guided_filter(image: _Array64, guide: _Array64, radius: int, epsilon: float) -> _Array64:
    """``mean(a) guide + mean(b)``, with a and b the regression of ``image`` on ``guide`` in each window.

    K. He, J. Sun and X. Tang, "Guided Image Filtering", ECCV 2010, equations 5, 6 and 8.
    """

    def mean(values: _Array64) -> _Array64:
        smooth: _Array64 = ndimage.uniform_filter(values, 2 * radius + 1, mode="reflect")
        return smooth

    mean_guide, mean_image = mean(guide), mean(image)
    variance = mean(guide * guide) - mean_guide**2
    slope = (mean(guide * image) - mean_guide * mean_image) / (np.maximum(variance, 0) + epsilon)
    return mean(slope) * guide + mean(mean_image - slope * mean_guide)
