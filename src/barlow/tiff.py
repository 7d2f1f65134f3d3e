"""TIFF files that Pillow cannot hold: many channels, 16 bits with colour, microscope stacks. Needs ``tifffile``.

Which part of such a file is the image: of its first series the rows, columns and channels (the TIFF axes Y, X, and S
or C), and of every other axis (time, depth, page) the first plane. A plain three-axis array as tifffile writes it says
nothing about its axes: there the shorter of the first and the last axis is the channels.
"""

from __future__ import annotations

import json
from typing import IO, Any

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from barlow.guard import BadImage

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BITS, PHOTOMETRIC, DESCRIPTION, SAMPLES, EXTRA, FORMAT = 258, 262, 270, 277, 338, 339
RGB, CMYK = 2, 5
UNSIGNED, SIGNED = 1, 2
ALPHA = (1, 2)


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
    description = str(tags.get(DESCRIPTION, ""))
    many = "<OME" in description or (description.startswith("ImageJ=") and "channels=" in description)
    return many or (samples == 1 and len(plain_shape(description)) == 3)


def unsigned(image: Image.Image) -> bool:
    """True where the 32-bit integers of an image have no sign, which Pillow takes them to have."""
    return isinstance(image, TiffImageFile) and image.mode == "I" and image.tag_v2.get(BITS, (1,))[0] == 32 and (
        image.tag_v2.get(FORMAT, (UNSIGNED,))[0] == UNSIGNED)  # fmt: skip


def plain_shape(description: str) -> tuple[int, ...]:
    """The shape that tifffile notes in the description of a plain array; () where there is none."""
    if not description.startswith('{"shape"'):
        return ()
    try:
        return tuple(int(length) for length in json.loads(description)["shape"])
    except (ValueError, TypeError):
        return ()


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
    if series.kind == "shaped" and len(series.shape) == 3 and "S" not in series.axes:
        first = series.shape[0] <= series.shape[2]
        return series, {"C": 0, "Y": 1, "X": 2} if first else {"Y": 0, "X": 1, "C": 2}
    places = {axis.replace("S", "C"): place for place, axis in enumerate(series.axes) if axis in "YXSC"}
    if not {"Y", "X"} <= places.keys() or {"S", "C"} <= set(series.axes):
        raise BadImage(f"a TIFF with the axes '{series.axes}', which are not rows, columns and channels")
    return series, places


def header(file: IO[bytes]) -> tuple[int, int, int, int, np.dtype[Any]]:
    """(height, width, channels, numbers in the whole series, dtype) without reading pixels."""
    series, places = open_series(file)
    shape = series.shape
    channels = shape[places["C"]] if "C" in places else 1
    return shape[places["Y"]], shape[places["X"]], channels, int(np.prod(shape, dtype=object)), np.dtype(series.dtype)


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
    return np.ascontiguousarray(planes[:, :, None] if planes.ndim == 2 else planes)
