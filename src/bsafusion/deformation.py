"""Displacement fields: one convention, one ``warp``, one ``compose``, one ``invert``, one ``resize_field``.

The convention, used everywhere inside the package, in 2-D and 3-D:

- A displacement field ``u`` is *pull-back*: it lives on the fixed grid and says where to look in the moving
  image, ``aligned(x) = moving(x + u(x))``.
- It is measured in voxels of its own grid; its components are ordered like the tensor's spatial axes:
  ``(y, x)`` in 2-D, ``(z, y, x)`` in 3-D. Only files hold ``(x, y[, z])`` in LPS mm (see
  ``io.write_deformation``).
- Voxel *centres* are the samples and the corner voxels' centres are the ends of the grid
  (``align_corners=True`` in torch's words).
- Shapes are written ``B C *S`` for images and ``B D *S`` for fields, with ``D == len(S)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bsafusion.image import PLANE_NORMALS, Geometry

Mode = Literal["bilinear", "nearest"]
Padding = Literal["border", "zeros"]


def identity_grid(shape: tuple[int, ...], like: Tensor, *, centred: bool = False) -> Tensor:
    """Voxel coordinates of a grid, ``D *S``, from its first voxel or its centre, with dtype and device of ``like``."""
    axes = [torch.arange(n, dtype=like.dtype, device=like.device) - ((n - 1) / 2 if centred else 0) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def _check_field(displacement: Tensor, name: str = "displacement") -> tuple[int, ...]:
    spatial = tuple(displacement.shape[2:])
    if len(spatial) not in (2, 3) or displacement.shape[1] != len(spatial):
        raise ValueError(
            f"{name} has shape {tuple(displacement.shape)}; expected B 2 H W or B 3 D H W: "
            "one component per spatial axis"
        )
    return spatial


def sample(image: Tensor, points: Tensor, *, mode: Mode = "bilinear", padding: Padding = "border") -> Tensor:
    """The values of ``image`` at ``points``.

    Args:
        image: ``B C *S_in``.
        points: ``B D *S``, voxel coordinates of ``image`` in tensor axis order.
        mode: ``bilinear`` (trilinear in 3-D) or ``nearest``.
        padding: outside the image repeat its ``border`` or return ``zeros``. As in ITK an image ends half a voxel
            beyond the centres of its outer voxels; up to there both repeat the border.

    Returns:
        ``B C *S``.
    """
    spatial = _check_field(points, "points")
    if image.dim() != points.dim() or image.shape[0] != points.shape[0]:
        raise ValueError(
            f"image {tuple(image.shape)} and points {tuple(points.shape)} do not belong together: "
            "expected the same batch size and the same number of spatial axes"
        )
    if not image.is_floating_point():
        raise ValueError(f"image holds {image.dtype}; expected floating point: convert it (labels too) and use nearest")
    sizes = image.shape[2:]
    # grid_sample wants (x, y[, z]) in [-1, 1]; an axis of one voxel has only the coordinate 0.
    unit = [points[:, d] * (2.0 / max(sizes[d] - 1, 1)) - 1.0 for d in reversed(range(len(spatial)))]
    grid = torch.stack(unit, dim=-1)
    # In half precision coordinates would be off by pixels.
    wide = torch.promote_types(torch.promote_types(image.dtype, grid.dtype), torch.float32)
    grid = grid.to(wide)
    if image.device.type == "mps":  # where older versions of torch lack the border
        values = F.grid_sample(image.to(wide), grid.clamp(-1, 1), mode=mode, align_corners=True)
    else:
        values = F.grid_sample(image.to(wide), grid, mode=mode, padding_mode="border", align_corners=True)
    if padding == "zeros":
        values = values.masked_fill(~inside_frame(points, tuple(sizes)), 0)
    return values.to(image.dtype)


def inside_frame(points: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Whether ``points`` ``B D *N``, voxel coordinates, lie in a grid of this ``shape``: ``B 1 *N``, bool.

    A grid ends half a voxel beyond its outer voxel centres.
    """
    reach = 0.5 + 1e-3  # rounding in single precision must not cut the border off
    ends = points.new_tensor(shape).view(1, -1, *[1] * (points.dim() - 2)) - 1 + reach
    return ((points >= -reach) & (points <= ends)).all(dim=1, keepdim=True)


def warp(image: Tensor, displacement: Tensor, *, mode: Mode = "bilinear", padding: Padding = "border") -> Tensor:
    """Pull ``image`` back through a displacement field: ``result(x) = image(x + u(x))``.

    Args:
        image: ``B C *S_in``; may be larger or smaller than the field's grid.
        displacement: ``B D *S``, voxels.
        mode: ``nearest`` for label maps.
        padding: see :func:`sample`.

    Returns:
        ``B C *S``, on the grid of the field.

    Raises:
        ValueError: the shapes do not belong together.
    """
    shape = _check_field(displacement)
    displacement = displacement.to(torch.promote_types(displacement.dtype, torch.float32))
    return sample(image, identity_grid(shape, displacement) + displacement, mode=mode, padding=padding)


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """The field of ``x -> x + inner(x)`` followed by ``y -> y + outer(y)``.

    ``warp(image, compose(u, v)) == warp(warp(image, u), v)`` up to interpolation:
    ``compose(u, v)(x) = v(x) + u(x + v(x))``. Both ``B D *S`` on one grid.

    Raises:
        ValueError: they are on different grids.
    """
    if outer.shape[2:] != inner.shape[2:]:
        raise ValueError(
            f"fields on grids {tuple(outer.shape[2:])} and {tuple(inner.shape[2:])}; expected both on one: "
            "bring one to the grid of the other (resize_field)"
        )
    return inner + warp(outer, inner)


def integrate(velocity: Tensor, squarings: int) -> Tensor:
    """The displacement after unit time in a stationary velocity field, by scaling and squaring.

    ``B D *S`` -> ``B D *S``, voxels. The field is scaled by ``2 ** -squarings`` and composed with itself that many
    times (Arsigny et al., MICCAI 2006); with none it is taken as the displacement itself.
    """
    displacement = velocity * 0.5**squarings
    for _ in range(squarings):
        displacement = compose(displacement, displacement)
    return displacement


def invert(displacement: Tensor, *, tolerance: float | None = 1e-3, iterations: int = 30) -> Tensor:
    """The field ``v`` with ``compose(u, v) = 0``, by the fixed-point iteration ``v <- -u(x + v)``.

    ``B D *S`` -> ``B D *S``. Converges where the field does not fold and is contracting (Chen et al., Med. Phys. 2008).

    Args:
        tolerance: voxels; stops when no component changes by more. With None all iterations are made, and the device
            is never waited for.
        iterations: at most.
    """
    inverse = -displacement
    for _ in range(iterations):
        last, inverse = inverse, -warp(displacement, inverse)
        if tolerance is not None and float((inverse - last).detach().abs().max()) <= tolerance:
            break
    return inverse


def resize_field(displacement: Tensor, *, shape: tuple[int, ...]) -> Tensor:
    """Bring a field to a grid of another size over the same extent; its values become voxels of that grid.

    Corner voxel centres stay on corner voxel centres, so a field linear in x is reproduced exactly.
    """
    spatial = _check_field(displacement)
    if len(shape) != len(spatial):
        raise ValueError(f"shape {shape} has {len(shape)} axes; the field has {len(spatial)}")
    if tuple(shape) == spatial:
        return displacement
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    resized = F.interpolate(displacement, size=shape, mode=mode, align_corners=True)
    factors = [(new - 1) / max(old - 1, 1) for new, old in zip(shape, spatial, strict=True)]
    if len(set(factors)) == 1:
        return resized * factors[0]
    return torch.stack([resized[:, axis] * factor for axis, factor in enumerate(factors)], dim=1)


def lengths(displacement: Tensor) -> Tensor:
    """How far each voxel is moved: ``B D *S`` -> ``B 1 *S``, voxels.

    Not for gradients, which have no value at 0. torch's norm over a few planes is two hundred times slower on a CPU.
    """
    return displacement.square().sum(1, keepdim=True).sqrt()


def roughness(displacement: Tensor) -> Tensor:
    """Mean squared difference of neighbouring displacements of each field (the diffusion regulariser).

    ``B 2 H W`` -> ``B``, voxels squared.
    """
    down, right = (displacement.diff(dim=axis).square().mean((1, 2, 3)) for axis in (2, 3))
    return down + right


def affine_field(matrix: Tensor, *, shape: tuple[int, ...]) -> Tensor:
    """The displacement field of an affine map about the centre of the grid.

    Args:
        matrix: ``B D D+1``; with ``c`` the grid's centre, ``x`` goes to ``c + A (x - c) + t``, in voxels.
        shape: the grid ``*S``.

    Returns:
        ``B D *S``.
    """
    dimensions = matrix.shape[1]
    offset = identity_grid(shape, matrix, centred=True)
    linear = matrix[:, :, :dimensions] - torch.eye(dimensions, dtype=matrix.dtype, device=matrix.device)
    moved = torch.einsum("bij,j...->bi...", linear, offset)
    return moved + matrix[:, :, dimensions].view(-1, dimensions, *([1] * dimensions))


def jacobian_determinant(displacement: Tensor) -> Tensor:
    """Determinant of the Jacobian of ``x -> x + u(x)`` by central differences (one-sided at the border).

    ``B D *S`` -> ``B *S``. 1 where the map keeps volume, at most 0 where it folds.
    """
    shape = _check_field(displacement)
    dimensions = len(shape)
    columns = [  # along an axis of one voxel nothing changes
        torch.gradient(displacement, dim=axis)[0] if displacement.shape[axis] > 1 else torch.zeros_like(displacement)
        for axis in range(2, 2 + dimensions)
    ]
    jacobian = torch.stack(columns, dim=-1).movedim(1, -2)  # B *S D(component) D(axis)
    identity = torch.eye(dimensions, dtype=displacement.dtype, device=displacement.device)
    determinant: Tensor = torch.linalg.det(jacobian + identity)
    return determinant


@dataclass(frozen=True)
class MovingFrame:
    """The kind of grid that a field leads into: one with millimetres, or a picture, whose points are its own pixels.

    Attributes:
        physical: whether it has millimetres.
        shape: its samples per axis, tensor order.
        positioned: as of its :class:`Geometry`; None for a picture, and where a field's file does not say.
        spacing: mm, ITK order, of a grid without a position: with the shape all that tells it from another one.
        across: where a positioned slice lies along the normal of its plane, LPS mm.
    """

    physical: bool
    shape: tuple[int, ...]
    positioned: bool | None = None
    spacing: tuple[float, ...] | None = None
    across: float | None = None

    @classmethod
    def of(cls, geometry: Geometry) -> MovingFrame:
        if not geometry.physical:
            return cls(False, geometry.shape)
        if not geometry.positioned:
            return cls(True, geometry.shape, False, spacing=geometry.spacing)
        return cls(True, geometry.shape, True, across=_centre_across(geometry))

    def __str__(self) -> str:
        size = " x ".join(str(n) for n in reversed(self.shape))
        if not self.physical:
            return f"a picture of {size} pixels"
        spacing = f", {' x '.join(f'{mm:.4g}' for mm in self.spacing)} mm each" if self.spacing else ""
        place = {None: "", True: " with a position", False: " without a position"}[self.positioned]
        return f"a scan in millimetres ({size}{spacing}){place}"


def _centre_across(geometry: Geometry) -> float | None:
    """LPS mm along the normal of a slice's plane to its centre; None where its file does not say."""
    if geometry.plane is None or geometry.placement is None:
        return None
    x_step, y_step, _, first = geometry.placement[PLANE_NORMALS[geometry.plane]]
    height, width = geometry.shape
    return round(first + x_step * (width - 1) / 2 + y_step * (height - 1) / 2, 3)


@dataclass(frozen=True)
class DeformationField:
    """A displacement field with the geometry of the grid it lives on.

    Attributes:
        displacement: ``D *S`` float32 on the CPU, pull-back, in voxels of the grid, components in tensor axis
            order.
        geometry: of the fixed grid. The field maps a physical point of the fixed image to the physical point
            of the moving image that shows the same anatomy.
        moving: what grid the moving image had, where that is known.
    """

    displacement: Tensor
    geometry: Geometry
    moving: MovingFrame | None = None

    def __post_init__(self) -> None:
        _check_field(self.displacement[None])
        if tuple(self.displacement.shape[1:]) != tuple(self.geometry.shape):
            raise ValueError(
                f"a field of shape {tuple(self.displacement.shape)} does not lie on a grid of shape "
                f"{tuple(self.geometry.shape)}; expected {(len(self.geometry.shape), *self.geometry.shape)}"
            )
        if self.displacement.dtype != torch.float32:
            raise ValueError(f"a field holds float32 values, not {self.displacement.dtype}; convert it first")
        if not bool(torch.isfinite(self.displacement).all()):
            raise ValueError("the field holds NaN or infinite displacements; check the program that made it")
