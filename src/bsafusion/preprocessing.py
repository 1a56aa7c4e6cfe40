"""From stored images to what the networks see, and back: intensities and the common grid.

Everything here is an invertible record or a stated loss. The moving image is brought to the fixed grid by
an affine map between the two *indices* (tensor order); :func:`total_field` joins it with the network's
displacement to one field that carries any other image of the moving scan along.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import scipy.ndimage
import scipy.optimize
import torch
from numpy.typing import NDArray
from torch import Tensor

from bsafusion.deformation import DeformationField, MovingFrame, identity_grid, inside_frame, sample
from bsafusion.image import Geometry, Image, ImageError

Values = TypeVar("Values", NDArray[np.float32], Tensor)
IntensityMethod = Literal["auto", "percentile"]
MatchMethod = Literal["same grid", "physical", "physical spacing, centred", "centred and scaled"]

PERCENTILES = (0.1, 99.9)
_SCAN_FORMATS = ("NIfTI", "DICOM")
SMALLEST_OVERLAP = 0.25

# What a picture is taken to show when nothing else is known: the display convention of radiology.
# Columns of the direction matrix: where x (rightwards) and y (downwards) point in the plane's own two axes.
DISPLAY_DIRECTION = {
    "axial": np.diag([1.0, 1.0]),
    "coronal": np.diag([1.0, -1.0]),
    "sagittal": np.diag([1.0, -1.0]),
}


# --- intensities ---------------------------------------------------------------------


@dataclass(frozen=True)
class IntensityScaling:
    """``unit = (value - low) / (high - low)``: stored values to about [0, 1], without clipping.

    Raises:
        ValueError: ``low`` and ``high`` are not finite or not in order.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.high > self.low):
            raise ValueError(f"intensities from {self.low} to {self.high}; expected finite low < high")

    def to_unit(self, array: Values) -> Values:
        """Stored values, any shape, to unit values."""
        return (array - self.low) / (self.high - self.low)


def white_level(image: Image) -> float | None:
    """The value that is white (0 is black) in an image that shows grey levels as a picture does; None for a scan.

    Pictures are 8- or 16-bit values within their type: in colour, or grey without millimetres and not of a scanner's
    format, where unsigned integers may be anything.
    """
    white = {"uint8": 255.0, "uint16": 65535.0}.get(image.dtype)
    scan = len(image.array) == 1 and (image.geometry.physical or image.meta.get("format") in _SCAN_FORMATS)
    if white is None or scan or image.array.min() < 0 or image.array.max() > white:
        return None
    return white


def fit_intensity(image: Image, *, method: IntensityMethod = "auto") -> IntensityScaling:
    """The scaling that puts an image's content into [0, 1]; one for all channels, so hues are kept.

    ``percentile`` takes the 0.1 and 99.9 percentiles of the values above the minimum: the background, or what a
    scanner writes outside its field of view (-2000 in some CT), is a large part of a slice and must not set the
    lower end. ``auto`` takes the extremes for pictures (:func:`white_level`), percentiles for other data, where
    single voxels can be far off.
    """
    array = image.array
    low, high = float(array.min()), float(array.max())
    if method == "auto" and white_level(image) is not None:
        return IntensityScaling(low, high)
    inner_low, inner_high = (float(value) for value in np.percentile(array[array > low], PERCENTILES))
    # A mask has one value above its minimum and no percentiles to speak of.
    return IntensityScaling(inner_low, inner_high) if inner_high > inner_low else IntensityScaling(low, high)


# --- the common grid ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GridMatch:
    """How the moving grid was laid onto the fixed one before any network.

    Attributes:
        affine: ``(D, D+1)`` from fixed index to moving index, both tensor order: ``moving = affine @
        [fixed, 1]``. method: how it was found. note: one sentence for the report.
    """

    affine: NDArray[np.float64]
    method: MatchMethod
    note: str

    def __post_init__(self) -> None:
        affine = np.array(self.affine, dtype=np.float64)
        if affine.ndim != 2 or affine.shape not in ((2, 3), (3, 4)) or not np.isfinite(affine).all():
            raise ValueError(f"affine of shape {affine.shape}; expected finite numbers, (2, 3) or (3, 4)")
        if abs(np.linalg.det(affine[:, :-1])) < 1e-12:
            raise ValueError("the affine map is singular; expected one that can be inverted")
        affine.flags.writeable = False
        object.__setattr__(self, "affine", affine)

    def homogeneous(self) -> NDArray[np.float64]:
        """The map as a ``(D+1, D+1)`` matrix."""
        return np.vstack([self.affine, [0.0] * (self.affine.shape[1] - 1) + [1.0]])


def match_grids(fixed: Geometry, moving: Geometry) -> GridMatch:
    """Lay the moving grid onto the fixed one as well as the files' geometry allows.

    In this order: the *same grid*; the same *physical* place, if both files state it and the frames overlap
    by at least a quarter of the smaller one; the same *physical spacing, centred*; and, with a picture
    among them, *centred and scaled*: one isotropic scale that makes the moving frame as large as fits into
    the fixed one. When an orientation is not known, the image is taken to be shown as radiology does
    (axial: left is right, front is up).

    Raises:
        ImageError: the images show different planes or have different numbers of axes.
    """
    if len(fixed.shape) != len(moving.shape):
        raise ImageError(
            f"fixed image is {len(fixed.shape)}-D, moving image {len(moving.shape)}-D; expected the same; "
            "take a slice of the volume"
        )
    if fixed.plane and moving.plane and fixed.plane != moving.plane:
        raise ImageError(f"fixed slice is {fixed.plane}, moving slice {moving.plane}; expected one plane; reformat one")
    if _same_grid(fixed, moving):
        identity = np.eye(len(fixed.shape) + 1)[:-1]
        return GridMatch(identity, "same grid", "Both images lie on the same grid; nothing was resampled.")
    reason, assumed = "the position of at least one image is not known", ""
    if fixed.positioned != moving.positioned:
        unknown = "moving" if fixed.positioned else "fixed"
        assumed = f" The orientation of the {unknown} image is not known; it is taken as radiology displays it."
    if fixed.positioned and moving.positioned:
        overlap = _overlap(fixed, moving)
        if overlap >= SMALLEST_OVERLAP:
            affine = (np.linalg.inv(moving.matrix()) @ fixed.matrix())[:-1]
            note = f"Placed by the positions in both files; {overlap:.0%} of the smaller frame is shared."
            return GridMatch(affine, "physical", note)
        reason = f"by their positions the frames overlap by only {overlap:.0%}"
    if fixed.physical and moving.physical:
        note = f"Centred on each other at true mm, because {reason}.{assumed}"
        return GridMatch(_centred(fixed, moving, scale=1.0), "physical spacing, centred", note)
    scale = _fitting_scale(fixed, moving)
    note = f"Centred on each other and scaled by {scale:.3g}, because a picture has no millimetres.{assumed}"
    return GridMatch(_centred(fixed, moving, scale=scale), "centred and scaled", note)


def _same_grid(fixed: Geometry, moving: Geometry) -> bool:
    return (
        fixed.shape == moving.shape
        and (fixed.physical, fixed.positioned) == (moving.physical, moving.positioned)
        and np.allclose(fixed.matrix(), moving.matrix(), rtol=1e-5, atol=1e-4)
    )


def _overlap(fixed: Geometry, moving: Geometry) -> float:
    """The share of the smaller frame that lies inside the other, on a raster of sample points."""
    small, large = sorted((fixed, moving), key=lambda grid: math.prod(grid.shape) * math.prod(grid.spacing))
    axes = [(np.arange(64) + 0.5) / 64 * size - 0.5 for size in small.shape]  # the middles of as many parts
    index = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    inside = _inside(large.physical_to_index(small.index_to_physical(index)), large.shape)
    return float(inside.mean())


def _inside(index: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """:func:`bsafusion.deformation.inside_frame` for indices ``(..., D)``."""
    points = torch.from_numpy(np.ascontiguousarray(np.moveaxis(index, -1, 0)))
    return np.asarray(inside_frame(points[None], shape)[0, 0])


def _directions(fixed: Geometry, moving: Geometry) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Comparable direction matrices of both grids, also when only one orientation is known."""
    known = [np.asarray(grid.direction, dtype=np.float64) for grid in (fixed, moving)]
    if fixed.positioned == moving.positioned:
        return known[0], known[1]
    if len(fixed.shape) == 3:
        return np.eye(3), np.eye(3)
    display = DISPLAY_DIRECTION[fixed.plane or moving.plane or "axial"]
    # A small angulation of the positioned image says nothing about how the other one was cut.
    nearest = [nearest_axes(matrix) for matrix in known]
    return (nearest[0], display) if fixed.positioned else (display, nearest[1])


def nearest_axes(direction: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest direction matrix along the axes: flips and transposes without rotation."""
    rows, columns = scipy.optimize.linear_sum_assignment(-np.abs(direction))
    nearest = np.zeros_like(direction)
    nearest[rows, columns] = np.sign(direction[rows, columns])
    return nearest


def _fitting_scale(fixed: Geometry, moving: Geometry) -> float:
    """Fixed units per moving unit at which the moving frame just fits into the fixed one."""
    fixed_direction, moving_direction = _directions(fixed, moving)
    turn = nearest_axes(fixed_direction.T @ moving_direction)
    fixed_extent = np.asarray(fixed.shape[::-1]) * np.asarray(fixed.spacing)
    moving_extent = np.abs(turn) @ (np.asarray(moving.shape[::-1]) * np.asarray(moving.spacing))
    return float((fixed_extent / moving_extent).min())


def _centred(fixed: Geometry, moving: Geometry, *, scale: float) -> NDArray[np.float64]:
    """Affine from fixed to moving index that joins the centres; ``scale`` is fixed units per moving unit."""
    fixed_direction, moving_direction = _directions(fixed, moving)
    to_world = fixed_direction * np.asarray(fixed.spacing)
    to_moving = np.linalg.inv(moving_direction * np.asarray(moving.spacing))
    linear = (to_moving @ to_world / scale)[::-1, ::-1]
    fixed_centre = (np.asarray(fixed.shape) - 1) / 2
    moving_centre = (np.asarray(moving.shape) - 1) / 2
    return np.column_stack([linear, moving_centre - linear @ fixed_centre])


def resample_to_grid(array: NDArray[np.float32], match: GridMatch, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The moving image on the fixed grid.

    Linear interpolation follows a Gaussian against aliasing where voxels grow. Outside the moving frame (half a
    voxel beyond its outer voxel centres) the result is the image's minimum, the background: the border is not smeared
    outwards.

    Args:
        array: ``C *S_m``.
        match: from :func:`match_grids`.
        shape: ``*S`` of the fixed grid.

    Returns:
        ``C *S`` float32.
    """
    if array.shape[1:] == shape and np.array_equal(match.homogeneous(), np.eye(len(shape) + 1)):
        return np.array(array, dtype=np.float32)
    return _sample_points(array, _map_points(match.homogeneous(), _grid(shape)), nearest=False)


def _grid(shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Voxel coordinates ``D *S``."""
    return identity_grid(shape, torch.empty(0, dtype=torch.float64)).numpy()


def _map_points(matrix: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """A homogeneous matrix applied to points ``D *S``."""
    n = len(matrix) - 1
    offset = matrix[:n, n].reshape(-1, *[1] * n)
    mapped: NDArray[np.float64] = np.tensordot(matrix[:n, :n], points, axes=1) + offset
    return mapped


def _sample_points(
    array: NDArray[np.float32], points: NDArray[np.float64], *, nearest: bool, background: float | None = None
) -> NDArray[np.float32]:
    """``C *S_m`` at points ``D *S`` (indices of ``array``); the background, else its minimum, outside its frame."""
    source = np.array(array, dtype=np.float32)
    if background is None:
        background = float(source.min())
    if not nearest:
        source = scipy.ndimage.gaussian_filter(
            source, [0.0, *_antialias_sigmas(points, max(source.shape[1:]))], mode="nearest"
        )
    values = sample(
        torch.from_numpy(source)[None],
        torch.from_numpy(points.astype(np.float32))[None],
        mode="nearest" if nearest else "bilinear",
    )[0].numpy()
    inside = _inside(np.moveaxis(points, 0, -1), source.shape[1:])
    return np.where(inside, values, background).astype(np.float32)


def _antialias_sigmas(points: NDArray[np.float64], longest: int) -> list[float]:
    """Per source axis, ``0.5 sqrt(scale^2 - 1)`` with scale the typical step in source voxels, 0 below 1.

    A voxel seen as a Gaussian of sigma 0.5 then grows to 0.5 scale, at most that of the ``longest`` side of the
    source: beyond, the filter only takes longer.
    """
    sigmas = []
    for component in points:
        along = tuple(axis for axis, size in enumerate(component.shape) if size > 1)
        steps = np.stack([np.gradient(component, axis=axis) for axis in along])
        scale = min(float(np.median(np.sqrt((steps**2).sum(axis=0)))), longest)
        sigmas.append(0.5 * math.sqrt(max(scale**2 - 1.0, 0.0)))
    return sigmas


# --- carrying images along ---------------------------------------------------------------------


def total_field(displacement: Tensor, match: GridMatch, fixed: Geometry, moving: Geometry) -> DeformationField:
    """The whole way from fixed to moving physical points as one field.

    ``T(p) = p + d(p)`` with ``T = (moving matrix) o affine o (id + u) o (fixed matrix)^-1``; the result
    holds ``d`` in voxels of the fixed grid. For a ``physical`` match that is ``u`` itself.

    Args:
        displacement: ``u``, ``D *S``, voxels of the fixed grid.
        match: how the moving image was brought to the fixed grid.
        fixed: geometry of the fixed grid.
        moving: geometry of the moving image as it was read.
    """
    grid = _grid(fixed.shape)
    there = grid + displacement.detach().cpu().double().numpy()
    matrix = np.linalg.inv(fixed.matrix()) @ moving.matrix() @ match.homogeneous()
    total = (_map_points(matrix, there) - grid).astype(np.float32)
    return DeformationField(torch.from_numpy(total), fixed, MovingFrame.of(moving))


def network_field(total: DeformationField, match: GridMatch, moving: Geometry) -> Tensor:
    """The displacement ``D *S`` that :func:`total_field` was given, voxels of the fixed grid."""
    fixed = total.geometry
    grid, back = _grid(fixed.shape), np.linalg.inv(moving.matrix() @ match.homogeneous()) @ fixed.matrix()
    aim = _map_points(back, grid + total.displacement.double().numpy())
    return torch.from_numpy((aim - grid).astype(np.float32))


def inverse_field(inverse: Tensor, match: GridMatch, fixed: Geometry, moving: Geometry) -> DeformationField:
    """The whole way back, from moving to fixed physical points, as one field on the moving grid.

    Args:
        inverse: ``D *S``, voxels of the fixed grid: what the moving image, brought there by ``match``, shows at ``z``
            the fixed one shows at ``z + inverse(z)``. Beyond the fixed grid its border is repeated.
        match, fixed, moving: as in :func:`total_field`.
    """
    grid = _grid(moving.shape)
    to_fixed = np.asarray(np.linalg.inv(match.homogeneous()), dtype=np.float64)
    brought = torch.from_numpy(_map_points(to_fixed, grid))
    there = (brought + sample(inverse.detach().cpu().double()[None], brought[None])[0]).numpy()
    total = (_map_points(np.linalg.inv(moving.matrix()) @ fixed.matrix(), there) - grid).astype(np.float32)
    return DeformationField(torch.from_numpy(total), moving, MovingFrame.of(fixed))


def slices_apart(fixed: Image, moving: Image) -> float | None:
    """Millimetres between two slices, across them, by the positions in their files; None where one has none.

    The most that a corner of the fixed slice is from the plane of the moving one: slices that are tilted against each
    other are apart, too. Two scanners rarely share their origin, so this is for the reader to judge.
    """
    placements = [image.geometry.placement for image in (fixed, moving)]
    if fixed.geometry.plane != moving.geometry.plane or placements[0] is None or placements[1] is None:
        return None
    lies, plane = (np.asarray(placement) for placement in placements)
    height, width = fixed.geometry.shape
    corners = np.array([[x, y, 0, 1] for x in (0, width - 1) for y in (0, height - 1)]) @ lies.T
    normal = np.cross(plane[:, 0], plane[:, 1])
    return float(np.abs((corners - plane[:, 3]) @ normal).max() / np.linalg.norm(normal))


def slice_astray(field: DeformationField, image: Image) -> float | None:
    """Millimetres, across, from the slice that a field was made for to the one that it is to carry; None where one of
    them has no position."""
    made_for, given = field.moving, MovingFrame.of(image.geometry)
    if made_for is None or made_for.across is None or given.across is None:
        return None
    return abs(made_for.across - given.across)


def has_partner(displacement: Tensor, match: GridMatch, moving: Geometry) -> NDArray[np.bool_]:
    """Whether what a voxel of the fixed grid shows lies inside the moving frame, ``*S``; arguments as in
    :func:`total_field`."""
    there = _grid(tuple(displacement.shape[1:])) + displacement.detach().cpu().double().numpy()
    return _inside(np.moveaxis(_map_points(match.homogeneous(), there), 0, -1), moving.shape)


def apply_field(field: DeformationField, image: Image, *, nearest: bool = False) -> NDArray[np.float32]:
    """Carry an image of the moving scan to the fixed grid, ``C *S`` float32.

    The image is sampled on its own grid at ``T(p)`` for each fixed voxel, so one with a position may have another
    resolution than the moving image the field was made with; a picture, and a scan without a position, must have the
    same grid. Outside its frame the result is its minimum, of a label map 0.

    Args:
        field: from :func:`total_field` or read from a file.
        image: in the physical space of the moving image.
        nearest: for label maps.

    Raises:
        ImageError: field and image have different numbers of axes, show different planes, or do not meet; the image is
            a picture where the field leads into millimetres, or the other way, or a picture of another size; only one
            of the image and the moving one has a position, or neither has and their grids differ.
    """
    if len(image.geometry.shape) != len(field.geometry.shape):
        raise ImageError(
            f"a {len(field.geometry.shape)}-D field and a {len(image.geometry.shape)}-D image; expected "
            "the same; take a slice of the volume"
        )
    planes = (field.geometry.plane, image.geometry.plane)
    if all(planes) and planes[0] != planes[1]:
        raise ImageError(f"the field is {planes[0]}, the image {planes[1]}; expected one plane")
    made_for, given = field.moving, MovingFrame.of(image.geometry)
    if made_for is not None and (what_to_do := _mend(made_for, image.geometry)):
        raise ImageError(f"the field leads into {made_for}, the image is {given}; {what_to_do}")
    there = _grid(field.geometry.shape) + field.displacement.double().numpy()
    matrix = np.linalg.inv(image.geometry.matrix()) @ field.geometry.matrix()
    points = _map_points(matrix, there)
    if not _inside(np.moveaxis(points, 0, -1), given.shape).any():
        raise ImageError("no part of the image falls on the field's grid; check that it shows the moving scan")
    return _sample_points(image.array, points, nearest=nearest, background=0.0 if image.labels else None)


def _mend(made_for: MovingFrame, given: Geometry) -> str | None:
    """What brings an image to the frame that a field leads into; None where it lies there."""
    as_picture = "bring it to those pixels, as a picture"
    if made_for.physical != given.physical:
        return "give it its millimetres" if made_for.physical else as_picture
    if not made_for.physical:
        return None if made_for.shape == given.shape else as_picture
    if made_for.positioned is None:
        return None
    if given.positioned if made_for.positioned else _is_unplaced(made_for, given):
        return None
    return "where both have the same pixels, copy that scan's header (spacing and position) to the image"


def _is_unplaced(frame: MovingFrame, given: Geometry) -> bool:
    """Whether a grid is that of a scan without a position."""
    if given.shape != frame.shape:
        return False
    if frame.spacing is not None and not np.allclose(given.spacing, frame.spacing, rtol=1e-3, atol=0):
        return False
    # What ITK saves of such a scan has a position: where it, as we do, took the scan to begin.
    pixels = Geometry.picture(given.shape)
    return not given.positioned or (
        np.allclose(given.origin, pixels.origin, atol=1e-3)
        and np.allclose(given.direction, pixels.direction, atol=1e-3)
    )
