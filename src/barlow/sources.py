"""Where images lie: folders and lists of files → rows (path, bytes, modified), the same everywhere; reading them."""

# Names are bytes here (they need not be UTF-8, which pathlib cannot say), hence os.path.
# ruff: noqa: PTH110, PTH116, PTH118, PTH122, PTH123

from __future__ import annotations

import codecs
import errno
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeVar

import pyarrow as pa

from barlow.errors import Stopped, UserError
from barlow.guard import MAGIC, BadImage

T = TypeVar("T")

ENDINGS = (b".jpg", b".jpeg", b".jpe", b".png", b".webp", b".bmp", b".dib", b".tif", b".tiff", b".gif", b".npy")
PACKED = (b".tar", b".parquet", b".arrow")  # files that hold many images
COMPRESSED = (
    b"\x1f\x8b",
    b"PK\x03\x04",
    b"BZh",
    b"\xfd7zXZ",
    b"\x28\xb5\x2f\xfd",
    b"7z\xbc\xaf",
    b"Rar!",
)  # first bytes
REMEDIES = {  # what to do with files that hold images and are not read, by their endings
    "save them as TIFF first, for example with Fiji": ".czi .nd2 .lif .oib .oif .vsi .ims .svs .ndpi .mrxs .mrc",
    "save their pixels as 16-bit TIFF or .npy first": ".dcm .dicom .nii .mha .mhd .nrrd .fits .h5 .hdf5 .nc .mat .zarr",
    "save the images as one .npy, or one each": ".npz .pt .pth .pkl",
    "save them as PNG, JPEG or TIFF first": ".heic .heif .avif .jp2 .jxl .pgm .ppm .psd .svg .cr2 .nef .arw .dng",
    "save the frames as images first": ".mp4 .avi .mov .mkv .webm",
    "unpack them first": ".zip .gz .rar .7z",
}
BYTES_LIMIT = 4 << 30  # of one file
TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.ENFILE, errno.EMFILE)
WAITS = (0.05, 0.25, 1.0)  # seconds before the second, third and fourth try


@dataclass(frozen=True)
class Found:
    """The rows of a source, before any image was opened.

    ``rows``: path (bytes, relative to ``root`` where it lies below), bytes, modified (ns; both 0 before the index has
    opened a whole file); where an image is a part of a file also file and offset (-1: the whole file); where the source
    carries classes also label.
    """

    kind: str
    root: bytes
    rows: pa.Table
    passed_over: Counter[str] = field(default_factory=Counter)  # by ending
    packed: tuple[bytes, ...] = ()  # files of many images that were seen on the way


def shown(name: bytes) -> str:
    """A file name as printable text, different names staying different: bytes and characters that cannot be printed
    are escaped, and so is the backslash."""
    text = os.fsdecode(name) if os.sep == "/" else name.decode("utf-8", "surrogateescape").replace(os.sep, "/")
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(_escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if character == "\\":
        return "\\\\"
    if character.isprintable():
        return character
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def find_in_folder(folder: Path) -> Found:
    """Every image below ``folder``, links followed, no directory twice; sorted by the bytes of the path.

    Hidden files and folders are passed over; so are endings that are not images', and counted. A file without ending
    is taken by its first bytes. Raises UserError for a folder that cannot be listed.
    """
    root = os.fsencode(folder)
    passed: Counter[str] = Counter()
    packed: list[bytes] = []
    paths: list[bytes] = []
    for path, entry in _walk(root):
        ending = os.path.splitext(entry.name)[1].lower()
        if ending in ENDINGS or (not ending and _starts_like_an_image(entry.path)):
            paths.append(path)
        else:
            passed[shown(ending) or "no ending"] += 1
            if ending in PACKED:
                packed.append(path)
    paths.sort()
    return Found("folder", root, _table(paths), passed, tuple(sorted(packed)))


def _walk(root: bytes) -> Iterator[tuple[bytes, os.DirEntry[bytes]]]:
    """(path relative to the root, entry) of each file that is not hidden."""
    waiting, seen = [b""], set()
    while waiting:
        folder = waiting.pop()
        try:
            here = os.stat(os.path.join(root, folder))
            if (here.st_dev, here.st_ino) in seen:
                continue  # a link that leads back
            seen.add((here.st_dev, here.st_ino))
            with os.scandir(os.path.join(root, folder)) as listing:
                entries = sorted(listing, key=lambda e: e.name)
        except OSError as error:
            raise UserError(
                f"the folder {shown(os.path.join(root, folder).rstrip(b'/'))} cannot be listed ({error.strerror}): "
                "give this user the right to read it, or move it elsewhere"
            ) from None
        below = []
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            path = os.path.join(folder, entry.name)
            if _is_folder(entry):
                below.append(path)
            elif entry.is_symlink() or entry.is_file():  # a link may dangle: then it is a bad image, not nothing
                yield path, entry
        waiting.extend(reversed(below))  # so that of two ways to one folder the same is taken everywhere


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def size_and_time(path: bytes) -> tuple[int, int]:
    """(bytes, when it was last written in ns) of a file; zeros where it cannot be asked."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _starts_like_an_image(path: bytes) -> bool:
    try:
        return read_bytes(path, 0, 12).startswith(MAGIC)
    except BadImage:
        return False


def remedy(endings: Iterable[str]) -> str:
    """What to do with files of such endings, after a colon; "" where nothing is known."""
    seen = {ending.lower() for ending in endings}
    return next((f": {what}" for what, known in REMEDIES.items() if seen & set(known.split())), "")


def find_in_list(file: Path) -> Found:
    """The files that a text file names, one a line, relative to the folder of the list; '#' starts a comment line."""
    with file.open("rb") as opened:
        start = opened.read(4096)
    utf16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as PowerShell writes it
    if file.suffix.lower() in (".xlsx", ".ods"):
        raise UserError(f"{shown(os.fsencode(file))} is a spreadsheet: save it as CSV")
    if start.startswith(COMPRESSED):
        raise UserError(
            f"{shown(os.fsencode(file))} is a compressed archive: unpack it, and give the folder or the tar"
        )
    if b"\0" in start and not utf16:
        what = remedy([file.suffix])
        raise UserError(f"{shown(os.fsencode(file))} is neither an image nor a text file of paths{what}")
    content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    content = content.decode("utf-16", "replace").encode() if utf16 else content
    lines = (line.rstrip(b"\r") for line in content.split(b"\n"))
    return find_files([line for line in lines if line.strip() and not line.startswith(b"#")], file.absolute().parent)


def find_files(paths: Iterable[bytes], root: Path) -> Found:
    """The named files, in the given order; one that is missing becomes a bad image, not an error."""
    base = os.fsencode(root)
    return Found("list", base, _table(list(paths)))


def _table(paths: list[bytes]) -> pa.Table:
    """Rows of whole files: how long and how old each is, the index sees when it opens them."""
    unknown = pa.repeat(pa.scalar(0, pa.int64()), len(paths))
    return pa.table({"path": pa.array(paths, pa.large_binary()), "bytes": unknown, "modified": unknown})


def read_bytes(path: bytes, offset: int = 0, length: int = -1) -> bytes:
    """The bytes of a file or of a part of it (length -1: to the end). Raises BadImage."""

    def read(file: IO[bytes], size: int) -> bytes:
        wanted = size - offset if length < 0 else min(length, size - offset)
        if wanted > BYTES_LIMIT:
            raise BadImage(f"{wanted:,} bytes are over the limit of {BYTES_LIMIT:,}")
        file.seek(offset)
        return file.read(max(wanted, 0))

    return with_file(path, read)


def with_file(path: bytes, use: Callable[[IO[bytes], int], T]) -> T:
    """``use(open file, its length)``; passing faults of a disk or a network are tried again. Raises BadImage."""
    for wait in (*WAITS, None):
        try:
            # not blocking: a named pipe in place of a file would otherwise hold the run for ever
            handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
            with open(handle, "rb") as file:
                status = os.fstat(handle)
                if not stat.S_ISREG(status.st_mode):
                    raise BadImage("not a regular file")
                return use(file, status.st_size)
        except OSError as error:
            if error.errno not in TRANSIENT or wait is None:
                raise BadImage(f"cannot be read: {error.strerror or type(error).__name__}") from None
            time.sleep(wait)
    raise AssertionError


def keep_apart(source: object, *outputs: Path) -> None:
    """UserError where an output would replace the source of the images, or lie among them and become one of them."""
    if not isinstance(source, str | os.PathLike) or not os.path.exists(source):
        return
    place = Path(source)
    for output in outputs:
        if output.exists() and output.samefile(place):
            raise UserError(f"{output} is where the images come from, and would be replaced: give -o another name")
        image = os.fsencode(output.suffix.lower()) in ENDINGS
        if image and place.is_dir() and place.resolve() in output.absolute().parent.resolve().joinpath("x").parents:
            raise UserError(f"{output} would lie among the images in {place}, and be one from then on: give -o another "
                            "folder")  # fmt: skip


def companion(output: Path, ending: str) -> Path:
    """The second file that an output brings along, by its ending. UserError where there is such a file already without
    the first: then it is not an earlier output, and not ours to replace."""
    beside = output.with_suffix(ending)
    if beside.exists() and not output.exists():
        raise UserError(f"{beside} would be written too, and is there already: give -o another name, or move it away")
    return beside


def gone(root: bytes) -> None:
    """Raises Stopped where not one file but the whole place has vanished (a disk unplugged, a network share lost)."""
    if root and not os.path.exists(root):
        raise Stopped(f"{shown(root)} is gone: bring it back and resume")
