"""Plain fusions: identities, known answers, ranges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from bsafusion.plain_fusion import FUSIONS, average, guided, laplacian, maximum

Array = NDArray[np.float32]
SHAPES = [(64, 64), (33, 47), (1, 1), (2, 3), (5, 80), (97, 64)]


def noise(shape: tuple[int, int], seed: int = 0) -> Array:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def pattern(shape: tuple[int, int]) -> Array:
    rows, columns = np.indices(shape)
    return (0.5 + 0.25 * np.sin(rows / 3) + 0.25 * np.cos(columns / 5)).astype(np.float32)


@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_image_fused_with_itself_is_itself(name: str, shape: tuple[int, int]) -> None:
    image = noise(shape)
    fused = FUSIONS[name](image, image)
    assert fused.dtype == np.float32
    np.testing.assert_allclose(fused, image, atol=1e-6)


@pytest.mark.parametrize("name", FUSIONS)
def test_constant_images_stay_constant(name: str) -> None:
    # Neither has detail, so each is a base alone; the guided filter weighs both alike.
    expected = {"maximum": 0.7, "average": 0.45, "laplacian": 0.45, "guided": 0.45}
    fused = FUSIONS[name](np.full((41, 38), 0.2, np.float32), np.full((41, 38), 0.7, np.float32))
    np.testing.assert_allclose(fused, expected[name], atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), height=st.integers(1, 70), width=st.integers(1, 70), hard=st.booleans())
@pytest.mark.parametrize("name", FUSIONS)
def test_values_stay_in_range_and_a_swap_changes_nothing(
    name: str, seed: int, height: int, width: int, hard: bool
) -> None:
    a, b = noise((height, width), seed), noise((height, width), seed + 1)
    if hard:  # black and white: the largest overshoot there is
        a, b = np.rint(a), np.rint(b)
    fused = FUSIONS[name](a, b)
    assert fused.shape == a.shape
    assert fused.min() >= 0
    assert fused.max() <= 1
    if not (name == "laplacian" and hard):  # ties of opposite sign go to the fixed image
        np.testing.assert_allclose(fused, FUSIONS[name](b, a), atol=1e-6)


def test_against_black() -> None:
    image, black = pattern((64, 64)), np.zeros((64, 64), np.float32)
    np.testing.assert_array_equal(maximum(image, black), image)
    np.testing.assert_array_equal(average(black, image), image / 2)


def test_the_pyramid_keeps_fine_detail_whole_and_halves_the_base() -> None:
    black = np.zeros((64, 64), np.float32)
    rows, columns = np.indices((64, 64))
    checker = ((rows + columns) % 2).astype(np.float32)
    # Its blurred version is 1/2 everywhere (the kernel's alternating sum is 0), so its base is 1/2 and its detail
    # +-1/2; against black the base is halved: 1/4 +- 1/2, clipped at 0.
    np.testing.assert_allclose(laplacian(checker, black), np.where(checker > 0, 0.75, 0.0), atol=1e-6)


def test_the_pyramid_selects_the_stronger_detail_pixel_by_pixel() -> None:
    rows, columns = np.indices((64, 64))
    checker = (0.5 - ((rows + columns) % 2)) * 0.8
    left = columns < 32
    a = (0.5 + np.where(left, checker, 0)).astype(np.float32)
    b = (0.5 + np.where(left, 0, checker)).astype(np.float32)
    np.testing.assert_allclose(laplacian(a, b)[:, 4:28], a[:, 4:28], atol=0.02)
    np.testing.assert_allclose(laplacian(a, b)[:, 36:60], b[:, 36:60], atol=0.02)


def test_one_level_of_the_pyramid_by_hand() -> None:
    # Five pixels allow one level. REDUCE of an impulse in the middle, borders mirrored: 2 * 0.05, 0.4, 2 * 0.05.
    # EXPAND of it, taps 0.8, 0.5, 0.1 at distance 0, 1, 2: outer 0.8 * 0.1 + 2 * 0.1 * 0.4, then 0.5 * (0.1 + 0.4),
    # middle 0.8 * 0.4 + 2 * 0.1 * 0.1.
    impulse = np.zeros((5, 5), np.float32)
    impulse[:, 2] = 1
    base = np.array([0.16, 0.25, 0.34, 0.25, 0.16])
    half = np.full((5, 5), 0.5, np.float32)
    fused = laplacian(half + impulse / 2, half)
    np.testing.assert_allclose(fused, 0.5 + 0.5 * (impulse - base / 2), atol=1e-6)


def test_the_guided_filter_takes_each_half_from_the_sharp_image() -> None:
    texture = pattern((128, 128)) * 0.5 + 0.5 * noise((128, 128))
    blurred = ndimage.gaussian_filter(texture, 3)
    left = np.indices((128, 128))[1] < 64
    a, b = np.where(left, texture, blurred), np.where(left, blurred, texture)
    fused = guided(a, b)
    inner = np.abs(np.indices((128, 128))[1] - 64) > 12
    assert np.abs(fused - texture)[inner].max() < 0.02
    assert np.abs(average(a, b) - texture)[inner].max() > 0.1


def test_the_guided_filter_against_its_formula() -> None:
    """Window by window, as the paper writes it, in the middle of an image that is larger than every window."""
    size, middle = 241, 120
    a, b = (ndimage.gaussian_filter(noise((size, size), seed), 2) for seed in (1, 2))
    a, b = ((x - x.min()) / np.ptp(x) for x in (a, b))

    def window(x: NDArray[np.float64], row: int, column: int, radius: int) -> NDArray[np.float64]:
        return x[row - radius : row + radius + 1, column - radius : column + radius + 1]

    def saliency(image: Array) -> NDArray[np.float64]:
        laplace = ndimage.correlate(image.astype(float), [[0, 1, 0], [1, -4, 1], [0, 1, 0]], mode="reflect")
        offsets = np.arange(-5, 6)
        kernel = np.exp(-(offsets[:, None] ** 2 + offsets**2) / 50)
        return np.asarray(ndimage.correlate(np.abs(laplace), kernel / kernel.sum(), mode="reflect"))

    saliencies = saliency(a), saliency(b)
    fused = 0.0
    weights: dict[int, list[float]] = {45: [], 7: []}
    for image, own, other in ((a, *saliencies), (b, *saliencies[::-1])):
        image, chosen = image.astype(float), (own > other).astype(float)
        for radius, epsilon in ((45, 0.3), (7, 1e-6)):
            slopes, offsets = [], []
            for row in range(middle - radius, middle + radius + 1):
                for column in range(middle - radius, middle + radius + 1):
                    guide, target = window(image, row, column, radius), window(chosen, row, column, radius)
                    slope = ((guide * target).mean() - guide.mean() * target.mean()) / (guide.var() + epsilon)
                    slopes.append(slope)
                    offsets.append(target.mean() - slope * guide.mean())
            weights[radius].append(max(np.mean(slopes) * image[middle, middle] + np.mean(offsets), 0))
    for index, image in enumerate((a, b)):
        base = window(image.astype(float), middle, middle, 15).mean()
        fused += weights[45][index] / sum(weights[45]) * base
        fused += weights[7][index] / sum(weights[7]) * (image[middle, middle] - base)
    assert guided(a, b)[middle, middle] == pytest.approx(fused, abs=1e-6)


@pytest.mark.parametrize("name", FUSIONS)
def test_what_cannot_be_fused_is_refused(name: str) -> None:
    image = noise((40, 40))
    with pytest.raises(ValueError, match=r"fixed \(40, 40\) and moving \(40, 41\); expected both as H W of one shape"):
        FUSIONS[name](image, noise((40, 41)))
    with pytest.raises(ValueError, match="expected both as H W"):
        FUSIONS[name](image[None], image[None])
    with pytest.raises(ValueError, match=r"moving luminance from .* to 255; expected \[0, 1\]"):
        FUSIONS[name](image, np.where(image == image.max(), np.float32(255), image))
    with pytest.raises(ValueError, match="fixed luminance from nan"):
        FUSIONS[name](np.where(image == image.max(), np.float32(np.nan), image), image)
