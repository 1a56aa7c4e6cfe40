"""What a result says of itself: the evidence, the verdict and the overview picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from numpy.typing import NDArray

from bsafusion.about import NOT_CLINICAL
from bsafusion.deformation import warp
from bsafusion.evidence import Evidence
from bsafusion.image import Image, Modality
from bsafusion.preprocessing import GridMatch
from bsafusion.trust import OFF, Calibration

ALIGN_AND_FUSE, FUSE_ONLY, ALIGN_ONLY = "align and fuse", "fuse only", "align only"
MODES = {
    ALIGN_AND_FUSE: "",
    FUSE_ONLY: "alignment was skipped as asked: the images were taken as aligned already",
    ALIGN_ONLY: "nothing was fused, as asked",
}
"""What was asked for, and what a result has to say of it."""


@dataclass(frozen=True)
class Limits:
    """Beyond these a result is ``suspect``, whatever its calibrated probability; lengths are shares of the longer side.

    ``expected_error`` and ``similarity_after`` speak only where there is no calibrated probability; where there is a
    calibration, its own ``least_similarity`` takes the place of the latter.
    """

    expected_error: float = 4.0 / 256
    similarity_after: float = 0.35
    displacement_max: float = 90 / 256
    folded_share: float = 1e-3
    outside_share: float = 0.25
    cut_share: float = 0.44  # half of it, less what a line through the middle may be off


def verdict(
    evidence: Evidence,
    longer_side: int,
    limits: Limits | None = None,
    *,
    trust: Calibration | None = None,
    fixed: Modality = Modality.MRI,
    moving: Modality = Modality.UNKNOWN,
    seen: tuple[Modality, Modality] | None = None,
    one_file: bool = False,
) -> tuple[str, list[str]]:
    """``("ok", [])`` or ``("suspect", reasons)``, each reason with what was measured and what was expected.

    ``trust``: the calibration of the weights (:mod:`bsafusion.trust`); without it, or where the evidence lacks what it
    needs (nothing was aligned), limits on the expected error and the similarity take its place. ``fixed``, ``moving``:
    what kinds of scan the images are by their files. ``seen``: what the network takes them for, where no file says what
    the moving one is. ``one_file``: both images are the same file.
    """
    limits = limits or Limits()
    measured = asdict(evidence)
    if trust is not None and trust.probability(measured, longer_side) is not None:
        reason = trust.reason(measured, longer_side)
        reasons = [] if reason is None else [reason]
    else:
        if trust is not None:
            limits = replace(limits, similarity_after=trust.least_similarity)
        reasons = _soft_reasons(evidence, longer_side, limits)
    if evidence.displacement_max > limits.displacement_max * longer_side:
        reasons.append(
            f"the field reaches {evidence.displacement_max:.0f} px; up to "
            f"{limits.displacement_max * longer_side:.0f} px was trained for"
        )
    if evidence.folded_share > limits.folded_share:
        reasons.append(f"the field folds in {told_share(evidence.folded_share, 2)} of the pixels")
    if evidence.outside_share > limits.outside_share:
        reasons.append(f"{evidence.outside_share:.0%} of the head lies outside the moving image")
    if evidence.cut_share > limits.cut_share:
        reasons.append(
            f"the moving image ends at a straight line, beyond which {evidence.cut_share:.1%} of the head lies; "
            f"at most {limits.cut_share:.0%} may be out of view"
        )
    if fixed != Modality.MRI:
        swap = moving in (Modality.MRI, Modality.UNKNOWN)
        what_to_do = "swap the images" if swap else f"it was not trained to align {moving.upper()} with {fixed.upper()}"
        reasons.append(f"the fixed image is a {fixed.upper()} by its file; the network knows MRI there: {what_to_do}")
    elif seen is not None and seen[0] != Modality.MRI and seen[1] == Modality.MRI:
        reasons.append(
            f"the network takes the fixed image for a {seen[0].upper()} and the moving one for an MRI, but was trained "
            "with the MRI as the fixed one: if that is what they are, swap the images"
        )
    if one_file:
        reasons.append("the fixed and the moving image are the same file; check the paths")
    return ("suspect" if reasons else "ok"), reasons


def told_share(share: float, digits: int) -> str:
    """In per cent; a small one is not said to be none."""
    least = 10.0 ** -(digits + 2)
    return f"less than {least:.{digits}%}" if 0 < share < least else f"{share:.{digits}%}"


def _soft_reasons(evidence: Evidence, longer_side: int, limits: Limits) -> list[str]:
    reasons = []
    error = evidence.expected_error
    if error is not None and error > limits.expected_error * longer_side:
        reasons.append(
            f"the network expects its field to be off by {error:.1f} px on average; at most "
            f"{limits.expected_error * longer_side:.1f} px is trusted"
        )
    before, after = evidence.similarity_before, evidence.similarity_after
    what, similarity = ("aligned images", after) if after is not None else ("images as given", before)
    if similarity is not None and similarity < limits.similarity_after:
        reasons.append(
            f"the {what} have a descriptor similarity of {similarity:.3f}; at least "
            f"{limits.similarity_after:.3f} is expected of images of one head"
        )
    if after is not None and before is not None and after < before - 0.05:
        reasons.append(f"alignment lowered the descriptor similarity from {before:.3f} to {after:.3f}")
    return reasons


def describe_trust(
    evidence: Evidence, longer_side: int, *, trust: Calibration | None, note: str
) -> dict[str, float | str | None]:
    """For the report: the estimated chance that the result is wrong, and what the estimate rests on.

    ``note``: a word on the calibration, or on why there is none.
    """
    probability = None if trust is None else trust.probability(asdict(evidence), longer_side)
    if trust is not None and probability is None:
        note = "nothing was aligned, so nothing is estimated"
    return {
        "probability_off": None if probability is None else round(probability, 4),
        "off_from_px": round(OFF * longer_side, 2),
        "suspect_from": None if trust is None or probability is None else trust.threshold,
        "note": note,
    }


def describe_input(image: Image) -> dict[str, Any]:
    """What the report says of an input image; never its folder, never a patient."""
    geometry = image.geometry
    return {
        "file": image.source,
        "sha256": image.sha256,
        "modality": str(image.modality),
        "size": list(geometry.shape[::-1]),
        "channels": len(image.array),
        "pixel_type": image.dtype,
        "spacing_mm": list(geometry.spacing) if geometry.physical else None,
        "plane": geometry.plane,
        "notes": dict(image.meta),
    }


def unlike_fitted(options: Mapping[str, Any]) -> str:
    """What tells the results that calibrations are fitted to from one with these options of a report; or nothing."""
    facts = ["without refinement"] if options.get("refine") else []
    if options.get("mirrored") not in ("auto", None):
        facts.append("whose mirror images were looked at in doubt alone")
    return " and ".join(facts)


def describe(
    *,
    fixed: Image,
    moving: Image,
    match: GridMatch,
    evidence: Evidence,
    trust: Mapping[str, float | str | None],
    status: str,
    reasons: list[str],
    mode: str,
    colour: Mapping[str, Any] | None,
    options: Mapping[str, Any],
    refinement: Mapping[str, float] | None,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """The content of ``report.json``; the same for the same inputs, weights and machine.

    ``trust``: from :func:`describe_trust`. ``mode``: a key of :data:`MODES`. ``colour``: what was measured of the fused
    colours; None without a fused picture. ``refinement``: its steps and its objective before and after, or None.
    """
    return {
        "status": status,
        "reasons": reasons,
        "mode": mode,
        "inputs": {"fixed": describe_input(fixed), "moving": describe_input(moving)},
        "grid": {"method": match.method, "note": match.note},
        "alignment": {k: None if v is None else _rounded(k, v) for k, v in asdict(evidence).items()},
        "refinement": None if refinement is None else dict(refinement),
        "trust": dict(trust),
        "colour": None if colour is None else dict(colour),
        "options": dict(options),
        "versions": dict(versions),
        "use": NOT_CLINICAL,
    }


def _rounded(name: str, value: float) -> float:
    """To five digits after the point; a share, which is counted, to the first that is not 0 rather than to 0."""
    return round(value, 5) or (float(f"{value:.1g}") if name.endswith("_share") else 0.0)


# --- overview ---

Panel = NDArray[np.float32]  # 3 H W in [0, 1]
_GAP, _LINE = 8, 18


def checkerboard(a: Panel, b: Panel, squares: int = 8) -> Panel:
    """``a`` and ``b`` in alternating squares, ``squares`` along the shorter side."""
    height, width = a.shape[-2:]
    size = max(min(height, width) // squares, 1)
    rows, columns = np.indices((height, width)) // size
    return np.where((rows + columns) % 2 == 0, a, b)


def deformed_grid(displacement: torch.Tensor, spacing: int = 16) -> Panel:
    """The lines of a regular grid as the field (``2 H W``) moves them."""
    height, width = displacement.shape[-2:]
    rows, columns = np.indices((height, width))
    thick = max(spacing // 12, 1)
    lines = ((rows % spacing < thick) | (columns % spacing < thick)).astype(np.float32)
    # Beyond the frame there is no grid; the border's line would become a white area.
    pulled = warp(torch.from_numpy(lines)[None, None], displacement[None], padding="zeros")[0, 0].numpy()
    return np.repeat(pulled[None], 3, axis=0)


def overview(
    panels: list[tuple[str, Panel]], status: str, reasons: list[str], *, mode: str = ALIGN_AND_FUSE, side: int = 320
) -> PIL.Image.Image:
    """Panels in rows of three, each ``side`` pixels on its longer side, their names above, verdict and mode below."""
    font = PIL.ImageFont.load_default(size=13)
    height, width = panels[0][1].shape[-2:]
    scale = side / max(height, width)
    cell = (max(round(width * scale), 1), max(round(height * scale), 1))
    rows = -(-len(panels) // 3)
    # The names of narrow pictures must not run into each other.
    column = max(cell[0], *(math.ceil(font.getlength(name)) for name, _ in panels))
    said = [f"{status.upper()}: {r}" for r in reasons] or [f"status: {status}"]
    footer = _wrapped([*said, *([MODES[mode]] if MODES[mode] else [])], 3 * column, font)
    size = (3 * column + 4 * _GAP, rows * (cell[1] + _LINE + _GAP) + _GAP + _LINE * (len(footer) + 1))
    sheet = PIL.Image.new("RGB", size, (18, 20, 24))
    draw = PIL.ImageDraw.Draw(sheet)
    for index, (name, panel) in enumerate(panels):
        x = _GAP + (index % 3) * (column + _GAP)
        y = _GAP + (index // 3) * (cell[1] + _LINE + _GAP)
        draw.text((x, y), name, fill=(214, 218, 224), font=font)
        pixels = np.round(np.clip(panel, 0, 1).transpose(1, 2, 0) * 255).astype(np.uint8)
        picture = PIL.Image.fromarray(pixels)
        sheet.paste(picture.resize(cell, PIL.Image.Resampling.BICUBIC), (x, y + _LINE))
    colour = (255, 120, 90) if reasons else (140, 205, 150)
    y = size[1] - _LINE * (len(footer) + 1)
    for line in footer:
        draw.text((_GAP, y), line, fill=colour, font=font)
        y += _LINE
    draw.text((_GAP, y), NOT_CLINICAL, fill=(150, 155, 165), font=font)
    return sheet


def _wrapped(lines: list[str], width: int, font: Any) -> list[str]:
    out: list[str] = []
    for line in lines:
        current = ""
        for word in line.split():
            if current and font.getlength(f"{current} {word}") > width:
                out.append(current)
                current = word
            else:
                current = f"{current} {word}".strip()
        out.append(current)
    return out
