"""How long a run is: epochs or minutes become a number of steps, once, measured where they must be."""

from __future__ import annotations

import time

import torch

from barlow import ranks
from barlow.config import Config
from barlow.plan import Choice
from barlow.prepare import Ready
from barlow.train import one_step

TRIAL_SECONDS = 6.0  # of timed steps at most; less where the whole run is short
FINISH_SECONDS = 6.0  # for the last save, the encoder and the report
LOOKS = 25  # at the held-out images in a short run: twenty-one, and ten views of each for LiDAR at the end


def steps_of_epochs(config: Config, images: int) -> Choice:
    """The number of steps that are ``config.epochs`` passes over the training images."""
    train = images - (config.held_out or 0)
    steps = max(1, round((config.epochs or 0) * train / (config.batch_size or 1)))
    return Choice("steps", steps, f"{config.epochs:g} epochs of {train:,} images")


def steps_of_minutes(parts: Ready, started: float) -> Choice:
    """The number of steps that fit in ``config.minutes`` from ``started`` (of time.monotonic) on, as measured now."""
    minutes = parts.config.minutes or 0.0
    seconds, looking = trial(parts, min(TRIAL_SECONDS, 1.5 * minutes))
    left = minutes * 60 - (time.monotonic() - started) - FINISH_SECONDS - LOOKS * looking
    steps: int = ranks.broadcast(max(1, int(left / seconds)))
    epochs = steps * parts.source.batch_size / len(parts.source.train)
    length = "1 minute" if minutes == 1 else f"{minutes:g} minutes"
    return Choice("steps", steps, f"{length} at {seconds * 1e3:.0f} ms each; {epochs:.1f} epochs")


def trial(parts: Ready, seconds: float) -> tuple[float, float]:
    """(seconds a step, seconds a look at the held-out images), measured on throw-away steps of ``parts``."""

    def timed(first: int, count: int) -> float:
        begun = time.monotonic()
        for step in range(first, first + count):
            one_step(parts, parts.source[step], 10**6)
        if parts.fabric.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.monotonic() - begun) / count

    timed(0, 2)  # the first steps pay for allocations
    once = timed(2, 2)
    count = ranks.broadcast(max(3, min(200, int(seconds / once))))
    each = timed(4, count)
    begun = time.monotonic()
    parts.held_out.outputs(parts.network, parts.fabric.autocast)
    return each, time.monotonic() - begun


def whole(steps: int, seconds: float, looking: float) -> float:
    """Seconds that a run of so many steps takes, from what ``trial`` measured."""
    return steps * seconds + LOOKS * looking + FINISH_SECONDS
