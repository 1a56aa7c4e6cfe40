"""Loss terms against values known by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from bsafusion import losses
from bsafusion.deformation import affine_field, identity_grid, warp
from bsafusion.losses import LossWeights, middle_residual, total_loss
from bsafusion.models.alignment import STEP_STRIDES, Alignment, Step
from bsafusion.models.representation import Representation

SHAPE = (65, 81)


def texture(seed: int = 0, shape: tuple[int, int] = SHAPE, count: int = 1) -> Tensor:
    rng = np.random.default_rng(seed)
    image = ndimage.gaussian_filter(rng.normal(size=(count, 1, *shape)), (0, 0, 2, 2))
    return torch.from_numpy((image - image.min()) / np.ptp(image))


def constant(y: float, x: float, shape: tuple[int, int] = SHAPE) -> Tensor:
    return torch.tensor([y, x], dtype=torch.float64).view(1, 2, 1, 1).expand(1, 2, *shape)


def inner(t: Tensor, margin: int) -> Tensor:
    return t[..., margin:-margin, margin:-margin]


def turn(degrees: float, shape: tuple[int, int]) -> Tensor:
    """The field of a rotation about the centre."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return affine_field(torch.tensor([[[c, -s, 0.0], [s, c, 0.0]]], dtype=torch.float64), shape=shape)


def step_at(
    name: str,
    *,
    fixed: tuple[float, float] = (0, 0),
    moving: tuple[float, float] = (0, 0),
    logits: Tensor | None = None,
) -> Step:
    """A step with constant fields in pixels, as they are after and before it."""
    stride = STEP_STRIDES[name]
    shape = ((SHAPE[0] - 1) // stride + 1, (SHAPE[1] - 1) // stride + 1)
    pair = tuple(constant(y / stride, x / stride, shape) for y, x in (fixed, moving))
    return Step(name, *pair, torch.zeros(1, 2, *shape, dtype=torch.float64), logits, pair)


def alignment_of(*steps: Step, displacement: Tensor | None = None, error: Tensor | None = None) -> Alignment:
    zero = constant(0, 0)
    return Alignment(
        displacement=zero if displacement is None else displacement, inverse=zero, steps=steps, expected_error=error
    )


ONES = torch.ones(1, 1, *SHAPE, dtype=torch.float64)


# --- images ---------------------------------------------------------------------------------------


def test_the_consistency_loss_by_hand() -> None:
    low, high = (torch.full((1, 1, *SHAPE), v, dtype=torch.float64) for v in (0.25, 0.75))
    c1 = 0.01**2
    ssim = (2 * 0.25 * 0.75 + c1) / (0.25**2 + 0.75**2 + c1)  # of two flat images
    assert float(losses.consistency_loss(low, high)) == pytest.approx(1 - ssim + 0.5)
    assert float(losses.consistency_loss(low, low)) == pytest.approx(0, abs=1e-9)


# --- modality -------------------------------------------------------------------------------------


def representation(logits: list[list[float]], judged: list[list[float]]) -> Representation:
    def sides(values: list[list[float]]) -> tuple[Tensor, Tensor]:
        fixed, moving = torch.tensor(values, dtype=torch.float64).chunk(2)
        return fixed, moving

    empty = torch.zeros(1, 1, 1, 1)
    return Representation((empty, empty), (empty, empty), sides(logits), sides(judged))


def test_the_classifier_is_scored_by_cross_entropy() -> None:
    fixed, moving = torch.tensor([0]), torch.tensor([1])
    ce1, ce2 = losses.modality_losses(representation([[0.0] * 4] * 2, [[0.0] * 4] * 2), fixed, moving)
    assert float(ce1) == pytest.approx(math.log(4))
    assert float(ce2) == pytest.approx(math.log(4))
    sure = representation([[20.0, 0, 0, 0], [0, 20.0, 0, 0]], [[0.0] * 4] * 2)
    assert float(losses.modality_losses(sure, fixed, moving)[0]) == pytest.approx(0, abs=1e-6)
    swapped = representation([[0, 20.0, 0, 0], [20.0, 0, 0, 0]], [[0.0] * 4] * 2)
    assert float(losses.modality_losses(swapped, fixed, moving)[0]) == pytest.approx(20, abs=1e-6)


def test_the_judge_should_see_even_odds_of_the_two_modalities() -> None:
    fixed, moving = torch.tensor([0]), torch.tensor([2])
    even = representation([[0.0] * 4] * 2, [[20.0, 0, 20, 0]] * 2)
    assert float(losses.modality_losses(even, fixed, moving)[1]) == pytest.approx(math.log(2), abs=1e-6)
    for judged in ([[20.0, 0, 0, 0]] * 2, [[20.0, 20, 0, 0]] * 2, [[20.0, 0, 0, 0], [0, 0, 20.0, 0]]):
        assert float(losses.modality_losses(representation([[0.0] * 4] * 2, judged), fixed, moving)[1]) > 5


def test_a_remapped_contrast_has_no_modality() -> None:
    fixed, moving = torch.tensor([0, 0]), torch.tensor([-1, 1])
    logits = [[20.0, 0, 0, 0], [20.0, 0, 0, 0], [0, 0, 0, 99.0], [0, 20.0, 0, 0]]
    judged = [[0, 0, 0, 99.0], [20.0, 20, 0, 0], [0, 0, 0, 99.0], [20.0, 20, 0, 0]]
    ce1, ce2 = losses.modality_losses(representation(logits, judged), fixed, moving)
    assert float(ce1) == pytest.approx(0, abs=1e-6)
    assert float(ce2) == pytest.approx(math.log(2), abs=1e-6)
    swapped = representation(logits[2:] + logits[:2], judged[2:] + judged[:2])  # either image may be the remapped one
    torch.testing.assert_close(losses.modality_losses(swapped, moving, fixed), (ce1, ce2))
    nobody = torch.tensor([-1, -1])
    assert [float(term) for term in losses.modality_losses(representation(logits, judged), nobody, nobody)] == [0, 0]


# --- fields ---------------------------------------------------------------------------------------


def test_smooth_loss_weights_steps_from_coarse_to_fine() -> None:
    steps = [step_at(name) for name in ("1/16", "1/8", "1/4", "1/2", "1/1")]
    rough = [s._replace(velocity=identity_grid(tuple(s.velocity.shape[-2:]), ONES)[None]) for s in steps]
    for index, weight in enumerate((1e-4, 1e-3, 1e-2, 0.1, 1.0)):
        mixed = [*steps[:index], rough[index], *steps[index + 1 :]]
        # The identity grid as a velocity: each axis has one component of slope 1.
        assert float(losses.smooth_loss(alignment_of(*mixed))) == pytest.approx(weight)


@pytest.mark.parametrize("name", STEP_STRIDES)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_residual_of_a_known_shift(name: str, share: float) -> None:
    known = constant(6, -10)
    # The moving image shows at y what the fixed one shows at y + p: the field back is -p, split between the sides.
    right = step_at(name, fixed=(6 * share, -10 * share), moving=(-6 * (1 - share), 10 * (1 - share)))
    residual, points = middle_residual(right.field_fixed, right.field_moving, known, STEP_STRIDES[name])
    assert residual.abs().max() < 1e-9
    assert points[0, :, 0, 0].tolist() == pytest.approx([6 * share, -10 * share])
    zero = step_at(name)
    residual, points = middle_residual(zero.field_fixed, zero.field_moving, known, STEP_STRIDES[name])
    torch.testing.assert_close(residual, known[..., : residual.shape[-2], : residual.shape[-1]])
    assert points[0, :, -1, -1].tolist() == [64, 80]


@pytest.mark.parametrize("stride", [1, 2, 8])
def test_the_residual_of_a_known_rotation(stride: int) -> None:
    coarse = tuple((n - 1) // stride + 1 for n in SHAPE)
    known = turn(10, SHAPE)
    one_sided = middle_residual(torch.zeros(1, 2, *coarse, dtype=torch.float64), turn(-10, coarse), known, stride)[0]
    two_sided = middle_residual(turn(5, coarse), turn(-5, coarse), known, stride)[0]
    wrong = middle_residual(torch.zeros(1, 2, *coarse, dtype=torch.float64), turn(10, coarse), known, stride)[0]
    margin = max(16 // stride, 1)
    assert inner(one_sided, margin).abs().max() < 1e-9
    assert inner(two_sided, margin).abs().max() < 1e-9
    assert inner(wrong, margin).abs().max() > 3


def test_the_right_field_brings_the_moving_image_back() -> None:
    """The convention of the losses is the convention of warp."""
    truth = texture(3)
    known = turn(10, SHAPE)
    aligned = warp(warp(truth, known), turn(-10, SHAPE))
    assert inner((aligned - truth).abs(), 16).mean() < 0.01


def test_field_loss_is_the_distance_in_pixels() -> None:
    known = constant(3, 4)
    zero = [step_at(name) for name in ("1/16", "1/4", "1/2")]
    loss, error = losses.field_loss(alignment_of(*zero), known, ONES, decay=0.7)
    distance = math.sqrt(25 + 1e-3)
    assert float(loss) == pytest.approx(distance * (1 + 0.7 + 0.7**2))
    assert float(error) == pytest.approx(distance)
    # The last step counts most and alone is the figure shown.
    last_right = [*zero[:2], step_at("1/2", moving=(-3, -4))]
    loss, error = losses.field_loss(alignment_of(*last_right), known, ONES, decay=0.7)
    assert float(loss) == pytest.approx(distance * (0.7 + 0.49) + math.sqrt(1e-3))
    assert float(error) == pytest.approx(math.sqrt(1e-3))


def test_field_loss_counts_where_the_mask_is() -> None:
    known = constant(0, 0).clone()
    known[..., 40:] = 10
    left, right = ONES.clone(), ONES.clone()
    left[..., 38:] = 0
    right[..., :42] = 0
    alignment = alignment_of(step_at("1/1"))
    assert float(losses.field_loss(alignment, known, left, decay=0.7)[0]) < 0.1
    assert float(losses.field_loss(alignment, known, right, decay=0.7)[0]) == pytest.approx(10 * math.sqrt(2), abs=0.1)


@pytest.mark.parametrize("shift", [(32, -16), (0, 0), (-16, 48)])
def test_the_affine_step_should_match_the_known_partner(shift: tuple[int, int]) -> None:
    height, width = 5, 6
    grid = identity_grid((height, width), ONES).flatten(1).T
    # A fixed token at x is found in the moving image at x - p.
    difference = grid[None] - (grid - torch.tensor(shift, dtype=torch.float64) / 16)[:, None]

    def loss(peak: Tensor) -> float:
        step = step_at("affine", logits=30.0 * peak.double()[None])
        return float(losses.match_loss(alignment_of(step), constant(*shift), ONES))

    right = (difference == 0).all(2)
    assert right.sum() == (height - abs(shift[0]) // 16) * (width - abs(shift[1]) // 16)
    assert loss(right) < 1e-6
    uniform = math.log(30)
    assert loss(right.roll(1, 0)) > 1.5 * uniform
    if shift != (0, 0):
        assert loss(right.T) > uniform - 1e-6  # the sign matters
    assert loss(torch.zeros(30, 30)) == pytest.approx(uniform)


def test_affine_matches_count_where_the_fixed_image_has_its_head() -> None:
    height, width = 5, 6
    mask = torch.zeros(1, 1, *SHAPE, dtype=torch.float64)
    mask[..., 32, 48] = 1  # the fixed token (2, 3) alone
    logits = torch.zeros(1, 30, 30, dtype=torch.float64)
    logits[:, :, 0] = 40  # every match is wrong
    logits[:, 0, :] = 40
    fixed, moving = 2 * width + 3, 1 * width + 5
    logits[:, fixed, moving] = 80  # but that of (2, 3) with (1, 5), which is 16 pixels up and 32 to the right
    alignment = alignment_of(step_at("affine", logits=logits))
    assert float(losses.match_loss(alignment, constant(16, -32), mask)) < 1e-6
    assert float(losses.match_loss(alignment, constant(16, -32), ONES)) > 10
    assert height * width == logits.shape[1]


def test_affine_matches_against_a_loop_over_tokens() -> None:
    """A known map that is no shift, so that places count; its inverse is known as well."""
    rows, columns, side = 9, 10, 16
    shape = (side * (rows - 1) + 1, side * (columns - 1) + 1)
    c, s = 0.95 * math.cos(0.15), 0.95 * math.sin(0.15)
    linear, shift = np.array([[c, -s], [s, c]]), np.array([5.0, -8.0])
    middle = (np.array(shape) - 1) / 2
    matrix = torch.from_numpy(np.column_stack([linear, shift]))[None]
    y, x = np.indices(shape)
    mask = np.clip(1 - np.hypot(y - middle[0], x - middle[1] - 7) / 50, 0, None)  # nothing of it lies near the border
    logits = np.random.default_rng(0).normal(size=(rows * columns, rows * columns))
    places = side * np.stack(np.unravel_index(np.arange(rows * columns), (rows, columns)), axis=1)

    def loss(maps_to: Callable[[NDArray], NDArray], scores: NDArray, weight: Callable[[NDArray], float]) -> float:
        total = weights = 0.0
        for index, place in enumerate(places):
            distance = np.abs(maps_to(place) - places) / side
            label = np.clip(1 - distance, 0, None).prod(axis=1)
            if label.sum() > 0.5:
                log_probability = scores[index] - np.log(np.exp(scores[index]).sum())
                total -= weight(place) * (label * log_probability).sum()
                weights += weight(place)
        return total / weights

    def there(place: NDArray) -> NDArray:  # from the moving image to the fixed one
        return middle + linear @ (place - middle) + shift

    def back(place: NDArray) -> NDArray:
        return middle + np.linalg.solve(linear, place - middle - shift)

    def at(place: NDArray) -> float:
        return float(ndimage.map_coordinates(mask, place[:, None], order=1, mode="nearest")[0])

    expected = (loss(back, logits, at) + loss(there, logits.T, lambda place: at(there(place)))) / 2
    step = Step("affine", *[torch.zeros(1, 2, rows, columns)] * 3, torch.from_numpy(logits)[None], (ONES, ONES))
    found = losses.match_loss(alignment_of(step), affine_field(matrix, shape=shape), torch.from_numpy(mask)[None, None])
    assert float(found) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["1/16", "1/4", "1/2"])
def test_a_window_should_match_the_known_partner(name: str) -> None:
    radius, span, stride = 3, 7, STEP_STRIDES[name]
    shape = tuple((n - 1) // stride + 1 for n in SHAPE)
    known = constant(2 * stride, -stride)

    def loss(dy: int, dx: int, **fields: tuple[float, float]) -> float:
        logits = torch.zeros(1, span * span, *shape, dtype=torch.float64)
        logits[:, (dy + radius) * span + dx + radius] = 30
        return float(losses.match_loss(alignment_of(step_at(name, logits=logits, **fields)), known, ONES))

    assert loss(-2, 1) < 1e-6
    for wrong in ((2, -1), (1, -2), (-2, -1), (0, 0)):
        assert loss(*wrong) == pytest.approx(30, abs=1e-6)
    # Once the fields have taken up the shift, the partner is at the same place.
    assert loss(0, 0, fixed=(stride, 0), moving=(-stride, stride)) < 1e-6
    # A partner beyond the window teaches nothing.
    assert loss(0, 0, moving=(8 * stride, 0)) == 0
    known = known.clone()
    known[..., 40:] = -8 * stride  # nor does it count as known: of the rest no place is told from another
    logits = torch.zeros(1, span * span, *shape, dtype=torch.float64)
    even = losses.match_loss(alignment_of(step_at(name, logits=logits)), known, ONES)
    assert float(even) == pytest.approx(math.log(span**2))


def test_half_a_voxel_is_matched_half_and_half() -> None:
    known = constant(0, 2)  # half a voxel of the grid of stride 4
    logits = torch.full((1, 9, 17, 21), -40.0, dtype=torch.float64)
    logits[:, 3:5] = 0  # (0, -1) and (0, 0)
    loss = losses.match_loss(alignment_of(step_at("1/4", logits=logits)), known, ONES)
    assert float(loss) == pytest.approx(math.log(2))


def test_the_expected_error_should_be_the_true_one() -> None:
    known, true = constant(3, 4), 5.0

    def loss(expected: float) -> float:
        return float(losses.error_loss(alignment_of(step_at("1/1"), error=expected * ONES), known, ONES))

    best = loss(true)
    assert best == pytest.approx(1 + math.log(5))
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert loss(true * factor) > best
    # What the field already corrects is no error.
    right = alignment_of(step_at("1/1"), displacement=-known, error=ONES)
    assert float(losses.error_loss(right, known, ONES)) == pytest.approx(0)


def test_the_expected_error_does_not_move_the_field() -> None:
    displacement = constant(1, 1).clone().requires_grad_()
    error = (2 * ONES).requires_grad_()
    losses.error_loss(
        alignment_of(step_at("1/1"), displacement=displacement, error=error), constant(3, 4), ONES
    ).backward()
    assert displacement.grad is None
    assert error.grad.abs().sum() > 0


def test_without_an_error_map_there_is_no_error_loss() -> None:
    assert float(losses.error_loss(alignment_of(step_at("1/1")), constant(3, 4), ONES)) == 0


# --- weights --------------------------------------------------------------------------------------


def test_the_total_is_the_weighted_sum() -> None:
    terms = {"ce1": torch.tensor(2.0), "intensity": torch.tensor(4.0), "match": torch.tensor(100.0)}
    assert float(total_loss(terms, LossWeights(ce1=1, intensity=0.5, match=0))) == pytest.approx(2 + 0.5 * 4)
    assert float(total_loss(terms, LossWeights(ce1=3, intensity=0.5, match=0.1))) == pytest.approx(6 + 2 + 10)


def test_a_weight_of_zero_switches_a_term_off() -> None:
    names = {f.name for f in fields(LossWeights)}
    everything = LossWeights(**dict.fromkeys(names, 1.0))
    assert losses.active(everything) == names
    for name in names:
        assert losses.active(replace(everything, **{name: 0.0})) == names - {name}


def test_the_published_loss_has_the_papers_terms() -> None:
    """L_ce1 + L_ce2 + L_consis + L_smooth + L_struct + L_grad + 0.5 L_inten; nothing knows the field."""
    published = LossWeights.published()
    assert losses.active(published) == {"ce1", "ce2", "consistency", "smooth", "structure", "gradient", "intensity"}
    assert published.intensity == 0.5 * published.structure == 0.5 * published.ce1
    # The Sobel magnitude of this package is an eighth of the plain kernel's.
    assert published.gradient == 8


def test_confusion_without_a_judge_is_refused_unless_it_does_not_count() -> None:
    tokens, logits, modality = torch.zeros(1, 4, 2, 2), torch.zeros(1, 4), torch.tensor([0])
    silent = Representation((tokens, tokens), (tokens, tokens), (logits, logits), None)
    with pytest.raises(ValueError, match="the judge was not asked"):
        losses.modality_losses(silent, modality, modality + 1)
    ce1, ce2 = losses.modality_losses(silent, modality, modality + 1, confuse=False)
    assert float(ce1) == pytest.approx(math.log(4))
    assert float(ce2) == 0


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_would_switch_a_term_off_by_mistake_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"weight field .*: expected 0"):
        LossWeights(field=value)
