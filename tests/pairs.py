"""Small synthetic scans on disk and networks whose field is known: what the tests of the user's side share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage
from scipy import ndimage

from bsafusion import weights
from bsafusion.models.alignment import AlignmentCfg
from bsafusion.models.bsafusion import BSAFusion, BSAFusionCfg
from bsafusion.models.encoder import EncoderCfg
from bsafusion.models.fusion import FusionCfg
from bsafusion.models.representation import RepresentationCfg
from bsafusion.pipeline import Model

STRIDE = 16
RADIUS = 3
WORKING_SIDE = 81
"""Of the networks below; a picture of 61 to 81 pixels is encoded at its own size."""

SMALL_CFG = BSAFusionCfg(
    encoder=EncoderCfg(shallow=4, widths=(8, 8, 8, 16), colour=False),
    representation=RepresentationCfg(dim=16, heads=2, mlp_dim=16, blocks=1, transfer_blocks=1, cross_blocks=0),
    alignment=AlignmentCfg(
        steps=("1/16",),
        direction="forward",
        layers=1,
        hidden=(0, 8),
        descriptors=8,
        radius=(0, RADIUS),
        carry=False,
        assessment=0,
    ),
    fusion=FusionCfg(widths=(8, 8, 8, 8), hidden=4, layers=2),
    working_side=WORKING_SIDE,
)


def known_network(shift: tuple[float, float] = (0.0, 0.0), *, expected_error: float = 1.0) -> BSAFusion:
    """A network whose field is ``shift``, ``(y, x)`` in pixels of its working grid, whatever it sees.

    The output convolution is zero as built, so its bias alone decides; a vanishing temperature makes the matching
    window's mean zero. ``expected_error``: pixels, what it says of its own field.
    """
    torch.manual_seed(0)
    network = BSAFusion(SMALL_CFG)
    step: Any = network.alignment.steps["1_16"]
    limit = RADIUS + 1
    bias = [limit * math.atanh(component / STRIDE / limit) for component in shift]
    with torch.no_grad():
        step.log_scale.fill_(-100.0)
        step.out.bias.copy_(torch.tensor([*bias, math.log(expected_error / STRIDE)]))
    return network.eval()


def record_of(network: BSAFusion) -> dict[str, Any]:
    """The card of a network made here, without name, file and checksum."""
    return {
        "preset": network.cfg.preset,
        "config": network.cfg.to_dict(),
        "tasks": ("ct-mri",),
        "data": "none",
        "steps": 0,
    }


def known_model(shift: tuple[float, float] = (0.0, 0.0), *, expected_error: float = 1.0) -> Model:
    network = known_network(shift, expected_error=expected_error)
    record = weights.WeightsRecord(name="known", file="", sha256="0" * 64, **record_of(network))
    return Model(network, record, "cpu")


def known_weights(folder: Path, shift: tuple[float, float] = (0.0, 0.0), *, expected_error: float = 1.0) -> Path:
    """The same network as a file for ``--weights``."""
    network = known_network(shift, expected_error=expected_error)
    record = weights.save(folder, "known", network.state_dict(), **record_of(network))
    return folder / record.file


def scan(shape: tuple[int, int], *, seed: int = 0, blur: float = 2.0) -> NDArray[np.uint8]:
    """A bright textured ellipse on black, ``H W``."""
    height, width = shape
    rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    texture = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), max(height, width) / 25)
    texture = (texture - texture.min()) / np.ptp(texture)
    inside = np.hypot(rows / 0.72, columns / 0.62) < 1
    smooth = ndimage.gaussian_filter(np.where(inside, 0.35 + 0.65 * texture, 0.0), blur)
    return np.round(255 * smooth / smooth.max()).astype(np.uint8)


def hot(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey ``H W`` in the colours of a functional image, ``H W 3``: black, red, orange, white."""
    knots = np.array([0, 100, 180, 255])
    channels = [np.interp(grey, knots, values) for values in ([0, 190, 255, 255], [0, 10, 150, 255], [0, 20, 0, 240])]
    return np.round(np.stack(channels, axis=-1)).astype(np.uint8)


def write_picture(path: Path, pixels: NDArray[Any], **options: Any) -> Path:
    PILImage.fromarray(pixels).save(path, **options)
    return path


def pixels_of(path: Path) -> NDArray[Any]:
    """``H W`` or ``H W 3`` as the file holds them."""
    with PILImage.open(path) as picture:
        return np.asarray(picture)


def write_volume(path: Path, array: NDArray[Any], affine: NDArray[np.float64]) -> Path:
    """A NIfTI from an array indexed ``x, y, z`` and a RAS affine, with its place in the patient stated."""
    image = nib.Nifti1Image(array, affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    nib.save(image, path)
    return path


def carry_with_itk(deformation: Path, moving: sitk.Image) -> NDArray[np.float64]:
    """What SimpleITK makes of ``moving`` and a deformation file: ``H W`` or ``H W 3`` on the fixed grid."""
    grid = sitk.ReadImage(str(deformation), sitk.sitkVectorFloat64)
    reference = sitk.Image(grid.GetSize(), sitk.sitkFloat32)
    reference.SetSpacing(grid.GetSpacing())
    reference.SetOrigin(grid.GetOrigin())
    reference.SetDirection(grid.GetDirection())
    kind = sitk.sitkVectorFloat32 if moving.GetNumberOfComponentsPerPixel() > 1 else sitk.sitkFloat32
    background = float(sitk.GetArrayFromImage(moving).min())
    carried = sitk.Resample(
        sitk.Cast(moving, kind), reference, sitk.DisplacementFieldTransform(grid), sitk.sitkLinear, background
    )
    return np.asarray(sitk.GetArrayFromImage(carried), dtype=np.float64)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file (with its bytes) and folder below ``folder``."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}
