"""Real processes over gloo, each with images of its own: the same numbers as one process with all of them.

Mutations that were tried and die here: statistics of the local batch only (loss and gradients
differ); an untracked reduce, as in most public code (the factor W on ∂L/∂z left out: parameter gradients come out 1/W);
the total taken as W times the local count; gather in the wrong order; local BatchNorm; running statistics of one rank.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import reference
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from barlow import forms, ranks
from barlow.batch_norm import exact_batch_norm
from barlow.errors import NumbersError, UserError
from barlow.microbatch import backward
from barlow.objective import BarlowTwinsLoss, barlow_twins_loss

LAMBDA = 0.02
COUNTS = {2: [5, 2], 4: [4, 1, 5, 3]}  # unequal, and one process with a single image


def mlp(norm: bool) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 12), nn.BatchNorm1d(12) if norm else nn.Tanh(), nn.ReLU(), nn.Linear(12, 9)]
    return nn.Sequential(*layers).double()


def images(total: int, width: int = 5, views: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(total, width, generator=generator, dtype=torch.float64)
    return [x + 0.3 * torch.randn(total, width, generator=generator, dtype=torch.float64) for _ in range(views)]


def mine(tensor: Tensor, counts: list[int]) -> Tensor:
    return tensor.split(counts)[ranks.rank()]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)


def messages(counts: list[int]) -> None:
    me, world, total = dist.get_rank(), len(counts), sum(counts)
    assert (ranks.rank(), ranks.world_size()) == (me, world)
    assert ranks.sum_(torch.tensor([me + 1.0])).item() == world * (world + 1) / 2
    assert ranks.integers([me, 10 * me]) == [[r, 10 * r] for r in range(world)]
    plan = {"steps": 12, "name": "é", "list": [1, None, 0.5]}
    assert ranks.broadcast(plan if me == 0 else None) == plan
    assert ranks.broadcast("" if me == 0 else "x") == ""
    ranks.barrier()
    joined = torch.arange(total * 7.0).view(total, 7)
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.int64):
        assert torch.equal(ranks.gather_rows(mine(joined.to(dtype), counts)), joined.to(dtype))
        columns = ranks.rows_to_columns(mine(joined.to(dtype), counts), counts)
        assert torch.equal(columns, joined.to(dtype).tensor_split(world, dim=1)[me])
        assert torch.equal(ranks.columns_to_rows(columns, counts, 7), mine(joined.to(dtype), counts))
    owners = [r for r, count in enumerate(counts) for _ in range(count)]
    assert ranks.gather_rows(torch.full((counts[me],), me)).tolist() == owners


def losses(counts: list[int], form: str) -> None:
    """The loss alone: value, terms, gradient with respect to the embeddings, for two and three views."""
    forms_cheaper, forms.cheaper = forms.cheaper, lambda *_, **__: form
    try:
        for views in (2, 3):
            joined = images(sum(counts), 8, views)
            joined[0][:, 3] = 31415.9
            value, gradients = reference.value_and_gradients(joined, LAMBDA)
            leaves = [mine(view, counts).clone().requires_grad_() for view in joined]
            terms = barlow_twins_loss(*leaves, lambda_=LAMBDA)
            terms.loss.backward()
            assert terms.form == form
            assert terms.loss.item() == pytest.approx(value, rel=1e-10)
            assert terms.dead == 1
            for leaf, gradient in zip(leaves, gradients, strict=True):
                close(leaf.grad, len(counts) * mine(gradient, counts))
            close(terms.cross_correlation(0, 1), reference.correlation(joined[0], joined[1]))
            close(terms.cross_correlation(views - 1, 0), reference.correlation(joined[-1], joined[0]))
            assert terms.diagonal.shape == (8,)
            assert ranks.integers([hash(terms.loss.item())]) == [[hash(terms.loss.item())]] * len(counts)
        half = [mine(view, counts).bfloat16() for view in joined]
        expected, _ = reference.value_and_gradients([view.bfloat16() for view in joined], LAMBDA)
        assert barlow_twins_loss(*half, lambda_=LAMBDA).loss.item() == pytest.approx(expected, rel=1e-5)
    finally:
        forms.cheaper = forms_cheaper


def networks(counts: list[int], norm: bool) -> None:
    """Parameter gradients after DistributedDataParallel, and running statistics, against one process without us."""
    joined = images(sum(counts))
    single = mlp(norm)
    expected = reference.over_pairs([single(view) for view in joined], LAMBDA)
    expected.backward()
    parallel = DistributedDataParallel(exact_batch_norm(mlp(norm)), broadcast_buffers=False)
    criterion = BarlowTwinsLoss(LAMBDA)
    criterion(*(parallel(mine(view, counts)) for view in joined)).backward()
    assert criterion.terms.loss.item() == pytest.approx(expected.item(), rel=1e-9)
    found = dict(parallel.module.named_parameters())
    assert list(parallel.module.state_dict()) == list(single.state_dict())
    for name, parameter in single.named_parameters():
        close(found[name].grad, parameter.grad)
    for name, buffer in single.named_buffers():
        close(parallel.module.state_dict()[name].double(), buffer.double())
    parallel.eval(), single.eval()
    close(parallel(mine(joined[0], counts)), single(mine(joined[0], counts)))
    if not norm:
        parallel.zero_grad()
        backward(parallel, [mine(view, counts) for view in joined], criterion, 2)
        for name, parameter in single.named_parameters():
            close(found[name].grad, parameter.grad)


def batch_norms(counts: list[int]) -> None:
    """timm's norm with an activation, momentum None, no affine, bfloat16, evaluation: as one process does it."""
    x = torch.randn(sum(counts), 3, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    norms = (BatchNormAct2d(3), nn.BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3, affine=False))
    for norm in (*norms, nn.BatchNorm2d(3, track_running_stats=False)):
        single = norm.double()
        synchronised = exact_batch_norm(copy.deepcopy(single))
        for _ in range(2):
            close(synchronised(mine(x, counts)), mine(single(x), counts))
        for name, buffer in single.named_buffers():
            close(synchronised.state_dict()[name].double(), buffer.double())
        whole, part = x.clone().requires_grad_(), mine(x, counts).clone().requires_grad_()
        (single(whole) * x.exp()).sum().backward()
        (synchronised(part) * mine(x, counts).exp()).sum().backward()
        close(part.grad, mine(whole.grad, counts))
        for ours, theirs in zip(synchronised.parameters(), single.parameters(), strict=True):
            close(ranks.sum_(ours.grad.clone()), theirs.grad)
        single.eval(), synchronised.eval()
        close(synchronised(mine(x, counts)), single(mine(x, counts)))
    many = (torch.randn(64 * sum(counts), 4, 12, 12, generator=torch.Generator().manual_seed(3)) + 2.0).contiguous(
        memory_format=torch.channels_last
    )
    norm = exact_batch_norm(nn.BatchNorm2d(4, momentum=1.0))
    norm(mine(many, [64 * count for count in counts]))  # in float32 as good as float64: PyTorch's own is 1e-5 off here
    torch.testing.assert_close(norm.running_mean, many.double().mean((0, 2, 3)).float(), rtol=1.5e-7, atol=0)
    torch.testing.assert_close(norm.running_var, many.double().var((0, 2, 3)).float(), rtol=1.5e-7, atol=0)
    twice = exact_batch_norm(exact_batch_norm(nn.Sequential(nn.BatchNorm1d(3))))
    assert twice(mine(x[:, :, 0, 0], counts).bfloat16()).dtype == torch.bfloat16

    class Odd(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return -super().forward(input)

    with pytest.raises(UserError, match="Odd cannot be synchronised"):
        exact_batch_norm(nn.Sequential(Odd(3)))


def mistakes(counts: list[int], form: str) -> None:
    """A mistake of one process is an error on all: none is left waiting."""
    me, last = ranks.rank(), len(counts) - 1
    forms_cheaper, forms.cheaper = forms.cheaper, lambda *_, **__: form
    try:
        z = [mine(view, counts).clone() for view in images(sum(counts), 8)]
        if me == last:
            z[1][0, 7] = float("nan")
        with pytest.raises(NumbersError, match="z_b holds NaN"):
            barlow_twins_loss(*z)
    finally:
        forms.cheaper = forms_cheaper
    good = torch.randn(counts[me], 8)
    with pytest.raises(UserError, match="lambda must be" if me == last else "another process"):
        barlow_twins_loss(good, good, lambda_=-1.0 if me == last else 0.1)
    with pytest.raises(UserError, match="must have the shape" if me == last else "another process"):
        barlow_twins_loss(good, good[None] if me == last else good)
    with pytest.raises(UserError, match="they must agree"):
        barlow_twins_loss(*[good[:, :7] if me == last else good] * 2)
    with pytest.raises(UserError, match="they must agree"):
        barlow_twins_loss(good, good, lambda_=0.1 * me)
    with pytest.raises(UserError, match=r"at least 2 images .*, given 1"):
        barlow_twins_loss(*[good[:1] if me == last else good[:0]] * 2)


def edges(counts: list[int]) -> None:
    """A process without images, and more processes than features."""
    total, me = sum(counts), ranks.rank()
    for width in (3, 8):
        joined = images(total, width)
        value, gradients = reference.value_and_gradients(joined, LAMBDA)
        uneven = [0] * (len(counts) - 1) + [total]
        for form in ("gram", "correlation") if width >= len(counts) else ("correlation",):
            assert width >= len(counts) or forms.cheaper(total, width, 2, len(counts)) == "correlation"
            forms_cheaper, forms.cheaper = forms.cheaper, lambda *_, form=form, **__: form
            leaves = [view.split(uneven)[me].clone().requires_grad_() for view in joined]
            loss = barlow_twins_loss(*leaves, lambda_=LAMBDA).loss
            forms.cheaper = forms_cheaper
            loss.backward()
            assert loss.item() == pytest.approx(value, rel=1e-10)
            for leaf, gradient in zip(leaves, gradients, strict=True):
                close(leaf.grad, len(counts) * gradient.split(uneven)[me])


def everything(rank: int, world: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    counts = COUNTS[world]
    messages(counts)
    for form in ("gram", "correlation"):
        losses(counts, form)
        mistakes(counts, form)
    for norm in (False, True):
        networks(counts, norm)
    batch_norms(counts)
    edges(counts)
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_the_same_as_one_process(world: int, tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["barlow.microbatch", "timm.layers", "torch.nn.parallel", "pytest"])  # imports once
    arguments = (world, str(tmp_path / "rendezvous"))
    torch.multiprocessing.start_processes(everything, arguments, nprocs=world, start_method="forkserver")


def test_without_a_group() -> None:
    assert (ranks.rank(), ranks.world_size()) == (0, 1)
    assert ranks.broadcast({"a": 1}) == {"a": 1}
    ranks.barrier()
    x = torch.randn(3, 2)
    assert ranks.sum_(x) is x
    assert ranks.gather_rows(x) is x
    assert ranks.integers([1, 2]) == [[1, 2]]
    assert ranks.gather("x") == ["x"]
