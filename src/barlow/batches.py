"""The stream of training batches: which images, their draws and their crops, each a pure function of the step."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from barlow.draws import IntArray, order, stream
from barlow.errors import DataError, Stopped, UserError
from barlow.images import Bad, Images
from barlow.signals import ignore_stop_signals
from barlow.views import Draws, OwnView, View, apply_own, crop, draw, finish, generator

ViewLike = View | OwnView
SPLIT_EPOCH = 2**32 - 1  # the address of the split into training and held-out images; no run has so many epochs
AHEAD = 4  # batches that a worker makes before they are asked for


@dataclass(frozen=True)
class Batch:
    """One step's images as this process sees them: for each view the crops (n, size, size, c) and what was drawn."""

    step: int
    images: IntArray
    epochs: IntArray
    crops: list[Tensor]
    draws: list[Draws]
    bad: list[Bad]


def split(seed: int, images: int, held_out: int) -> tuple[IntArray, IntArray]:
    """(training, held-out) image numbers, both sorted: a keyed choice, the same for the same seed and number."""
    out = order(seed, SPLIT_EPOCH, images, np.arange(held_out))
    mask = np.ones(images, bool)
    mask[out] = False
    return np.flatnonzero(mask), np.sort(out)


@final
class Stream(Dataset[Batch]):
    """Batch number ``step`` of an endless stream; consecutive epochs follow each other without a gap.

    ``batch_size`` images over all processes; this process (``rank`` of ``world``) makes its own part of each.
    """

    def __init__(
        self, images: Images, train: IntArray, views: Sequence[ViewLike], *, seed: int, size: int, batch_size: int,
        rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        self.images, self.train, self.views = images, train, tuple(views)
        self.seed, self.size, self.batch_size = seed, size, batch_size
        self.mine = np.array_split(np.arange(batch_size), world)[rank]

    def __getitem__(self, step: int) -> Batch:
        first, count = step * self.batch_size + int(self.mine[0]), len(self.mine)
        epochs, slots = stream(self.seed, first, count, len(self.train))
        chosen = self.train[slots]
        arrays, bad = self._read(chosen)
        drawn, crops = zip(*self.views_of(arrays, epochs, chosen), strict=True)
        return Batch(step, chosen, epochs, list(crops), list(drawn), bad)

    def _read(self, chosen: IntArray) -> tuple[Any, list[Bad]]:
        """The images as one array where they lie in memory, else a list; and what was wrong with some of them."""
        if self.images.array is not None:
            return self.images.array[chosen], []
        read = [self.images.read_or_replace(int(i)) for i in chosen]
        return [array for array, _, _ in read], [bad for _, _, bad in read if bad]

    def views_of(self, arrays: Sequence[Any], epochs: IntArray, chosen: IntArray) -> Iterator[tuple[Draws, Tensor]]:
        """For each view what is drawn for these images, and their crops (n, size, size, c)."""
        sizes = np.array([array.shape[:2] for array in arrays], np.int64)
        for number, view in enumerate(self.views):
            row = view if isinstance(view, View) else View()
            drawn = draw(row, self.seed, epochs, chosen, number, sizes, self.images.channels)
            yield drawn, torch.from_numpy(crop(arrays, drawn, self.size))

    def __len__(self) -> int:
        return len(self.train) // self.batch_size

    def finish(self, batch: Batch, device: torch.device, mean: Sequence[float], std: Sequence[float]) -> list[Tensor]:
        """The views in ``batch`` as the network takes them, float32 (n, c, size, size); the work is on ``device``."""
        made = []
        for number, (view, crops, drawn) in enumerate(zip(self.views, batch.crops, batch.draws, strict=False)):
            crops = crops.to(device, non_blocking=True)
            if isinstance(view, View):
                made.append(finish(crops, drawn, mean, std))
            else:
                made.append(apply_own(view, crops, generator(self.seed, batch.epochs, batch.images, number), mean, std))
        return made


class WorkerLost(RuntimeError):
    """A process that reads images was killed, or does not answer."""


def batches(
    source: Stream, start: int, stop: int, workers: int, *, patience: float = 0.0, pin: bool = False
) -> Iterator[tuple[Batch, float]]:
    """(batch, seconds waited for it) for steps ``start`` to ``stop``, made by ``workers`` processes, in order.

    Workers are forked from a clean server, never from this process with its threads, and ignore the stop signals:
    the training process decides. Raises what reading raises, and WorkerLost when a worker dies or makes no batch
    within ``patience`` seconds (0: for ever); it then prints on standard error where it hangs.
    """
    if workers == 0:
        for step in range(start, stop):
            before = time.perf_counter()
            batch = source[step]
            yield batch, time.perf_counter() - before
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["barlow.batches"])
    others = set(multiprocessing.active_children())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores, if so wanted
        loader = DataLoader(
            _Told(source), batch_size=None, sampler=range(start, stop), num_workers=workers, collate_fn=_same,
            pin_memory=pin, multiprocessing_context=context, worker_init_fn=_start_worker, prefetch_factor=AHEAD,
            timeout=patience,
        )  # fmt: skip
        coming = iter(loader)
    readers = set(multiprocessing.active_children()) - others
    while True:
        begun = time.perf_counter()
        try:
            made = next(coming)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:  # in which way a dead worker shows is a matter of chance
            raise _lost(readers, error, patience) from None
        if isinstance(made, Exception):
            raise made
        yield made, time.perf_counter() - begun


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
    if "timed out" not in str(error):
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
