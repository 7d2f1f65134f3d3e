"""Images that cannot be used: written down once each in ``quarantine.jsonl``; when they are many, the run stops."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import IO, Any, final

import pyarrow as pa

from barlow.console import say
from barlow.errors import DataError, Stopped, UserError
from barlow.files import atomic_write
from barlow.guard import BadImage
from barlow.images import Bad, Images
from barlow.index import ITS_PARTNER, place
from barlow.runlog import json_line
from barlow.sources import shown, with_file

MAX_BAD = 0.05  # share of unusable images beyond which a run stops, unless the settings say otherwise
HASHED = 1 << 20  # bytes of an image that its fingerprint covers
FEW = 100  # images that are seen before their share can stop a run
NAMED = 10  # paths in the sentence that ends it
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # what a disk refuses for, and takes later


@final
class Quarantine:
    """The bad images of one run. For main processes alone: workers hand their ``Bad`` rows over.

    ``file``: where they are written; one that exists is continued, no image twice. ``seen``: images that were tried,
    at first those before a resume; the loop keeps it. Rows wait in memory until the file takes them. Raises Stopped or
    UserError, as ``start`` does, for a file that cannot be continued.
    """

    def __init__(self, images: Images, file: Path, max_bad: float, seen: int = 0) -> None:
        self.images, self.file, self.max_bad = images, file, max_bad
        self.seen = min(seen, len(images))
        self._pending, self._told = bytearray(), False  # whether the user knows that rows wait
        try:
            rows = continued(file)
        except OSError as error:
            raise refused(file, error) from error
        self.written = {row["path"] for row in rows}
        self.bad = {  # not those of steps that a resume takes again: their images do not count as seen either
            row["path"]: row["reason"] for row in rows if row["found"] == "pixels" and row.get("seen", 0) <= self.seen
        }
        for source in (images, *([images.second] if images.second else [])):  # at a resume those whose rows were lost
            for k, reason in enumerate(source.bad["status"].to_pylist()):
                if not reason.startswith(ITS_PARTNER):
                    self._record(source, source.bad, k, reason, "header")

    def start(self) -> None:
        """Before the first step: writes down the images with broken headers. Raises DataError when they are too many;
        where the file does not take them, Stopped (the disk is full or fails) or UserError: nothing is lost yet."""
        try:
            self._flush()
        except OSError as error:
            raise refused(self.file, error) from error
        self._judge()

    def add(self, bad: Iterable[Bad]) -> None:
        """After a batch: what was wrong with some of its images.

        Raises DataError when more than ``max_bad`` of the images are bad (those seen so far, and at least a hundred,
        together with those that the index found), or the first hundred all.
        """
        for one in bad:
            if one.key not in self.bad:
                self.bad[one.key] = one.reason
                images = self.images.second if one.partner and self.images.second else self.images
                self._record(images, images.rows, one.image, one.reason, "pixels")
        self.append()
        self._judge()

    def append(self, *, last: bool = False) -> None:
        """Writes the rows that wait. A disk that is full or fails costs a warning, once, and they wait for the next
        call; after the ``last`` there is none."""
        try:
            self._flush()
        except OSError as error:
            if last:
                say(f"warning: the last rows of {self.file} found no room ({error.strerror or error})")
            elif not self._told:
                say(f"warning: {self.file.name} waits for the disk ({error.strerror or error})")
            self._told = True

    def _flush(self) -> None:
        if self._pending:
            with self.file.open("ab", buffering=0) as out:
                while self._pending:  # the rest of a row that was cut off comes first at the next try
                    written = out.write(self._pending)
                    del self._pending[:written]

    def _judge(self) -> None:
        unreadable, total = len(self.images.bad), len(self.images) + len(self.images.bad)
        few = min(FEW, len(self.images))
        headers = unreadable / total
        share = headers + (1 - headers) * len(self.bad) / max(self.seen, few)
        all_bad = self.seen >= few and len(self.bad) >= self.seen
        if share <= self.max_bad and not all_bad:
            return
        names = (shown(path.as_py()) for path in self.images.bad["path"])
        first = ", ".join(islice((*self.bad, *islice(names, NAMED)), NAMED))
        looked = unreadable + self.seen if self.seen else total  # at first only at all headers
        raise DataError(
            f"{unreadable + len(self.bad):,} images of {looked:,} looked at cannot be used, more than "
            f"max_bad = {self.max_bad:g} allows; each with its reason in {self.file}. The first: {first}"
        )

    def _record(self, images: Images, rows: pa.Table, i: int, reason: str, found: str) -> None:
        key = shown(rows["path"][i].as_py())
        if key in self.written:
            return
        self.written.add(key)
        length, sha256 = fingerprint(rows, images.root, i)
        seen = self.seen if found == "pixels" else 0
        row = {"path": key, "reason": reason, "found": found, "seen": seen, "bytes": length, "sha256": sha256}
        self._pending += json_line(row)


def fingerprint(rows: pa.Table, root: bytes, i: int) -> tuple[int, str | None]:
    """(length, SHA-256 of the first 1 MiB) of the bytes of row ``i``; None where they cannot be read any more."""
    file, offset, length = place(rows, root, i)

    def look(opened: IO[bytes], size: int) -> tuple[bytes, int]:
        opened.seek(offset)
        return opened.read(HASHED), size

    try:
        start, size = with_file(file, look)
    except BadImage:
        return 0, None
    whole = size if length < 0 else length
    return whole, hashlib.sha256(start[:whole]).hexdigest()


def read_quarantine(file: Path) -> list[dict[str, Any]]:
    """The rows of a ``quarantine.jsonl``; torn and damaged lines are left out."""
    return [row for line in file.read_bytes().splitlines() if (row := parse_row(line))]


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The row that a line holds; None where it lacks what is read of a row (``seen`` is younger than the rest)."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    texts = isinstance(row, dict) and all(isinstance(row.get(name), str) for name in ("path", "reason", "found"))
    return row if texts and isinstance(row.get("seen", 0), int) else None


def continued(file: Path) -> list[dict[str, Any]]:
    """The rows of a file that more will be appended to; none where there is none. Lines that a crash tore, or that are
    damaged, are removed with a warning. Raises OSError."""
    if not file.exists():
        return []
    data, rows = file.read_bytes(), read_quarantine(file)
    lost = len(data.splitlines()) - len(rows)
    if lost or (data and not data.endswith(b"\n")):
        atomic_write(file, b"".join(map(json_line, rows)))
    if lost:
        say(f"warning: {lost} damaged line{'s' * (lost > 1)} of {file} had to be removed")
    return rows


def refused(file: Path, error: OSError) -> Stopped | UserError:
    """What ends a run while nothing can be lost: a disk that is full or fails may do better the next time."""
    what = f"{file} cannot be written: {error.strerror or error}"
    if error.errno in PASSING:
        return Stopped(f"{what}. Make room, or mend the disk, then give the same command again.")
    return UserError(f"{what}; move it away, or give another --out.")
