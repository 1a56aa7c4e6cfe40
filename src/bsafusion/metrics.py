"""How good is a fused image, and how good is an alignment: pure functions on numpy arrays.

Fusion metrics score a triple of single-channel images ``H W`` on the scale 0..255 (colour: its BT.601 luma):
``fixed``, ``moving`` and ``fused``. The moving image is on the fixed grid: either as it was before it was
deformed (the truth) or as the method aligned it. Scoring against one's own alignment rewards bad
registration, so say which one was used beside every number. All sums run in float64. :func:`fusion_metrics`
computes several metrics of one triple at once and shares their windows' statistics.

Registration metrics take displacement fields in the package's one convention (``bsafusion.deformation``):
pull-back, ``aligned(x) = moving(x + u(x))``, ``D *S``, voxels, components in tensor axis order ``(y, x)``.
They sample fields by linear interpolation and go on beyond the grid as at its nearest border voxel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
import scipy.fft
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Direction = Literal["up", "down"]

_FLAT_VARIANCE = 1e-6
_SSIM_C1 = (0.01 * 255) ** 2
_SSIM_C2 = (0.03 * 255) ** 2
_VIF_TAPS = (17, 9, 5, 3)
_VIF_FLAT_VARIANCE = 1e-10
_VIF_NOISE = 2.0
_VIFF_NOISE = 0.005 * 255**2
_VIFF_FLOOR = 1e-7 * np.log(10)  # per window: 1e-7 where logarithms are decimal
_VIFF_WEIGHTS = np.array([1.0, 0.0, 0.15, 1.0]) / 2.15
_BLOCK = 16


# --- Statistics of a triple, each computed once ----------------------------------------------


@dataclass(frozen=True)
class _Moments:
    """Windowed means, population variances and covariance of a source and the fused image, each ``H' W'``."""

    mean_source: Array
    mean_fused: Array
    variance_source: Array
    variance_fused: Array
    covariance: Array


@dataclass(frozen=True)
class _Gain:
    """The model ``fused = gain * source + noise`` of every window at one scale, each array ``H' W'``."""

    gain: Array
    variance_source: Array
    variance_noise: Array


@dataclass(frozen=True)
class _Gradient:
    """Sobel magnitude and orientation in [-pi/2, pi/2], each ``H W``."""

    magnitude: Array
    orientation: Array


@dataclass(frozen=True)
class _Information:
    """Entropies and mutual informations of the 8-bit grey levels, in bits."""

    entropy_fixed: float
    entropy_moving: float
    entropy_fused: float
    mutual_fixed: float
    mutual_moving: float


@dataclass(frozen=True)
class _Triple:
    """Three finite float64 images ``H W`` of one shape, with the statistics that several metrics share."""

    fixed: Array
    moving: Array
    fused: Array

    @cached_property
    def moments(self) -> tuple[_Moments, _Moments]:
        """Of (fixed, fused) and (moving, fused) in Gaussian windows of 11 pixels, sigma 1.5, valid region."""
        return _moments(self.fixed, self.moving, self.fused, _gaussian(11, 1.5))

    @cached_property
    def ssim_maps(self) -> tuple[Array, Array]:
        moments_fixed, moments_moving = self.moments
        return _ssim_map(moments_fixed), _ssim_map(moments_moving)

    @cached_property
    def gains(self) -> tuple[tuple[_Gain, _Gain], ...]:
        """Of (fixed, fused) and (moving, fused) at the four scales of VIF, fine to coarse."""
        fixed, moving, fused = self.fixed, self.moving, self.fused
        gains = []
        for scale, taps in enumerate(_VIF_TAPS):
            window = _gaussian(taps, taps / 5)
            if scale > 0:
                fixed, moving, fused = (_filter_valid(image, window)[::2, ::2] for image in (fixed, moving, fused))
            moments_fixed, moments_moving = _moments(fixed, moving, fused, window)
            gains.append((_gain(moments_fixed), _gain(moments_moving)))
        return tuple(gains)

    @cached_property
    def information(self) -> _Information:
        fixed, moving, fused = (_grey_levels(image) for image in (self.fixed, self.moving, self.fused))
        entropy_fixed, entropy_moving, entropy_fused = (_entropy(levels) for levels in (fixed, moving, fused))
        mutual_fixed = entropy_fixed + entropy_fused - _entropy(256 * fixed + fused)
        mutual_moving = entropy_moving + entropy_fused - _entropy(256 * moving + fused)
        # Rounding can leave independent images a little below 0.
        return _Information(
            entropy_fixed, entropy_moving, entropy_fused, max(mutual_fixed, 0.0), max(mutual_moving, 0.0)
        )


def _gaussian(taps: int, sigma: float) -> Array:
    offsets = np.arange(taps) - (taps - 1) / 2
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    normalised: Array = weights / weights.sum()
    return normalised


def _filter_valid(image: Array, window: Array) -> Array:
    """Correlate both axes with one odd window where it lies inside: ``H W`` -> ``H-taps+1 W-taps+1``."""
    margin = len(window) // 2
    rows: Array = ndimage.correlate1d(image, window, axis=0)[margin : image.shape[0] - margin]
    filtered: Array = ndimage.correlate1d(rows, window, axis=1)[:, margin : image.shape[1] - margin]
    return filtered


def _moments(fixed: Array, moving: Array, fused: Array, window: Array) -> tuple[_Moments, _Moments]:
    mean_fused = _filter_valid(fused, window)
    variance_fused = np.maximum(_filter_valid(fused * fused, window) - mean_fused**2, 0.0)

    def with_fused(source: Array) -> _Moments:
        mean = _filter_valid(source, window)
        variance = np.maximum(_filter_valid(source * source, window) - mean**2, 0.0)
        covariance = _filter_valid(source * fused, window) - mean * mean_fused
        return _Moments(mean, mean_fused, variance, variance_fused, covariance)

    return with_fused(fixed), with_fused(moving)


def _ssim_map(moments: _Moments) -> Array:
    """Wang et al., IEEE TIP 13, 2004, eq. 13."""
    mean_source, mean_fused = moments.mean_source, moments.mean_fused
    luminance = (2 * mean_source * mean_fused + _SSIM_C1) / (mean_source**2 + mean_fused**2 + _SSIM_C1)
    structure = (2 * moments.covariance + _SSIM_C2) / (moments.variance_source + moments.variance_fused + _SSIM_C2)
    ssim: Array = luminance * structure
    return ssim


def _gain(moments: _Moments) -> _Gain:
    """Least-squares gain and residual variance; a negative gain is pure noise (Sheikh & Bovik 2006)."""
    source_flat = moments.variance_source < _VIF_FLAT_VARIANCE
    fused_flat = moments.variance_fused < _VIF_FLAT_VARIANCE
    variance_source = np.where(source_flat, 0.0, moments.variance_source)
    gain = moments.covariance / (variance_source + _VIF_FLAT_VARIANCE)
    lost = source_flat | fused_flat | (gain < 0)
    gain[lost] = 0.0
    noise = moments.variance_fused - gain * moments.covariance
    noise[fused_flat] = 0.0
    return _Gain(gain, variance_source, np.maximum(noise, _VIF_FLAT_VARIANCE))


def _transmitted(gain: _Gain, noise: float) -> Array:
    information: Array = np.log1p(gain.gain**2 * gain.variance_source / (gain.variance_noise + noise))
    return information


def _available(gain: _Gain, noise: float) -> Array:
    information: Array = np.log1p(gain.variance_source / noise)
    return information


def _share(part: float, whole: float) -> float:
    """What share of ``whole`` was preserved; 1 where there was nothing but rounding noise to lose."""
    return float(part / whole) if whole > 1e-4 else 1.0


def _sobel(image: Array) -> tuple[Array, Array]:
    """Zero-padded derivatives rightwards and upwards, 8 times the slope, each ``H W``."""
    gx: Array = ndimage.sobel(image, axis=1, mode="constant")
    gy: Array = -ndimage.sobel(image, axis=0, mode="constant")
    return gx, gy


def _sobel_magnitude(image: Array) -> Array:
    gx, gy = _sobel(image)
    magnitude: Array = np.sqrt(gx * gx + gy * gy)
    return magnitude


def _gradient(image: Array) -> _Gradient:
    gx, gy = _sobel(image)
    vertical = gx == 0
    orientation = np.arctan(gy / np.where(vertical, 1.0, gx))
    orientation[vertical] = np.pi / 2
    return _Gradient(np.sqrt(gx * gx + gy * gy), orientation)


def _round(image: Array) -> Array:
    """Half up, as the published code does; numpy rounds half to even."""
    rounded: Array = np.floor(image + 0.5)
    return rounded


def _grey_levels(image: Array) -> NDArray[np.int64]:
    return np.clip(_round(image), 0, 255).astype(np.int64)


def _entropy(symbols: NDArray[np.int64]) -> float:
    share = np.bincount(symbols.ravel()) / symbols.size
    share = share[share > 0]
    return float((share * np.log2(1 / share)).sum())


def _correlation(a: Array, b: Array) -> float:
    """Pearson; 0 where one image is constant up to rounding."""
    if min(np.ptp(a), np.ptp(b)) < 1e-9:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


# --- Fusion metrics --------------------------------------------------------------------------


class FusionMetric(Protocol):
    """A number for three images ``H W`` on the scale 0..255; raises what :func:`fusion_metrics` raises."""

    def __call__(self, fixed: ArrayLike, moving: ArrayLike, fused: ArrayLike) -> float: ...


@dataclass(frozen=True)
class _Metric:
    value: Callable[[_Triple], float]
    direction: Direction
    smallest: int  # shortest side of an image, in pixels


_METRICS: dict[str, _Metric] = {}


def _metric(direction: Direction, *, smallest: int) -> Callable[[Callable[[_Triple], float]], FusionMetric]:
    """Register a function of a triple under its name and make it a public function of three images."""

    def register(value: Callable[[_Triple], float]) -> FusionMetric:
        name = value.__name__
        _METRICS[name] = _Metric(value, direction, smallest)

        def metric(fixed: ArrayLike, moving: ArrayLike, fused: ArrayLike) -> float:
            return fusion_metrics(fixed, moving, fused, (name,))[name]

        metric.__name__ = metric.__qualname__ = name
        metric.__doc__ = value.__doc__
        return metric

    return register


def _checked_triple(fixed: ArrayLike, moving: ArrayLike, fused: ArrayLike) -> _Triple:
    images = {
        name: np.asarray(image, dtype=np.float64)
        for name, image in (("fixed", fixed), ("moving", moving), ("fused", fused))
    }
    for name, image in images.items():
        if image.ndim != 2:
            raise ValueError(
                f"{name} has shape {image.shape}; expected one single-channel image H W: "
                "take the luma of colour images, score batches one by one"
            )
        if image.shape != images["fixed"].shape:
            raise ValueError(
                f"{name} has shape {image.shape}, fixed {images['fixed'].shape}; expected one shape: "
                "bring all three onto the fixed grid"
            )
        if image.size == 0 or not np.isfinite(image).all():
            raise ValueError(f"{name} is empty or holds NaN or infinite values; expected finite values on 0..255")
        if image.min() < -1e-6 or image.max() > 255 + 1e-6:
            raise ValueError(f"{name} has values in [{image.min():g}, {image.max():g}]; expected 0..255: rescale it")
    if 0 < max(image.max() for image in images.values()) <= 1:
        raise ValueError("all three images have values in [0, 1]; expected 0..255: multiply them by 255")
    return _Triple(images["fixed"], images["moving"], images["fused"])


@_metric("up", smallest=1)
def qabf(triple: _Triple) -> float:
    """Q_AB/F: how much of the sources' edges the fused image keeps, in [0, 1] (Xydeas & Petrovic, 2000).

    Sobel gradients, zero padded: strength ``g``, orientation ``alpha = atan(gy / gx)`` with ``gy`` upwards,
    ``pi / 2`` where ``gx = 0``. For a source S, be it the fixed image A or the moving image B::

        G    = min(gS, gF) / max(gS, gF)
        O    = 1 - |alphaS - alphaF| / (pi / 2)
        Q_SF = 0.9994 / (1 + exp(-15 (G - 0.5))) * 0.9879 / (1 + exp(-22 (O - 0.8)))
        Q    = sum(Q_AF gA + Q_BF gB) / sum(gA + gB)

    Like the code in common use, the difference of orientations is not wrapped, and ``G = gF`` where
    ``gS = gF``. 1 where neither source has an edge; the zero padding makes the frame of an image that is not
    black one. Electron. Lett. 36(4).
    """
    fixed, moving, fused = (_gradient(image) for image in (triple.fixed, triple.moving, triple.fused))
    kept = (_edge_preservation(fixed, fused) * fixed.magnitude).sum()
    kept += (_edge_preservation(moving, fused) * moving.magnitude).sum()
    return _share(kept, fixed.magnitude.sum() + moving.magnitude.sum())


def _edge_preservation(source: _Gradient, fused: _Gradient) -> Array:
    larger = np.maximum(source.magnitude, fused.magnitude)
    strength = np.minimum(source.magnitude, fused.magnitude) / np.where(larger > 0, larger, 1.0)
    strength = np.where(source.magnitude == fused.magnitude, fused.magnitude, strength)
    orientation = 1 - np.abs(source.orientation - fused.orientation) / (np.pi / 2)
    kept: Array = (0.9994 * 0.9879) / ((1 + np.exp(-15 * (strength - 0.5))) * (1 + np.exp(-22 * (orientation - 0.8))))
    return kept


@_metric("down", smallest=_BLOCK)
def qcv(triple: _Triple) -> float:
    """Q_CV: visible difference from the sources, weighted by saliency, at least 0 (Chen & Varshney, 2007).

    Each image is stretched to 0..255 and rounded; a constant one becomes 0. Per block of 16x16 pixels the
    saliency ``l`` of a source is ``sum g^5``, ``g`` the zero-padded Sobel magnitude, and ``D`` the mean
    square of source - fused after the contrast sensitivity filter, over both sources A and B and all blocks::

        CSF(r) = 2.6 (0.0192 + 0.144 r) exp(-(0.144 r)^1.1),  r = cycles per image / 4
        Q      = sum(lA DA + lB DB) / sum(lA + lB)

    Rows and columns beyond the last whole block are left out. Every block weighs the same where no source has
    an edge. Heavy tailed: report its median as well as its mean. Information Fusion 8(2).
    """
    fixed, moving, fused = (_stretched(image) for image in (triple.fixed, triple.moving, triple.fused))
    squares = _contrast_sensitivity_filter(np.stack([fixed - fused, moving - fused])) ** 2
    distance = _block_sums(squares) / _BLOCK**2
    saliency = _block_sums(np.stack([_sobel_magnitude(fixed), _sobel_magnitude(moving)]) ** 5)
    if not saliency.any():
        saliency = np.ones_like(saliency)
    return float((saliency * distance).sum() / saliency.sum())


def _stretched(image: Array) -> Array:
    low, high = image.min(), image.max()
    if high - low < 1e-9:
        return np.zeros_like(image)
    return _round((image - low) * 255 / (high - low))


def _contrast_sensitivity_filter(images: Array) -> Array:
    height, width = images.shape[-2:]
    vertical = scipy.fft.fftfreq(height, 1 / height)[:, None] / 4
    horizontal = scipy.fft.rfftfreq(width, 1 / width) / 4
    r = np.sqrt(vertical**2 + horizontal**2)  # even in both frequencies, so half a spectrum is enough
    sensitivity = 2.6 * (0.0192 + 0.144 * r) * np.exp(-((0.144 * r) ** 1.1))
    filtered: Array = scipy.fft.irfft2(scipy.fft.rfft2(images) * sensitivity, s=(height, width))
    return filtered


def _block_sums(images: Array) -> Array:
    """``B H W`` -> ``B H//16 W//16``."""
    count, rows, columns = images.shape[0], images.shape[1] // _BLOCK, images.shape[2] // _BLOCK
    whole = images[:, : rows * _BLOCK, : columns * _BLOCK]
    sums: Array = whole.reshape(count, rows, _BLOCK, columns, _BLOCK).sum(axis=(2, 4))
    return sums


@_metric("up", smallest=11)
def qssim(triple: _Triple) -> float:
    """Q_SSIM = mean SSIM(fixed, fused) + mean SSIM(moving, fused), at most 2 (Wang et al., IEEE TIP 13(4)).

    Gaussian windows of 11 pixels, sigma 1.5, valid region, population moments, ``K1 = 0.01``, ``K2 = 0.03``,
    ``L = 255``. Two constant images of levels ``a`` and ``b`` have SSIM ``(2ab + C1) / (a^2 + b^2 + C1)``.
    """
    ssim_fixed, ssim_moving = triple.ssim_maps
    return float(ssim_fixed.mean() + ssim_moving.mean())


@_metric("up", smallest=41)
def vif_sum(triple: _Triple) -> float:
    """VIF(fixed -> fused) + VIF(moving -> fused), pixel domain (Sheikh & Bovik, IEEE TIP 15(2), 2006).

    Four scales, Gaussian windows of 17, 9, 5 and 3 pixels, sigma a fifth of that, valid region; each coarser
    scale is the finer one filtered with its own window, every second pixel of it. A window is modelled as
    ``fused = g source + noise``; the sums run over windows and scales::

        g    = cov / varS,  varV = varF - g cov
        VIF  = sum log(1 + g^2 varS / (varV + 2)) / sum log(1 + varS / 2)

    Above 1 where the contrast was raised. The VIF of a constant source is 1: nothing of it can be lost.
    """
    total = 0.0
    for source in range(2):
        gains = [scale[source] for scale in triple.gains]
        kept = sum(_transmitted(gain, _VIF_NOISE).sum() for gain in gains)
        total += _share(kept, sum(_available(gain, _VIF_NOISE).sum() for gain in gains))
    return total


@_metric("up", smallest=41)
def viff(triple: _Triple) -> float:
    """VIF for fusion: the share of the sources' visual information in the fused image (Han et al., 2013).

    Scales, windows, ``g``, ``varS`` and ``varV`` as in :func:`vif_sum`. Every window looks at the source with
    the smaller ``g``, the moving one if they are equal. The result is the mean of the scales' values with
    weights ``[1, 0, 0.15, 1] / 2.15``::

        value = sum (c + log(1 + g^2 varS / (varV + n))) / sum (c + log(1 + varS / n))
        n     = 0.005 * 255^2,  c = 1e-7 log(10)

    The ``c`` gives a scale on which that source is flat everywhere the value 1. Ties make the two sources not
    quite exchangeable. Information Fusion 14(2).
    """
    total = 0.0
    for weight, (fixed, moving) in zip(_VIFF_WEIGHTS, triple.gains, strict=True):
        if weight == 0:
            continue
        use_fixed = fixed.gain < moving.gain
        chosen = _Gain(
            np.where(use_fixed, fixed.gain, moving.gain),
            np.where(use_fixed, fixed.variance_source, moving.variance_source),
            np.where(use_fixed, fixed.variance_noise, moving.variance_noise),
        )
        kept = (_transmitted(chosen, _VIFF_NOISE) + _VIFF_FLOOR).sum()
        total += weight * kept / (_available(chosen, _VIFF_NOISE) + _VIFF_FLOOR).sum()
    return float(total)


@_metric("up", smallest=11)
def qs(triple: _Triple) -> float:
    """Q_S: SSIM with the source that varies more in each window, at most 1 (Piella & Heijmans, ICIP 2003).

    The mean of ``lambda SSIM(fixed, fused) + (1 - lambda) SSIM(moving, fused)`` over the windows of
    :func:`qssim`, with ``lambda = varA / (varA + varB)``; 0.5 where both variances are below 1e-6, where it
    would be rounding noise.
    """
    return float(_piella_map(triple)[0].mean())


@_metric("up", smallest=11)
def qw(triple: _Triple) -> float:
    """Q_W: Q_S with windows weighted by their saliency, at most 1 (Piella & Heijmans, ICIP 2003).

    ``sum c q / sum c``, ``q`` the map whose mean is :func:`qs`, ``c = max(varA, varB)``. A window in which
    both variances are below 1e-6 weighs 0.5 (in squared grey levels), so that flat images have a value.
    """
    quality, saliency = _piella_map(triple)
    return float((saliency * quality).sum() / saliency.sum())


@_metric("up", smallest=11)
def qe(triple: _Triple) -> float:
    """Q_E: Q_W of the images times Q_W of their edges, at most 1 (Piella & Heijmans, ICIP 2003, alpha = 1).

    The edge images are a quarter of the zero-padded Sobel magnitude: a straight step of 100 levels has 100.
    """
    edges = [_sobel_magnitude(image) / 4 for image in (triple.fixed, triple.moving, triple.fused)]
    return _METRICS["qw"].value(triple) * _METRICS["qw"].value(_Triple(*edges))


def _piella_map(triple: _Triple) -> tuple[Array, Array]:
    """The locally weighted SSIM and the saliency of each window, both ``H-10 W-10``."""
    fixed, moving = (moments.variance_source for moments in triple.moments)
    ssim_fixed, ssim_moving = triple.ssim_maps
    flat = (fixed < _FLAT_VARIANCE) & (moving < _FLAT_VARIANCE)
    share_fixed = np.where(flat, 0.5, fixed / np.where(flat, 1.0, fixed + moving))
    quality = share_fixed * ssim_fixed + (1 - share_fixed) * ssim_moving
    return quality, np.where(flat, 0.5, np.maximum(fixed, moving))


@_metric("up", smallest=1)
def mi_bits(triple: _Triple) -> float:
    """MI = I(fixed; fused) + I(moving; fused) in bits, at least 0 (Qu et al., 2002).

    ``I(X; Y) = H(X) + H(Y) - H(X, Y)`` of the grey levels rounded to 0..255, 256x256 joint bins. 0 for a
    constant fused image. Electron. Lett. 38(7).
    """
    return triple.information.mutual_fixed + triple.information.mutual_moving


@_metric("up", smallest=1)
def nmi(triple: _Triple) -> float:
    """NMI = 2 [I(A; F) / (H(A) + H(F)) + I(B; F) / (H(B) + H(F))], in [0, 2] (Hossny et al., 2008).

    Terms as in :func:`mi_bits`; a term with two constant images is 0. Electron. Lett. 44(18).
    """
    info = triple.information
    fixed, moving = info.entropy_fixed + info.entropy_fused, info.entropy_moving + info.entropy_fused
    term_fixed = info.mutual_fixed / fixed if fixed > 0 else 0.0
    term_moving = info.mutual_moving / moving if moving > 0 else 0.0
    return 2 * (term_fixed + term_moving)


@_metric("up", smallest=1)
def scd(triple: _Triple) -> float:
    """SCD = corr(fused - moving, fixed) + corr(fused - fixed, moving), in [-2, 2] (Aslantas & Bendes, 2015).

    Pearson correlations over all pixels; 0 where one of the two is constant. AEU Int. J. 69(12).
    """
    fixed, moving, fused = triple.fixed, triple.moving, triple.fused
    return _correlation(fused - moving, fixed) + _correlation(fused - fixed, moving)


@_metric("up", smallest=1)
def cc(triple: _Triple) -> float:
    """CC = [corr(fixed, fused) + corr(moving, fused)] / 2, Pearson, in [-1, 1]; 0 with a constant image."""
    return (_correlation(triple.fixed, triple.fused) + _correlation(triple.moving, triple.fused)) / 2


@_metric("up", smallest=1)
def en(triple: _Triple) -> float:
    """EN: Shannon entropy in bits of the fused image's grey levels, rounded to 0..255. 0 if constant."""
    return triple.information.entropy_fused


@_metric("up", smallest=1)
def sd(triple: _Triple) -> float:
    """SD: population standard deviation of the fused image, in grey levels. 0 if constant."""
    return float(triple.fused.std())


@_metric("up", smallest=2)
def sf(triple: _Triple) -> float:
    """SF = sqrt(RF^2 + CF^2) of the fused image (Eskicioglu & Fisher, IEEE Trans. Commun. 43(12), 1995).

    RF^2 and CF^2 are the mean squared differences of neighbours along the rows, and along the columns. 0 if
    constant.
    """
    squares = [np.mean(np.diff(triple.fused, axis=axis) ** 2) for axis in (0, 1)]
    return float(np.sqrt(sum(squares)))


@_metric("up", smallest=2)
def ag(triple: _Triple) -> float:
    """AG: mean of sqrt((gx^2 + gy^2) / 2) of the fused image, in grey levels per pixel. 0 if constant.

    ``gx`` and ``gy`` are central differences, one-sided at the border.
    """
    gy, gx = np.gradient(triple.fused)
    return float(np.sqrt((gx**2 + gy**2) / 2).mean())


@_metric("up", smallest=1)
def psnr(triple: _Triple) -> float:
    """PSNR = 10 log10(255^2 / MSE) in dB, MSE the mean of MSE(fixed, fused) and MSE(moving, fused).

    Infinite where all three images are equal.
    """
    errors = (np.mean((triple.fixed - triple.fused) ** 2), np.mean((triple.moving - triple.fused) ** 2))
    mean = float(sum(errors)) / 2
    return float(10 * np.log10(255**2 / mean)) if mean > 0 else float("inf")


PAPER_METRICS = ("qabf", "qcv", "qssim", "vif_sum", "viff", "qs")
"""The five metrics of the BSAFusion paper (AAAI 2025), its Q_VIF in both readings."""

ALL_METRICS = tuple(_METRICS)

DIRECTIONS: dict[str, Direction] = {name: metric.direction for name, metric in _METRICS.items()}
"""Whether a larger (``up``) or a smaller (``down``) value of a metric is the better one."""


def fusion_metrics(
    fixed: ArrayLike, moving: ArrayLike, fused: ArrayLike, names: Sequence[str] = PAPER_METRICS
) -> dict[str, float]:
    """Several metrics of one triple, sharing what they have in common.

    Args:
        fixed, moving, fused: ``H W`` on the scale 0..255, one shape; ``moving`` on the fixed grid.
        names: from :data:`ALL_METRICS`. The functions of these names tell formula, range and source.

    Returns:
        The value of each name, in the order asked for.

    Raises:
        ValueError: an unknown name, or images that are not 2-D, not of one shape, not finite, not on 0..255,
            or smaller than a metric's windows (41 pixels for ``vif_sum`` and ``viff``, 16 for ``qcv``, 11 for
            SSIM).
    """
    unknown = [name for name in names if name not in _METRICS]
    if unknown:
        raise ValueError(f"no metric is called {', '.join(unknown)}; choose from {', '.join(ALL_METRICS)}")
    triple = _checked_triple(fixed, moving, fused)
    shortest = min(triple.fixed.shape)
    for name in names:
        if shortest < _METRICS[name].smallest:
            raise ValueError(
                f"{name} needs images of at least {_METRICS[name].smallest} pixels a side, got "
                f"{triple.fixed.shape}; leave it out or score the whole image instead of a crop"
            )
    return {name: _METRICS[name].value(triple) for name in names}


# --- Registration metrics --------------------------------------------------------------------


@dataclass(frozen=True)
class ErrorSummary:
    """Mean, median, 95th percentile and maximum of an error, in the unit of its map."""

    mean: float
    median: float
    p95: float
    max: float


@dataclass(frozen=True)
class Folds:
    """The share of voxels whose Jacobian determinant is at most 0, and the smallest determinant."""

    share: float
    minimum: float


def _checked_field(field: ArrayLike, name: str) -> Array:
    array = np.asarray(field, dtype=np.float64)
    if array.ndim < 2 or array.shape[0] != array.ndim - 1 or array.size == 0:
        raise ValueError(
            f"{name} has shape {array.shape}; expected D *S with one component per spatial axis: "
            "take one field out of a batch"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinite displacements; check the program that made it")
    return array


def _checked_pair(first: ArrayLike, second: ArrayLike, names: tuple[str, str]) -> tuple[Array, Array]:
    a, b = _checked_field(first, names[0]), _checked_field(second, names[1])
    if a.shape != b.shape:
        raise ValueError(f"{names[0]} has shape {a.shape}, {names[1]} {b.shape}; expected one grid: resize one field")
    return a, b


def _checked_mask(mask: ArrayLike | None, shape: tuple[int, ...]) -> Mask:
    if mask is None:
        return np.ones(shape, dtype=np.bool_)
    inside = np.asarray(mask, dtype=np.bool_)
    if inside.shape != shape:
        raise ValueError(f"the mask has shape {inside.shape}; expected {shape}, the grid of what it selects")
    if not inside.any():
        raise ValueError("the mask selects no voxel; pass a mask that does, or None for the whole grid")
    return inside


def _length(vectors: Array, spacing: Sequence[float] | None) -> Array:
    """Euclidean length over the first axis: voxels, or mm with the ``spacing`` of the tensor's axes."""
    if spacing is not None:
        if len(spacing) != len(vectors) or not all(np.isfinite(step) and step > 0 for step in spacing):
            raise ValueError(
                f"spacing is {tuple(spacing)}; expected {len(vectors)} positive numbers in mm, in the order "
                "of the array's axes (y, x)"
            )
        vectors = vectors * np.asarray(spacing, dtype=np.float64).reshape(-1, *[1] * (vectors.ndim - 1))
    length: Array = np.sqrt((vectors**2).sum(axis=0))
    return length


def _sample_field(field: Array, points: Array) -> Array:
    """``D *S`` at ``points`` (``D *P``, voxels) -> ``D *P``."""
    return np.stack([ndimage.map_coordinates(part, points, order=1, mode="nearest") for part in field])


def _compose(outer: Array, inner: Array) -> Array:
    """``inner(x) + outer(x + inner(x))``."""
    points = np.indices(inner.shape[1:]) + inner
    return inner + _sample_field(outer, points)


def endpoint_residual(known: ArrayLike, recovered: ArrayLike) -> Array:
    """The misalignment that is left, as a displacement field on the fixed grid.

    The moving image was made from an aligned original by a known field ``p``, ``moving(x) = original(x +
    p(x))``; a method recovered ``u``, ``aligned(x) = moving(x + u(x))``. So ``aligned(x) = original(x +
    r(x))`` with ``r(x) = u(x) + p(x + u(x))``, zero for a perfect recovery. ``x`` is a point of the fixed
    image, the grid on which the head mask lies. (The other order, ``p(x) + u(x + p(x))``, is the same error
    seen from the moving grid.)

    Args:
        known: ``p``, ``D *S``, voxels.
        recovered: ``u``, ``D *S``, voxels.

    Returns:
        ``r``, ``D *S``, voxels. Where ``x + u(x)`` leaves the grid, ``p`` is not known and its border value
        stands in.

    Raises:
        ValueError: the fields are not ``D *S``, not finite, or not on one grid.
    """
    p, u = _checked_pair(known, recovered, ("known", "recovered"))
    return _compose(p, u)


def endpoint_error(known: ArrayLike, recovered: ArrayLike, *, spacing: Sequence[float] | None = None) -> Array:
    """The length of :func:`endpoint_residual` at each voxel of the fixed grid, ``*S``.

    In voxels, or in mm with ``spacing``: the voxel size in mm along the tensor's axes, ``(y, x)`` in 2-D.
    """
    return _length(endpoint_residual(known, recovered), spacing)


def summarise(error: ArrayLike, mask: ArrayLike | None = None) -> ErrorSummary:
    """Mean, median, 95th percentile (interpolated) and maximum of an error map ``*S`` inside a mask ``*S``.

    Raises:
        ValueError: the mask is empty or has another shape, or a value inside it is not finite.
    """
    errors = np.asarray(error, dtype=np.float64)
    inside = errors[_checked_mask(mask, errors.shape)]
    if inside.size == 0 or not np.isfinite(inside).all():
        raise ValueError("the error map is empty or holds NaN or infinite values; mask them out")
    median, p95 = np.percentile(inside, [50, 95])
    return ErrorSummary(float(inside.mean()), float(median), float(p95), float(inside.max()))


def target_registration_error(
    points_fixed: ArrayLike,
    points_moving: ArrayLike,
    displacement: ArrayLike,
    *,
    spacing: Sequence[float] | None = None,
) -> Array:
    """Distance of each landmark in the moving image from where the field looks for it, ``|x + u(x) - y|``.

    Args:
        points_fixed: ``x``, ``N D``, voxels of the fixed grid in tensor axis order ``(y, x)``.
        points_moving: ``y``, the same landmarks in the moving image, ``N D``, in voxels of the fixed spacing.
        displacement: ``u``, ``D *S``, voxels.
        spacing: voxel size in mm along the tensor's axes; without it the result is in voxels.

    Returns:
        ``N`` distances.

    Raises:
        ValueError: shapes that do not belong together, or a landmark outside the fixed grid.
    """
    field = _checked_field(displacement, "displacement")
    x = np.asarray(points_fixed, dtype=np.float64)
    y = np.asarray(points_moving, dtype=np.float64)
    if x.ndim != 2 or x.shape != y.shape or x.shape[1] != len(field):
        raise ValueError(
            f"landmarks have shapes {x.shape} and {y.shape}; expected N {len(field)} twice: a row a landmark"
        )
    inside = ((x >= 0) & (x <= np.array(field.shape[1:]) - 1)).all(axis=1)
    if not inside.all():
        first = int(np.argmin(inside))
        raise ValueError(
            f"landmark {first} at {x[first].tolist()} is not on the fixed grid {field.shape[1:]}; "
            "give voxel coordinates in the order of the array's axes (y, x)"
        )
    return _length(x.T + _sample_field(field, x.T) - y.T, spacing)


def folds(displacement: ArrayLike, mask: ArrayLike | None = None) -> Folds:
    """Where the map ``x -> x + u(x)`` turns space inside out.

    The Jacobian determinant ``det(I + du/dx)`` comes from central differences, one-sided at the border: a
    field that flips back and forth every voxel is not seen.

    Args:
        displacement: ``D *S``, voxels, at least two voxels along each axis.
        mask: ``*S``, the voxels that count; without it all do.

    Raises:
        ValueError: not a field, an axis of one voxel, or a mask that is empty or of another shape.
    """
    field = _checked_field(displacement, "displacement")
    shape = field.shape[1:]
    if min(shape) < 2:
        raise ValueError(f"a field on a grid {shape} has no derivative; expected two voxels along each axis")
    axes = range(1, field.ndim)
    jacobian = np.stack([np.gradient(field, axis=axis) for axis in axes], axis=-1)  # D(component) *S D(axis)
    determinant = np.linalg.det(np.moveaxis(jacobian, 0, -2) + np.eye(len(field)))
    inside = determinant[_checked_mask(mask, shape)]
    return Folds(float((inside <= 0).mean()), float(inside.min()))


def inverse_consistency(
    forward: ArrayLike,
    backward: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    spacing: Sequence[float] | None = None,
) -> ErrorSummary:
    """How far a point is from home after the way there and back: ``|u(x) + v(x + u(x))|``.

    Args:
        forward: ``u``, ``D *S``, voxels; ``backward``: ``v``, the field found with the two images swapped.
        mask: ``*S``, the voxels ``x`` that count; without it all do.
        spacing: voxel size in mm along the tensor's axes; without it the result is in voxels.

    Raises:
        ValueError: the fields are not on one grid, or the mask is empty or of another shape.
    """
    u, v = _checked_pair(forward, backward, ("forward", "backward"))
    return summarise(_length(_compose(v, u), spacing), mask)


def draw_consistency(
    residuals: Sequence[ArrayLike],
    mask: ArrayLike | None = None,
    *,
    spacing: Sequence[float] | None = None,
) -> float:
    """How much the alignments of one pair, deformed in ``K`` different ways, differ from each other.

    ``mean_x mean_k |r_k(x) - m(x)|`` with ``m(x) = mean_k r_k(x)`` and ``r_k`` the :func:`endpoint_residual`
    of draw ``k``. A misalignment that the pair itself has is in every ``r_k`` alike and cancels.

    Args:
        residuals: at least two fields ``D *S``, voxels.
        mask: ``*S``, the voxels ``x`` that count; without it all do.
        spacing: voxel size in mm along the tensor's axes; without it the result is in voxels.

    Raises:
        ValueError: fewer than two draws, fields of different grids, or a mask that is empty or of another
            shape.
    """
    if len(residuals) < 2:
        raise ValueError(f"got {len(residuals)} draw(s); expected at least two to compare")
    fields = [_checked_field(residual, f"residual {k}") for k, residual in enumerate(residuals)]
    if len({field.shape for field in fields}) > 1:
        raise ValueError(f"residuals have shapes {sorted({f.shape for f in fields})}; expected one grid")
    mean = np.mean(fields, axis=0)
    distance = np.mean([_length(field - mean, spacing) for field in fields], axis=0)
    return summarise(distance, mask).mean


def head_mask(fixed: ArrayLike, moving: ArrayLike | None = None) -> Mask:
    """Where the head is: a mask that keeps the easy, empty background out of registration errors.

    Each image is smoothed (Gaussian, sigma 1 voxel) and cut at 8 % of its range above its minimum; the
    largest connected component (neighbours across faces) of the union is kept and its holes are filled.

    Args:
        fixed: luma ``*S`` on any scale.
        moving: the aligned original on the same grid, if it shows parts of the head that the fixed image does
            not.

    Returns:
        ``*S``. All False where every image is constant.

    Raises:
        ValueError: the images are empty, not finite, or of different shapes.
    """
    images = [np.asarray(image, dtype=np.float64) for image in (fixed, moving) if image is not None]
    foreground = np.zeros(images[0].shape, dtype=np.bool_)
    for image in images:
        if image.shape != foreground.shape or image.ndim == 0:
            raise ValueError(
                f"the images have shapes {foreground.shape} and {image.shape}; expected one grid *S: "
                "bring the moving image onto the fixed grid"
            )
        if image.size == 0 or not np.isfinite(image).all():
            raise ValueError(f"an image of shape {image.shape} is empty or holds NaN or infinite values")
        smooth = ndimage.gaussian_filter(image, 1.0)
        foreground |= smooth > smooth.min() + 0.08 * np.ptp(smooth)
    labels, count = ndimage.label(foreground)
    if count > 1:
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        foreground = labels == sizes.argmax()
    filled: Mask = ndimage.binary_fill_holes(foreground)
    return filled
