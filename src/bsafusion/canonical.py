"""The grid that the network sees: upright, with square pixels.

A file may store its rows from below, its columns from the right, or pixels that are not square, and says so. The
network has learned from pictures as radiology shows them, and tells up from down. So images are turned before it sees
them (flips and a transpose, nothing is resampled) and, where pixels are not square, stretched; what it finds is turned
back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from bsafusion.deformation import resize_field
from bsafusion.image import LARGEST_SIDE, SMALLEST_SIDE, Geometry
from bsafusion.preprocessing import DISPLAY_DIRECTION, nearest_axes

SQUARE = 1.02
"""The ratio of both spacings up to which pixels count as square."""


@dataclass(frozen=True)
class Canonical:
    """How a 2-D grid becomes the one that the network sees.

    Attributes:
        transposed: rows and columns are exchanged.
        flipped: whether then the order of rows, and of columns, is reversed.
        turned: ``(H, W)`` after that.
        shape: ``(H, W)`` of the grid that is seen. Its corners lie on those of the stored one.
    """

    transposed: bool
    flipped: tuple[bool, bool]
    turned: tuple[int, int]
    shape: tuple[int, int]

    @property
    def is_identity(self) -> bool:
        """Whether the network sees the grid as it is stored."""
        return not self.transposed and not any(self.flipped) and self.turned == self.shape

    @property
    def note(self) -> str:
        """What was done, a sentence for the report; empty where that is nothing."""
        done = ["rows and columns exchanged"] if self.transposed else []
        done += [f"{name} reversed" for name, flip in zip(("rows", "columns"), self.flipped, strict=True) if flip]
        if self.turned != self.shape:
            done.append(f"pixels made square ({self.shape[1]} x {self.shape[0]})")
        return f"The network saw the fixed grid upright: {', '.join(done)}." if done else ""

    def _axes(self) -> list[int]:
        return [axis - 2 for axis, flip in enumerate(self.flipped) if flip]

    def see(self, image: Tensor) -> Tensor:
        """``B C *stored`` -> ``B C *shape``."""
        image = (image.transpose(-1, -2) if self.transposed else image).flip(self._axes())
        if self.turned == self.shape:
            return image
        smooth = self.shape[0] < self.turned[0] or self.shape[1] < self.turned[1]
        return F.interpolate(image, size=self.shape, mode="bilinear", align_corners=True, antialias=smooth)

    def give_back(self, image: Tensor) -> Tensor:
        """``B C *shape`` -> ``B C *stored``: the values at the stored samples, which are among those that are seen."""
        if self.turned != self.shape:
            image = F.interpolate(image, size=self.turned, mode="bilinear", align_corners=True)
        image = image.flip(self._axes())
        return image.transpose(-1, -2) if self.transposed else image

    def see_field(self, displacement: Tensor) -> Tensor:
        """A field ``B 2 *stored`` between images as they are stored, voxels, as the field between them as seen."""
        if self.is_identity:
            return displacement
        field = displacement.transpose(-1, -2).flip(1) if self.transposed else displacement
        return resize_field(self._signed(field.flip(self._axes())), shape=self.shape)

    def give_back_field(self, displacement: Tensor) -> Tensor:
        """A field ``B 2 *shape`` between images as they are seen, voxels, as the field between them as stored."""
        if self.is_identity:
            return displacement
        field = self._signed(resize_field(displacement, shape=self.turned).flip(self._axes()))
        return field.transpose(-1, -2).flip(1) if self.transposed else field

    def _signed(self, field: Tensor) -> Tensor:
        return field * field.new_tensor([-1.0 if flip else 1.0 for flip in self.flipped]).view(1, 2, 1, 1)


def canonical(geometry: Geometry, *, like: Geometry | None = None, square: bool = True) -> Canonical:
    """Upright where the file tells the orientation; with square pixels where it tells millimetres.

    The finer of both spacings is kept, unless a side became longer than an image may be.

    Args:
        geometry: of a 2-D grid.
        like: the grid whose orientation is taken, left out for that of ``geometry`` itself.
        square: whether pixels become square.
    """
    oriented = like or geometry
    (height, width), (across, down) = geometry.shape, geometry.spacing
    transposed, flipped = False, (False, False)
    if oriented.positioned and oriented.plane is not None:
        # Column k: along which stored axis, (x, y), the k-th axis of the display runs.
        turn = nearest_axes(np.asarray(oriented.direction)).T @ DISPLAY_DIRECTION[oriented.plane]
        transposed = bool(turn[0, 0] == 0)
        flipped = bool(turn[:, 1].sum() < 0), bool(turn[:, 0].sum() < 0)
    if transposed:
        height, width, across, down = width, height, down, across
    turned = (height, width)
    if not square or max(across, down) <= SQUARE * min(across, down):
        return Canonical(transposed, flipped, turned, turned)
    extent = (height - 1) * down, (width - 1) * across
    unit = max(min(across, down), max(extent) / (LARGEST_SIDE - 1))
    shape = tuple(max(round(length / unit) + 1, SMALLEST_SIDE) for length in extent)
    return Canonical(transposed, flipped, turned, (shape[0], shape[1]))
