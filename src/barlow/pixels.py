"""Everything after the crop, for a whole batch on its device: colour, blur, solarise, erase, normalise.

Brightness, contrast, saturation, hue, grayscale and the normalisation are affine in the colour of a pixel, so one image
has one matrix and one vector, and every pixel is touched once. What differs from torchvision: the order is brightness,
contrast, saturation, hue (there: drawn at random); values are clipped once after all of them (there: rounded to 8 bits
and clipped after each); hue turns the chroma plane of YIQ (there: the angle of HSV, which also moves a colour's luma);
and where there are not three channels, contrast is about each channel's own mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from barlow.crops import Draws, Floats

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: the gray of Pillow and torchvision
YIQ = np.array([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
BLOCK = 32  # rows of a blur made by one matrix product: of 16 to 224, the fastest at 224 pixels and as fast below
CHUNK = 1 << 18  # values that each thread works on at once: what stays in a core's cache; a GPU takes 64 times as many


def finish(crops: torch.Tensor, draws: Draws, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Colour, blur, solarise, erase and normalise a batch, on the device of ``crops``.

    ``crops`` is (n, size, size, c), uint8 or float32 in [0, 1]; ``mean`` and ``std`` are one number per channel in
    units of the full range. Returns float32 (n, c, size, size), channels last in memory, under autocast too. An
    image's result does not depend on the others of its batch.
    """
    with torch.autocast(crops.device.type, enabled=False):
        return _finish(crops, draws, mean, std)


def _finish(crops: torch.Tensor, draws: Draws, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    n, s, _, c = crops.shape
    if len(draws) != n or len(mean) != c or len(std) != c:
        raise ValueError(f"{n} crops of {c} channels, but {len(draws)} draws, {len(mean)} means, {len(std)} deviations")
    m, d, device = np.array(mean), np.array(std), crops.device
    full = 255.0 if crops.dtype == torch.uint8 else 1.0
    matrix, lift, drift = (_to(v, device) for v in _colour(draws, d * full))
    base = _to(-m / d, device)
    luma, black, white = _to(np.array(LUMA), device), base[:, None], _to((1 - m) / d, device)[:, None]
    made = torch.empty((n, c, s, s), device=device, memory_format=torch.channels_last)
    step = max(1, CHUNK * (torch.get_num_threads() if device.type == "cpu" else 64) // (c * s * s))
    for part in (slice(a, min(a + step, n)) for a in range(0, n, step)):
        x = crops[part].permute(0, 3, 1, 2).contiguous().float().view(-1, c, s * s)
        mean_of = x.sum(dim=2) / (s * s)  # a sum of bytes is exact in any order, up to 256 pixels
        gray = (mean_of * luma).sum(dim=1, keepdim=True) if c == 3 else mean_of
        bias = (base + lift[part] * gray + drift[part] * mean_of)[..., None]
        x = torch.baddbmm(bias, matrix[part], x) if c == 3 else torch.addcmul(bias, matrix[part], x)
        x = x.clamp_min_(black).clamp_max_(white).view(-1, c, s, s)  # one clamp with two tensors is far slower
        _blur(x, draws.sigma[part], min(draws.reach, s - 1))
        _solarize(x, draws.solarize[part], m, d)
        _erase(x, draws.erased[part], (draws.level[part] - m) / d)
        made[part] = x
    return made


def _to(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(device)


def _colour(draws: Draws, unit: Floats) -> tuple[Floats, Floats, Floats]:
    """All colour draws composed: pixels p of an image of mean gray g and channel means a become, in units of ``unit``
    (c,) per channel, matrix @ p + lift * g + drift * a.

    The matrix is (n, 3, 3), or its diagonal (n, c, 1) where there are not three channels; lift and drift are (n, c).
    """
    gain = draws.gain / unit
    # contrast adds a gray, which saturation, hue and grayscale leave as it is
    lift = ((1 - draws.contrast) * draws.brightness)[:, None] * gain
    scale = ((draws.brightness * draws.contrast)[:, None] * gain)[..., None]
    drift = draws.offset / unit
    if len(unit) != 3:
        return scale, lift, drift
    to_gray, s = np.tile(LUMA, (3, 1)), draws.saturation[:, None, None]
    matrix = _hue(draws.hue) @ (s * np.eye(3) + (1 - s) * to_gray)
    # to_gray @ matrix is to_gray: neither saturation nor hue moves a pixel's gray
    return scale * np.where(draws.gray[:, None, None], to_gray, matrix), lift, drift


def _hue(turns: Floats) -> Floats:
    """(n,) -> (n, 3, 3): the chroma plane of YIQ turned from red towards green, luma and grays untouched."""
    cos, sin = np.cos(2 * np.pi * turns), -np.sin(2 * np.pi * turns)
    rotation = np.zeros((len(turns), 3, 3))
    rotation[:, 0, 0], rotation[:, 1, 1], rotation[:, 2, 2] = 1, cos, cos
    rotation[:, 1, 2], rotation[:, 2, 1] = -sin, sin
    return np.asarray(np.linalg.inv(YIQ) @ rotation @ YIQ)


def _blur(x: torch.Tensor, sigma: Floats, reach: int) -> None:
    """Blurs in place those images of (n, c, s, s) whose σ is not 0, each with its own Gaussian, mirrored at borders.

    Down the columns, then along the rows, as products with banded matrices: two short convolutions by their cost, but
    with the speed of matrix products, one kernel per image, on any device.
    """
    which = np.flatnonzero(sigma)
    if not len(which) or not reach:
        return
    every = len(which) == len(x)
    rows = torch.from_numpy(which).to(x.device)
    w = _blur_matrices(sigma[which], reach, x.shape[-1], x.device)
    y = x if every else x[rows]
    y = torch.cat([w[:, None, out, near] @ y[:, :, near] for out, near in _bands(x.shape[-1], reach)], dim=2)
    y = y.flatten(1, 2)
    y = torch.cat([y[:, :, near] @ w[:, out, near].mT for out, near in _bands(x.shape[-1], reach)], dim=2)
    if every:
        x.copy_(y.view(x.shape))
    else:
        x[rows] = y.view(-1, *x.shape[1:])


def _bands(size: int, reach: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of pixels, each with the pixels that its blur sees."""
    for a in range(0, size, BLOCK):
        yield slice(a, a + BLOCK), slice(max(0, a - reach), a + BLOCK + reach)


def _blur_matrices(sigma: Floats, reach: int, size: int, device: torch.device) -> torch.Tensor:
    """(m, size, size): row i is the Gaussian around pixel i, what falls outside mirrored back (border not repeated)."""
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma[:, None]) ** 2)
    k = _to(kernel / kernel.sum(axis=1, keepdims=True), device)
    wide = size + 2 * reach
    t = torch.zeros((len(k), size, wide), device=device)
    t.as_strided((len(k), size, 2 * reach + 1), (size * wide, wide + 1, 1)).copy_(k[:, None])
    t[:, :, reach + 1 : 2 * reach + 1] += t[:, :, :reach].flip(-1)
    t[:, :, size - 1 : size + reach - 1] += t[:, :, size + reach :].flip(-1)
    return t[:, :, reach : reach + size]


def _solarize(x: torch.Tensor, thresholds: Floats, m: Floats, d: Floats) -> None:
    """Inverts in place, in images with a finite threshold, what is at or above it; x is normalised by m and d."""
    which = np.flatnonzero(np.isfinite(thresholds))
    if not len(which):
        return
    rows = torch.from_numpy(which).to(x.device)
    from_on = _to((thresholds[which, None] - m) / d, x.device)[..., None, None]
    mirror = _to((1 - 2 * m) / d, x.device)[:, None, None]
    y = x[rows]
    x[rows] = torch.where(y >= from_on, mirror - y, y)


def _erase(x: torch.Tensor, boxes: Floats, levels: Floats) -> None:
    """Paints over in place the pixels of (n, c, s, s) whose centres lie in a box (n, 4), with ``levels`` (n, c)."""
    which = np.flatnonzero(boxes[:, 2])
    if not len(which):
        return
    rows, centre = torch.from_numpy(which).to(x.device), (np.arange(x.shape[-1]) + 0.5) / x.shape[-1]
    left, top, width, height = boxes[which].T[..., None]
    across, down = (
        torch.from_numpy((start <= centre) & (centre < start + length)).to(x.device)
        for start, length in ((left, width), (top, height))
    )
    inside = down[:, None, :, None] & across[:, None, None, :]
    x[rows] = torch.where(inside, _to(levels[which], x.device)[..., None, None], x[rows])
