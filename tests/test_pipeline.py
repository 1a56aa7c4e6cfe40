from __future__ import annotations

import colorsys
import hashlib
import importlib.metadata
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from pydicom.data import get_testdata_file
from torch import Tensor

import bsafusion
from bsafusion import deformation
from bsafusion.colour import colourise, split_colour
from bsafusion.evidence import measure_evidence
from bsafusion.image import Geometry, Image, ImageError, Modality, slice_geometry
from bsafusion.io import read_colormap, read_image
from bsafusion.metrics import fusion_metrics, head_mask
from bsafusion.models.bsafusion import BSAFusion, paper
from bsafusion.pipeline import Model, fuse, load_model, read_input
from bsafusion.plain_fusion import FUSIONS
from bsafusion.preprocessing import fit_intensity
from bsafusion.request import FuseOptions, RequestError
from bsafusion.result import FusionResult
from bsafusion.weights import WeightsError
from pairs import (
    carry_with_itk,
    hot,
    known_model,
    known_network,
    known_weights,
    pixels_of,
    scan,
    snapshot,
    write_picture,
    write_volume,
)

FILES = {
    *("fused.png", "aligned.png", "overview.png", "report.html", "report.json"),
    *("deformation.nii.gz", "deformation_inverse.nii.gz"),
}
SHAPE = (81, 65)


@pytest.fixture(scope="module")
def model() -> Model:
    """The shipped network."""
    return load_model()


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A grey fixed and a coloured moving picture."""
    fixed = write_picture(tmp_path / "mri.png", scan(SHAPE))
    return fixed, write_picture(tmp_path / "pet.png", hot(scan(SHAPE, seed=1)))


def image_of(array: NDArray[Any], *, geometry: Geometry | None = None, dtype: str | None = None) -> Image:
    channels = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    grid = geometry or Geometry.picture(channels.shape[1:])
    return Image(channels, grid, dtype=dtype or array.dtype.name)


def millimetres(shape: tuple[int, int], spacing: tuple[float, float] = (1.0, 1.0)) -> Geometry:
    return Geometry(shape, spacing, (0.0, 0.0), ((1.0, 0.0), (0.0, 1.0)), plane="axial")


def test_arrays_and_names_of_weights_are_told_what_to_become() -> None:
    array: Any = scan(SHAPE)
    with pytest.raises(TypeError, match=r"moving image: a ndarray; expected a file name or a bsafusion\.Image"):
        fuse(image_of(array), array)
    name: Any = "default"
    with pytest.raises(TypeError, match=r"model: a str; expected what bsafusion\.load_model"):
        fuse(image_of(array), image_of(array), model=name)


def test_whatever_names_a_file_names_an_image(pair: tuple[Path, Path]) -> None:
    class Named:
        def __fspath__(self) -> str:
            return str(pair[0])

    np.testing.assert_array_equal(read_input(Named(), "fixed").array, read_input(pair[0], "fixed").array)


def test_a_volume_is_no_slice() -> None:
    grid = Geometry((40, 40, 40), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), tuple(map(tuple, np.eye(3))))
    volume = Image(np.random.default_rng(0).random((1, 40, 40, 40), np.float32), grid)
    with pytest.raises(ImageError, match=r"fixed image .*: a volume of shape \(40, 40, 40\); expected a 2-D slice"):
        read_input(volume, "fixed")


# --- what a result is ---


@pytest.mark.parametrize(
    ("fixed_shape", "moving_shape"),
    [
        ((32, 32), (32, 32)),
        ((33, 257), (33, 257)),
        ((300, 500), (300, 500)),
        ((257, 221), (257, 221)),
        ((257, 221), (128, 128)),
        ((64, 64), (300, 200)),
    ],
)
def test_everything_lands_on_the_fixed_grid(
    tmp_path: Path, model: Model, fixed_shape: tuple[int, int], moving_shape: tuple[int, int]
) -> None:
    fixed = write_picture(tmp_path / "fixed.png", scan(fixed_shape))
    moving = write_picture(tmp_path / "moving.png", hot(scan(moving_shape, seed=1)))
    result = fuse(fixed, moving, model=model)
    assert result.fused.shape == result.aligned.shape == (3, *fixed_shape)
    assert result.field.displacement.shape == (2, *fixed_shape)
    assert result.expected_error is not None
    assert result.expected_error.shape == fixed_shape
    assert result.fused.min() >= 0
    assert result.fused.max() <= 1
    assert result.fused.std() > 0
    out = result.save(tmp_path / "out")
    assert {path.name for path in out.iterdir()} == FILES
    assert pixels_of(out / "fused.png").shape == pixels_of(out / "aligned.png").shape == (*fixed_shape, 3)
    assert sitk.ReadImage(str(out / "deformation.nii.gz")).GetSize() == fixed_shape[::-1]
    same = "same grid" if fixed_shape == moving_shape else "centred and scaled"
    assert result.report["grid"]["method"] == same


@pytest.mark.parametrize("factor", [1, 257])
def test_the_network_sees_luminance_and_the_colours_there_are(monkeypatch: pytest.MonkeyPatch, factor: int) -> None:
    seen: list[torch.Tensor] = []
    predict = BSAFusion.predict_alignment

    def watched(network: BSAFusion, *pictures: torch.Tensor, **how: Any) -> Any:
        seen.extend(pictures)
        return predict(network, *pictures, **how)

    monkeypatch.setattr(BSAFusion, "predict_alignment", watched)
    grey, coloured = scan(SHAPE, seed=1), hot(scan(SHAPE, seed=1))
    for moving in (grey, coloured.astype(np.uint16) * factor if factor > 1 else coloured):
        fuse(image_of(scan(SHAPE)), image_of(moving), model=known_model())
    assert [len(picture[0]) for picture in seen] == [1, 1, 1, 3]
    luma, chroma = split_colour(np.moveaxis(coloured / 255, -1, 0))
    np.testing.assert_allclose(seen[3][0], np.concatenate([luma, chroma]), atol=1e-6)


def test_a_grey_moving_image_gives_grey_results(tmp_path: Path) -> None:
    result = fuse(image_of(scan(SHAPE)), image_of(scan(SHAPE, seed=1)), model=known_model())
    out = result.save(tmp_path / "out")
    assert result.fused.shape == result.aligned.shape == (1, *SHAPE)
    assert pixels_of(out / "fused.png").ndim == pixels_of(out / "aligned.png").ndim == 2


def test_the_verb_of_the_package_is_this_one_and_has_a_default_model(pair: tuple[Path, Path]) -> None:
    assert bsafusion.fuse is fuse
    assert bsafusion.load_model is load_model
    result = bsafusion.fuse(str(pair[0]), str(pair[1]))
    assert isinstance(result, bsafusion.FusionResult)
    assert result.report["options"]["weights"] == "default"
    assert result.status in ("ok", "suspect")
    assert bool(result.reasons) == (result.status == "suspect")


# --- the field: answers known by hand ---


@pytest.mark.parametrize("colour", [False, True])
def test_no_displacement_leaves_the_moving_image_as_it_was(tmp_path: Path, colour: bool) -> None:
    fixed = write_picture(tmp_path / "fixed.png", scan(SHAPE))
    pixels = hot(scan(SHAPE, seed=1)) if colour else scan(SHAPE, seed=1)
    moving = write_picture(tmp_path / "moving.png", pixels)
    result = fuse(fixed, moving, model=known_model())
    np.testing.assert_allclose(result.field.displacement.numpy(), 0, atol=1e-5)
    np.testing.assert_array_equal(pixels_of(result.save(tmp_path / "out") / "aligned.png"), pixels)


def test_the_aligned_image_looks_where_the_field_points() -> None:
    moving = scan(SHAPE, seed=1)
    result = fuse(image_of(scan(SHAPE)), image_of(moving), model=known_model((3.0, -5.0)))
    np.testing.assert_allclose(result.field.displacement[0].numpy(), 3.0, atol=1e-4)
    np.testing.assert_allclose(result.field.displacement[1].numpy(), -5.0, atol=1e-4)
    np.testing.assert_allclose(result.aligned[0, :-3, 5:], moving[3:, :-5], atol=0.05)


def test_the_field_grows_with_the_image() -> None:
    # The network works on 81 x 81 here; corner voxel centres stay on corner voxel centres.
    moving = scan((161, 161), seed=1)
    result = fuse(image_of(scan((161, 161))), image_of(moving), model=known_model((2.0, 4.0)))
    np.testing.assert_allclose(result.field.displacement[0].numpy(), 4.0, atol=1e-4)
    np.testing.assert_allclose(result.aligned[0, :-4, :-8], moving[4:, 8:], atol=0.05)


def test_the_whole_field_joins_grids_of_different_size() -> None:
    # Twice the size: pixel centres i of the fixed and 2 i + 0.5 of the moving picture lie on each other.
    moving = np.repeat(np.repeat(scan((65, 65), seed=1), 2, axis=0), 2, axis=1)
    result = fuse(image_of(scan((65, 65))), image_of(moving), model=known_model())
    index = np.arange(65)
    expected = np.stack(np.meshgrid(index + 0.5, index + 0.5, indexing="ij"))
    np.testing.assert_allclose(result.field.displacement.numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("direction", [((1.0, 0.0), (0.0, 1.0)), ((-1.0, 0.0), (0.0, 1.0)), ((0.0, -1.0), (1.0, 0.0))])
def test_a_field_between_scans_is_in_voxels_and_its_file_in_mm(
    tmp_path: Path, direction: tuple[tuple[float, float], tuple[float, float]]
) -> None:
    geometry = Geometry(SHAPE, (0.5, 0.5), (10.0, -20.0), direction, plane="axial")
    fixed, moving = (image_of(scan(SHAPE, seed=s).astype(np.float32), geometry=geometry) for s in (0, 1))
    out = fuse(fixed, moving, model=known_model((3.0, -5.0))).save(tmp_path / "out")
    field = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "deformation.nii.gz")))
    # Of the picture as displayed, however it is stored: 5 pixels to the left, 3 down, each 0.5 mm.
    np.testing.assert_allclose(field[..., 0], -2.5, atol=1e-3)
    np.testing.assert_allclose(field[..., 1], 1.5, atol=1e-3)


def test_a_field_between_scans_with_oblong_pixels_is_in_mm(tmp_path: Path) -> None:
    geometry = Geometry((33, 81), (0.5, 1.0), (10.0, -20.0), ((1.0, 0.0), (0.0, 1.0)), plane="axial")
    fixed, moving = (image_of(scan((33, 81), seed=s).astype(np.float32), geometry=geometry) for s in (0, 1))
    result = fuse(fixed, moving, model=known_model((3.0, -5.0)))
    assert result.fused is not None
    assert result.fused.shape == (1, 33, 81)
    np.testing.assert_allclose(result.displacement[0], 1.5, atol=1e-3)  # 3 square pixels of 0.5 mm
    np.testing.assert_allclose(result.displacement[1], -5, atol=1e-3)
    assert "pixels made square (81 x 65)" in result.report["grid"]["note"]
    field = sitk.GetArrayFromImage(sitk.ReadImage(str(result.save(tmp_path / "out") / "deformation.nii.gz")))
    np.testing.assert_allclose(field, np.broadcast_to([-2.5, 1.5], field.shape), atol=1e-3)


@pytest.mark.parametrize("moving_shape", [SHAPE, (65, 81), (40, 33), (162, 130)])
@pytest.mark.parametrize("colour", [False, True])
def test_itk_makes_the_aligned_picture_from_the_moving_file(
    tmp_path: Path, moving_shape: tuple[int, int], colour: bool
) -> None:
    # Smooth content: where pixels shrink, the package blurs against aliasing and ITK does not.
    grey = scan(moving_shape, seed=1, blur=max(moving_shape) / 15)
    fixed = write_picture(tmp_path / "fixed.png", scan(SHAPE))
    moving = write_picture(tmp_path / "moving.png", hot(grey) if colour else grey)
    out = fuse(fixed, moving, model=known_model((2.25, -4.375))).save(tmp_path / "out")
    carried = carry_with_itk(out / "deformation.nii.gz", sitk.ReadImage(str(moving)))
    difference = np.abs(carried - pixels_of(out / "aligned.png"))
    assert difference.mean() < 0.005 * 255
    if moving_shape[0] <= SHAPE[0] and moving_shape[1] <= SHAPE[1]:
        assert difference.max() < 0.005 * 255


def test_itk_makes_the_aligned_picture_with_the_shipped_network(tmp_path: Path, model: Model) -> None:
    sample = next(s for s in bsafusion.load_samples() if s.task == "pet-mri")
    out = fuse(sample.fixed, sample.moving, model=model).save(tmp_path / "out")
    carried = carry_with_itk(out / "deformation.nii.gz", sitk.ReadImage(str(sample.moving)))
    assert np.abs(carried - pixels_of(out / "aligned.png")).max() < 0.005 * 255


def volumes(folder: Path) -> tuple[Path, Path]:
    """Two volumes of one head whose axes run in different directions and steps."""
    shape = (65, 81)
    fixed = np.stack([scan(shape, seed=s).T for s in range(4)], axis=-1).astype(np.int16)
    moving = np.stack([scan((72, 60), seed=s).T for s in (7, 8, 9)], axis=-1).astype(np.int16) * 4 - 1000
    affine_fixed = np.array([[-1.0, 0, 0, 40], [0, 1.2, 0, -38], [0, 0, 5, 0], [0, 0, 0, 1]])
    affine_moving = np.array([[1.4, 0, 0, -43], [0, -1.1, 0, 41], [0, 0, 4, 0], [0, 0, 0, 1]])
    first = write_volume(folder / "mri.nii.gz", fixed, affine_fixed)
    return first, write_volume(folder / "ct.nii", moving, affine_moving)


def test_slices_of_volumes_keep_their_place_in_the_patient(tmp_path: Path) -> None:
    fixed, moving = volumes(tmp_path)
    result = fuse(
        read_input(fixed, "fixed", slice_index=2),
        read_input(moving, "moving", slice_index=1),
        model=known_model((2.0, -3.0)),
    )
    assert result.report["grid"]["method"] == "physical"
    assert result.report["inputs"]["fixed"]["notes"]["slice_index"] == 2
    out = result.save(tmp_path / "out")
    assert {path.name for path in out.iterdir()} == FILES | {"fused.nii.gz", "aligned.nii.gz"}
    volume = sitk.ReadImage(str(fixed))[:, :, 2:3]
    for name in ("fused", "aligned"):
        written = sitk.ReadImage(str(out / f"{name}.nii.gz"))
        assert written.GetSize() == volume.GetSize()
        np.testing.assert_allclose(written.GetSpacing(), volume.GetSpacing(), rtol=1e-5)
        np.testing.assert_allclose(written.GetOrigin(), volume.GetOrigin(), atol=1e-4)
        np.testing.assert_allclose(written.GetDirection(), volume.GetDirection(), atol=1e-5)
    source = sitk.ReadImage(str(moving))[:, :, 1]
    carried = carry_with_itk(out / "deformation.nii.gz", source)
    spread = float(np.ptp(sitk.GetArrayFromImage(source)))
    aligned = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "aligned.nii.gz")))
    assert np.abs(carried - aligned).mean() < 0.005 * spread
    scaling = fit_intensity(result.moving)
    shown = 255 * np.clip(scaling.to_unit(carried), 0, 1)
    assert np.abs(shown - pixels_of(out / "aligned.png")).mean() < 0.005 * 255


def test_slices_on_finer_grids_than_the_fixed_one_s_are_carried_exactly_as_itk_does(tmp_path: Path) -> None:
    fixed, moving = volumes(tmp_path)
    fine = write_volume(
        tmp_path / "fine.nii.gz",
        np.stack([scan((81, 81), seed=s) for s in range(2)], axis=-1).astype(np.float32),
        np.array([[0.9, 0, 0, -36], [0, 0.9, 0, -36], [0, 0, 4, 0], [0, 0, 0, 1]]),
    )
    for source in (fixed, moving):
        result = fuse(
            read_input(fine, "fixed", slice_index=0),
            read_input(source, "moving", slice_index=1),
            model=known_model((1.5, 2.5)),
        )
        out = result.save(tmp_path / f"out-{source.name}")
        volume = sitk.ReadImage(str(source))[:, :, 1]
        carried = carry_with_itk(out / "deformation.nii.gz", volume)
        spread = float(np.ptp(sitk.GetArrayFromImage(volume)))
        assert np.abs(carried - result.aligned[0]).max() < 0.005 * spread


def carried_points(field: deformation.DeformationField, target: Geometry, points: Tensor) -> Tensor:
    """Where ``points`` (``2 N``, voxels of the field's grid) go, in voxels of the ``target`` grid."""
    moved = points + deformation.sample(field.displacement.double()[None], points[None, :, :, None])[0, :, :, 0]
    matrix = torch.from_numpy(np.linalg.inv(target.matrix()) @ field.geometry.matrix())
    return matrix[:2, :2] @ moved + matrix[:2, 2:]


@pytest.mark.parametrize("kind", ["one size", "twice the size", "half the size", "millimetres", "frames far apart"])
def test_the_inverse_leads_back_whatever_the_two_grids_are(kind: str) -> None:
    shipped = next(s for s in bsafusion.load_samples() if s.id == "mr-bspline")
    fixed, moving = read_input(shipped.fixed, "fixed"), read_input(shipped.moving, "moving")
    if kind in ("twice the size", "half the size"):
        larger = kind == "twice the size"
        array = moving.array.repeat(2, axis=1).repeat(2, axis=2) if larger else moving.array[:, ::2, ::2]
        moving = replace(moving, array=array, geometry=Geometry.picture(array.shape[1:]))
    elif kind != "one size":
        origin = (4.0, -3.0) if kind == "millimetres" else (2000.0, 0.0)
        fixed = replace(fixed, geometry=replace(fixed.geometry, spacing=(0.9, 0.9), physical=True))
        moving = replace(moving, geometry=replace(moving.geometry, spacing=(0.9, 0.9), origin=origin, physical=True))
    result = fuse(fixed, moving)
    assert result.inverse.geometry == moving.geometry
    rows, columns = (torch.linspace(0.25 * (n - 1), 0.75 * (n - 1), 40).double() for n in fixed.geometry.shape)
    points = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).flatten(1)
    there = carried_points(result.field, moving.geometry, points)
    back = carried_points(result.inverse, fixed.geometry, there)
    assert float((there - points).norm(dim=0).mean()) > 1
    assert float((back - points).norm(dim=0).max()) < 0.5


def test_an_mri_and_a_ct_that_were_swapped_are_suspect() -> None:
    shipped = next(s for s in bsafusion.load_samples() if s.id == "ct-mri")
    mri = next(s for s in bsafusion.load_samples() if s.id == "mr-shift").fixed
    right, swapped = fuse(mri, shipped.moving), fuse(shipped.moving, mri)
    reason = "the network takes the fixed image for a CT and the moving one for an MRI"
    assert any(reason in said for said in swapped.reasons)
    assert not any("takes the fixed image" in said for said in right.reasons)
    assert right.report["options"]["task_from"] == "network's guess"


def test_what_the_files_say_of_their_modalities_is_believed() -> None:
    shipped = next(s for s in bsafusion.load_samples() if s.id == "ct-mri")
    mri = next(s for s in bsafusion.load_samples() if s.id == "mr-shift").fixed
    moving = replace(read_image(mri), modality=Modality.CT)
    assert not any("takes the fixed image" in said for said in fuse(shipped.moving, moving).reasons)


def test_one_file_given_twice_is_suspect(pair: tuple[Path, Path], model: Model) -> None:
    twice = fuse(pair[0], pair[0], model=model)
    assert twice.status == "suspect"
    assert "the fixed and the moving image are the same file; check the paths" in twice.reasons
    assert not any("same file" in said for said in fuse(*pair, model=model).reasons)


# --- colour ---


def hues(rgb: NDArray[Any]) -> NDArray[np.float64]:
    """Hue (degrees), saturation and luma of ``H W 3`` bytes: ``H W 3``."""
    unit = rgb.astype(np.float64) / 255
    hsv = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in unit.reshape(-1, 3)]).reshape(unit.shape)
    return np.stack([360 * hsv[..., 0], hsv[..., 1], unit @ [0.299, 0.587, 0.114]], axis=-1)


@pytest.mark.parametrize("task", ["pet-mri", "spect-mri"])
def test_the_hue_of_the_functional_image_is_found_in_the_fused_one(tmp_path: Path, model: Model, task: str) -> None:
    sample = next(s for s in bsafusion.load_samples() if s.task == task)
    out = fuse(sample.fixed, sample.moving, model=model).save(tmp_path / "out")
    fused, aligned = hues(pixels_of(out / "fused.png")), hues(pixels_of(out / "aligned.png"))
    coloured = (fused[..., 1] > 0.2) & (aligned[..., 1] > 0.2)
    coloured &= (fused[..., 2] > 0.1) & (fused[..., 2] < 0.9) & (aligned[..., 2] > 0.1) & (aligned[..., 2] < 0.9)
    assert coloured.mean() > 0.05
    difference = np.abs((fused - aligned)[coloured][:, 0])
    assert np.median(np.minimum(difference, 360 - difference)) < 2


def test_a_functional_image_in_three_equal_channels_is_grey(tmp_path: Path) -> None:
    grey = scan(SHAPE, seed=1)
    moving = write_picture(tmp_path / "moving.png", np.repeat(grey[..., None], 3, axis=2))
    result = fuse(image_of(scan(SHAPE)), moving, model=known_model())
    assert result.aligned.shape == (1, *SHAPE)
    assert "grey" in result.report["inputs"]["moving"]["notes"]["channels"]


# --- what the user may choose ---


def grey_pair() -> tuple[Image, Image]:
    return image_of(scan(SHAPE)), image_of(scan(SHAPE, seed=1))


def coloured_pair() -> tuple[Image, Image]:
    return image_of(scan(SHAPE)), image_of(hot(scan(SHAPE, seed=1)))


def display(image: Image, array: NDArray[Any]) -> NDArray[Any]:
    return np.clip(fit_intensity(image).to_unit(array), 0, 1)


@pytest.mark.parametrize("name", FUSIONS)
def test_a_plain_fusion_joins_the_fixed_and_the_aligned_luminance(name: str) -> None:
    fixed, moving = grey_pair()
    result = fuse(fixed, moving, model=known_model((3.0, -5.0)), fusion=name)
    expected = FUSIONS[name](display(fixed, fixed.array)[0], display(moving, result.aligned)[0])
    assert result.fused is not None
    np.testing.assert_allclose(result.fused[0], expected, atol=1e-6)
    assert result.report["options"]["fusion"] == name
    assert result.panels["fused"][0] == f"fused ({name})"


@pytest.mark.parametrize(
    "options",
    [
        {"fusion": "maximum"},
        {"fusion": "guided", "aligned": True, "weight_fixed": 0.3},
        {"blend": "alpha"},
        {"align_only": True},
    ],
)
def test_the_network_does_not_fuse_where_its_fusion_has_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    fixed, moving = coloured_pair()
    model = known_model((3.0, -5.0))
    whole = snapshot(fuse(fixed, moving, model=model, aligned=options.get("aligned", False)).save(tmp_path / "whole"))
    monkeypatch.delattr(BSAFusion, "fuse_aligned")  # stage 4: whoever calls it fails
    without = snapshot(fuse(fixed, moving, model=model, **options).save(tmp_path / "without"))
    for name in ("aligned.png", "deformation.nii.gz", "deformation_inverse.nii.gz"):
        assert without[name] == whole[name]
    assert without.get("fused.png") != whole["fused.png"]
    with pytest.raises(AttributeError, match="fuse_aligned"):
        fuse(fixed, moving, model=model)


@pytest.mark.parametrize("name", FUSIONS)
def test_a_plain_fusion_of_a_coloured_image_keeps_its_hue(name: str) -> None:
    result = fuse(*coloured_pair(), model=known_model((3.0, -5.0)), fusion=name)
    colour = result.report["colour"]
    assert colour["hue_error_median_deg"] < 2
    assert colour["clipped_share"] == 0


@pytest.mark.parametrize("pair_of", [grey_pair, coloured_pair])
@pytest.mark.parametrize("blend", ["luminance", "alpha", "none"])
def test_the_balance_is_exact_at_both_ends_and_in_the_middle(pair_of: Any, blend: str) -> None:
    fixed, moving = pair_of()
    model = known_model((3.0, -5.0))
    plain, nought, half, one = (
        fuse(fixed, moving, model=model, blend=blend, **extra)
        for extra in ({}, {"weight_fixed": 0.0}, {"weight_fixed": 0.5}, {"weight_fixed": 1.0})
    )
    assert plain.fused is not None
    assert nought.fused is not None
    assert half.fused is not None
    assert one.fused is not None
    assert half.fused.tobytes() == plain.fused.tobytes()
    assert half.report == plain.report
    unit_fixed, unit_aligned = display(fixed, fixed.array), display(moving, plain.aligned)
    if blend == "none" and len(unit_aligned) == 3:
        unit_aligned = np.tensordot([[0.299, 0.587, 0.114]], unit_aligned, axes=1)
    np.testing.assert_allclose(nought.fused, unit_aligned, atol=1e-6)
    np.testing.assert_allclose(one.fused, np.broadcast_to(unit_fixed, plain.fused.shape), atol=1e-6)
    assert nought.panels["fused"][0].endswith("fixed at 0)")


def test_the_balance_moves_towards_the_fixed_image_all_the_way() -> None:
    fixed, moving = coloured_pair()
    model = known_model()
    distances = []
    for weight in (0.5, 0.6, 0.75, 0.9, 1.0):
        fused = fuse(fixed, moving, model=model, weight_fixed=weight).fused
        assert fused is not None
        distances.append(float(np.abs(fused - display(fixed, fixed.array)).mean()))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] == 0


def test_images_that_are_aligned_already_are_not_moved() -> None:
    fixed, moving = coloured_pair()
    result = fuse(fixed, moving, model=known_model((3.0, -5.0)), aligned=True)
    still = fuse(fixed, moving, model=known_model((0.0, 0.0)))
    assert not result.displacement.any()
    np.testing.assert_allclose(result.field.displacement.numpy(), 0, atol=1e-6)
    np.testing.assert_allclose(result.aligned, moving.array, atol=1e-3)
    assert result.fused is not None
    assert still.fused is not None
    # The network's fusion runs as under a field that happens to be zero.
    np.testing.assert_allclose(result.fused, still.fused, atol=1e-5)
    assert result.expected_error is None
    assert result.report["mode"] == "fuse only"
    assert result.report["options"]["aligned"] is True
    evidence = result.report["alignment"]
    assert evidence["similarity_after"] is evidence["expected_error"] is None
    assert evidence["similarity_before"] == still.report["alignment"]["similarity_before"]
    assert evidence["displacement_max"] == 0
    assert list(result.panels) == ["fixed", "moving", "fused", "checkerboard"]


def test_a_refined_result_says_so_and_is_another_one(tmp_path: Path, pair: tuple[Path, Path], model: Model) -> None:
    plain, refined = (fuse(*pair, model=model, refine=steps) for steps in (0, 3))
    assert plain.report["refinement"] is None
    assert plain.report["options"]["refine"] == 0
    told = refined.report["refinement"]
    assert refined.report["options"]["refine"] == told["steps"] == 3
    assert told["objective_after"] < told["objective_before"]
    assert "without refinement" in refined.report["trust"]["note"]
    assert plain.report["trust"]["note"] == model.trust_note
    assert not torch.equal(plain.displacement, refined.displacement)
    assert plain.fused is not None
    assert refined.fused is not None
    assert np.abs(plain.fused - refined.fused).max() > 0
    assert refined.evidence != plain.evidence
    again = fuse(*pair, model=model, refine=3)
    assert snapshot(again.save(tmp_path / "a")) == snapshot(refined.save(tmp_path / "b"))
    alone = fuse(*pair, model=model, refine=3, align_only=True)
    assert torch.equal(alone.displacement, refined.displacement)


def test_mirror_images_are_asked_and_reported(tmp_path: Path, pair: tuple[Path, Path], model: Model) -> None:
    plain, mirrored = (fuse(*pair, model=model, mirrored=asked) for asked in ("never", "always"))
    assert plain.report["alignment"]["disagreement"] is plain.evidence.disagreement is None
    assert mirrored.report["options"]["mirrored"] == "always"
    apart = mirrored.evidence.disagreement
    assert apart is not None
    moved = (plain.displacement - mirrored.displacement).norm(dim=0)[torch.from_numpy(head_mask(plain.fixed.luma()))]
    # The mean of two answers lies as far from one as they disagree.
    assert 0 < float(moved.mean()) == pytest.approx(apart, rel=0.1)
    for result in (plain, mirrored):
        assert "whose mirror images were looked at in doubt alone" in result.report["trust"]["note"]
    again = fuse(*pair, model=model, mirrored="always")
    assert snapshot(again.save(tmp_path / "a")) == snapshot(mirrored.save(tmp_path / "b"))


def test_weights_without_descriptors_cannot_do_all() -> None:
    network = BSAFusion(paper())
    model = Model(network, replace(known_model().record, name="old", preset="paper"), "cpu")
    with pytest.raises(RequestError, match="weights old are of the paper preset, which has no descriptors"):
        fuse(*grey_pair(), model=model, refine=3)
    with pytest.raises(RequestError, match="which does not look at mirror images; leave the mirror images out"):
        fuse(*grey_pair(), model=model, mirrored="always")
    assert fuse(*grey_pair(), model=model).evidence.disagreement is None


def test_what_was_said_to_be_aligned_is_doubted_where_the_images_are_not_alike() -> None:
    noise = np.random.default_rng(0).integers(0, 255, SHAPE).astype(np.uint8)
    result = fuse(image_of(scan(SHAPE)), image_of(noise), model=load_model(), aligned=True)
    assert result.status == "suspect"
    assert "the images as given have a descriptor similarity of" in result.reasons[0]


@pytest.mark.parametrize("sample", ["pet-mri", "spect-mri", "mr-rigid"])
def test_what_is_aligned_is_believed_when_it_is_said_to_be(sample: str) -> None:
    pair = next(s for s in bsafusion.load_samples() if s.id == sample)
    result = fuse(pair.fixed, pair.original, model=load_model(), aligned=True)
    assert (result.status, result.reasons) == ("ok", [])


def test_aligned_scans_are_placed_by_their_positions() -> None:
    shifted = replace(millimetres(SHAPE), origin=(4.0, -2.0))
    fixed = image_of(scan(SHAPE).astype(np.float32), geometry=millimetres(SHAPE))
    moving = image_of(scan(SHAPE, seed=1).astype(np.float32), geometry=shifted)
    result = fuse(fixed, moving, model=known_model((3.0, -5.0)), aligned=True)
    assert result.report["grid"]["method"] == "physical"
    np.testing.assert_allclose(result.aligned[0, :-2, 4:], moving.array[0, 2:, :-4], atol=1e-3)


def test_alignment_alone_makes_no_fused_picture(tmp_path: Path) -> None:
    fixed, moving = coloured_pair()
    result = fuse(fixed, moving, model=known_model((3.0, -5.0)), align_only=True)
    whole = fuse(fixed, moving, model=known_model((3.0, -5.0)))
    assert result.fused is result.report["colour"] is None
    np.testing.assert_array_equal(result.aligned, whole.aligned)
    assert torch.equal(result.field.displacement, whole.field.displacement)
    assert result.report["mode"] == "align only"
    options = result.report["options"]
    assert options["fusion"] is options["blend"] is options["weight_fixed"] is None
    out = result.save(tmp_path / "out")
    assert {path.name for path in out.iterdir()} == FILES - {"fused.png"}
    assert "fused" not in result.panels


def test_an_overlay_is_transparent_where_the_moving_image_is_dark() -> None:
    fixed, moving = coloured_pair()
    result = fuse(fixed, moving, model=known_model((3.0, -5.0)), blend="alpha")
    base, over = display(fixed, fixed.array), display(moving, result.aligned)
    alpha = np.tensordot([[0.299, 0.587, 0.114]], over, axes=1)
    np.testing.assert_allclose(result.fused, (1 - alpha) * base + alpha * over, atol=1e-6)
    assert result.report["options"]["fusion"] is None
    assert result.report["colour"]["hue_error_median_deg"] < 2
    assert result.panels["fused"][0] == "fused (overlay)"


def test_without_a_blend_the_picture_is_the_fused_luminance() -> None:
    fixed, moving = coloured_pair()
    result, coloured = (fuse(fixed, moving, model=known_model(), blend=blend) for blend in ("none", "luminance"))
    assert result.fused is not None
    assert coloured.fused is not None
    assert result.fused.shape == (1, *SHAPE)
    np.testing.assert_allclose(np.tensordot([[0.299, 0.587, 0.114]], coloured.fused, axes=1), result.fused, atol=1e-6)
    assert result.report["colour"] == {"blend": "none", "colormap": "none"}


@pytest.mark.parametrize("blend", ["luminance", "alpha"])
@pytest.mark.parametrize("name", ["hot-iron", "pet-20-step"])
def test_a_colour_map_gives_its_hues_to_a_grey_image(tmp_path: Path, name: str, blend: str) -> None:
    fixed, moving = grey_pair()
    result = fuse(fixed, moving, model=known_model((3.0, -5.0)), colormap=name, blend=blend)
    assert result.fused is not None
    assert result.fused.shape == (3, *SHAPE)
    assert result.aligned.shape == (1, *SHAPE)  # its values are not coloured
    mapped = colourise(display(moving, result.aligned), read_colormap(name))
    only = fuse(fixed, moving, model=known_model((3.0, -5.0)), colormap=name, blend=blend, weight_fixed=0.0)
    np.testing.assert_allclose(only.fused, mapped, atol=1e-6)
    colour = result.report["colour"]
    assert (colour["colormap"], colour["clipped_share"]) == (name, 0)
    assert colour["hue_error_median_deg"] < 2
    assert result.report["options"]["colormap"] == name
    assert name in result.panels["fused"][0]
    assert pixels_of(result.save(tmp_path / "out") / "fused.png").shape == (*SHAPE, 3)


def test_grey_stays_grey_unless_a_colour_map_is_asked_for() -> None:
    result = fuse(*grey_pair(), model=known_model())
    assert result.fused is not None
    assert len(result.fused) == 1
    assert result.report["colour"] == {"blend": "luminance", "colormap": "none"}


def test_a_picture_without_any_colour_left_has_no_hue_error() -> None:
    colour = fuse(*coloured_pair(), model=known_model(), weight_fixed=1.0).report["colour"]
    assert colour["hue_error_median_deg"] is None
    assert colour["hue_lost_share"] == 1


def test_a_colour_map_for_an_image_in_colour_is_refused() -> None:
    with pytest.raises(ImageError, match="has colours of its own; expected a grey one for colour map pet; leave"):
        fuse(*coloured_pair(), model=known_model(), colormap="pet")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fusion": "mean"}, "unknown fusion 'mean'; expected one of network, maximum, average, laplacian, guided"),
        ({"blend": "add"}, "unknown blend 'add'; expected one of luminance, alpha, none"),
        ({"colormap": "jet"}, "unknown colormap 'jet'; expected one of none, hot-iron, pet"),
        ({"weight_fixed": 1.1}, "a weight of 1.1 for the fixed image; expected 0"),
        ({"weight_fixed": float("nan")}, "a weight of nan"),
        ({"aligned": True, "align_only": True}, "nothing is to be fused, yet .* leave out one or the other"),
        ({"fusion": "average", "align_only": True}, "nothing is to be fused, yet"),
        ({"weight_fixed": 0.3, "align_only": True}, "nothing is to be fused, yet"),
        ({"blend": "alpha", "fusion": "maximum"}, "has no use for the maximum fusion; choose blend"),
        ({"blend": "none", "colormap": "pet"}, "blend none is grey and would not show colour map pet; leave one"),
        ({"refine": -1}, r"-1 steps of refinement; expected a whole number, 0 \(none\) to 200"),
        ({"refine": 201}, "201 steps of refinement; expected a whole number, 0"),
        ({"refine": 2.5}, "2.5 steps of refinement; expected a whole number"),
        ({"refine": float("inf")}, "inf steps of refinement; expected a whole number"),
        ({"refine": "2"}, "'2' steps of refinement; expected a whole number"),
        ({"refine": True}, "True steps of refinement; expected a whole number"),
        ({"weight_fixed": "0.5"}, "a weight of '0.5' for the fixed image; expected 0"),
        ({"weight_fixed": None}, "a weight of None"),
        ({"weight_fixed": np.float32(2)}, "a weight of 2 for"),
        ({"mirrored": "no"}, "unknown mirrored 'no'; expected one of auto, always, never"),
        ({"mirrored": True}, "unknown mirrored True; expected one of auto"),
        ({"aligned": 1}, "aligned is 1; expected True or False"),
        ({"align_only": None}, "align_only is None; expected True or False"),
        ({"refine": 5, "aligned": True}, "aligned already are not moved, so there is nothing to refine; leave out one"),
        ({"mirrored": "always", "aligned": True}, "not moved, so there is nothing to mirror; leave out one of both"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_read(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        fuse("nowhere.png", "nowhere.png", **options)


def test_scalars_of_numpy_are_plain_numbers_in_the_result(tmp_path: Path) -> None:
    grid = Geometry(
        shape=tuple(np.array(SHAPE)),
        spacing=tuple(np.array([0.5, 0.5], np.float32)),
        origin=tuple(np.zeros(2, np.float32)),
        direction=np.eye(2, dtype=np.float32),
    )
    fixed, moving = (image_of(scan(SHAPE, seed=seed), geometry=grid) for seed in (0, 1))
    moving = replace(moving, meta={"slice_position_mm": np.float32(4), "slice_index": np.int64(3), "format": "made"})
    options: dict[str, Any] = {
        "weight_fixed": np.float32(0.25),
        "refine": np.int64(1),
        "mirrored": np.str_("always"),
        "blend": np.str_("none"),
    }
    result = fuse(fixed, moving, model=known_model(), **options)
    out = result.save(tmp_path / "out")
    report = json.loads((out / "report.json").read_text())
    assert report == result.report
    assert {name: report["options"][name] for name in options} == {**options, "refine": 1}
    assert report["inputs"]["moving"]["notes"] == {"slice_position_mm": 4, "slice_index": 3, "format": "made"}
    assert report["inputs"]["moving"]["spacing_mm"] == [0.5, 0.5]


def test_whole_numbers_are_whole_however_they_are_written() -> None:
    assert FuseOptions(refine=2.0) == FuseOptions(refine=2)
    assert type(FuseOptions(refine=2.0).refine) is int
    assert type(FuseOptions(weight_fixed=1).weight_fixed) is float


def test_a_caption_tells_what_is_not_the_default() -> None:
    assert FuseOptions().caption() == "fused"
    assert (
        FuseOptions(blend="alpha", colormap="pet", weight_fixed=0.7).caption() == "fused (overlay, pet, fixed at 0.7)"
    )
    assert FuseOptions(blend="none", fusion="guided").caption() == "fused (grey, guided)"


# --- files of every kind ---


def sixteen_bit(seed: int) -> NDArray[np.uint16]:
    return scan(SHAPE, seed=seed).astype(np.uint16) * 200


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_stay_sixteen_bits(tmp_path: Path, suffix: str) -> None:
    fixed = write_picture(tmp_path / f"fixed{suffix}", sixteen_bit(0))
    moving = write_picture(tmp_path / f"moving{suffix}", sixteen_bit(1))
    out = fuse(fixed, moving, model=known_model()).save(tmp_path / "out")
    aligned = pixels_of(out / "aligned.png")
    assert aligned.dtype == np.uint16
    np.testing.assert_allclose(aligned.astype(int), sixteen_bit(1), atol=1)
    fused = pixels_of(out / "fused.png")
    assert fused.dtype == np.uint16
    assert len(np.unique(fused)) > 256


def test_jpeg(tmp_path: Path) -> None:
    fixed = write_picture(tmp_path / "fixed.jpg", scan(SHAPE), quality=95)
    moving = write_picture(tmp_path / "moving.jpeg", hot(scan(SHAPE, seed=1)), quality=95)
    result = fuse(fixed, moving, model=known_model())
    assert result.report["inputs"]["fixed"]["notes"]["format"] == "JPEG"
    np.testing.assert_array_equal(pixels_of(result.save(tmp_path / "out") / "aligned.png"), pixels_of(moving))


def test_dicom_brings_its_modality_and_its_millimetres(tmp_path: Path, model: Model) -> None:
    files = [get_testdata_file(name, download=False) for name in ("MR_small.dcm", "CT_small.dcm")]
    result = fuse(*files, model=model)
    assert result.fused.shape == (1, 64, 64)
    assert result.report["options"]["task"] == "ct-mri"
    assert result.report["options"]["task_from"] == "file"
    assert result.report["inputs"]["moving"]["modality"] == "ct"
    assert result.report["inputs"]["fixed"]["spacing_mm"] == [0.3125, 0.3125]
    out = result.save(tmp_path / "out")
    assert {path.name for path in out.iterdir()} == FILES | {"fused.nii.gz", "aligned.nii.gz"}
    written, source = (sitk.ReadImage(str(path)) for path in (out / "fused.nii.gz", files[0]))
    np.testing.assert_allclose(written.GetSpacing()[:2], (0.3125, 0.3125), rtol=1e-5)
    np.testing.assert_allclose(written.GetOrigin(), source.GetOrigin(), atol=1e-3)
    np.testing.assert_allclose(written.GetDirection(), source.GetDirection(), atol=1e-5)
    text = (out / "report.json").read_text(encoding="utf-8")
    assert "CompressedSamples" not in text  # the patient's name in both files


def test_hounsfield_units_in_unsigned_files_are_seen_in_the_picture(tmp_path: Path) -> None:
    values = scan(SHAPE, seed=1).astype(np.float32) * 8 - 1024
    moving = image_of(values, geometry=millimetres(SHAPE), dtype="uint16")
    fixed = image_of(scan(SHAPE).astype(np.float32), geometry=millimetres(SHAPE), dtype="float32")
    result = fuse(fixed, moving, model=known_model())
    out = result.save(tmp_path / "out")
    shown = pixels_of(out / "aligned.png").astype(float)
    np.testing.assert_allclose(shown, 255 * np.clip(fit_intensity(moving).to_unit(values), 0, 1), atol=0.51)
    assert shown.max() == 255
    aligned = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "aligned.nii.gz")))
    np.testing.assert_allclose(aligned, values, atol=0.1)


def test_sixteen_bit_colours_are_not_saturated_in_nifti(tmp_path: Path) -> None:
    colours = hot(scan(SHAPE, seed=1)).astype(np.uint16) * 257
    fixed = image_of(scan(SHAPE).astype(np.float32), geometry=millimetres(SHAPE))
    out = fuse(fixed, image_of(colours), model=known_model()).save(tmp_path / "out")
    aligned = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "aligned.nii.gz")))
    np.testing.assert_allclose(aligned.astype(int), colours // 257, atol=1)


# --- the report ---


def test_report_says_what_was_done(tmp_path: Path, pair: tuple[Path, Path], model: Model) -> None:
    out = fuse(*pair, model=model).save(tmp_path / "out")
    text = (out / "report.json").read_text(encoding="utf-8")
    report = json.loads(text)
    for role, path in zip(("fixed", "moving"), pair, strict=True):
        assert report["inputs"][role]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert report["inputs"][role]["file"] == path.name
        assert report["inputs"][role]["size"] == [SHAPE[1], SHAPE[0]]
    assert report["inputs"]["fixed"]["modality"] == "mri"
    assert str(tmp_path) not in text
    assert str(Path.cwd()) not in text
    assert report["grid"]["method"] == "same grid"
    assert report["status"] in ("ok", "suspect")
    assert isinstance(report["reasons"], list)
    assert report["options"]["weights_sha256"] == model.record.sha256
    assert model.trust is not None
    assert report["options"]["calibration_sha256"] == model.trust.sha256
    assert report["options"]["device"] == "cpu"
    assert report["options"]["threads"] == torch.get_num_threads()
    assert report["versions"]["bsafusion"] == importlib.metadata.version("bsafusion")
    assert report["versions"]["torch"] == importlib.metadata.version("torch")
    assert 0 <= report["alignment"]["outside_share"] <= 1
    assert report["use"] == "Research use only. Not for clinical use."


def test_a_field_that_takes_an_area_to_a_line_folds() -> None:
    luma = torch.from_numpy(scan(SHAPE).astype(np.float32) / 255)
    flattened = torch.stack([-torch.arange(float(SHAPE[0])).view(-1, 1).expand(SHAPE), torch.zeros(SHAPE)])
    out = known_model().network.predict(luma[None, None], luma[None, None])
    out = out._replace(alignment=out.alignment._replace(displacement=flattened[None]))
    assert measure_evidence(out.alignment, luma.numpy(), luma.numpy()).folded_share == 1


def test_the_same_call_gives_the_same_bytes(tmp_path: Path, pair: tuple[Path, Path], model: Model) -> None:
    first, second = (snapshot(fuse(*pair, model=model).save(tmp_path / name)) for name in ("a", "b"))
    assert first == second
    assert set(first) == FILES


def test_the_evidence_is_that_of_a_known_field() -> None:
    image = image_of(scan(SHAPE))
    evidence = fuse(image, image, model=known_model((3.0, 4.0), expected_error=2.0)).evidence
    assert evidence.displacement_mean == pytest.approx(5.0, abs=1e-3)
    assert evidence.displacement_max == pytest.approx(5.0, abs=1e-3)
    assert evidence.expected_error == pytest.approx(2.0, rel=1e-3)
    assert evidence.folded_share == 0
    assert evidence.outside_share == 0
    assert evidence.nonaffine_mean == pytest.approx(0, abs=1e-3)
    assert evidence.similarity_spread == pytest.approx(evidence.similarity_after - evidence.similarity_low)
    assert evidence.similarity_spread >= 0
    told = fuse(image, image, model=known_model((3.0, 4.0), expected_error=2.0)).report["alignment"]
    assert {k: v for k, v in asdict(evidence).items() if v is not None} == pytest.approx(
        {k: v for k, v in told.items() if v is not None}, abs=1e-5
    )
    assert evidence.assessed_error is None  # its network was not trained to


@pytest.mark.parametrize("image", [scan(SHAPE), scan((2 * SHAPE[0], 2 * SHAPE[1]))])
def test_the_shipped_weights_judge_their_results(image: NDArray[np.float64]) -> None:
    evidence = fuse(image_of(image), image_of(image)).evidence
    assert evidence.assessed_error is not None
    assert 0 < evidence.assessed_error <= 12 * max(image.shape) / 193


@pytest.mark.parametrize(("name", "error"), [("ct-mri", 2.25), ("mr-rigid", 0.61), ("mr-similarity", 1.0)])
def test_the_shipped_weights_say_about_how_far_they_are_off(model: Model, name: str, error: float) -> None:
    sample = next(s for s in bsafusion.load_samples() if s.id == name)
    evidence = fuse(sample.fixed, sample.moving, model=model).evidence  # as measured against the known transform
    assert evidence.assessed_error == pytest.approx(error, rel=0.6)
    assert evidence.expected_error == pytest.approx(error, rel=0.6)


def test_the_shipped_weights_keep_more_of_both_images_than_simple_fusions(model: Model) -> None:
    sample = next(s for s in bsafusion.load_samples() if s.id == "ct-mri")
    result = fuse(sample.fixed, sample.moving, model=model)
    assert result.fused is not None
    fixed = display(result.fixed, result.fixed.array)[0]
    aligned = display(read_image(sample.moving), result.aligned)[0]
    pictures = {name: FUSIONS[name](fixed, aligned) for name in ("maximum", "average", "laplacian")}
    pictures["network"] = result.fused[0]
    scores = {
        name: fusion_metrics(255 * fixed, 255 * aligned, 255 * picture, ("qabf", "viff", "qs"))
        for name, picture in pictures.items()
    }
    for metric in ("qabf", "viff", "qs"):
        assert max(scores, key=lambda name: scores[name][metric]) == "network", metric


def test_the_share_of_the_head_that_a_straight_cut_takes_out_of_view() -> None:
    from bsafusion.evidence import _cut_share

    rows, columns = np.meshgrid(np.arange(128.0) - 64, np.arange(128.0) - 64, indexing="ij")
    radius = np.hypot(rows, columns)
    head = radius < 50
    whole = 0.5 * head
    assert _cut_share(whole, head) == 0
    half = whole * (rows < 0)
    assert _cut_share(half, head) == pytest.approx(0.5, abs=0.02)  # 2 % may be seen
    # Beyond a line at 0.4 radii from the middle lie 0.25 of a disc; the line may have any angle.
    slanted = whole * (0.6 * rows + 0.8 * columns < 20)
    assert _cut_share(slanted, head) == pytest.approx(0.25, abs=0.03)
    # A brain without its skull ends in a curve: no line has black on one side and brain all along the other.
    assert _cut_share(whole * (radius < 30), head) < 0.15
    assert _cut_share(np.zeros((128, 128)), head) == 0  # nothing at all: other evidence speaks
    large = [x.repeat(8, 0).repeat(8, 1) for x in (slanted, head)]
    assert _cut_share(*large) == pytest.approx(_cut_share(slanted, head), abs=0.02)
    # Neither noise nor a background above 0 hides it.
    noise = np.random.default_rng(0).normal(0, 12 / 255, (2, 256, 256))
    noisy = np.hypot(half.repeat(2, 0).repeat(2, 1) + noise[0], noise[1])
    assert _cut_share(noisy, head.repeat(2, 0).repeat(2, 1)) == pytest.approx(0.5, abs=0.03)
    assert _cut_share(0.1 + 0.9 * half, head) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("beyond", [0, 20])
def test_what_is_aligned_is_what_is_fused_also_at_the_frame(beyond: int) -> None:
    """A moving image that ends with the fixed grid, and one that goes on and is brought into view."""
    height, width = SHAPE
    grid = replace(millimetres((height, width + 2 * beyond)), origin=(-float(beyond), 0.0))
    fixed, moving = (0.5 + 0.5 * np.random.default_rng(seed).random(grid.shape) for seed in (0, 1))
    fixed = fixed[:, beyond : beyond + width]
    fixed[:, 30:], fixed[:20], moving[:20] = 0, 0, 0
    result = fuse(
        image_of(fixed.astype(np.float32), geometry=millimetres(SHAPE)),
        image_of(moving.astype(np.float32), geometry=grid),
        model=known_model((0.0, 8.7)),
    )
    assert result.fused is not None
    shown = fit_intensity(result.moving).to_unit(result.aligned)[0]
    assert (shown[30:, -8:].mean() > 0.3) == (beyond > 8)
    assert (result.fused[0][shown > 0.05] > 0.005).all()
    assert (result.fused[0][(shown <= 0) & (fixed == 0)] == 0).all()


def test_what_no_affine_map_explains_of_a_field() -> None:
    from bsafusion.deformation import affine_field
    from bsafusion.evidence import _nonaffine_mean

    mask = torch.zeros(48, 65, dtype=torch.bool)
    mask[8:40, 10:50] = True
    affine = affine_field(torch.tensor([[[1.1, -0.2, 4.0], [0.3, 0.9, -7.0]]]), shape=(48, 65))[0]
    assert _nonaffine_mean(affine, mask) == pytest.approx(0, abs=1e-4)
    # A chessboard of squares of 4 pixels moved by +-(3, 4): no affine map explains any of it.
    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(65), indexing="ij")
    signs = 1.0 - 2.0 * ((rows // 4 + columns // 4) % 2)
    board = signs * torch.tensor([3.0, 4.0]).view(2, 1, 1)
    assert _nonaffine_mean(affine + board, mask) == pytest.approx(5, rel=0.02)
    assert _nonaffine_mean(100 * ~mask * board, mask) == 0


def test_a_field_that_points_out_of_the_frame_is_suspect() -> None:
    result = fuse(image_of(scan(SHAPE)), image_of(scan(SHAPE, seed=1)), model=known_model((0.0, 50.0)))
    # Columns from 65 - 50 on look beyond the last one; the ellipse spans about columns 12 to 52.
    assert result.evidence.outside_share > 0.9
    assert result.status == "suspect"
    assert any("outside the moving image" in reason for reason in result.reasons)
    assert any("reaches 50 px" in reason for reason in result.reasons)


def test_a_moving_image_that_shows_half_of_the_head_is_suspect() -> None:
    whole = scan(SHAPE).astype(np.float32)
    fixed = image_of(whole, geometry=millimetres(SHAPE))
    moving = image_of(whole[:, :33], geometry=millimetres((SHAPE[0], 33)))
    result = fuse(fixed, moving, model=known_model())
    assert result.report["grid"]["method"] == "physical"
    assert 0.4 < result.evidence.outside_share < 0.6
    assert any("outside the moving image" in reason for reason in result.reasons)


def test_a_fixed_image_that_is_no_mri_is_suspect() -> None:
    fixed, moving = (image_of(scan(SHAPE, seed=seed)) for seed in (0, 1))
    swapped = replace(fixed, modality=Modality.CT), replace(moving, modality=Modality.MRI)
    result = fuse(*swapped, model=known_model())
    assert result.status == result.report["status"] == "suspect"
    assert result.reasons[-1].startswith("the fixed image is a CT by its file")
    assert (result.report["options"]["task"], result.report["options"]["task_from"]) == ("mri-ct", "file")


def test_slices_from_different_levels_are_said_to_be_apart() -> None:
    def at(level: float, seed: int, tilt: float = 0.0) -> Image:
        """Axial, turned by ``tilt`` radians about the left-right axis through its centre."""
        down, centre = np.array([0, np.cos(tilt), np.sin(tilt)]), (SHAPE[0] - 1) / 2
        geometry, _, _ = slice_geometry(
            shape=SHAPE,
            spacing=(1.0, 1.0),
            origin=np.array([0, 0, level]) - centre * (down - [0, 1, 0]),
            x_axis=np.array([1.0, 0, 0]),
            y_axis=down,
            through=np.array([0, 0, 5.0]),
        )
        return image_of(scan(SHAPE, seed=seed), geometry=geometry)

    def note(fixed: Image, moving: Image) -> str:
        return str(fuse(fixed, moving, model=known_model()).report["grid"]["note"])

    told = "By their positions the two slices are up to {} mm apart, across them."
    assert note(at(-30, 0), at(120, 1)).endswith(told.format(150))
    assert note(at(0, 0, 0.3), at(0, 1)).endswith(told.format(round((SHAPE[0] - 1) / 2 * np.sin(0.3))))
    unplaced = image_of(scan(SHAPE, seed=1), geometry=millimetres(SHAPE))
    assert "apart" not in note(at(-30, 0), unplaced) + note(at(-30, 0), at(-30, 1)) + note(at(0, 0, 0.3), at(0, 1, 0.3))


def test_an_orientation_that_is_assumed_is_told() -> None:
    placed = image_of(scan(SHAPE), geometry=millimetres(SHAPE))
    unknown = replace(millimetres(SHAPE), positioned=False, plane=None)
    for geometry in (unknown, Geometry.picture(SHAPE)):
        other = image_of(scan(SHAPE, seed=1), geometry=geometry)
        for pair, name in (((placed, other), "moving"), ((other, placed), "fixed")):
            note = fuse(*pair, model=known_model()).report["grid"]["note"]
            assert f"The orientation of the {name} image is not known; it is taken as radiology displays it." in note
        assert "orientation" not in fuse(other, other, model=known_model()).report["grid"]["note"]


def test_identical_images_without_displacement_are_ok() -> None:
    image = image_of(scan(SHAPE))
    result = fuse(image, image, model=known_model())
    assert (result.status, result.reasons) == ("ok", [])
    assert result.evidence.similarity_after == pytest.approx(1.0, abs=1e-5)


def test_a_network_that_doubts_its_field_is_believed() -> None:
    image = image_of(scan(SHAPE))
    result = fuse(image, image, model=known_model(expected_error=9.0))
    assert result.status == "suspect"
    assert result.report["reasons"] == result.reasons
    assert "off by 9.0 px" in result.reasons[0]


@pytest.mark.parametrize(
    ("asked", "modality", "task", "source"),
    [
        ("spect-mri", Modality.SPECT, "spect-mri", "request"),
        ("spect-mri", Modality.UNKNOWN, "spect-mri", "request"),
        ("spect-mri", Modality.CT, "spect-mri", "request; the file says ct"),
        ("auto", Modality.PET, "pet-mri", "file"),
        ("auto", Modality.SPECT, "spect-mri", "file"),
        ("auto", Modality.MRI, "mr-mr", "file"),
    ],
)
def test_where_the_task_comes_from(asked: str, modality: Modality, task: str, source: str) -> None:
    moving = replace(image_of(scan(SHAPE, seed=1)), modality=modality)
    options = fuse(image_of(scan(SHAPE)), moving, task=asked, model=known_model()).report["options"]
    assert (options["task"], options["task_from"]) == (task, source)


def test_without_a_hint_the_network_names_the_task() -> None:
    image = image_of(scan(SHAPE))
    options = fuse(image, image, model=known_model()).report["options"]
    assert options["task"] in ("ct-mri", "pet-mri", "spect-mri", "mr-mr")
    assert options["task_from"] == "network's guess"


def test_the_paper_s_network_has_no_evidence_of_its_own() -> None:
    torch.manual_seed(0)
    network = BSAFusion(replace(paper(), working_side=81))
    result = fuse(
        image_of(scan(SHAPE)),
        image_of(hot(scan(SHAPE, seed=1))),
        model=Model(network, known_model().record, "cpu"),
    )
    assert result.expected_error is None
    assert result.report["alignment"]["similarity_after"] is None
    assert result.fused.shape == (3, *SHAPE)


# --- saving ---


@pytest.fixture
def result() -> FusionResult:
    return fuse(image_of(scan(SHAPE)), image_of(scan(SHAPE, seed=1)), model=known_model())


def test_saving_makes_the_folders_above(tmp_path: Path, result: FusionResult) -> None:
    assert result.save(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == FILES


def test_an_earlier_result_is_replaced_only_when_asked(tmp_path: Path, result: FusionResult) -> None:
    out = result.save(tmp_path / "out")
    (out / "fused.png").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="not empty"):
        result.save(out)
    assert (out / "fused.png").read_bytes() == b"mine"
    result.save(out, overwrite=True)
    assert pixels_of(out / "fused.png").shape == SHAPE
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_no_result_is_never_replaced(tmp_path: Path, result: FusionResult) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("words")
    with pytest.raises(FileExistsError, match="not a result folder"):
        result.save(tmp_path / "thesis", overwrite=True)
    assert snapshot(tmp_path) == {"thesis": None, "thesis/chapter.txt": b"words"}


def test_a_result_beside_which_something_else_was_put_is_not_replaced(tmp_path: Path, result: FusionResult) -> None:
    out = result.save(tmp_path / "out")
    (out / "labels.nii.gz").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"holds labels\.nii\.gz, which is no part of a result"):
        result.save(out, overwrite=True)
    assert (out / "labels.nii.gz").read_bytes() == b"mine"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_save_leaves_nothing(
    tmp_path: Path, result: FusionResult, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("bsafusion.result.overview", interrupted)
    with pytest.raises(error):
        result.save(tmp_path / "out")
    assert snapshot(tmp_path) == {}


# --- what is refused ---


def test_a_fixed_image_in_colour_is_refused() -> None:
    with pytest.raises(ImageError, match=r"colour; expected a grey one \(MRI\); swap the two"):
        fuse(image_of(hot(scan(SHAPE))), image_of(scan(SHAPE)), model=known_model())


def test_an_unknown_task_is_refused_before_anything_is_read() -> None:
    with pytest.raises(RequestError, match="unknown task 'mri-ct'; expected ct-mri"):
        fuse("nowhere.png", "nowhere.png", task="mri-ct")


@pytest.mark.parametrize("role", ["fixed", "moving"])
def test_errors_name_the_role(tmp_path: Path, role: str) -> None:
    files = {name: write_picture(tmp_path / f"{name}.png", scan(SHAPE)) for name in ("fixed", "moving")}
    files[role].unlink()
    with pytest.raises(ImageError, match=rf"{role} image: {role}\.png: no such file"):
        fuse(files["fixed"], files["moving"], model=known_model())


def test_a_moving_image_of_which_only_background_is_in_view_is_refused() -> None:
    content = np.zeros(SHAPE, dtype=np.float32)
    content[:, 50:] = np.linspace(1, 2, 15)
    fixed = image_of(scan(SHAPE).astype(np.float32), geometry=millimetres(SHAPE))
    left = replace(millimetres(SHAPE), origin=(30.0, 0.0))
    with pytest.raises(ImageError, match="nothing of it but background falls on the fixed grid"):
        fuse(fixed, image_of(content, geometry=left), model=known_model())


def test_frames_that_do_not_meet_are_centred_and_the_report_says_so() -> None:
    fixed, moving = (image_of(scan(SHAPE, seed=s).astype(np.float32), geometry=millimetres(SHAPE)) for s in (0, 1))
    far = replace(moving, geometry=replace(moving.geometry, origin=(500.0, 0.0)))
    result = fuse(fixed, far, model=known_model())
    assert result.report["grid"] == {
        "method": "physical spacing, centred",
        "note": "Centred on each other at true mm, because by their positions the frames overlap by only 0%.",
    }
    np.testing.assert_allclose(result.aligned, moving.array, atol=0.05)


@pytest.mark.parametrize("device", ["tpu", "cpu:7", "cpu:x", "cpu:", "cuda:99"])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(RequestError, match=rf"device '{device}' is not there; expected one of cpu"):
        load_model(device=device)


def test_weights_from_a_file_are_the_ones_that_were_saved(tmp_path: Path) -> None:
    model = load_model(str(known_weights(tmp_path, (3.0, -5.0))))
    for name, value in known_network((3.0, -5.0)).state_dict().items():
        torch.testing.assert_close(model.network.state_dict()[name], value, rtol=0, atol=0)


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(WeightsError, match=r"no weights 'best': expected a \.safetensors file or one of the shipped"):
        load_model("best")
