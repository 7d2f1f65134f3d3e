"""The learning rate at its golden points, and parameter groups that hold every parameter exactly once."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from barlow.network import build_encoder, build_twins
from barlow.optimise import build_optimizer, parameter_groups, rate, set_rate


@pytest.mark.parametrize(
    ("step", "steps", "warmup", "expected"),
    [
        (0, 1000, 0.1, 1 / 101),  # the first step moves already, by one part of the warm-up
        (49, 1000, 0.1, 50 / 101),
        (99, 1000, 0.1, 100 / 101),  # the last of the warm-up
        (100, 1000, 0.1, 1.0),  # the first at the full rate
        (550, 1000, 0.1, 0.4996271),  # cos(π·450/899): half a step past the middle of what is left
        (999, 1000, 0.1, 0.001),  # the last one: a thousandth
        (0, 10, 0.0, 1.0),  # no warm-up: at once the full rate
        (9, 10, 0.0, 0.001),
        (0, 1, 0.5, 1.0),  # a single step
        (0, 2, 1.0, 0.5),  # warm-up over everything leaves the last step at the full rate
        (1, 2, 1.0, 1.0),
    ],
)
def test_rate_at_its_golden_points(step: int, steps: int, warmup: float, expected: float) -> None:
    assert rate(step, steps, warmup) == pytest.approx(expected, rel=1e-6)


def test_rate_rises_then_falls() -> None:
    rates = [rate(step, 200, 0.2) for step in range(200)]
    assert all(a < b for a, b in pairwise(rates[:41]))
    assert all(a > b for a, b in pairwise(rates[40:]))


def twins() -> nn.Module:
    encoder = build_encoder("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}, channels=1, size=32,
                            pretrained=False)  # fmt: skip
    return build_twins([encoder], (16, 16, 16), [(1, 32, 32)])


def test_groups_partition_the_parameters() -> None:
    network = twins()
    weights, small = parameter_groups(network)
    assert {id(p) for p in weights} | {id(p) for p in small} == {id(p) for p in network.parameters()}
    assert not {id(p) for p in weights} & {id(p) for p in small}
    assert all(p.ndim > 1 for p in weights)
    assert all(p.ndim <= 1 for p in small)


@pytest.mark.parametrize("name", ["adamw", "muon", "lars"])
def test_each_group_keeps_its_own_rate_and_decay(name: str) -> None:
    optimizer = build_optimizer(twins(), name, lr=0.4, lr_bias=0.003, weight_decay=0.1)
    set_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.0015 if name == "lars" else 0.2]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_lars_step_against_its_formula() -> None:
    """Weights: trust ratio 0.001·‖p‖/‖g + wd·p‖ also without decay; biases: a plain momentum step at their own rate."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    for decay in (0.0, 0.1):
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        optimizer = build_optimizer(layer, "lars", lr=0.2, lr_bias=0.05, weight_decay=decay)
        layer.weight.grad, layer.bias.grad = torch.full_like(weight, 0.5), torch.full_like(bias, 2.0)
        optimizer.step()
        update = torch.full_like(weight, 0.5) + decay * weight
        trust = 0.001 * weight.norm() / (torch.full_like(weight, 0.5).norm() + decay * weight.norm())
        torch.testing.assert_close(layer.weight.detach(), weight - 0.2 * trust * update, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(layer.bias.detach(), bias - 0.05 * 2.0)
