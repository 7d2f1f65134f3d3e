from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from timm.optim import Lars
from torch import nn

from barlow.checkpoint import load, save
from barlow.errors import UserError
from barlow.optimizer_state import flatten_optimizer, parameter_names, unflatten_optimizer


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def optimizer(net: nn.Module, kind: str, turned: bool = False) -> torch.optim.Optimizer:
    weights = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    if turned:
        weights, others = weights[::-1], others[::-1]
    groups = [{"params": weights, "weight_decay": 1e-2}, {"params": others, "weight_decay": 0.0, "lr": 1e-2}]
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.95), amsgrad=True)
    return Lars(groups, lr=1e-3, momentum=0.9) if kind == "lars" else torch.optim.SGD(groups, lr=1e-3, momentum=0.9)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        images = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(images).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "lars", "sgd"])
@pytest.mark.parametrize("turned", [False, True])
def test_through_a_checkpoint_the_training_goes_on_to_the_bit(tmp_path: Path, kind: str, turned: bool) -> None:
    whole = network()
    there = optimizer(whole, kind)
    train(whole, there, range(9))

    first = network()
    before = optimizer(first, kind)
    train(first, before, range(4))
    names = parameter_names(before.param_groups, first.named_parameters())
    tensors, about = flatten_optimizer(before.state_dict(), names)
    everything = {f"model/{key}": value for key, value in first.state_dict().items()}
    everything |= {f"optimizer/{key}": value for key, value in tensors.items()}
    back = load(save(tmp_path, 4, everything, {"optimizer": about}))

    second = network()
    after = optimizer(second, kind, turned)  # the order within a group may differ: names count, not numbers
    second.load_state_dict(back.group("model"))
    names = parameter_names(after.param_groups, second.named_parameters())
    state = unflatten_optimizer(back.group("optimizer"), back.state["optimizer"], after.state_dict(), names)
    after.load_state_dict(state)
    train(second, after, range(4, 9))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    if not turned:
        assert after.state_dict()["param_groups"] == there.state_dict()["param_groups"]
        assert after.state_dict()["state"].keys() == there.state_dict()["state"].keys()


def test_every_trained_parameter_is_in_exactly_one_group() -> None:
    net = network()
    trained = dict(net.named_parameters())
    one, *rest = trained.values()
    good = [{"params": [one]}, {"params": rest}]
    assert parameter_names(good, trained.items()) == list(trained)
    with pytest.raises(ValueError, match=r"does not train 3\.bias \(1 parameters"):
        parameter_names([{"params": [one]}, {"params": rest[:-1]}], trained.items())
    with pytest.raises(ValueError, match="in two groups"):
        parameter_names([{"params": [one]}, {"params": [one, *rest]}], trained.items())
    with pytest.raises(ValueError, match="1 parameters of the optimiser are not"):
        parameter_names([*good, {"params": [nn.Parameter(torch.ones(1))]}], trained.items())
    one.requires_grad_(False)
    assert parameter_names(good[1:], trained.items()) == list(trained)[1:]
    with pytest.raises(ValueError, match="1 parameters of the optimiser are not"):
        parameter_names(good, trained.items())


def test_names_must_fit_the_numbers() -> None:
    state = optimizer(network(), "sgd").state_dict()
    with pytest.raises(ValueError, match="do not fit"):
        flatten_optimizer(state, ["a", "b"])


def test_another_optimiser_is_refused_in_a_sentence() -> None:
    net = network()
    old = optimizer(net, "adamw")
    train(net, old, range(1))
    names = parameter_names(old.param_groups, net.named_parameters())
    tensors, about = flatten_optimizer(old.state_dict(), names)
    state = old.state_dict()

    def refused(match: str, tensors=tensors, about=about, names=names) -> None:  # type: ignore[no-untyped-def]
        with pytest.raises(UserError, match=match):
            unflatten_optimizer(tensors, json.loads(json.dumps(about)), state, names)

    unflatten_optimizer(tensors, about, state, names)
    first, second = about["groups"]
    refused("other parameter groups than this one$", about={**about, "groups": [second, first]})
    refused("other parameter groups", about={**about, "groups": [first]})
    one, other = first["params"][1], second["params"][1]
    swapped = [first["params"][0], other], [one if name == other else name for name in second["params"]]
    mixed = [{**group, "params": params} for group, params in zip(about["groups"], swapped, strict=True)]
    refused("other parameter groups than this one$", about={**about, "groups": mixed})
    refused("for example 0.weight", about={**about, "groups": [{**first, "params": ["3.weight"]}, second]})
    refused("other parameter groups", about={**about, "groups": [{**first, "params": [*first["params"]] * 2}, second]})
    refused(r"holds optimiser state 'exp_avg' of 'evil'", tensors={**tensors, "exp_avg/evil": torch.ones(1)})
    refused("is not understood", about={})
    refused("is not understood", about={**about, "groups": 7})
    refused("is not understood", about={**about, "numbers": {"evil": {"step": 1}}})
