"""TIFF files that Pillow cannot hold: many channels, 16 bits with colour, microscope stacks. Needs ``tifffile``.

Which part of such a file is the image: of its first series the rows, columns and channels (the TIFF axes Y, X, and S
or C), and of every other axis (time, depth, page) the first plane. Axes that are stated are obeyed. A plain three-axis
array as tifffile writes it states none: there the shorter of the first and the last axis is the channels.
"""

from __future__ import annotations

import json
from typing import IO, Any

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from barlow.guard import BadImage

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BITS, PHOTOMETRIC, DESCRIPTION, ORIENTATION, SAMPLES, LAYOUT, EXTRA, FORMAT = 258, 262, 270, 274, 277, 284, 338, 339
MINISWHITE, RGB, CMYK = 0, 2, 5
UNSIGNED, SIGNED = 1, 2
ALPHA, ASSOCIATED, SEPARATE = (1, 2), 1, 2


def beyond_pillow(image: Image.Image) -> bool:
    """True where Pillow opens the file but would drop bits, channels or signs, or take a channel for transparency."""
    if not isinstance(image, TiffImageFile):
        return False
    tags = image.tag_v2
    samples, extra = tags.get(SAMPLES, 1), tags.get(EXTRA, ())
    if samples > 1 and any(bits != 8 for bits in tags.get(BITS, (1,))):
        return True
    if tags.get(BITS, (1,))[0] == 8 and tags.get(FORMAT, (1,))[0] == SIGNED:
        return True
    colours = {RGB: 3, CMYK: 4}.get(tags.get(PHOTOMETRIC, 0), 1 if samples < 3 else 3)
    if samples != colours + (len(extra) == 1 and extra[0] in ALPHA):
        return True
    if tags.get(LAYOUT) == SEPARATE and len(extra) == 1 and (samples == 2 or extra[0] == ASSOCIATED):
        return True
    description = str(tags.get(DESCRIPTION, ""))
    many = "<OME" in description or (description.startswith("ImageJ=") and "channels=" in description)
    return many or (samples == 1 and _beyond_pages(image, *stated(description)))


def _beyond_pages(image: Any, shape: tuple[int, ...], axes: str) -> bool:
    """True where an array that tifffile wrote has channels, or planes that are not the pages that Pillow sees."""
    if axes.endswith("YX") and "C" not in axes:
        return len(shape) > 2 and not image.is_animated
    return len(shape) == 3 or (len(shape) > 3 and axes != "")


def unsigned(image: Image.Image) -> bool:
    """True where the 32-bit integers of an image have no sign, which Pillow takes them to have."""
    return isinstance(image, TiffImageFile) and image.mode == "I" and image.tag_v2.get(BITS, (1,))[0] == 32 and (
        image.tag_v2.get(FORMAT, (UNSIGNED,))[0] == UNSIGNED)  # fmt: skip


def inverted(image: Image.Image) -> bool:
    """True where 0 is white in an image of 16 bits, which Pillow inverts for fewer bits only."""
    return isinstance(image, TiffImageFile) and image.mode.startswith("I;16") and (
        image.tag_v2.get(PHOTOMETRIC) == MINISWHITE)  # fmt: skip


def orientation(image: Image.Image) -> int:
    """The orientation 1–8 of a TIFF that Pillow opened, which it applies itself; 1 for other images."""
    value = image.tag_v2.get(ORIENTATION, 1) if isinstance(image, TiffImageFile) else 1
    return value if value in range(2, 9) else 1


def turned(array: np.ndarray[Any, np.dtype[Any]], orientation: int) -> np.ndarray[Any, np.dtype[Any]]:
    """(h, w, c) as it lies in the file → upright, a view of it."""
    array = array.swapaxes(0, 1) if orientation >= 5 else array
    array = array[::-1] if orientation in (3, 4, 7, 8) else array
    return array[:, ::-1] if orientation in (2, 3, 6, 7) else array


def keep_bands(image: Any) -> None:
    """Lets Pillow leave the colours as they are, where it would divide them by a fourth channel."""
    image.tile = [laid_out(tile, ("RGBA", *tile[3][1:])) if tile[3][0] == "RGBa" else tile for tile in image.tile]


def laid_out(tile: Any, layout: Any) -> Any:
    """One of Pillow's tiles, which are plain tuples before Pillow 11, with other words for how its bytes lie."""
    return tile._replace(args=layout) if hasattr(tile, "_replace") else (*tile[:3], layout)


def stated(description: str) -> tuple[tuple[int, ...], str]:
    """(shape, axes) that tifffile notes in the description of an array; () and "" where there are none."""
    if not description.startswith('{"shape"'):
        return (), ""
    try:
        noted = json.loads(description)
        shape = tuple(int(length) for length in noted["shape"])
    except (ValueError, TypeError):
        return (), ""
    axes = noted.get("axes")
    return shape, axes if isinstance(axes, str) and len(axes) == len(shape) else ""


def open_series(file: IO[bytes]) -> tuple[Any, dict[str, int]]:
    """(first series of the file, the position of its axes Y, X and, where it has channels, C); raises BadImage."""
    try:
        import tifffile
    except ImportError:
        raise BadImage("a TIFF that Pillow cannot read; some need tifffile (pip install 'barlow[tiff]')") from None
    file.seek(0)
    # A file that was opened by its number has no name of its own. Of a set of OME files each is what lies in it: the
    # others would be opened, whatever their names are, and what is not found of them be filled with zeros.
    tiff = tifffile.TiffFile(file, name="image", _multifile=False)
    if not tiff.series:
        raise BadImage("a TIFF that holds no image")
    series = tiff.series[0]
    known = stated(str(series.keyframe.description))[1]
    if series.kind == "shaped" and not known and len(series.shape) == 3 and "S" not in series.axes:
        first = series.shape[0] <= series.shape[2]
        return series, {"C": 0, "Y": 1, "X": 2} if first else {"Y": 0, "X": 1, "C": 2}
    places = {axis.replace("S", "C"): place for place, axis in enumerate(series.axes) if axis in "YXSC"}
    if not {"Y", "X"} <= places.keys() or {"S", "C"} <= set(series.axes):
        raise BadImage(f"a TIFF with the axes '{series.axes}', which are not rows, columns and channels")
    return series, places


def header(file: IO[bytes]) -> tuple[int, int, int, int, np.dtype[Any], int]:
    """(height, width, channels, numbers in the whole series, dtype, orientation) without reading pixels."""
    series, places = open_series(file)
    shape, turn = series.shape, _orientation(series)
    height, width = (shape[places[axis]] for axis in ("YX" if turn < 5 else "XY"))
    channels = shape[places["C"]] if "C" in places else 1
    return height, width, channels, int(np.prod(shape, dtype=object)), np.dtype(series.dtype), turn


def _orientation(series: Any) -> int:
    value = series.keyframe.tags.valueof(ORIENTATION, default=1)
    return int(value) if value in range(2, 9) else 1


def read(file: IO[bytes]) -> np.ndarray[Any, np.dtype[Any]]:
    """The image, (h, w, c) in its own dtype. The caller checks the sizes with ``header`` before."""
    series, places = open_series(file)
    length = file.seek(0, 2)
    for page in series.pages:
        if page and any(a + n > length for a, n in zip(page.dataoffsets, page.databytecounts, strict=False)):
            raise BadImage("image file is truncated")  # tifffile itself would fill with zeros
    try:
        planes = series.asarray()
    except ValueError as error:
        if "imagecodecs" in str(error):
            raise BadImage("a TIFF whose compression needs one more package: pip install imagecodecs") from None
        raise
    kept = sorted(places.values())
    planes = planes[tuple(slice(None) if k in kept else 0 for k in range(planes.ndim))]
    planes = planes.transpose([kept.index(places[axis]) for axis in "YXC" if axis in places])
    planes = planes[:, :, None] if planes.ndim == 2 else planes
    page = series.keyframe
    if page.photometric == MINISWHITE and planes.dtype.name in ("bool", "uint8", "uint16"):
        white = planes.shape[2] - len(page.extrasamples)  # an extra one, such as transparency, is no shade of gray
        planes = np.concatenate([planes[:, :, :white] ^ planes.dtype.type(2**page.bitspersample - 1),
                                 planes[:, :, white:]], axis=2)  # fmt: skip
    return np.ascontiguousarray(turned(planes, _orientation(series)))
