"""Batch normalisation of one process: statistics as in float64, in every layout; else what PyTorch does."""

from __future__ import annotations

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from barlow.batch_norm import BatchNorm, exact_batch_norm, moments


def pictures(*shape: int, dtype: torch.dtype = torch.float32, last: bool = False) -> Tensor:
    """Numbers of mean 2 and deviation 1.5, channels innermost in memory if ``last``."""
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1.5 + 2.0).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("shape", "last"),
    [
        ((256, 4, 20, 20), True),
        ((256, 4, 20, 20), False),
        ((255, 3, 7, 9), True),  # rows that leave a rest
        ((3, 5, 2, 2), True),  # fewer rows than a group
        ((5001, 6), False),
        ((300, 4, 31), False),
        ((40, 2, 5, 6, 7), False),
    ],
)
def test_moments_are_as_good_as_in_float64(shape: tuple[int, ...], last: bool, dtype: torch.dtype) -> None:
    """PyTorch's own variance of the first of these is 2e-5 off in float32, 1e-4 in bfloat16."""
    x = pictures(*shape, dtype=dtype, last=last)
    over = [axis for axis in range(x.ndim) if axis != 1]
    mean, variance = moments(x)
    assert mean.dtype == variance.dtype == torch.float64
    torch.testing.assert_close(mean, x.double().mean(over), rtol=2e-7, atol=0)
    torch.testing.assert_close(variance, x.double().var(over, correction=0), rtol=4e-7, atol=0)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("kind", ["plain", "no affine", "momentum None", "nothing kept", "with activation"])
def test_values_gradients_and_buffers_are_those_of_pytorch(kind: str, last: bool) -> None:
    arguments = {"plain": {}, "no affine": {"affine": False}, "momentum None": {"momentum": None},
                 "nothing kept": {"track_running_stats": False}, "with activation": {}}[kind]  # fmt: skip
    norm = BatchNormAct2d if kind == "with activation" else nn.BatchNorm2d
    theirs, ours = (norm(3, **arguments).double() for _ in range(2))
    ours = exact_batch_norm(ours)
    assert type(ours) is BatchNorm
    x = pictures(17, 3, 5, 6, dtype=torch.float64, last=last)
    for _ in range(2):
        pair = [x.clone().requires_grad_() for _ in range(2)]
        made = [norm(each) for norm, each in zip((theirs, ours), pair, strict=True)]
        torch.testing.assert_close(made[1], made[0])
        for each in made:
            (each * x.sin()).sum().backward()
        torch.testing.assert_close(pair[1].grad, pair[0].grad)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    theirs.eval(), ours.eval()
    torch.testing.assert_close(ours(x), theirs(x))


def test_in_bfloat16_parameters_stay_float32() -> None:
    norm = exact_batch_norm(nn.BatchNorm2d(4))
    x = pictures(8, 4, 6, 6, dtype=torch.bfloat16, last=True).requires_grad_()
    y = norm(x)
    y.float().square().sum().backward()
    assert (y.dtype, x.grad.dtype, norm.weight.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_one_value_a_channel_is_refused_as_pytorch_does_and_rows_without_channels() -> None:
    with pytest.raises(ValueError, match="needs"):
        exact_batch_norm(nn.BatchNorm2d(3))(torch.randn(3))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        exact_batch_norm(nn.BatchNorm1d(3))(torch.randn(1, 3))


def test_a_norm_of_ones_own_is_left_alone() -> None:
    class Odd(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return -super().forward(input)

    network = nn.Sequential(Odd(3), nn.BatchNorm2d(3))
    assert [type(each) for each in exact_batch_norm(network)] == [Odd, BatchNorm]
