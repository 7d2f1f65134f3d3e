"""When a run looks at its held-out images: often enough to be warned early, seldom enough to cost next to nothing.

A pure function of the settings and the number of steps, so a run that is resumed looks where it would have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from barlow.config import Config
from barlow.held_out import LIDAR_VIEWS

SHARE = 0.02  # of the time of a run goes into looks at most, LiDAR at the end included
VERSIONS = 3  # of each held-out image that a look shows the network: clean, and two views
LIDAR = LIDAR_VIEWS / VERSIONS  # looks that LiDAR is as long as
MEASURES = 1.15  # a look beside its passes of the network alone (docs/log.md, "Looks at two per cent")
PASSES = 3  # of the network that training on an image takes: forward, and back for inputs and for weights
EARLY = 4  # looks between warm-up and a tenth of the run: an alarm needs two in a row, and some faults show late
APART = 4  # steps between two of those at least
FIRST_STEPS = 30  # at least, in which a low rank is no alarm


@dataclass(frozen=True)
class Looks:
    """Before the first of ``steps`` steps, after the last, after every ``every``-th, and at the ``early`` ones."""

    steps: int
    every: int
    early: tuple[int, ...] = ()

    def due(self, step: int) -> bool:
        """Whether to look when so many steps are done."""
        return step in (0, self.steps) or step % self.every == 0 or step in self.early

    @property
    def count(self) -> int:
        """How many looks there are."""
        return 2 + (self.steps - 1) // self.every + sum(1 for step in self.early if step % self.every)


def looks(config: Config, steps: int) -> Looks:
    """The looks of a run of so many steps: about twenty, at least one every 500 steps, and before a tenth of the run
    enough for an alarm, all as far as ``SHARE`` allows.

    Runs of less than some 400 steps are warmed up too late for an alarm so early. A run too short for any look within
    ``SHARE`` (less than some 200 steps of the automatic settings) still has one in the middle. ``health_every``, where
    it is given, is obeyed instead.
    """
    if config.health_every:
        return Looks(steps, config.health_every)
    usual = int(np.clip(steps // 20, 20, 500))
    left = SHARE * steps / cost(config) - LIDAR - 2  # looks between the first and the last
    ready, tenth = warm_up(config, steps), steps // 10
    extra = min(EARLY, int(max(2, left / 2)), (tenth - ready) // APART) if left >= 3 else 0
    even = max(usual, min(math.ceil(steps / max(left - max(extra, 0), 1)), math.ceil(steps / 2)))
    if extra < 2 or even * extra <= tenth - ready:
        return Looks(steps, even)
    return Looks(steps, even, tuple(ready + (tenth - ready) * k // extra for k in range(1, extra + 1)))


def cost(config: Config) -> float:
    """Steps that take as long as a look, by the images that the network sees in each; on one device."""
    views = len(config.views) if isinstance(config.views, tuple) else 2
    trained = PASSES * views * (config.batch_size or 1)
    return MEASURES * VERSIONS * (config.held_out or 1) / trained


def warm_up(config: Config, steps: int) -> int:
    """Steps in which few directions are learned, which is no alarm: the rate's warm-up, and at least thirty."""
    return max(FIRST_STEPS, math.ceil((config.warmup or 0.0) * steps))
