"""The one verb: ``fuse(fixed, moving) -> FusionResult``."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from bsafusion import weights
from bsafusion.colour import check_hue, colourise, overlay, recolour, split_colour, steer
from bsafusion.datasets import TASKS
from bsafusion.deformation import DeformationField, jacobian_determinant
from bsafusion.files import atomic_folder, write_json
from bsafusion.image import Geometry, Image, ImageError, Modality, luma_of
from bsafusion.io import COLORMAPS, PixelType, read_colormap, read_image, write_deformation, write_image
from bsafusion.metrics import head_mask
from bsafusion.models.alignment import Alignment
from bsafusion.models.bsafusion import BSAFusion, How, Matched, Output
from bsafusion.models.representation import MODALITIES, Representation
from bsafusion.plain_fusion import FUSIONS
from bsafusion.preprocessing import (
    apply_field,
    fit_intensity,
    has_partner,
    inverse_field,
    match_grids,
    resample_to_grid,
    slices_apart,
    total_field,
    white_level,
)
from bsafusion.refinement import MOST_STEPS, Refinement
from bsafusion.report import (
    ALIGN_AND_FUSE,
    ALIGN_ONLY,
    FUSE_ONLY,
    Evidence,
    checkerboard,
    deformed_grid,
    describe,
    describe_trust,
    overview,
    verdict,
)
from bsafusion.report_page import render
from bsafusion.trust import Calibration, read_calibration

Array = NDArray[np.float32]
AUTO = "auto"
MR_MR = "mr-mr"  # two MR contrasts: reported where found, not a task to ask for
NETWORK, NO_COLORMAP = "network", "none"
CHOICES: dict[str, tuple[str, ...]] = {
    "fusion": (NETWORK, *FUSIONS),
    "blend": ("luminance", "alpha", "none"),
    "colormap": (NO_COLORMAP, *COLORMAPS),
}
"""The options of :class:`FuseOptions` that are names, and the names that they take, the default first."""
FILES = (
    *("fused.png", "fused.nii.gz", "aligned.png", "aligned.nii.gz"),
    *("deformation.nii.gz", "deformation_inverse.nii.gz"),
    *("overview.png", "report.html", "report.json"),
)
"""What a result folder may hold; :func:`expected_files` says what one does."""
CLIPPED = 0.5 / 255
"""Beyond [0, 1] by more than half a level of 8 bits, a channel counts as clipped; less is rounding."""


class RequestError(ValueError):
    """The request cannot be carried out as it was put."""


@dataclass(frozen=True)
class FuseOptions:
    """How a pair is aligned and its fused picture made; see ``docs/fusion.md`` and ``docs/refinement.md``.

    Attributes:
        fusion: how two luminances become one: ``network``, or a name of :data:`bsafusion.plain_fusion.FUSIONS`.
        blend: ``luminance``: the fused luminance in the hue of the moving image; ``alpha``: the moving image laid over
            the fixed one, without a fused luminance; ``none``: the fused luminance in grey.
        colormap: ``none``, or a name of :data:`bsafusion.io.COLORMAPS` for a grey moving image.
        weight_fixed: 0 the aligned image, 0.5 the fused picture as it is, 1 the fixed image; see :func:`colour.steer`.
        aligned: the images are aligned already: fuse them as given.
        align_only: make no fused picture.
        refine: steps of :class:`bsafusion.refinement.Refinement` after the network has aligned, 0 to 200.
        mirrored: align the mirror images as well and take the mean of both answers, in nearly twice the time.

    Raises:
        RequestError: an unknown name, a weight outside [0, 1], something else than a number or True and False where one
            belongs, or options of which one would have no effect.
    """

    fusion: str = NETWORK
    blend: str = "luminance"
    colormap: str = NO_COLORMAP
    weight_fixed: float = 0.5
    aligned: bool = False
    align_only: bool = False
    refine: int = 0
    mirrored: bool = False

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, np.generic):  # which JSON does not hold
                object.__setattr__(self, option.name, value.item())
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise RequestError(f"unknown {name} {value!r}; expected one of {', '.join(known)}")
        for name in ("aligned", "align_only", "mirrored"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise RequestError(f"{name} is {value!r}; expected True or False")
        if not _is_number(self.weight_fixed) or not 0 <= self.weight_fixed <= 1:
            told = f"{self.weight_fixed:g}" if _is_number(self.weight_fixed) else repr(self.weight_fixed)
            raise RequestError(
                f"a weight of {told} for the fixed image; expected 0 (the moving image alone) to 1 "
                "(the fixed image alone), 0.5 for the balance that was trained"
            )
        if not _is_number(self.refine) or self.refine % 1 or not 0 <= self.refine <= MOST_STEPS:
            raise RequestError(
                f"{self.refine!r} steps of refinement; expected a whole number, 0 (none) to {MOST_STEPS}"
            )
        object.__setattr__(self, "weight_fixed", float(self.weight_fixed))
        object.__setattr__(self, "refine", int(self.refine))
        for asked, what in ((self.refine, "refine"), (self.mirrored, "mirror")):
            if asked and self.aligned:
                raise RequestError(
                    f"images that are aligned already are not moved, so there is nothing to {what}; "
                    "leave out one of both"
                )
        others = (option for option in fields(self) if option.name not in ("align_only", "refine", "mirrored"))
        if self.align_only and any(getattr(self, option.name) != option.default for option in others):
            raise RequestError(
                "nothing is to be fused, yet there are options of fusion or the images are said to be aligned; "
                "leave out one or the other"
            )
        if self.blend == "alpha" and self.fusion != NETWORK:
            raise RequestError(
                f"blend alpha lays one image over the other and has no use for the {self.fusion} fusion; choose blend "
                "luminance or none, or leave the fusion out"
            )
        if self.blend == "none" and self.colormap != NO_COLORMAP:
            raise RequestError(
                f"blend none is grey and would not show colour map {self.colormap}; leave one of them out"
            )

    @property
    def mode(self) -> str:
        """One of the keys of :data:`bsafusion.report.MODES`."""
        return ALIGN_ONLY if self.align_only else FUSE_ONLY if self.aligned else ALIGN_AND_FUSE

    @property
    def network_fuses(self) -> bool:
        """Whether the network's own fusion has a part in the result."""
        return bool(self.record()["fusion"] == NETWORK)

    def record(self) -> dict[str, Any]:
        """For the report; None for what had no part in the result."""
        unused: dict[str, None] = {}
        if self.align_only:
            unused = dict.fromkeys(("fusion", "blend", "colormap", "weight_fixed"))
        elif self.blend == "alpha":
            unused = {"fusion": None}
        return {**asdict(self), **unused}

    def caption(self) -> str:
        """The name of the fused picture, with what differs from the default."""
        parts = [
            "overlay" if self.blend == "alpha" else "grey" if self.blend == "none" else "",
            self.fusion if self.fusion != NETWORK else "",
            self.colormap if self.colormap != NO_COLORMAP else "",
            f"fixed at {self.weight_fixed:g}" if self.weight_fixed != 0.5 else "",
        ]
        told = ", ".join(part for part in parts if part)
        return f"fused ({told})" if told else "fused"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Model:
    """A network with the record of its weights, on a device; load once, fuse often.

    ``trust`` is the calibration of the verdict for these weights, if there is one, ``trust_note`` a word on it.
    """

    network: BSAFusion
    record: weights.WeightsRecord
    device: str
    trust: Calibration | None = None
    trust_note: str = "no calibration was loaded; only plain limits judge the result"


def load_model(name: str = weights.DEFAULT, *, device: str = "cpu") -> Model:
    """Load shipped weights by name, or a ``.safetensors`` file with its record.

    Raises:
        weights.WeightsError: there are no such weights, or the file is damaged.
        RequestError: the device is not there.
    """
    check_device(device)
    network, record = weights.load(name, device=device)
    trust, note = read_calibration(weights.find(name)[1], network)
    return Model(network, record, device, trust, note)


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
        unit = np.clip(fit_intensity(image).to_unit(array), 0, 1)
        return np.repeat(unit, 3, axis=0) if len(unit) == 1 else unit

    @cached_property
    def panels(self) -> dict[str, tuple[str, Array]]:
        """What the overview shows, each a name and a picture ``3 H W`` in [0, 1].

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
            fused = np.repeat(self.fused, 3, axis=0) if len(self.fused) == 1 else self.fused
            panels["fused"] = (self.options.caption(), fused)
        squares = f"checkerboard of fixed and {'moving' if skipped else 'aligned'}"
        panels["checkerboard"] = (squares, checkerboard(fixed, aligned))
        if not skipped:
            lines = deformed_grid(self.displacement, max(max(self.displacement.shape) // 16, 4))
            panels["grid"] = ("deformed grid", lines)
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
            pictures.append(("fused", self.fused, (0.0, 1.0), _fused_depth(self.fixed, self.moving)))
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
            page = render(self.report, self.panels, self.expected_error)
            (folder / "report.html").write_text(page, encoding="utf-8")
            write_json(folder / "report.json", self.report)
        return Path(out)


def expected_files(report: dict[str, Any]) -> set[str]:
    """The names of the files of a result, by its report."""
    absent = set()
    if report["mode"] == ALIGN_ONLY:
        absent |= {"fused.png", "fused.nii.gz"}
    if report["inputs"]["fixed"]["spacing_mm"] is None:
        absent |= {"fused.nii.gz", "aligned.nii.gz"}
    return {*FILES} - absent


def check_task(task: str) -> None:
    """Raise :class:`RequestError` for an unknown task."""
    if task not in (*TASKS, AUTO):
        raise RequestError(f"unknown task {task!r}; expected {', '.join(TASKS)} or {AUTO}")


def read_input(image: str | Path | Image, role: Literal["fixed", "moving"], *, slice_index: int | None = None) -> Image:
    """Read an input unless it is an :class:`Image` already; errors name its role. An unlabelled fixed image is MRI."""
    if not isinstance(image, str | Path | Image):
        raise TypeError(
            f"{role} image: a {type(image).__name__}; expected a file name or a bsafusion.Image; make one: "
            "bsafusion.Image(array, bsafusion.Geometry.picture(array.shape[1:]))"
        )
    if not isinstance(image, Image):
        try:
            image = read_image(image, slice_index=slice_index)
        except ImageError as error:
            raise ImageError(f"{role} image: {error}") from error
    if len(image.geometry.shape) != 2:
        raise ImageError(f"{role} image {image.source}: a volume of shape {image.geometry.shape}; expected a 2-D slice")
    return image if role == "moving" or image.modality != Modality.UNKNOWN else replace(image, modality=Modality.MRI)


def fuse(
    fixed: str | Path | Image,
    moving: str | Path | Image,
    *,
    task: str = AUTO,
    model: Model | None = None,
    fusion: str = NETWORK,
    blend: str = "luminance",
    colormap: str = NO_COLORMAP,
    weight_fixed: float = 0.5,
    aligned: bool = False,
    align_only: bool = False,
    refine: int = 0,
    mirrored: bool = False,
) -> FusionResult:
    """Align ``moving`` to ``fixed`` and fuse both.

    Args:
        fixed: the image whose grid everything lands on (MRI), a file or an :class:`Image`.
        moving: the image to be aligned (CT, PET or SPECT).
        task: ``ct-mri``, ``pet-mri``, ``spect-mri``; ``auto`` takes the modality from the file, else asks the network.
            It is recorded, not needed: one network does all three.
        model: from :func:`load_model`; the shipped default weights when left out.
        fusion, blend, colormap, weight_fixed, aligned, align_only, refine, mirrored: see :class:`FuseOptions`.

    Raises:
        ImageError: an input cannot be used.
        RequestError: an unknown task, options that make no sense, or that these weights cannot carry out.
        TypeError: an input is neither a file name nor an image, the model not a :class:`Model`.
    """
    options = FuseOptions(fusion, blend, colormap, weight_fixed, aligned, align_only, refine, mirrored)
    check_task(task)
    fixed, moving = read_input(fixed, "fixed"), read_input(moving, "moving")
    if len(fixed.array) == 3:
        raise ImageError(
            f"fixed image {fixed.source} is in colour; expected a grey one (MRI); swap the two images or convert it"
        )
    if len(moving.array) == 3 and options.colormap != NO_COLORMAP:
        raise ImageError(
            f"moving image {moving.source} has colours of its own; expected a grey one for colour map {colormap}; "
            "leave the colour map out"
        )
    model = load_model() if model is None else model
    if not isinstance(model, Model):
        raise TypeError(f"model: a {type(model).__name__}; expected what bsafusion.load_model(name) returns")
    check_options(model, options)
    match = match_grids(fixed.geometry, moving.geometry)
    apart = slices_apart(fixed, moving)
    if apart is not None and apart > 1:
        match = replace(match, note=f"{match.note} By their positions the two slices are {apart:.0f} mm apart.")
    shape = fixed.geometry.shape
    on_grid = resample_to_grid(moving.array, match, shape)
    luma_fixed = _unit_luma(fixed, fixed.array)
    luma_moving = _unit_luma(moving, on_grid)
    if float(np.ptp(luma_moving)) == 0:
        raise ImageError(
            f"{moving.source}: nothing of it but background falls on the fixed grid ({match.note}); check the positions"
        )
    pictures = (luma_fixed[None], _seen(moving, on_grid))
    tensors = (torch.from_numpy(picture)[None].to(model.device) for picture in pictures)
    grids = (match, fixed.geometry, moving.geometry)

    def carry(displacement: torch.Tensor) -> torch.Tensor:
        """Of the moving image itself: what was brought to the fixed grid ends where that does."""
        luma = _unit_luma(moving, apply_field(total_field(displacement[0].float().cpu(), *grids), moving))
        return torch.from_numpy(luma)[None, None].to(displacement.device)

    how = How(aligned_already=options.aligned, mirrored=options.mirrored)
    if options.refine:
        how["refine"] = Refinement(options.refine)
    out: Output | Matched
    if options.network_fuses:
        out = model.network.predict(*tensors, carry=carry, **how)
    else:
        out = model.network.predict_alignment(*tensors, **how)
    displacement = out.alignment.displacement[0].float().cpu()
    field, inverse = total_field(displacement, *grids), inverse_field(out.alignment.inverse[0].float(), *grids)
    carried = apply_field(field, moving)
    fused, colour = None, None
    if not options.align_only:
        drawn = out.fused[0, 0].float().cpu().numpy() if isinstance(out, Output) else None
        fused, colour = _picture(options, fixed, moving, carried, drawn)
    partner = has_partner(displacement, match, moving.geometry)
    luma_aligned = _unit_luma(moving, carried)
    evidence = measure_evidence(out, luma_fixed, luma_aligned, partner=partner, aligned_already=options.aligned)
    seen = _seen_as(out.representation)
    status, reasons = verdict(
        evidence,
        max(shape),
        trust=model.trust,
        fixed=fixed.modality,
        moving=moving.modality,
        seen=seen if moving.modality == Modality.UNKNOWN else None,
        one_file=fixed.sha256 is not None and fixed.sha256 == moving.sha256,
    )
    chosen, task_from = _task(task, fixed, moving, seen[1])
    note = model.trust_note
    unusual = [name for name, used in (("refinement", options.refine), ("mirror images", options.mirrored)) if used]
    if unusual and model.trust is not None:
        note += f"; fitted to results without {' or '.join(unusual)}"
    recorded = {
        "task": chosen,
        "task_from": task_from,
        **options.record(),
        "weights": model.record.name,
        "weights_sha256": model.record.sha256,
        "calibration_sha256": None if model.trust is None else model.trust.sha256,
        "preset": model.record.preset,
        "device": model.device,
        "threads": torch.get_num_threads() if model.device == "cpu" else None,
    }
    report = describe(
        fixed=fixed,
        moving=moving,
        match=match,
        evidence=evidence,
        trust=describe_trust(evidence, max(shape), trust=model.trust, note=note),
        status=status,
        reasons=reasons,
        mode=options.mode,
        colour=colour,
        options=recorded,
        refinement=_refinement(options.refine, out.alignment.refined),
        disagreement=_disagreement(out.alignment, luma_fixed),
        versions=versions(),
    )
    error = out.alignment.expected_error
    return FusionResult(
        fixed=fixed,
        moving=moving,
        options=options,
        fused=fused,
        aligned=carried,
        field=field,
        inverse=inverse,
        expected_error=None if error is None else error[0, 0].float().cpu().numpy(),
        evidence=evidence,
        status=status,
        reasons=reasons,
        report=report,
        moving_on_fixed_grid=on_grid,
        displacement=displacement,
    )


def check_options(model: Model, options: FuseOptions) -> None:
    """Raise :class:`RequestError` where the weights cannot do what is asked of the alignment."""
    if model.network.cfg.alignment.kind == "attention" and (options.refine or options.mirrored):
        lacks, leave = (
            ("has no descriptors to refine by", "the refinement")
            if options.refine
            else ("does not look at mirror images", "the mirror images")
        )
        raise RequestError(
            f"weights {model.record.name} are of the {model.record.preset} preset, which {lacks}; leave {leave} out, "
            "or choose weights of the default preset"
        )


def _refinement(steps: int, objective: tuple[torch.Tensor, torch.Tensor] | None) -> dict[str, float] | None:
    """For the report: how many steps, and what they made of their objective."""
    if objective is None:
        return None
    before, after = (round(float(value[0]), 5) for value in objective)
    return {"steps": steps, "objective_before": before, "objective_after": after}


def _disagreement(alignment: Alignment, luma_fixed: Array) -> float | None:
    """Mean inside the head of how far both answers are from their mean; None where the mirror images were not asked."""
    if alignment.disagreement is None:
        return None
    return float(alignment.disagreement[0, 0].float().cpu().numpy()[head_mask(luma_fixed * 255)].mean())


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


def _fused_depth(fixed: Image, moving: Image) -> PixelType:
    return "uint16" if "uint16" in (fixed.dtype, moving.dtype) else "uint8"


def _picture(
    options: FuseOptions, fixed: Image, moving: Image, aligned: Array, drawn: Array | None
) -> tuple[Array, dict[str, Any]]:
    """The fused picture ``C H W`` in [0, 1], and what the report says of its colour.

    ``aligned``: ``C H W``, values of ``moving`` on the fixed grid; ``drawn``: ``H W``, the network's fused luminance,
    None where the network does not fuse.
    """
    luma_fixed, luma_aligned = _unit_luma(fixed, fixed.array), _unit_luma(moving, aligned)
    if options.blend == "none" or (len(aligned) == 1 and options.colormap == NO_COLORMAP):
        source = luma_aligned[None]
    elif len(aligned) == 1:
        source = colourise(luma_aligned[None], read_colormap(options.colormap))
    else:
        source = np.clip(fit_intensity(moving).to_unit(aligned), 0, 1)
    if options.blend == "alpha":
        picture = overlay(luma_fixed[None], source, luma_aligned[None])
    else:
        luma = FUSIONS[options.fusion](luma_fixed, luma_aligned) if drawn is None else drawn
        picture = luma[None] if len(source) == 1 else recolour(luma[None], split_colour(source)[1])
    picture = steer(picture, luma_fixed[None], source, options.weight_fixed)
    clipped = np.clip(picture, 0, 1).astype(np.float32)
    colour: dict[str, Any] = {"blend": options.blend, "colormap": options.colormap}
    if len(picture) == 3:
        hue = check_hue(clipped, source, levels=np.iinfo(_fused_depth(fixed, moving)).max)
        colour["hue_error_median_deg"] = None if hue.error_median is None else round(hue.error_median, 3)
        colour["hue_lost_share"] = None if hue.lost_share is None else round(hue.lost_share, 5)
        colour["clipped_share"] = round(float((np.abs(picture - clipped) > CLIPPED).any(axis=0).mean()), 5)
    return clipped, colour


def versions() -> dict[str, str]:
    """Of this package and of what its numbers depend on."""
    names = ("bsafusion", "torch", "numpy", "SimpleITK", "nibabel", "pydicom", "pillow")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def _unit_luma(image: Image, array: Array) -> Array:
    """Luminance ``H W`` in [0, 1] of an array in the units of ``image``."""
    return np.clip(luma_of(fit_intensity(image).to_unit(array)), 0, 1).astype(np.float32)


def _seen(image: Image, array: Array) -> Array:
    """What the network sees of an array in the units of ``image``: luminance, and chroma of RGB, ``C H W``."""
    luma = _unit_luma(image, array)[None]
    if len(array) == 1:
        return luma
    unit = np.clip(fit_intensity(image).to_unit(array), 0, 1)
    return np.concatenate([luma, split_colour(unit)[1]]).astype(np.float32)


def _seen_as(representation: Representation) -> tuple[Modality, Modality]:
    """What the network takes the fixed and the moving image for."""
    fixed, moving = (Modality(MODALITIES[int(logits[0].argmax())]) for logits in representation.logits)
    return fixed, moving


def _task(task: str, fixed: Image, moving: Image, seen: Modality) -> tuple[str, str]:
    """The task and where it comes from; ``seen``: what the network takes the moving image for."""
    if task != AUTO:
        agreed = moving.modality in (Modality.UNKNOWN, TASKS[task])
        return task, "request" if agreed else f"request; the file says {moving.modality}"
    if fixed.modality != Modality.MRI:
        return f"{moving.modality}-{fixed.modality}", "file"
    for name, modality in TASKS.items():
        if moving.modality == modality:
            return name, "file"
    if moving.modality == Modality.MRI:
        return MR_MR, "file"
    return MR_MR if seen == Modality.MRI else f"{seen}-mri", "network's guess"


def measure_evidence(
    out: Output | Matched,
    luma_fixed: Array,
    luma_aligned: Array,
    *,
    partner: NDArray[np.bool_] | None = None,
    aligned_already: bool = False,
) -> Evidence:
    """The evidence of one network output (batch of one) on the fixed grid.

    Args:
        luma_fixed, luma_aligned: ``H W`` in [0, 1], of the fixed and of the aligned moving image.
        partner: ``H W``, from :func:`bsafusion.preprocessing.has_partner`; left out for two images on one grid.
        aligned_already: of images that were taken as aligned there is no similarity after alignment.
    """
    alignment = out.alignment
    displacement = alignment.displacement.float().cpu()
    mask = torch.from_numpy(head_mask(luma_fixed * 255))
    size = displacement[0].norm(dim=0)
    if partner is None:
        grid = Geometry.picture(tuple(mask.shape))
        partner = has_partner(displacement[0], match_grids(grid, grid), grid)

    def inside(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[0, 0].float().cpu()[mask]

    def mean(values: torch.Tensor | None) -> float | None:
        return None if values is None else float(values.mean())

    before, after = map(inside, alignment.similarity or (None, None))
    after = None if aligned_already else after
    low = None if after is None else float(np.percentile(after.numpy(), 10))
    mean_after = mean(after)
    return Evidence(
        similarity_before=mean(before),
        similarity_after=mean_after,
        expected_error=mean(inside(alignment.expected_error)),
        displacement_mean=float(size[mask].mean()),
        displacement_max=float(size[mask].max()),
        folded_share=float((jacobian_determinant(displacement) <= 0).float().mean()),
        outside_share=float((~partner[mask.numpy()]).mean()),
        similarity_low=low,
        similarity_spread=None if mean_after is None or low is None else mean_after - low,
        nonaffine_mean=_nonaffine_mean(displacement[0], mask),
        assessed_error=None if alignment.assessed_error is None else float(alignment.assessed_error),
        cut_share=_cut_share(luma_aligned, mask.numpy()),
    )


DARK = 0.02
"""Luminance up to which an image shows nothing, and the share of an area that may show something and still be black."""


def _cut_share(luma_aligned: Array, mask: NDArray[np.bool_]) -> float:
    """Share of the head ``mask`` (``H W``) that a straight cut takes out of the view of the aligned moving image.

    For lines in 32 directions: beyond it the image (``H W``, luminance in [0, 1]) is black, and of a strip along it,
    6 % of the head, at least half is not. A brain without its skull is black beyond lines, too, but round. Black is
    what lies near the level of the background, be that noisy.
    """
    every = max(round(max(mask.shape) / 128), 1)  # pixels: what is half a head needs no more than every so many
    luma, inside = ndimage.uniform_filter(luma_aligned, every)[::every, ::every], mask[::every, ::every]
    steady = ndimage.median_filter(luma, 5)  # edges stay where they are
    above = steady - np.percentile(steady, 10)
    seen, points = (above > DARK)[inside], np.argwhere(inside)
    count, strip = len(points), round(0.06 * len(points))
    largest = 0.0
    for angle in np.arange(32) * (np.pi / 16):
        outermost = np.argsort(-(points @ (np.sin(angle), np.cos(angle))), kind="stable")
        shown = np.concatenate([[0], np.cumsum(seen[outermost])])
        beyond = int(np.flatnonzero(shown <= DARK * np.arange(count + 1)).max())
        if beyond + strip <= count and shown[beyond + strip] - shown[beyond] >= strip / 2:
            largest = max(largest, beyond / count)
    return largest


def _nonaffine_mean(displacement: torch.Tensor, mask: torch.Tensor) -> float:
    """Mean length, where ``mask`` (``H W``, bool) is true, of a field ``2 H W`` less its best affine fit."""
    points = mask.nonzero().double()
    terms = torch.cat([points - points.mean(0), torch.ones(len(points), 1, dtype=points.dtype)], dim=1)
    moved = displacement[:, mask].T.double()
    fitted = torch.linalg.lstsq(terms, moved).solution
    return float((moved - terms @ fitted).norm(dim=1).mean())
