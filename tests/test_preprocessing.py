"""Invertible records, and grids that meet where the anatomy does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsafusion.deformation import DeformationField, MovingFrame, warp
from bsafusion.image import Geometry, Image, ImageError
from bsafusion.io import read_image, write_image
from bsafusion.preprocessing import (
    GridMatch,
    IntensityScaling,
    apply_field,
    fit_intensity,
    has_partner,
    match_grids,
    network_field,
    resample_to_grid,
    slice_astray,
    total_field,
    white_level,
)
from bsafusion.scoring import STRETCHED, grey_levels

AXIAL = Geometry((64, 80), (1.0, 1.0), (-40.0, -32.0), ((1.0, 0.0), (0.0, 1.0)), plane="axial")


def _blob(geometry: Geometry, centre: tuple[float, float], *, width: float = 6.0) -> np.ndarray:
    """A Gaussian blob at a physical point, ``1 *S``."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in geometry.shape], indexing="ij"), axis=-1)
    distance = np.linalg.norm(geometry.index_to_physical(index) - np.asarray(centre), axis=-1)
    return np.exp(-((distance / width) ** 2)).astype(np.float32)[None]


def _smooth_field(shape: tuple[int, int], size: float = 2.0) -> torch.Tensor:
    y, x = np.meshgrid(*[np.linspace(0, 2 * np.pi, n) for n in shape], indexing="ij")
    return torch.from_numpy(size * np.stack([np.sin(y) * np.cos(x), np.cos(y + x)])).float()


# --- intensities


def test_intensity_known_values() -> None:
    assert IntensityScaling(50, 250).to_unit(np.array([50, 100, 250, 300])).tolist() == [0, 0.25, 1, 1.25]


@pytest.mark.parametrize(("low", "high"), [(1, 1), (2, 1), (0, float("inf")), (float("nan"), 1)])
def test_intensity_refuses_no_range(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="low < high"):
        IntensityScaling(low, high)


def test_auto_intensity_is_minmax_for_pictures_and_robust_for_scans() -> None:
    array = np.full((1, 100, 100), -2000.0, np.float32)
    array[0, 20:80] = np.linspace(-1000, 1000, 6000).reshape(60, 100)
    array[0, 50, 50] = 30000
    picture = Image(array + 2000, Geometry.picture((100, 100)), dtype="uint16")
    assert fit_intensity(picture) == IntensityScaling(0, 32000)
    scan = Image(array, dataclasses.replace(AXIAL, shape=(100, 100)), dtype="int16")
    fitted = fit_intensity(scan)
    assert -1000 <= fitted.low < -990
    assert 990 < fitted.high <= 1000
    robust = fit_intensity(picture, method="percentile")
    assert (robust.low, robust.high) == pytest.approx((fitted.low + 2000, fitted.high + 2000))


MM = dataclasses.replace(AXIAL, shape=(40, 40))


@pytest.mark.parametrize(
    ("channels", "dtype", "geometry", "kind", "white"),
    [
        (1, "uint8", Geometry.picture((40, 40)), "PNG", 255),
        (1, "uint16", Geometry.picture((40, 40)), "", 65535),
        (1, "float32", Geometry.picture((40, 40)), "TIFF", None),
        (1, "uint16", Geometry.picture((40, 40)), "DICOM", None),  # unsigned integers of a scanner, without spacing
        (1, "uint8", MM, "", None),
        (3, "uint8", MM, "NIfTI", 255),
    ],
)
def test_one_decision_on_what_is_a_picture(
    channels: int, dtype: str, geometry: Geometry, kind: str, white: float | None
) -> None:
    array = np.random.default_rng(0).integers(10, 200, (channels, 40, 40)).astype(np.float32)
    array[0, 5, 5] = 205
    image = Image(array, geometry, dtype=dtype, meta={"format": kind})
    assert white_level(image) == white
    assert (grey_levels(image)[1] == STRETCHED) == (white is None)
    assert (fit_intensity(image) == IntensityScaling(10, 205)) == (white is not None)
    below = Image(array - 11, geometry, dtype=dtype, meta={"format": kind})
    assert white_level(below) is None


def test_an_array_and_the_same_file_are_scaled_alike(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (1, 40, 40), dtype=np.uint8)
    array[0, :30] //= 4
    write_image(tmp_path / "a.png", array, value_range=(0, 255))
    image = Image(array, Geometry.picture((40, 40)))
    assert fit_intensity(image) == fit_intensity(read_image(tmp_path / "a.png"))


def test_a_mask_has_a_range_too() -> None:
    mask = np.zeros((1, 40, 40), np.float32)
    mask[0, 10:20] = 3
    assert fit_intensity(Image(mask, Geometry.picture((40, 40)))) == IntensityScaling(0, 3)


# --- grids


def test_same_grid_is_untouched() -> None:
    for geometry in (AXIAL, Geometry.picture((64, 80))):
        match = match_grids(geometry, geometry)
        assert match.method == "same grid"
        array = np.random.default_rng(0).random((3, 64, 80), np.float32) * 65535
        np.testing.assert_array_equal(resample_to_grid(array, match, (64, 80)), array)


def test_physical_match_joins_the_anatomy_across_spacing_and_flips() -> None:
    moving = Geometry((50, 36), (2.0, 1.5), (36.0, 38.0), ((-1.0, 0.0), (0.0, -1.0)), plane="axial")
    match = match_grids(AXIAL, moving)
    assert match.method == "physical"
    index = np.array([20.0, 33.0])
    there = match.affine @ [*index, 1.0]
    np.testing.assert_allclose(moving.index_to_physical(there), AXIAL.index_to_physical(index), atol=1e-9)
    resampled = resample_to_grid(_blob(moving, (5, 3), width=12), match, AXIAL.shape)
    np.testing.assert_allclose(resampled, _blob(AXIAL, (5, 3), width=12), atol=0.03)


def test_transposed_storage_gives_the_same_picture() -> None:
    transposed = Geometry((80, 64), (1.0, 1.0), (-40.0, -32.0), ((0.0, 1.0), (1.0, 0.0)), plane="axial")
    array = np.random.default_rng(1).random((1, 64, 80), np.float32)
    match = match_grids(AXIAL, transposed)
    resampled = resample_to_grid(array.swapaxes(1, 2), match, AXIAL.shape)
    np.testing.assert_allclose(resampled, array, atol=1e-4)


def test_no_overlap_or_no_position_centres_at_true_spacing() -> None:
    far = dataclasses.replace(AXIAL, spacing=(2.0, 2.0), origin=(500.0, 0.0))
    match = match_grids(AXIAL, far)
    assert match.method == "physical spacing, centred"
    assert "0%" in match.note
    # centre 31.5, 39.5 stays; 10 mm to the right are 5 of the moving voxels
    np.testing.assert_allclose(match.affine @ [31.5, 49.5, 1], [31.5, 44.5])
    unplaced = dataclasses.replace(far, origin=(0.0, 0.0), positioned=False, plane=None)
    assert match_grids(AXIAL, unplaced).method == "physical spacing, centred"
    assert "not known" in match_grids(AXIAL, unplaced).note


def test_centred_scans_keep_the_orientations_that_their_files_state() -> None:
    # Rows of the moving one run to the right and upwards: R and A, 500 mm away.
    moving = Geometry((64, 80), (1.0, 1.0), (500.0, 0.0), ((-1.0, 0.0), (0.0, -1.0)), plane="axial")
    for fixed, other in ((AXIAL, moving), (moving, AXIAL)):
        match = match_grids(fixed, other)
        assert match.method == "physical spacing, centred"
        np.testing.assert_allclose(match.affine, [[-1, 0, 63], [0, -1, 79]], atol=1e-9)
    # A way in the fixed image is the same way in the patient, whatever tilts and spacings.
    fixed = dataclasses.replace(AXIAL, direction=((0.8, -0.6), (0.6, 0.8)), spacing=(1.0, 2.0))
    other = dataclasses.replace(moving, spacing=(3.0, 0.5))
    to_moving = match_grids(fixed, other).affine[:, :2]
    np.testing.assert_allclose(other.matrix()[:2, :2] @ to_moving, fixed.matrix()[:2, :2], atol=1e-9)


def test_overlap_decides_at_a_quarter() -> None:
    def shifted(x: float) -> str:
        return match_grids(AXIAL, dataclasses.replace(AXIAL, origin=(-40.0 + x, -32.0))).method

    assert shifted(55) == "physical"
    assert shifted(65) == "physical spacing, centred"
    # 80 x 64 mm: 60 and 15 to the side leave a quarter of the one axis and 49 / 64 of the other, 19 %.
    corner = dataclasses.replace(AXIAL, origin=(20.0, -17.0))
    assert "only 19%" in match_grids(AXIAL, corner).note
    touching = dataclasses.replace(AXIAL, origin=(40.0, -32.0))
    assert "only 0%" in match_grids(AXIAL, touching).note


def test_a_volume_of_one_slice_is_carried() -> None:
    grid = Geometry((1, 40, 40), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), tuple(map(tuple, np.eye(3))))
    thick = dataclasses.replace(grid, shape=(6, 40, 40))
    array = np.random.default_rng(0).random((1, 6, 40, 40), np.float32)
    carried = apply_field(DeformationField(torch.zeros(3, 1, 40, 40), grid), Image(array, thick))
    np.testing.assert_allclose(carried, array[:, :1], atol=1e-5)


@pytest.mark.parametrize(("shape", "scale"), [((128, 160), 0.5), ((32, 40), 2.0), ((64, 160), 0.5), ((64, 64), 1.0)])
def test_pictures_fill_the_frame_with_one_scale(shape: tuple[int, int], scale: float) -> None:
    match = match_grids(Geometry.picture((64, 80)), Geometry.picture(shape))
    assert match.method == "centred and scaled"
    np.testing.assert_allclose(match.affine[:, :2], np.eye(2) / scale)
    np.testing.assert_allclose(match.affine @ [31.5, 39.5, 1], [(n - 1) / 2 for n in shape])


def test_picture_is_shown_as_radiology_does() -> None:
    # Rows stored from feet to head: the coronal picture's top row is the scan's last one.
    scan = Geometry((64, 64), (1.0, 1.0), (0.0, 0.0), ((1.0, 0.0), (0.0, 1.0)), plane="coronal")
    match = match_grids(scan, Geometry.picture((64, 64)))
    np.testing.assert_allclose(match.affine @ [63, 10, 1], [0, 10], atol=1e-9)
    back = match_grids(Geometry.picture((64, 64)), scan)
    np.testing.assert_allclose(back.affine @ [0, 10, 1], [63, 10], atol=1e-9)
    unknown = match_grids(dataclasses.replace(AXIAL, plane=None), Geometry.picture((64, 80)))
    np.testing.assert_allclose(unknown.affine, np.eye(3)[:2], atol=1e-9)
    stored_transposed = dataclasses.replace(AXIAL, shape=(40, 80), direction=((0.0, 1.0), (1.0, 0.0)))
    turn = dataclasses.replace(AXIAL, direction=((0.0, -1.0), (1.0, 0.0)))  # columns run down, rows to the left
    np.testing.assert_allclose(
        match_grids(turn, Geometry.picture((80, 64))).affine, [[0, 1, 0], [-1, 0, 63]], atol=1e-9
    )
    np.testing.assert_allclose(
        match_grids(Geometry.picture((80, 64)), turn).affine, [[0, -1, 63], [1, 0, 0]], atol=1e-9
    )
    turned = match_grids(stored_transposed, Geometry.picture((160, 80)))
    np.testing.assert_allclose(turned.affine @ [0, 0, 1], [0.5, 0.5], atol=1e-9)
    np.testing.assert_allclose(turned.affine @ [0, 79, 1], [158.5, 0.5], atol=1e-9)


def test_different_planes_and_dimensions_are_refused() -> None:
    with pytest.raises(ImageError, match="fixed slice is axial, moving slice coronal"):
        match_grids(AXIAL, dataclasses.replace(AXIAL, plane="coronal"))
    with pytest.raises(ImageError, match="3-D"):
        match_grids(Geometry.picture((4, 64, 80)), Geometry.picture((64, 80)))


def test_match_refuses_what_cannot_be_inverted() -> None:
    with pytest.raises(ValueError, match="singular"):
        GridMatch(np.zeros((2, 3)), "physical", "")
    with pytest.raises(ValueError, match="affine of shape"):
        GridMatch(np.eye(3), "physical", "")


def test_outside_is_background_not_a_smeared_border() -> None:
    array = np.full((1, 40, 40), 9.0, np.float32)
    array[0, 20, 20] = -3
    shift = GridMatch(np.array([[1.0, 0, -10], [0, 1, 0]]), "physical", "")
    resampled = resample_to_grid(array, shift, (40, 40))
    assert (resampled[0, :10] == -3).all()
    np.testing.assert_allclose(resampled[0, 10:30], array[0, :20])


def test_a_frame_that_begins_where_the_other_does_is_cut_or_filled() -> None:
    array = np.random.default_rng(0).random((1, 64, 80), np.float32)
    small = dataclasses.replace(AXIAL, shape=(40, 50))
    cut = resample_to_grid(array, match_grids(small, AXIAL), (40, 50))
    np.testing.assert_allclose(cut, array[:, :40, :50], atol=1e-5)
    filled = resample_to_grid(cut, match_grids(AXIAL, small), (64, 80))
    np.testing.assert_allclose(filled[:, :40, :50], cut, atol=1e-5)
    assert (filled[:, 40:] == cut.min()).all()
    assert (filled[..., 50:] == cut.min()).all()


def test_downsampling_does_not_alias() -> None:
    stripes = np.tile(np.array([0.0, 1.0], np.float32), 128)[None, None].repeat(256, axis=1)
    match = match_grids(Geometry.picture((64, 64)), Geometry.picture((256, 256)))
    smooth = resample_to_grid(stripes, match, (64, 64))
    np.testing.assert_allclose(smooth[0, :, 4:-4], 0.5, atol=0.01)


def test_steps_beyond_the_whole_image_are_filtered_as_one_over_it() -> None:
    array = np.random.default_rng(0).random((1, 40, 48)).astype(np.float32)
    results = [
        resample_to_grid(array, GridMatch(np.array([[step, 0, 20], [0, step, 24]]), "physical", ""), (32, 32))
        for step in (48.0, 1e30)
    ]
    np.testing.assert_array_equal(results[0], results[1])
    assert results[0][0, 0, 0] == pytest.approx(array.mean(), abs=0.05)


def test_volumes_use_the_same_code() -> None:
    fixed = Geometry((6, 8, 10), (1.0, 1.0, 2.0), (0, 0, 0), ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
    moving = dataclasses.replace(fixed, origin=(9.0, 7.0, 10.0), direction=((-1, 0, 0), (0, -1, 0), (0, 0, -1)))
    array = np.random.default_rng(0).random((1, 6, 8, 10), np.float32)
    resampled = resample_to_grid(array, match_grids(fixed, moving), fixed.shape)
    np.testing.assert_allclose(resampled, array[:, ::-1, ::-1, ::-1], atol=1e-4)


# --- carrying images along


def test_total_field_of_a_physical_match_is_the_displacement() -> None:
    moving = Geometry((50, 36), (2.0, 1.5), (36.0, 38.0), ((-1.0, 0.0), (0.0, -1.0)), plane="axial")
    displacement = _smooth_field(AXIAL.shape)
    total = total_field(displacement, match_grids(AXIAL, moving), AXIAL, moving)
    torch.testing.assert_close(total.displacement, displacement, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "moving",
    [
        dataclasses.replace(AXIAL, spacing=(0.8, 1.25), origin=(-41.0, -30.0)),
        dataclasses.replace(AXIAL, spacing=(0.9, 0.9), origin=(900.0, -30.0)),
        Geometry.picture((70, 90)),
    ],
)
def test_one_pass_equals_resampling_and_then_warping(moving: Geometry) -> None:
    centre = moving.index_to_physical((np.asarray(moving.shape) - 1) / 2)
    image = Image(_blob(moving, (centre[0] + 4, centre[1] - 3), width=12), moving)
    match = match_grids(AXIAL, moving)
    displacement = _smooth_field(AXIAL.shape)
    total = total_field(displacement, match, AXIAL, moving)
    torch.testing.assert_close(network_field(total, match, moving), displacement, atol=1e-3, rtol=0)
    once = apply_field(total, image)
    resampled = torch.from_numpy(resample_to_grid(image.array, match, AXIAL.shape))
    twice = warp(resampled[None], displacement[None])[0].numpy()
    assert once.max() > 0.9
    np.testing.assert_allclose(once, twice, atol=0.03)


def test_a_field_carries_a_sharper_image_of_the_same_scan() -> None:
    moving = dataclasses.replace(AXIAL, origin=(-37.0, -30.0))
    fine = dataclasses.replace(moving, shape=(256, 320), spacing=(0.25, 0.25), origin=(-37.375, -30.375))
    field = total_field(_smooth_field(AXIAL.shape), match_grids(AXIAL, moving), AXIAL, moving)
    coarse_result = apply_field(field, Image(_blob(moving, (0, 0), width=9), moving))
    fine_result = apply_field(field, Image(_blob(fine, (0, 0), width=9), fine))
    np.testing.assert_allclose(fine_result, coarse_result, atol=0.02)


def test_labels_stay_labels() -> None:
    labels = np.zeros((1, 64, 80), np.float32)
    labels[0, 20:40, 20:40] = 7
    labels[0, 40:50, 20:60] = 1000
    field = DeformationField(_smooth_field(AXIAL.shape, 3.3), AXIAL)
    carried = apply_field(field, Image(labels, AXIAL), nearest=True)
    assert set(np.unique(carried)) == {0, 7, 1000}


def test_whole_voxel_shift_by_hand() -> None:
    image = Image(np.random.default_rng(0).random((3, 64, 80), np.float32), AXIAL)
    displacement = torch.zeros(2, 64, 80)
    displacement[0] += 3
    displacement[1] -= 5
    carried = apply_field(DeformationField(displacement, AXIAL), image)
    np.testing.assert_allclose(carried[:, :61, 5:], image.array[:, 3:, :75], atol=1e-4)
    assert (carried[:, 61:] == image.array.min()).all()


def test_field_and_image_must_belong_together() -> None:
    field = DeformationField(_smooth_field(AXIAL.shape), AXIAL)
    array = np.random.default_rng(0).random((1, 64, 80), np.float32)
    with pytest.raises(ImageError, match="axial"):
        apply_field(field, Image(array, dataclasses.replace(AXIAL, plane="sagittal")))
    with pytest.raises(ImageError, match="2-D field and a 3-D image"):
        apply_field(field, Image(array[:, None], Geometry.picture((1, 64, 80))))


def test_a_field_into_a_picture_carries_pictures_of_its_size_only() -> None:
    array = np.random.default_rng(0).random((1, 64, 80), np.float32)
    small, large = Geometry.picture((64, 80)), Geometry.picture((128, 160))
    field = total_field(torch.zeros(2, 64, 80), match_grids(small, small), small, small)
    np.testing.assert_allclose(apply_field(field, Image(array, small)), array, atol=1e-4)
    with pytest.raises(ImageError, match="a picture of 80 x 64 pixels, the image is a picture of 160 x 128 pixels"):
        apply_field(field, Image(np.kron(array, np.ones((1, 2, 2))), large))
    with pytest.raises(ImageError, match=r"a picture of 80 x 64 pixels, the image is a scan in millimetres"):
        apply_field(field, Image(array, AXIAL))
    into_scan = total_field(torch.zeros(2, 64, 80), match_grids(small, AXIAL), small, AXIAL)
    with pytest.raises(ImageError, match=r"a scan in millimetres \(80 x 64\) with a position, the image is a picture"):
        apply_field(into_scan, Image(array, small))


UNPLACED = dataclasses.replace(Geometry.picture((64, 80)), physical=True, spacing=(0.9, 0.9))


def test_a_position_that_only_one_of_two_scans_has_is_no_guess() -> None:
    array = np.random.default_rng(0).random((1, 64, 80), np.float32)
    moving = dataclasses.replace(AXIAL, spacing=(0.9, 0.9))
    placed, unplaced = (
        total_field(torch.zeros(2, 64, 80), match_grids(AXIAL, m), AXIAL, m) for m in (moving, UNPLACED)
    )
    with pytest.raises(ImageError, match=r"\(80 x 64\) with a position, the image is .* without a position; .* copy"):
        apply_field(placed, Image(array, UNPLACED))
    with pytest.raises(ImageError, match=r"0.9 x 0.9 mm each\) without a position, the image is .* with a position; "):
        apply_field(unplaced, Image(array, moving))
    assert apply_field(placed, Image(array, moving)).max() > 0.5
    assert apply_field(unplaced, Image(array, UNPLACED)).max() > 0.5
    # A field of an older version does not say.
    old = dataclasses.replace(placed, moving=MovingFrame(True, (64, 80)))
    assert apply_field(old, Image(array, UNPLACED)).shape == (1, 64, 80)
    assert apply_field(old, Image(array, moving)).max() > 0.5


def test_scans_without_a_position_must_have_one_grid() -> None:
    array = np.random.default_rng(0).random((1, 64, 80), np.float32)
    field = total_field(torch.zeros(2, 64, 80), match_grids(AXIAL, UNPLACED), AXIAL, UNPLACED)
    with pytest.raises(ImageError, match=r"the image is a scan in millimetres \(80 x 64, 1 x 1 mm each\) without"):
        apply_field(field, Image(array, dataclasses.replace(UNPLACED, spacing=(1.0, 1.0))))
    with pytest.raises(ImageError, match=r"the image is a scan in millimetres \(70 x 64, "):
        apply_field(field, Image(array[..., :70], dataclasses.replace(UNPLACED, shape=(64, 70))))
    # Rounding of single precision is none, and ITK saves such a scan with a position, at 0.
    same = dataclasses.replace(UNPLACED, spacing=(0.9000001, 0.9))
    by_itk = dataclasses.replace(UNPLACED, positioned=True, plane="axial")
    expected = apply_field(field, Image(array, UNPLACED))
    for geometry in (same, by_itk):
        np.testing.assert_allclose(apply_field(field, Image(array, geometry)), expected, atol=1e-4)
    for place in ({"origin": (9.0, 0.0)}, {"direction": ((-1.0, 0.0), (0.0, 1.0))}):
        with pytest.raises(ImageError, match="with a position; where both have the same pixels, copy"):
            apply_field(field, Image(array, dataclasses.replace(by_itk, **place)))


def test_how_far_a_slice_lies_from_the_one_that_the_field_was_made_for() -> None:
    def at(mm: float) -> Geometry:
        rows = ((1.0, 0.0, 0.0, -40.0), (0.0, 1.0, 0.0, -32.0), (0.0, 0.0, 3.0, mm))
        return dataclasses.replace(AXIAL, placement=rows)

    array = np.random.default_rng(0).random((1, 64, 80), np.float32)
    field = total_field(torch.zeros(2, 64, 80), match_grids(AXIAL, at(20.0)), AXIAL, at(20.0))
    assert slice_astray(field, Image(array, at(77.0))) == pytest.approx(57.0)
    assert slice_astray(field, Image(array, at(20.0))) == 0
    assert slice_astray(field, Image(array, AXIAL)) is None
    assert slice_astray(dataclasses.replace(field, moving=None), Image(array, at(77.0))) is None


def test_an_image_that_the_field_never_meets_is_refused() -> None:
    array = np.random.default_rng(0).random((1, 64, 80), np.float32)
    field = total_field(_smooth_field(AXIAL.shape), match_grids(AXIAL, AXIAL), AXIAL, AXIAL)
    with pytest.raises(ImageError, match="no part of the image falls on the field's grid"):
        apply_field(field, Image(array, dataclasses.replace(AXIAL, origin=(460.0, -32.0))))


def test_a_partner_lies_in_the_moving_frame_wherever_the_fixed_one_ends() -> None:
    half = dataclasses.replace(AXIAL, shape=(64, 40))  # the left half of the same scan
    seen = has_partner(torch.zeros(2, 64, 80), match_grids(AXIAL, half), half)
    assert seen[:, :40].all()
    assert not seen[:, 41:].any()
    shift = torch.zeros(2, 64, 80)
    shift[1] -= 10
    moved = has_partner(shift, match_grids(AXIAL, half), half)
    assert moved[:, 10:50].all()
    assert not moved[:, 51:].any()
    assert not moved[:, :9].any()
    # A moving frame that is larger than the fixed one holds what points out of the latter.
    wide = dataclasses.replace(AXIAL, shape=(64, 120), origin=(-60.0, -32.0))
    assert has_partner(shift, match_grids(AXIAL, wide), wide).all()


@settings(max_examples=25)
@given(st.floats(0.4, 3), st.floats(-20, 20), st.integers(33, 90), st.integers(33, 90))
def test_total_field_ends_where_the_match_says(spacing: float, shift: float, height: int, width: int) -> None:
    moving = dataclasses.replace(
        AXIAL, shape=(height, width), spacing=(spacing, 1.2 * spacing), origin=(-40 + shift, -32.0)
    )
    match = match_grids(AXIAL, moving)
    total = total_field(torch.zeros(2, 64, 80), match, AXIAL, moving)
    there = np.array([10, 20]) + total.displacement[:, 10, 20].double().numpy()
    expected = moving.index_to_physical(match.affine @ [10, 20, 1])
    np.testing.assert_allclose(AXIAL.index_to_physical(there), expected, atol=1e-3)
