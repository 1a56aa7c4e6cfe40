"""Hue, luminance and gamut: what holds for every colour, and answers known by hand."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from bsafusion.colour import check_hue, colourise, join_colour, overlay, recolour, split_colour, steer

Array = NDArray[Any]
units = st.floats(0, 1, width=32)
colours = hnp.arrays(np.float32, (3, 4, 5), elements=units)
lumas = hnp.arrays(np.float32, (1, 4, 5), elements=units)
RED, GREEN, BLUE = np.eye(3)[:, :, None]


def hues(rgb: Array) -> Array:
    """Degrees; by the standard library."""
    pixels = np.asarray(rgb, dtype=float).reshape(3, -1).T
    return np.array([360 * colorsys.rgb_to_hsv(*pixel)[0] for pixel in pixels])


def apart(a: Array, b: Array) -> Array:
    """Angles between hues in degrees."""
    return np.abs((a - b + 180) % 360 - 180)


# --- luma and chroma ---


@given(colours)
def test_colour_round_trip(rgb: Array) -> None:
    np.testing.assert_allclose(join_colour(*split_colour(rgb)), rgb, atol=1e-12)


def test_colour_known_values() -> None:
    luma, chroma = split_colour(np.array([[1.0, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1]]))
    np.testing.assert_allclose(luma[0], [0.299, 0.587, 0.114, 1.0])
    np.testing.assert_allclose(chroma[0], [-0.168736, -0.331264, 0.5, 0.0], atol=1e-6)
    np.testing.assert_allclose(chroma[1], [0.5, -0.418688, -0.081312, 0.0], atol=1e-6)


def test_split_colour_refuses_grey() -> None:
    with pytest.raises(ValueError, match="3 channels"):
        split_colour(np.zeros((1, 4, 4)))


# --- another luminance under a colour ---


@given(lumas, colours)
def test_recolour_keeps_luma_hue_and_gamut(luma: Array, rgb: Array) -> None:
    chroma = split_colour(rgb)[1]
    result = recolour(luma, chroma)
    new_luma, new_chroma = split_colour(result)
    assert result.min() >= -1e-12
    assert result.max() <= 1 + 1e-12
    np.testing.assert_allclose(new_luma, luma, atol=1e-12)
    # The same hue: parallel, pointing the same way, and never more saturated.
    np.testing.assert_allclose(new_chroma[0] * chroma[1] - new_chroma[1] * chroma[0], 0, atol=1e-12)
    assert (new_chroma * chroma).sum(axis=0).min() >= -1e-12
    assert (np.hypot(*new_chroma) <= np.hypot(*chroma) + 1e-12).all()


@given(lumas, colours)
def test_recolour_keeps_the_hue_of_hsv(luma: Array, rgb: Array) -> None:
    result = recolour(luma, split_colour(rgb)[1])
    visible = (np.ptp(rgb, axis=0) > 1e-3) & (np.ptp(result, axis=0) > 1e-6)
    assert apart(hues(result[:, visible]), hues(rgb[:, visible])).max(initial=0) < 1e-3


@given(lumas, colours)
def test_recolour_shortens_no_more_than_needed(luma: Array, rgb: Array) -> None:
    chroma = split_colour(rgb)[1]
    result, full = recolour(luma, chroma), join_colour(luma, chroma)
    shortened = (full.min(axis=0) < -1e-9) | (full.max(axis=0) > 1 + 1e-9)
    touches = (result.min(axis=0) < 1e-9) | (result.max(axis=0) > 1 - 1e-9)
    assert (touches | ~shortened).all()
    np.testing.assert_allclose(result[:, ~shortened], full[:, ~shortened], atol=1e-8)


@given(colours)
def test_a_colour_on_its_own_luma_is_itself(rgb: Array) -> None:
    np.testing.assert_allclose(recolour(*split_colour(rgb)), rgb, atol=1e-9)


def test_black_and_white_have_no_room_for_colour() -> None:
    for value in (0.0, 1.0):
        result = recolour(np.full((1, 1), value), split_colour(RED)[1])
        np.testing.assert_allclose(result, value, atol=1e-9)


def test_a_bright_red_is_shortened_to_the_edge_of_the_cube() -> None:
    # Red over luma 0.8: red 0.8 + 0.701 k = 1, so k = 0.2 / 0.701; green and blue 0.8 - 0.299 k.
    result = recolour(np.full((1, 1), 0.8), split_colour(RED)[1])
    np.testing.assert_allclose(result[:, 0], [1, 0.8 - 0.299 * 0.2 / 0.701, 0.8 - 0.299 * 0.2 / 0.701], atol=1e-12)


# --- overlay and balance ---


@given(lumas, colours, lumas)
def test_an_overlay_keeps_the_hue_and_the_range(fixed: Array, rgb: Array, alpha: Array) -> None:
    result = overlay(fixed.astype(float), rgb.astype(float), alpha.astype(float))
    assert result.min() >= 0
    assert result.max() <= 1 + 1e-12
    visible = (np.ptp(rgb, axis=0) > 1e-3) & (alpha[0] > 1e-3)
    assert apart(hues(result[:, visible]), hues(rgb[:, visible])).max(initial=0) < 1e-3


def test_an_overlay_by_hand() -> None:
    result = overlay(np.full((1, 1), 0.4), RED, np.full((1, 1), 0.25))
    np.testing.assert_allclose(result[:, 0], [0.55, 0.3, 0.3])


@given(lumas, colours, colours)
def test_the_balance_has_exact_ends_and_middle(fixed: Array, aligned: Array, fused: Array) -> None:
    np.testing.assert_array_equal(steer(fused, fixed, aligned, 0), aligned)
    np.testing.assert_array_equal(steer(fused, fixed, aligned, 0.5), fused)
    np.testing.assert_array_equal(steer(fused, fixed, aligned, 1), np.broadcast_to(fixed, fused.shape))


@given(lumas, colours, colours, st.lists(units, min_size=2, max_size=6).map(sorted))
def test_the_balance_goes_one_way(fixed: Array, aligned: Array, fused: Array, weights: list[float]) -> None:
    fixed, aligned, fused = (x.astype(float) for x in (fixed, aligned, fused))
    pictures = [steer(fused, fixed, aligned, weight) for weight in weights]
    for weight, one, next_weight, other in zip(weights, pictures, weights[1:], pictures[1:], strict=False):
        assert 0 <= one.min() <= one.max() <= 1 + 1e-12
        if next_weight <= 0.5:  # away from the aligned image
            assert (np.abs(other - aligned) >= np.abs(one - aligned) - 1e-12).all()
        if weight >= 0.5:  # towards the fixed image
            assert (np.abs(other - fixed) <= np.abs(one - fixed) + 1e-12).all()
        # Continuous: no pixel moves faster than two grey levels for each level of the weight.
        assert np.abs(other - one).max() <= 2 * (next_weight - weight) + 1e-12


@given(lumas, lumas, colours, units)
def test_the_balance_keeps_the_hue(fixed: Array, luma: Array, rgb: Array, weight: float) -> None:
    fused = recolour(luma, split_colour(rgb)[1])
    result = steer(fused, fixed.astype(float), rgb.astype(float), weight)
    visible = (np.ptp(rgb, axis=0) > 1e-3) & (np.ptp(result, axis=0) > 1e-6)
    assert apart(hues(result[:, visible]), hues(rgb[:, visible])).max(initial=0) < 1e-3


# --- colour maps ---


def test_a_table_gives_its_nearest_entry_and_no_mixture() -> None:
    table = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0]], dtype=np.float32)
    unit = np.array([[0, 0.2, 0.3, 0.5, 0.7, 0.8, 1]], dtype=np.float32)
    result = colourise(unit, table)
    assert result.shape == (3, 7)
    assert [table.tolist().index(colour) for colour in result.T.tolist()] == [0, 0, 1, 1, 1, 2, 2]


# --- the check ---


def test_hue_errors_known_by_hand() -> None:
    orange = np.array([1, 0.5, 0])[:, None]  # 30 degrees
    assert check_hue(orange, RED).error_median == pytest.approx(30, abs=0.2)
    assert check_hue(BLUE, RED).error_median == 120
    violet = np.array([1, 0, 1])[:, None]  # 300 degrees: 60 from red the short way
    assert check_hue(violet, RED).error_median == 60
    assert check_hue(GREEN * 0.3 + 0.2, GREEN).error_median == 0


@given(hnp.arrays(np.uint8, (3, 30)), hnp.arrays(np.uint8, (3, 30)))
def test_the_check_against_the_standard_library(new: Array, old: Array) -> None:
    saturation = np.array([colorsys.rgb_to_hsv(*pixel)[1] for pixel in old.T / 255])
    judged = (saturation > 0.2 + 1e-9) & (np.ptp(new, axis=0) > 0)
    doubtful = np.abs(saturation - 0.2) < 1e-9
    result = check_hue(new[:, ~doubtful] / 255, old[:, ~doubtful] / 255)
    if judged.any():
        expected = np.median(apart(hues(new[:, judged]), hues(old[:, judged])))
        assert result.error_median == pytest.approx(expected, abs=1e-6)
        assert result.lost_share == pytest.approx(1 - judged.sum() / (saturation > 0.2 + 1e-9).sum())
    else:
        assert result.error_median is None


def test_what_turned_grey_is_counted_apart() -> None:
    old = np.stack([RED, RED, RED, RED, np.full((3, 1), 0.5)], axis=1)[..., 0]
    new = np.stack([RED, np.full((3, 1), 0.4), RED, RED, BLUE], axis=1)[..., 0]
    assert check_hue(new, old).error_median == 0
    assert check_hue(new, old).lost_share == pytest.approx(0.25)


def test_nothing_coloured_is_no_error() -> None:
    grey = np.full((3, 4), 0.5)
    assert check_hue(grey, grey).error_median is check_hue(grey, grey).lost_share is None


def test_sixteen_bits_resolve_what_eight_cannot() -> None:
    orange = np.array([1, 0.5, 0])[:, None]
    pale = 0.5 + 0.004 * orange  # half a level of 8 bits between green and blue
    assert check_hue(pale, orange).error_median == pytest.approx(30, abs=0.5)
    assert check_hue(pale, orange, levels=65535).error_median == pytest.approx(0, abs=0.2)
