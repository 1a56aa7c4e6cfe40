"""The one convention for displacement fields, against transformations known by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from bsafusion.deformation import (
    DeformationField,
    MovingFrame,
    affine_field,
    compose,
    identity_grid,
    integrate,
    invert,
    jacobian_determinant,
    lengths,
    resize_field,
    roughness,
    sample,
    warp,
)
from bsafusion.image import Geometry, slice_geometry
from bsafusion.io import read_deformation, write_deformation
from bsafusion.metrics import endpoint_residual, folds

Field = Callable[..., Tensor]

shapes = st.one_of(
    st.tuples(st.integers(2, 20), st.integers(2, 20)),
    st.tuples(st.integers(2, 9), st.integers(2, 9), st.integers(2, 9)),
)


def random_image(shape: tuple[int, ...], *, channels: int = 1, seed: int = 0) -> Tensor:
    noise = torch.Generator().manual_seed(seed)
    return torch.rand(1, channels, *shape, generator=noise, dtype=torch.float64)


def inner(t: Tensor, margin: int) -> Tensor:
    """``t`` without ``margin`` voxels at each border."""
    return t[(slice(None), slice(None), *([slice(margin, -margin)] * (t.dim() - 2)))]


def rotation(degrees: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """``B D D+1`` with B 1, turning the y axis towards the x axis."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[[c, -s, 0.0], [s, c, 0.0]]], dtype=dtype)


def linear_field(shape: tuple[int, ...], matrix: Tensor) -> Tensor:
    """``u(x) = M x`` with ``x`` in voxels."""
    return torch.einsum("ij,j...->i...", matrix, identity_grid(shape, matrix))[None]


# --- warp -----------------------------------------------------------------------------------------


@given(shapes, st.sampled_from(["border", "zeros"]), st.sampled_from(["bilinear", "nearest"]))
def test_the_zero_field_changes_nothing(shape: tuple[int, ...], padding: str, mode: str) -> None:
    image = random_image(shape, channels=2)
    warped = warp(image, torch.zeros(1, len(shape), *shape, dtype=torch.float64), mode=mode, padding=padding)
    torch.testing.assert_close(warped, image, rtol=0, atol=1e-12)


@given(shapes, st.data())
def test_a_shift_by_one_voxel_pulls_the_next_voxel(shape: tuple[int, ...], data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    image = random_image(shape)
    field = torch.zeros(1, len(shape), *shape, dtype=torch.float64)
    field[:, axis] = 1
    warped = warp(image, field)
    length = shape[axis]
    expected = image.narrow(2 + axis, 1, length - 1)
    torch.testing.assert_close(warped.narrow(2 + axis, 0, length - 1), expected, rtol=0, atol=1e-12)
    # The last voxel looks beyond the image: its border is repeated.
    last = warped.narrow(2 + axis, length - 1, 1)
    torch.testing.assert_close(last, image.narrow(2 + axis, length - 1, 1), rtol=0, atol=1e-12)
    assert warp(image, field, padding="zeros").narrow(2 + axis, length - 1, 1).abs().max() < 1e-12


@pytest.mark.parametrize(("reach", "seen"), [(0.4, True), (0.5, True), (0.6, False), (3.0, False)])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_an_image_ends_half_a_voxel_beyond_its_outer_centres(reach: float, seen: bool, mode: str) -> None:
    image = torch.tensor([[[[2.0, 3.0, 5.0], [7.0, 11.0, 13.0]]]])
    ends = torch.tensor([[[[-reach, 0.0, 1 + reach, 1.0]], [[0.0, -reach, 2.0, 2 + reach]]]])
    values = sample(image, ends, mode=mode, padding="zeros").flatten().tolist()
    assert values == ([2.0, 2.0, 13.0, 13.0] if seen else [0.0] * 4)
    assert torch.isfinite(sample(torch.full_like(image, torch.nan), ends + 9, padding="zeros")).all()


def test_half_a_voxel_is_the_mean_of_two() -> None:
    image = torch.tensor([[[[0.0, 1.0, 5.0]]]])
    field = torch.zeros(1, 2, 1, 3)
    field[:, 1] = 0.5
    assert warp(image, field).flatten().tolist() == [0.5, 3.0, 5.0]
    assert set(warp(image, field * 0.8, mode="nearest").flatten().tolist()) == {0.0, 1.0, 5.0}


@pytest.mark.parametrize("shape", [(5, 8), (6, 7), (4, 4), (9, 3)])
def test_a_quarter_turn_is_rot90(shape: tuple[int, int]) -> None:
    height, width = shape
    image = random_image(shape)
    turned_shape = (width, height)
    # rot90 takes the value at (i, j) from the image's (j, W - 1 - i); the last column joins the two centres.
    shift = (height - width) / 2
    matrix = torch.tensor([[[0.0, 1.0, shift], [-1.0, 0.0, -shift]]], dtype=torch.float64)
    turned = warp(image, affine_field(matrix, shape=turned_shape))
    torch.testing.assert_close(turned, torch.rot90(image, 1, (2, 3)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("axes", [(0, 1), (0, 2), (1, 2)])
def test_a_quarter_turn_in_three_dimensions(axes: tuple[int, int]) -> None:
    image = random_image((5, 5, 5))
    a, b = axes
    matrix = torch.zeros(1, 3, 4, dtype=torch.float64)
    matrix[0, 3 - a - b, 3 - a - b] = 1
    matrix[0, a, b], matrix[0, b, a] = 1, -1
    turned = warp(image, affine_field(matrix, shape=(5, 5, 5)))
    torch.testing.assert_close(turned, torch.rot90(image, 1, (2 + a, 2 + b)), rtol=0, atol=1e-12)


@given(shapes, st.integers(0, 1000))
def test_warp_agrees_with_scipy(shape: tuple[int, ...], seed: int) -> None:
    image = random_image(shape, seed=seed)
    rng = np.random.default_rng(seed)
    field = torch.from_numpy(rng.uniform(-4, 4, (1, len(shape), *shape)))
    points = np.indices(shape) + field[0].numpy()
    expected = ndimage.map_coordinates(image[0, 0].numpy(), points, order=1, mode="nearest")
    np.testing.assert_allclose(warp(image, field)[0, 0].numpy(), expected, atol=1e-12)


def test_the_result_lies_on_the_grid_of_the_field() -> None:
    image = random_image((9, 13), channels=3)
    warped = warp(image, torch.zeros(1, 2, 5, 6, dtype=torch.float64))
    torch.testing.assert_close(warped, image[..., :5, :6], rtol=0, atol=1e-12)


def test_labels_are_never_mixed_by_nearest() -> None:
    labels = torch.randint(0, 5, (1, 1, 11, 12)).double() * 7
    field = torch.rand(1, 2, 11, 12, dtype=torch.float64) * 6 - 3
    assert set(warp(labels, field, mode="nearest").unique().tolist()) <= set(labels.unique().tolist())


def test_sample_reads_off_single_points() -> None:
    image = torch.arange(12, dtype=torch.float64).view(1, 1, 3, 4)
    points = torch.tensor([[0.0, 2.0, 1.5], [0.0, 3.0, 0.25]], dtype=torch.float64).view(1, 2, 1, 3)
    torch.testing.assert_close(
        sample(image, points).flatten(), torch.tensor([0.0, 11.0, 6.25], dtype=torch.float64), rtol=0, atol=1e-12
    )


# --- compose and invert ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(17, 22), (9, 10, 11)])
def test_compose_is_warping_twice(shape: tuple[int, ...]) -> None:
    image = random_image(shape)
    # Whole numbers, different in each voxel: nothing is interpolated and the order of the two matters.
    u, v = (torch.randint(-2, 3, (1, len(shape), *shape)).double() for _ in range(2))
    twice = warp(warp(image, u), v)
    torch.testing.assert_close(inner(warp(image, compose(u, v)), 2), inner(twice, 2), rtol=0, atol=1e-12)
    assert (inner(warp(image, compose(v, u)), 2) - inner(twice, 2)).abs().max() > 0.1


def test_compose_of_affine_maps_is_the_matrix_product() -> None:
    shape, dtype = (21, 33), torch.float64
    a = torch.tensor([[1.1, 0.2], [-0.1, 0.9]], dtype=dtype)
    b = torch.tensor([[0.8, -0.1], [0.1, 0.7]], dtype=dtype)  # shrinks: no point leaves the grid
    fields = [affine_field(torch.cat([m, torch.zeros(2, 1, dtype=dtype)], 1)[None], shape=shape) for m in (a, b, a @ b)]
    torch.testing.assert_close(compose(fields[0], fields[1]), fields[2], rtol=0, atol=1e-10)


def test_a_linear_velocity_integrates_to_the_matrix_exponential() -> None:
    shape, dtype = (41, 33), torch.float64
    velocity = torch.tensor([[-0.3, 0.2], [-0.1, -0.2]], dtype=dtype)  # shrinks: no point leaves the grid
    unit = torch.eye(2, dtype=dtype)
    fields = [
        affine_field(torch.cat([m, torch.zeros(2, 1, dtype=dtype)], 1)[None], shape=shape)
        for m in (unit + velocity, torch.linalg.matrix_exp(velocity))
    ]
    errors = [float((integrate(fields[0], n) - fields[1]).abs().max()) for n in (0, 4, 8, 12)]
    assert errors[0] > 0.5
    assert errors[1] < 0.1 * errors[0]
    assert errors[2] < 0.1 * errors[1]
    assert errors[3] < 1e-3
    assert torch.equal(integrate(fields[0], 0), fields[0])


def test_opposite_velocities_integrate_to_inverse_fields(smooth_field: Field) -> None:
    velocity = smooth_field((30, 41), 3.0)
    forward, backward = integrate(velocity, 6), integrate(-velocity, 6)
    left = inner(compose(forward, backward), 4).abs().mean()
    assert left < 0.02
    assert left < 0.1 * inner(compose(velocity, -velocity), 4).abs().mean()  # displacements would not do


@given(st.sampled_from([(30, 41), (41, 30), (14, 15, 16)]), st.integers(0, 1000))
@settings(max_examples=20)
def test_a_field_and_its_inverse_cancel(shape: tuple[int, ...], seed: int) -> None:
    knots = torch.Generator().manual_seed(seed)
    dimensions = len(shape)
    coarse = torch.rand(1, dimensions, *([4] * dimensions), generator=knots, dtype=torch.float64) * 2 - 1
    field = resize_field(coarse, shape=shape)
    field = field * (min(shape) / 20 / field.abs().max())
    inverse = invert(field, tolerance=1e-6, iterations=60)
    assert inner(compose(field, inverse), 3).abs().max() < 1e-3
    # The other order interpolates the inverse, which is not piecewise linear on the grid.
    assert inner(compose(inverse, field), 3).abs().max() < 0.2
    assert inner(compose(inverse, field), 3).abs().mean() < 0.02


def test_the_inverse_of_a_rotation_is_the_opposite_rotation() -> None:
    field = affine_field(rotation(12), shape=(41, 41))
    expected = affine_field(rotation(-12), shape=(41, 41))
    assert (inner(invert(field, tolerance=1e-9, iterations=60) - expected, 8)).abs().max() < 1e-6
    assert inner(-field - expected, 8).abs().max() > 0.1  # minus the field would not do


def test_inversion_stops_when_it_is_exact_enough(smooth_field: Field) -> None:
    field = smooth_field((30, 41), 1.5)
    rough, fine = (inner(compose(field, invert(field, tolerance=t)), 3).abs().max() for t in (0.1, 1e-6))
    assert fine < 1e-5
    assert 1e-4 < rough < 0.1
    torch.testing.assert_close(invert(field, iterations=0), -field)


@pytest.mark.parametrize("shape", [(40, 31), (12, 13, 14)])
def test_compose_agrees_with_the_metrics(shape: tuple[int, ...], smooth_field: Field) -> None:
    known, found = smooth_field(shape, 3.0, 1), smooth_field(shape, 2.0, 2)
    expected = endpoint_residual(known[0].numpy(), found[0].numpy())
    np.testing.assert_allclose(compose(known, found)[0].numpy(), expected, atol=1e-10)


# --- resizing -------------------------------------------------------------------------------------


@given(shapes, st.data())
def test_resizing_keeps_linear_fields(shape: tuple[int, ...], data: st.DataObject) -> None:
    new = data.draw(st.tuples(*[st.integers(2, 20)] * len(shape)))
    matrix = torch.from_numpy(np.random.default_rng(0).uniform(-0.5, 0.5, (len(shape), len(shape))))
    old_extent, new_extent = (torch.tensor(s, dtype=torch.float64) - 1 for s in (shape, new))
    # In voxels of the new grid the same map has the matrix S M S^-1.
    ratio = new_extent / old_extent
    expected = linear_field(new, ratio[:, None] * matrix / ratio)
    resized = resize_field(linear_field(shape, matrix), shape=new)
    torch.testing.assert_close(resized, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(resize_field(resized, shape=shape), linear_field(shape, matrix), rtol=0, atol=1e-9)


def test_resizing_to_a_finer_grid_and_back_is_exact(smooth_field: Field) -> None:
    field = smooth_field((9, 13), 3.0)
    there = resize_field(field, shape=(17, 25))  # every old voxel is a new one
    torch.testing.assert_close(there[..., ::2, ::2], 2 * field, rtol=0, atol=1e-10)
    torch.testing.assert_close(resize_field(there, shape=(9, 13)), field, rtol=0, atol=1e-10)


def test_an_axis_of_one_voxel_can_be_resized() -> None:
    field = torch.zeros(1, 2, 1, 5)
    field[:, 1] = 2
    resized = resize_field(field, shape=(3, 9))
    assert not resized[:, 0].any()
    torch.testing.assert_close(resized[:, 1], torch.full((1, 3, 9), 4.0))


def test_a_resized_field_moves_a_resized_image_alike() -> None:
    image = torch.linspace(0, 1, 33, dtype=torch.float64).expand(1, 1, 33, 33)
    field = torch.full((1, 2, 33, 33), 4.0, dtype=torch.float64)
    coarse = warp(image[..., ::4, ::4], resize_field(field, shape=(9, 9)))
    torch.testing.assert_close(coarse, warp(image, field)[..., ::4, ::4], rtol=0, atol=1e-10)


# --- affine maps and Jacobians --------------------------------------------------------------------


@given(st.sampled_from([2, 3]), st.integers(0, 1000))
def test_the_jacobian_of_an_affine_map_is_its_determinant(dimensions: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = np.eye(dimensions) + rng.uniform(-0.6, 0.6, (dimensions, dimensions))
    both = torch.from_numpy(np.column_stack([matrix, rng.uniform(-3, 3, dimensions)]))[None]
    shape = (5, 7, 6)[:dimensions]
    determinant = jacobian_determinant(affine_field(both, shape=shape))
    assert determinant.shape == (1, *shape)
    np.testing.assert_allclose(determinant, np.linalg.det(matrix), atol=1e-9)


def test_an_axis_of_one_voxel_does_not_change_volume() -> None:
    both = torch.tensor([[[1.0, 0, 0, 0], [0, 1.5, 0, 0], [0, 0, 0.8, 0]]], dtype=torch.float64)
    determinant = jacobian_determinant(affine_field(both, shape=(1, 7, 6)))
    torch.testing.assert_close(determinant, torch.full((1, 1, 7, 6), 1.2, dtype=torch.float64))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_fields_of_half_precision_keep_their_place(kind: torch.dtype) -> None:
    image = torch.arange(512.0).expand(1, 1, 64, 512)
    torch.testing.assert_close(warp(image, torch.zeros(1, 2, 64, 512, dtype=kind)), image, rtol=0, atol=1e-3)


def test_an_affine_map_keeps_the_centre_and_adds_its_translation() -> None:
    matrix = torch.tensor([[[0.0, -1.0, 2.0], [1.0, 0.0, -3.0]]], dtype=torch.float64)
    field = affine_field(matrix, shape=(5, 9))
    assert field[0, :, 2, 4].tolist() == [2.0, -3.0]
    # One voxel along x from the centre goes to one voxel against y.
    assert (field[0, :, 2, 5] + torch.tensor([0.0, 1.0])).tolist() == [1.0, -3.0]


def test_a_fold_is_seen() -> None:
    field = torch.zeros(1, 2, 8, 9)
    field[:, 0, 4:] = -3  # rows 4 and on fall behind row 3
    determinant = jacobian_determinant(field)[0]
    assert (determinant[3:5] <= 0).all()
    assert (determinant[[0, 1, 2, 5, 6, 7]] == 1).all()
    assert folds(field[0].numpy()).share == pytest.approx(2 / 8)


def test_the_jacobian_agrees_with_the_metrics(smooth_field: Field) -> None:
    field = smooth_field((23, 17), 8.0)
    expected = folds(field[0].numpy())
    determinant = jacobian_determinant(field)
    assert expected.minimum == pytest.approx(float(determinant.min()))
    assert expected.share == pytest.approx(float((determinant <= 0).double().mean()))


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 3)])
@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_gradients_of_warp(shape: tuple[int, ...], padding: str) -> None:
    image = random_image(shape, channels=2).requires_grad_()
    # Whole numbers are kinks of the interpolation, with no derivative: stay between them.
    field = torch.rand(1, len(shape), *shape, dtype=torch.float64) * 0.6 + 0.2
    field = (field - torch.randint(0, 2, field.shape)).requires_grad_()
    assert torch.autograd.gradcheck(lambda i, u: warp(i, u, padding=padding), (image, field))


def test_gradients_of_compose_and_invert(smooth_field: Field) -> None:
    u = (smooth_field((5, 6), 0.3, 1) + 0.4).requires_grad_()
    v = (smooth_field((5, 6), 0.3, 2) + 0.4).requires_grad_()
    assert torch.autograd.gradcheck(compose, (u, v))
    assert torch.autograd.gradcheck(lambda w: invert(w, tolerance=0, iterations=5), (u,))


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (1, 2, 4), (1, 2, 4, 5, 6), (1, 1, 4, 5), (2, 4, 5)])
def test_what_is_not_a_field_is_refused(shape: tuple[int, ...]) -> None:
    field = torch.zeros(shape)
    for call in (lambda: warp(torch.zeros(1, 1, 4, 5), field), lambda: jacobian_determinant(field)):
        with pytest.raises(ValueError, match="one component per spatial axis") as caught:
            call()
        assert str(shape) in str(caught.value)


@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (1, 1, 4, 5, 6), (4, 5)])
def test_an_image_of_another_batch_or_dimension_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        warp(torch.zeros(shape), torch.zeros(1, 2, 4, 5))


def test_fields_on_two_grids_are_not_composed() -> None:
    with pytest.raises(ValueError, match=r"grids \(4, 5\) and \(5, 4\)"):
        compose(torch.zeros(1, 2, 4, 5), torch.zeros(1, 2, 5, 4))


def test_whole_numbers_are_refused_where_they_would_be_interpolated() -> None:
    with pytest.raises(ValueError, match=r"image holds torch\.uint8; expected floating point"):
        warp(torch.zeros(1, 1, 4, 5, dtype=torch.uint8), torch.zeros(1, 2, 4, 5), mode="nearest")


def test_resizing_to_another_number_of_axes_is_refused() -> None:
    with pytest.raises(ValueError, match="has 3 axes; the field has 2"):
        resize_field(torch.zeros(1, 2, 4, 5), shape=(4, 5, 6))


def test_lengths_are_those_of_the_vectors() -> None:
    plane = torch.tensor([3.0, -4.0]).view(1, 2, 1, 1).expand(2, 2, 5, 4)
    assert torch.equal(lengths(plane), torch.full((2, 1, 5, 4), 5.0))
    volume = torch.tensor([2.0, 3.0, -6.0]).view(1, 3, 1, 1, 1).expand(1, 3, 2, 3, 4)
    assert torch.equal(lengths(volume), torch.full((1, 1, 2, 3, 4), 7.0))
    assert not lengths(0 * plane).any()


def test_roughness_of_a_linear_field_is_the_square_of_its_slopes() -> None:
    rows, columns = identity_grid((9, 12), torch.ones(1, dtype=torch.float64))
    linear = torch.stack([0.5 * rows, 2 * columns])
    # Half of the components change down, by 0.5, and half to the right, by 2.
    fields = torch.stack([linear, 0 * linear + 3])
    torch.testing.assert_close(roughness(fields), torch.tensor([0.5 * 0.25 + 0.5 * 4, 0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("displacement", "message"),
    [
        (torch.zeros(2, 5, 4), "does not lie on a grid"),
        (torch.zeros(3, 4, 5), "one component per spatial axis"),
        (torch.zeros(2, 4, 5, dtype=torch.float64), "float32"),
        (torch.full((2, 4, 5), math.nan), "NaN"),
        (torch.zeros(2, 4, 5).index_fill(2, torch.tensor([3]), math.inf), "infinite"),
    ],
)
def test_a_deformation_field_is_valid_once_constructed(displacement: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeformationField(displacement, Geometry.picture((4, 5)))


def test_a_frame_says_what_its_grid_is() -> None:
    placed, _, across = slice_geometry(
        shape=(64, 48),
        spacing=(1.5, 2.0),
        origin=np.array([-30.0, 12.0, 80.0]),
        x_axis=np.array([np.cos(0.2), np.sin(0.2) * np.cos(0.1), np.sin(0.2) * np.sin(0.1)]),
        y_axis=np.array([0.0, np.sin(0.1), -np.cos(0.1)]),  # coronal, tilted about both axes
        through=np.array([0.0, 3.0, 0.0]),
    )
    frame = MovingFrame.of(placed)
    assert (frame.positioned, frame.spacing) == (True, None)
    assert frame.across == pytest.approx(across, abs=1e-3)
    # Half of 63 steps of 2 mm down and half of 47 steps of 1.5 mm to the right.
    assert across == pytest.approx(12 + 63 * np.sin(0.1) + 47 * 0.75 * np.sin(0.2) * np.cos(0.1))
    unplaced = Geometry((64, 48), (1.5, 2.0), (0.0, 0.0), ((1.0, 0.0), (0.0, 1.0)), positioned=False)
    assert MovingFrame.of(unplaced) == MovingFrame(True, (64, 48), False, spacing=(1.5, 2.0))
    assert MovingFrame.of(Geometry.picture((64, 48))) == MovingFrame(False, (64, 48))
    assert str(frame) == "a scan in millimetres (48 x 64) with a position"
    assert str(MovingFrame.of(unplaced)) == "a scan in millimetres (48 x 64, 1.5 x 2 mm each) without a position"


@pytest.mark.parametrize(
    ("frame", "note"),
    [
        (MovingFrame(True, (64, 48)), "48x64 mm"),  # as older versions wrote all grids with millimetres
        (MovingFrame(False, (64, 48)), "48x64 pixels"),
        (MovingFrame(True, (64, 48), True), "48x64 mm placed"),
        (MovingFrame(True, (64, 48), True, across=-1234.567), "48x64 mm placed -1234.567"),
        (MovingFrame(True, (64, 48), False, spacing=(0.0001234, 0.9766)), "48x64 mm unplaced 0.0001234x0.9766"),
        (MovingFrame(True, (9, 64, 48), False), "48x64x9 mm unplaced"),
    ],
)
def test_a_field_s_file_keeps_the_frame(tmp_path: Path, frame: MovingFrame, note: str) -> None:
    grid = Geometry((33, 40), (0.9, 0.9), (0.0, 0.0), ((1.0, 0.0), (0.0, 1.0)), plane="sagittal", positioned=False)
    path = tmp_path / "field.nii.gz"
    write_deformation(path, DeformationField(torch.zeros(2, 33, 40), grid, frame))
    assert read_deformation(path).moving == frame
    written = bytes(nib.load(path).header["descrip"].item()).rstrip(b"\0").decode()
    assert written == f"bsafusion sagittal unpositioned, into {note}"


def test_the_longest_note_of_a_frame_fits_into_the_file(tmp_path: Path) -> None:
    grid = Geometry((33, 40), (0.9, 0.9), (0.0, 0.0), ((1.0, 0.0), (0.0, 1.0)), plane="sagittal", positioned=False)
    for frame in (
        MovingFrame(True, (2048, 2048), False, spacing=(0.00012345, 0.00012345)),
        MovingFrame(True, (2048, 2048), True, across=-1e6),
        MovingFrame(True, (2048, 2048, 2048), False, spacing=(0.9, 0.9, 0.9)),
    ):
        write_deformation(tmp_path / "field.nii.gz", DeformationField(torch.zeros(2, 33, 40), grid, frame))
        back = read_deformation(tmp_path / "field.nii.gz").moving
        assert back is not None
        assert replace(back, spacing=None) == replace(frame, spacing=None)
