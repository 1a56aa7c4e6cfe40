"""What a fusion gives, and its folder of files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bsafusion.canonical import canonical
from bsafusion.deformation import DeformationField
from bsafusion.evidence import Evidence
from bsafusion.files import REPORT, atomic_folder, write_json
from bsafusion.image import Image
from bsafusion.io import PixelType, write_deformation, write_image
from bsafusion.preprocessing import fit_intensity, white_level
from bsafusion.report import ALIGN_ONLY, checkerboard, deformed_grid, overview
from bsafusion.report_page import render
from bsafusion.request import FuseOptions

Array = NDArray[np.float32]

FILES = (
    *("fused.png", "fused.nii.gz", "aligned.png", "aligned.nii.gz"),
    *("deformation.nii.gz", "deformation_inverse.nii.gz"),
    *("overview.png", "report.html", REPORT),
)
"""What a result folder may hold; :func:`expected_files` says what one does."""


@dataclass(frozen=True, eq=False)
class FusionResult:
    """Everything that one fusion gives, with its evidence.

    Attributes:
        options: what was asked for.
        fused: ``C H W`` in [0, 1] on the fixed grid; RGB where the moving image is RGB or got a colour map, unless
            the blend is ``none``. None where nothing was to be fused.
        aligned: ``C H W``, the moving image's own values and colours on the fixed grid.
        field: from fixed to moving physical points; carries any other image of the moving scan along.
        inverse: from moving to fixed physical points, on the moving grid; carries what lies on the fixed image back.
        expected_error: ``H W``, pixels, the network's own estimate of the field's error; None for the paper preset and
            where nothing was aligned.
        status: ``ok`` or ``suspect``; then ``reasons`` says why.
        report: the content of ``report.json``.
    """

    fixed: Image
    moving: Image
    options: FuseOptions
    fused: Array | None
    aligned: Array
    field: DeformationField
    inverse: DeformationField
    expected_error: Array | None
    evidence: Evidence
    status: str
    reasons: list[str]
    report: dict[str, Any]
    moving_on_fixed_grid: Array
    displacement: torch.Tensor  # 2 H W, voxels of the fixed grid, without the grids' own placement

    def _panel(self, image: Image, array: Array) -> Array:
        return self._shown(np.clip(fit_intensity(image).to_unit(array), 0, 1))

    def _shown(self, picture: Array) -> Array:
        """``C H W`` on the fixed grid as ``3 H W`` on the one of :mod:`bsafusion.canonical`."""
        upright: Array = canonical(self.fixed.geometry).see(torch.from_numpy(picture)[None])[0].numpy()
        return np.repeat(upright, 3, axis=0) if len(upright) == 1 else upright

    @cached_property
    def panels(self) -> dict[str, tuple[str, Array]]:
        """What the overview shows, each a name and a picture ``3 H W`` in [0, 1], upright and with square pixels.

        ``fixed``, ``moving``, ``aligned``, ``fused``, ``checkerboard`` and ``grid``: without aligned and grid where
        alignment was skipped, without fused where only alignment was asked for.
        """
        fixed, aligned = self._panel(self.fixed, self.fixed.array), self._panel(self.moving, self.aligned)
        skipped = self.options.aligned
        panels = {
            "fixed": ("fixed", fixed),
            "moving": (
                "moving, taken as aligned" if skipped else "moving, as it came",
                self._panel(self.moving, self.moving_on_fixed_grid),
            ),
        }
        if not skipped:
            panels["aligned"] = ("moving, aligned", aligned)
        if self.fused is not None:
            panels["fused"] = (self.options.caption(), self._shown(self.fused))
        squares = f"checkerboard of fixed and {'moving' if skipped else 'aligned'}"
        panels["checkerboard"] = (squares, checkerboard(fixed, aligned))
        if not skipped:
            field = canonical(self.fixed.geometry).see_field(self.displacement[None])[0]
            panels["grid"] = ("deformed grid", deformed_grid(field, max(max(field.shape) // 16, 4)))
        return panels

    def save(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write the result folder, whole or not at all; returns it.

        ``fused.png``, ``aligned.png``, ``deformation.nii.gz`` and its inverse (``deformation_inverse.nii.gz``, from
        moving to fixed, on the moving grid), ``overview.png``, ``report.html`` and ``report.json``;
        where the fixed image has millimetres also ``fused.nii.gz`` and ``aligned.nii.gz`` with its geometry and the
        moving image's values; colours have 8 bit there, also where the pictures have 16, as NIfTI knows no others.
        Nothing fused where only alignment was asked for.

        Raises:
            FileExistsError: ``out`` exists and holds something else than a result, or may not be overwritten.
        """
        spread, depth = _picture_range(self.moving)
        pictures: list[tuple[str, Array, tuple[float, float], PixelType]] = [("aligned", self.aligned, spread, depth)]
        if self.fused is not None:
            pictures.append(("fused", self.fused, (0.0, 1.0), fused_depth(self.fixed, self.moving)))
        with atomic_folder(out, overwrite=overwrite, holds=FILES) as folder:
            for name, array, shown, kind in pictures:
                write_image(folder / f"{name}.png", array, value_range=shown, dtype=kind)
                if self.fixed.geometry.physical:
                    write_image(
                        folder / f"{name}.nii.gz",
                        array,
                        value_range=shown if len(array) == 3 else None,
                        geometry=self.fixed.geometry,
                    )
            write_deformation(folder / "deformation.nii.gz", self.field)
            write_deformation(folder / "deformation_inverse.nii.gz", self.inverse)
            sheet = overview(list(self.panels.values()), self.status, self.reasons, mode=self.options.mode)
            sheet.save(folder / "overview.png")
            error = None if self.expected_error is None else self._shown(self.expected_error[None])[0]
            page = render(self.report, self.panels, error)
            (folder / "report.html").write_text(page, encoding="utf-8")
            write_json(folder / REPORT, self.report)
        return Path(out)


def expected_files(report: dict[str, Any]) -> set[str]:
    """The names of the files of a result, by its report."""
    absent = set()
    if report["mode"] == ALIGN_ONLY:
        absent |= {"fused.png", "fused.nii.gz"}
    if report["inputs"]["fixed"]["spacing_mm"] is None:
        absent |= {"fused.nii.gz", "aligned.nii.gz"}
    return {*FILES} - absent


def _picture_range(image: Image) -> tuple[tuple[float, float], PixelType]:
    """The values that become black and white in ``aligned.png``, and its pixel type.

    A picture keeps its own values. A scan's stored type says nothing about its values (a CT of unsigned integers holds
    negative Hounsfield units), so it is shown between the limits that the network sees.
    """
    white = white_level(image)
    if white is not None:
        return (0.0, white), "uint8" if white == 255 else "uint16"
    scaling = fit_intensity(image)
    return (scaling.low, scaling.high), "uint8"


def fused_depth(fixed: Image, moving: Image) -> PixelType:
    """Of ``fused.png``: that of the deeper of both."""
    return "uint16" if "uint16" in (fixed.dtype, moving.dtype) else "uint8"
