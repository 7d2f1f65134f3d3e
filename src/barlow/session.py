"""Where a run is: steps done, what is due, what it has cost, and what goes into the run folder."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, final

import numpy as np
from torch import Tensor

from barlow import ranks
from barlow.batches import Batch
from barlow.checkpoint import Checkpoint
from barlow.console import say
from barlow.held_out import health_lines
from barlow.optimizer_state import flatten_optimizer, parameter_names, unflatten_optimizer
from barlow.prepare import Ready
from barlow.quarantine import Quarantine
from barlow.runlog import Run
from barlow.saver import Saver
from barlow.signals import Deadline

SAVE_SECONDS = 600.0  # between checkpoints, unless checkpoint_every says otherwise
EPOCH_SECONDS = 60.0  # the end of an epoch is saved too, once this long after the last checkpoint
LINES = 2000  # of kind "train" in metrics.jsonl at most
RECENT = 50  # steps that the rate shown is the mean of


@final
class Session:
    """The state of the loop beside the network. ``run`` and ``saver`` are None on all processes but the first."""

    def __init__(self, parts: Ready, run: Run | None, saver: Saver | None, steps: int, deadline: Deadline) -> None:
        self.parts, self.run, self.saver, self.steps, self.deadline = parts, run, saver, steps, deadline
        self.step = 0
        file = run.folder / "quarantine.jsonl" if run else None
        self.quarantine = Quarantine(parts.images, file, parts.config.max_bad or 0.0)
        self.log_every = max(1, steps // LINES)
        self.health_every = parts.config.health_every or int(np.clip(steps // 20, 20, 500))
        self.started = self.saved = self._last = time.monotonic()
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)

    @property
    def epoch(self) -> float:
        """Passes over the training images so far."""
        return self.step * self.parts.source.batch_size / len(self.parts.source.train)

    def took(self, batch: Batch, waited: float) -> None:
        """Counts a step that is done. DataError when too many images are bad."""
        now = time.monotonic()
        self._recent.append((now - self._last, waited))
        self._last, self.step = now, batch.step + 1
        self.quarantine.add(len(batch.images), batch.bad)

    def due(self, every: int) -> bool:
        """True on every so many steps and on the last."""
        return self.step % every == 0 or self.step == self.steps

    def save_due(self) -> bool:
        """True when this process holds that a checkpoint is due."""
        every, since = self.parts.config.checkpoint_every, time.monotonic() - self.saved
        if every is not None:
            return self.due(every)
        ended = int(self.epoch) > int((self.step - 1) * self.parts.source.batch_size / len(self.parts.source.train))
        return self.step == self.steps or since > SAVE_SECONDS or (ended and since > EPOCH_SECONDS)

    def out_of_time(self) -> bool:
        """True when the time limit is near enough that the next steps and a save might not fit in it."""
        slowest = max((took for took, _ in self._recent), default=0.0)
        return self.deadline.near(slowest, self.saver.seconds if self.saver else 0.0)

    def speed(self) -> dict[str, float]:
        """images_per_s over all processes, data_wait (share of the time, 0 to 1), seconds_left; of the last steps."""
        took = sum(seconds for seconds, _ in self._recent) or 1e-9
        rate = len(self._recent) / took
        return {
            "images_per_s": rate * self.parts.source.batch_size,
            "data_wait": sum(waited for _, waited in self._recent) / took,
            "seconds_left": (self.steps - self.step) / rate if rate else 0.0,
        }

    def log(self, kind: str, **values: Any) -> None:
        """One line of metrics.jsonl, written by the first process only."""
        if self.run:
            self.run.log(kind, self.step, **values)

    def log_speed(self) -> None:
        """The line of kind "speed"."""
        now = self.speed()
        self.log("speed", images_per_s=now["images_per_s"], data_wait=now["data_wait"],
                 seconds=time.monotonic() - self.started)  # fmt: skip

    def look(self, *, warm_up: bool) -> dict[str, Any]:
        """Looks at the held-out images: health lines and a snapshot; returns what the display shows."""
        if self.run is None:
            return {}
        parts = self.parts
        out = parts.held_out.outputs(parts.network, parts.fabric.autocast)
        lines = health_lines(self.step, out, warm_up=warm_up)
        for line in lines:
            self.log("health", **{k: v for k, v in line.items() if k not in ("kind", "step")})
        arrays = {"features": out["features"].numpy()}
        arrays |= {name: _half(out[name]) for name in ("embedding_a", "embedding_b")}
        try:
            self.run.snapshot(f"step-{self.step:07d}", **arrays)
        except OSError as error:
            self.warn(error)
        return {"twins_found": lines[0]["twins_found"], "verdict": lines[1]["verdict"]}

    def save(self) -> None:
        """Writes a checkpoint beside the training; a disk that refuses is a warning, and the next save tries again."""
        self.saved = time.monotonic()
        if self.run is None or self.saver is None:
            return
        network, optimizer = self.parts.network, self.parts.optimizer
        names = parameter_names(optimizer.param_groups, network.named_parameters())
        slots, numbers = flatten_optimizer(optimizer.state_dict(), names)
        tensors = {f"model/{k}": v for k, v in network.state_dict().items()}
        tensors |= {f"optimizer/{k}": v for k, v in slots.items()}
        try:
            self.run.sync()
            self.saver.save(self.step, tensors, {"optimizer": numbers})
        except OSError as error:  # SaveFailed is one: of the save before, and this one is its retry
            self.warn(error)

    def settle(self) -> bool:
        """Waits for the save under way and, where it failed, tries once more; False when that fails too."""
        for attempt in range(2):
            try:
                if self.saver:
                    self.saver.join()
                return True
            except OSError as error:
                self.warn(error)
                if attempt == 0:
                    self.save()
        return False

    def warn(self, error: OSError) -> None:
        """A disk that refuses costs a warning, not the run."""
        say(f"warning: {error}")
        self.log("event", message=str(error))

    def restore(self, saved: Checkpoint) -> None:
        """Takes network, optimiser and step from a checkpoint, on every process."""
        network, optimizer = self.parts.network, self.parts.optimizer
        network.load_state_dict(saved.group("model"))
        names = parameter_names(optimizer.param_groups, network.named_parameters())
        state = unflatten_optimizer(saved.group("optimizer"), saved.state["optimizer"], optimizer.state_dict(), names)
        optimizer.load_state_dict(state)
        self.step = saved.step


def _half(z: Tensor) -> Any:
    """Half precision is enough for a picture; values beyond its range stay at its ends."""
    return z.clamp(-65504, 65504).half().numpy()


def agree(*flags: bool) -> list[bool]:
    """Each flag as any process holds it: all stop, or save, at the same step."""
    rows = ranks.integers([int(flag) for flag in flags])
    return [any(row[i] for row in rows) for i in range(len(flags))]
