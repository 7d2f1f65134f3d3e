"""Files as the world has them: good images of every odd kind, and some three hundred broken ones, made on the spot."""

from __future__ import annotations

import functools
import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from barlow.images import Images

Array = np.ndarray[Any, np.dtype[Any]]
PNG = b"\x89PNG\r\n\x1a\n"


def picture(height: int = 24, width: int = 32, channels: int = 3, seed: int = 0) -> Array:
    """Noise over a ramp: it compresses badly, so that a file cut anywhere lacks pixels."""
    noise = np.random.default_rng(seed).integers(0, 200, (height, width, channels))
    return (noise + np.arange(width)[None, :, None] % 56).astype(np.uint8)


def encoded(array: Array | Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    if not isinstance(array, Image.Image):
        array = Image.fromarray(array[:, :, 0] if array.shape[2:] == (1,) else array)
    out = io.BytesIO()
    array.save(out, kind, **options)
    return out.getvalue()


def npy(array: Array, **options: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


def npy_header(text: str) -> bytes:
    """A .npy file with any header and no data."""
    body = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(body)) + body


def good_files() -> dict[str, bytes]:
    """One small file of each format and way of writing it, that every cut must break."""
    colour, grey = picture(), picture(channels=1)
    palette = Image.fromarray(colour).quantize(64)
    return {
        "plain.jpg": encoded(colour, "JPEG", quality=95),
        "progressive.jpg": encoded(colour, "JPEG", quality=95, progressive=True),
        "grey.jpg": encoded(grey, "JPEG", quality=95),
        "colour.png": encoded(colour, "PNG"),
        "grey.png": encoded(grey, "PNG"),
        "palette.png": encoded(palette, "PNG"),
        "deep.png": encoded(Image.fromarray(grey.squeeze().astype(np.uint16) * 257), "PNG"),
        "deep colour.png": deep_png(colour.astype(np.uint16) * 257),
        "deep grey with transparency.png": deep_png(picture(channels=2).astype(np.uint16) * 257),
        "plain.bmp": encoded(colour, "BMP"),
        "plain.dib": encoded(colour, "DIB"),
        "plain.gif": encoded(palette, "GIF"),
        "lossy.webp": encoded(colour, "WEBP", quality=90),
        "lossless.webp": encoded(colour, "WEBP", lossless=True),
        "plain.tif": encoded(colour, "TIFF"),
        "lzw.tif": encoded(colour, "TIFF", compression="tiff_lzw"),
        "deflate.tif": encoded(grey, "TIFF", compression="tiff_adobe_deflate"),
        "float.tif": encoded(Image.fromarray(grey.squeeze().astype(np.float32)), "TIFF"),
        "bands.npy": npy(picture(channels=5)),
    }


def chunk(name: bytes, data: bytes, crc: int | None = None) -> bytes:
    """A chunk of a PNG file."""
    check = zlib.crc32(name + data) if crc is None else crc
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)


def png(width: int, height: int, depth: int = 1, colour: int = 0, data: bytes = b"\0" * 100) -> bytes:
    """A PNG that claims a size."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return PNG + head + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def deep_png(array: Array, interlaced: bool = False, clear: bytes = b"") -> bytes:
    """A PNG of 16 bits from (h, w, c): grey or colour, each with or without transparency; ``clear``: its tRNS."""
    height, width, channels = array.shape
    seven = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    passes = [array[y::dy, x::dx] for y, x, dy, dx in seven] if interlaced else [array]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for one in passes if one.size for line in one)
    head = struct.pack(">IIBBBBB", width, height, 16, (0, 4, 2, 6)[channels - 1], 0, 0, interlaced)
    body = chunk(b"IHDR", head) + (chunk(b"tRNS", clear) if clear else b"") + chunk(b"IDAT", zlib.compress(lines))
    return PNG + body + chunk(b"IEND", b"")


def tiff(tags: dict[int, tuple[int, int, int]], next_ifd: int = 0, first_ifd: int = 8, tail: bytes = b"") -> bytes:
    """A little-endian TIFF of (type, count, value) tags."""
    rows = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", first_ifd, len(tags)) + rows + struct.pack("<I", next_ifd) + tail


def tiff_tags(width: int, height: int) -> dict[int, tuple[int, int, int]]:
    return {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 273: (4, 1, 8),
            277: (3, 1, 1), 278: (4, 1, height), 279: (4, 1, width * height % 2**32)}  # fmt: skip


def bmp(width: int, height: int) -> bytes:
    """A BMP that claims a size."""
    head = struct.pack("<IHHIIiiHHIIiiII", 154, 0, 0, 54, 40, width, height, 1, 24, 0, 100, 0, 0, 0, 0)
    return b"BM" + head + b"\0" * 100


def bombs() -> dict[str, bytes]:
    """A few hundred bytes each that ask for gigabytes."""
    jpeg = bytearray(good_files()["plain.jpg"])
    start = jpeg.index(b"\xff\xc0") + 5
    jpeg[start : start + 4] = struct.pack(">HH", 65500, 65500)
    gif = b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x80\0\0" + b"\0" * 6
    gif += b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x4c\x01\x00;"
    vp8x = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + (16382).to_bytes(3, "little") * 2
    webp = b"RIFF" + struct.pack("<I", len(vp8x) + 4) + b"WEBP" + vp8x
    head = "{'descr': '%s', 'fortran_order': False, 'shape': (%s,), }"
    return {
        "bomb.jpg": bytes(jpeg),
        "bomb.png": png(50000, 50000),
        "bomb colour.png": png(2**31 - 1, 2**31 - 1, 8, 2),
        "bomb wide.png": png(2**31 - 1, 1),
        "bomb.gif": gif,
        "bomb.bmp": bmp(60000, 60000),
        "bomb.webp": webp,
        "bomb.tif": tiff(tiff_tags(100000, 100000)),
        "bomb bands.tif": tiff(tiff_tags(13000, 13000) | {277: (3, 1, 60000)}),
        "bomb.npy": npy_header(head % ("|u1", "99999, 99999, 3")),
        "bomb bands.npy": npy_header(head % ("|u1", "10000, 10000, 99999")),
        "bomb floats.npy": npy_header(head % ("<f8", "9999999999, 9999999999")),
    }


def strangers() -> dict[str, bytes]:
    """Other things behind an image's name."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "hello" * 50)
    html = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    fits = b"SIMPLE  =                    T / standard".ljust(80) + b"BITPIX  =   8".ljust(80) + b"END".ljust(2720)
    contents = {
        "page": html,
        "page with space": b"\n\n  " + html,
        "vector": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "text": b"this is a note, not a picture\n" * 20,
        "json": b'{"error": "access denied"}',
        "pdf": b"%PDF-1.4\n1 0 obj <</Type /Catalog>> endobj\n",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "fits": fits,
        "gd": b"\xff\xfe\x00\x10\x00\x10\x01\xff\xff\xff\xff" + b"\1" * 1024,
        "zip": archive.getvalue(),
        "elf": b"\x7fELF\x02\x01\x01" + b"\0" * 200,
        "pickle": b"\x80\x04\x95\x1e\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
        "netpbm": b"P6 4 4 255\n" + b"\7" * 48,
        "icon": b"\0\0\1\0\1\0\x10\x10\0\0\1\0 \0" + b"\0" * 64,
        "sun": b"\x59\xa6\x6a\x95" + struct.pack(">7I", 4, 4, 24, 48, 1, 0, 0) + b"\7" * 48,
    }
    endings = ("jpg", "png", "tif", "webp")
    return {f"{name}.{ending}": data for name, data in contents.items() for ending in endings}


def crafted() -> dict[str, bytes]:
    """Right magic, wrong everything else."""
    noise = np.random.default_rng(5).bytes(400)
    magic = {"jpg": b"\xff\xd8\xff\xe0", "png": PNG, "gif": b"GIF89a", "bmp": b"BM", "tif": b"II*\0"}
    magic |= {"webp": b"RIFF\x90\1\0\0WEBP", "npy": b"\x93NUMPY\1\0"}
    ihdr = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
    out = {f"noise {k}.{e}": m + noise[k * 20 :] for e, m in magic.items() for k in range(3)}
    out |= {f"only magic.{e}": m for e, m in magic.items()}
    out |= {f"zeros {n}.{e}": b"\0" * n for n in (0, 1, 100, 5000) for e in ("jpg", "png", "npy", "tif", "gif")}
    head = "{'descr': '%s', 'fortran_order': False, 'shape': (%s,), }"
    return out | {
        "no width.png": png(0, 10),
        "wrong crc.png": PNG + chunk(b"IHDR", ihdr, crc=1),
        "wrong depth.png": png(8, 8, depth=7),
        "no pixels.png": PNG + chunk(b"IHDR", ihdr) + chunk(b"IEND", b""),
        "text bomb.png": png(8, 8)[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 90_000_000)) + png(8, 8)[33:],
        "negative.bmp": bmp(-8, 8),
        "no image.gif": b"GIF89a" + struct.pack("<HH", 8, 8) + b"\0\0\0;",
        "ring.tif": tiff({}, next_ifd=8),
        "far.tif": tiff(tiff_tags(8, 8), first_ifd=2**31),
        "far strip.tif": tiff(tiff_tags(8, 8) | {273: (4, 1, 2**30)}),
        "no size.tif": tiff({k: v for k, v in tiff_tags(8, 8).items() if k > 257}),
        "compression.tif": tiff(tiff_tags(8, 8) | {259: (3, 1, 61000)}, tail=b"\7" * 200),
        "objects.npy": npy(np.array([{"a": 1}, None], dtype=object), allow_pickle=True),
        "words.npy": npy(np.array([["a", "b"]])),
        "complex.npy": npy(np.ones((4, 4), np.complex64)),
        "line.npy": npy(np.arange(9)),
        "stack.npy": npy(np.zeros((2, 3, 4, 5), np.uint8)),
        "none.npy": npy(np.zeros((0, 4), np.uint8)),
        "nan.npy": npy(np.full((4, 4), np.nan)),
        "negative.npy": npy_header(head % ("|u1", "-4, 4")),
        "code.npy": npy_header("{'descr': __import__('os').getcwd(), 'fortran_order': False, 'shape': (4, 4)}"),
        "records.npy": npy(np.zeros((4, 4), [("a", np.uint8), ("b", np.float32)])),
        "short.npy": npy(picture())[:-1],
    }


@functools.cache
def broken_files() -> dict[str, bytes]:
    """Name → bytes of files that must all be refused with a reason."""
    out: dict[str, bytes] = {}
    for name, data in good_files().items():
        stem, _, ending = name.rpartition(".")
        for tenth in range(10):
            out[f"{stem} cut at {tenth}.{ending}"] = data[: len(data) * tenth // 10]
    return out | bombs() | strangers() | crafted()


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Writes name → bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def folder_of(path: Path, count: int = 12, **shape: int) -> list[Array]:
    """``count`` PNG files 00.png … and their pixels."""
    pictures = [picture(seed=k, **shape) for k in range(count)]
    write(path, {f"{k:02}.png": encoded(array, "PNG") for k, array in enumerate(pictures)})
    return pictures


def same(images: Images, arrays: list[Array]) -> None:
    assert len(images) == len(arrays)
    for i, array in enumerate(arrays):
        np.testing.assert_array_equal(images.read(i), array)
        assert tuple(images.sizes[i]) == array.shape[:2]
        assert images.channels == array.shape[2]
        assert images.read(i).flags.writeable


def keys(images: Images) -> list[str]:
    return [images.key(i) for i in range(len(images))]
