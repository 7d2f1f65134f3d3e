"""Orthogonal momentum against the singular value decomposition, and one step of both kinds against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from barlow.muon import STEPS, Muon, orthogonal


def matrix_with(values: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """(a matrix with these singular values, the nearest matrix with orthonormal rows or columns)."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
    return u @ torch.diag(values) @ v, u @ v


def polynomials(s: Tensor) -> Tensor:
    """What becomes of singular values of at most one."""
    for a, b, c in STEPS:
        s = a * s + b * s**3 + c * s**5
    return s


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (24, 30), (16, 144), (144, 16), (1, 9)])
def test_singular_values_become_one_and_directions_stay(rows: int, columns: int) -> None:
    values = torch.logspace(0, -1.5, min(rows, columns))  # a thirtyfold spread
    given, nearest = matrix_with(values, rows, columns)
    made = orthogonal(given)
    assert made.shape == given.shape
    _, singular, _ = torch.linalg.svd(made)
    assert 0.7 < float(singular.min()) <= float(singular.max()) < 1.3
    assert float((made * nearest).sum() / (made.norm() * nearest.norm())) > 0.98


@pytest.mark.parametrize("shape", [(12, 12), (12, 60)])
def test_both_ways_are_the_same_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    given, _ = matrix_with(torch.logspace(0, -3, 12, dtype=torch.float32), *shape)
    u, s, v = torch.linalg.svd(given.double(), full_matrices=False)
    s = polynomials(s / s.pow(8).sum() ** (1 / 8))
    torch.testing.assert_close(orthogonal(given).double(), u @ torch.diag(s) @ v, rtol=0, atol=2e-3)


def test_the_iterations_bring_a_fortieth_near_one_and_never_fold_over() -> None:
    values = polynomials(torch.logspace(math.log10(0.025), 0, 4000, dtype=torch.float64))
    assert 0.94 < float(values.min()) <= float(values.max()) < 1.06
    small = polynomials(torch.logspace(-6, math.log10(0.025), 400, dtype=torch.float64))
    assert bool((small.diff() > 0).all())  # no direction below them overtakes another


@pytest.mark.parametrize("size", [1e-12, 1e8])
def test_the_scale_of_a_matrix_does_not_matter(size: float) -> None:
    torch.manual_seed(0)
    for shape in ((8, 8), (8, 40)):
        given = torch.randn(shape)
        torch.testing.assert_close(orthogonal(given * size), orthogonal(given), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 64), (64, 300)])
def test_directions_that_are_only_rounding_stay_bounded(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    given = torch.outer(torch.randn(shape[0]), torch.randn(shape[1]))
    singular = torch.linalg.svdvals(orthogonal(given))
    assert 0.9 < float(singular[0]) < 1.1
    assert float(singular[1]) < 0.1


@pytest.mark.parametrize("shape", [(256, 256), (256, 1152)])
def test_rounding_is_not_enlarged(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    given = torch.randn(shape)
    exact = orthogonal(given.double())
    assert float((orthogonal(given).double() - exact).norm() / exact.norm()) < 3e-6


def test_a_matrix_of_zeros_stays_zero() -> None:
    assert orthogonal(torch.zeros(4, 9)).abs().max() == 0


def test_a_step_against_its_formula() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()  # type: ignore[union-attr]
    groups = [{"params": [layer.weight], "weight_decay": 0.1}, {"params": [layer.bias], "weight_decay": 0.0}]
    optimizer = Muon(groups, lr=0.02)
    moving, mean, square = torch.zeros(4, 27), torch.zeros(4), torch.zeros(4)
    for step in (1, 2, 3):
        layer.weight.grad, layer.bias.grad = torch.randn_like(weight), torch.randn_like(bias)  # type: ignore[union-attr]
        optimizer.step()
        moving = 0.95 * moving + 0.05 * layer.weight.grad.flatten(1)
        weight = weight * (1 - 0.02 * 0.1) - 0.02 * 0.2 * 27**0.5 * orthogonal(moving).view_as(weight)
        gradient = layer.bias.grad  # type: ignore[union-attr]
        mean, square = 0.9 * mean + 0.1 * gradient, 0.95 * square + 0.05 * gradient**2
        bias = bias - 0.02 * (mean / (1 - 0.9**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
        torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.bias.detach(), bias, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]


def test_its_state_continues_to_the_bit() -> None:
    def network() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))

    def trained(steps: list[int], saved: dict | None = None, net: nn.Module | None = None) -> tuple[nn.Module, Muon]:
        net = net or network()
        optimizer = Muon(net.parameters(), lr=0.01)
        if saved:
            optimizer.load_state_dict(saved)
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            net(torch.randn(8, 6)).square().sum().backward()
            optimizer.step()
        return net, optimizer

    whole, _ = trained([0, 1, 2, 3])
    half, optimizer = trained([0, 1])
    again, _ = trained([2, 3], optimizer.state_dict(), half)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
