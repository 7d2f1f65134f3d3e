"""A network built within bounds: no larger than its file of weights allows, the process's chance left as it was."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from barlow.errors import UserError


class _Left(threading.local):
    """What this thread may still register; the hook below sees the networks of all threads."""

    parameters: float = math.inf
    numbers: float = math.inf


_left = _Left()


@contextmanager
def bounded(weights: Path) -> Iterator[None]:
    """Within it, what this thread builds is given up (ValueError) as soon as it is far larger than ``weights``, a
    safetensors file: a stranger's config must not take all memory, or hours. torch's generator of random numbers is
    afterwards as it was before. UserError where the file cannot be read."""
    try:
        with safe_open(weights, "pt") as file:
            sizes = [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"The encoder's weights {weights} cannot be read: {error}.") from None
    _left.parameters, _left.numbers = 1000 + 4 * len(sizes), 10**7 + 4 * sum(sizes)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        _left.parameters = _left.numbers = math.inf


def _count(_: nn.Module, __: str, parameter: Tensor) -> None:
    if _left.parameters == math.inf:  # somebody else's network
        return
    _left.parameters -= 1
    _left.numbers -= parameter.numel()
    if _left.parameters < 0 or _left.numbers < 0:
        raise ValueError("it would be far larger than its weights")


# Once, and kept: to add or remove one breaks the loop of another thread that registers a parameter at that moment.
register_module_parameter_registration_hook(_count)
