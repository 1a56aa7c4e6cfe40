"""What several test modules share: fixed seeds and threads, small networks, small synthetic scans."""

from __future__ import annotations

import csv
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from scipy import ndimage
from torch import Tensor, nn

from bsafusion.deformation import resize_field
from bsafusion.models.alignment import AlignmentCfg
from bsafusion.models.bsafusion import BSAFusionCfg
from bsafusion.models.encoder import EncoderCfg
from bsafusion.models.fusion import FusionCfg
from bsafusion.models.representation import RepresentationCfg

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
# For networks this small more threads gain little, and on a busy machine they wait for each other many times over.
torch.set_num_threads(1)

SIDE = 65  # of the synthetic scans


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def small_cfg() -> BSAFusionCfg:
    """The default network with five steps and four blocks, a few channels each, for images of 65 to 81 pixels."""
    return BSAFusionCfg(
        encoder=EncoderCfg(shallow=4, widths=(8, 8, 8, 16), colour=True),
        representation=RepresentationCfg(dim=16, heads=2, mlp_dim=16, blocks=1, transfer_blocks=1, cross_blocks=2),
        alignment=AlignmentCfg(
            steps=("affine", "1/16", "1/8", "1/4", "1/2"),
            layers=1,
            hidden=(0, 8, 8, 8, 8, 8),
            descriptors=8,
            radius=(0, 2, 2, 2, 1, 1),
            carry=True,
            assessment=16,
        ),
        fusion=FusionCfg(widths=(8, 8, 8, 8), hidden=4, layers=2),
        working_side=81,
    )


@pytest.fixture(scope="session")
def training_cfg(small_cfg: BSAFusionCfg) -> BSAFusionCfg:
    """The small network at the size of the synthetic scans."""
    return replace(small_cfg, working_side=SIDE)


@pytest.fixture
def randomise() -> Callable[[nn.Module], nn.Module]:
    """Adds noise to every parameter, the same wherever name and shape are the same.

    The output convolutions start at zero, so that a network as built moves almost nothing.
    """

    def apply(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
        return model.eval()

    return apply


@pytest.fixture
def smooth_field() -> Callable[..., Tensor]:
    """``smooth_field(shape, amplitude, seed)``: ``1 D *S`` float64, the interpolation of a few random vectors."""

    def draw(shape: tuple[int, ...], amplitude: float, seed: int = 0) -> Tensor:
        knots = torch.Generator().manual_seed(seed)
        dimensions = len(shape)
        coarse = torch.rand(1, dimensions, *([4] * dimensions), generator=knots, dtype=torch.float64) * 2 - 1
        field = resize_field(coarse, shape=shape)
        return field * (amplitude / field.abs().max())

    return draw


def _head(rng: np.random.Generator) -> np.ndarray:
    """Labels of a head: 0 air, 1 brain, 2 skull, 3 and 4 structures inside."""
    rows, columns = np.mgrid[:SIDE, :SIDE] / (SIDE - 1) * 2 - 1
    columns -= rng.uniform(0.05, 0.15)  # not symmetric: a flip shows
    radius = np.hypot(rows / rng.uniform(0.75, 0.9), columns / rng.uniform(0.6, 0.8))
    labels = np.where(radius < 1, 2, 0)
    labels[radius < 0.85] = 1
    texture = ndimage.gaussian_filter(rng.normal(size=(SIDE, SIDE)), 3)
    labels[(radius < 0.75) & (texture > 0.05)] = 3
    labels[(radius < 0.6) & (texture < -0.06)] = 4
    return labels


@pytest.fixture(scope="session")
def pairs_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training and two validation pairs of synthetic CT-MRI and (in colour) PET-MRI, 65 pixels a side."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    contrasts = {"mri": (0, 140, 20, 200, 255), "ct": (0, 90, 255, 110, 40), "pet": (0, 160, 30, 255, 60)}
    rows = []
    for index in range(8):
        labels = _head(rng)
        task = "ct-mri" if index % 2 == 0 else "pet-mri"
        pictures = {}
        for modality in ("mri", task.removesuffix("-mri")):
            grey = ndimage.gaussian_filter(np.take(contrasts[modality], labels).astype(float), 0.7)
            pictures[modality] = np.round(grey).astype(np.uint8)
        if task == "pet-mri":
            hue = np.array([1.0, 0.6, 0.2])
            pictures["pet"] = np.round(pictures["pet"][..., None] * hue).astype(np.uint8)
        fixed, moving = (folder / f"{index}-{modality}.png" for modality in pictures)
        for path, picture in zip((fixed, moving), pictures.values(), strict=True):
            Image.fromarray(picture).save(path)
        rows.append([task, index, "train" if index < 6 else "val", f"case{index}", fixed.name, moving.name])
    path = folder / "pairs.csv"
    with path.open("w", newline="") as handle:
        csv.writer(handle).writerows([["task", "slice", "split", "case", "fixed", "moving"], *rows])
    return path
