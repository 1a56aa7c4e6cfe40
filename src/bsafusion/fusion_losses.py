"""Loss terms that say what a good fused image is.

Images are ``B 1 H W`` in [0, 1]. ``fixed`` and ``moving`` are the sources on one grid, the moving one aligned or as it
was before it was deformed. The published terms first; then one term for each measure of ``metrics``, the same formulae
made differentiable (a test holds them to the measures' own values).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 255.0  # the measures are defined on grey levels


# --- published ------------------------------------------------------------------------------------


def _gaussian_window(like: Tensor, size: int, sigma: float) -> Tensor:
    offsets = torch.arange(size, dtype=like.dtype, device=like.device) - (size - 1) / 2
    window = torch.exp(-offsets.square() / (2 * sigma**2))
    return window / window.sum()


def _filter_valid(stack: Tensor, window: Tensor) -> Tensor:
    """Both axes of ``B C H W`` correlated with one window where it lies inside."""
    planes = stack.flatten(0, 1)[None]  # as channels, a group each: on a CPU many times faster than as a batch
    count = planes.shape[1]
    rows = F.conv2d(planes, window.view(1, 1, -1, 1).expand(count, 1, -1, 1), groups=count)
    columns = F.conv2d(rows, window.view(1, 1, 1, -1).expand(count, 1, 1, -1), groups=count)
    return columns.view(*stack.shape[:2], *columns.shape[-2:])


def _moments(fused: Tensor, sources: tuple[Tensor, ...], window: Tensor) -> list[tuple[Tensor, ...]]:
    """Per source: means of source and fused, their variances and their covariance in each window, ``B h w``."""
    planes = [fused, fused.square()]
    for source in sources:
        planes += [source, source.square(), source * fused]
    mean_fused, square_fused, *rest = _filter_valid(torch.cat(planes, dim=1), window).unbind(1)
    var_fused = (square_fused - mean_fused.square()).clamp(min=0)
    found: list[tuple[Tensor, ...]] = []
    for mean, square, product in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        var = (square - mean.square()).clamp(min=0)
        found.append((mean, mean_fused, var, var_fused, product - mean * mean_fused))
    return found


def _ssim_map(moments: tuple[Tensor, ...]) -> Tensor:
    mean_a, mean_b, var_a, var_b, cov = moments
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    return luminance * (2 * cov + c2) / (var_a + var_b + c2)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Mean SSIM per image, ``B`` (Wang et al., IEEE TIP 2004).

    11x11 Gaussian window of sigma 1.5, range 1, valid region.
    """
    return _ssim_map(_moments(b, (a,), _gaussian_window(a, 11, 1.5))[0]).mean(dim=(1, 2))


def sobel_magnitude(image: Tensor) -> Tensor:
    """Sobel gradient magnitude, ``B 1 H W``, border repeated; scaled so that a unit ramp has magnitude 1."""
    gradient = F.conv2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), _sobel_kernels(image) / 8)
    return (gradient.square().sum(1, keepdim=True) + 1e-8).sqrt()


def _sobel_kernels(like: Tensor) -> Tensor:
    """Derivatives rightwards and upwards, ``2 1 3 3``."""
    ramp = torch.arange(-1, 2, device=like.device, dtype=like.dtype)
    kernel = (2 - ramp.abs())[:, None] * ramp
    return torch.stack([kernel, kernel.T.flip(0)])[:, None]


def structure_losses(fused: Tensor, fixed: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
    """The two parts of L_struct, of the fixed and of the moving image."""
    return (1 - ssim(fixed, fused)).mean(), (1 - ssim(moving, fused)).mean()


def gradient_loss(fused: Tensor, fixed: Tensor, moving: Tensor) -> Tensor:
    """L_grad."""
    target = torch.maximum(sobel_magnitude(fixed), sobel_magnitude(moving))
    return (sobel_magnitude(fused) - target).abs().mean()


def intensity_loss(fused: Tensor, fixed: Tensor, moving: Tensor) -> Tensor:
    """L_inten."""
    return (fused - torch.maximum(fixed, moving)).abs().mean()


DIMMER = 0.15
"""How much darker than the brighter source a pixel of the fused image may be at no cost in :func:`highlight_loss`."""


def highlight_loss(fused: Tensor, fixed: Tensor, moving: Tensor) -> Tensor:
    """What is bright in either source stays bright: a small calcification, a haemorrhage, uptake.

    The mean square of what the fused image lacks of the brighter source beyond :data:`DIMMER`, in units of its square;
    squares, because a few pixels that lack much count more than many that lack little.
    """
    lack = F.relu(torch.maximum(fixed, moving) - fused - DIMMER) / DIMMER
    return lack.square().mean()


# --- the measures ---------------------------------------------------------------------------------


def _edges(image: Tensor) -> tuple[Tensor, Tensor]:
    """Strength and orientation of the zero-padded Sobel gradient, grey levels and radians."""
    gx, gy = F.conv2d(image * LEVELS, _sobel_kernels(image), padding=1).unbind(1)
    strength = (gx.square() + gy.square() + 1e-6).sqrt()
    return strength, torch.atan(gy / torch.where(gx.abs() < 1e-3, 1e-3, gx))


def edge_loss(fused: Tensor, fixed: Tensor, moving: Tensor) -> Tensor:
    """``1 - Q_AB/F``, mean over the batch."""
    strength_fused, orientation_fused = _edges(fused)
    kept, whole = torch.zeros_like(strength_fused), torch.zeros_like(strength_fused)
    for source in (fixed, moving):
        strength, orientation = _edges(source)
        ratio = torch.minimum(strength, strength_fused) / torch.maximum(strength, strength_fused)
        turn = 1 - (orientation - orientation_fused).abs() / (math.pi / 2)
        quality = 0.9994 * torch.sigmoid(15 * (ratio - 0.5)) * 0.9879 * torch.sigmoid(22 * (turn - 0.8))
        kept, whole = kept + quality * strength, whole + strength
    return 1 - (kept.sum(dim=(1, 2)) / whole.sum(dim=(1, 2))).mean()


def visibility_loss(fused: Tensor, fixed: Tensor, moving: Tensor) -> Tensor:
    """``log(1 + Q_CV / 100)``, mean over the batch: the logarithm tames the tail that the fifth power makes."""
    images = torch.cat([fixed, moving, fused], dim=1)
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    images = (images - low) * LEVELS / (high - low).clamp(min=1e-3)
    block, (height, width) = 16, images.shape[-2:]
    # Cycles per 256 pixels: the scale that the measure has at the size at which it is reported.
    vertical = torch.fft.fftfreq(height, device=images.device)[:, None] * 64
    horizontal = torch.fft.rfftfreq(width, device=images.device)[None] * 64
    r = (vertical.square() + horizontal.square()).sqrt()
    sensitivity = 2.6 * (0.0192 + 0.144 * r) * torch.exp(-((0.144 * r) ** 1.1))
    difference = images[:, :2] - images[:, 2:]
    seen = torch.fft.irfft2(torch.fft.rfft2(difference) * sensitivity, s=(height, width))
    distance = F.avg_pool2d(seen.square(), block)
    sources = images[:, :2].flatten(0, 1)[:, None]
    gradient = F.conv2d(sources, _sobel_kernels(images), padding=1).square().sum(1, keepdim=True).sqrt()
    saliency = F.avg_pool2d((gradient / 1000) ** 5, block).view_as(distance) + 1e-12
    value: Tensor = (saliency * distance).sum(dim=(1, 2, 3)) / saliency.sum(dim=(1, 2, 3))
    return (value / 100).log1p().mean()


def salience_loss(fused: Tensor, fixed: Tensor, moving: Tensor) -> Tensor:
    """``1 - Q_S``, mean over the batch."""
    of_fixed, of_moving = _moments(fused, (fixed, moving), _gaussian_window(fused, 11, 1.5))
    flat = 1e-6 / LEVELS**2
    var_fixed, var_moving = of_fixed[2], of_moving[2]
    share = torch.where((var_fixed < flat) & (var_moving < flat), 0.5, var_fixed / (var_fixed + var_moving + 1e-12))
    return 1 - (share * _ssim_map(of_fixed) + (1 - share) * _ssim_map(of_moving)).mean()


def _information(moments: tuple[Tensor, ...], noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """VIF's gain, and the information that got through and that there was, ``B h w``."""
    _, _, var_source, var_fused, cov = (m * LEVELS**2 for m in moments)
    gain = (cov / (var_source + 1e-2)).clamp(min=0)
    lost = (var_fused - gain * cov).clamp(min=1e-2)
    return gain, torch.log1p(gain.square() * var_source / (lost + noise)), torch.log1p(var_source / noise)


def information_losses(fused: Tensor, fixed: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
    """``1 - VIFF`` and ``1 - VIF_sum / 2``, each the mean over the batch."""
    weights, noises = (1.0, 0.0, 0.15, 1.0), (0.005 * LEVELS**2, 2.0)
    viff = fused.new_zeros(len(fused))
    kept, there = fused.new_zeros(2, len(fused)), fused.new_zeros(2, len(fused))
    images = torch.cat([fused, fixed, moving], dim=1)
    for scale, taps in enumerate((17, 9, 5, 3)):
        window = _gaussian_window(images, taps, taps / 5)
        if scale:
            images = _filter_valid(images, window)[..., ::2, ::2]
        pair = _moments(images[:, :1], (images[:, 1:2], images[:, 2:]), window)
        if weights[scale]:
            (gain_a, kept_a, there_a), (gain_b, kept_b, there_b) = (_information(m, noises[0]) for m in pair)
            use_fixed = gain_a < gain_b
            part = torch.where(use_fixed, kept_a, kept_b).sum(dim=(1, 2))
            whole = torch.where(use_fixed, there_a, there_b).sum(dim=(1, 2))
            viff = viff + weights[scale] / sum(weights) * (part + 1e-3) / (whole + 1e-3)
        found = [_information(m, noises[1]) for m in pair]
        kept = kept + torch.stack([f[1].sum(dim=(1, 2)) for f in found])
        there = there + torch.stack([f[2].sum(dim=(1, 2)) for f in found])
    return 1 - viff.mean(), 1 - ((kept + 1e-3) / (there + 1e-3)).mean()
