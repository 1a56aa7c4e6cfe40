from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsafusion.deformation import compose, jacobian_determinant, warp
from bsafusion.models.alignment import Refined, Step
from bsafusion.models.bsafusion import BSAFusion, BSAFusionCfg, Mirrored
from bsafusion.refinement import Refinement, bspline, unlikeness

Randomise = Callable[[nn.Module], Any]
BOTH = (-0.5, 0.5)
SCALE = torch.tensor(10.0)
QUICK = Refinement(30, rate=0.1, smoothness=1.0, size=0.0)


def descriptors(count: int = 1, size: int = 40) -> Tensor:
    """Unit-length random maps, smooth enough to be interpolated."""
    noise = torch.randn(count, 8, size // 4, size // 4, generator=torch.Generator().manual_seed(3))
    return F.normalize(F.interpolate(noise, size=(size, size), mode="bicubic", align_corners=True), dim=1)


def step_at(fixed: Tensor, moving: Tensor) -> Step:
    return Step("1/4", fixed, moving, moving - fixed, None, (fixed, moving))


def still(like: Tensor) -> Step:
    zero = like.new_zeros(len(like), 2, *like.shape[-2:])
    return step_at(zero, zero)


def swell(size: int = 40, height: float = 1.2) -> Tensor:
    """A smooth bump that moves its surroundings along the diagonal, ``1 2 size size``, voxels."""
    axis = torch.linspace(-1, 1, size)
    bump = height * torch.exp(-4 * (axis[:, None].square() + axis.square()))
    return torch.stack([bump, -0.7 * bump])[None]


def inner(field: Tensor) -> Tensor:
    return field[..., 6:-6, 6:-6]


def between(refined: Refined) -> Tensor:
    """From the fixed to the moving image; to first order, for fields as small as these."""
    return refined.field_moving - refined.field_fixed


@pytest.mark.parametrize("share", [BOTH, (0.0, 1.0), (-1.0, 0.0)])
def test_a_small_known_displacement_is_found(share: tuple[float, float]) -> None:
    a = descriptors()
    b = warp(a, swell())  # b(x) = a(x + p): the partner of x in b lies near x - p
    refined = QUICK(still(a), (a, b), SCALE, share)
    known = -swell()
    error = inner(between(refined) - known).norm(dim=1).mean()
    assert error < 0.25 * inner(known).norm(dim=1).mean()
    assert refined.objective[1] < refined.objective[0]
    for moves, field in zip(share, (refined.field_fixed, refined.field_moving), strict=True):
        assert (field.abs().max() > 0.1) == (moves != 0)


def test_what_the_network_left_is_found_on_top_of_its_field() -> None:
    a = descriptors()
    b = warp(a, compose(swell(), 0.5 * torch.ones(1, 2, 40, 40)))
    zero = torch.zeros(1, 2, 40, 40)
    start = step_at(zero + 0.25, zero - 0.25)
    refined = QUICK(start, (a, b), SCALE, BOTH)
    known = -swell() - 0.5
    before = inner(between(Refined(start.field_fixed, start.field_moving, (zero, zero))) - known).norm(dim=1).mean()
    assert inner(between(refined) - known).norm(dim=1).mean() < 0.4 * before


def test_swapping_the_images_swaps_the_fields() -> None:
    a = descriptors()
    b = warp(a, swell())
    there, back = QUICK(still(a), (a, b), SCALE, BOTH), QUICK(still(a), (b, a), SCALE, BOTH)
    torch.testing.assert_close(there.field_fixed, back.field_moving, rtol=0, atol=1e-3)
    torch.testing.assert_close(there.field_moving, back.field_fixed, rtol=0, atol=1e-3)
    torch.testing.assert_close(there.objective, back.objective, rtol=0, atol=1e-4)


def test_equal_images_stay_where_they_are() -> None:
    a = descriptors()
    refined = QUICK(still(a), (a, a), SCALE, BOTH)
    assert refined.field_moving.abs().max() < 0.02


def test_a_pair_is_treated_alike_alone_and_in_a_batch() -> None:
    a = descriptors(2)
    b = torch.cat([warp(a[:1], swell()), warp(a[1:], swell(height=-0.6))])
    together, alone = QUICK(still(a), (a, b), SCALE, BOTH), QUICK(still(a[1:]), (a[1:], b[1:]), SCALE, BOTH)
    torch.testing.assert_close(together.field_moving[1:], alone.field_moving, rtol=0, atol=1e-4)
    torch.testing.assert_close(together.objective[1][1:], alone.objective[1], rtol=0, atol=1e-4)


def test_no_fold_is_added() -> None:
    """Random descriptors without any order, no smoothness and long steps: what tears a field apart."""
    generator = torch.Generator().manual_seed(0)
    a, b = (F.normalize(torch.randn(2, 8, 33, 33, generator=generator), dim=1) for _ in range(2))
    wild = Refinement(20, rate=2.0, spacing=2, smoothness=0.0, size=0.0)
    halved = wild(still(a), (a, b), SCALE, BOTH)
    for field in (halved.field_fixed, halved.field_moving):
        assert (jacobian_determinant(field) > 0).all()
        assert field.any()
    given_up = replace(wild, halvings=0)(still(a), (a, b), SCALE, BOTH)
    assert not given_up.field_moving.any()  # it folded, and nothing was left to try
    torch.testing.assert_close(given_up.objective[0], given_up.objective[1])


def test_the_objective_never_rises_without_folds() -> None:
    a = descriptors()
    b = warp(a, swell())
    for rate in (0.02, 5.0):
        refined = Refinement(3, rate=rate)(still(a), (a, b), SCALE, BOTH)
        assert refined.objective[1] <= refined.objective[0]


def test_the_objective_prefers_what_belongs_together() -> None:
    a = descriptors()
    same = unlikeness(a, a, SCALE, 2)
    assert same < unlikeness(a, a.roll(1, 3), SCALE, 2) < unlikeness(a, -a, SCALE, 2)
    # All descriptors alike: every one of the 25 places is as good, apart from those beyond the border.
    flat = torch.ones(1, 4, 30, 30) / 2
    inside = unlikeness(flat, flat, torch.tensor(0.0), 2)
    assert inside == pytest.approx(torch.tensor(25.0).log().item(), rel=1e-5)


@pytest.mark.parametrize(("count", "spacing"), [(65, 8), (129, 8), (33, 16), (40, 7), (5, 8)])
def test_splines_hold_constants_and_lines_and_their_mirror_image(count: int, spacing: int) -> None:
    values = bspline(count, spacing, like=torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(values.sum(1), torch.ones(count, dtype=torch.float64))
    knots = torch.arange(values.shape[1], dtype=torch.float64) - (values.shape[1] - 1) / 2
    line = torch.arange(count, dtype=torch.float64) - (count - 1) / 2
    torch.testing.assert_close(values @ (spacing * knots), line)
    torch.testing.assert_close(values.flip(0, 1), values)
    assert (values.amax(0) > 0).all()  # none that no voxel sees


@pytest.mark.parametrize("steps", [0, -1, 201])
def test_a_number_of_steps_out_of_range_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"{steps} steps of refinement; expected 1 to 200"):
        Refinement(steps)


# --- inside the network ---


def pair_of_images() -> tuple[Tensor, Tensor]:
    noise = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(5))
    image = F.interpolate(noise, size=(65, 65), mode="bicubic", align_corners=True).clamp(0, 1)
    return image, 1 - image.roll(2, 3)


@pytest.mark.parametrize("mirrored", ["never", "always"])
def test_everything_comes_from_the_refined_field(
    small_cfg: BSAFusionCfg, randomise: Randomise, mirrored: Mirrored
) -> None:
    model, (fixed, moving) = randomise(BSAFusion(small_cfg)), pair_of_images()
    refine = Refinement(10, rate=0.2, smoothness=0.0)
    plain = model.predict(fixed, moving, mirrored=mirrored)
    refined = model.predict(fixed, moving, mirrored=mirrored, refine=refine)
    assert plain.alignment.refined is None
    before, after = refined.alignment.refined
    assert before.shape == (1,)
    assert after < before
    a, b = plain.alignment, refined.alignment
    assert (a.displacement - b.displacement).abs().max() > 0.05
    torch.testing.assert_close(refined.aligned, warp(moving, b.displacement, padding="zeros"), rtol=0, atol=1e-4)
    round_trip, stale = (inner(compose(inverse, b.displacement)).abs().mean() for inverse in (b.inverse, a.inverse))
    assert round_trip < 0.6 * stale
    for was, now in ((a.inverse, b.inverse), (a.expected_error, b.expected_error), (plain.fused, refined.fused)):
        assert not torch.equal(was, now)
    assert torch.equal(a.similarity[0], b.similarity[0])
    assert not torch.equal(a.similarity[1], b.similarity[1])
    assert all(p.grad is None for p in model.parameters())
    again = model.predict(fixed, moving, mirrored=mirrored, refine=refine)
    assert torch.equal(again.fused, refined.fused)


def test_the_network_refined_gives_the_inverse_for_the_swapped_images(
    small_cfg: BSAFusionCfg, randomise: Randomise
) -> None:
    model, (fixed, moving) = randomise(BSAFusion(small_cfg)), pair_of_images()
    refine = Refinement(5, rate=0.2, smoothness=0.0)
    there, back = (model.predict(*pair, refine=refine).alignment for pair in ((fixed, moving), (moving, fixed)))
    torch.testing.assert_close(there.displacement, back.inverse, rtol=0, atol=0.02)


def test_images_taken_as_aligned_are_not_refined(small_cfg: BSAFusionCfg, randomise: Randomise) -> None:
    model = randomise(BSAFusion(small_cfg))
    alignment = model.predict(*pair_of_images(), aligned_already=True, refine=Refinement(5)).alignment
    assert alignment.refined is None
    assert not alignment.displacement.any()
