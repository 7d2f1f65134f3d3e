"""Images that cannot be used: written down once each in ``quarantine.jsonl``; when they are many, the run stops."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import IO, Any, final

import pyarrow as pa

from barlow.errors import DataError
from barlow.guard import BadImage
from barlow.images import Bad, Images
from barlow.index import ITS_PARTNER, place
from barlow.sources import shown, with_file

MAX_BAD = 0.05  # share of unusable images beyond which a run stops, unless the settings say otherwise
HASHED = 1 << 20  # bytes of an image that its fingerprint covers
FEW = 100  # images that are seen before their share can stop a run
NAMED = 10  # paths in the sentence that ends it


@final
class Quarantine:
    """The bad images of one run. For main processes alone: workers hand their ``Bad`` rows over.

    ``file``: where they are written; one that exists is continued, no image twice. ``seen``: images that were tried,
    at first those before a resume; the loop keeps it.
    """

    def __init__(self, images: Images, file: Path, max_bad: float, seen: int = 0) -> None:
        self.images, self.file, self.max_bad = images, file, max_bad
        self.seen = min(seen, len(images))
        rows = read_quarantine(file) if file.exists() else []
        if rows and not file.read_bytes().endswith(b"\n"):
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")  # cut off by a crash
        self.written = {row["path"] for row in rows}
        self.bad = {  # not those of steps that a resume takes again: their images do not count as seen either
            row["path"]: row["reason"] for row in rows if row["found"] == "pixels" and row.get("seen", 0) <= self.seen
        }

    def start(self) -> None:
        """Before the first step: records the images with broken headers. Raises DataError when they are too many."""
        for images in (self.images, *([self.images.second] if self.images.second else [])):
            for k, reason in enumerate(images.bad["status"].to_pylist()):
                if not reason.startswith(ITS_PARTNER):
                    self._write(images, images.bad, k, reason, "header")
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
                self._write(images, images.rows, one.image, one.reason, "pixels")
        self._judge()

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

    def _write(self, images: Images, rows: pa.Table, i: int, reason: str, found: str) -> None:
        key = shown(rows["path"][i].as_py())
        if key in self.written:
            return
        self.written.add(key)
        length, sha256 = fingerprint(rows, images.root, i)
        row = {"path": key, "reason": reason, "found": found, "seen": self.seen, "bytes": length, "sha256": sha256}
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")


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
    """The rows of a ``quarantine.jsonl``; a last line cut off by a crash is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
