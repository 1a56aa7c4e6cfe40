"""The one verb: ``fuse(fixed, moving) -> FusionResult``."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from bsafusion import weights
from bsafusion.datasets import TASKS
from bsafusion.deformation import DeformationField, identity_grid, jacobian_determinant
from bsafusion.image import Image, ImageError, Modality, luma_of
from bsafusion.io import PixelType, atomic_folder, read_image, write_deformation, write_image, write_json
from bsafusion.metrics import head_mask
from bsafusion.models.bsafusion import BSAFusion, Output
from bsafusion.models.representation import MODALITIES
from bsafusion.preprocessing import (
    apply_field,
    fit_intensity,
    match_grids,
    recolour,
    resample_to_grid,
    split_colour,
    total_field,
)
from bsafusion.report import Evidence, checkerboard, deformed_grid, describe, overview, verdict
from bsafusion.report_page import render

Array = NDArray[np.float32]
AUTO = "auto"
MR_MR = "mr-mr"  # two MR contrasts: reported where found, not a task to ask for


class RequestError(ValueError):
    """The request cannot be carried out as it was put."""


@dataclass(frozen=True)
class Model:
    """A network with the record of its weights, on a device; load once, fuse often."""

    network: BSAFusion
    record: weights.WeightsRecord
    device: str


def load_model(name: str = weights.DEFAULT, *, device: str = "cpu") -> Model:
    """Load shipped weights by name, or a ``.safetensors`` file with its record.

    Raises:
        weights.WeightsError: there are no such weights, or the file is damaged.
        RequestError: the device is not there.
    """
    check_device(device)
    network, record = weights.load(name, device=device)
    return Model(network, record, device)


def check_device(device: str) -> None:
    """Raise :class:`RequestError` for a device that is not there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.split(":")[0], False):
        there = ", ".join(d for d, is_there in available.items() if is_there)
        raise RequestError(f"device {device!r} is not there; expected one of {there}")


@dataclass(frozen=True, eq=False)
class FusionResult:
    """Everything that one fusion gives, with its evidence.

    Attributes:
        fused: ``C H W`` in [0, 1] on the fixed grid; RGB where the moving image is RGB.
        aligned: ``C H W``, the moving image's own values and colours on the fixed grid.
        field: from fixed to moving physical points; carries any other image of the moving scan along.
        expected_error: ``H W``, pixels, the network's own estimate of the field's error; None for the paper preset.
        status: ``ok`` or ``suspect``; then ``reasons`` says why.
        report: the content of ``report.json``.
    """

    fixed: Image
    moving: Image
    fused: Array
    aligned: Array
    field: DeformationField
    expected_error: Array | None
    evidence: Evidence
    status: str
    reasons: list[str]
    report: dict[str, Any]
    moving_on_fixed_grid: Array
    displacement: torch.Tensor  # 2 H W, voxels of the fixed grid, without the grids' own placement

    def _panel(self, image: Image, array: Array) -> Array:
        unit = np.clip(fit_intensity(image).to_unit(array), 0, 1)
        return np.repeat(unit, 3, axis=0) if len(unit) == 1 else unit

    @cached_property
    def panels(self) -> list[tuple[str, Array]]:
        """What the overview shows, each ``3 H W`` in [0, 1]."""
        fixed = self._panel(self.fixed, self.fixed.array)
        aligned = self._panel(self.moving, self.aligned)
        fused = np.repeat(self.fused, 3, axis=0) if len(self.fused) == 1 else self.fused
        return [
            ("fixed", fixed),
            ("moving, as it came", self._panel(self.moving, self.moving_on_fixed_grid)),
            ("moving, aligned", aligned),
            ("fused", fused),
            ("checkerboard of fixed and aligned", checkerboard(fixed, aligned)),
            ("deformed grid", deformed_grid(self.displacement, max(max(self.displacement.shape) // 16, 4))),
        ]

    def save(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write the result folder, whole or not at all; returns it.

        ``fused.png``, ``aligned.png``, ``deformation.nii.gz``, ``overview.png``, ``report.html`` and ``report.json``;
        where the fixed image has millimetres also ``fused.nii.gz`` and ``aligned.nii.gz`` with its geometry and the
        moving image's values.

        Raises:
            FileExistsError: ``out`` exists and holds something else than a result, or may not be overwritten.
        """
        sixteen = "uint16" in (self.fixed.dtype, self.moving.dtype)
        with atomic_folder(out, overwrite=overwrite) as folder:
            write_image(folder / "fused.png", self.fused, value_range=(0, 1), dtype="uint16" if sixteen else "uint8")
            spread, depth = _picture_range(self.moving)
            write_image(folder / "aligned.png", self.aligned, value_range=spread, dtype=depth)
            if self.fixed.geometry.physical:
                for name, array, colours in (("fused", self.fused, (0.0, 1.0)), ("aligned", self.aligned, spread)):
                    write_image(
                        folder / f"{name}.nii.gz",
                        array,
                        value_range=colours if len(array) == 3 else None,
                        geometry=self.fixed.geometry,
                    )
            write_deformation(folder / "deformation.nii.gz", self.field)
            overview(self.panels, self.status, self.reasons).save(folder / "overview.png")
            page = render(self.report, self.panels, self.expected_error)
            (folder / "report.html").write_text(page, encoding="utf-8")
            write_json(folder / "report.json", self.report)
        return Path(out)


def check_task(task: str) -> None:
    """Raise :class:`RequestError` for an unknown task."""
    if task not in (*TASKS, AUTO):
        raise RequestError(f"unknown task {task!r}; expected {', '.join(TASKS)} or {AUTO}")


def read_input(image: str | Path | Image, role: Literal["fixed", "moving"], *, slice_index: int | None = None) -> Image:
    """Read an input unless it is an :class:`Image` already; errors name its role. An unlabelled fixed image is MRI."""
    if not isinstance(image, Image):
        try:
            image = read_image(image, slice_index=slice_index)
        except ImageError as error:
            raise ImageError(f"{role} image: {error}") from error
    return image if role == "moving" or image.modality != Modality.UNKNOWN else replace(image, modality=Modality.MRI)


def fuse(
    fixed: str | Path | Image,
    moving: str | Path | Image,
    *,
    task: str = AUTO,
    model: Model | None = None,
) -> FusionResult:
    """Align ``moving`` to ``fixed`` and fuse both.

    Args:
        fixed: the image whose grid everything lands on (MRI), a file or an :class:`Image`.
        moving: the image to be aligned (CT, PET or SPECT).
        task: ``ct-mri``, ``pet-mri``, ``spect-mri``; ``auto`` takes the modality from the file, else asks the network.
            It is recorded, not needed: one network does all three.
        model: from :func:`load_model`; the shipped default weights when left out.

    Raises:
        ImageError: an input cannot be used.
        RequestError: an unknown task.
    """
    check_task(task)
    fixed, moving = read_input(fixed, "fixed"), read_input(moving, "moving")
    if len(fixed.array) == 3:
        raise ImageError(
            f"fixed image {fixed.source} is in colour; expected a grey one (MRI); swap the two images or convert it"
        )
    model = model or load_model()
    match = match_grids(fixed.geometry, moving.geometry)
    shape = fixed.geometry.shape
    on_grid = resample_to_grid(moving.array, match, shape)
    luma_fixed = _unit_luma(fixed, fixed.array)
    luma_moving = _unit_luma(moving, on_grid)
    if float(np.ptp(luma_moving)) == 0:
        raise ImageError(
            f"{moving.source}: nothing of it but background falls on the fixed grid ({match.note}); check the positions"
        )
    tensors = (torch.from_numpy(a)[None, None].to(model.device) for a in (luma_fixed, luma_moving))
    out = model.network.predict(*tensors)
    displacement = out.alignment.displacement[0].float().cpu()
    field = total_field(displacement, match, fixed.geometry, moving.geometry)
    aligned = apply_field(field, moving)
    fused = out.fused[0].float().cpu()
    if len(moving.array) == 3:
        unit = torch.from_numpy(np.clip(fit_intensity(moving).to_unit(aligned), 0, 1).astype(np.float32))
        _, chroma = split_colour(unit)
        fused = recolour(fused, chroma)
    evidence = measure_evidence(out, luma_fixed)
    status, reasons = verdict(evidence, max(shape))
    chosen, how = _task(task, moving, out)
    options = {
        "task": chosen,
        "task_from": how,
        "weights": model.record.name,
        "weights_sha256": model.record.sha256,
        "preset": model.record.preset,
        "device": model.device,
        "threads": torch.get_num_threads() if model.device == "cpu" else None,
    }
    report = describe(
        fixed=fixed,
        moving=moving,
        match=match,
        evidence=evidence,
        status=status,
        reasons=reasons,
        options=options,
        versions=versions(),
    )
    error = out.alignment.expected_error
    return FusionResult(
        fixed=fixed,
        moving=moving,
        fused=fused.clamp(0, 1).numpy(),
        aligned=aligned,
        field=field,
        expected_error=None if error is None else error[0, 0].float().cpu().numpy(),
        evidence=evidence,
        status=status,
        reasons=reasons,
        report=report,
        moving_on_fixed_grid=on_grid,
        displacement=displacement,
    )


def _picture_range(image: Image) -> tuple[tuple[float, float], PixelType]:
    """The values that become black and white in ``aligned.png``, and its pixel type.

    A picture keeps its own values. A scan's stored type says nothing about its values (a CT of unsigned integers holds
    negative Hounsfield units), so it is shown between the limits that the network sees.
    """
    largest = {"uint8": 255.0, "uint16": 65535.0}.get(image.dtype, 0.0)
    picture = len(image.array) == 3 or not image.geometry.physical
    if picture and image.array.min() >= 0 and image.array.max() <= largest:
        return (0.0, largest), "uint8" if image.dtype == "uint8" else "uint16"
    scaling = fit_intensity(image)
    return (scaling.low, scaling.high), "uint8"


def versions() -> dict[str, str]:
    """Of this package and of what its numbers depend on."""
    names = ("bsafusion", "torch", "numpy", "SimpleITK", "nibabel", "pydicom", "pillow")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def _unit_luma(image: Image, array: Array) -> Array:
    """Luminance ``H W`` in [0, 1] of an array in the units of ``image``."""
    return np.clip(luma_of(fit_intensity(image).to_unit(array)), 0, 1).astype(np.float32)


def _task(task: str, moving: Image, out: Output) -> tuple[str, str]:
    """The task and where it comes from."""
    if task != AUTO:
        return task, "request"
    for name, modality in TASKS.items():
        if moving.modality == modality:
            return name, "file"
    if moving.modality == Modality.MRI:
        return MR_MR, "file"
    odds = out.representation.logits[1][0].float().softmax(0)
    index = int(odds.argmax())
    name = MR_MR if MODALITIES[index] == Modality.MRI else f"{MODALITIES[index]}-mri"
    return name, f"network ({float(odds[index]):.0%} sure)"


def measure_evidence(out: Output, luma_fixed: Array) -> Evidence:
    """The evidence of one network output (batch of one) for a fixed luminance ``H W`` in [0, 1]."""
    alignment = out.alignment
    displacement = alignment.displacement.float().cpu()
    mask = torch.from_numpy(head_mask(luma_fixed * 255))
    shape = (mask.shape[0], mask.shape[1])
    size = displacement[0].norm(dim=0)
    partner = identity_grid(shape, displacement) + displacement[0]
    limits = torch.tensor(shape, dtype=partner.dtype).view(2, 1, 1) - 1
    outside = ((partner < -0.5) | (partner > limits + 0.5)).any(0)

    def inside(values: torch.Tensor | None) -> float | None:
        return None if values is None else float(values[0, 0].float().cpu()[mask].mean())

    before, after = alignment.similarity or (None, None)
    return Evidence(
        similarity_before=inside(before),
        similarity_after=inside(after),
        expected_error=inside(alignment.expected_error),
        displacement_mean=float(size[mask].mean()),
        displacement_max=float(size[mask].max()),
        folded_share=float((jacobian_determinant(displacement) <= 0).float().mean()),
        outside_share=float(outside[mask].float().mean()),
    )
