"""The set T of random views, as data: a view is one row of numbers, and what was drawn for a batch is arrays.

The paper's pair is the preset ``natural``, with the numbers of its section 2.2 and published code. Three steps: `draw`
decides everything from the addresses alone, `crop` cuts and resizes the pixels (in the loader), `finish` does the rest
for the whole batch at once (on the training device).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from barlow.crops import Draws, crop, crop_one
from barlow.draws import IntArray, uniforms
from barlow.errors import UserError
from barlow.pixels import finish

__all__ = [
    "PRESETS",
    "Draws",
    "OwnView",
    "View",
    "apply_own",
    "call_own",
    "crop",
    "crop_one",
    "draw",
    "finish",
    "generator",
    "suggest",
]

OwnView = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
TRIES = 10  # boxes drawn before the central crop is taken, as torchvision does
LONGEST = 3.3  # sides of a rectangle that is painted over, to each other, either way
SMALL = 64  # pixels: at this size and below, a blur of 2 pixels removes what there is to see


@dataclass(frozen=True)
class View:
    """One random view. Left as it is, a view is the central square of the image and nothing else.

    Probabilities and strengths are those of torchvision: a brightness of 0.4 is a factor from 0.6 to 1.4, a hue of 0.1
    up to a tenth of the colour circle either way.
    """

    crop: tuple[float, float] = (1.0, 1.0)  # share of the image's area
    ratio: tuple[float, float] = (1.0, 1.0)  # width / height of the crop
    flip: float = 0.0  # probability, left-right
    flip_vertical: float = 0.0  # probability, top-bottom
    turn: float = 0.0  # probability of a turn by 90, 180 or 270 degrees; 0.75 makes all four equally likely
    jitter: float = 0.0  # probability of the six below, together
    brightness: float = 0.0  # strength: 0.4 is a factor from 0.6 to 1.4
    contrast: float = 0.0  # likewise
    saturation: float = 0.0  # three channels only, as hue and gray
    hue: float = 0.0  # up to 0.5
    gain: float = 0.0  # each channel by its own factor
    offset: float = 0.0  # each channel by its own shift, in units of its mean over the crop: the same for any sensor
    gray: float = 0.0  # probability
    blur: float = 0.0  # probability
    sigma: tuple[float, float] = (0.1, 2.0)  # of the blur, in pixels of the crop whatever its size
    solarize: float = 0.0  # probability
    threshold: float = 0.5  # solarising inverts from this share of the full range on: 128 of 255, rounded
    erase: float = 0.0  # probability that a rectangle is painted over, each channel with one level drawn for it
    erased: tuple[float, float] = (0.02, 0.2)  # its share of the crop's area

    def __post_init__(self) -> None:
        for name in ("flip", "flip_vertical", "turn", "jitter", "gray", "blur", "solarize", "threshold", "erase"):
            _within(name, getattr(self, name), 0, 1)
        for name in ("brightness", "contrast", "saturation", "gain", "offset"):
            _within(name, getattr(self, name), 0, 1)
        _within("hue", self.hue, 0, 0.5)
        for name, low, high in (("crop", 0, 1), ("ratio", 0, math.inf), ("sigma", 0, 100), ("erased", 0, 1)):
            pair = getattr(self, name)
            two = isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(v, int | float) for v in pair)
            if not (two and low < pair[0] <= pair[1] <= high and pair[1] < math.inf):
                top = f" to {high}" if high < math.inf else ""
                raise UserError(f"view: {name} is {pair}; it needs two numbers above {low}{top}, the smaller one first")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not (isinstance(value, int | float) and low <= value <= high):
        raise UserError(f"view: {name} is {value}; it must lie in {low} to {high}")


_A = View(
    crop=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5,
    jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, gray=0.2, blur=1.0,
)  # fmt: skip
_B = replace(_A, blur=0.1, solarize=0.2)


# Without colour, light is what would give away that two views are of one image. So it changes twice as much as in the
# paper's pair, and crops are mild: together three points of k-NN, four with 1 % of the labels. That a part may be
# missing brings one more (docs/log.md).
_GRAY = View(
    crop=(0.65, 1.0), ratio=(4 / 5, 5 / 4), flip=0.5,
    jitter=1.0, brightness=0.8, contrast=0.8, blur=0.3, sigma=(0.5, 1.5), solarize=0.3, erase=0.5,
)  # fmt: skip


def _both(**changes: float) -> tuple[View, View]:
    return replace(_A, **changes), replace(_B, **changes)  # type: ignore[arg-type]


# By what the images are. The paper's pair but for what would harm: at 64 pixels and less its blur leaves little to see,
# gray images have no colour, seen from above there is no up and colours mean something,
# and where channels are no colours each has its own gain and offset, and inverting them means nothing.
PRESETS: dict[str, tuple[View, ...]] = {
    "natural": (_A, _B),
    "small": _both(blur=0.0),
    "grayscale": (_GRAY, _GRAY),
    "overhead": _both(flip_vertical=0.5, turn=0.75, hue=0.0),
    "many-channel": _both(saturation=0.0, hue=0.0, gray=0.0, blur=0.0, solarize=0.0, gain=0.2, offset=0.1),
}


def suggest(channels: int, size: int) -> tuple[str, str]:
    """The preset for images of so many channels at so many pixels, and the reason in one sentence."""
    if channels == 1:
        return "grayscale", "one channel: no colour, so more light and contrast"
    if channels != 3:
        return "many-channel", f"{channels} channels: each its own gain and offset, no colour"
    if size <= SMALL:
        return "small", f"colour images of {size} pixels: the paper's pair without blur, which would leave little"
    return "natural", f"colour images of {size} pixels: the paper's pair"


def draw(
    view: View, seed: int, epochs: IntArray, images: IntArray, number: int, sizes: IntArray, channels: int
) -> Draws:
    """All that happens to n images in view ``number``: a pure function of each image's own address and size.

    ``sizes`` is (n, 2), height and width of the arrays to be cropped. Every draw has its own place in the image's row
    of uniform numbers, so that a changed probability changes nothing else.
    """
    n = len(images)
    places = np.cumsum([2 * TRIES, 16, 2 * channels, (5 + channels) * (view.erase > 0)])
    u = uniforms(seed, epochs, images, number, int(places[-1]))
    tries, u, own, last = np.split(u, places[:-1], axis=1)
    u = u.T
    jitter, colour = u[5] < view.jitter, channels == 3
    strengths = (view.brightness, view.contrast, view.saturation * colour, view.hue * colour)
    b, c, s, h = (np.where(jitter, k * (2 * v - 1), 0.0) for k, v in zip(strengths, u[6:10], strict=True))
    spread = np.where(jitter[:, None], 2 * own - 1, 0.0)
    low, high = view.sigma
    return Draws(
        box=_boxes(view, tries, u[0], u[1], sizes),
        flip=u[2] < view.flip,
        flip_vertical=u[3] < view.flip_vertical,
        turn=np.where(u[4] < view.turn, 1 + (u[4] / max(view.turn, 1e-9) * 3).astype(np.int64), 0),
        brightness=1 + b,
        contrast=1 + c,
        saturation=1 + s,
        hue=h,
        gray=(u[10] < view.gray) & colour,
        gain=1 + view.gain * spread[:, :channels],
        offset=view.offset * spread[:, channels:],
        sigma=np.where(u[11] < view.blur, low + (high - low) * u[12], 0.0),
        solarize=np.where(u[13] < view.solarize, np.full(n, view.threshold), np.inf),
        erased=_rectangles(view, last),
        level=last[:, 5:] if view.erase else np.zeros((n, channels)),
        reach=math.ceil(3 * high),
    )


def _rectangles(view: View, u: NDArray[np.float64]) -> NDArray[np.float64]:
    """What is painted over, (n, 4) in shares of the crop's sides: Random Erasing (Zhong et al., AAAI 2020), whose
    rectangle is inside the image; without its second try where one is too long, which is cut to the image's side."""
    if not view.erase:
        return np.zeros((len(u), 4))
    happens, area, ratio, across, down = u[:, :5].T
    root = np.sqrt(view.erased[0] + (view.erased[1] - view.erased[0]) * area)
    stretch = np.exp((ratio - 0.5) * math.log(LONGEST))  # the root of width / height
    w, h = np.minimum(root * stretch, 1.0), np.minimum(root / stretch, 1.0)
    return np.where(happens < view.erase, np.stack([across * (1 - w), down * (1 - h), w, h]), 0.0).T


def _boxes(
    view: View, tries: NDArray[np.float64], across: NDArray[np.float64], down: NDArray[np.float64], sizes: IntArray
) -> IntArray:
    """torchvision's RandomResizedCrop for n images at once: the first of ten boxes that fits, else a central one."""
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    area = height * width * (view.crop[0] + (view.crop[1] - view.crop[0]) * tries[:, :TRIES])
    low, high = math.log(view.ratio[0]), math.log(view.ratio[1])
    ratio = np.exp(low + (high - low) * tries[:, TRIES:])
    # a last candidate that always fits: the whole image, cut centrally to the nearest ratio that is allowed
    w = np.concatenate([np.rint(np.sqrt(area * ratio)), np.minimum(width, np.rint(height * view.ratio[1]))], axis=1)
    h = np.concatenate([np.rint(np.sqrt(area / ratio)), np.minimum(height, np.rint(width / view.ratio[0]))], axis=1)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.argmax(axis=1)
    row = np.arange(len(sizes))
    w, h = np.maximum(w[row, first], 1), np.maximum(h[row, first], 1)
    free = np.stack([width[:, 0] - w, height[:, 0] - h])
    central = first == TRIES
    x, y = np.where(central, free // 2, np.floor(np.stack([across, down]) * (free + 1)))
    return np.stack([x, y, w, h], axis=1).astype(np.int64)


def generator(seed: int, epochs: IntArray, images: IntArray, view: int) -> torch.Generator:
    """A generator for a user's own view of a batch, seeded by the address of the batch: nothing to save or restore."""
    address = np.concatenate([np.broadcast_to(epochs, np.shape(images)), images]).astype("<i8")
    words = hashlib.blake2b(f"{seed} {view} ".encode() + address.tobytes(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(words, "little") >> 1)


def apply_own(
    own: OwnView, crops: torch.Tensor, draws: torch.Generator, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """A user's own view of crops (n, size, size, c), then normalised: float32 (n, c, size, size), channels last.

    ``own`` is any function of (images float32 (n, c, size, size) in [0, 1], generator) to a tensor of the same shape.
    """
    images = crops.permute(0, 3, 1, 2).float() / (255 if crops.dtype == torch.uint8 else 1)
    made = call_own(own, images, draws)
    m, d = (torch.tensor(v, dtype=torch.float32, device=crops.device)[:, None, None] for v in (mean, std))
    return ((made - m) / d).contiguous(memory_format=torch.channels_last)


def call_own(own: OwnView, images: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """What a user's own view makes of a batch, float32; UserError where it is not floats of the same shape."""
    made = own(images, draws)
    if not isinstance(made, torch.Tensor) or made.shape != images.shape or not made.is_floating_point():
        got = f"{tuple(made.shape)} of {made.dtype}" if isinstance(made, torch.Tensor) else type(made).__name__
        raise UserError(f"your own view returned {got}; it must return floats of shape {tuple(images.shape)}")
    return made.float()
