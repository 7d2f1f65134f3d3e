"""Everything after the crop: against a slow float64 reference, and one by one against torchvision and Pillow."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter, ImageOps

from barlow import pixels
from barlow.crops import Draws
from barlow.pixels import finish
from barlow.views import PRESETS, View, draw

NEUTRAL = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, "gray": False, "sigma": 0.0}
NEUTRAL |= {"solarize": np.inf, "flip": False, "flip_vertical": False, "turn": 0}
LUMA = np.array([0.299, 0.587, 0.114])


def exactly(n: int, channels: int, **given: object) -> Draws:
    """Draws that do nothing but what is given, to all n images."""
    columns = {name: np.array([given.get(name, v)] * n) for name, v in NEUTRAL.items()}
    gain, offset = (np.tile(given.get(k, [v] * channels), (n, 1)) for k, v in (("gain", 1.0), ("offset", 0.0)))
    erased, level = (np.tile(given.get(k, [0.0] * m), (n, 1)) for k, m in (("erased", 4), ("level", channels)))
    box = np.zeros((n, 4), np.int64)
    return Draws(box=box, gain=gain, offset=offset, erased=erased, level=level, reach=6, **columns)  # type: ignore[arg-type]


def texture(n: int, size: int, channels: int, low: int = 0, high: int = 255, seed: int = 0) -> torch.Tensor:
    """Smooth structure with some noise, uint8 (n, size, size, channels) over the whole range low to high."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n * channels):
        layers = [Image.fromarray(rng.random((k, k)).astype(np.float32)).resize((size, size), 3) for k in (2, 5, 11)]
        x = np.mean([np.asarray(v) for v in layers], axis=0) + 0.1 * rng.random((size, size))
        made.append((x - x.min()) / max(float(np.ptp(x)), 1e-9))
    stacked = np.stack(made).reshape(n, channels, size, size).transpose(0, 2, 3, 1)
    return torch.from_numpy(np.rint(low + stacked * (high - low)).astype(np.uint8))


def plain(crops: torch.Tensor, draws: Draws) -> torch.Tensor:
    """The result in [0, 1], not normalised."""
    c = crops.shape[3]
    return finish(crops, draws, [0.0] * c, [1.0] * c)


def slowly(image: np.ndarray, d: Draws, i: int, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """`finish` of one image (s, s, c) in float64, one operation and one pixel row after the other."""
    x = image / 255.0 if image.dtype == np.uint8 else image.astype(float)
    s, _, c = x.shape
    luma, own_mean = LUMA, x.mean(axis=(0, 1))
    x = x * d.brightness[i]
    x = d.contrast[i] * x + (1 - d.contrast[i]) * ((x @ luma).mean() if c == 3 else x.mean(axis=(0, 1)))
    if c == 3:
        x = d.saturation[i] * x + (1 - d.saturation[i]) * (x @ luma)[..., None]
        yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
        y, re, im = np.moveaxis(x @ yiq.T, 2, 0)
        chroma = (re + 1j * im) * np.exp(-2j * math.pi * d.hue[i])
        x = np.stack([y, chroma.real, chroma.imag], axis=2) @ np.linalg.inv(yiq).T
        x = np.repeat((x @ luma)[..., None], 3, axis=2) if d.gray[i] else x
    x = np.clip(x * d.gain[i] + d.offset[i] * own_mean, 0, 1)
    if d.sigma[i] > 0:
        reach = min(d.reach, s - 1)
        k = np.exp(-0.5 * (np.arange(-reach, reach + 1) / d.sigma[i]) ** 2)
        k /= k.sum()
        for axis in (0, 1):
            wide = np.pad(x, [(reach, reach) if a == axis else (0, 0) for a in range(3)], mode="reflect")
            x = sum(k[j] * np.take(wide, range(j, j + s), axis) for j in range(2 * reach + 1))
    x = np.where(x >= d.solarize[i], 1 - x, x)
    left, top, width, height = d.erased[i]
    for row in range(s):
        for column in range(s):
            if left <= (column + 0.5) / s < left + width and top <= (row + 0.5) / s < top + height:
                x[row, column] = d.level[i]
    return (x - mean) / std


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("size", [1, 2, 5, 33, 50, 96])
def test_finish_is_the_slow_obvious_way(channels: int, size: int):
    """float32 against float64: 2e-5 of a standard deviation, but for pixels within 1e-6 of the solarising threshold."""
    n = 12
    view = View(
        jitter=0.9, brightness=0.5, contrast=0.5, saturation=0.5, hue=0.3, gain=0.3, offset=0.2, gray=0.3,
        blur=0.6, solarize=0.5, erase=0.5,
    )  # fmt: skip
    d = draw(view, 0, np.zeros(n, np.int64), np.arange(n), 0, np.full((n, 2), 50), channels)
    mean, std = np.linspace(0.3, 0.6, channels), np.linspace(0.2, 0.3, channels)
    crops = texture(n, size, channels)
    made = finish(crops, d, mean.tolist(), std.tolist())
    assert made.shape == (n, channels, size, size)
    assert made.dtype == torch.float32
    assert made.is_contiguous(memory_format=torch.channels_last)
    for i in range(n):
        expected = slowly(crops[i].numpy(), d, i, mean, std)
        gap = np.abs(made[i].permute(1, 2, 0).numpy() - expected)
        value = expected * std + mean
        near = (np.abs(value - d.solarize[i]) < 1e-6) | (np.abs(1 - value - d.solarize[i]) < 1e-6)
        assert gap[~near].max(initial=0) < 2e-5
        assert near.mean() < 0.01


@pytest.mark.parametrize(
    ("given", "theirs"),
    [
        ({"brightness": 1.3}, lambda x: TF.adjust_brightness(x, 1.3)),
        ({"contrast": 0.7}, lambda x: TF.adjust_contrast(x, 0.7)),
        ({"contrast": 1.2}, lambda x: TF.adjust_contrast(x, 1.2)),
        ({"saturation": 0.8}, lambda x: TF.adjust_saturation(x, 0.8)),
        ({"saturation": 1.2}, lambda x: TF.adjust_saturation(x, 1.2)),
        ({"gray": True}, lambda x: TF.rgb_to_grayscale(x, 3)),
        ({"sigma": 1.0}, lambda x: TF.gaussian_blur(x, 13, 1.0)),
        ({"sigma": 2.0}, lambda x: TF.gaussian_blur(x, 13, 2.0)),
        ({"solarize": 0.5}, lambda x: TF.solarize(x, 0.5)),
        (
            {"brightness": 0.8, "contrast": 1.2, "saturation": 0.9},
            lambda x: TF.adjust_saturation(TF.adjust_contrast(TF.adjust_brightness(x, 0.8), 1.2), 0.9),
        ),
    ],
)
def test_each_operation_is_torchvisions(given: dict, theirs):
    """On colours that no operation clips, 1e-3: torchvision rounds the weights of gray to 0.2989, 0.587, 0.114."""
    crops = texture(6, 40, 3, low=70, high=185)
    made = plain(crops, exactly(6, 3, **given))
    expected = torch.stack([theirs(x) for x in crops.permute(0, 3, 1, 2) / 255])
    assert (made - expected).abs().max() < (2e-4 if set(given) - {"sigma", "solarize", "brightness"} else 2e-6)


def test_normalising_is_torchvisions():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    crops = texture(4, 30, 3)
    made = finish(crops, exactly(4, 3), mean, std)
    expected = TF.normalize(crops.permute(0, 3, 1, 2) / 255, mean, std)
    assert torch.allclose(made, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_solarising_is_pillows_on_every_byte(channels: int):
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, channels).contiguous()
    made = plain(values, exactly(1, channels, solarize=View().threshold))[0].permute(1, 2, 0)
    expected = np.asarray(ImageOps.solarize(Image.fromarray(values[0, ..., 0].numpy()), threshold=128))
    assert np.array_equal(np.rint(made.numpy() * 255)[..., 0], expected)
    normalised = finish(values, exactly(1, channels, solarize=0.5), [0.485] * channels, [0.229] * channels)
    assert np.array_equal(np.rint((normalised[0, 0].numpy() * 0.229 + 0.485) * 255), expected)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.5, 2.0])
def test_blur_is_near_pillows(sigma: float):
    """Pillow makes three box blurs of bytes, rounded six times, and repeats the border: 4 of 255 inside, mean 1."""
    crops = texture(4, 64, 3)
    made = plain(crops, exactly(4, 3, sigma=sigma)).permute(0, 2, 3, 1).numpy() * 255
    for i in range(4):
        theirs = np.asarray(Image.fromarray(crops[i].numpy()).filter(ImageFilter.GaussianBlur(sigma)), float)
        gap = np.abs(made[i] - theirs)[6:-6, 6:-6]
        assert gap.max() < 4
        assert gap.mean() < 1


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation", "gray"])
def test_colour_is_near_pillows(operation: str):
    """Pillow rounds to bytes after every step and takes the mean gray as a whole number: 2 of 255."""
    given = {"brightness": 1.35, "contrast": 1.3, "saturation": 0.8, "gray": True}[operation]
    crops = texture(4, 40, 3)
    made = plain(crops, exactly(4, 3, **{operation: given})).permute(0, 2, 3, 1).numpy() * 255
    for i in range(4):
        image = Image.fromarray(crops[i].numpy())
        theirs = {
            "brightness": lambda im: TF.adjust_brightness(im, 1.35),
            "contrast": lambda im: TF.adjust_contrast(im, 1.3),
            "saturation": lambda im: TF.adjust_saturation(im, 0.8),
            "gray": lambda im: TF.rgb_to_grayscale(im, 3),
        }[operation](image)
        assert np.abs(made[i] - np.asarray(theirs, float)).max() <= 2


@pytest.mark.parametrize("turn", [-0.1, -0.03, 0.03, 0.1])
def test_hue_turns_colours_as_torchvision_does(turn: float):
    """Not the same colour space: HSV's hue keeps max and min of the channels, YIQ's keeps luma. On muted colours the
    direction is the same (correlation of the changes above 0.7) and the size alike (0.6 to 1.6 times)."""
    rng = np.random.default_rng(0)
    colours = torch.from_numpy(rng.uniform(0.35, 0.65, (1, 64, 64, 3)).astype(np.float32))
    made = plain(colours, exactly(1, 3, hue=turn))
    x = colours.permute(0, 3, 1, 2)
    ours, theirs = made - x, TF.adjust_hue(x, turn) - x
    theirs = theirs - (theirs * torch.tensor(LUMA, dtype=torch.float32)[:, None, None]).sum(1, keepdim=True)
    assert np.corrcoef(ours.flatten(), theirs.flatten())[0, 1] > 0.7
    assert 0.6 < float(ours.norm() / theirs.norm()) < 1.6


def test_hue_leaves_luma_and_grays_alone_and_comes_round():
    crops = texture(3, 30, 3, low=100, high=150)
    luma = torch.tensor(LUMA, dtype=torch.float32)[:, None, None]
    plain_ = plain(crops, exactly(3, 3))
    for turn in (0.05, 0.25, 0.5):
        made = plain(crops, exactly(3, 3, hue=turn))
        assert ((made - plain_) * luma).sum(dim=1).abs().max() < 1e-5
        assert (made - plain_).abs().max() > 0.01
    assert torch.allclose(plain(crops, exactly(3, 3, hue=1.0)), plain_, atol=1e-5)
    gray = texture(3, 30, 1).expand(-1, -1, -1, 3)
    assert torch.allclose(plain(gray, exactly(3, 3, hue=0.3, saturation=0.2)), plain(gray, exactly(3, 3)), atol=1e-5)


def test_gain_and_offset_are_of_a_channel():
    crops = texture(2, 20, 4, low=60, high=120)
    made = plain(crops, exactly(2, 4, gain=[1.0, 1.2, 0.5, 1.0], offset=[0.0, 0.0, 0.1, -0.1]))
    x = crops.permute(0, 3, 1, 2) / 255
    shift = torch.tensor([0, 0, 0.1, -0.1])[:, None, None] * x.mean(dim=(2, 3), keepdim=True)
    assert torch.allclose(made, x * torch.tensor([1.0, 1.2, 0.5, 1.0])[:, None, None] + shift, atol=1e-6)


@pytest.mark.parametrize("channels", [2, 13])
def test_what_is_drawn_means_the_same_for_any_sensor(channels: int):
    """Data in a twentieth of the range, as satellites', are changed exactly as the same data in the whole of it."""
    crops = texture(6, 24, channels, high=60).float() / 255
    view = PRESETS["many-channel"][0]
    d = draw(view, 0, np.zeros(6, np.int64), np.arange(6), 0, np.full((6, 2), 24), channels)
    assert torch.allclose(plain(crops / 20, d) * 20, plain(crops, d), atol=1e-6)


def test_values_stay_in_their_range():
    crops = texture(30, 24, 3)
    strong = View(
        jitter=1, brightness=1, contrast=1, saturation=1, hue=0.5, gain=1, offset=1, blur=0.5, solarize=0.5, erase=0.5
    )
    d = draw(strong, 0, np.zeros(30, np.int64), np.arange(30), 0, np.full((30, 2), 24), 3)
    made = plain(crops, d)
    assert made.min() >= -1e-6
    assert made.max() <= 1 + 1e-6


def test_floats_and_bytes_are_the_same():
    crops = texture(8, 40, 3)
    d = draw(PRESETS["natural"][1], 0, np.zeros(8, np.int64), np.arange(8), 0, np.full((8, 2), 40), 3)
    assert torch.allclose(plain(crops, d), plain(crops / 255, d), atol=2e-6)


@pytest.mark.parametrize("preset", ["natural", "grayscale", "many-channel"])
@pytest.mark.parametrize("size", [32, 56, 100])
def test_an_image_is_the_same_in_any_company(preset: str, size: int, monkeypatch: pytest.MonkeyPatch):
    """Bit for bit: in batches of any size and order, and however the batch is worked through."""
    channels = {"natural": 3, "grayscale": 1, "many-channel": 5}[preset]
    crops = texture(40, size, channels)
    view = replace(PRESETS[preset][1], blur=0.5, erase=0.5)
    d = draw(view, 0, np.zeros(40, np.int64), np.arange(40), 1, np.full((40, 2), 40), channels)
    whole = plain(crops, d)
    mixed = np.random.default_rng(0).permutation(40)
    assert torch.equal(plain(crops[torch.from_numpy(mixed)], d[mixed]), whole[torch.from_numpy(mixed)])
    assert torch.equal(torch.cat([plain(crops[:13], d[:13]), plain(crops[13:], d[13:])]), whole)
    for chunk in (1, 1 << 40):
        monkeypatch.setattr(pixels, "CHUNK", chunk)
        assert torch.equal(plain(crops, d), whole)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("full", [1, 255])
def test_the_crops_are_left_alone(channels: int, full: int):
    crops = texture(4, 20, channels) if full == 255 else texture(4, 20, channels) / 255
    before = crops.clone()
    plain(crops, exactly(4, channels, sigma=1.0, solarize=0.3, brightness=0.5))
    assert torch.equal(crops, before)


def test_what_belongs_together_must_fit():
    crops = texture(2, 8, 3)
    with pytest.raises(ValueError, match="3 draws"):
        finish(crops, exactly(3, 3), [0.0] * 3, [1.0] * 3)
    with pytest.raises(ValueError, match="1 means"):
        finish(crops, exactly(2, 3), [0.0], [1.0] * 3)


def test_every_drawn_number_is_tested_here():
    assert {f.name for f in fields(Draws)} == {*NEUTRAL, "box", "gain", "offset", "erased", "level", "reach"}


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_autocast_around_it_changes_nothing(channels: int) -> None:
    n, size = 24, 20
    images, sizes = np.arange(n), np.tile([[size, size]], (n, 1))
    both = [draw(view, 1, np.zeros(n, np.int64), images, k, sizes, channels)
            for k, view in enumerate(PRESETS["natural"])]  # fmt: skip
    assert np.isfinite(both[1].solarize).any()
    for drawn in both:
        crops = texture(n, size, channels)
        expected = finish(crops, drawn, [0.4] * channels, [0.2] * channels)
        with torch.autocast("cpu", torch.bfloat16):
            made = finish(crops, drawn, [0.4] * channels, [0.2] * channels)
        assert made.dtype == torch.float32
        assert torch.equal(made, expected)
