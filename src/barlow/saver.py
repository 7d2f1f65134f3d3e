"""Saving beside the training: the loop pays for the copy to host memory, a thread for the disk."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, final

from torch import Tensor

from barlow.checkpoint import check_finite, keep, save_failed, state_bytes, write
from barlow.console import say
from barlow.errors import Stopped
from barlow.files import atomic_write
from barlow.tensorfile import HostCopy, host_copy


@final
class Saver:
    """Saves into ``folder`` in a thread, one checkpoint at a time, and deletes what ``keep`` no longer wants.

    ``stalled``: seconds the caller has waited in all, ``seconds``: what the last save took from call to disk.
    Use it as a context manager, so that the last save is on the disk before the program goes on.
    """

    def __init__(self, folder: Path, *, last: int, every: int | None = None) -> None:
        self.folder, self.last, self.every = folder, last, every
        self.stalled = self.seconds = 0.0
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], best: int | None = None) -> None:
        """Copies all and returns; the caller may train on. Waits for the save before.

        Raises NumbersError at once (nothing is written then). When the save before has failed this one is begun all
        the same, as the retry, and the SaveFailed of that one raised after.
        """
        before = self._wait()
        started = time.monotonic()
        what = host_copy(tensors, own=True)
        check_finite(step, tensors)  # the originals, where they are: quick on an accelerator
        text = state_bytes(step, state)
        self._thread = Thread(target=self._work, args=(started, step, what, text, best), name="checkpoint")
        self._thread.start()
        self.stalled += time.monotonic() - started
        if before is not None:
            raise before

    def _work(self, started: float, step: int, what: HostCopy, state: bytes, best: int | None) -> None:
        try:
            write(self.folder, step, what, state)
            self._name(best)
            try:
                keep(self.folder, last=self.last, every=self.every, best=best)
            except Stopped as error:  # it is saved all the same, and the next save tries again
                say(f"warning: the checkpoint of step {step} cannot be read back now ({error.__cause__}), so no older "
                    "one is deleted")  # fmt: skip
        except BaseException as error:  # nobody catches in a thread: join() raises it where the loop can answer
            self._error = error
        self.seconds = time.monotonic() - started

    def _name(self, best: int | None) -> None:
        """Writes the file ``best``, where the save of that step could not do it, too. Raises SaveFailed."""
        file, folder = self.folder / "best", f"step-{best or 0:09d}"
        words = f"{folder}\n".encode()
        try:
            if best and (self.folder / folder).is_dir() and not (file.exists() and file.read_bytes() == words):
                atomic_write(file, words)
        except OSError as error:
            raise save_failed("the name of the best checkpoint", self.folder, error) from error

    def join(self) -> None:
        """Waits until the disk has all. Raises what went wrong in the save under way, once (SaveFailed: try again)."""
        error = self._wait()
        if error is not None:
            raise error

    def _wait(self) -> BaseException | None:
        started = time.monotonic()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.stalled += time.monotonic() - started
        error, self._error = self._error, None
        return error

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.join()
        except Exception:
            if kind is None:  # otherwise the first error is the one to tell
                raise
