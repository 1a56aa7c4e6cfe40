"""The one verb: ``fuse(fixed, moving) -> FusionResult``."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from bsafusion import weights
from bsafusion.about import versions
from bsafusion.canonical import Canonical, canonical
from bsafusion.colour import check_hue, colourise, overlay, recolour, split_colour, steer
from bsafusion.evidence import measure_evidence
from bsafusion.files import PathLike
from bsafusion.image import TASKS, Image, ImageError, Modality, luma_of
from bsafusion.io import read_colormap, read_image
from bsafusion.models.bsafusion import BSAFusion, How, Mirrored
from bsafusion.models.representation import MODALITIES, Representation
from bsafusion.plain_fusion import FUSIONS
from bsafusion.preprocessing import (
    GridMatch,
    apply_field,
    fit_intensity,
    has_partner,
    inverse_field,
    match_grids,
    resample_to_grid,
    slices_apart,
    total_field,
)
from bsafusion.refinement import Refinement
from bsafusion.report import describe, describe_trust, unlike_fitted, verdict
from bsafusion.request import ALWAYS, AUTO, NETWORK, NO_COLORMAP, FuseOptions, RequestError, check_task
from bsafusion.result import FusionResult, fused_depth
from bsafusion.trust import Calibration, read_calibration

Array = NDArray[np.float32]
MR_MR = "mr-mr"  # two MR contrasts: reported where found, not a task to ask for
CLIPPED = 0.5 / 255
"""Beyond [0, 1] by more than half a level of 8 bits, a channel counts as clipped; less is rounding."""


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

    def identity(self) -> dict[str, Any]:
        """What tells results of one model from those of another, for reports."""
        return {
            "weights": self.record.name,
            "weights_sha256": self.record.sha256,
            "calibration_sha256": None if self.trust is None else self.trust.sha256,
            "preset": self.record.preset,
            "device": self.device,
        }


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
    count = {"cpu": 0, "cuda": torch.cuda.device_count(), "mps": 0}  # that may be told apart by a number
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name, colon, number = device.partition(":")
    numbered = not colon or (number.isdecimal() and int(number) < count.get(name, 0))
    if not available.get(name, False) or not numbered:
        there = ", ".join(d for d, is_there in available.items() if is_there)
        raise RequestError(f"device {device!r} is not there; expected one of {there}")


def read_input(image: PathLike | Image, role: Literal["fixed", "moving"], *, slice_index: int | None = None) -> Image:
    """Read an input unless it is an :class:`Image` already; errors name its role. An unlabelled fixed image is MRI."""
    if not isinstance(image, str | os.PathLike | Image):
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
    fixed: PathLike | Image,
    moving: PathLike | Image,
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
    mirrored: str = "auto",
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
    options = FuseOptions(
        fusion=fusion,
        blend=blend,
        colormap=colormap,
        weight_fixed=weight_fixed,
        aligned=aligned,
        align_only=align_only,
        refine=refine,
        mirrored=mirrored,
    )
    check_task(task)
    fixed, moving = read_input(fixed, "fixed"), read_input(moving, "moving")
    _check_colours(fixed, moving, options)
    model = load_model() if model is None else model
    if not isinstance(model, Model):
        raise TypeError(f"model: a {type(model).__name__}; expected what bsafusion.load_model(name) returns")
    check_options(model, options)
    match = _matched_grids(fixed, moving)
    grids = (match, fixed.geometry, moving.geometry)
    on_grid = resample_to_grid(moving.array, match, fixed.geometry.shape)
    luma_fixed = _unit_luma(fixed, fixed.array)
    grid = canonical(fixed.geometry)
    pictures = _pictures(model, grid, luma_fixed, moving, on_grid, match)
    found = model.network.predict_alignment(*pictures, **_how(options))
    ways = (found.alignment.displacement, found.alignment.inverse)
    displacement, back = (grid.give_back_field(way.float().cpu())[0] for way in ways)
    field, inverse = total_field(displacement, *grids), inverse_field(back, *grids)
    # The moving image itself: what was brought to the fixed grid ends where that does.
    carried = apply_field(field, moving)
    luma_aligned = _unit_luma(moving, carried)
    drawn, fused, colour = None, None, None
    if options.network_fuses:
        tensor = grid.see(torch.from_numpy(luma_aligned)[None, None]).to(model.device)
        drawn = grid.give_back(model.network.predict_fusion(pictures[0], tensor, found).float().cpu())[0, 0].numpy()
    if not options.align_only:
        fused, colour = _picture(options, fixed, moving, carried, drawn)
    partner = has_partner(displacement, match, moving.geometry)
    evidence = measure_evidence(
        found.alignment,
        _turned(grid, luma_fixed),
        _turned(grid, luma_aligned),
        partner=_turned(grid, partner.astype(np.float32)) > 0.5,
        aligned_already=options.aligned,
    )
    longer_side = max(grid.shape)
    seen = _seen_as(found.representation)
    status, reasons = verdict(
        evidence,
        longer_side,
        trust=model.trust,
        fixed=fixed.modality,
        moving=moving.modality,
        seen=seen if moving.modality == Modality.UNKNOWN else None,
        one_file=fixed.sha256 is not None and fixed.sha256 == moving.sha256,
    )
    chosen, task_from = _task(task, fixed, moving, seen[1])
    report = describe(
        fixed=fixed,
        moving=moving,
        match=replace(match, note=f"{match.note} {grid.note}".rstrip()),
        evidence=evidence,
        trust=describe_trust(evidence, longer_side, trust=model.trust, note=_trust_note(model, options)),
        status=status,
        reasons=reasons,
        mode=options.mode,
        colour=colour,
        options={"task": chosen, "task_from": task_from, **options.record(), **_made_with(model)},
        refinement=_refinement(options.refine, found.alignment.refined),
        versions=versions(),
    )
    error = found.alignment.expected_error
    return FusionResult(
        fixed=fixed,
        moving=moving,
        options=options,
        fused=fused,
        aligned=carried,
        field=field,
        inverse=inverse,
        expected_error=None if error is None else grid.give_back(error.float().cpu())[0, 0].numpy(),
        evidence=evidence,
        status=status,
        reasons=reasons,
        report=report,
        moving_on_fixed_grid=on_grid,
        displacement=displacement,
    )


def _check_colours(fixed: Image, moving: Image, options: FuseOptions) -> None:
    if len(fixed.array) == 3:
        raise ImageError(
            f"fixed image {fixed.source} is in colour; expected a grey one (MRI); swap the two images or convert it"
        )
    if len(moving.array) == 3 and options.colormap != NO_COLORMAP:
        raise ImageError(
            f"moving image {moving.source} has colours of its own; expected a grey one for colour map "
            f"{options.colormap}; leave the colour map out"
        )


def _matched_grids(fixed: Image, moving: Image) -> GridMatch:
    """How the moving grid is brought to the fixed one, with a word where the slices are not of one place."""
    match, apart = match_grids(fixed.geometry, moving.geometry), slices_apart(fixed, moving)
    if apart is None or apart <= 1:
        return match
    told = f"By their positions the two slices are up to {apart:.0f} mm apart, across them."
    return replace(match, note=f"{match.note} {told}")


def _turned(grid: Canonical, array: Array) -> Array:
    """``H W`` as the network sees it."""
    return np.ascontiguousarray(grid.see(torch.from_numpy(array)[None, None])[0, 0].numpy())


def _pictures(
    model: Model, grid: Canonical, luma_fixed: Array, moving: Image, on_grid: Array, match: GridMatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the network sees of ``luma_fixed`` (``H W``) and of the moving image on the fixed grid (``C H W``)."""
    if float(np.ptp(_unit_luma(moving, on_grid))) == 0:
        raise ImageError(
            f"{moving.source}: nothing of it but background falls on the fixed grid ({match.note}); check the positions"
        )
    fixed, seen = (grid.see(torch.from_numpy(a)[None]) for a in (luma_fixed[None], _seen(moving, on_grid)))
    return fixed.to(model.device), seen.to(model.device)


def _how(options: FuseOptions) -> How:
    how = How(aligned_already=options.aligned, mirrored=cast(Mirrored, options.mirrored))
    if options.refine:
        how["refine"] = Refinement(options.refine)
    return how


def _trust_note(model: Model, options: FuseOptions) -> str:
    unusual = unlike_fitted(options.record())
    return (
        model.trust_note if not unusual or model.trust is None else f"{model.trust_note}; fitted to results {unusual}"
    )


def _made_with(model: Model) -> dict[str, Any]:
    """Weights and device, for the report."""
    return {**model.identity(), "threads": torch.get_num_threads() if model.device == "cpu" else None}


def check_options(model: Model, options: FuseOptions) -> None:
    """Raise :class:`RequestError` where the weights cannot do what is asked of the alignment."""
    if model.network.cfg.alignment.kind == "attention" and (options.refine or options.mirrored == ALWAYS):
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
        hue = check_hue(clipped, source, levels=np.iinfo(fused_depth(fixed, moving)).max)
        colour["hue_error_median_deg"] = None if hue.error_median is None else round(hue.error_median, 3)
        colour["hue_lost_share"] = None if hue.lost_share is None else round(hue.lost_share, 5)
        colour["clipped_share"] = round(float((np.abs(picture - clipped) > CLIPPED).any(axis=0).mean()), 5)
    return clipped, colour


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
