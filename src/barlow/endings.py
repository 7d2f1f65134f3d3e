"""How a run ends before its end: each way with its sentence, its exit code, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGTERM, SIGUSR1, Signals
from typing import Any

from barlow import ranks
from barlow.batches import Batch
from barlow.console import in_shell
from barlow.errors import DataError, NumbersError, Stopped, UserError
from barlow.files import atomic_write
from barlow.launch import requeue
from barlow.prepare import Ready
from barlow.readers import WorkerLost
from barlow.report import draw_report
from barlow.resources import explain_out_of_memory, is_out_of_memory, peak_memory
from barlow.runlog import jsonable
from barlow.session import Session, usual_cause
from barlow.signals import EXIT_CODES, StopRequest


class NotFinite(NumbersError):
    """A loss or a gradient that is not finite, with the terms of the loss as far as they are known."""

    def __init__(self, sentence: str, terms: dict[str, Any] | None = None) -> None:
        super().__init__(sentence)
        self.terms = terms


def farewell(session: Session, stop: StopRequest) -> Stopped:
    """What to tell someone whose run stops on a signal or on time. Under SLURM its signal also requeues the job."""
    saved = session.settle()
    heard = [Signals(number) for (number,) in ranks.integers([stop.signal or 0]) if number]  # perhaps by another one
    why, code = (f"signal {heard[0].name}", EXIT_CODES[heard[0]]) if heard else ("the time limit", 75)
    again = requeue(os.environ) if heard and code == 75 and ranks.rank() == 0 else None
    return Stopped(
        f"Stopped by {why} after step {session.step:,} of {session.steps:,}, {kept(session, saved)}. "
        + (f"SLURM: {again}. " if again else "")
        + way_on(session),
        code,
    )


def trouble(session: Session, error: Exception) -> Exception:
    """What becomes of an error on the way to the next batch, once the run is saved."""
    saved = session.settle()
    if isinstance(error, WorkerLost):
        return Stopped(f"{error} Stopped after step {session.step:,}, {kept(session, saved)}. {way_on(session)}")
    if isinstance(error, Stopped):
        return Stopped(f"{error}. Stopped after step {session.step:,}, {kept(session, saved)}. {way_on(session)}")
    return error


def collapse(session: Session) -> NumbersError:
    """What to tell someone whose run stops because it collapsed; the report shows the evidence."""
    saved, out = session.settle(), session.parts.config.out
    evidence = f"The evidence is in {out}/report.html."
    if session.run:
        try:
            draw_report(session.run.folder)
        except OSError as error:
            session.warn(f"the report could not be written: {error.strerror or error}")
            evidence = f"barlow report {in_shell(out)} draws the evidence once there is room."
    return NumbersError(
        f"Stopped after step {session.step:,} of {session.steps:,}, {kept(session, saved)}: {session.watch.collapsed} "
        f"{evidence} To go on all the same: barlow pretrain --resume {in_shell(out)} --no-stop-on-collapse"
    )


def kept(session: Session, saved: bool) -> str:
    """ "saved", or that it is not."""
    if saved:
        return "saved"
    where = session.run.folder if session.run else session.parts.config.out
    return f"NOT saved ({where} cannot be written; the checkpoint before it is sound)"


def way_on(session: Session) -> str:
    """The command that continues."""
    return f"Continue with: barlow pretrain --resume {in_shell(session.parts.config.out)}"


def diverged(session: Session, batch: Batch, error: NumbersError) -> NumbersError:
    """The same error with the step, what it means for the run, and the remedy; leaves what reproduces it behind."""
    config = session.parts.config
    bundle = {
        "step": batch.step + 1,
        "seed": config.seed,
        "reason": str(error),
        "terms": jsonable(getattr(error, "terms", None)),
        "images": keys(session.parts, batch),
        "processes": ranks.world_size(),
    }
    again = ""
    if session.run:
        file = session.run.folder / "nonfinite" / f"step-{batch.step + 1:09d}.json"
        try:
            file.parent.mkdir(exist_ok=True)
            atomic_write(file, json.dumps(bundle, indent=1) + "\n")
            again = f" barlow pretrain --replay {in_shell(session.run.folder)} shows it again."
        except OSError as full:
            session.warn(full)
        session.log("event", message=f"step {batch.step + 1}: {error}")
    sound = "Nothing was updated, and the last checkpoint is sound."
    return NumbersError(f"At step {batch.step + 1} {error}. {sound} {usual_cause(config.lr)}{again}")


def keys(parts: Ready, batch: Batch) -> list[Any]:
    """Key and epoch of every image of a batch, of all processes in order."""
    mine = [[parts.images.key(int(i)), int(e)] for i, e in zip(batch.images, batch.epochs, strict=True)]
    return [row for part in ranks.gather(mine) for row in part]


@contextmanager
def signals_outside_training(out: Path) -> Iterator[None]:
    """Before the first step and after the last, SIGTERM and SIGUSR1 end the run at once: code and sentence of its own.

    All that is on the disk is whole, so the same command goes on. Training has its own way (``StopRequest``). Handlers
    that a program around us has set are left alone, and all of them outside the main thread.
    """

    def leave_now(number: int, _: object) -> None:
        again = requeue(os.environ) if number == SIGUSR1 and ranks.rank() == 0 else None
        raise Stopped(f"Stopped by signal {Signals(number).name} outside training; nothing is lost. "
                      + (f"SLURM: {again}. " if again else "")
                      + f"Give the same command again, with --out {in_shell(out)}.",
                      EXIT_CODES[Signals(number)])  # fmt: skip

    ours = [each for each in (SIGTERM, SIGUSR1) if signal.getsignal(each) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        ours = []
    for each in ours:
        signal.signal(each, leave_now)
    try:
        yield
    finally:
        for each in ours:
            signal.signal(each, signal.SIG_DFL)


@contextmanager
def out_of_memory_in_words(parts: Ready) -> Iterator[None]:
    """Turns an allocation that fails into one sentence with the largest batch that fits (UserError)."""
    device = str(parts.fabric.device)
    before = peak_memory(device)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, Stopped | DataError) or not is_out_of_memory(error):
            raise
        batch = parts.config.micro_batch or parts.config.batch_size or 1
        raise UserError(explain_out_of_memory(error, batch=batch, before=before, device=device)) from None
