"""Bytes of one image file → array, for every odd kind of file, within limits.

What a file becomes (h rows, w columns, channels last):

=====================================  =========================================================================
in the file                            array
=====================================  =========================================================================
grey, 8 bits or fewer                  (h, w, 1) uint8; 1-bit images become 0 and 255
grey with transparency                 (h, w, 1) uint8, laid on white
RGB, YCbCr, Lab                        (h, w, 3) uint8, as sRGB
RGB with transparency, palette         (h, w, 3) uint8, laid on white where transparent
CMYK                                   (h, w, 3) uint8, by Pillow's formula
grey, 16 bits                          (h, w, 1) uint16
grey, 32-bit integers or floats        (h, w, 1) float32, unscaled; signed 16 bits, too
PNG of 16 bits: colour, transparency   (h, w, 3) or of grey (h, w, 1) uint16, laid on white where transparent
TIFF in which 0 is white               inverted where its integers have no sign and 16 bits or fewer, else as they are
TIFF of 16 bits with colour, or of     (h, w, c) uint8, uint16 or float32 (needs tifffile; see ``barlow.tiff``);
other channels than those above        an extra channel is transparency only where the file says so, and 8 bits
``.npy``, (h, w) or (h, w, c)          (h, w, c); bool → uint8 (0, 255); uint8, uint16 kept; others → float32
animated (GIF, WebP, PNG), many pages  the first frame or page
orientation, of EXIF and TIFF          applied
not finite (float images)              the smallest finite number of its channel
=====================================  =========================================================================

Where ``decode`` is asked to keep transparency, a channel of it (not a transparent colour or entry of a palette) is the
last of 2 or 4, and nothing is laid on white.

Whatever else a file holds, or brings up while it is read, is a ``BadImage`` with a reason. A file that ends early is
bad: grey rows in place of missing ones would be learnt. The rule has a number, ``RULE``, which caches carry.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from barlow import tiff
from barlow.guard import FORMATS, PIXEL_LIMIT, BadImage, check_shape, only_bad_images, too_large

Array = np.ndarray[Any, np.dtype[Any]]

RULE = 2  # raise it whenever the table above or its pixels change
NPY_MAGIC = b"\x93NUMPY"
KEPT = ("uint8", "uint16")  # as they are; other numbers become float32

GREY = {"1": "uint8", "L": "uint8", "LA": "uint8", "La": "uint8", "I": "float32", "F": "float32"}
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
DEEP = {"I;16B": 1, "LA;16B": 2, "RGB;16B": 3, "RGBA;16B": 4}  # PNG of 16 bits: Pillow's word for it → channels
TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Header:
    """What is known of an image before its pixels are read. ``mode``: Pillow's word, or like ``uint16x13``, and after a
    space what was seen besides: ``turned`` (EXIF, TIFF), ``animated``, ``alpha`` (transparency that the first word does
    not tell), ``marked`` (TIFF whose fourth channel is marked as transparency)."""

    height: int
    width: int
    mode: str


def mode_kind(mode: str) -> tuple[int, str]:
    """(channels, dtype name) that ``decode`` returns for a file of this ``Header.mode``."""
    word = mode.split(" ")[0]
    if match := re.fullmatch(r"(uint8|uint16|float32)x(\d+)", word):
        return int(match[2]), match[1]
    if word.startswith("I;16"):
        return 1, "uint16"
    return (1, GREY[word]) if word in GREY else (3, "uint8")


def has_alpha(mode: str) -> bool:
    """Whether a file of this ``Header.mode`` has a channel of transparency, which ``decode`` can keep."""
    return mode.split(" ")[0] in TRANSPARENT or " alpha" in mode


def header(file: IO[bytes] | bytes) -> Header:
    """Size and kind without decoding pixels. Raises BadImage. A cut-off body is found only by ``decode``."""
    if isinstance(file, bytes):
        file = io.BytesIO(file)
    with only_bad_images(file):
        file.seek(0)
        if file.read(6) == NPY_MAGIC:
            return array_header(*_npy_header(file))
        image = _open(file)
        if image is None:
            *shape, numbers, dtype, turn = tiff.header(file)
            head = array_header(tuple(shape), dtype, numbers)
            seen = " turned" * (turn > 1) + " animated" * (numbers > math.prod(shape))
            return replace(head, mode=head.mode + seen)
        turn = _orientation(image)
        width, height = image.size if turn < 5 else image.size[::-1]
        mode, deep = image.mode, _deep(image)
        if deep > 1:
            mode = f"uint16x{deep if deep == 3 else deep - 1}{' alpha' * (deep != 3)}"
        seen = " turned" * (turn > 1 or tiff.orientation(image) > 1)
        if image.format != "MPO" and getattr(image, "is_animated", False):
            seen += " animated"
        return Header(height, width, mode + seen + " marked" * (image.format == "TIFF" and mode == "RGBA"))


def decode(data: bytes, at_least: tuple[int, int] | None = None, fill: bool = True, alpha: bool = False) -> Array:
    """The image as (h, w, c), uint8, uint16 or float32, by the table above; a fresh array that may be written to.

    ``at_least`` (height, width): a JPEG may come back at 1/2, 1/4 or 1/8 of its size, the smallest that is no smaller
    than this on either side (decoded so, in a fraction of the time). ``fill``: False keeps what is not finite, to
    be counted. ``alpha``: a channel of transparency stays the last channel. Raises BadImage.
    """
    file = io.BytesIO(data)
    with only_bad_images(file):
        if data.startswith(NPY_MAGIC):
            array_header(*_npy_header(file))
            file.seek(0)
            return tidy(np.lib.format.read_array(file, allow_pickle=False), fill)
        image = _open(file)
        if image is None:
            *shape, numbers, dtype, _ = tiff.header(file)
            array_header(tuple(shape), dtype, numbers)
            return tidy(tiff.read(file), fill)
        turn = _orientation(image)
        if _deep(image):
            return tidy(tiff.turned(_read_deep(file, image, alpha), turn))
        if at_least is not None and image.format in ("JPEG", "MPO"):
            wanted = at_least if turn >= 5 else at_least[::-1]
            image.draft(None, (max(wanted[0], 1), max(wanted[1], 1)))
        if alpha and image.format == "TIFF":
            tiff.keep_bands(image)
        plain = _flatten(image, alpha)
        array = np.array(plain.transpose(TURNS[turn]) if turn > 1 else plain)
        array = np.invert(array) if tiff.inverted(image) else array
        return tidy(array.view(np.uint32) if tiff.unsigned(image) else array, fill)


def _open(file: IO[bytes]) -> Image.Image | None:
    """The opened image, or None where it is for tifffile."""
    file.seek(0)
    is_tiff = file.read(4) in tiff.MAGIC
    file.seek(0)
    try:
        image = Image.open(file, formats=FORMATS)
    except (UnidentifiedImageError, SyntaxError, NotImplementedError):
        if is_tiff:
            return None  # a layout that Pillow does not know
        raise
    if is_tiff and tiff.beyond_pillow(image):
        return None
    if image.width * image.height > PIXEL_LIMIT:  # Pillow checks too, unless somebody has raised its limit
        raise BadImage(too_large(image.width * image.height))
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1–8, still to be applied. Pillow turns TIFF itself. Damaged EXIF leaves the image upright."""
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1  # a PNG whose EXIF follows its pixels stays as it is: its header alone cannot tell the size
    try:
        value = int(image.getexif().get(0x0112, 1))
    except Exception:
        return 1
    return value if value in TURNS else 1


def _deep(image: Any) -> int:
    """How many channels a PNG of 16 bits has in the file, with transparency; 0 for other images."""
    return DEEP.get(image.tile[0][3], 0) if image.format == "PNG" and image.tile else 0


def _read_deep(file: IO[bytes], image: Any, alpha: bool) -> Array:
    """A PNG of 16 bits as (h, w, c) uint16. Pillow itself would drop the lower bytes of colour, but its words for other
    layouts of the same length read them: of grey with transparency all four bytes, of colour the lower ones."""
    word = image.tile[0][3]

    def as_if(layout: str) -> Array:
        file.seek(0)
        opened: Any = Image.open(file, formats=("PNG",))
        opened.tile = [tiff.laid_out(opened.tile[0], layout)]
        return np.array(opened)

    array: Array
    if word == "LA;16B":
        array = as_if("RGBA").view(">u2").astype(np.uint16)
    elif word == "I;16B":
        array = as_if(word)[:, :, None]
    else:
        array = as_if(word).astype(np.uint16) << 8 | as_if(word[:-1] + "L")
    if DEEP[word] in (1, 3):
        clear = image.info.get("transparency")
        return array if clear is None else np.where((array == clear).all(2, keepdims=True), np.uint16(65535), array)
    return array if alpha else _on_white(array[:, :, :-1], array[:, :, -1:])


def _on_white(array: Array, share: Array) -> Array:
    """uint16 (h, w, c) laid on white, by its transparency (h, w, 1), rounded."""
    full, out = np.uint32(65535), np.empty(array.shape, np.uint16)
    for k, part in enumerate(share.astype(np.uint32)):  # by rows, for the sake of memory
        out[k] = (array[k] * part + full * (full - part) + full // 2) // full  # fits in 32 bits
    return out


def _flatten(image: Image.Image, alpha: bool) -> Image.Image:
    """Pillow's many modes → L, RGB, I;16…, I or F; with ``alpha`` also LA and RGBA."""
    image.load()
    mode = image.mode
    if mode in TRANSPARENT or ("transparency" in image.info and mode in ("1", "L", "P", "RGB")):
        grey = mode in ("1", "L", "LA", "La")
        image = image.convert("LA" if grey else "RGBA")
        if alpha and mode in TRANSPARENT:
            return image
        white = Image.new("L" if grey else "RGB", image.size, "white")
        white.paste(image.convert(white.mode), mask=image.getchannel("A"))
        return white
    if mode == "1":
        return image.convert("L")
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.applyTransform(image, ImageCms.buildTransform(lab, srgb, "LAB", "RGB")) or image
    return image if mode in ("L", "RGB", "I", "F") or mode.startswith("I;16") else image.convert("RGB")


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    file.seek(0)
    read: Callable[..., Any] = np.lib.format.read_array_header_1_0
    if np.lib.format.read_magic(file) != (1, 0):
        read = np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def array_header(shape: tuple[int, ...], dtype: np.dtype[Any], numbers: int = 0) -> Header:
    """Header of an array on disk; BadImage where it is no image or too large."""
    if dtype.kind not in "buif":
        raise BadImage(f"an array of {dtype} is no image" + ("; save its magnitude" if dtype.kind == "c" else ""))
    check_shape(shape, numbers)
    name = "uint8" if dtype.kind == "b" else dtype.name if dtype.name in KEPT else "float32"
    return Header(shape[0], shape[1], f"{name}x{(*shape, 1)[2]}")


def tidy(array: Array, fill: bool = True) -> Array:
    """Numbers of any kind, (h, w) or (h, w, c) → (h, w, c) uint8, uint16 or float32, which is ``filled``."""
    array = array[:, :, None] if array.ndim == 2 else array
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.name in KEPT:
        return np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which the next lines take out
        array = np.ascontiguousarray(array, np.float32)
    return filled(array) if fill else array


def filled(array: Array) -> Array:
    """Without NaN or infinity: in their place the least finite number of the channel. BadImage where there is none."""
    if array.dtype.kind == "f" and not (finite := np.isfinite(array)).all():
        if not finite.any():
            raise BadImage("holds no finite number")
        lowest = np.where(finite, array, np.inf).min((0, 1))
        array = np.where(finite, array, np.where(np.isfinite(lowest), lowest, 0)).astype(np.float32)
    return array
