"""Every odd kind of file becomes the documented pixels."""

from __future__ import annotations

import builtins
import io
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from corpus import deep_png, encoded, npy, picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from barlow.decode import Header, decode, has_alpha, header, mode_kind
from barlow.guard import BadImage


def image(mode: str, pixels: list[Any], width: int) -> Image.Image:
    made = Image.new(mode, (width, len(pixels) // width))
    made.putdata(pixels)
    return made


def tif(array: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, array, **options)
    return out.getvalue()


def palette(transparency: int | None = None) -> bytes:
    made = image("P", [0, 1, 2, 1], 2)
    made.putpalette([10, 20, 30, 200, 100, 50, 7, 7, 7])
    return encoded(made, "PNG", **({} if transparency is None else {"transparency": transparency}))


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (3, 2), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)


GREY4 = np.array([[0, 1], [128, 255]], np.uint8)
DEEP4 = np.array([[0, 1], [40000, 65535]], np.uint16)
DEEP6 = np.uint16([[[0, 1, 256], [40000, 65535, 511], [3, 2, 1]]])
REAL4 = np.array([[-1.5, 0.0], [2.25, 1e6]], np.float32)
RED6 = [[[200, 0, 0]] * 3] * 2

# name: (bytes, pixels, mode of the header)
ODD: dict[str, tuple[bytes, Any, str]] = {
    "grey": (encoded(GREY4, "PNG"), GREY4[..., None], "L"),
    "1-bit": (encoded(image("1", [0, 1, 1, 0], 2), "PNG"), [[[0], [255]], [[255], [0]]], "1"),
    "1-bit tiff": (
        encoded(image("1", [0, 1, 1, 0], 2), "TIFF", compression="group4"),
        [[[0], [255]], [[255], [0]]],
        "1",
    ),
    "16-bit png": (encoded(Image.fromarray(DEEP4), "PNG"), DEEP4[..., None], "I;16"),
    "16-bit tiff": (encoded(Image.fromarray(DEEP4), "TIFF"), DEEP4[..., None], "I;16"),
    "16-bit big-endian tiff": (tif(DEEP4, byteorder=">"), DEEP4[..., None], "I;16B"),
    "16-bit colour png": (deep_png(DEEP6), DEEP6, "uint16x3"),
    "16-bit colour png, interlaced": (deep_png(DEEP6, True), DEEP6, "uint16x3"),
    # on white: (1000·32768 + 65535·32767) / 65535 = 33267.0
    "16-bit colour with transparency": (
        deep_png(np.uint16([[[1000, 0, 65535, 32768], [9, 9, 9, 0]]])),
        np.uint16([[[33267, 32767, 65535], [65535] * 3]]),
        "uint16x3 alpha",
    ),
    "16-bit grey with transparency": (
        deep_png(np.uint16([[[1000, 32768], [9, 0], [9, 65535]]])),
        np.uint16([[[33267], [65535], [9]]]),
        "uint16x1 alpha",
    ),
    "16-bit, one colour transparent": (
        deep_png(DEEP6, clear=DEEP6[0, 0].astype(">u2").tobytes()),
        np.concatenate([[[[65535] * 3]], DEEP6[:, 1:2], DEEP6[:, 2:]], 1).astype(np.uint16),
        "uint16x3",
    ),
    "16-bit, one grey transparent": (
        deep_png(DEEP4[..., None], clear=b"\0\1"),
        np.uint16([[[0], [65535]], [[40000], [65535]]]),
        "I;16",
    ),
    "16-bit tiff, 0 is white": (tif(DEEP4, photometric="miniswhite"), 65535 - DEEP4[..., None], "I;16"),
    "8-bit tiff, 0 is white": (tif(GREY4, photometric="miniswhite"), 255 - GREY4[..., None], "L"),
    "1-bit tiff, 0 is white": (
        tif(GREY4 > 100, photometric="miniswhite"),
        [[[255], [255]], [[0], [0]]],
        "1",
    ),
    "float tiff, 0 is white": (tif(REAL4, photometric="miniswhite"), REAL4[..., None], "F"),
    "16-bit big-endian tiff, 0 is white": (
        tif(DEEP4, photometric="miniswhite", byteorder=">"),
        65535 - DEEP4[..., None],
        "uint16x1",
    ),
    "16-bit pages, 0 is white": (
        tif(np.stack([DEEP4] * 3), photometric="miniswhite", metadata={"axes": "CYX"}),
        65535 - np.stack([DEEP4] * 3, 2),
        "uint16x3",
    ),
    "32-bit tiff": (
        encoded(image("I", [0, -7, 70000, 5], 2), "TIFF"),
        np.array([[[0], [-7]], [[70000], [5]]], np.float32),
        "I",
    ),
    "float tiff": (encoded(Image.fromarray(REAL4), "TIFF"), REAL4[..., None], "F"),
    "palette": (palette(), [[[10, 20, 30], [200, 100, 50]], [[7, 7, 7], [200, 100, 50]]], "P"),
    "palette, one entry transparent": (
        palette(1),
        [[[10, 20, 30], [255, 255, 255]], [[7, 7, 7], [255, 255, 255]]],
        "P",
    ),
    # on white: (100·128 + 255·127) / 255 = 177.2
    "grey with transparency": (
        encoded(image("LA", [(100, 128), (100, 0), (100, 255), (0, 128)], 2), "PNG"),
        [[[177], [255]], [[100], [127]]],
        "LA",
    ),
    "colour with transparency": (
        encoded(image("RGBA", [(100, 0, 255, 128), (9, 9, 9, 0)], 2), "PNG"),
        [[[177, 127, 255], [255, 255, 255]]],
        "RGBA",
    ),
    "transparent webp": (
        encoded(image("RGBA", [(100, 0, 255, 128), (9, 9, 9, 0)], 2), "WEBP", lossless=True),
        [[[177, 127, 255], [255, 255, 255]]],
        "RGBA",
    ),
    "one colour transparent": (
        encoded(image("RGB", [(1, 2, 3), (4, 5, 6)], 2), "PNG", transparency=(1, 2, 3)),
        [[[255, 255, 255], [4, 5, 6]]],
        "RGB",
    ),
    # 255 − k less c·(255 − k)/255
    "CMYK": (
        encoded(image("CMYK", [(255, 0, 0, 0), (0, 0, 0, 255), (0, 0, 0, 0), (100, 50, 25, 10)], 4), "TIFF"),
        [[[0, 255, 255], [0, 0, 0], [255, 255, 255], [149, 197, 221]]],
        "CMYK",
    ),
    "Lab": (encoded(image("LAB", [(255, 128, 128), (0, 128, 128)], 2), "TIFF"), [[[255, 255, 255], [0, 0, 0]]], "LAB"),
    "animated gif": (animated("GIF"), RED6, "P animated"),
    "animated webp": (animated("WEBP"), RED6, "RGB animated"),
    "animated png": (animated("PNG"), RED6, "RGB animated"),
    "many pages": (animated("TIFF"), RED6, "RGB animated"),
    "1×1": (encoded(np.uint8([[[3, 4, 5]]]), "PNG"), [[[3, 4, 5]]], "RGB"),
    "npy grey": (npy(GREY4), GREY4[..., None], "uint8x1"),
    "npy bool": (npy(GREY4 > 100), [[[0], [0]], [[255], [255]]], "uint8x1"),
    "npy 16-bit, big-endian, other order": (
        npy(np.asfortranarray(DEEP4.astype(">u2"))),
        DEEP4[..., None],
        "uint16x1",
    ),
    "npy double": (npy(REAL4.astype(np.float64)), REAL4[..., None], "float32x1"),
    "npy integers": (npy(np.int64([[-3, 70000]])), np.float32([[[-3], [70000]]]), "float32x1"),
    "npy five bands": (npy(picture(3, 4, 5)), picture(3, 4, 5), "uint8x5"),
    "npy not finite": (
        npy(np.float32([[np.nan, 4], [np.inf, 2]])),
        np.float32([[[2], [4]], [[2], [2]]]),
        "float32x1",
    ),
}

BANDS = picture(20, 30, 13)
DEEP_BANDS = BANDS.astype(np.uint16) * 200
STACK = np.arange(2 * 3 * 4 * 5, dtype=np.uint16).reshape(2, 3, 4, 5) * 9  # times, channels, rows, columns
ODD |= {
    "32-bit tiff without signs": (
        tif(np.uint32([[0, 5], [3_000_000_000, 7]])),
        np.float32([[[0], [5]], [[3e9], [7]]]),
        "I",
    ),
    "8-bit tiff with signs": (
        tif(np.int8([[-128, 0], [5, 127]])),
        np.float32([[[-128], [0]], [[5], [127]]]),
        "float32x1",
    ),
    "a microscope's times and channels": (
        tif(STACK, ome=True, metadata={"axes": "TCYX"}),
        STACK[0].transpose(1, 2, 0),
        "uint16x3 animated",
    ),
    "13 bands": (tif(BANDS, photometric="minisblack", planarconfig="contig"), BANDS, "uint8x13"),
    "13 bands of 16 bits, planes": (
        tif(DEEP_BANDS.transpose(2, 0, 1).copy(), photometric="minisblack", planarconfig="separate"),
        DEEP_BANDS,
        "uint16x13",
    ),
    "plain array, channels last": (tif(DEEP_BANDS), DEEP_BANDS, "uint16x13"),
    "plain array, channels first": (tif(DEEP_BANDS.transpose(2, 0, 1).copy()), DEEP_BANDS, "uint16x13"),
    "stated axes, more channels than rows": (
        tif(DEEP_BANDS[:4].transpose(2, 0, 1).copy(), photometric="minisblack", metadata={"axes": "CYX"}),
        DEEP_BANDS[:4],
        "uint16x13",
    ),
    "stated axes, channels last": (
        tif(DEEP_BANDS[:, :5].copy(), photometric="minisblack", metadata={"axes": "YXC"}),
        DEEP_BANDS[:, :5],
        "uint16x13",
    ),
    "stated depths are no channels": (
        tif(DEEP_BANDS.transpose(2, 0, 1).copy(), photometric="minisblack", metadata={"axes": "ZYX"}),
        DEEP_BANDS[:, :, :1],
        "I;16 animated",
    ),
    "stated depths that are no pages": (
        tif(DEEP_BANDS, photometric="minisblack", metadata={"axes": "YXZ"}),
        DEEP_BANDS[:, :, :1],
        "uint16x1 animated",
    ),
    "stated depths and channels": (
        tif(STACK, photometric="minisblack", metadata={"axes": "ZCYX"}),
        STACK[0].transpose(1, 2, 0),
        "uint16x3 animated",
    ),
    "stated times and depths": (
        tif(STACK, photometric="minisblack", metadata={"axes": "TZYX"}),
        STACK[0, 0, :, :, None],
        "I;16 animated",
    ),
    "stated depths behind one page": (
        tif(DEEP_BANDS.transpose(2, 0, 1).copy(), photometric="minisblack", metadata={"axes": "ZYX"}, truncate=True),
        DEEP_BANDS[:, :, :1],
        "uint16x1 animated",
    ),
    "16-bit colour": (tif(DEEP_BANDS[:, :, :3].copy(), photometric="rgb"), DEEP_BANDS[:, :, :3], "uint16x3"),
    "fourth band": (
        tif(BANDS[:, :, :4].copy(), photometric="rgb", extrasamples=["unspecified"]),
        BANDS[:, :, :4],
        "uint8x4",
    ),
    "two bands": (
        tif(BANDS[:, :, :2].copy(), photometric="minisblack", planarconfig="contig"),
        BANDS[:, :, :2],
        "uint8x2",
    ),
    "microscope, channels": (
        tif(BANDS[:, :, :5].transpose(2, 0, 1).copy(), imagej=True, metadata={"axes": "CYX"}),
        BANDS[:, :, :5],
        "uint8x5",
    ),
    "microscope, depth and channels": (
        tif(np.stack([BANDS[:, :, :2].transpose(2, 0, 1), BANDS[:, :, 2:4].transpose(2, 0, 1)]), ome=True,
            metadata={"axes": "ZCYX"}),
        BANDS[:, :, :2],
        "uint8x2 animated",
    ),
    "float bands": (
        tif(BANDS.astype(np.float64), photometric="minisblack", planarconfig="contig"),
        BANDS.astype(np.float32),
        "float32x13",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_golden_pixels(name: str) -> None:
    data, pixels, mode = ODD[name]
    expected = np.array(pixels) if not isinstance(pixels, list) else np.array(pixels, np.uint8)
    seen, array = header(data), decode(data)
    np.testing.assert_allclose(array, expected, rtol=0, atol=name == "Lab")  # a colour profile rounds as it will
    assert array.dtype == expected.dtype
    assert array.dtype.isnative
    assert (seen.height, seen.width, seen.mode) == (*expected.shape[:2], mode)
    assert mode_kind(seen.mode) == (expected.shape[2], expected.dtype.name)
    array[0, 0, 0] = 1  # a fresh array, which may be written to


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8], upright[8:, 24:] = (250, 0, 0), (0, 0, 250)  # top left, bottom right
    stored = {  # how a camera held that way lays the rows down: the inverse of what a viewer must do
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(np.ascontiguousarray(stored), kind, exif=exif, lossless=True, quality=95, subsampling=0)
    seen, array = header(data), decode(data)
    assert (seen.height, seen.width) == array.shape[:2] == (16, 32)
    assert np.abs(array.astype(int) - upright).max() < (60 if kind == "JPEG" else 1)
    assert ("turned" in seen.mode) == (orientation > 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_what_goes_through_tifffile(orientation: int) -> None:
    """Kills: scans and drone images of 16 bits or many bands that lie on their side, beside upright ones of 8 bits."""
    stored = picture(16, 24)
    upright = np.array(Image.open(io.BytesIO(encoded(stored, "TIFF", tiffinfo={274: orientation}))))  # as Pillow turns
    for array in (stored.astype(np.uint16) * 257, np.concatenate([stored, stored], 2)):
        photometric = "rgb" if array.shape[2] == 3 else "minisblack"
        data = tif(array, photometric=photometric, planarconfig="contig", extratags=[(274, 3, 1, orientation, True)])
        seen, read = header(data), decode(data)
        assert (seen.height, seen.width) == read.shape[:2] == upright.shape[:2]
        assert seen.mode == f"{array.dtype}x{array.shape[2]}{' turned' * (orientation > 1)}"
        np.testing.assert_array_equal(read[:, :, :3], upright.astype(array.dtype) * (array.max() // stored.max()))
    exif = Image.Exif()
    exif[0x0112] = orientation
    block = encoded(stored, "PNG", exif=exif)
    at = block.index(b"eXIf") - 4
    size = int.from_bytes(block[at : at + 4], "big") + 12
    data = deep_png(stored.astype(np.uint16) * 257)
    data = data[:33] + block[at : at + size] + data[33:]
    assert (header(data).height, header(data).width) == upright.shape[:2]
    np.testing.assert_array_equal(decode(data), upright.astype(np.uint16) * 257)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("interlaced", [False, True])
def test_png_of_16_bits_keeps_every_bit_or_is_refused(channels: int, interlaced: bool) -> None:
    """Kills: the upper byte alone, which leaves a camera of 12 bits 16 levels; garbage where a file is damaged."""
    array = np.random.default_rng(channels).integers(0, 65536, (11, 13, channels)).astype(np.uint16)
    data = deep_png(array, interlaced)
    np.testing.assert_array_equal(decode(data, alpha=True), array)
    for place in range(33, len(data), 7):
        damaged = bytearray(data)
        damaged[place] ^= 0x5A
        try:
            np.testing.assert_array_equal(decode(bytes(damaged), alpha=True), array)  # a check sum alone was hit
        except BadImage:
            continue
    for length in range(0, len(data) - 30, 7):
        with pytest.raises(BadImage):
            decode(data[:length])


def test_transparency_of_16_bits_is_laid_on_white_to_the_last_bit() -> None:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 65536, (9, 9, 4)).astype(np.uint16)
    array[0], array[1, :, 3], array[2, :, 3] = 65535, 0, 65535
    colour, share = array[:, :, :3].astype(object), array[:, :, 3:].astype(object)
    slow = (2 * (colour * share + 65535 * (65535 - share)) + 65535) // (2 * 65535)  # whole numbers of any length
    np.testing.assert_array_equal(decode(deep_png(array)), slow.astype(np.uint16))


# name: (bytes, with its transparency)
SEEN_THROUGH = {
    "png": (encoded(picture(channels=4), "PNG"), picture(channels=4)),
    "webp": (encoded(np.maximum(picture(channels=4), 1), "WEBP", lossless=True), np.maximum(picture(channels=4), 1)),
    "tiff": (encoded(picture(channels=4), "TIFF"), picture(channels=4)),
    "grey png": (encoded(Image.fromarray(picture(channels=2), "LA"), "PNG"), picture(channels=2)),
    "tiff, unassociated": (
        tif(picture(channels=4), photometric="rgb", extrasamples=["unassalpha"], compression="zlib"),
        picture(channels=4),
    ),
    # a band that is marked so must not divide the others
    "tiff, associated": (tif(picture(channels=4), photometric="rgb", extrasamples=["assocalpha"]), picture(channels=4)),
    "tiff, compressed": (
        tif(picture(channels=4), photometric="rgb", extrasamples=["assocalpha"], compression="zlib"),
        picture(channels=4),
    ),
}


@pytest.mark.parametrize("name", SEEN_THROUGH)
def test_transparency_is_kept_where_it_is_asked_for(name: str) -> None:
    """Kills: the near infrared of four bands of bytes, which GDAL marks as transparency, laid on white."""
    data, array = SEEN_THROUGH[name]
    np.testing.assert_array_equal(decode(data, alpha=True), array)
    mode = header(data).mode
    assert has_alpha(mode)
    assert (" marked" in mode) == name.startswith("tiff")
    plain = decode(data)
    assert plain.shape[2] == array.shape[2] - 1 == mode_kind(mode)[0]
    np.testing.assert_array_equal(decode(data, alpha=False), plain)
    assert not has_alpha(header(palette(1)).mode)
    np.testing.assert_array_equal(decode(palette(1), alpha=True), decode(palette(1)))


@pytest.mark.parametrize("exif", [b"II*\0\xff\xff\xff\xff", b"nonsense", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0"])
def test_damaged_exif_leaves_a_good_image_upright(exif: bytes) -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0" + exif)
    assert header(data).mode == "RGB"
    np.testing.assert_array_equal(decode(data), decode(encoded(picture(), "JPEG")))


@pytest.mark.parametrize(
    ("at_least", "shape"),
    [((100, 150), (100, 150)), ((99, 149), (100, 150)), ((101, 150), (200, 300)), ((25, 37), (50, 75)),
     ((1, 1), (50, 75)), ((401, 601), (400, 600)), ((0, 0), (50, 75))],
)  # fmt: skip
def test_jpeg_at_reduced_scale(at_least: tuple[int, int], shape: tuple[int, int]) -> None:
    smooth = np.add.outer(np.arange(400) / 4, np.arange(600) / 6)[..., None].repeat(3, 2).astype(np.uint8)
    array = decode(encoded(smooth, "JPEG", quality=95), at_least)
    assert array.shape == (*shape, 3)
    step = 400 // shape[0]
    middle = smooth[step // 2 :: step, step // 2 :: step][: shape[0], : shape[1]]
    assert np.abs(array[: middle.shape[0], : middle.shape[1]].astype(int) - middle).max() <= 4


def test_reduced_scale_of_a_turned_jpeg_counts_in_upright_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(400, 600), "JPEG", exif=exif)  # upright: 600 rows, 400 columns
    assert decode(data, (300, 100)).shape == (300, 200, 3)
    assert decode(data, (100, 200)).shape == (300, 200, 3)


def test_only_jpeg_is_reduced() -> None:
    assert decode(encoded(picture(64, 64), "PNG"), (8, 8)).shape == (64, 64, 3)


@given(st.sampled_from(["L", "RGB", "1", "RGBA", "I;16"]), st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_size(mode: str, height: int, width: int) -> None:
    data = encoded(Image.new(mode, (width, height)), "PNG")
    seen, array = header(data), decode(data)
    assert (seen.height, seen.width, *mode_kind(seen.mode)) == (*array.shape, array.dtype.name)


@given(st.integers(1, 20000), st.booleans(), st.sampled_from(["JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP"]))
@settings(max_examples=40, deadline=None)
def test_one_pixel_high_or_wide(length: int, tall: bool, kind: str) -> None:
    length = min(length, 16383) if kind == "WEBP" else length
    size = (1, length) if tall else (length, 1)
    data = encoded(Image.new("RGB", size, (9, 9, 9)), kind, quality=80)
    seen, array = header(data), decode(data, (1, 1))
    assert (seen.width, seen.height) == size
    assert array.shape[2] == 3
    assert 1 in array.shape[:2]


def test_without_tifffile_the_reason_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def fake(name: str, *args: Any, **options: Any) -> Any:
        if name == "tifffile":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", fake)
    monkeypatch.delitem(sys.modules, "tifffile")
    with pytest.raises(BadImage, match=r"barlow\[tiff\]"):
        decode(ODD["13 bands"][0])
    assert decode(ODD["16-bit tiff"][0]).dtype == np.uint16  # Pillow can


def test_of_a_set_of_ome_files_each_is_what_lies_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a channel of zeros in place of the one in another file, and files opened because an image names them."""
    ids = [f"urn:uuid:{uuid.UUID(int=c)}" for c in range(2)]
    planes = "".join(
        f'<TiffData FirstC="{c}" FirstT="0" FirstZ="0" IFD="0" PlaneCount="1"><UUID FileName="{c}.ome.tif">{one}</UUID>'
        "</TiffData>" for c, one in enumerate(ids)
    )  # fmt: skip
    channels = "".join(f'<Channel ID="Channel:0:{c}" SamplesPerPixel="1"/>' for c in range(2))
    size = 'DimensionOrder="XYCZT" SizeC="2" SizeT="1" SizeX="4" SizeY="3" SizeZ="1" Type="uint16"'
    text = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{}"><Image ID="Image:0">'
        f'<Pixels ID="Pixels:0" {size}>{channels}{planes}</Pixels></Image></OME>'
    )
    both = np.arange(1, 25, dtype=np.uint16).reshape(2, 3, 4)
    for c in range(2):
        (tmp_path / f"{c}.ome.tif").write_bytes(tif(both[c], description=text.format(ids[c]).encode(), metadata=None))
    monkeypatch.chdir(tmp_path)
    for c in range(2):
        with Path(f"{c}.ome.tif").open("rb") as file:
            assert header(file) == Header(3, 4, "uint16x1")
        np.testing.assert_array_equal(decode(Path(f"{c}.ome.tif").read_bytes())[:, :, 0], both[c])


def test_a_compression_that_needs_one_more_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """LZW of 16 bits in colour, as scanners write it."""

    def none(self: Any, **_: Any) -> Any:
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", none)
    with pytest.raises(BadImage, match="needs one more package: pip install imagecodecs"):
        decode(tif(DEEP_BANDS[:, :, :3].copy(), photometric="rgb"))


def test_truncated_bands_are_refused() -> None:
    data = ODD["13 bands of 16 bits, planes"][0]
    with pytest.raises(BadImage, match="truncated"):
        decode(data[:-100])


def test_what_is_no_shade_of_gray_is_not_inverted() -> None:
    """Kills: opaque made transparent, where 0 is white."""
    both = np.stack([np.full((8, 9), 10, np.uint8), np.full((8, 9), 255, np.uint8)], 2)
    for wide in (1, 257):
        file = tif(both.astype(np.uint16) * wide if wide > 1 else both, photometric="miniswhite", planarconfig="contig",
                   extrasamples=["unassalpha"])  # fmt: skip
        assert decode(file, alpha=True)[0, 0].tolist() == [245 * wide, 255 * wide]


@pytest.mark.parametrize(
    "kind", [("rgb", 4, "assocalpha"), ("minisblack", 2, "unassalpha"), ("minisblack", 2, "assocalpha")]
)
def test_planes_that_lie_apart_with_transparency_can_be_read(kind: tuple[str, int, str]) -> None:
    photometric, samples, extra = kind
    planes = np.arange(samples, dtype=np.uint8)[:, None, None] + np.zeros((samples, 20, 33), np.uint8)
    file = tif(planes, photometric=photometric, planarconfig="separate", extrasamples=[extra])
    found = header(file)
    assert (found.height, found.width) == (20, 33)
    assert decode(file)[0, 0].tolist() == list(range(samples))
