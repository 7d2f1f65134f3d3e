"""Micro-batches: the exact gradient of the whole batch. Mutations named here were tried and die."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from barlow.microbatch import backward
from barlow.objective import BarlowTwinsLoss

N = 10


def mlp(*middle: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), *middle, nn.ReLU(), nn.Linear(12, 16)).to(dtype)


def images(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 5, generator=generator, dtype=torch.float64)
    return [(x + 0.3 * torch.randn(N, 5, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(2)]


def gradients(network: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in network.parameters()]


def at_once(network: nn.Module, views: list[Tensor], micro_batch: int = N) -> list[Tensor]:
    """The gradient in one ordinary pass with everything in one graph, the images cut into the same micro-batches."""
    network.zero_grad()
    parts = -(-N // micro_batch)
    z = [torch.cat([network(part) for part in view.tensor_split(parts)]) for view in views]
    BarlowTwinsLoss()(*z).backward()
    return gradients(network)


@pytest.mark.parametrize("micro_batch", [1, 3, N, 3 * N])
def test_gradient_of_the_whole_batch(micro_batch: int) -> None:
    """Kills: ordinary accumulation, a gradient divided by the number of micro-batches, rows of ∂L/∂z mixed up."""
    network, views = mlp(), images()
    expected = at_once(network, views)
    network.zero_grad()
    criterion = BarlowTwinsLoss()
    terms = backward(network, views, criterion, micro_batch)
    for found, want in zip(gradients(network), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-13)
    whole = BarlowTwinsLoss()
    whole(*(network(view) for view in views))
    assert terms.loss.item() == pytest.approx(whole.terms.loss.item(), rel=1e-12)
    backward(network, views, criterion, micro_batch)  # adds to what is there, as every backward does
    for found, want in zip(gradients(network), expected, strict=True):
        torch.testing.assert_close(found, 2 * want, rtol=1e-10, atol=1e-13)


def test_one_network_for_each_view() -> None:
    twins = [mlp(), copy.deepcopy(mlp())]
    with torch.no_grad():
        for parameter in twins[1].parameters():
            parameter.mul_(1.1)
    views = images()
    BarlowTwinsLoss()(*(twin(view) for twin, view in zip(twins, views, strict=True))).backward()
    expected = [gradients(twin) for twin in twins]
    for twin in twins:
        twin.zero_grad()
    backward(twins, views, BarlowTwinsLoss(), 3)
    for twin, want in zip(twins, expected, strict=True):
        for a, b in zip(gradients(twin), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), DropPath(0.5)])
def test_randomness_is_replayed(layer: nn.Module) -> None:
    """Kills: random state not saved, or saved once for all. The generator ends where one pass leaves it."""
    network, views = mlp(layer), images()
    network.train()
    torch.manual_seed(7)
    expected, left = at_once(network, views, 3), torch.get_rng_state()
    network.zero_grad()
    seen: list[Tensor] = []
    handle = network.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    torch.manual_seed(7)
    backward(network, views, BarlowTwinsLoss(), 3)
    handle.remove()
    for found, want in zip(gradients(network), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-13)
    assert torch.equal(torch.get_rng_state(), left)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(seen) == 2 * 2 * 4
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[4])


def test_batch_norm_sees_micro_batches_and_counts_them_once() -> None:
    """The documented difference: as if the network had been applied to each micro-batch, in one graph; its running
    statistics as after that one pass. Kills: buffers not restored after the first pass."""
    network, views = mlp(nn.BatchNorm1d(12)), images()
    other = copy.deepcopy(network)
    expected = at_once(other, views, 4)
    backward(network, views, BarlowTwinsLoss(), 4)
    for found, want in zip(gradients(network), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)
    for (name, found), want in zip(network.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(found, want, msg=name)
    assert network[1].num_batches_tracked == 6
    whole = at_once(other, views)
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(whole, expected, strict=True))


def test_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: the cast weights of the first pass left in autocast's cache. (In torch 2.8 they have no graph, and no
    weight gets a gradient; newer ones keep the graph, so here the clearing itself is seen.)"""
    network, views = mlp(dtype=torch.float32), images(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = at_once(network, views)
    network.zero_grad()
    log: list[object] = []
    network.register_forward_hook(lambda *_: log.append(torch.is_grad_enabled()))
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: log.append("cleared"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        backward(network, views, BarlowTwinsLoss(), N)
    monkeypatch.undo()
    assert log[:5] == [False, False, "cleared", True, True]
    for found, want in zip(gradients(network), expected, strict=True):
        assert (found - want).norm() < 1e-2 * want.norm()  # the sum over views is rounded to bfloat16 or not


def test_memory_of_one_micro_batch() -> None:
    """What autograd holds for the backward pass, at its most. Kills: a first pass that keeps its graph."""
    network = nn.Sequential(nn.Linear(5, 400), nn.Tanh(), nn.Linear(400, 400), nn.Tanh(), nn.Linear(400, 4)).double()
    held, most = 0, 0

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal held, most
            self.tensor = tensor
            held += tensor.numel() if tensor.shape[:1] in ((1,), (N,)) else 0  # activations only
            most = max(most, held)

        def __del__(self) -> None:
            nonlocal held
            held -= self.tensor.numel() if self.tensor.shape[:1] in ((1,), (N,)) else 0

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda kept: kept.tensor):
        at_once(network, images())
        whole, held, most = most, 0, 0
        backward(network, images(), BarlowTwinsLoss(), 1)
    assert whole > 2 * N * 1600
    assert most < whole / 10


def test_gradients_are_held_back_until_each_networks_last_pass() -> None:
    """So that processes exchange them once. Kills: the last pass of the whole instead of the last of each network."""

    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.inside, self.log = mlp(), False, []

        def forward(self, x: Tensor) -> Tensor:
            self.log.append((torch.is_grad_enabled(), self.inside))
            return self.inner(x)

        def no_sync(self):
            module = self

            class Context:
                def __enter__(self) -> None:
                    module.inside = True

                def __exit__(self, *_: object) -> None:
                    module.inside = False

            return Context()

    twins = [Held(), Held()]
    backward(twins, images(), BarlowTwinsLoss(), 4)
    for twin in twins:
        assert twin.log == [(False, False)] * 3 + [(True, True)] * 2 + [(True, False)]
    passes: list[torch.Size] = []

    def run(z: Tensor, gradient: Tensor) -> None:
        passes.append(z.shape)
        z.backward(gradient)

    backward(twins[0], images(), BarlowTwinsLoss(), 4, run=run)
    assert passes == [(4, 16), (3, 16), (3, 16)] * 2
    assert twins[0].log[-6:] == [(True, True)] * 5 + [(True, False)]


def test_as_many_micro_batches_as_the_largest_share_of_a_process_needs() -> None:
    """Kills: 16 rows in one piece and 17 in two, and normalisation that waits for the other process for ever."""
    shapes: list[int] = []
    network = mlp()
    network.register_forward_hook(lambda *what: shapes.append(len(what[2])))
    backward(network, images(), BarlowTwinsLoss(), N)
    backward(network, images(), BarlowTwinsLoss(), N, rows=N + 1)
    assert shapes == [N] * 4 + [N // 2] * 8


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="micro_batch must be at least 1, given 0"):
        backward(mlp(), images(), BarlowTwinsLoss(), 0)
    with pytest.raises(ValueError, match="one for each of the 2 views; given 1"):
        backward([mlp()], images(), BarlowTwinsLoss(), 4)
