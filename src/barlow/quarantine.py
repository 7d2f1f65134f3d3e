"""Images that cannot be used: written down once each in ``quarantine.jsonl``; when they are many, the run stops."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import IO, Any, final

import pyarrow as pa

from barlow.errors import DataError, UserError
from barlow.guard import BadImage
from barlow.images import Bad, Images
from barlow.index import ITS_PARTNER, place
from barlow.sources import shown, with_file

HASHED = 1 << 20  # bytes of an image that its fingerprint covers
FEW = 100  # images that are seen before their share can stop a run
NAMED = 10  # paths in the sentence that ends it


@final
class Quarantine:
    """The bad images of one run. For main processes alone: workers hand their ``Bad`` rows over.

    ``file``: where they are written (None: nowhere); one that exists is continued, no image twice. ``seen``: images
    that were tried before a resume.
    """

    def __init__(self, images: Images, file: Path | None = None, max_bad: float = 0.05, seen: int = 0) -> None:
        if not 0 <= max_bad <= 1:
            raise UserError(f"max_bad is a share between 0 and 1, not {max_bad}")
        self.images, self.file, self.max_bad = images, file, max_bad
        self.seen = min(seen, len(images))
        rows = read_quarantine(file) if file is not None and file.exists() else []
        if rows and file is not None and not file.read_bytes().endswith(b"\n"):
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

    def add(self, seen: int, bad: Iterable[Bad | None]) -> None:
        """After each batch: how many images it tried, and what was wrong with some of them.

        Raises DataError when more than ``max_bad`` of the images are bad (those seen so far, and at least a hundred,
        together with those that the index found), or the first hundred all.
        """
        self.seen = min(self.seen + seen, len(self.images))
        for one in bad:
            if one is not None and one.key not in self.bad:
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
        reasons = f"; each with its reason in {self.file}" if self.file else ""
        looked = unreadable + self.seen if self.seen else total  # at first only at all headers
        raise DataError(
            f"{unreadable + len(self.bad):,} images of {looked:,} looked at cannot be used, more than "
            f"max_bad = {self.max_bad:g} allows{reasons}. The first: {first}"
        )

    def _write(self, images: Images, rows: pa.Table, i: int, reason: str, found: str) -> None:
        key = shown(rows["path"][i].as_py())
        if key in self.written or self.file is None:
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
