"""Image pairs that ship with the package, each with the misalignment that is known for it.

``scripts/make_samples.py`` makes the pictures; sources and licences stand in ``samples.json`` and ``NOTICE``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

_SPLINE_ORDER = 3


@dataclass(frozen=True, eq=False)
class KnownTransform:
    """A deformation given by its parameters, in the pull-back convention of the package.

    With ``original`` aligned with the fixed image, ``moving(x) = original(x + p(x))``, where

        ``x + p(x) = scale * R(rotation) (x - centre) + centre + translation + b(x)``.

    ``R`` turns the x axis (columns) towards the y axis (rows): ``(x, y) -> (x cos - y sin, x sin + y cos)``.
    ``b`` is a uniform cubic B-spline whose mesh of ``N - 3`` by ``M - 3`` cells spans the image from the
    centre of the first pixel to that of the last: the parametrisation of ITK's ``BSplineTransform`` (after
    Rueckert et al. 1999, doi:10.1109/42.796284).

    Attributes:
        rotation: degrees.
        scale: dimensionless, positive.
        translation: ``(y, x)``, pixels.
        centre: ``(y, x)``, pixels; pixel centres have whole numbers.
        control: ``2 N M``, the B-spline's coefficients, ``y`` component first, pixels; ``None``: ``b = 0``.

    Raises:
        ValueError: if ``scale`` is not positive or ``control`` has another shape.
    """

    rotation: float = 0.0
    scale: float = 1.0
    translation: tuple[float, float] = (0.0, 0.0)
    centre: tuple[float, float] = (0.0, 0.0)
    control: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale is {self.scale}; expected a positive number: try 1.0 for none")
        if self.control is not None and (
            self.control.ndim != 3 or self.control.shape[0] != 2 or min(self.control.shape[1:]) <= _SPLINE_ORDER
        ):
            raise ValueError(
                f"control has shape {self.control.shape}; expected 2 N M with N and M of 4 or more: "
                "try None for no elastic part"
            )

    def displacement(self, shape: tuple[int, int]) -> NDArray[np.float64]:
        """The field ``p`` with ``moving(x) = original(x + p(x))``.

        Args:
            shape: ``(H, W)`` of the sample's images.

        Returns:
            ``2 H W``, components in the order ``(y, x)``, pixels.

        Raises:
            ValueError: if ``shape`` is not two numbers of 2 or more.
        """
        if len(shape) != 2 or min(shape) < 2:
            raise ValueError(f"shape is {shape}; expected (height, width), 2 pixels or more each: try fixed.shape[:2]")
        grid = np.indices(shape, dtype=np.float64)
        centre = np.reshape(self.centre, (2, 1, 1))
        cosine, sine = np.cos(np.radians(self.rotation)), np.sin(np.radians(self.rotation))
        linear = self.scale * np.array([[cosine, sine], [-sine, cosine]])
        points = np.einsum("ij,jhw->ihw", linear, grid - centre) + centre + np.reshape(self.translation, (2, 1, 1))
        field: NDArray[np.float64] = points - grid
        return field if self.control is None else field + _spline(self.control, shape)


@dataclass(frozen=True)
class Sample:
    """One pair of images of the same slice.

    Attributes:
        id: name, unique among the samples.
        task: ``ct-mri``, ``pet-mri``, ``spect-mri`` or ``mr-mr``.
        fixed: picture file.
        moving: picture file, misaligned.
        original: picture file of the moving image before it was deformed, on the fixed grid.
        origin: where the pair comes from and what was done to it.
        licence: terms of the sources.
        known: the transform that turns ``original`` into ``moving``.
    """

    id: str
    task: str
    fixed: Path
    moving: Path
    original: Path
    origin: str
    licence: str
    known: KnownTransform


def load_samples() -> list[Sample]:
    """The samples in the order of ``samples.json``, with absolute paths."""
    folder = Path(__file__).resolve().parent
    records = json.loads((folder / "samples.json").read_text(encoding="utf-8"))["samples"]
    return [_sample(record, folder) for record in records]


def _sample(record: dict[str, Any], folder: Path) -> Sample:
    return Sample(
        id=record["id"],
        task=record["task"],
        fixed=folder / record["fixed"]["file"],
        moving=folder / record["moving"]["file"],
        original=folder / record["original"]["file"],
        origin=record["origin"],
        licence=record["licence"],
        known=_known(record["known"]),
    )


def _known(record: dict[str, Any]) -> KnownTransform:
    control = record["control"]
    return KnownTransform(
        rotation=record["rotation"],
        scale=record["scale"],
        translation=(record["translation"][0], record["translation"][1]),
        centre=(record["centre"][0], record["centre"][1]),
        control=None if control is None else np.asarray(control, dtype=np.float64),
    )


def _spline(control: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.float64]:
    """The B-spline ``b`` of :class:`KnownTransform`, ``2 H W``."""
    # The first coefficient lies one cell before the first pixel: the spline needs four on each axis.
    axes = [np.linspace(1.0, n - 2.0, size) for n, size in zip(control.shape[1:], shape, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"))
    # Coefficients, not samples: prefilter=False makes scipy evaluate the spline instead of interpolating.
    return np.stack(
        [
            ndimage.map_coordinates(component, points, order=_SPLINE_ORDER, mode="mirror", prefilter=False)
            for component in control
        ]
    )
