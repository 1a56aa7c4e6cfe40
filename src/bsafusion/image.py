"""An image, the grid it lives on, and where that grid lies in the patient.

Arrays are indexed in *tensor order* (``y, x`` or ``z, y, x``). Physical points are in *ITK order*
(``x, y[, z]``), in mm, with the axes of DICOM and ITK: towards the patient's Left, Posterior and Superior
(LPS). A picture (PNG, JPEG, TIFF) has no millimetres: its spacing is 1, its origin 0 and its physical points
are pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

SMALLEST_SIDE = 32
LARGEST_SIDE = 2048
LARGEST_TILT_DEGREES = 30.0

# The normal of each plane, as an index into (L, P, S), and the two axes that span it.
PLANE_NORMALS = {"sagittal": 0, "coronal": 1, "axial": 2}
_PLANE_AXES = {"sagittal": (1, 2), "coronal": (0, 2), "axial": (0, 1)}

Direction = tuple[tuple[float, ...], ...]


SLICE_POSITION = "slice_position_mm"
"""Key of :attr:`Image.meta`: where a positioned slice lies along the normal of its plane, LPS."""

LUMA_WEIGHTS = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in luminance (BT.601, full range)."""


class ImageError(ValueError):
    """An image, its file or its geometry cannot be used; the message says why and what to try."""


class Modality(StrEnum):
    """What kind of scan an image is."""

    MRI = "mri"
    CT = "ct"
    PET = "pet"
    SPECT = "spect"
    UNKNOWN = "unknown"


TASKS = {"ct-mri": Modality.CT, "pet-mri": Modality.PET, "spect-mri": Modality.SPECT}
"""What the network is trained for: the name of each task, and what its moving image is; the fixed one is MRI."""


def _as_direction(matrix: NDArray[np.float64]) -> Direction:
    return tuple(tuple(float(value) for value in row) for row in matrix)


@dataclass(frozen=True)
class Geometry:
    """A grid of samples and its place in physical space.

    Attributes:
        shape: samples per axis, tensor order: ``(H, W)`` or ``(D, H, W)``.
        spacing: mm between samples (pixels: 1), ITK order.
        origin: physical point of the first sample, ITK order.
        direction: rows of the orthonormal direction matrix as in ITK; column k is where index axis k points.
        physical: False for a picture, whose units are pixels.
        plane: ``axial``, ``coronal`` or ``sagittal`` for a slice whose orientation in the patient is known.
            The two physical axes are then (L, P), (L, S) or (P, S).
        positioned: origin and direction came from the file, not only the spacing.
        placement: of a slice with a place in the patient: the rows of the ``(3, 4)`` matrix from index (x, y, slice)
            to LPS mm. It tells viewers where the slice lies; all computation is in the plane.

    Raises:
        ImageError: the values do not describe a grid.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: Direction
    physical: bool = True
    plane: str | None = None
    positioned: bool = True
    placement: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        self._unwrap()
        dimensions = len(self.shape)
        if dimensions not in (2, 3) or min(self.shape) < 1:
            raise ImageError(f"a grid of shape {self.shape}; expected (H, W) or (D, H, W), each at least 1")
        sizes = {"spacing": len(self.spacing), "origin": len(self.origin), "direction": len(self.direction)}
        for name, size in sizes.items():
            if size != dimensions:
                raise ImageError(f"{name} has {size} entries on a {dimensions}-D grid; give one for each axis")
        if any(len(row) != dimensions for row in self.direction):
            raise ImageError(f"direction {self.direction} is not square; give {dimensions} rows of {dimensions}")
        if not all(math.isfinite(value) and value > 0 for value in self.spacing):
            raise ImageError(f"spacing {self.spacing}; expected positive mm; repair the file's header")
        if not all(math.isfinite(value) for value in self.origin):
            raise ImageError(f"origin {self.origin}; expected finite mm; repair the file's header")
        matrix = np.asarray(self.direction, dtype=np.float64)
        if not np.allclose(matrix @ matrix.T, np.eye(dimensions), atol=1e-3):
            raise ImageError(f"direction {self.direction}; expected orthonormal axes; resample the image first")
        self._check_kind(matrix)
        self._check_placement()

    def _unwrap(self) -> None:
        """Lists, arrays and their scalars become tuples of plain numbers, which JSON holds."""
        object.__setattr__(self, "shape", tuple(map(int, self.shape)))
        for name in ("spacing", "origin"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        for name in ("direction", "placement"):
            if (rows := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(tuple(map(float, row)) for row in rows))

    def _check_kind(self, matrix: NDArray[np.float64]) -> None:
        if self.plane is not None and (self.plane not in PLANE_NORMALS or len(self.shape) != 2):
            raise ImageError(
                f"plane {self.plane!r} on a {len(self.shape)}-D grid; expected None, or in 2-D one of "
                f"{', '.join(PLANE_NORMALS)}"
            )
        if self.physical:
            return
        pixels = set(self.spacing) == {1} and set(self.origin) == {0} and bool((matrix == np.eye(len(matrix))).all())
        if not pixels or self.positioned or self.plane is not None:
            raise ImageError(
                f"a picture with spacing {self.spacing}, origin {self.origin}, plane {self.plane}; expected "
                "pixel units: use Geometry.picture(shape), or physical=True for millimetres"
            )

    def _check_placement(self) -> None:
        if self.placement is None:
            return
        placement = np.asarray(self.placement, dtype=np.float64)
        fits = placement.shape == (3, 4) and len(self.shape) == 2 and self.positioned and np.isfinite(placement).all()
        if not fits or not np.allclose(np.linalg.norm(placement[:, :2], axis=0), self.spacing, rtol=1e-3):
            raise ImageError(
                f"placement {self.placement} of a grid {self.shape} with spacing {self.spacing}; expected (3, 4) "
                "finite numbers for a positioned 2-D grid of that spacing; leave it out"
            )

    @classmethod
    def picture(cls, shape: tuple[int, ...]) -> Geometry:
        """The geometry of a picture: pixel units, nothing known about the patient."""
        n = len(shape)
        return cls(
            shape=tuple(int(size) for size in shape),
            spacing=(1.0,) * n,
            origin=(0.0,) * n,
            direction=_as_direction(np.eye(n)),
            physical=False,
            positioned=False,
        )

    def matrix(self) -> NDArray[np.float64]:
        """Homogeneous ``(D+1, D+1)`` matrix from index (tensor order) to physical point (ITK order)."""
        n = len(self.shape)
        scaled = np.asarray(self.direction, dtype=np.float64) * np.asarray(self.spacing)
        matrix = np.eye(n + 1)
        matrix[:n, :n] = scaled[:, ::-1]
        matrix[:n, n] = self.origin
        return matrix

    def index_to_physical(self, index: NDArray[Any]) -> NDArray[np.float64]:
        """Physical points ``(..., D)`` (ITK order) of indices ``(..., D)`` (tensor order)."""
        return _transform(self.matrix(), index)

    def physical_to_index(self, point: NDArray[Any]) -> NDArray[np.float64]:
        """Fractional indices ``(..., D)`` (tensor order) of physical points ``(..., D)`` (ITK order)."""
        return _transform(np.linalg.inv(self.matrix()).astype(np.float64), point)


def _transform(matrix: NDArray[np.float64], points: NDArray[Any]) -> NDArray[np.float64]:
    n = len(matrix) - 1
    moved: NDArray[np.float64] = np.asarray(points, dtype=np.float64) @ matrix[:n, :n].T + matrix[:n, n]
    return moved


def slice_geometry(
    *,
    shape: tuple[int, int],
    spacing: tuple[float, float],
    origin: NDArray[Any],
    x_axis: NDArray[Any],
    y_axis: NDArray[Any],
    through: NDArray[Any],
) -> tuple[Geometry, float, float]:
    """The 2-D geometry of one slice of a 3-D space.

    The physical axes of the result are the two of L, P, S nearest to the slice. A tilted slice is turned into
    that plane about its centre, so distances within it stay in true mm, and the result does not depend on the
    order in which rows and columns are stored.

    Args:
        shape: ``(H, W)``.
        spacing: mm along x (columns), y (rows).
        origin: ``(3,)`` LPS mm of the first sample.
        x_axis: ``(3,)`` LPS direction in which the column index grows.
        y_axis: ``(3,)`` LPS direction in which the row index grows.
        through: ``(3,)`` LPS mm to the next slice; only for :attr:`Geometry.placement`.

    Returns:
        The geometry, the tilt of the slice out of its plane in degrees, and where its centre lies along the normal of
        that plane, LPS mm.

    Raises:
        ImageError: the axes are not perpendicular, or the slice is tilted by more than 30 degrees.
    """
    axes = np.stack([np.asarray(x_axis, dtype=np.float64), np.asarray(y_axis, dtype=np.float64)], axis=1)
    lengths = np.linalg.norm(axes, axis=0)
    if not np.isfinite(axes).all() or (lengths == 0).any() or abs(axes[:, 0] @ axes[:, 1]) > 1e-2 * lengths.prod():
        raise ImageError(
            f"slice axes {axes.T.tolist()}; expected two perpendicular directions; repair the file's header"
        )
    axes /= lengths
    normal = np.abs(np.cross(axes[:, 0], axes[:, 1]))
    plane = next(name for name, axis in PLANE_NORMALS.items() if axis == int(normal.argmax()))
    tilt = math.degrees(math.acos(min(1.0, float(normal.max() / np.linalg.norm(normal)))))
    if tilt > LARGEST_TILT_DEGREES:
        raise ImageError(
            f"the slice is tilted {tilt:.0f} degrees out of the {plane} plane; expected at most "
            f"{LARGEST_TILT_DEGREES:.0f}; reformat it to a standard plane first"
        )
    keep = list(_PLANE_AXES[plane])
    # The nearest orthonormal matrix (polar decomposition) keeps flips and transposes.
    left, _, right = np.linalg.svd(axes[keep])
    direction = left @ right
    to_centre = np.asarray(spacing) * (np.asarray(shape[::-1]) - 1) / 2
    in_space = np.asarray(origin, dtype=np.float64) + axes @ to_centre
    centre = in_space[keep]
    geometry = Geometry(
        shape=shape,
        spacing=(float(spacing[0]), float(spacing[1])),
        origin=tuple(float(value) for value in centre - direction @ to_centre),
        direction=_as_direction(direction),
        plane=plane,
        placement=_as_direction(np.column_stack([axes * np.asarray(spacing), through, origin])),
    )
    return geometry, tilt, float(in_space[PLANE_NORMALS[plane]])


@dataclass(frozen=True, eq=False)
class Image:
    """An image as it was stored: pixel values, grid, and where it came from.

    Attributes:
        array: ``C *S`` float32, read-only; C is 1 (grey) or 3 (RGB). Values as in the file, not normalised.
        geometry: of the grid ``*S``.
        modality: what kind of scan it is.
        dtype: the file's pixel type, as numpy names it, for writing it back; a float where the file scales its values.
            That of ``array`` as it was given, when left out.
        source: the file's name, without its folder.
        sha256: of the file, if there was one.
        meta: further facts about the file; never anything that identifies the patient.
        labels: its values are names, so it may be constant.

    Raises:
        ImageError: the array is empty, constant, not finite, not of real numbers, of the wrong shape, or (2-D) smaller
            than 32 or larger than 2048 pixels on a side; or there is no such modality.
    """

    array: NDArray[np.float32]
    geometry: Geometry
    modality: Modality = Modality.UNKNOWN
    dtype: str = ""
    source: str = ""
    sha256: str | None = None
    meta: Mapping[str, str | float] = field(default_factory=dict)
    labels: bool = False

    def __post_init__(self) -> None:
        given = np.asarray(self.array).dtype.name
        if np.asarray(self.array).dtype.kind not in "buif":
            raise ImageError(f"an array of {given}; expected real numbers")
        try:
            object.__setattr__(self, "modality", Modality(str(self.modality).lower()))
        except ValueError:
            known = ", ".join(Modality)
            raise ImageError(f"unknown modality {self.modality!r}; expected one of {known}") from None
        with np.errstate(over="ignore"):
            array = np.array(self.array, dtype=np.float32)
        if array.ndim < 1 or array.shape[0] not in (1, 3) or array.shape[1:] != self.geometry.shape:
            raise ImageError(
                f"array of shape {array.shape} on a grid {self.geometry.shape}; expected (C, *grid) "
                "with 1 (grey) or 3 (RGB) channels first"
            )
        check_size(array.shape[1:])
        if not np.isfinite(array).all():
            raise ImageError(
                f"{int((~np.isfinite(array)).sum())} values are NaN or infinite; expected finite "
                "values; replace them by the background"
            )
        channels = array.reshape(len(array), -1)
        if not self.labels and (channels.min(axis=1) == channels.max(axis=1)).all():
            raise ImageError(
                f"every pixel is {array.flat[0]:g}; expected an image with content; check the export "
                "or choose another slice"
            )
        array.flags.writeable = False
        object.__setattr__(self, "array", array)
        object.__setattr__(self, "dtype", self.dtype or given)
        plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in self.meta.items()}
        object.__setattr__(self, "meta", plain)

    def luma(self) -> NDArray[np.float32]:
        """Luminance ``*S`` in the image's own units: BT.601 (full range) for RGB, the array for grey."""
        return luma_of(self.array)


def luma_of(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """BT.601 luminance ``*S`` of an array ``C *S``: RGB weighted, grey as it is."""
    if len(array) == 1:
        grey: NDArray[np.float32] = array[0]
        return grey
    return np.tensordot(np.array(LUMA_WEIGHTS, dtype=np.float32), array, axes=1).astype(np.float32)


def check_size(shape: tuple[int, ...]) -> None:
    """Refuse a 2-D shape ``(H, W)`` outside 32..2048 pixels a side; 3-D shapes are not limited.

    Raises:
        ImageError: a side is too short or too long.
    """
    if len(shape) != 2:
        return
    size = f"{shape[1]} x {shape[0]} pixels"
    if min(shape) < SMALLEST_SIDE:
        raise ImageError(f"{size}; expected at least {SMALLEST_SIDE} on each side; use the full image")
    if max(shape) > LARGEST_SIDE:
        raise ImageError(f"{size}; expected at most {LARGEST_SIDE} on each side; crop or downsample it first")
