"""The fusion terms: by hand, and against the measures whose formulae they share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.metrics import structural_similarity
from torch import Tensor

from bsafusion import fusion_losses, metrics
from bsafusion.deformation import identity_grid

SHAPE = (65, 81)


def texture(seed: int = 0, shape: tuple[int, int] = SHAPE, count: int = 1) -> Tensor:
    rng = np.random.default_rng(seed)
    image = ndimage.gaussian_filter(rng.normal(size=(count, 1, *shape)), (0, 0, 2, 2))
    return torch.from_numpy((image - image.min()) / np.ptp(image))


def test_ssim_of_equal_images_is_one() -> None:
    image = texture(count=3)
    torch.testing.assert_close(fusion_losses.ssim(image, image), torch.ones(3, dtype=torch.float64))


def test_ssim_agrees_with_scikit_image() -> None:
    a, b = texture(1, count=2), texture(2, count=2) * 0.7
    for i, value in enumerate(fusion_losses.ssim(a, b).tolist()):
        _, full = structural_similarity(
            a[i, 0].numpy(),
            b[i, 0].numpy(),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
            full=True,
        )
        assert value == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-9)


def test_the_sobel_magnitude_of_a_ramp_is_its_slope() -> None:
    rows, columns = identity_grid((20, 30), texture())
    magnitude = fusion_losses.sobel_magnitude((3 * rows + 4 * columns)[None, None])
    torch.testing.assert_close(magnitude[..., 1:-1, 1:-1], torch.full((1, 1, 18, 28), 5.0, dtype=torch.float64))
    unit = fusion_losses.sobel_magnitude(columns[None, None])
    torch.testing.assert_close(unit[..., 1:-1], torch.ones(1, 1, 20, 28, dtype=torch.float64), rtol=0, atol=1e-6)


def test_image_losses_vanish_at_their_optimum() -> None:
    a, b = texture(1), texture(2)
    assert float(fusion_losses.intensity_loss(torch.maximum(a, b), a, b)) == 0
    assert float(fusion_losses.gradient_loss(a, a, torch.zeros_like(a))) == pytest.approx(0, abs=1e-9)
    assert list(map(float, fusion_losses.structure_losses(a, a, a))) == pytest.approx([0, 0], abs=1e-9)


def test_image_losses_by_hand() -> None:
    low, high = (torch.full((1, 1, *SHAPE), v, dtype=torch.float64) for v in (0.25, 0.75))
    c1 = 0.01**2
    ssim = (2 * 0.25 * 0.75 + c1) / (0.25**2 + 0.75**2 + c1)  # of two flat images
    assert list(map(float, fusion_losses.structure_losses(low, low, high))) == pytest.approx([0, 1 - ssim])
    assert float(fusion_losses.intensity_loss(low, low, high)) == pytest.approx(0.5)
    for fused, expected in ((high, 0), (high - 0.15, 0), (high - 0.3, 1), (low, (0.35 / 0.15) ** 2)):
        assert float(fusion_losses.highlight_loss(fused, low, high)) == pytest.approx(expected, abs=1e-9)
    ramp = identity_grid(SHAPE, texture())[1][None, None] / 100
    # The fused image is flat, the larger slope 0.02; at the first and last column the repeated border halves it.
    expected = 0.02 * (SHAPE[1] - 1) / SHAPE[1]
    assert float(fusion_losses.gradient_loss(low, ramp, 2 * ramp)) == pytest.approx(expected, abs=2e-4)


# --- the measures ---------------------------------------------------------------------------------


def triple(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two textures and something between them, whole grey levels; 256 pixels, the size at which Q_CV is defined."""
    fixed, moving = texture(seed, (256, 256)), texture(seed + 10, (256, 256))
    fused = 0.6 * torch.maximum(fixed, moving) + 0.4 * fixed
    return tuple(torch.round(image * 255) / 255 for image in (fixed, moving, fused))  # type: ignore[return-value]


@pytest.mark.parametrize("seed", [0, 1])
def test_each_term_has_the_value_of_its_measure(seed: int) -> None:
    fixed, moving, fused = triple(seed)
    arrays = [image[0, 0].numpy() * 255 for image in (fixed, moving, fused)]
    information, fidelity = fusion_losses.information_losses(fused, fixed, moving)
    visibility = fusion_losses.visibility_loss(fused, fixed, moving)
    found = {
        "qabf": 1 - fusion_losses.edge_loss(fused, fixed, moving),
        "qcv": 100 * visibility.expm1(),
        "qssim": 2 - sum(fusion_losses.structure_losses(fused, fixed, moving)),
        "qs": 1 - fusion_losses.salience_loss(fused, fixed, moving),
        "viff": 1 - information,
        "vif_sum": 2 - 2 * fidelity,
    }
    for name, value in found.items():
        # Where the measures round, or treat a pixel without any gradient apart, the terms cannot.
        assert float(value) == pytest.approx(getattr(metrics, name)(*arrays), rel=3e-4), name


def test_a_batch_has_the_mean_of_its_images() -> None:
    """Images of very different contrast, so that no sum over both can pass for it."""
    first, second = triple(0), tuple(0.1 * image for image in triple(1))
    together = [torch.cat(pair) for pair in zip(first, second, strict=True)]

    def terms(fixed: Tensor, moving: Tensor, fused: Tensor) -> list[float]:
        values = [
            loss(fused, fixed, moving)
            for loss in (
                fusion_losses.gradient_loss,
                fusion_losses.intensity_loss,
                fusion_losses.highlight_loss,
                fusion_losses.edge_loss,
                fusion_losses.visibility_loss,
                fusion_losses.salience_loss,
            )
        ]
        more = (
            *fusion_losses.structure_losses(fused, fixed, moving),
            *fusion_losses.information_losses(fused, fixed, moving),
        )
        return [float(value) for value in (*values, *more)]

    assert terms(*together) == pytest.approx(np.mean([terms(*first), terms(*second)], axis=0).tolist())


@pytest.mark.parametrize("level", [0.0, 0.4, 1.0])
def test_equal_flat_images_lose_nothing(level: float) -> None:
    flat = torch.full((1, 1, 64, 64), level, dtype=torch.float64)
    lost = [
        fusion_losses.visibility_loss(flat, flat, flat),
        fusion_losses.salience_loss(flat, flat, flat),
        *fusion_losses.structure_losses(flat, flat, flat),
        *fusion_losses.information_losses(flat, flat, flat),
    ]
    assert [float(value) for value in lost] == pytest.approx([0] * len(lost), abs=1e-6)


def test_gradients_are_finite_where_images_are_flat_or_black() -> None:
    black = torch.zeros(1, 1, 64, 64)
    patch = black.clone()
    patch[..., 20:40, 20:40] = 0.5
    for fixed, moving in ((black, black), (patch, black), (patch, patch)):
        fused = ((fixed + moving) / 2).requires_grad_(True)
        terms = [
            fusion_losses.edge_loss(fused, fixed, moving),
            fusion_losses.visibility_loss(fused, fixed, moving),
            fusion_losses.salience_loss(fused, fixed, moving),
            *fusion_losses.information_losses(fused, fixed, moving),
        ]
        (gradient,) = torch.autograd.grad(torch.stack(terms).sum(), fused)
        assert all(bool(torch.isfinite(t)) for t in terms)
        assert bool(torch.isfinite(gradient).all())


def test_terms_fall_on_the_way_to_the_sources() -> None:
    fixed, _, _ = triple(0)
    dull = torch.from_numpy(ndimage.gaussian_filter(fixed.numpy(), (0, 0, 4, 4)))
    for loss in (fusion_losses.edge_loss, fusion_losses.visibility_loss, fusion_losses.salience_loss):
        assert float(loss(fixed, fixed, fixed)) < 0.03 < float(loss(dull, fixed, fixed))
