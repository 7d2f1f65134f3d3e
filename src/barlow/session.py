"""Where a run is: steps done, what is due, what it has cost, and what goes into the run folder."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Collection
from itertools import groupby
from pathlib import Path
from typing import Any, final

from torch import Tensor

from barlow import ranks
from barlow.agreement import together
from barlow.batches import Batch
from barlow.checkpoint import Checkpoint
from barlow.config import to_toml
from barlow.console import say
from barlow.cores import CoreWait
from barlow.errors import NumbersError
from barlow.held_out import health_lines
from barlow.images import Bad
from barlow.looks import looks
from barlow.optimizer_state import flatten_optimizer, parameter_names, unflatten_optimizer
from barlow.prepare import Ready
from barlow.quarantine import Quarantine
from barlow.readers import how_many
from barlow.resume import fitting
from barlow.runlog import Run, read_metrics
from barlow.saver import Saver
from barlow.signals import Deadline
from barlow.verdict import is_alarm
from barlow.watch import Watch

SAVE_SECONDS = 600.0  # between checkpoints, unless checkpoint_every says otherwise
SAVE_SHARE = 0.02  # of the time at most goes into saving at the ends of epochs, which may be short
MEASURE = "twins_found"  # by it the best checkpoint is known without labels: it ranked runs best (docs/log.md)
LINES = 2000  # of kind "train" in metrics.jsonl at most
LATELY = 10  # of them, whose mean diagonal says whether the views in training agree
SKIPPED = 50  # steps in a row that float16 may skip: each halves the scale of the loss, from 65,536
TOO_LARGE = "the learning rate is probably too large"
RECENT = 50  # steps that the rate shown is the mean of


def usual_cause(lr: float | None) -> str:
    """What to try after numbers that are not finite."""
    return f"The usual cause is a learning rate that is too large: try --lr {(lr or 0.0) / 3:.2g} in a new --out."


@final
class Session:
    """The state of the loop beside the network. ``run`` and ``saver`` are None on all processes but the first.

    ``skipped``: steps that float16 has skipped for overflow. ``best``: the step of the best checkpoint and its measure.
    """

    def __init__(self, parts: Ready, run: Run | None, saver: Saver | None, steps: int, deadline: Deadline) -> None:
        self.parts, self.run, self.saver, self.steps, self.deadline = parts, run, saver, steps, deadline
        self.step, self.skipped, self.in_a_row = 0, 0, 0
        self.measure, self.best = 0.0, (0, 0.0)
        self.losses: list[float] = []  # those logged
        self.diagonals: list[float] = []  # mean diagonals, likewise
        self.first: float | None = None  # how near the untrained network's twins are, once it has been looked at
        self.worried = False
        self.waiting, self._crowded = CoreWait(), False  # whether the user has been told that cores are short
        self._saved_step = -1
        self._refused = False  # metrics.jsonl did not reach the disk, so no save was begun
        self._told: set[str] = set()
        self.watch = Watch()
        self.quarantine: Quarantine | None = None
        self.log_every = max(1, steps // LINES)
        self.looks = looks(parts.config, steps)
        self.started = self.saved = self._last = time.monotonic()
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)

    @property
    def epoch(self) -> float:
        """Passes over the training images so far."""
        return self.step * self.parts.source.batch_size / len(self.parts.source.train)

    @property
    def seen(self) -> int:
        """Images that were tried so far: the held-out ones, and those of the steps."""
        return (self.parts.config.held_out or 0) + self.step * self.parts.source.batch_size

    def begin(self) -> None:
        """Once the step is known: the quarantine of a run that is resumed goes on where it was."""
        with together():  # the disk of the first process may refuse
            if self.run:
                share, file = self.parts.config.max_bad or 0.0, self.run.folder / "quarantine.jsonl"
                self.quarantine = Quarantine(self.parts.images, file, share, self.seen)
        self.tell(self.parts.held_out.bad if ranks.rank() == 0 else [])
        self._saved_step = self.step
        self.started = self.saved = self._last = time.monotonic()

    def recall(self) -> None:
        """After a resume: what metrics.jsonl tells of looks and losses, so that alarms come when they would have."""
        told = read_metrics(self.run.folder / "metrics.jsonl") if self.run else []
        looks = [line for line in told if line["kind"] == "health"]
        for _, look in groupby(looks, key=lambda line: int(line["step"])):
            self.watch.see(look)
        self.first = next(
            (line["twins_near"] for line in looks if line["step"] == 0 and "twins_near_first" in line), None
        )
        self.losses, self.diagonals = (
            [math.nan if line.get(name) is None else line[name] for line in told if line["kind"] == "train"]
            for name in ("loss", "diagonal")
        )
        self.started -= next((line["seconds"] for line in reversed(told) if line["kind"] == "speed"), 0.0)
        self.worried = any(TOO_LARGE in line["message"] for line in told if line["kind"] == "event")

    def took(self, batch: Batch, waited: float, skipped: bool) -> None:
        """Counts a step that is done. NumbersError when float16 has skipped too many in a row."""
        now = time.monotonic()
        self._recent.append((now - self._last, waited))
        self._last, self.step = now, batch.step + 1
        self.skipped, self.in_a_row = self.skipped + skipped, self.in_a_row + 1 if skipped else 0
        if self.quarantine:
            self.quarantine.seen = min(self.seen, len(self.parts.images))
        if self.in_a_row > SKIPPED:
            raise NumbersError(f"float16 has skipped {SKIPPED} steps in a row, for their gradients overflow")

    def readers(self) -> int:
        """How many workers read images: as many as the settings say, or fewer where shared memory is small."""
        fit, advice = how_many(self.parts.source, self.parts.config.workers or 0)
        if advice and ranks.rank() == 0:
            self.note(advice)
        return fit

    def news(self, batch: Batch | None) -> list[Bad]:
        """The bad images in a batch that this process has not told yet."""
        return [] if batch is None else [bad for bad in batch.bad if bad.key not in self._told]

    def tell(self, news: list[Bad]) -> None:
        """Hands new bad images of all processes to the quarantine. DataError, on all, when there are too many."""
        self._told.update(bad.key for bad in news)
        everyone: list[list[tuple[int, str, str, bool]]] = ranks.gather([(*bad,) for bad in news])
        with together():
            if self.quarantine:
                self.quarantine.add(Bad(*bad) for part in everyone for bad in part)

    def due(self, every: int) -> bool:
        """True on every so many steps and on the last."""
        return self.step % every == 0 or self.step == self.steps

    def save_due(self) -> bool:
        """True when this process holds that a checkpoint is due: every so many steps where the settings say so; else
        after ten minutes, and at each end of an epoch that is long enough for it."""
        if self.step == self._saved_step:
            return False
        every, since = self.parts.config.checkpoint_every, time.monotonic() - self.saved
        if every is not None:
            return self.due(every)
        ended = int(self.epoch) > int((self.step - 1) * self.parts.source.batch_size / len(self.parts.source.train))
        long_enough = self.saver is not None and self.saver.seconds < SAVE_SHARE * since
        return self.step == self.steps or since > SAVE_SECONDS or (ended and long_enough)

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

    def log_speed(self) -> dict[str, float]:
        """The line of kind "speed"; returns of it what the display shows. Warns, once, where cores are short."""
        now, wait = self.speed(), self.waiting.look()
        self.log("speed", images_per_s=now["images_per_s"], data_wait=now["data_wait"], core_wait=wait.worst,
                 seconds=time.monotonic() - self.started)  # fmt: skip
        advice = wait.advice(self.parts.config.threads or 1)
        if advice and self.run and not self._crowded:
            self._crowded = True
            self.warn(advice)
        return {"core_wait": wait.worst}

    def look(self, *, warm_up: bool) -> dict[str, Any]:
        """Looks at the held-out images: health lines and a snapshot; returns what the display shows.

        Nothing is measured where their features are not finite: a step or a save that meets it will end the run.
        """
        if self.run is None:
            return {}
        parts = self.parts
        out = parts.held_out.outputs(parts.network, parts.fabric.autocast)
        if not all(bool(values.isfinite().all()) for values in out.values()):
            self.warn(f"step {self.step:,}: the held-out images have features that are not finite: {TOO_LARGE}")
            return {}
        lately = statistics.fmean(self.diagonals[-LATELY:]) if self.diagonals else None
        lines = health_lines(self.step, out, warm_up=warm_up, shared=len(parts.network.encoders) == 1,
                             train_diagonal=lately, first=self.first)  # fmt: skip
        self.first = lines[-1].get("twins_near_first")
        if self.step == self.steps:
            for of, value in parts.held_out.lidar(parts.network, parts.fabric.autocast).items():
                next(line for line in lines if line["of"] == of)["lidar"] = value
        for line in lines:
            self.log("health", **{k: v for k, v in line.items() if k not in ("kind", "step")})
        found = next(line[MEASURE] for line in lines if MEASURE in line)
        self.measure = float(found)
        for alarm in self.watch.see(lines):
            say(f"warning: step {self.step:,}: {alarm}")
            self.log("event", message=alarm)
        arrays = {"features": out["features"].numpy()}
        arrays |= {name: _half(out[name]) for name in ("embedding_a", "embedding_b")}
        try:
            self.run.snapshot(f"step-{self.step:07d}", **arrays)
        except OSError as error:
            self.warn(f"the snapshot of step {self.step:,} could not be written: {error.strerror or error}")
        worst = next((line for line in lines if is_alarm(line["verdict"])), lines[-1])
        return {"twins_found": found, "verdict": worst["verdict"]}

    def save(self) -> None:
        """Writes a checkpoint beside the training; a disk that refuses is a warning, and the next save tries again."""
        self.saved, self._saved_step = time.monotonic(), self.step
        if self.run is None or self.saver is None:
            return
        network, optimizer, scaler = self.parts.network, self.parts.optimizer, self.parts.scaler
        names = parameter_names(optimizer.param_groups, network.named_parameters())
        slots, numbers = flatten_optimizer(optimizer.state_dict(), names)
        tensors = {f"model/{k}": v for k, v in network.state_dict().items()}
        tensors |= {f"optimizer/{k}": v for k, v in slots.items()}
        if self.measure > self.best[1]:
            self.best = (self.step, self.measure)
        state = {"settings": to_toml(self.parts.config), "optimizer": numbers, "measure": self.measure,
                 "best": self.best, "skipped": self.skipped, "in_a_row": self.in_a_row,
                 "scaler": scaler.state_dict() if scaler else None}  # fmt: skip
        if self.quarantine:
            self.quarantine.append()
        self._refused = True
        try:
            self.run.sync()
            self._refused = False
            self.saver.save(self.step, tensors, state, best=self.best[0])
        except NumbersError as error:  # statistics can overflow where the loss and its gradients do not
            raise NumbersError(f"{error}. {usual_cause(self.parts.config.lr)}") from error
        except OSError as error:  # SaveFailed is one: of the save before, and this one is its retry
            self.warn(error)

    def settle(self) -> bool:
        """Waits for the save under way and, where it failed, tries once more; False when that fails too."""
        for attempt in range(2):
            try:
                if self.saver:
                    self.saver.join()
                if not self._refused:
                    return True
            except OSError as error:
                self.warn(error)
            if attempt == 0:
                self.save()
        return False

    def warn(self, what: object) -> None:
        """Says and writes down what costs a warning, not the run: a disk that refuses, cores that are short."""
        say(f"warning: {what}")
        self.log("event", message=str(what))

    def note(self, what: str) -> None:
        """Says and writes down what is worth knowing."""
        say(f"note: {what}")
        self.log("event", message=what)

    def restore(self, saved: Checkpoint, where: Path, allow: Collection[str] = ()) -> None:
        """Takes network, optimiser and step from a checkpoint, on every process. UserError when they do not fit."""
        network, optimizer = self.parts.network, self.parts.optimizer
        theirs, ours = saved.group("model"), network.state_dict()
        if fitting(theirs, ours, where, allow):
            network.load_state_dict(theirs)
            names = parameter_names(optimizer.param_groups, network.named_parameters())
            slots, numbers = saved.group("optimizer"), saved.state.get("optimizer", {})
            optimizer.load_state_dict(unflatten_optimizer(slots, numbers, optimizer.state_dict(), names))
        else:
            network.load_state_dict(ours | {k: v for k, v in theirs.items() if k in ours and v.shape == ours[k].shape})
        self.step = saved.step
        self.measure, self.best = saved.state.get("measure", 0.0), tuple(saved.state.get("best", (0, 0.0)))
        self.skipped, self.in_a_row = saved.state.get("skipped", 0), saved.state.get("in_a_row", 0)
        if self.parts.scaler and saved.state.get("scaler"):
            self.parts.scaler.load_state_dict(saved.state["scaler"])


def _half(z: Tensor) -> Any:
    """Half precision is enough for a picture; values beyond its range stay at its ends."""
    return z.clamp(-65504, 65504).half().numpy()
