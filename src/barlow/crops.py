"""What was drawn for a batch, and its first use: `crop` cuts, resizes, flips and turns, in the loader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from barlow.errors import UserError

Floats = NDArray[np.float64]
TOGETHER = 64  # pixels: up to this side, products of a whole batch are faster than a native resample per image
BATCH = 32  # images in one product: what stays in a core's cache
UNIT = ("integer images are taken as uint8 or uint16, and real numbers must lie in 0 to 1, all finite: convert them, "
        "or divide them by the full range of the sensor")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Draws:
    """All that was drawn for n images of one view, one row per image, in the order in which it is applied."""

    box: NDArray[np.int64]  # (n, 4): x, y, width, height in pixels of the image
    flip: NDArray[np.bool_]  # (n,) left becomes right
    flip_vertical: NDArray[np.bool_]  # (n,) top becomes bottom
    turn: NDArray[np.int64]  # (n,) quarter turns counter-clockwise, 0 to 3, after the flips
    brightness: Floats  # (n,) factor, 1 = as it was
    contrast: Floats  # (n,) factor of the distance from the crop's mean gray; from a channel's mean if not RGB
    saturation: Floats  # (n,) factor of the distance from the pixel's gray
    hue: Floats  # (n,) in full turns of the colour circle
    gray: NDArray[np.bool_]  # (n,)
    gain: Floats  # (n, channels) factor
    offset: Floats  # (n, channels) in units of the channel's mean over the crop
    sigma: Floats  # (n,) of the blur, in pixels of the crop; 0 = not blurred
    solarize: Floats  # (n,) inverted from this share of the full range on; inf = not solarised
    erased: Floats  # (n, 4): x, y, width, height of what is painted over, in shares of the crop's side; 0 = nothing
    level: Floats  # (n, channels) with what, in shares of the full range
    reach: int  # radius of the blur's kernel in pixels, the same for every image of a view

    def __len__(self) -> int:
        return len(self.flip)

    def __getitem__(self, rows: slice | NDArray[Any]) -> Draws:
        """The draws of some of the images: by a slice, numbers or a mask."""
        chosen: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return Draws(**{name: v if name == "reach" else v[rows] for name, v in chosen.items()})

    def put(self, i: int, one: Draws) -> None:
        """Replaces what was drawn for image ``i``, in place."""
        for name in (f.name for f in fields(self) if f.name != "reach"):
            getattr(self, name)[i] = getattr(one, name)[0]


def crop(images: Sequence[NDArray[Any]] | NDArray[Any], draws: Draws, size: int) -> NDArray[Any]:
    """Cut, resize, flip and turn: n images (h, w, c) of any sizes -> one array (n, size, size, c).

    Antialiased bicubic (a = -0.5) as in Pillow and torchvision; the box is cut first, so nothing outside it is seen.
    uint8 gives uint8; uint16 (over its full range) and floats in [0, 1] give float32 in [0, 1], ValueError for a list
    of both: what comes out is of one scale. Images that come as one array of bytes, small and of one size, are done
    together as matrix products: the same values, but for one or two of 255 where the native resample rounds its
    weights. An image's result depends on no other image.
    """
    if len(images) != len(draws):
        raise ValueError(f"{len(images)} images but {len(draws)} draws")
    first = images[0]
    small = max(first.shape[:2]) <= TOGETHER and first.size <= TOGETHER**2
    if isinstance(images, np.ndarray) and images.dtype == np.uint8 and small:
        return _crop_together(images, draws, size)
    if len({image.dtype == np.uint8 for image in images}) > 1:
        raise ValueError("bytes and other numbers in one list of images: they are on different scales")
    made = np.empty((len(images), size, size, first.shape[2]), np.uint8 if first.dtype == np.uint8 else np.float32)
    out = torch.from_numpy(made)
    for i, image in enumerate(images):
        out[i] = crop_one(image, draws, i, size)
    return made


def crop_one(image: NDArray[Any], draws: Draws, i: int, size: int) -> torch.Tensor:
    """`crop` of one image (h, w, c) with the draws of row ``i``: (size, size, c)."""
    x, y, w, h = draws.box[i].tolist()
    cut = _resized(image[y : y + h, x : x + w], size)
    mirrored = [axis for axis, yes in ((1, draws.flip_vertical[i]), (2, draws.flip[i])) if yes]
    cut = cut.flip(mirrored) if mirrored else cut
    return (torch.rot90(cut, int(draws.turn[i]), (1, 2)) if draws.turn[i] else cut).permute(1, 2, 0)


def _resized(image: NDArray[Any], size: int) -> torch.Tensor:
    """(h, w, c) -> (c, size, size), by torch's native resample: for bytes several times as fast as Pillow's."""
    if image.dtype == np.uint16:
        image = image.astype(np.float32) / np.float32(65535)
    elif image.dtype != np.uint8:
        image = image.astype(np.float32)
        if not in_unit(image):
            raise UserError(UNIT)
    # Three and four channels have a kernel of their own, so more go four at a time. The axis of the batch is added
    # before the permutation, else torch does not see that the channels are last and takes a slower way.
    groups = [image[..., k : k + 4] for k in range(0, image.shape[2], 4)]
    parts = [torch.from_numpy(g.copy()[None]).permute(0, 3, 1, 2) for g in groups]  # a copy: images may be read-only
    parts = [F.interpolate(p, size=(size, size), mode="bicubic", antialias=True)[0] for p in parts]
    made = parts[0] if len(parts) == 1 else torch.cat(parts)
    return made if made.dtype == torch.uint8 else made.clamp_(0, 1)


def in_unit(image: NDArray[Any]) -> bool:
    """Whether all numbers of an image lie in 0 to 1; none is NaN."""
    return bool(image.min() >= 0 and image.max() <= 1)


def _crop_together(images: NDArray[np.uint8], draws: Draws, size: int) -> NDArray[np.uint8]:
    """`crop` for bytes of one size: along the rows, then down the columns, flips being part of the weights.

    With NumPy, not torch: products so small gain nothing from a second thread, and waking one costs more than they do.
    """
    n, h, w, c = images.shape
    made = np.empty((n, size, size, c), np.uint8)
    for part in (slice(a, a + BATCH) for a in range(0, n, BATCH)):
        box = draws.box[part]
        across = _weights(w, size, box[:, 0], box[:, 2], draws.flip[part])
        down = _weights(h, size, box[:, 1], box[:, 3], draws.flip_vertical[part])
        x = np.array(images[part].transpose(0, 3, 1, 2), np.float32, order="C")
        x = _to_bytes(np.matmul(x, across.transpose(0, 1, 3, 2)))  # to bytes between, as the native one
        made[part] = _to_bytes(np.matmul(down, x)).transpose(0, 2, 3, 1)
    for turn in (1, 2, 3):
        rows = draws.turn == turn
        made[rows] = np.rot90(made[rows], turn, (1, 2))
    return made


def _to_bytes(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The nearest whole numbers in 0 to 255, in place and still as float32."""
    np.rint(x, out=x)
    return np.clip(x, 0, 255, out=x)


def _weights(
    extent: int, size: int, start: NDArray[np.int64], length: NDArray[np.int64], flip: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """(n, 1, size, extent): image i's pixels start[i] to start[i] + length[i] of ``extent``, resized to ``size``."""
    return _windows(extent, size)[flip.astype(np.int64), length, :, extent - start][:, None]


@lru_cache(maxsize=8)
def _windows(extent: int, size: int) -> NDArray[np.float32]:
    """(2, extent + 1, size, extent + 1, extent): every part of `_bank` as wide as the image, none copied."""
    return np.lib.stride_tricks.sliding_window_view(_bank(extent, size), extent, axis=3)


def _bank(extent: int, size: int) -> NDArray[np.float32]:
    """(2, extent + 1, size, 2 extent): the weights of every length, plain and flipped, from column ``extent`` on."""
    bank = np.zeros((2, extent + 1, size, 2 * extent), np.float32)
    for length in range(1, extent + 1):
        scale = max(length / size, 1.0)  # made wider when shrinking: the antialiasing
        centre = (np.arange(size)[:, None] + 0.5) * length / size
        pixel = np.arange(length)
        inside = (pixel >= np.floor(centre - 2 * scale + 0.5)) & (pixel < np.floor(centre + 2 * scale + 0.5))
        weights = np.where(inside, _cubic((pixel + 0.5 - centre) / scale), 0)
        bank[0, length, :, extent : extent + length] = weights / weights.sum(axis=1, keepdims=True)
    bank[1] = bank[0, :, ::-1]
    return bank


def _cubic(x: Floats, a: float = -0.5) -> Floats:
    """Keys' cubic convolution kernel (IEEE Trans. ASSP 29, 1981)."""
    x = np.abs(x)
    return np.where(x < 1, ((a + 2) * x - (a + 3)) * x * x + 1, np.where(x < 2, (((x - 5) * x + 8) * x - 4) * a, 0.0))
