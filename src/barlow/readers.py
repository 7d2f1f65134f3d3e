"""Batches on their way to the loop: made by processes of their own, the next one fetched while one is used."""

from __future__ import annotations

import ast
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Collection, Generator, Iterator
from contextlib import closing, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Empty, Queue
from threading import Event, Thread
from typing import Any, TypeVar, final

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from barlow.batches import Batch, Stream
from barlow.errors import DataError, Stopped, UserError
from barlow.resources import fit_shared_memory
from barlow.signals import ignore_stop_signals

AHEAD = 4  # batches that a worker makes before they are asked for
LEAVE_SECONDS = 5.0  # that the end of a run waits for a batch that is on its way
LOOK_SECONDS = 5.0  # between two looks whether the workers live, while a batch is waited for
WAITED = "DataLoader timed out"  # what torch says when it has waited so long
Item = TypeVar("Item")


class WorkerLost(RuntimeError):
    """A process that reads images was killed, or does not answer."""


def batches(
    source: Stream, start: int, stop: int, workers: int, *, patience: float = 0.0
) -> Generator[tuple[Batch, float]]:
    """(batch, seconds waited for it) for steps ``start`` to ``stop``, made by ``workers`` processes, in order.

    Workers are forked from a clean server, never from this process with its threads, and ignore the stop signals:
    the training process decides. Raises what reading raises, and WorkerLost when a worker dies or makes no batch
    within ``patience`` seconds (0: for ever); it then prints on standard error where it hangs. To be closed.
    """
    if workers:
        coming = ahead(_received(*_started(source, start, stop, workers, patience), patience))
    else:
        coming = (source[step] for step in range(start, stop))
    with closing(coming):
        begun = time.perf_counter()
        for batch in coming:
            yield batch, time.perf_counter() - begun
            begun = time.perf_counter()


def how_many(source: Stream, workers: int) -> tuple[int, str | None]:
    """How many of ``workers`` can read, and the sentence to tell where it is fewer: they would run the program of the
    user again, or shared memory is small."""
    if workers and runs_again():
        return 0, ('no workers, for they would run this script again: put the call under if __name__ == "__main__": '
                   "and they read ahead")  # fmt: skip
    pixels = len(source.mine) * source.size**2 * source.images.channels
    batch = len(source.views) * pixels * np.dtype(source.images.dtype).itemsize
    return fit_shared_memory(workers, batch, AHEAD + 2)  # two wait in this process


def ahead(items: Iterator[Item]) -> Generator[Item]:
    """The same items, each fetched by a thread while the one before it is used.

    A batch that comes from another process takes some three milliseconds to arrive, however long ago it was made. What
    the items raise is raised here, in its turn.
    """
    queue: Queue[tuple[Item | None, BaseException | None]] = Queue(1)
    over = Event()

    def fetch() -> None:
        try:
            for item in items:
                queue.put((item, None))
                if over.is_set():
                    return
            queue.put((None, None))
        except BaseException as error:
            queue.put((None, error))

    thread = Thread(target=fetch, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item, error = queue.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        over.set()
        until = time.monotonic() + LEAVE_SECONDS
        while thread.is_alive() and time.monotonic() < until:
            with suppress(Empty):
                queue.get(timeout=0.01)
            thread.join(0.01)


def runs_again() -> bool:
    """Whether the program around us would come here again in each process that reads images: these run its file up to
    its end, and so what it does there and not under ``if __name__ == "__main__":``."""
    main: Any = sys.modules["__main__"]
    file, frame = getattr(main, "__file__", None), sys._getframe()
    while frame.f_back and not (frame.f_code.co_name == "<module>" and frame.f_globals is vars(main)):
        frame = frame.f_back
    if file is None or frame.f_globals is not vars(main):  # a notebook, or a thread
        return False
    try:
        statements = ast.parse(Path(file).read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return False
    here = [each for each in statements if each.lineno <= frame.f_lineno <= (each.end_lineno or 0)]
    return not any(isinstance(each, ast.If) and "'__name__'" in ast.dump(each.test) for each in here)


def _started(
    source: Stream, start: int, stop: int, workers: int, patience: float
) -> tuple[Iterator[Any], set[BaseProcess]]:
    """(what the workers send, the workers)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["barlow.readers"])
    others = set(multiprocessing.active_children())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores, if so wanted
        loader = DataLoader(
            _Told(source), batch_size=None, sampler=range(start, stop), num_workers=workers, collate_fn=_same,
            multiprocessing_context=context, worker_init_fn=_start_worker, prefetch_factor=AHEAD,
            timeout=min(patience, LOOK_SECONDS),
        )  # fmt: skip
        coming = iter(loader)
    return coming, set(multiprocessing.active_children()) - others


def _received(coming: Iterator[Any], workers: set[BaseProcess], patience: float) -> Generator[Batch]:
    """The batches that the workers send; the errors that they send, and their deaths, are raised."""
    begun = time.monotonic()
    while True:
        try:
            made = next(coming)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:  # in which way a dead worker shows is a matter of chance
            early = str(error).startswith(WAITED) and time.monotonic() - begun < patience
            if early and all(worker.is_alive() for worker in workers):
                continue
            raise _lost(workers, error, patience) from None
        if isinstance(made, Exception):
            raise made
        yield made
        begun = time.monotonic()


def _lost(readers: Collection[BaseProcess], error: Exception, patience: float) -> Exception:
    """``error`` as the sentence for workers that are gone or hang (then each first prints where); else as it is."""
    for reader in readers:
        reader.join(1.0 / len(readers))  # one that is dying may not be dead yet
    dead = [(reader.pid, reader.exitcode) for reader in readers if reader.exitcode is not None]
    if dead:
        pid, code = dead[0]
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else "ended by itself"
        often = "Often the machine was out of memory: try fewer --workers."
        return WorkerLost(f"A worker that reads images (pid {pid}) {how}. {often}")
    if not str(error).startswith(WAITED):
        return error
    for reader in readers:
        os.kill(reader.pid or 0, signal.SIGUSR2)  # see _start_worker
    time.sleep(0.5)  # for the traces to be written
    return WorkerLost(f"The workers that read images made no batch in {patience:g} s; where they hang stands above.")


@final
class _Told(Dataset[Batch | Exception]):
    """The stream as workers read it: an error that has a sentence arrives as it is, without the worker's trace."""

    def __init__(self, source: Stream) -> None:
        self.source = source

    def __getitem__(self, step: int) -> Batch | Exception:
        try:
            return self.source[step]
        except (UserError, DataError, Stopped) as error:
            return error


def _same(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    ignore_stop_signals()
    faulthandler.register(signal.SIGUSR2)
    torch.set_num_threads(1)
