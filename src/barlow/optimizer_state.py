"""The state of an optimiser by parameter name instead of by number, as tensors and JSON: what a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from barlow.errors import UserError


def parameter_names(groups: Sequence[Mapping[str, Any]], named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The name of each parameter in the order of ``optimizer.param_groups``: the numbers of ``optimizer.state_dict()``.

    ``named``: ``network.named_parameters()``. Raises ValueError unless every parameter that is trained
    (``requires_grad``) is in exactly one group and every one in a group has a name.
    """
    names = {id(parameter): name for name, parameter in named if parameter.requires_grad}
    order = [id(parameter) for group in groups for parameter in group["params"]]
    if len(set(order)) != len(order):
        raise ValueError("a parameter is in two groups of the optimiser")
    if unknown := set(order) - names.keys():
        raise ValueError(f"{len(unknown)} parameters of the optimiser are not trained parameters of the network")
    if missing := [name for key, name in names.items() if key not in set(order)]:
        raise ValueError(f"the optimiser does not train {missing[0]} ({len(missing)} parameters in no group)")
    return [names[key] for key in order]


def flatten_optimizer(state: Mapping[str, Any], names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """``optimizer.state_dict()`` → (tensors by ``slot/parameter name``, JSON with the groups and what is no tensor).

    ``names``: from ``parameter_names``. Raises ValueError when they do not fit the groups.
    """
    if sorted(number for group in state["param_groups"] for number in group["params"]) != list(range(len(names))):
        raise ValueError("the names do not fit the parameters of the optimiser")
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for number, slots in state["state"].items():
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{slot}/{names[number]}"] = value
            else:
                numbers.setdefault(names[number], {})[slot] = value
    groups = []
    for group in state["param_groups"]:
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        groups.append({**options, "params": [names[number] for number in group["params"]]})
    return tensors, {"groups": groups, "numbers": numbers}


def unflatten_optimizer(
    tensors: Mapping[str, Tensor], saved: Mapping[str, Any], state: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """The inverse: what ``optimizer.load_state_dict`` takes.

    ``state``, ``names``: of the optimiser that is to continue, ``optimizer.state_dict()`` and ``parameter_names``.
    Raises UserError unless it has the same groups of the same parameters, and every tensor belongs to one of them.
    """
    try:
        return renumber(tensors, saved, state, names)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the optimiser state of the checkpoint is not understood ({error!r})") from error


def renumber(
    tensors: Mapping[str, Tensor], saved: Mapping[str, Any], state: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    now = [{names[number] for number in group["params"]} for group in state["param_groups"]]
    then = [group["params"] for group in saved["groups"]]
    if [len(group) for group in then] != [len(group) for group in now] or [set(group) for group in then] != now:
        differ = sorted({name for group in then for name in group} ^ set(names))
        example = f", for example {differ[0]}" if differ else ""
        raise UserError(f"the optimiser of the checkpoint has other parameter groups than this one{example}")
    options_now, options_then = (
        sorted({key for group in groups for key in group} - {"params", "param_names"})
        for groups in (state["param_groups"], saved["groups"])
    )
    if options_now != options_then:
        raise UserError("the optimiser of the checkpoint is another one, whose state this one cannot take")
    number_of = {name: number for number, name in enumerate(names)}
    slots: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        slot, _, name = key.partition("/")
        if name not in number_of:
            raise UserError(f"the checkpoint holds optimiser state {slot!r} of {name!r}, which is not trained here")
        slots.setdefault(number_of[name], {})[slot] = tensor
    for name, values in saved["numbers"].items():
        slots.setdefault(number_of[name], {}).update(values)
    # Rates and decay are those of the settings, which a resume may have been given anew; all else is equal.
    return {"state": dict(sorted(slots.items())), "param_groups": list(state["param_groups"])}
