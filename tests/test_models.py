"""The four stages: sizes, costs, symmetry, and what each option changes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bsafusion import weights
from bsafusion.deformation import affine_field, compose, identity_grid, integrate, warp
from bsafusion.models.alignment import (
    AffineStep,
    Alignment,
    AlignmentCfg,
    CrossAttention,
    Direction,
    local_correlation,
    mirror_field,
    reverse_correlation,
)
from bsafusion.models.bsafusion import BSAFusion, BSAFusionCfg, Mirrored, default, in_colour, paper, working_shape
from bsafusion.models.encoder import EncoderCfg
from bsafusion.models.fusion import FusionCfg
from bsafusion.models.layers import (
    ChannelNorm,
    CrossBlock,
    RestormerBlock,
    TransformerBlock,
    TransposedAttention,
    attend,
    gelu,
    join,
    wave_positions,
)
from bsafusion.models.representation import ModalityRepresentation, RepresentationCfg
from bsafusion.refinement import Refinement
from pairs import known_network

Randomise = Callable[[nn.Module], Any]
STEPS = ("affine", "1/16", "1/8", "1/4", "1/2")


def images(shape: tuple[int, int] = (65, 81), count: int = 1) -> tuple[Tensor, Tensor]:
    """Two different images with structure at several scales."""
    pair = torch.Generator().manual_seed(7)
    layers = [
        F.interpolate(torch.rand(2, count, 1, n, n, generator=pair).flatten(0, 1), size=shape, mode="bilinear")
        for n in (4, 9, 20)
    ]
    fixed, moving = (sum(layers) / 3).chunk(2)
    return fixed, moving


def small_paper() -> BSAFusionCfg:
    return BSAFusionCfg(
        preset="paper",
        encoder=EncoderCfg(kind="restormer", shallow=4, widths=(16,), colour=False),
        representation=RepresentationCfg(
            dim=16, heads=2, mlp_dim=16, transfer_per_modality=True, cross_blocks=0, position_grid=5
        ),
        alignment=AlignmentCfg(
            kind="attention",
            steps=("1/16", "1/8", "1/4", "1/2", "1/1"),
            layers=1,
            hidden=(0, 16, 8, 8, 4, 4),
            carry=False,
            assessment=0,
        ),
        fusion=FusionCfg(kind="restormer", widths=(8, 8, 4, 4), inner=(8, 8, 4, 4)),
        working_side=81,
    )


# --- costs ----------------------------------------------------------------------------------------


def parameters(cfg: BSAFusionCfg) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in BSAFusion(cfg).parameters())


def gflop(cfg: BSAFusionCfg, *, mirrored: Mirrored = "never") -> float:
    """Operations, multiply and add counted, for a 256 x 256 pair."""
    model = BSAFusion(cfg).eval()
    image = torch.rand(1, 1, 256, 256)
    # The fused kernel of attention is not counted.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(image, image, mirrored=mirrored)
    return counter.get_total_flops() / 1e9


def test_the_paper_preset_costs_what_the_paper_says() -> None:
    assert parameters(paper()) == pytest.approx(10.03e6, rel=0.02)
    assert 24 < gflop(paper()) < 30


def test_the_default_preset_is_small() -> None:
    assert parameters(default()) <= 4e6
    assert gflop(default()) <= 27 / 4
    assert gflop(default(), mirrored="always") <= 27 / 2  # of a pair that is looked at twice


def test_the_default_preset_is_that_of_the_shipped_weights() -> None:
    record, _ = weights.find(weights.DEFAULT)
    assert BSAFusionCfg.from_dict(record.config) == default()


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(33, 47), (100, 257), (300, 120), (256, 256)])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_any_size_comes_out_as_it_went_in(
    shape: tuple[int, int], preset: str, small_cfg: BSAFusionCfg, randomise: Randomise
) -> None:
    cfg = small_cfg if preset == "default" else small_paper()
    model = randomise(BSAFusion(cfg))
    fixed, moving = images(shape, count=2)
    out = model.predict(fixed, moving)
    for image in (out.fused, out.aligned):
        assert image.shape == (2, 1, *shape)
        assert torch.isfinite(image).all()
        assert image.min() >= 0
        assert image.max() <= 1
    for field in (out.alignment.displacement, out.alignment.inverse):
        assert field.shape == (2, 2, *shape)
        assert field.abs().max() > 1e-3
    if preset == "default":
        assert out.alignment.expected_error.shape == (2, 1, *shape)
        assert (out.alignment.expected_error > 0).all()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((257, 257), (257, 257)),
        ((256, 200), (256, 200)),
        ((193, 100), (193, 100)),  # at least three quarters of the side
        ((192, 100), (257, 134)),  # 99 * 256 / 191 + 1 = 133.7
        ((513, 257), (257, 129)),
        ((129, 65), (257, 129)),
        ((2048, 64), (257, 17)),  # never less than two tokens
    ],
)
def test_the_working_shape(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    assert working_shape(shape, 257) == expected


def test_the_border_is_repeated_up_to_whole_strides(small_cfg: BSAFusionCfg) -> None:
    image, _ = images((66, 75))
    padded = BSAFusion(small_cfg).eval().to_working(image)
    expected = F.pad(image, (0, 6, 0, 15), mode="replicate")
    assert torch.equal(padded, expected)


def test_a_large_image_is_smoothed_before_it_is_reduced(small_cfg: BSAFusionCfg) -> None:
    checker = (torch.arange(161)[:, None] + torch.arange(161)) % 2
    reduced = BSAFusion(small_cfg).eval().to_working(checker[None, None].float())
    assert reduced.shape == (1, 1, 81, 81)
    assert (reduced[..., 1:-1, 1:-1] - 0.5).abs().max() < 0.01


def test_the_field_is_brought_to_full_resolution(small_cfg: BSAFusionCfg, randomise: Randomise) -> None:
    """Twice as many pixels over the same extent: the same map, in pixels half as large."""
    model = randomise(BSAFusion(small_cfg))
    coarse = images((65, 81))
    # 2 n - 1 samples keep every coarse one where it was, so that both sizes are encoded alike.
    fine = [F.interpolate(i, size=(129, 161), mode="bilinear", align_corners=True) for i in coarse]
    model.to_working = lambda image: image if image.shape[-1] == 81 else image[..., ::2, ::2]
    small, large = model.predict(*coarse), model.predict(*fine)
    torch.testing.assert_close(
        large.alignment.displacement[..., ::2, ::2], 2 * small.alignment.displacement, rtol=0, atol=1e-3
    )
    error = large.alignment.expected_error[..., ::2, ::2]
    torch.testing.assert_close(error, 2 * small.alignment.expected_error, rtol=1e-3, atol=1e-3)


def test_expected_errors_of_long_images_do_not_depend_on_which_side_is_long() -> None:
    """16 rows would be too few for the encoder, so that side is not reduced as much as the other."""
    model = known_network((0.0, 0.0))
    errors = [model.predict(*images(shape)).alignment.expected_error for shape in ((32, 1025), (1025, 32))]
    torch.testing.assert_close(errors[0], errors[1].mT)


def test_images_that_are_aligned_already_take_no_step(small_cfg: BSAFusionCfg, randomise: Randomise) -> None:
    model, pair = randomise(BSAFusion(small_cfg)), images((90, 110))
    plain = model.predict(*pair).alignment
    model.alignment.forward = None
    left = model.predict(*pair, aligned_already=True).alignment
    assert not left.displacement.any()
    assert not left.inverse.any()
    assert left.similarity is not None
    assert all(torch.equal(similarity, plain.similarity[0]) for similarity in left.similarity)


@pytest.mark.parametrize(
    ("fixed", "moving"),
    [
        ((1, 1, 40, 40), (1, 1, 40, 41)),
        ((1, 1, 40, 40), (1, 2, 40, 40)),
        ((1, 40, 40), (1, 40, 40)),
        ((1, 1, 40, 40), (1, 1, 41, 40)),
        ((1, 1, 40, 40), (2, 1, 40, 40)),
        ((1, 1, 31, 40), (1, 1, 31, 40)),
    ],
)
def test_images_that_do_not_belong_together_are_refused(
    fixed: tuple[int, ...], moving: tuple[int, ...], small_cfg: BSAFusionCfg
) -> None:
    with pytest.raises(ValueError, match="B 1 H W") as caught:
        BSAFusion(small_cfg).predict(torch.zeros(fixed), torch.zeros(moving))
    assert str(moving) in str(caught.value)


@pytest.mark.parametrize("name", ["small", "paper"])
def test_two_runs_give_the_same_bytes(name: str, small_cfg: BSAFusionCfg, randomise: Randomise) -> None:
    model = randomise(BSAFusion(small_cfg if name == "small" else small_paper()))
    pair = images((70, 81))
    first, second = model.predict(*pair), model.predict(*pair)
    assert torch.equal(first.fused, second.fused)
    assert torch.equal(first.alignment.displacement, second.alignment.displacement)


def test_a_pair_is_treated_alike_alone_and_in_a_batch(small_cfg: BSAFusionCfg, randomise: Randomise) -> None:
    # The steps of the default preset: each one more makes more of rounding in a network as drawn.
    cfg = replace(small_cfg, alignment=replace(small_cfg.alignment, steps=default().alignment.steps))
    model = randomise(BSAFusion(cfg))
    fixed, moving = images(count=3)
    together, alone = model.predict(fixed, moving), model.predict(fixed[1:2], moving[1:2])
    torch.testing.assert_close(together.fused[1:2], alone.fused, rtol=0, atol=1e-4)
    torch.testing.assert_close(together.alignment.displacement[1:2], alone.alignment.displacement, rtol=0, atol=1e-3)


# --- stage 3: symmetry and directions -------------------------------------------------------------


def in_colours(picture: Tensor) -> Tensor:
    """``B 3 H W``: the luminance with a chroma of its own."""
    return torch.cat([picture, 0.3 * (picture - 0.5), 0.2 * picture.flip(-1)], dim=1)


def test_colour_is_seen_and_grey_is_a_colour_without_chroma(small_cfg: BSAFusionCfg, randomise: Randomise) -> None:
    model = randomise(BSAFusion(small_cfg))
    fixed, moving = images()
    grey, zero, coloured = (
        model.predict(fixed, picture) for picture in (moving, in_colour(moving), in_colours(moving))
    )
    assert torch.equal(grey.alignment.displacement, zero.alignment.displacement)
    assert torch.equal(grey.fused, zero.fused)
    assert (grey.alignment.displacement - coloured.alignment.displacement).abs().max() > 0.1
    assert coloured.fused.shape == coloured.aligned.shape == moving.shape
    both = model.predict(in_colours(fixed), in_colours(moving)).alignment.displacement
    assert (both - coloured.alignment.displacement).abs().max() > 0.1


def test_an_encoder_of_luminance_does_not_see_colour(small_cfg: BSAFusionCfg, randomise: Randomise) -> None:
    for cfg in (replace(small_cfg, encoder=replace(small_cfg.encoder, colour=False)), small_paper()):
        model = randomise(BSAFusion(cfg))
        fixed, moving = images()
        grey, coloured = model.predict(fixed, moving), model.predict(fixed, in_colours(moving))
        assert torch.equal(grey.alignment.displacement, coloured.alignment.displacement)
        assert torch.equal(grey.fused, coloured.fused)


@pytest.mark.parametrize("mirrored", ["auto", "always", "never"])
@pytest.mark.parametrize("shape", [(65, 81), (60, 77), (120, 40)])
def test_swapping_the_images_gives_the_inverse(
    shape: tuple[int, int], mirrored: Mirrored, small_cfg: BSAFusionCfg, randomise: Randomise
) -> None:
    model = randomise(BSAFusion(small_cfg))
    a, b = images(shape)
    b = in_colours(b)
    there = model.predict(a, b, mirrored=mirrored).alignment
    back = model.predict(b, a, mirrored=mirrored).alignment
    assert there.displacement.abs().max() > 0.5
    torch.testing.assert_close(there.displacement, back.inverse, rtol=0, atol=1e-3)
    torch.testing.assert_close(there.inverse, back.displacement, rtol=0, atol=1e-3)


def test_a_local_step_can_be_a_velocity_field(small_cfg: BSAFusionCfg, randomise: Randomise) -> None:
    alignment = replace(small_cfg.alignment, steps=("affine", "1/4"), squarings=6)
    affine, local = (
        randomise(BSAFusion(replace(small_cfg, alignment=alignment)))
        .predict(*images(), mirrored="never")
        .alignment.steps
    )
    torch.testing.assert_close(affine.field_moving, affine.velocity / 2)  # exact as it is
    for field, before, sign in zip((local.field_fixed, local.field_moving), local.before, (-1, 1), strict=True):
        step = integrate(sign * local.velocity / 2, 6)
        torch.testing.assert_close(field, compose(before, step))
        assert not torch.allclose(step, sign * local.velocity / 2, atol=1e-4)


def test_equal_images_stay_where_they_are(small_cfg: BSAFusionCfg, randomise: Randomise) -> None:
    image, _ = images()
    alignment = randomise(BSAFusion(small_cfg)).predict(image, image).alignment
    assert alignment.displacement.abs().max() < 1e-3


@pytest.mark.parametrize("encoder", ["pyramid", "restormer"])
def test_mirror_images_get_the_mirrored_field(encoder: str, small_cfg: BSAFusionCfg, randomise: Randomise) -> None:
    cfg = small_cfg
    if encoder == "restormer":  # it has tokens alone, for steps at their stride
        alignment = replace(cfg.alignment, steps=("affine", "1/16"))
        cfg = replace(cfg, encoder=small_paper().encoder, alignment=alignment)
    model = randomise(BSAFusion(cfg))
    fixed, moving = images((65, 81))  # a size that needs no border: the mirror image of the border is another one
    plain = model.predict(fixed, moving, mirrored="always").alignment
    mirror = model.predict(fixed.flip(-1), moving.flip(-1), mirrored="always").alignment
    torch.testing.assert_close(mirror.displacement, mirror_field(plain.displacement), atol=1e-3, rtol=0)
    assert plain.disagreement is not None
    assert mirror.disagreement is not None
    torch.testing.assert_close(mirror.disagreement, plain.disagreement.flip(-1), atol=1e-3, rtol=0)
    alone = model.predict(fixed, moving, mirrored="never").alignment
    assert not torch.allclose(alone.displacement, plain.displacement, atol=1e-2)
    assert alone.disagreement is None


def test_a_symmetric_pair_has_nothing_to_disagree_on(small_cfg: BSAFusionCfg, randomise: Randomise) -> None:
    model = randomise(BSAFusion(small_cfg))
    fixed, moving = ((image + image.flip(-1)) / 2 for image in images((65, 81)))
    alone, both = (model.predict(fixed, moving, mirrored=mirrored).alignment for mirrored in ("never", "always"))
    across = alone.displacement[:, 1] + alone.displacement[:, 1].flip(-1)
    assert both.disagreement is not None
    assert (both.displacement[:, 1] + both.displacement[:, 1].flip(-1)).abs().max() < 1e-3 < across.abs().max()


def test_of_both_looks_the_mean_is_taken_and_half_the_difference_told(
    small_cfg: BSAFusionCfg, randomise: Randomise
) -> None:
    """For one step, whose answers are known: those for the images, and those for the mirror images turned back."""
    alignment = replace(small_cfg.alignment, steps=("affine",), direction="forward", assessment=0)
    cfg = replace(small_cfg, alignment=alignment)  # only one side moves: the fixed grid is that of the step
    model, (fixed, moving) = randomise(BSAFusion(cfg)), images()
    step = model.predict(fixed, moving, mirrored="never").alignment.steps[0]
    plain = step.velocity
    turned = model.predict(fixed.flip(-1), moving.flip(-1), mirrored="never").alignment
    mirror = mirror_field(turned.steps[0].velocity)
    both = model.predict(fixed, moving, mirrored="always").alignment
    torch.testing.assert_close(both.steps[0].field_moving, (plain + mirror) / 2, rtol=0, atol=1e-5)
    torch.testing.assert_close(both.steps[0].match_logits, step.match_logits, rtol=0, atol=1e-4)
    apart = 16 * ((plain - mirror) / 2).norm(dim=1, keepdim=True)
    torch.testing.assert_close(both.disagreement[..., ::16, ::16], apart, rtol=0, atol=1e-3)
    assert apart.min() > 0.1


def test_mirror_images_are_looked_at_where_a_large_error_is_expected(
    small_cfg: BSAFusionCfg, randomise: Randomise
) -> None:
    model, (fixed, moving) = randomise(BSAFusion(small_cfg)), images(count=4)
    moving = moving ** torch.tensor([1, 4, 0.2, 10]).view(-1, 1, 1, 1)  # not one like the other
    never, always = (model.predict(fixed, moving, mirrored=mirrored).alignment for mirrored in ("never", "always"))

    def looked_at(found: Alignment) -> list[bool]:
        if found.disagreement is None:
            return [False] * len(found.displacement)
        return [not bool(apart.isnan().any()) for apart in found.disagreement]

    assert (looked_at(never), looked_at(always)) == ([False] * 4, [True] * 4)
    counts = set()
    for above in np.linspace(2, 3, 51):
        model.cfg = replace(small_cfg, alignment=replace(small_cfg.alignment, look_again=float(above)))
        found = model.predict(fixed, moving).alignment
        places = looked_at(found)
        for place, looked in enumerate(places):
            expected = (always if looked else never)._asdict()
            for name in ("displacement", "inverse", "expected_error"):
                torch.testing.assert_close(found._asdict()[name][place], expected[name][place], rtol=1e-4, atol=1e-3)
        # That is so whichever of both is fixed, and whatever else is in the batch.
        assert looked_at(model.predict(moving, fixed).alignment) == places
        assert looked_at(model.predict(fixed[:1], moving[:1]).alignment) == places[:1]
        counts.add(sum(places))
    assert {0, 4} < counts
    model.cfg = replace(small_cfg, alignment=replace(small_cfg.alignment, look_again=0.0))
    assert model.train().match(fixed, moving).alignment.disagreement is None


def test_of_equal_images_both_looks_expect_the_mean_error_on_a_log_scale(
    small_cfg: BSAFusionCfg, randomise: Randomise
) -> None:
    model, (image, _) = randomise(BSAFusion(small_cfg)), images()  # equal images stay: the maps are the step's own
    plain, mirror, both = (
        model.predict(picture, picture, mirrored=mirrored).alignment.expected_error
        for picture, mirrored in ((image, "never"), (image.flip(-1), "never"), (image, "always"))
    )
    torch.testing.assert_close(both, (plain * mirror.flip(-1)).sqrt(), rtol=5e-2, atol=0)
    assert not torch.allclose(both, both.flip(-1), rtol=0.1)


def test_the_two_fields_are_inverse(small_cfg: BSAFusionCfg, randomise: Randomise) -> None:
    encoder = replace(small_cfg.encoder, colour=False)
    cfg = replace(small_cfg, encoder=encoder, alignment=replace(small_cfg.alignment, steps=("affine", "1/16")))
    model = randomise(BSAFusion(cfg))
    with torch.no_grad():  # what random residual blocks say is too wild for any field to be inverted
        model.alignment.steps["1_16"].out.weight.mul_(0.3)
    alignment = model.predict(*images()).alignment
    both = compose(alignment.displacement, alignment.inverse)[..., 12:-12, 12:-12]
    assert both.abs().mean() < 0.1 * alignment.displacement.abs().mean()


@pytest.mark.parametrize("direction", ["both", "forward", "reverse"])
def test_the_direction_says_who_moves(direction: str, small_cfg: BSAFusionCfg, randomise: Randomise) -> None:
    cfg = replace(small_cfg, alignment=replace(small_cfg.alignment, direction=direction))
    alignment = randomise(BSAFusion(cfg)).predict(*images()).alignment
    assert [step.name for step in alignment.steps] == list(STEPS)
    for step in alignment.steps:
        assert (step.field_fixed.abs().max() > 1e-3) == (direction != "forward")
        assert (step.field_moving.abs().max() > 1e-3) == (direction != "reverse")
    first = alignment.steps[0]  # whoever moves, it takes up what was found between the two
    torch.testing.assert_close(first.field_moving - first.field_fixed, first.velocity)
    if direction == "forward":
        grid = alignment.steps[-1].field_moving
        torch.testing.assert_close(alignment.displacement[..., ::2, ::2], 2 * grid, rtol=0, atol=1e-4)


def test_paper_steps_add_up(randomise: Randomise) -> None:
    """One voxel per scale and image at most: 16 + 8 + 4 + 2 + 1 = 31 pixels each way."""
    model = randomise(BSAFusion(small_paper()))
    with torch.no_grad():
        for name, parameter in model.alignment.sides.named_parameters():
            if name.endswith("out.bias"):
                parameter.fill_(20.0 if name.startswith("moving") else -20.0)
    alignment = model.predict(*images()).alignment
    torch.testing.assert_close(
        alignment.displacement, torch.full_like(alignment.displacement, 62.0), rtol=1e-3, atol=1e-3
    )
    for step, stride in zip(alignment.steps, (16, 8, 4, 2, 1), strict=True):
        # Of its own each step finds one voxel for either image.
        expected = torch.full((1, 2, 64 // stride + 1, 80 // stride + 1), 2.0)
        torch.testing.assert_close(step.velocity, expected, rtol=1e-3, atol=1e-3)


def test_each_side_of_the_paper_preset_looks_from_its_own_image(randomise: Randomise) -> None:
    cfg = small_paper()
    model = randomise(BSAFusion(replace(cfg, alignment=replace(cfg.alignment, steps=("1/16",)))))
    out = model.predict(*images())
    fixed, moving = out.representation.matched
    sides = model.alignment.sides
    with torch.inference_mode():
        expected = sides["moving"][0](moving, fixed) - sides["fixed"][0](fixed, moving)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(out.alignment.steps[0].velocity, expected)


def test_what_the_paper_preset_cannot_do_is_refused_and_what_it_can_leave_is_left(randomise: Randomise) -> None:
    model, pair = randomise(BSAFusion(small_paper())), images()
    for options, message in (({"mirrored": "always"}, "mirror images"), ({"refine": Refinement(1)}, "no descriptors")):
        with pytest.raises(ValueError, match=message):
            model.predict(*pair, **options)
    with pytest.raises(ValueError, match="no assessment"):
        model.alignment.start_assessing()
    left = model.predict(*pair, aligned_already=True)
    torch.testing.assert_close(left.aligned, pair[1], rtol=0, atol=1e-5)
    assert not left.alignment.displacement.any()
    assert not left.alignment.inverse.any()
    assert left.alignment.similarity is None


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gelu_keeps_values_gradients_and_layout(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    y = gelu(x)
    torch.testing.assert_close(y, x * (1 + torch.erf(x / math.sqrt(2))) / 2)
    assert y.is_contiguous(memory_format=memory_format)
    assert torch.autograd.gradcheck(gelu, x)


# --- stage 3: local correlation -------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "radius"), [((5, 7), 1), ((17, 33), 3), ((3, 16), 2), ((2, 40), 3), ((20, 1), 1)])
def test_local_correlation_against_a_loop(shape: tuple[int, int], radius: int) -> None:
    height, width = shape
    a, b = torch.randn(2, 2, 6, height, width, dtype=torch.float64)
    span = 2 * radius + 1
    expected = torch.zeros(2, span * span, height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            for dy in range(-radius, radius + 1):
                for dx in range(-radius, radius + 1):
                    if 0 <= y + dy < height and 0 <= x + dx < width:
                        channel = (dy + radius) * span + dx + radius
                        expected[:, channel, y, x] = (a[:, :, y, x] * b[:, :, y + dy, x + dx]).sum(1)
    found = local_correlation(a, b, radius)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(reverse_correlation(found, radius), local_correlation(b, a, radius), rtol=0, atol=1e-12)


# --- stage 3: affine step -------------------------------------------------------------------------


def descriptors(points: Tensor) -> Tensor:
    """Unit descriptors, unique to each point of the plane and changing smoothly: ``B 2 h w`` -> ``B 64 h w``."""
    fixed = torch.Generator().manual_seed(3)
    waves = torch.randn(64, 2, generator=fixed, dtype=torch.float64) * 1.2
    phases = torch.rand(64, 1, 1, generator=fixed, dtype=torch.float64) * 2 * math.pi
    return F.normalize(torch.cos(torch.einsum("kc,bchw->bkhw", waves, points) + phases), dim=1)


def seen(linear: list[list[float]], shift: list[float], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Descriptors of the fixed image and of one in which ``x`` is found at ``A x + t`` (voxels, about the centre);
    the map itself as ``1 2 3``."""
    grid = identity_grid(shape, torch.zeros(1, dtype=torch.float64))[None]
    centre = (torch.tensor(shape, dtype=torch.float64) - 1).view(1, 2, 1, 1) / 2
    matrix = torch.tensor(linear, dtype=torch.float64)
    offset = torch.tensor(shift, dtype=torch.float64).view(1, 2, 1, 1)
    origin = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(matrix), grid - centre - offset)
    return descriptors(grid - centre), descriptors(origin)


def turn(degrees: float) -> list[list[float]]:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [[c, -s], [s, c]]


@pytest.mark.parametrize(
    ("linear", "shift"),
    [
        (turn(0), [0.0, 0.0]),
        (turn(0), [2.0, -1.5]),
        (turn(15), [0.0, 0.0]),
        (turn(-20), [1.0, 0.5]),
        ([[1.1, 0.05], [-0.02, 0.95]], [-0.75, 1.25]),
    ],
)
def test_the_affine_step_recovers_a_known_map(linear: list[list[float]], shift: list[float]) -> None:
    shape = (17, 15)
    a, b = seen(linear, shift, shape)
    step = AffineStep().double()
    with torch.no_grad():
        step.log_scale.fill_(math.log(60.0))
        velocity, logits = step(a, b)
    assert logits.shape == (1, 255, 255)
    # m -> m - v/2 and m -> m + v/2 lead to the two images; from one to the other it is the map.
    to_fixed, to_moving = -velocity / 2, velocity / 2
    grid = identity_grid(shape, velocity)[None]
    centre = (torch.tensor(shape, dtype=torch.float64) - 1).view(1, 2, 1, 1) / 2
    mapped = torch.einsum("ij,bjhw->bihw", torch.tensor(linear, dtype=torch.float64), grid + to_fixed - centre)
    mapped = mapped + centre + torch.tensor(shift, dtype=torch.float64).view(1, 2, 1, 1)
    error = (mapped - grid - to_moving).norm(dim=1)
    assert error.mean() < 0.25  # of up to 5 voxels: tokens whose partner is not on the grid pull a little
    assert error.max() < 0.5


def test_the_affine_step_is_antisymmetric() -> None:
    a, b = (F.normalize(torch.randn(2, 8, 9, 12), dim=1) for _ in range(2))
    step = AffineStep()
    there, logits = step(a, b)
    back, logits_back = step(b, a)
    assert there.abs().max() > 1e-3
    torch.testing.assert_close(there, -back, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits, logits_back.transpose(1, 2))
    # A global affine map has no second differences.
    assert there.diff(n=2, dim=2).abs().max() < 1e-4
    assert there.diff(n=2, dim=3).abs().max() < 1e-4


def test_the_affine_step_of_turned_images_is_turned() -> None:
    """Rows and columns are alike to it, whichever there are more of."""
    a, b = (F.normalize(torch.randn(2, 8, 9, 14), dim=1) for _ in range(2))
    step = AffineStep()
    velocity, turned = step(a, b)[0], step(a.mT, b.mT)[0]
    assert velocity.abs().max() > 1e-2
    torch.testing.assert_close(turned, velocity.mT.flip(1), rtol=0, atol=1e-5)


# --- options --------------------------------------------------------------------------------------


def fused_by(cfg: BSAFusionCfg, randomise: Randomise) -> tuple[Tensor, Tensor]:
    out = randomise(BSAFusion(cfg)).predict(*images())
    return out.fused, out.alignment.displacement


def check_distinct(results: list[Tensor]) -> None:
    for i, a in enumerate(results):
        assert torch.isfinite(a).all()
        for b in results[i + 1 :]:
            assert (a - b).abs().max() > 1e-5


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_the_number_of_steps(preset: str, small_cfg: BSAFusionCfg, randomise: Randomise) -> None:
    cfg = small_cfg if preset == "default" else small_paper()
    results = []
    for count in range(1, 6):
        alignment = replace(cfg.alignment, steps=cfg.alignment.steps[:count])
        model = randomise(BSAFusion(replace(cfg, alignment=alignment)))
        out = model.predict(*images())
        assert len(out.alignment.steps) == count
        assert out.fused.shape == (1, 1, 65, 81)
        results.append(out.alignment.displacement)
    check_distinct(results)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_the_number_of_fusion_blocks(preset: str, small_cfg: BSAFusionCfg, randomise: Randomise) -> None:
    cfg = small_cfg if preset == "default" else small_paper()
    fusion = replace(cfg.fusion, widths=(8, 8, 8, 8))  # the last stage then has the same shape for any number
    variants = [replace(cfg, fusion=replace(fusion, blocks=n)) for n in range(1, 5)]
    check_distinct([fused_by(v, randomise)[0] for v in variants])


def test_the_number_of_layers_of_fusion(small_cfg: BSAFusionCfg, randomise: Randomise) -> None:
    variants = [replace(small_cfg, fusion=replace(small_cfg.fusion, layers=n)) for n in range(1, 4)]
    check_distinct([fused_by(v, randomise)[0] for v in variants])


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_the_number_of_layers(preset: str, small_cfg: BSAFusionCfg, randomise: Randomise) -> None:
    cfg = small_cfg if preset == "default" else small_paper()
    variants = [replace(cfg, alignment=replace(cfg.alignment, layers=n)) for n in range(1, 4)]
    check_distinct([fused_by(v, randomise)[1] for v in variants])


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_injection_changes_alignment(preset: str, small_cfg: BSAFusionCfg, randomise: Randomise) -> None:
    cfg = small_cfg if preset == "default" else small_paper()
    variants = [replace(cfg, representation=replace(cfg.representation, inject=i)) for i in (True, False)]
    assert parameters(variants[0]) == parameters(variants[1])
    check_distinct([fused_by(v, randomise)[1] for v in variants])


@pytest.mark.parametrize("direction", ["both", "forward", "reverse"])
def test_what_a_step_hands_on_changes_alignment(
    direction: Direction, small_cfg: BSAFusionCfg, randomise: Randomise
) -> None:
    cfg = replace(small_cfg, alignment=replace(small_cfg.alignment, direction=direction))
    variants = [replace(cfg, alignment=replace(cfg.alignment, carry=carry)) for carry in (True, False)]
    check_distinct([fused_by(v, randomise)[1] for v in variants])


@pytest.mark.parametrize("cfg", [default(), paper(), small_paper()])
def test_options_survive_json(cfg: BSAFusionCfg) -> None:
    again = BSAFusionCfg.from_dict(json.loads(json.dumps(cfg.to_dict())))
    assert again == cfg
    assert hash(again) == hash(cfg)  # tuples, not lists


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (AlignmentCfg, {"steps": ()}, "one to five"),
        (AlignmentCfg, {"steps": ("1/32",)}, "1/32"),
        (AlignmentCfg, {"steps": ("1/4", "1/8")}, "coarse to fine"),
        (AlignmentCfg, {"direction": "backward"}, "both, forward, reverse"),
        (AlignmentCfg, {"kind": "attention"}, "no affine step"),
        (AlignmentCfg, {"hidden": (8,)}, "expected a value for each of"),
        (AlignmentCfg, {"radius": (3,)}, "expected a value for each of"),
        (AlignmentCfg, {"squarings": 9}, "squarings 9: expected 0 to 8"),
        (EncoderCfg, {"widths": (8, 8, 8)}, "takes 4"),
        (EncoderCfg, {"widths": (8, 8, 8, 12)}, "multiple of 8"),
        (EncoderCfg, {"kind": "restormer"}, "takes 1"),
        (EncoderCfg, {"kind": "restormer", "widths": (8,), "colour": True}, "luminance alone"),
        (RepresentationCfg, {"dim": 90}, "multiple of heads 4"),
        (FusionCfg, {"blocks": 0}, "1 to 4 blocks"),
        (FusionCfg, {"blocks": 5}, "1 to 4 blocks"),
        (FusionCfg, {"hidden": 0}, "at least 1"),
        (FusionCfg, {"layers": 0}, "at least 1"),
        (FusionCfg, {"widths": (8, 8)}, "one width each"),
        (EncoderCfg, {"kind": "vit"}, "expected restormer or pyramid"),
        (FusionCfg, {"kind": "sum"}, "expected restormer or weights"),
        (FusionCfg, {"inner": (8, 8, 8)}, "expected one value each"),
        (BSAFusionCfg, {"representation": RepresentationCfg(dim=64)}, "96 channels.*expects 64"),
        (BSAFusionCfg, {"working_side": 32}, "at least 33"),
        (
            BSAFusionCfg,
            {"encoder": EncoderCfg(kind="restormer", widths=(96,), colour=False)},
            "needs the pyramid encoder",
        ),
        (BSAFusionCfg, {"alignment": AlignmentCfg(kind="attention", steps=("1/8",))}, "must be 1/16 .not 1/8."),
        (
            BSAFusionCfg,
            {"alignment": AlignmentCfg(kind="attention", steps=("1/16",))},
            r"with 96 channels \(not 64\)",
        ),
    ],
)
def test_options_that_make_no_network_are_refused(kind: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": ("1/16", "affine")},  # the affine step would look at features that were not warped
        {"steps": ("1/8", "1/8")},  # two steps of one name share their weights
        {"steps": ("1/16", "1/1")},  # the pyramid has no descriptors at full resolution
        {"steps": ("1/16",), "hidden": (0, 4)},  # groups of eight channels
        {"descriptors": 12, "kind": "correlation"},
    ],
)
def test_steps_that_cannot_run_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        AlignmentCfg(**options)


# --- stage 2 --------------------------------------------------------------------------------------


def small_representation(**options: Any) -> ModalityRepresentation:
    cfg = RepresentationCfg(dim=16, heads=2, mlp_dim=16, blocks=1, transfer_blocks=1, **{"cross_blocks": 2} | options)
    return ModalityRepresentation(cfg)


def test_the_judge_is_not_trained_but_passes_gradients_on() -> None:
    stage = small_representation()
    fixed, moving = torch.randn(2, 2, 16, 4, 5).unbind(0)
    fixed.requires_grad_()
    sum(logits.square().sum() for logits in stage(fixed, moving).judge_logits).backward()
    assert all(not p.requires_grad and p.grad is None for p in stage.judge.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stage.transfer.parameters())
    assert fixed.grad.abs().sum() > 0
    stage.judging = False
    assert stage(fixed, moving).judge_logits is None


def test_the_judge_is_a_copy_of_the_classifier_once_refreshed() -> None:
    stage = small_representation()
    with torch.no_grad():
        for p in stage.classifier.parameters():
            p += 1
    pairs = list(zip(stage.judge.parameters(), stage.classifier.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in pairs)
    stage.refresh_judge()
    assert all(torch.equal(a, b) and a is not b for a, b in pairs)
    assert not any(p.requires_grad for p in stage.judge.parameters())


def test_maps_keep_the_places_of_their_tokens() -> None:
    """The class token is dropped, not a token of the image: with blocks that pass everything on, maps come back."""
    stage = small_representation(inject=False)
    with torch.no_grad():
        for block in stage.modules():
            if isinstance(block, TransformerBlock):
                for part in (block.project, block.mlp[-1]):
                    part.weight.zero_()
                    part.bias.zero_()
    fixed, moving = torch.randn(2, 3, 16, 4, 5).unbind(0)
    out = stage(fixed, moving)
    for found, expected in zip((*out.plain, *out.matched), (fixed, moving) * 2, strict=True):
        assert torch.equal(found, expected)
    assert out.logits[0].shape == out.judge_logits[1].shape == (3, 4)


def test_positions_are_added_to_the_tokens_of_both_images(randomise: Randomise) -> None:
    stage = randomise(small_representation(position_grid=3))
    without = small_representation()
    without.load_state_dict({name: value for name, value in stage.state_dict().items() if name != "positions"})
    fixed, moving = torch.randn(2, 2, 16, 4, 5).unbind(0)
    positions = F.interpolate(stage.positions, size=(4, 5), mode="bilinear", align_corners=True)
    assert positions.std() > 0.01
    found, expected = stage(fixed, moving), without.eval()(fixed + positions, moving + positions)
    for name in ("plain", "matched", "logits"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), msg=name)


class MeanClassifier(nn.Module):
    """The mean token as MFRH, the tokens as they are."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tokens.mean(1), tokens, tokens.new_zeros(len(tokens), 4)


def test_injection_adds_the_other_images_mfrh() -> None:
    stage = small_representation()
    stage.classifier = MeanClassifier()
    stage.transfer = nn.ModuleList([nn.Identity()])
    fixed, moving = torch.randn(2, 3, 16, 4, 5).unbind(0)
    out = stage(fixed, moving)
    expected = (fixed + moving.mean((2, 3), keepdim=True), moving + fixed.mean((2, 3), keepdim=True))
    torch.testing.assert_close(out.matched, expected)
    torch.testing.assert_close(out.plain, (fixed, moving))


def test_after_transfer_each_image_looks_at_the_other(randomise: Randomise) -> None:
    stage = randomise(small_representation(inject=False, cross_blocks=2))
    stage.classifier, stage.transfer = MeanClassifier(), nn.ModuleList([nn.Identity()])
    maps = torch.randn(2, 3, 16, 4, 5).unbind(0)
    a, b = (tokens.flatten(2).mT for tokens in maps)
    places = (wave_positions((4, 5), 16, a),) * 2
    for block in stage.cross:
        a, b = block(a, b, places), block(b, a, places)
    expected = tuple(tokens.mT.unflatten(2, (4, 5)) for tokens in (a, b))
    torch.testing.assert_close(stage(*maps).matched, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("per_modality", [True, False])
def test_sides_share_the_transfer_unless_asked(per_modality: bool) -> None:
    stage = small_representation(transfer_per_modality=per_modality)
    image = torch.randn(1, 16, 4, 5)
    out = stage(image, image)
    assert torch.allclose(*out.matched, atol=1e-6) == (not per_modality)


def test_cross_blocks_start_as_the_identity() -> None:
    tokens, other = torch.randn(2, 20, 16), torch.randn(2, 12, 16)
    positions = (wave_positions((4, 5), 16, tokens), wave_positions((3, 4), 16, other))
    assert torch.equal(CrossBlock(16, 2, 16)(tokens, other, positions), tokens)


def test_cross_blocks_look_at_the_other_image_and_where_its_tokens_are(randomise: Randomise) -> None:
    block = randomise(CrossBlock(16, 2, 16))
    tokens, other = torch.randn(1, 20, 16), torch.randn(1, 20, 16)
    positions = wave_positions((4, 5), 16, tokens)
    out = block(tokens, other, (positions, positions))
    order = torch.randperm(20)
    check_distinct(
        [out, block(tokens, other[:, order], (positions, positions)), block(tokens, tokens, (positions, positions))]
    )
    # A token and its place move together: to attention the order alone says nothing.
    torch.testing.assert_close(block(tokens, other[:, order], (positions, positions[order])), out)


@pytest.mark.parametrize("dim", [16, 18])
def test_every_place_has_its_own_waves(dim: int) -> None:
    waves = wave_positions((17, 23), dim, torch.zeros(()))
    assert waves.shape == (17 * 23, dim)
    apart = torch.cdist(waves, waves) + 10 * torch.eye(len(waves))
    assert apart.min() > 0.1
    assert torch.equal(wave_positions((30, 23), dim, torch.zeros(()))[: 17 * 23], waves)


def test_swapping_the_images_swaps_what_is_matched(randomise: Randomise) -> None:
    stage = randomise(small_representation())
    fixed, moving = torch.randn(2, 3, 16, 4, 5).unbind(0)
    torch.testing.assert_close(stage(fixed, moving).matched, stage(moving, fixed).matched[::-1])
    without = randomise(small_representation(cross_blocks=0))
    check_distinct([stage(fixed, moving).matched[0], without(fixed, moving).matched[0]])


# --- stage 4 and layers ---------------------------------------------------------------------------


def test_weights_show_nothing_that_neither_image_shows(small_cfg: BSAFusionCfg, randomise: Randomise) -> None:
    model = randomise(BSAFusion(small_cfg))
    fixed, moving = images()
    fixed, moving = fixed.clone(), moving.clone()
    fixed[..., :, 40:] = 0
    moving[..., 30:, :] = 0
    out = model.predict(fixed, moving)
    empty = (fixed == 0) & (out.aligned == 0)
    assert empty.sum() > 500
    assert (out.fused[empty] == 0).all()
    assert (out.fused[~empty] > 0).all()
    assert (out.fused <= fixed + out.aligned + 1e-6).all()


def test_aligned_is_the_moving_image_under_the_field(small_cfg: BSAFusionCfg, randomise: Randomise) -> None:
    fixed, moving = images((90, 110))
    out = randomise(BSAFusion(small_cfg)).predict(fixed, moving)
    expected = warp(moving, out.alignment.displacement, padding="zeros")  # beyond its frame there is background
    torch.testing.assert_close(out.aligned, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"aligned_already": True}, {"mirrored": "always"}])
def test_alignment_alone_is_that_of_the_whole_network(
    small_cfg: BSAFusionCfg, randomise: Randomise, monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]
) -> None:
    model, pair = randomise(BSAFusion(small_cfg)), images((90, 110))
    whole = model.predict(*pair, **options)
    monkeypatch.delattr(BSAFusion, "fuse_aligned")  # stage 4: whoever calls it fails
    alone = model.train().predict_alignment(*pair, **options)
    assert not model.training
    assert torch.equal(alone.alignment.displacement, whole.alignment.displacement)
    assert torch.equal(alone.alignment.inverse, whole.alignment.inverse)
    assert torch.equal(alone.alignment.similarity[1], whole.alignment.similarity[1])
    assert (alone.alignment.expected_error is None) == ("aligned_already" in options)
    assert torch.equal(alone.representation.logits[1], whole.representation.logits[1])


def test_channel_norm_is_layer_norm_at_each_position() -> None:
    x = torch.randn(2, 8, 3, 4) * 5 + 2
    normed = ChannelNorm(8)(x)
    torch.testing.assert_close(normed.mean(1), torch.zeros(2, 3, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(normed.var(1, unbiased=False), torch.ones(2, 3, 4), rtol=0, atol=1e-3)


def test_a_transformer_block_is_attention_and_an_mlp_with_residuals() -> None:
    block = TransformerBlock(16, 4, 32)
    tokens = torch.randn(2, 9, 16)
    q, k, v = (t.view(2, 9, 4, 4).transpose(1, 2) for t in block.to_qkv(block.norm_attention(tokens)).chunk(3, 2))
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 9, 16)
    expected = tokens + block.project(attended)
    expected = expected + block.mlp(block.norm_mlp(expected))
    torch.testing.assert_close(block(tokens), expected, rtol=1e-5, atol=1e-5)


def test_attention_between_channels_by_its_formula(randomise: Randomise) -> None:
    attention = randomise(TransposedAttention(8, heads=2)).double()
    x = torch.randn(2, 8, 5, 3, dtype=torch.float64)
    rows = attention.to_qkv(x).flatten(2)
    expected = torch.zeros_like(x).flatten(2)
    for item in range(2):
        for head in range(2):
            q, k, v = (rows[item, start + 4 * head : start + 4 * head + 4] for start in (0, 8, 16))
            cosines = torch.stack([torch.stack([F.cosine_similarity(a, b, dim=0) for b in k]) for a in q])
            expected[item, 4 * head : 4 * head + 4] = (cosines * attention.temperature[head]).softmax(1) @ v
    torch.testing.assert_close(attention(x), attention.project(expected.view_as(x)))


def test_cross_attention_between_channels_by_its_formula(randomise: Randomise) -> None:
    attention = randomise(CrossAttention(4)).double()
    x, context = torch.randn(2, 1, 4, 5, 3, dtype=torch.float64)
    q = attention.to_q(x)[0].flatten(1)
    k, v = attention.to_kv(context)[0].flatten(1).chunk(2)
    cosines = torch.stack([torch.stack([F.cosine_similarity(a, b, dim=0) for b in k]) for a in q])
    attended = (cosines * attention.temperature).softmax(1) @ v
    torch.testing.assert_close(attention(x, context), attention.project(attended.view_as(x)))


def test_restormer_blocks_add_to_what_they_are_given(randomise: Randomise) -> None:
    block = randomise(RestormerBlock(8))
    x = torch.randn(1, 8, 5, 6)
    attended = x + block.attention(block.norm_attention(x))
    forward = block.feed_forward
    gate, value = forward.expand(block.norm_feed_forward(attended)).chunk(2, dim=1)
    torch.testing.assert_close(block(x), attended + forward.project(F.gelu(gate) * value))


def test_affine_velocity_is_an_affine_field() -> None:
    """Descriptors that are the same everywhere hold no evidence: the step stays at the identity."""
    same = F.normalize(torch.ones(1, 8, 6, 7), dim=1)
    velocity, _ = AffineStep()(same, same)
    zero = affine_field(torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]), shape=(6, 7))
    torch.testing.assert_close(velocity, zero, rtol=0, atol=1e-5)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_what_is_said_of_an_image_stays_with_it(preset: str, small_cfg: BSAFusionCfg, randomise: Randomise) -> None:
    model = randomise(BSAFusion(small_cfg if preset == "default" else small_paper()))
    fixed, moving = images()
    with torch.no_grad():
        matched = model.match(fixed, moving)
        features = [model.encoder(image) for image in (fixed, moving)]
        expected = model.representation(*(of.tokens for of in features))
    for found, of in zip((matched.fixed, matched.moving), features, strict=True):
        torch.testing.assert_close(found.shallow, of.shallow, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.pyramid, of.pyramid, rtol=0, atol=1e-4)
    for name in ("plain", "matched", "logits"):
        torch.testing.assert_close(
            getattr(matched.representation, name), getattr(expected, name), rtol=0, atol=1e-3, msg=name
        )


def test_training_sees_a_window_at_its_own_scale() -> None:
    """In training the known field is on the window's own grid, so the network must not enlarge it."""
    model = BSAFusion(default())
    window = torch.rand(1, 1, 96, 96, generator=torch.Generator().manual_seed(0))
    assert model.train().match(window, window).alignment.displacement.shape == (1, 2, 97, 97)
    assert model.eval().match(window, window).alignment.displacement.shape == (1, 2, 257, 257)


def test_maps_are_joined_alike_in_training_and_in_inference() -> None:
    maps = [torch.rand(2, channels, 5, 7) for channels in (3, 1, 4)]
    maps[0] = maps[0].contiguous(memory_format=torch.channels_last)
    maps[2] = torch.rand(2, 4, 6, 8)[..., :5, :7].requires_grad_()
    plain = join(*maps)
    plain.sum().backward()
    assert maps[2].grad is not None
    with torch.inference_mode():
        joined = join(*maps)
        mixed = join(maps[0], maps[1].half())
    assert torch.equal(joined, plain)
    assert torch.equal(plain, torch.cat(maps, dim=1))
    assert joined.is_contiguous(memory_format=torch.channels_last)
    assert mixed.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
def test_attention_is_a_mean_of_the_values_by_softmax(dtype: torch.dtype, trained: bool) -> None:
    random = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 3, n, 8, generator=random, dtype=dtype) for n in (5, 7, 7))
    weights = torch.einsum("bhnc,bhmc->bhnm", q.double(), k.double()).div(math.sqrt(8)).softmax(-1)
    found = attend(q.requires_grad_(trained), k, v)
    assert found.dtype == dtype
    atol = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(found.double(), weights @ v.double(), rtol=0, atol=atol)
