"""Fusion metrics against slow implementations and known values; registration metrics against algebra."""

from __future__ import annotations

import csv
import math
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from scipy.signal import correlate2d
from skimage.metrics import structural_similarity

from bsafusion import metrics
from bsafusion.deformation import compose
from bsafusion.metrics import (
    ALL_METRICS,
    DIRECTIONS,
    PAPER_METRICS,
    ErrorSummary,
    draw_consistency,
    endpoint_error,
    endpoint_residual,
    folds,
    fusion_metrics,
    head_mask,
    inverse_consistency,
    summarise,
    target_registration_error,
)

Array = NDArray[np.float64]
Triple = tuple[Array, Array, Array]

GOLDEN_SYNTHETIC = Path(__file__).parent / "data" / "golden_metrics_synthetic.csv"
EDGE_MAXIMUM = 0.9994 * 0.9879 / (1 + math.exp(-22 * 0.2))  # Q_AB/F of strong edges that did not change


def textured(seed: int, shape: tuple[int, int] = (64, 80)) -> Array:
    """Smooth structure under a sharp one, whole grey levels that use 0..255."""
    rng = np.random.default_rng(seed)
    image = ndimage.gaussian_filter(rng.normal(size=shape), 3) * 20 + ndimage.gaussian_filter(rng.normal(size=shape), 1)
    return np.round((image - image.min()) * 255 / np.ptp(image))


def random_triple(shape: tuple[int, int] = (64, 80)) -> Triple:
    fixed, moving = textured(1, shape), textured(2, shape)
    return fixed, moving, np.floor((fixed + moving) / 2)


def phantom() -> tuple[Array, Array]:
    """A head of ellipses in whole numbers, so that every machine draws the same: soft tissue, and bone."""
    y, x = np.indices((96, 80))
    radius = 4 * (y - 47) ** 2 + 6 * (x - 39) ** 2
    head, brain = radius < 7600, radius < 5800
    ventricles = (y - 45) ** 2 + 3 * (x - 33) ** 2 < 90
    lesion = (y - 60) ** 2 + (x - 50) ** 2 < 40
    fixed = 60 * head + brain * (60 + (3 * y + 5 * x) % 31 + y // 2) - 90 * ventricles + 70 * lesion
    moving = 255 * (head & ~brain) + brain * (70 + (7 * x + y * y // 9) % 13) - 40 * ventricles
    return fixed.astype(np.float64), moving.astype(np.float64)


def fuse(fixed: Array, moving: Array, kind: str) -> Array:
    return np.maximum(fixed, moving) if kind == "max" else np.floor((fixed + moving) / 2)


# --- Fusion metrics: reference values ---------------------------------------------------------


def read_golden(path: Path) -> dict[tuple[str, ...], dict[str, float]]:
    golden: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            value, metric = float(row.pop("value")), row.pop("metric")
            golden[tuple(row.values())][metric] = value
    return dict(golden)


def luma(path: Path) -> Array:
    picture = np.asarray(Image.open(path), dtype=np.float64)
    return np.round(picture @ [0.299, 0.587, 0.114]) if picture.ndim == 3 else picture


@pytest.mark.skipif(
    not {"BSAFUSION_ATLAS", "BSAFUSION_GOLDEN"} <= os.environ.keys(),
    reason="set BSAFUSION_ATLAS (folder of pairs.csv) and BSAFUSION_GOLDEN (csv of reference values)",
)
def test_agrees_with_an_independent_implementation_on_the_atlas() -> None:
    atlas, golden = Path(os.environ["BSAFUSION_ATLAS"]), read_golden(Path(os.environ["BSAFUSION_GOLDEN"]))
    with (atlas / "pairs.csv").open(newline="") as file:
        pairs = {(row["task"], row["slice"]): row for row in csv.DictReader(file)}
    assert golden
    for (task, slice_, kind), expected in golden.items():
        fixed, moving = (luma(atlas / pairs[task, slice_][role]) for role in ("fixed", "moving"))
        found = fusion_metrics(fixed, moving, fuse(fixed, moving, kind), tuple(expected))
        assert found == pytest.approx(expected, rel=1e-9), (task, slice_, kind)


def test_the_phantom_keeps_its_values() -> None:
    golden = read_golden(GOLDEN_SYNTHETIC)
    fixed, moving = phantom()
    assert set(golden) == {("max",), ("half",)}
    for (kind,), expected in golden.items():
        assert set(expected) == set(ALL_METRICS)
        found = fusion_metrics(fixed, moving, fuse(fixed, moving, kind), ALL_METRICS)
        assert found == pytest.approx(expected, rel=1e-9)


# --- Fusion metrics: independent slow implementations -----------------------------------------


def gaussian_2d(taps: int, sigma: float) -> Array:
    y, x = np.mgrid[:taps, :taps] - (taps - 1) / 2
    weights = np.exp(-(x**2 + y**2) / (2 * sigma**2))
    return np.asarray(weights / weights.sum())


def slow_sobel(image: Array, row: int, column: int) -> tuple[float, float]:
    padded = np.pad(image, 1)[row : row + 3, column : column + 3]
    weights = np.array([[1, 2, 1]])
    gx = float((padded[:, 2] - padded[:, 0]) @ weights[0])
    gy = float((padded[0] - padded[2]) @ weights[0])
    return gx, gy


def slow_strength(image: Array) -> Array:
    return np.array(
        [[math.hypot(*slow_sobel(image, i, j)) for j in range(image.shape[1])] for i in range(image.shape[0])]
    )


def test_qabf_against_a_loop_over_pixels() -> None:
    fixed, moving, fused = random_triple((13, 17))
    fused[3:8, 4:9] = fixed[3:8, 4:9]  # equal strengths: the special case of the definition
    numerator = denominator = 0.0
    for source in (fixed, moving):
        for i, j in np.ndindex(source.shape):
            (sx, sy), (fx, fy) = slow_sobel(source, i, j), slow_sobel(fused, i, j)
            gs, gf = math.hypot(sx, sy), math.hypot(fx, fy)
            strength = gf if gs == gf else min(gs, gf) / max(gs, gf)
            turn = abs((math.atan(sy / sx) if sx else math.pi / 2) - (math.atan(fy / fx) if fx else math.pi / 2))
            orientation = 1 - turn / (math.pi / 2)
            kept = 0.9994 / (1 + math.exp(-15 * (strength - 0.5)))
            kept *= 0.9879 / (1 + math.exp(-22 * (orientation - 0.8)))
            numerator += kept * gs
            denominator += gs
    assert metrics.qabf(fixed, moving, fused) == pytest.approx(numerator / denominator, rel=1e-10)


@pytest.mark.parametrize("shape", [(32, 48), (35, 51)])
def test_qcv_against_the_plain_fourier_sum(shape: tuple[int, int]) -> None:
    fixed, moving, fused = random_triple(shape)
    images = [np.floor((x - x.min()) / (x.max() - x.min()) * 255 + 0.5) for x in (fixed, moving, fused)]
    rows, columns = (np.arange(n) - n // 2 for n in shape)
    r = np.hypot(rows[:, None] / 4, columns / 4)
    weight = 2.6 * (0.0192 + 0.144 * r) * np.exp(-((0.144 * r) ** 1.1))
    down = np.exp(-2j * np.pi * np.outer(rows, np.arange(shape[0])) / shape[0])
    across = np.exp(-2j * np.pi * np.outer(columns, np.arange(shape[1])) / shape[1])
    numerator = denominator = 0.0
    for source in images[:2]:
        spectrum = weight * (down @ (source - images[2]) @ across.T)
        difference = (down.conj().T @ spectrum @ across.conj()).real / source.size
        strength = slow_strength(source)
        for i in range(0, shape[0] - 15, 16):
            for j in range(0, shape[1] - 15, 16):
                block = slice(i, i + 16), slice(j, j + 16)
                saliency = (strength[block] ** 5).sum()
                numerator += saliency * (difference[block] ** 2).mean()
                denominator += saliency
    assert metrics.qcv(fixed, moving, fused) == pytest.approx(numerator / denominator, rel=1e-9)


def test_qssim_against_scikit_image() -> None:
    fixed, moving, fused = random_triple()
    expected = sum(
        structural_similarity(
            source, fused, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
        )
        for source in (fixed, moving)
    )
    assert metrics.qssim(fixed, moving, fused) == pytest.approx(expected, rel=1e-10)


def slow_piella(fixed: Array, moving: Array, fused: Array) -> tuple[float, float]:
    """Q_S and Q_W window by window, with moments about the window's own mean."""
    weights, qualities, saliencies = gaussian_2d(11, 1.5), [], []

    def window(image: Array, i: int, j: int) -> tuple[float, float, Array]:
        part = image[i : i + 11, j : j + 11]
        mean = float((weights * part).sum())
        return mean, float((weights * (part - mean) ** 2).sum()), part - mean

    for i in range(fixed.shape[0] - 10):
        for j in range(fixed.shape[1] - 10):
            mean_f, var_f, dev_f = window(fused, i, j)
            ssim, variance = [], []
            for source in (fixed, moving):
                mean, var, dev = window(source, i, j)
                cov = float((weights * dev * dev_f).sum())
                similar = (2 * mean * mean_f + 6.5025) / (mean**2 + mean_f**2 + 6.5025)
                ssim.append(similar * (2 * cov + 58.5225) / (var + var_f + 58.5225))
                variance.append(var)
            flat = max(variance) < 1e-6
            share = 0.5 if flat else variance[0] / sum(variance)
            qualities.append(share * ssim[0] + (1 - share) * ssim[1])
            saliencies.append(0.5 if flat else max(variance))
    quality, saliency = np.array(qualities), np.array(saliencies)
    return float(quality.mean()), float(quality @ saliency / saliency.sum())


def test_qs_qw_and_qe_against_a_loop_over_windows() -> None:
    fixed, moving, fused = random_triple((27, 31))
    fixed[:14, :16], moving[:14, :16] = 90, 20  # some windows are flat in both sources, some in one alone
    fixed[15:, :12], moving[:12, 18:] = 50, 70
    qs, qw = slow_piella(fixed, moving, fused)
    edges = [slow_strength(image) / 4 for image in (fixed, moving, fused)]
    assert metrics.qs(fixed, moving, fused) == pytest.approx(qs, rel=1e-9)
    assert metrics.qw(fixed, moving, fused) == pytest.approx(qw, rel=1e-9)
    assert metrics.qe(fixed, moving, fused) == pytest.approx(qw * slow_piella(*edges)[1], rel=1e-9)


def slow_vif_terms(source: Array, fused: Array, noise: float) -> list[tuple[Array, Array, Array]]:
    """Gain, kept and available information of every window, per scale, in bits."""
    terms = []
    for scale in range(4):
        taps = 2 ** (4 - scale) + 1
        weights = gaussian_2d(taps, taps / 5)
        if scale:
            source = correlate2d(source, weights, "valid")[::2, ::2]
            fused = correlate2d(fused, weights, "valid")[::2, ::2]
        mean_s, mean_f = correlate2d(source, weights, "valid"), correlate2d(fused, weights, "valid")
        var_s = correlate2d(source**2, weights, "valid") - mean_s**2
        var_f = correlate2d(fused**2, weights, "valid") - mean_f**2
        gain = np.maximum((correlate2d(source * fused, weights, "valid") - mean_s * mean_f) / var_s, 0)
        residual = var_f - gain**2 * var_s
        kept = np.log2(1 + gain**2 * var_s / (residual + noise))
        terms.append((gain, kept, np.log2(1 + var_s / noise)))
    return terms


def slow_vif(source: Array, fused: Array) -> float:
    terms = slow_vif_terms(source, fused, 2.0)
    return float(sum(kept.sum() for _, kept, _ in terms) / sum(whole.sum() for _, _, whole in terms))


def test_vif_sum_against_two_dimensional_windows() -> None:
    fixed, moving, fused = random_triple()
    expected = slow_vif(fixed, fused) + slow_vif(moving, fused)
    assert metrics.vif_sum(fixed, moving, fused) == pytest.approx(expected, rel=1e-8)


def test_viff_against_two_dimensional_windows() -> None:
    fixed, moving, fused = random_triple()
    expected = 0.0
    noise = 0.005 * 255**2
    terms = zip(slow_vif_terms(fixed, fused, noise), slow_vif_terms(moving, fused, noise), strict=True)
    for weight, (f, m) in zip((1, 0, 0.15, 1), terms, strict=True):
        first = f[0] < m[0]
        expected += weight / 2.15 * np.where(first, f[1], m[1]).sum() / np.where(first, f[2], m[2]).sum()
    assert metrics.viff(fixed, moving, fused) == pytest.approx(expected, rel=1e-5)


def test_information_against_histogram2d() -> None:
    fixed, moving, fused = random_triple()

    def mutual(a: Array, b: Array) -> tuple[float, float]:
        joint = np.histogram2d(a.ravel(), b.ravel(), bins=256, range=((-0.5, 255.5), (-0.5, 255.5)))[0]
        joint /= joint.sum()
        independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0)
        some = joint > 0
        information = (joint[some] * np.log2(joint[some] / independent[some])).sum()
        margins = [p[p > 0] for p in (joint.sum(axis=0), joint.sum(axis=1))]
        return float(information), -float(sum((p * np.log2(p)).sum() for p in margins))

    terms = [mutual(source, fused) for source in (fixed, moving)]
    assert metrics.mi_bits(fixed, moving, fused) == pytest.approx(sum(i for i, _ in terms), rel=1e-9)
    assert metrics.nmi(fixed, moving, fused) == pytest.approx(sum(2 * i / h for i, h in terms), rel=1e-9)


# --- Fusion metrics: values known by hand -----------------------------------------------------

UNCHANGED = {
    "qcv": 0.0,
    "qssim": 2.0,
    "vif_sum": 2.0,
    "viff": 1.0,
    "qs": 1.0,
    "qw": 1.0,
    "qe": 1.0,
    "scd": 0.0,
    "psnr": math.inf,
}
"""Metrics of three equal images, whatever they show."""


def test_three_equal_images() -> None:
    image = textured(3)
    found = fusion_metrics(image, image, image, ALL_METRICS)
    expected = UNCHANGED | {"nmi": 2.0, "cc": 1.0}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert found["qabf"] == pytest.approx(EDGE_MAXIMUM, rel=1e-3)
    assert found["mi_bits"] == pytest.approx(2 * found["en"])
    spot = np.zeros((8, 8))
    spot[3, 4] = 200  # little to know, but all of it is kept
    assert 0 < metrics.en(spot, spot, spot) < 0.2
    assert metrics.nmi(spot, spot, spot) == pytest.approx(2)


@pytest.mark.parametrize("level", [0.0, 100.0, 254.7, 255.0])
def test_three_equal_flat_images_have_stated_values(level: float) -> None:
    flat = np.full((64, 48), level)
    found = fusion_metrics(flat, flat, flat, ALL_METRICS)
    nothing = dict.fromkeys(("mi_bits", "nmi", "cc", "en", "sd", "sf", "ag"), 0.0)
    expected = UNCHANGED | nothing | {"qabf": 1.0 if level == 0 else EDGE_MAXIMUM}
    assert found == pytest.approx(expected, abs=1e-6)


def test_rounding_noise_is_no_visual_information() -> None:
    flat = np.full((64, 48), 100.0)
    noisy = flat + np.random.default_rng(0).normal(scale=1e-4, size=flat.shape)
    assert metrics.vif_sum(noisy, noisy, flat) == 2


def test_flat_images_of_different_levels() -> None:
    low, high = np.full((64, 48), 50.0), np.full((64, 48), 200.0)
    similar = (2 * 50 * 200 + 6.5025) / (50**2 + 200**2 + 6.5025)
    found = fusion_metrics(low, high, high, ALL_METRICS)
    assert found["qssim"] == pytest.approx(1 + similar)
    assert found["qs"] == pytest.approx((1 + similar) / 2)
    assert found["qw"] == pytest.approx((1 + similar) / 2)
    assert found["qcv"] == 0  # each is stretched to its own range
    assert found["psnr"] == pytest.approx(10 * math.log10(255**2 / (150**2 / 2)))


@pytest.mark.parametrize("pattern", ["001", "010", "100", "011", "101", "110"])
def test_a_flat_image_among_textured_ones_gives_no_nan(pattern: str) -> None:
    images = [textured(i) if kind == "1" else np.full((64, 80), 255.0) for i, kind in enumerate(pattern)]
    found = fusion_metrics(*images, ALL_METRICS)
    assert np.isfinite(list(found.values())).all()
    if pattern == "110":  # nothing of the sources is left in a flat fused image
        assert found["vif_sum"] == pytest.approx(0, abs=1e-6)
        assert found["viff"] == pytest.approx(0, abs=1e-6)
        assert found["mi_bits"] == found["cc"] == 0
    if pattern == "101":  # the flat moving image has nothing to lose
        assert found["vif_sum"] == pytest.approx(1 + slow_vif(images[0], images[2]), rel=1e-6)


def test_qcv_weighs_all_blocks_alike_without_salient_sources() -> None:
    flat, fused = np.zeros((32, 32)), np.zeros((32, 32))
    fused[:, ::2] = 255  # the mean passes with CSF(0), the Nyquist wave of amplitude 127.5 with CSF(16 / 4)
    passed = [2.6 * (0.0192 + 0.144 * r) * math.exp(-((0.144 * r) ** 1.1)) for r in (0, 4)]
    expected = 127.5**2 * (passed[0] ** 2 + passed[1] ** 2)
    assert metrics.qcv(flat, flat, fused) == pytest.approx(expected)


def test_statistics_of_a_small_image_by_hand() -> None:
    fused = np.array([[0.0, 10.0], [20.0, 30.0]])
    fixed, moving = fused + 5, fused + 10
    found = fusion_metrics(fixed, moving, fused, ("en", "sd", "sf", "ag", "psnr", "cc", "mi_bits"))
    assert found["en"] == 2.0
    assert found["sd"] == pytest.approx(math.sqrt(125))
    assert found["sf"] == pytest.approx(math.sqrt(10**2 + 20**2))
    assert found["ag"] == pytest.approx(math.sqrt((10**2 + 20**2) / 2))
    assert found["psnr"] == pytest.approx(10 * math.log10(255**2 / 62.5))
    assert found["cc"] == pytest.approx(1)
    assert found["mi_bits"] == pytest.approx(4)


def test_scd_is_two_for_a_sum_of_uncorrelated_sources() -> None:
    y, x = np.indices((8, 8))
    fixed, moving = 100.0 * (y % 2), 100.0 * (x % 2)
    assert metrics.scd(fixed, moving, fixed + moving) == pytest.approx(2)
    assert metrics.scd(fixed, moving, (fixed + moving) / 2) == pytest.approx(math.sqrt(2))


def test_of_two_sources_that_got_through_alike_viff_looks_at_the_moving_one() -> None:
    flat = np.full((64, 80), 90.0)  # a flat fused image has a gain of 0 from either
    assert metrics.viff(textured(1), flat, flat) == pytest.approx(1)
    assert metrics.viff(flat, textured(1), flat) == pytest.approx(0, abs=1e-4)


def test_raised_contrast_gives_a_vif_above_one() -> None:
    image = textured(4) / 2
    assert metrics.vif_sum(image, image, 2 * image) > 2.05
    assert metrics.vif_sum(image, image, image / 2) < 1.9


def test_a_negative_copy_carries_no_visual_information() -> None:
    image = textured(5)
    assert metrics.vif_sum(image, image, 255 - image) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", PAPER_METRICS)
def test_more_noise_or_blur_is_worse(name: str) -> None:
    image = textured(6)
    noise = np.random.default_rng(7).normal(size=image.shape)
    noisy = [np.clip(image + amount * noise, 0, 255) for amount in (0, 5, 15, 40)]
    blurred = [ndimage.gaussian_filter(image, sigma) for sigma in (0.3, 1, 2, 4)]
    sign = 1 if DIRECTIONS[name] == "up" else -1
    for series in (noisy, blurred):
        scores = [sign * fusion_metrics(image, image, fused, (name,))[name] for fused in series]
        assert scores == sorted(scores, reverse=True)
        assert len(set(scores)) == len(scores)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(41, 52), st.integers(41, 52))
def test_swapping_the_sources_changes_nothing(seed: int, height: int, width: int) -> None:
    names = [name for name in ALL_METRICS if name != "viff"]  # its ties go to the moving image
    fixed, moving, fused = np.round(np.random.default_rng(seed).uniform(0, 255, (3, height, width)))
    once, twice = fusion_metrics(fixed, moving, fused, names), fusion_metrics(moving, fixed, fused, names)
    assert once == pytest.approx(twice, rel=1e-9, abs=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["transpose", "mirror"]))
def test_turning_all_three_images_alike_changes_nothing(seed: int, turn: str) -> None:
    # Not qabf: it tells horizontal from vertical. Not viff and vif_sum: they look at every second pixel.
    names = [name for name in ALL_METRICS if name not in ("qabf", "viff", "vif_sum")]
    images = np.round(np.random.default_rng(seed).uniform(0, 255, (3, 48, 48)))
    turned = images.transpose(0, 2, 1) if turn == "transpose" else images[:, :, ::-1]
    assert fusion_metrics(*images, names) == pytest.approx(fusion_metrics(*turned, names), rel=1e-9)


# --- Fusion metrics: interface ----------------------------------------------------------------


def test_one_by_one_is_the_same_as_together() -> None:
    fixed, moving, fused = random_triple()
    together = fusion_metrics(fixed, moving, fused, ALL_METRICS)
    assert tuple(together) == ALL_METRICS
    for name, value in together.items():
        assert getattr(metrics, name)(fixed=fixed, moving=moving, fused=fused) == value


def test_every_metric_has_a_docstring_and_a_direction() -> None:
    assert set(DIRECTIONS) == set(ALL_METRICS) >= set(PAPER_METRICS)
    assert {name for name, direction in DIRECTIONS.items() if direction == "down"} == {"qcv"}
    for name in ALL_METRICS:
        assert getattr(metrics, name).__name__ == name
        assert getattr(metrics, name).__doc__


def test_fields_are_computed_in_double_precision() -> None:
    known, recovered = (x.astype(np.float32) for x in (affine_field(rotation(7)), affine_field(rotation(-5))))
    wide = known.astype(np.float64), recovered.astype(np.float64)
    np.testing.assert_array_equal(endpoint_error(known, recovered), endpoint_error(*wide))
    assert folds(known) == folds(wide[0])
    assert draw_consistency([known, recovered]) == draw_consistency(wide)
    points = np.array([[20.25, 30.5]], dtype=np.float32)
    np.testing.assert_array_equal(
        target_registration_error(points, points, recovered),
        target_registration_error(points.astype(np.float64), points.astype(np.float64), wide[1]),
    )


def test_bytes_are_computed_in_float() -> None:
    images = random_triple()
    as_bytes = [image.astype(np.uint8) for image in images]
    assert fusion_metrics(*as_bytes, ALL_METRICS) == fusion_metrics(*images, ALL_METRICS)


def test_the_images_are_left_alone() -> None:
    images = random_triple()
    copies = [image.copy() for image in images]
    fusion_metrics(*images, ALL_METRICS)
    for image, copy in zip(images, copies, strict=True):
        np.testing.assert_array_equal(image, copy)


@pytest.mark.parametrize("name", ALL_METRICS)
def test_the_smallest_size_works_and_one_less_is_refused(name: str) -> None:
    smallest = {"qcv": 16, "vif_sum": 41, "viff": 41, "sf": 2, "ag": 2}.get(
        name, 11 if name in ("qssim", "qs", "qw", "qe") else 1
    )
    image = textured(8)
    exact = image[:smallest, : smallest + 3]
    assert np.isfinite(fusion_metrics(exact, exact + 0, np.clip(exact + 1, 0, 255), (name,))[name])
    if smallest > 1:
        small = image[: smallest - 1, : smallest + 3]
        with pytest.raises(ValueError, match=f"{name} needs images of at least {smallest} pixels"):
            fusion_metrics(small, small, small, (name,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: image[:, :-1], "bring all three onto the fixed grid"),
        (lambda image: np.stack([image] * 3, axis=-1), "take the luma"),
        (lambda image: np.where(image > 200, np.nan, image), "NaN"),
        (lambda image: image * 2, "rescale"),
        (lambda image: image - 300, "rescale"),
    ],
)
def test_unfit_images_are_refused(change: Callable[[Array], Array], message: str) -> None:
    image = textured(9)
    with pytest.raises(ValueError, match=message):
        fusion_metrics(image, image, change(image))


def test_unit_range_and_unknown_names_are_refused() -> None:
    image = textured(9)
    with pytest.raises(ValueError, match="multiply them by 255"):
        fusion_metrics(image / 255, image / 255, image / 255)
    with pytest.raises(ValueError, match="no metric is called vif; choose from qabf"):
        fusion_metrics(image, image, image, ("qabf", "vif"))


# --- Registration metrics ---------------------------------------------------------------------


def constant_field(*vector: float, shape: tuple[int, ...] = (20, 30)) -> Array:
    return np.stack([np.full(shape, component) for component in vector])


def affine_field(matrix: Array, shape: tuple[int, ...] = (41, 51)) -> Array:
    """``u(x) = c + A (x - c) - x`` about the centre ``c``."""
    centre = (np.array(shape) - 1) / 2
    offset = np.indices(shape) - centre.reshape(-1, *[1] * len(shape))
    return np.asarray(np.tensordot(matrix - np.eye(len(shape)), offset, axes=1))


def rotation(degrees: float) -> Array:
    angle = math.radians(degrees)
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


INNER = np.zeros((41, 51), dtype=bool)
INNER[12:29, 14:37] = True


def test_the_opposite_shift_recovers_a_shift() -> None:
    known = constant_field(3.0, -2.0)
    np.testing.assert_array_equal(endpoint_residual(known, -known), 0)
    np.testing.assert_allclose(endpoint_error(known, 0 * known), math.sqrt(13))
    np.testing.assert_allclose(endpoint_error(known, 0 * known, spacing=(2.0, 0.5)), math.sqrt(37))


def test_the_inverse_rotation_recovers_a_rotation() -> None:
    known, recovered = affine_field(rotation(10)), affine_field(rotation(-10))
    assert summarise(endpoint_error(known, recovered), INNER).max < 1e-9
    assert summarise(endpoint_error(known, affine_field(rotation(10))), INNER).mean > 2


def test_the_residual_says_where_the_aligned_image_samples_the_original() -> None:
    p_matrix, u_matrix = np.array([[1.1, 0.2], [0.0, 0.95]]), np.array([[0.9, 0.0], [-0.1, 1.1]])
    known, recovered = affine_field(p_matrix), affine_field(u_matrix)
    residual = endpoint_residual(known, recovered)
    expected = affine_field(p_matrix @ u_matrix)
    swapped = affine_field(u_matrix @ p_matrix)
    np.testing.assert_allclose(residual[:, INNER], expected[:, INNER], atol=1e-9)
    assert np.abs(residual - swapped)[:, INNER].max() > 0.1

    y, x = np.indices((41, 51)).astype(float)
    original = 3 * y - 2 * x  # linear, so that sampling it is exact
    moving = ndimage.map_coordinates(original, np.indices(original.shape) + known, order=1, mode="nearest")
    aligned = ndimage.map_coordinates(moving, np.indices(original.shape) + recovered, order=1, mode="nearest")
    drift = aligned - original
    np.testing.assert_allclose(drift[INNER], (3 * residual[0] - 2 * residual[1])[INNER], atol=1e-9)


def test_the_residual_agrees_with_the_package_s_own_composition() -> None:
    rng = np.random.default_rng(10)
    known, recovered = (
        np.stack([ndimage.gaussian_filter(rng.normal(size=(24, 33)), 3) * 30 for _ in range(2)]) for _ in range(2)
    )
    composed = compose(torch.from_numpy(known)[None], torch.from_numpy(recovered)[None])[0].numpy()
    np.testing.assert_allclose(endpoint_residual(known, recovered), composed, atol=1e-9)


def test_the_residual_works_in_three_dimensions() -> None:
    known = constant_field(1.0, 2.0, -2.0, shape=(4, 5, 6))
    np.testing.assert_allclose(endpoint_error(known, 0 * known), 3)
    np.testing.assert_allclose(endpoint_error(known, -known), 0)


def test_summary_by_hand() -> None:
    error = np.arange(101.0).reshape(1, 101)
    assert summarise(error) == ErrorSummary(mean=50, median=50, p95=95, max=100)
    mask = error < 11
    assert summarise(np.where(mask, error, np.nan), mask) == ErrorSummary(mean=5, median=5, p95=9.5, max=10)


def test_summary_refuses_what_it_cannot_summarise() -> None:
    error = np.ones((3, 4))
    with pytest.raises(ValueError, match="selects no voxel"):
        summarise(error, error < 0)
    with pytest.raises(ValueError, match="the mask has shape"):
        summarise(error, np.ones((4, 3), dtype=bool))
    with pytest.raises(ValueError, match="NaN"):
        summarise(error * np.nan)


def test_landmarks_under_a_rotation() -> None:
    field = affine_field(rotation(90), shape=(41, 41))
    fixed = [[20.0, 30.0], [10.0, 20.0], [12.5, 17.25]]
    moving = [[10.0, 20.0], [20.0, 10.0], [22.75, 12.5]]  # (y, x) about (20, 20) by a quarter turn
    np.testing.assert_allclose(target_registration_error(fixed, moving, field), 0, atol=1e-9)
    off = np.add(moving, [3.0, 4.0])
    np.testing.assert_allclose(target_registration_error(fixed, off, field), 5)
    np.testing.assert_allclose(target_registration_error(fixed, off, field, spacing=(1.0, 0.5)), math.sqrt(9 + 4))


def test_landmarks_must_lie_on_the_fixed_grid() -> None:
    field = constant_field(0.0, 0.0)
    with pytest.raises(ValueError, match=r"landmark 1 at \[25.0, 5.0\] is not on the fixed grid \(20, 30\)"):
        target_registration_error([[5, 25], [25, 5]], [[5, 25], [25, 5]], field)
    with pytest.raises(ValueError, match="expected N 2 twice"):
        target_registration_error([[5, 25, 1]], [[5, 25, 1]], field)


@pytest.mark.parametrize(
    "matrix", [np.eye(2), rotation(30), np.diag([0.5, 0.5]), np.diag([-1.0, 1.0]), np.diag([0.0, 1.0])]
)
def test_folds_of_a_linear_map(matrix: Array) -> None:
    found = folds(affine_field(matrix))
    determinant = float(np.linalg.det(matrix))
    assert found.minimum == pytest.approx(determinant, abs=1e-12)
    assert found.share == (1.0 if determinant <= 0 else 0.0)


def test_an_axis_of_one_voxel_has_no_folds_to_count() -> None:
    with pytest.raises(ValueError, match="expected two voxels along each axis"):
        folds(np.zeros((2, 1, 9)))
    assert folds(np.zeros((2, 2, 9))).minimum == 1


def test_folds_of_a_scaled_volume() -> None:
    found = folds(affine_field(2 * np.eye(3), shape=(4, 5, 6)))
    assert (found.share, found.minimum) == (0.0, pytest.approx(8))


def test_a_fold_is_counted_where_it_is() -> None:
    field = constant_field(0.0, 0.0)
    field[0, 10:] = -6.0  # central differences see a step of -6 over two voxels in rows 9 and 10
    found = folds(field)
    assert found.share == pytest.approx(2 / 20)
    assert found.minimum == pytest.approx(-2)
    upper = np.zeros((20, 30), dtype=bool)
    upper[:9] = True
    assert folds(field, upper).share == 0


def test_there_and_back() -> None:
    forward, backward = affine_field(rotation(8)), affine_field(rotation(-8))
    assert inverse_consistency(forward, backward, INNER).max < 1e-9
    shift = constant_field(1.0, 0.0)
    assert inverse_consistency(shift, shift).mean == pytest.approx(2)
    assert inverse_consistency(shift, shift, spacing=(3.0, 1.0)).mean == pytest.approx(6)


@settings(max_examples=20, deadline=None)
@given(st.floats(-10, 10), st.floats(-10, 10), st.integers(0, 2**32 - 1))
def test_a_misalignment_of_the_pair_itself_cancels(y: float, x: float, seed: int) -> None:
    draws = list(np.random.default_rng(seed).normal(size=(3, 2, 6, 7)))
    own = np.array([y, x]).reshape(2, 1, 1)
    assert draw_consistency([own + draw for draw in draws]) == pytest.approx(draw_consistency(draws))
    assert draw_consistency([own + draws[0]] * 4) == pytest.approx(0, abs=1e-9)


def test_draw_consistency_by_hand() -> None:
    up, down = constant_field(3.0, 4.0), constant_field(-3.0, -4.0)
    assert draw_consistency([up, down]) == pytest.approx(5)
    assert draw_consistency([up, down, 0 * up]) == pytest.approx(10 / 3)
    assert draw_consistency([up, down], spacing=(1.0, 3.0)) == pytest.approx(math.sqrt(9 + 144))
    left = np.zeros((20, 30), dtype=bool)
    left[:, :10] = True
    mixed = np.where(left, up, 0)
    assert draw_consistency([mixed, -mixed]) == pytest.approx(5 / 3)
    assert draw_consistency([mixed, -mixed], left) == pytest.approx(5)
    with pytest.raises(ValueError, match="at least two"):
        draw_consistency([up])
    with pytest.raises(ValueError, match="expected one grid"):
        draw_consistency([up, up[:, :-1]])


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (np.zeros((1, 2, 8, 8)), "take one field out of a batch"),
        (np.zeros((3, 8, 8)), "one component per spatial axis"),
        (np.full((2, 8, 8), np.nan), "NaN"),
    ],
)
def test_what_is_not_a_field_is_refused(field: Array, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        endpoint_error(field, field)
    with pytest.raises(ValueError, match=message):
        folds(field)


def test_the_field_that_cannot_be_used_is_named() -> None:
    good, bad = constant_field(0.0, 0.0), constant_field(0.0, math.nan)
    for names, measure in ((("known", "recovered"), endpoint_error), (("forward", "backward"), inverse_consistency)):
        for name, pair in zip(names, ((bad, good), (good, bad)), strict=True):
            with pytest.raises(ValueError, match=f"^{name} holds NaN"):
                measure(*pair)


def test_fields_of_two_grids_and_bad_spacing_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one grid"):
        endpoint_error(np.zeros((2, 8, 8)), np.zeros((2, 8, 9)))
    for spacing in [(1.0,), (1.0, 0.0), (1.0, math.nan), (math.inf, 1.0)]:
        with pytest.raises(ValueError, match="expected 2 positive numbers in mm"):
            endpoint_error(np.zeros((2, 8, 8)), np.zeros((2, 8, 8)), spacing=spacing)


def test_head_mask_keeps_the_head_and_fills_it() -> None:
    y, x = np.indices((64, 72))
    radius = np.hypot(y - 32, x - 36)
    head = np.where(radius < 20, 100.0, 0.0)
    head[radius < 6] = 0  # a dark hole inside
    head[:4, :4] = 255  # a label in the corner
    mask = head_mask(head)
    assert mask.dtype == bool
    assert mask[radius < 20].all()
    assert not mask[radius > 23].any()


def test_head_mask_starts_at_8_percent_of_the_range() -> None:
    ramp = np.tile(np.arange(-50.0, 151.0), (9, 1))  # smoothing leaves a ramp as it is, away from its ends
    mask = head_mask(ramp)
    low, high = ndimage.gaussian_filter(ramp, 1)[0, [0, -1]]
    np.testing.assert_array_equal(mask, ramp > low + 0.08 * (high - low))
    assert mask[0].argmax() == 17


def test_head_mask_joins_both_images() -> None:
    y, x = np.indices((64, 72))
    radius = np.hypot(y - 32, x - 36)
    brain, skull = np.where(radius < 15, 80.0, 0.0), np.where(abs(radius - 24) < 2, 1.0, 0.0)
    both, alone = head_mask(brain, skull), head_mask(brain)
    assert both[radius < 26].all()
    assert not alone[radius > 18].any()


def test_head_mask_ignores_scale_and_offset_and_knows_nothing_of_a_flat_image() -> None:
    image = np.asarray(ndimage.gaussian_filter(textured(11), 2))
    np.testing.assert_array_equal(head_mask(image), head_mask(image * 4 - 128))
    assert not head_mask(np.full((32, 32), 0.1)).any()
    with pytest.raises(ValueError, match="bring the moving image onto the fixed grid"):
        head_mask(image, image[:-1])
    with pytest.raises(ValueError, match="expected one grid"):
        head_mask(1.0)
    for unfit in (np.zeros((0, 4)), np.where(image > image.mean(), image, np.inf)):
        with pytest.raises(ValueError, match="is empty or holds NaN or infinite values"):
            head_mask(unfit)
