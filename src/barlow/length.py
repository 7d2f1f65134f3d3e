"""How long a run is: epochs or minutes become a number of steps, once, measured where they must be."""

from __future__ import annotations

import time
from bisect import bisect_right
from contextlib import closing
from dataclasses import dataclass

import torch

from barlow import ranks
from barlow.config import Config
from barlow.cores import CoreWait, Wait
from barlow.endings import out_of_memory_in_words
from barlow.held_out import health_lines
from barlow.launch import patience
from barlow.looks import LIDAR, looks
from barlow.plan import Choice
from barlow.prepare import Ready
from barlow.readers import batches, how_many
from barlow.train import one_step

TRIAL_SECONDS = 6.0  # of timed steps at most; less where the whole run is short
TRIAL_STEPS = 200  # at most
FINISH_SECONDS = 6.0  # for the last save, the encoder and the report


@dataclass(frozen=True)
class Pace:
    """What was measured: seconds a step, seconds a look at the held-out images, and the wait for a core meanwhile."""

    step: float
    look: float
    wait: Wait

    def whole(self, steps: int, config: Config) -> float:
        """Seconds that a run of so many steps takes, with its looks, LiDAR, the last save and the report."""
        return steps * self.step + (looks(config, steps).count + LIDAR) * self.look + FINISH_SECONDS

    def steps_in(self, seconds: float, config: Config) -> int:
        """The most steps that take so long, at least one."""
        return max(1, bisect_right(range(1, 10**9), seconds, key=lambda steps: self.whole(steps, config)))


def steps_of_epochs(config: Config, images: int) -> Choice:
    """The number of steps that are ``config.epochs`` passes over the training images."""
    train = images - (config.held_out or 0)
    steps = max(1, round((config.epochs or 0) * train / (config.batch_size or 1)))
    return Choice("steps", steps, f"{config.epochs:g} epochs of {train:,} images")


def steps_of_minutes(config: Config, pace: Pace, images: int, left: float) -> Choice:
    """The number of steps that fit in the ``left`` seconds of ``config.minutes``, at the ``pace`` that was measured.

    The machine may be busier later, and the run longer: the number stays, for a resume must be exact. ``images``: those
    trained on.
    """
    steps: int = ranks.broadcast(pace.steps_in(left, config))
    epochs = steps * (config.batch_size or 1) / images
    length = "1 minute" if config.minutes == 1 else f"{config.minutes:g} minutes"
    return Choice("steps", steps, f"{length} at {pace.step * 1e3:.0f} ms each; {epochs:.1f} epochs")


def trial(parts: Ready, seconds: float) -> Pace:
    """The pace of throw-away steps of ``parts``, read by as many workers as the run will have."""
    source = parts.source

    def timed(count: int) -> float:
        begun = time.monotonic()
        for _ in range(count):
            batch, _ = next(coming)
            one_step(parts, batch, 10**6)
        if parts.fabric.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.monotonic() - begun) / count

    workers, _ = how_many(source, parts.config.workers or 0)
    with (
        out_of_memory_in_words(parts),
        closing(batches(source, 0, TRIAL_STEPS + 4, workers, patience=patience(parts.config))) as coming,
    ):
        waiting = CoreWait()
        timed(2)  # the first steps pay for allocations and for starting workers
        once = timed(2)
        count = ranks.broadcast(max(3, min(TRIAL_STEPS, int(seconds / once))))
        each = timed(count)
        wait = waiting.look()
    begun = time.monotonic()
    health_lines(0, parts.held_out.outputs(parts.network, parts.fabric.autocast), warm_up=True,
                 shared=len(parts.network.encoders) == 1)  # fmt: skip
    return Pace(each, time.monotonic() - begun, wait)
