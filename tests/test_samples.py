from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

import bsafusion.samples
from bsafusion.samples import KnownTransform, Sample, load_samples

FOLDER = Path(bsafusion.samples.__file__).parent
RECORDS = json.loads((FOLDER / "samples.json").read_text(encoding="utf-8"))["samples"]
SAMPLES = load_samples()
BUDGET_BYTES = 1_500_000

each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.id)


def pixels(path: Path) -> NDArray[np.float64]:
    """``H W 3``, 0 to 255."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float64)


def error(sample: Sample, known: KnownTransform) -> float:
    """Mean absolute difference, in grey levels, of ``original`` deformed by ``known`` and ``moving``."""
    original, moving = pixels(sample.original), pixels(sample.moving)
    points = np.indices(moving.shape[:2]) + known.displacement(moving.shape[:2])
    deformed = np.stack([ndimage.map_coordinates(c, points, order=1) for c in np.moveaxis(original, -1, 0)], axis=-1)
    limits = np.reshape(moving.shape[:2], (2, 1, 1)) - 1
    seen = ((points >= 0) & (points <= limits)).all(axis=0)
    return float(np.abs(deformed - moving)[seen].mean())


def test_every_task_of_the_package_has_a_sample_and_ids_are_unique() -> None:
    assert {"ct-mri", "pet-mri", "spect-mri"} <= {sample.task for sample in SAMPLES}
    assert len({sample.id for sample in SAMPLES}) == len(SAMPLES) == len(RECORDS)
    assert all(sample.origin and sample.licence for sample in SAMPLES)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["id"])
def test_files_are_the_recorded_ones(record: dict[str, dict[str, str]]) -> None:
    for role in ("fixed", "moving", "original"):
        data = (FOLDER / record[role]["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == record[role]["sha256"]


def test_nothing_else_ships_and_all_is_small() -> None:
    named = {record[role]["file"] for record in RECORDS for role in ("fixed", "moving", "original")}
    files = [path for path in FOLDER.iterdir() if path.is_file()]
    assert {path.name for path in files} == named | {"__init__.py", "manifest.csv", "samples.json"}
    assert sum(path.stat().st_size for path in files) < BUDGET_BYTES


@each_sample
def test_pictures_of_a_pair_share_one_grid(sample: Sample) -> None:
    expected = (257, 221, 3) if sample.task == "mr-mr" else (233, 197, 3)
    for path in (sample.fixed, sample.moving, sample.original):
        picture = pixels(path)
        assert picture.shape == expected
        assert np.ptp(picture) > 100


@each_sample
def test_only_tracer_pictures_have_colour(sample: Sample) -> None:
    def coloured(path: Path) -> bool:
        return bool(np.ptp(pixels(path), axis=-1).max() > 0)

    assert not coloured(sample.fixed)
    assert coloured(sample.moving) == coloured(sample.original) == (sample.task in ("pet-mri", "spect-mri"))


# Interpolated once and rounded, a picture differs by half a grey level at most; ITK's own were truncated, or
# interpolated more than once.
@each_sample
def test_known_transform_turns_original_into_moving(sample: Sample) -> None:
    tolerance = {
        "mr-shift": 0.0,
        "mr-rotation": 0.5,
        "mr-rigid": 2.0,
        "mr-similarity": 2.5,
        "mr-bspline": 0.5,
    }
    assert error(sample, sample.known) <= tolerance.get(sample.id, 0.25)
    assert error(sample, KnownTransform()) > 10.0


@each_sample
@pytest.mark.parametrize("change", [("rotation", 0.5), ("rotation", -0.5), ("scale", 0.01), ("scale", -0.01)], ids=str)
def test_known_rotation_and_scale_are_the_best(sample: Sample, change: tuple[str, float]) -> None:
    name, step = change
    height, width = pixels(sample.moving).shape[:2]
    # About the image's middle, so that the change is not a large translation in disguise.
    middle = ((height - 1) / 2, (width - 1) / 2)
    known = sample.known if sample.known.centre != (0.0, 0.0) else replace(sample.known, centre=middle)
    assert error(sample, replace(known, **{name: getattr(known, name) + step})) > error(sample, sample.known) + 0.5


@each_sample
@pytest.mark.parametrize("step", [(0.5, 0.0), (-0.5, 0.0), (0.0, 0.5), (0.0, -0.5)], ids=str)
def test_known_translation_is_the_best(sample: Sample, step: tuple[float, float]) -> None:
    y, x = sample.known.translation
    shifted = replace(sample.known, translation=(y + step[0], x + step[1]))
    assert error(sample, shifted) > error(sample, sample.known) + 0.3


@each_sample
def test_known_transform_does_not_fold(sample: Sample) -> None:
    height, width = pixels(sample.moving).shape[:2]
    points = np.indices((height, width)) + sample.known.displacement((height, width))
    (dyy, dyx), (dxy, dxx) = (np.gradient(component) for component in points)
    assert (dyy * dxx - dyx * dxy).min() > 0.5


def test_moving_images_are_visibly_but_not_absurdly_misaligned() -> None:
    for sample in SAMPLES:
        height, width = pixels(sample.moving).shape[:2]
        length = np.linalg.norm(sample.known.displacement((height, width)), axis=0)
        head = pixels(sample.original).max(axis=-1) > 30
        assert 2.0 < length[head].mean() < 30.0


def test_shift_pulls_content_back() -> None:
    field = KnownTransform(translation=(-2.0, 3.0)).displacement((5, 7))
    assert field.shape == (2, 5, 7)
    np.testing.assert_array_equal(field[0], -2.0)
    np.testing.assert_array_equal(field[1], 3.0)
    # moving(x) = original(x + p): what was at row 1, column 4 is seen at row 3, column 1.
    original = np.zeros((5, 7))
    original[1, 4] = 1.0
    moving = ndimage.map_coordinates(original, np.indices((5, 7)) + field, order=1)
    assert np.argwhere(moving == 1.0).tolist() == [[3, 1]]


def test_positive_rotation_turns_x_towards_y() -> None:
    field = KnownTransform(rotation=90.0, centre=(2.0, 2.0)).displacement((5, 5))
    np.testing.assert_allclose(np.array([2, 4]) + field[:, 2, 4], [4, 2], atol=1e-12)
    np.testing.assert_allclose(np.array([4, 2]) + field[:, 4, 2], [2, 0], atol=1e-12)
    np.testing.assert_allclose(field[:, 2, 2], 0.0, atol=1e-12)


def test_scale_pulls_from_further_away() -> None:
    field = KnownTransform(scale=2.0, centre=(1.0, 1.0)).displacement((3, 3))
    np.testing.assert_allclose(field[:, 2, 0], [1.0, -1.0], atol=1e-12)


def test_constant_control_is_a_shift() -> None:
    control = np.stack([np.full((5, 7), 1.5), np.full((5, 7), -4.0)])
    field = KnownTransform(control=control).displacement((40, 31))
    np.testing.assert_allclose(field[0], 1.5, atol=1e-12)
    np.testing.assert_allclose(field[1], -4.0, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(
    rotation=st.floats(-40, 40),
    scale=st.floats(0.7, 1.4),
    y=st.floats(-20, 20),
    x=st.floats(-20, 20),
    rows=st.integers(4, 8),
    columns=st.integers(4, 8),
    seed=st.integers(0, 1000),
)
def test_agrees_with_itk(rotation: float, scale: float, y: float, x: float, rows: int, columns: int, seed: int) -> None:
    height, width = 23, 31
    control = 3.0 * np.random.default_rng(seed).standard_normal((2, rows, columns))
    known = KnownTransform(rotation, scale, (y, x), (9.0, 14.5), control)
    similarity = sitk.Similarity2DTransform(scale, np.radians(rotation), (x, y), (14.5, 9.0))
    spline = sitk.BSplineTransform(2, 3)
    spline.SetTransformDomainOrigin((0.0, 0.0))
    spline.SetTransformDomainPhysicalDimensions((width - 1.0, height - 1.0))
    spline.SetTransformDomainMeshSize((columns - 3, rows - 3))
    spline.SetParameters(np.concatenate([control[1].ravel(), control[0].ravel()]))
    field = known.displacement((height, width))
    # ITK's splines end just before the last pixel; the two parts add, as in the formula.
    for row, column in [(0, 0), (5, 17), (11, 3), (21, 29)]:
        point = (float(column), float(row))
        expected = np.array(similarity.TransformPoint(point)) + spline.TransformPoint(point) - 2 * np.array(point)
        np.testing.assert_allclose(field[::-1, row, column], expected, atol=1e-9)


@pytest.mark.parametrize("shape", [(2, 3, 7), (3, 5, 5), (5, 5)])
def test_control_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected 2 N M"):
        KnownTransform(control=np.zeros(shape))


def test_scale_of_zero_and_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="scale"):
        KnownTransform(scale=0.0)
    with pytest.raises(ValueError, match="height, width"):
        KnownTransform().displacement((1, 5))


def test_notice_covers_the_sources() -> None:
    notice = (Path(__file__).parents[1] / "NOTICE").read_text(encoding="utf-8")
    for holder in ("Insight Software Consortium", "Louis Collins", "nilearn developers", "TotalSegmentator"):
        assert holder in notice
