"""The grid that the network sees: upright, with square pixels, whatever a file's order of rows and columns."""

from __future__ import annotations

import dataclasses
from itertools import product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import bsafusion
from bsafusion.canonical import canonical
from bsafusion.deformation import warp
from bsafusion.image import Geometry, Image
from bsafusion.io import read_image
from bsafusion.metrics import endpoint_error
from bsafusion.pipeline import Model, fuse

AXIAL = Geometry((40, 56), (1.0, 1.0), (0.0, 0.0), ((1.0, 0.0), (0.0, 1.0)), plane="axial")
ORDERS = list(product((False, True), repeat=3))
"""Rows and columns exchanged; then rows reversed, columns reversed."""


def stored(array: NDArray[np.float32], order: tuple[bool, ...]) -> NDArray[np.float32]:
    """``C H W`` as a file may hold it."""
    transposed, rows, columns = order
    array = array.swapaxes(-1, -2) if transposed else array
    array = array[..., ::-1, :] if rows else array
    return np.ascontiguousarray(array[..., ::-1] if columns else array)


def grid(shape: tuple[int, int], order: tuple[bool, ...]) -> Geometry:
    """Of an upright axial picture ``(H, W)`` of 1 mm, centred on the origin, when it is stored so."""
    transposed, rows, columns = order
    x, y = np.eye(2)[::-1] if transposed else np.eye(2)
    axes = np.stack([-x if columns else x, -y if rows else y], axis=1)
    size = shape[::-1] if transposed else shape
    origin = -axes @ ((np.array(size[::-1]) - 1) / 2)
    return Geometry(size, (1.0, 1.0), tuple(origin), tuple(map(tuple, axes)), plane="axial")


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_seen_is_upright_and_comes_back_as_it_was(order: tuple[bool, ...]) -> None:
    picture = np.random.default_rng(0).random((1, 40, 56), np.float32)
    turn = canonical(grid((40, 56), order))
    kept = torch.from_numpy(stored(picture, order))[None]
    assert torch.equal(turn.see(kept), torch.from_numpy(picture)[None])
    assert torch.equal(turn.give_back(turn.see(kept)), kept)
    assert turn.is_identity == (not any(order))
    assert (turn.note == "") == turn.is_identity


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("spacing", [(1.0, 1.0), (1.0, 3.0), (2.0, 1.0)])
def test_a_field_that_comes_back_moves_the_stored_image_alike(
    order: tuple[bool, ...], spacing: tuple[float, float]
) -> None:
    turn = canonical(dataclasses.replace(grid((40, 56), order), spacing=spacing))
    rows, columns = torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=torch.float64) for n in turn.shape), indexing="ij")
    seen = (rows * columns + columns)[None, None]  # linear interpolation keeps it where it is stretched
    field = torch.stack([2 + rows, -3 + 0 * rows])[None]
    twice = turn.give_back(warp(seen, field))
    once = warp(turn.give_back(seen), turn.give_back_field(field))
    torch.testing.assert_close(turn.see_field(turn.give_back_field(field)), field, atol=1e-6, rtol=0)
    inner = (..., slice(8, -8), slice(8, -8))
    torch.testing.assert_close(once[inner], twice[inner], atol=2e-3, rtol=0)
    assert (once - turn.give_back(seen))[inner].abs().mean() > 0.02  # it was moved


def test_pixels_become_square_and_stored_samples_stay() -> None:
    picture = torch.rand(1, 1, 40, 56)
    turn = canonical(dataclasses.replace(AXIAL, spacing=(0.5, 2.0)))
    assert turn.shape == (4 * 39 + 1, 56)
    seen = turn.see(picture)
    torch.testing.assert_close(seen[..., ::4, :], picture, atol=1e-6, rtol=0)
    torch.testing.assert_close(turn.give_back(seen), picture, atol=1e-6, rtol=0)
    assert canonical(dataclasses.replace(AXIAL, spacing=(1.0, 1.01))).is_identity
    huge = canonical(dataclasses.replace(AXIAL, shape=(64, 2048), spacing=(0.1, 20.0)))
    assert max(huge.shape) == 2048
    assert min(huge.shape) >= 32


def test_what_is_not_told_is_taken_as_it_is() -> None:
    assert canonical(Geometry.picture((40, 56))).is_identity
    unplaced = Geometry((40, 56), (1.0, 1.0), (0.0, 0.0), ((-1.0, 0.0), (0.0, -1.0)), positioned=False)
    assert canonical(unplaced).is_identity


@pytest.mark.parametrize(("plane", "upright"), [("axial", (1, 1)), ("coronal", (1, -1)), ("sagittal", (1, -1))])
def test_upright_is_as_radiology_displays_the_plane(plane: str, upright: tuple[int, int]) -> None:
    """Axial: rows grow towards the back; coronal and sagittal: towards the feet."""
    for right, down in product((1, -1), repeat=2):
        turn = canonical(dataclasses.replace(AXIAL, direction=((right, 0.0), (0.0, down)), plane=plane))
        assert (turn.transposed, turn.flipped) == (False, (down != upright[1], right != upright[0]))


def test_a_slight_turn_in_the_plane_is_none() -> None:
    c, s = np.cos(0.3), np.sin(0.3)
    assert canonical(dataclasses.replace(AXIAL, direction=((c, -s), (s, c)))).is_identity


@pytest.fixture(scope="module")
def sample() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A pair of the shipped samples, ``C H W``."""
    pair = next(s for s in bsafusion.load_samples() if s.task == "ct-mri")
    return read_image(pair.fixed).array, read_image(pair.moving).array


@pytest.fixture(scope="module")
def model() -> Model:
    return bsafusion.load_model()


def scan_of(array: NDArray[np.float32], order: tuple[bool, ...]) -> Image:
    return Image(stored(array, order), grid(array.shape[1:], order), dtype="float32")


@pytest.mark.parametrize("order", ORDERS[1:])
def test_the_answer_does_not_depend_on_how_a_file_stores_its_rows(
    order: tuple[bool, ...], sample: tuple[NDArray[np.float32], NDArray[np.float32]], model: Model
) -> None:
    upright = fuse(*(scan_of(array, ORDERS[0]) for array in sample), model=model)
    other = fuse(scan_of(sample[0], order), scan_of(sample[1], ORDERS[0]), model=model)
    assert other.fused is not None
    assert upright.fused is not None
    np.testing.assert_allclose(other.fused, stored(upright.fused, order), atol=1e-3)
    turn = canonical(other.fixed.geometry)
    field = turn.give_back_field(upright.displacement[None])[0]
    assert endpoint_error(field.numpy(), -other.displacement.numpy()).max() > 1  # there is something to compare
    np.testing.assert_allclose(other.displacement, field, atol=2e-2)
    assert (other.status, other.evidence.folded_share) == (upright.status, upright.evidence.folded_share)
    assert other.evidence.displacement_mean == pytest.approx(upright.evidence.displacement_mean, abs=1e-2)
    for name, (_, panel) in upright.panels.items():  # pictures to be looked at are upright
        assert other.panels[name][1].shape == panel.shape
        assert np.abs(other.panels[name][1] - panel).mean() < 0.01, name
    assert "The network saw the fixed grid upright" in other.report["grid"]["note"]


def test_pixels_that_are_not_square_cost_nothing(
    sample: tuple[NDArray[np.float32], NDArray[np.float32]], model: Model
) -> None:
    fixed, moving = (array[:, ::2, ::2] for array in sample)
    square = fuse(*(Image(a, Geometry.picture(a.shape[1:]), dtype="float32") for a in (fixed, moving)), model=model)
    flat = dataclasses.replace(AXIAL, shape=(2 * fixed.shape[1], fixed.shape[2]), spacing=(1.0, 0.5))
    tall = fuse(*(Image(a.repeat(2, axis=1), flat, dtype="float32") for a in (fixed, moving)), model=model)
    found = tall.displacement.numpy()[:, ::2] * np.array([0.5, 1.0], np.float32)[:, None, None]
    apart = endpoint_error(np.zeros_like(found), found - square.displacement.numpy())
    assert apart.mean() < 1
    assert np.hypot(*square.displacement.numpy()).mean() > 2 * apart.mean()
