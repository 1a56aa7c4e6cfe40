"""From the fused luminance to the picture: colour, overlay, balance, and how well the hue survived.

Pictures are ``C *S`` float in [0, 1], with three channels (RGB) or one (grey). Adding grey to a colour and scaling its
distance from grey leave the hue as it is; everything here does only that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsafusion.image import LUMA_WEIGHTS

Array = NDArray[Any]

# BT.601, full range (as in JFIF): luma = kr R + kg G + kb B, chroma = scaled B - luma and R - luma.
_KR, _KG, _KB = LUMA_WEIGHTS
_CHROMA_FROM_RGB = np.array(
    [
        [-_KR / (2 * (1 - _KB)), -_KG / (2 * (1 - _KB)), 0.5],
        [0.5, -_KG / (2 * (1 - _KR)), -_KB / (2 * (1 - _KR))],
    ]
)
_YCC_FROM_RGB = np.vstack([[_KR, _KG, _KB], _CHROMA_FROM_RGB])
_RGB_FROM_YCC = np.linalg.inv(_YCC_FROM_RGB)

SATURATED = 0.2
"""From this HSV saturation on a pixel of the aligned image has a colour whose hue is judged."""


def split_colour(rgb: Array) -> tuple[Array, Array]:
    """RGB ``3 *S`` in [0, 1] to luma ``1 *S`` in [0, 1] and chroma ``2 *S`` (Cb, Cr) in [-0.5, 0.5], float64.

    ITU-R BT.601 weights, full range. :func:`join_colour` is the exact inverse.

    Raises:
        ValueError: not three channels.
    """
    if rgb.ndim < 1 or rgb.shape[0] != 3:
        raise ValueError(f"colour of shape {rgb.shape}; expected 3 channels first; grey has no chroma")
    channels = np.tensordot(_YCC_FROM_RGB, rgb, axes=1)
    return channels[:1], channels[1:]


def join_colour(luma: Array, chroma: Array) -> Array:
    """Luma ``1 *S`` and chroma ``2 *S`` back to RGB ``3 *S``, inside [0, 1] or not."""
    return np.tensordot(_RGB_FROM_YCC, np.concatenate([luma, chroma]), axes=1)


def recolour(luma: Array, chroma: Array) -> Array:
    """Put another luminance under a colour: RGB ``3 *S`` with exactly this luma and exactly this hue, in [0, 1].

    The hue is the angle in the chroma plane, and in HSV too. Where luma and chroma together leave the RGB cube, the
    chroma vector is shortened by the largest factor ``k <= 1`` that stays inside: R, G, B are ``luma + k v`` with ``v``
    the RGB of the chroma alone, so ``k = min over R, G, B of (1 - luma) / v`` where ``v > 0`` and ``luma / -v`` where
    ``v < 0``. Nothing is clipped.

    Args:
        luma: ``1 *S``; clamped to [0, 1].
        chroma: ``2 *S``.
    """
    luma = np.clip(luma.astype(np.float64), 0, 1)
    offset = np.tensordot(_RGB_FROM_YCC[:, 1:], chroma, axes=1)
    # Never quite zero, so that no colour on black is 0 / 0.
    room = np.maximum(np.where(offset > 0, 1 - luma, luma), 1e-13)
    factor = (room / np.maximum(np.abs(offset), room)).min(axis=0, keepdims=True)
    return np.asarray(luma + factor * offset)


def overlay(fixed: Array, coloured: Array, alpha: Array) -> Array:
    """The moving image over the fixed one: ``(1 - alpha) fixed + alpha coloured``, ``C *S``.

    Args:
        fixed: ``1 *S``, grey, so that the hue is that of ``coloured``.
        coloured: ``C *S``.
        alpha: ``1 *S`` in [0, 1].
    """
    return np.asarray((1 - alpha) * fixed + alpha * coloured)


def steer(fused: Array, fixed: Array, aligned: Array, weight_fixed: float) -> Array:
    """Move the balance of a fused picture ``C *S`` towards one of its sources, of the same or one channel.

    With ``w`` the weight of the fixed image: ``(1 - 2w) aligned + 2w fused`` up to 0.5, ``(2 - 2w) fused + (2w - 1)
    fixed`` above. So 0 is the aligned image, 0.5 the fused picture itself, 1 the fixed image; in between each pixel
    goes straight from one to the next.
    """
    if weight_fixed <= 0.5:
        return np.asarray((1 - 2 * weight_fixed) * aligned + 2 * weight_fixed * fused)
    return np.asarray((2 - 2 * weight_fixed) * fused + (2 * weight_fixed - 1) * fixed)


def colourise(unit: Array, table: Array) -> Array:
    """Scalars ``1 *S`` in [0, 1] in the colours of a table ``N 3``: ``3 *S``; the nearest entry, never a mixture."""
    return np.moveaxis(table[np.rint(unit[0] * (len(table) - 1)).astype(np.intp)], -1, 0)


@dataclass(frozen=True)
class HueCheck:
    """How the hue of a fused picture compares to the aligned moving image's, where that is saturated.

    Attributes:
        error_median: median angle in degrees between both HSV hues; None where nothing has a hue.
        lost_share: share of the saturated pixels that are grey (or black, or white) in the fused picture and left out
            of the median; None where nothing is saturated.
    """

    error_median: float | None
    lost_share: float | None


def check_hue(fused: Array, coloured: Array, *, levels: int = 255) -> HueCheck:
    """Compare the hues of two pictures ``3 *S`` as they are written, in whole levels of 8 (255) or 16 (65535) bits.

    Pixels count where the HSV saturation of ``coloured`` is above :data:`SATURATED`.
    """
    new, old = (np.rint(np.clip(picture, 0, 1) * levels) for picture in (fused, coloured))
    saturated = np.ptp(old, axis=0) > SATURATED * old.max(axis=0)
    if not saturated.any():
        return HueCheck(None, None)
    kept = saturated & (np.ptp(new, axis=0) > 0)
    lost = 1 - float(kept.sum() / saturated.sum())
    if not kept.any():
        return HueCheck(None, lost)
    angle = np.abs(_hue(new[:, kept]) - _hue(old[:, kept]))
    return HueCheck(float(np.median(np.minimum(angle, 360 - angle))), lost)


def _hue(rgb: Array) -> Array:
    """HSV hue in degrees of ``3 N`` colours that are not grey."""
    red, green, blue = rgb
    highest, spread = rgb.max(axis=0), np.ptp(rgb, axis=0)
    sector = np.select(
        [highest == red, highest == green],
        [(green - blue) / spread, 2 + (blue - red) / spread],
        4 + (red - green) / spread,
    )
    return np.asarray(60 * sector % 360)
