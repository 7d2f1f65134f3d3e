"""Hostile and broken files: whatever reading one brings up becomes a ``BadImage`` with a reason. Fixed limits."""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, final

from PIL import Image, UnidentifiedImageError

from barlow.errors import Stopped

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF")  # never all of Pillow's: its rare ones break
PIXEL_LIMIT = 178_956_970  # rows × columns, Pillow's own limit
NUMBER_LIMIT = 4 * PIXEL_LIMIT  # rows × columns × channels (× planes of a stack)
MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"\x93NUMPY")
STRANGERS = (
    (128, b"DICM", "a DICOM file"),
    (4, b"ftyp", "a HEIC, AVIF or video file"),
    (0, b"ZISRAWFILE", "a CZI file"),
    (0, b"\xda\xce\xbe\x0a", "an ND2 file"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 file"),
)  # (place, first bytes, what it is)
HARMLESS = "(Metadata Warning|Possibly corrupt EXIF|Corrupt EXIF|Tag |Invalid APNG|.*malformed MPO|XMP)"
SILENT = (DeprecationWarning, PendingDeprecationWarning, ResourceWarning, Image.DecompressionBombWarning)

# Pillow and tifffile also report through logging; what matters is raised, and their lines must not reach the terminal
for name in ("PIL", "tifffile"):
    logging.getLogger(name).addHandler(logging.NullHandler())


class BadImage(ValueError):
    """The file cannot be used; ``reason`` is one short phrase, the same each time the same bytes are read."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@final
class _WarningsRaise:
    """A context in which warnings that mean lost pixels raise and harmless ones are silent.

    The filters belong to the whole process, so threads share one change of them: the first in makes it, the last out
    undoes it (``warnings.catch_warnings`` alone would leave them wrong when threads overlap).
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.saved = threading.Lock(), 0, warnings.catch_warnings()

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside > 1:
                return
            self.saved = warnings.catch_warnings()
            self.saved.__enter__()
            warnings.simplefilter("error")
            for kind in SILENT:
                warnings.simplefilter("ignore", kind)
            warnings.filterwarnings("ignore", message=HARMLESS)

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.saved.__exit__(None, None, None)


warnings_raise = _WarningsRaise()


@contextmanager
def only_bad_images(file: IO[bytes]) -> Iterator[None]:
    """Inside, every error becomes a BadImage, except that memory ran out or the program is to stop."""
    try:
        with warnings_raise:
            yield
    except (BadImage, MemoryError, Stopped):  # Stopped: of a signal that came meanwhile
        raise
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise BadImage(too_large(int(pixels[0]) if pixels else 0)) from None
    except UnidentifiedImageError:
        raise BadImage(unknown(file)) from None
    except Exception as error:
        text = re.sub(r"<[^>]*>", "file", " ".join(str(error).split()))[:200]  # no addresses: the same each time
        name = "" if text and type(error) is OSError else f" ({type(error).__name__})"
        raise BadImage((text or "cannot be decoded") + name) from error


def too_large(pixels: int) -> str:
    """The sentence for more rows × columns than are allowed."""
    return f"{pixels:,} pixels are over the limit of {PIXEL_LIMIT:,}: cut it into tiles"


def check_shape(shape: tuple[int, ...], numbers: int) -> None:
    """Raises BadImage unless (h, w) or (h, w, c) is a size to allocate; ``numbers``: of all planes, where more."""
    if len(shape) not in (2, 3):
        raise BadImage(f"an array of shape {shape} is no image (rows, columns, channels)")
    height, width, channels = (*shape, 1)[:3]
    if min(shape) < 1:
        raise BadImage(f"an image without pixels, shape {shape}")
    if height * width > PIXEL_LIMIT:
        raise BadImage(too_large(height * width))
    if max(numbers, height * width * channels) > NUMBER_LIMIT:
        raise BadImage(f"{max(numbers, height * width * channels):,} numbers are over the limit of {NUMBER_LIMIT:,}")


def unknown(file: IO[bytes]) -> str:
    """Why nothing could be made of these bytes."""
    file.seek(0)
    start = file.read(4096)
    text = start.lstrip().lower()
    if not start.strip(b"\0"):
        return "only zero bytes" if start else "an empty file"
    if text.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head")):
        return "a web page, not an image"
    for magic, name in ((b"%pdf", "a PDF"), (b"%!ps", "a PostScript file"), (b"simple  =", "a FITS file")):
        if text.startswith(magic):
            return f"{name}, which is not read"
    if start.startswith(MAGIC):
        return "starts like an image but its header is broken"
    for place, magic, name in STRANGERS:
        if start[place : place + len(magic)] == magic:
            return f"{name}, which is not read: save it as PNG or TIFF first"
    printable = sum(32 <= byte < 127 or byte in b"\r\n\t" for byte in start)
    return "text, not an image" if printable == len(start) else f"not one of {', '.join(FORMATS)} or .npy"
