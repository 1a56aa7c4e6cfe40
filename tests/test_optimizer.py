"""Muon: what its steps are, and that it learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bsafusion.optimizer import UPDATE_RMS, Muon, is_matrix, orthogonalise


@pytest.mark.parametrize("shape", [(8, 72), (72, 8), (32, 32)])
def test_orthogonalise_levels_the_singular_values_and_keeps_the_directions(shape: tuple[int, int]) -> None:
    left, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=torch.Generator().manual_seed(0)))
    right, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=torch.Generator().manual_seed(1)))
    values = torch.linspace(1, 10, min(shape))
    found = orthogonalise(left * values @ right.T)
    assert torch.linalg.svdvals(found).sub(1).abs().max() < 0.4
    inner = left.T @ found @ right  # the same singular vectors: nothing but a diagonal is left
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 0.05
    assert inner.diagonal().min() > 0.6


def test_each_matrix_of_a_stack_is_taken_alone() -> None:
    matrices = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1e3]).view(
        2, 1, 1
    )
    alone = torch.stack([orthogonalise(matrix) for matrix in matrices])
    torch.testing.assert_close(orthogonalise(matrices), alone, rtol=0, atol=1e-4)


def test_what_counts_as_a_matrix() -> None:
    assert is_matrix(torch.zeros(16, 4, 3, 3))
    assert is_matrix(torch.zeros(8, 8))
    for other in (
        torch.zeros(16),
        torch.zeros(()),
        torch.zeros(3, 48, 3, 3),
        torch.zeros(1, 1, 96),
        torch.zeros(12, 4),
    ):
        assert not is_matrix(other)


def test_the_first_step_has_adams_size() -> None:
    matrix, vector = nn.Parameter(torch.zeros(16, 64)), nn.Parameter(torch.zeros(5))
    optimizer = Muon([matrix, vector], lr=0.1)
    matrix.grad = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    vector.grad = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0])
    optimizer.step()
    # A 16 x 64 matrix with singular values of 1 has entries of RMS 1/8.
    assert float(matrix.detach().square().mean().sqrt()) == pytest.approx(0.1 * UPDATE_RMS * 64**0.5 / 8, rel=0.25)
    assert (matrix.detach() * matrix.grad).sum() < 0  # downhill
    assert torch.allclose(vector.detach(), -0.1 * vector.grad.sign(), atol=1e-4)


def test_matrices_alone_and_the_rest_alone_take_the_steps_that_they_take_together() -> None:
    def stepped(matrix: bool, vector: bool) -> list[torch.Tensor]:
        parameters = [nn.Parameter(torch.ones(8, 9)), nn.Parameter(torch.ones(5))]
        optimizer = Muon(parameters, lr=0.1, weight_decay=0.1)
        for _ in range(2):
            for parameter, reached in zip(parameters, (matrix, vector), strict=True):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
                parameter.grad = noise if reached else None
            optimizer.step()
        return [parameter.detach() for parameter in parameters]

    both = stepped(True, True)
    assert torch.equal(stepped(True, False)[0], both[0])
    assert torch.equal(stepped(False, True)[1], both[1])
    assert all(torch.equal(left, torch.ones_like(left)) for left in stepped(False, False))


def test_weight_decay_shrinks_and_a_parameter_without_gradient_stays() -> None:
    decayed, untouched = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8, 8))
    optimizer = Muon([decayed, untouched], lr=0.5, weight_decay=0.1)
    decayed.grad = torch.zeros(8, 8)
    optimizer.step()
    assert torch.allclose(decayed.detach(), torch.full((8, 8), 0.95))
    assert torch.equal(untouched.detach(), torch.ones(8, 8))


def test_it_finds_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(16, 16, generator=generator)
    inputs = torch.randn(256, 16, generator=generator)
    layer = nn.Linear(16, 16, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = Muon(layer.parameters(), lr=0.2)
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * (1 - step / 150)
        optimizer.zero_grad()
        (layer(inputs) - inputs @ truth.T).square().mean().backward()
        optimizer.step()
    assert (layer.weight.detach() - truth).abs().max() < 0.05
