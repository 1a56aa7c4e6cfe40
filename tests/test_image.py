"""Geometry against SimpleITK and values known by hand; images refuse what cannot be used."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st

from bsafusion.image import PLANE_NORMALS, Geometry, Image, ImageError, Modality, slice_geometry

FLIPPED = Geometry(
    shape=(40, 50),
    spacing=(0.7, 1.3),
    origin=(12.5, -40.0),
    direction=((0.8, 0.6), (0.6, -0.8)),
)


def _ramp(shape: tuple[int, ...] = (40, 50), channels: int = 1) -> np.ndarray:
    return np.arange(channels * np.prod(shape), dtype=np.float32).reshape(channels, *shape)


def test_index_to_physical_agrees_with_simpleitk() -> None:
    reference = sitk.Image(50, 40, sitk.sitkFloat32)
    reference.SetSpacing(FLIPPED.spacing)
    reference.SetOrigin(FLIPPED.origin)
    reference.SetDirection(np.ravel(FLIPPED.direction).tolist())
    for y, x in ((0, 0), (0, 49), (39, 0), (7.25, 31.5)):
        expected = reference.TransformContinuousIndexToPhysicalPoint((x, y))
        np.testing.assert_allclose(FLIPPED.index_to_physical(np.array([y, x])), expected, atol=1e-9)


def test_index_order_is_tensor_order_in_3d() -> None:
    geometry = Geometry((10, 20, 30), (1.0, 2.0, 3.0), (0.0, 0.0, 100.0), ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
    np.testing.assert_allclose(geometry.index_to_physical(np.array([[4, 5, 6]])), [[6, 10, 112]])


@given(st.lists(st.floats(-500, 500), min_size=2, max_size=2))
def test_physical_to_index_inverts(point: list[float]) -> None:
    index = FLIPPED.physical_to_index(np.array(point))
    np.testing.assert_allclose(FLIPPED.index_to_physical(index), point, atol=1e-9)


def test_picture_is_in_pixels() -> None:
    picture = Geometry.picture((32, 64))
    assert (picture.physical, picture.positioned, picture.plane) == (False, False, None)
    np.testing.assert_array_equal(picture.index_to_physical(np.array([3, 5])), [5, 3])


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (40,)},
        {"shape": (40, 0)},
        {"spacing": (0.7, 0.0)},
        {"spacing": (0.7, float("nan"))},
        {"spacing": (0.7, 1.0, 1.0)},
        {"origin": (0.0, float("inf"))},
        {"direction": ((1.0, 0.0),)},
        {"direction": ((1.0, 0.0), (1.0, 0.0))},
        {"direction": ((1.0, 0.0), (0.5, 1.0))},
        {"plane": "oblique"},
        {"physical": False},
    ],
)
def test_geometry_refuses_what_is_no_grid(change: dict[str, Any]) -> None:
    with pytest.raises(ImageError):
        dataclasses.replace(FLIPPED, **change)


PLACED = dataclasses.replace(
    FLIPPED, plane="axial", placement=((0.56, 0.78, 0.0, 12.5), (0.42, -1.04, 0.0, -40.0), (0.0, 0.0, 3.0, 70.0))
)


@pytest.mark.parametrize(
    "change",
    [
        {"placement": ((1.0, 0.0, 0.0),)},
        {"placement": ((0.56, 0.78, 0.0, float("nan")), *(PLACED.placement or ())[1:])},
        {"spacing": (0.7, 1.4)},  # of another grid
        {"positioned": False},
    ],
)
def test_a_placement_must_fit_its_grid(change: dict[str, Any]) -> None:
    with pytest.raises(ImageError, match=r"placement .* expected \(3, 4\) finite numbers"):
        dataclasses.replace(PLACED, **change)


def _slice() -> dict[str, Any]:
    return {
        "shape": (40, 50),
        "spacing": (0.5, 2.0),
        "origin": np.array([-10.0, 20.0, 70.0]),
        "x_axis": np.array([1.0, 0.0, 0.0]),
        "y_axis": np.array([0.0, 1.0, 0.0]),
        "through": np.array([0.0, 0.0, 3.0]),
    }


@pytest.mark.parametrize(
    ("x_axis", "y_axis", "plane", "origin"),
    [
        ([1, 0, 0], [0, 1, 0], "axial", (-10, 20)),
        ([-1, 0, 0], [0, -1, 0], "axial", (-10, 20)),
        ([0, 1, 0], [1, 0, 0], "axial", (-10, 20)),
        ([1, 0, 0], [0, 0, -1], "coronal", (-10, 70)),
        ([0, 1, 0], [0, 0, -1], "sagittal", (20, 70)),
    ],
)
def test_slice_keeps_its_two_patient_axes(
    x_axis: list[float], y_axis: list[float], plane: str, origin: tuple[float, float]
) -> None:
    arguments = _slice() | {"x_axis": np.array(x_axis), "y_axis": np.array(y_axis)}
    geometry, tilt, across = slice_geometry(**arguments)
    assert (geometry.plane, tilt) == (plane, 0.0)
    assert across == pytest.approx(arguments["origin"][PLANE_NORMALS[plane]])
    np.testing.assert_allclose(geometry.origin, origin, atol=1e-9)
    axes = {"axial": [0, 1], "coronal": [0, 2], "sagittal": [1, 2]}[plane]
    there = arguments["origin"] + 3 * 0.5 * np.array(x_axis) + 7 * 2.0 * np.array(y_axis)
    np.testing.assert_allclose(geometry.index_to_physical(np.array([7, 3])), there[axes], atol=1e-9)
    np.testing.assert_allclose(np.asarray(geometry.placement) @ [3, 7, 0, 1], there, atol=1e-9)
    np.testing.assert_allclose(np.asarray(geometry.placement) @ [3, 7, 2, 1], there + np.array([0, 0, 6]), atol=1e-9)


def test_storage_order_does_not_move_the_anatomy_of_a_tilted_slice() -> None:
    angle = np.radians(20)
    down = np.array([0.0, np.cos(angle), np.sin(angle)])
    upright, tilt, _ = slice_geometry(**_slice() | {"y_axis": down})
    last_row = np.array([-10.0, 20.0, 70.0]) + 39 * 2.0 * down
    flipped, _, _ = slice_geometry(**_slice() | {"y_axis": -down, "origin": last_row})
    assert tilt == pytest.approx(20)
    np.testing.assert_allclose(
        upright.index_to_physical(np.array([5, 8])), flipped.index_to_physical(np.array([34, 8])), atol=1e-9
    )
    distance = upright.index_to_physical(np.array([39, 0])) - upright.index_to_physical(np.array([0, 0]))
    assert np.linalg.norm(distance) == pytest.approx(78)


def test_slice_refuses_strong_tilt_and_shear() -> None:
    with pytest.raises(ImageError, match="tilted 40 degrees"):
        slice_geometry(**_slice() | {"y_axis": np.array([0, np.cos(np.radians(40)), np.sin(np.radians(40))])})
    with pytest.raises(ImageError, match="perpendicular"):
        slice_geometry(**_slice() | {"y_axis": np.array([0.5, 1.0, 0.0])})
    with pytest.raises(ImageError, match="perpendicular"):
        slice_geometry(**_slice() | {"y_axis": np.zeros(3)})


def test_image_is_read_only_and_detached_from_its_source() -> None:
    values = _ramp()
    image = Image(values, Geometry.picture((40, 50)), Modality.CT)
    values[:] = -1
    assert image.array.max() == 1999
    with pytest.raises(ValueError, match="read-only"):
        image.array[0, 0, 0] = 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        image.array = values  # type: ignore[misc]


def test_luma_is_bt601() -> None:
    rgb = np.zeros((3, 40, 50), np.float32)
    rgb[:, 0, :3] = np.eye(3) * 255
    luma = Image(rgb, Geometry.picture((40, 50))).luma()
    np.testing.assert_allclose(luma[0, :4], [76.245, 149.685, 29.07, 0], rtol=1e-6)
    grey = Image(_ramp(), Geometry.picture((40, 50)))
    np.testing.assert_array_equal(grey.luma(), grey.array[0])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((1, 40, 50), 7.0), "every pixel is 7"),
        (np.where(_ramp() == 3, np.nan, _ramp()), "1 values are NaN"),
        (_ramp().astype(np.float64) * 1e300, "infinite"),
        (_ramp()[0], "channels first"),
        (_ramp(channels=2), "channels"),
        (_ramp((31, 50)), "50 x 31 pixels; expected at least 32"),
        (_ramp((32, 2049)), "2049 x 32 pixels; expected at most 2048"),
        (_ramp() * (1 + 2j), "an array of complex.*; expected real numbers"),
        (_ramp().astype(str), "an array of <?str.*; expected real numbers"),
    ],
)
def test_image_refuses_what_cannot_be_used(array: np.ndarray, message: str) -> None:
    geometry = Geometry.picture(array.shape[-2:])
    with pytest.raises(ImageError, match=message):
        Image(array, geometry)


def test_a_modality_may_be_given_by_name() -> None:
    name: Any = "MRI"
    assert Image(_ramp(), Geometry.picture((40, 50)), name).modality is Modality.MRI
    for other in ("xray", None):
        wrong: Any = other
        with pytest.raises(ImageError, match=r"unknown modality .*; expected one of mri, ct, pet, spect, unknown"):
            Image(_ramp(), Geometry.picture((40, 50)), wrong)


def test_one_colour_in_every_pixel_is_constant() -> None:
    array = np.broadcast_to(np.array([1.0, 2.0, 3.0]).reshape(3, 1, 1), (3, 40, 50))
    with pytest.raises(ImageError, match="every pixel"):
        Image(array, Geometry.picture((40, 50)))


def test_array_and_grid_must_agree() -> None:
    with pytest.raises(ImageError, match="on a grid"):
        Image(_ramp(), Geometry.picture((50, 40)))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float64"])
def test_the_stored_type_is_the_array_s_own_unless_told(dtype: str) -> None:
    values = _ramp().astype(dtype)
    assert Image(values, Geometry.picture((40, 50))).dtype == dtype
    assert Image(values, Geometry.picture((40, 50)), dtype="int16").dtype == "int16"


def test_a_label_map_may_be_empty() -> None:
    image = Image(np.zeros((1, 40, 50), np.uint8), Geometry.picture((40, 50)), labels=True)
    assert (image.array == 0).all()
