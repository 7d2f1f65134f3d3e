"""Which process is gone: a broken connection names nobody, so those that are left call the roll.

Every process leaves word in the store of the group, which the first one keeps. When a message between them fails, each
one closes its own connections, so that the failure reaches all at once, and answers the call; who does not answer in
time is dead, or cut off.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from barlow import ranks
from barlow.errors import Stopped

SECONDS = 10.0  # that the call takes at most
BROKEN = re.compile(r"gloo|nccl|connection|ProcessGroup|timed out waiting|broken pipe", re.IGNORECASE)


class Lost(Stopped):
    """Another process of the run is dead or cannot be reached. Exit code 75: the last checkpoint is sound."""


@contextmanager
def roll_call(what: str) -> Iterator[None]:
    """What comes up inside as a broken connection leaves as ``Lost``, naming who is gone; ``what``: how to go on."""
    world = ranks.world_size()
    if world == 1:
        yield
        return
    names = ranks.gather(f"pid {os.getpid()} on {socket.gethostname()}")
    store = dist.distributed_c10d._get_default_store()
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, Stopped) or not BROKEN.search(str(error)):
            raise
        me = ranks.rank()
        gone = missing(store, me, world)
        who = " and ".join(f"process {number} of {world} ({names[number]})" for number in gone) or "the connection"
        reason = str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0][:120].rstrip(".")
        raise Lost(f"{who} is gone or cannot be reached (process {me}: {reason}). {what}") from None


def missing(store: Any, me: int, world: int) -> list[int]:
    """The processes that do not answer within ``SECONDS``; the first one, when not even the store answers."""
    found: list[int] = []
    done = threading.Event()

    def call() -> None:
        with suppress(Exception):
            dist.destroy_process_group()
        with suppress(Exception):
            store.set(f"barlow/here/{me}", "")
            for number in range(world):
                try:
                    store.wait([f"barlow/here/{number}"], timedelta(seconds=SECONDS / 2))
                except Exception:
                    store.get(f"barlow/here/{me}")  # is it the one called, or the store?
                    found.append(number)
            done.set()

    thread = threading.Thread(target=call, daemon=True)  # a store that is cut off may never answer
    thread.start()
    thread.join(SECONDS)
    return found if done.is_set() else found or [0] if me else found
