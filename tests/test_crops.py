"""Crops: against Pillow and torchvision pixel by pixel, for any kind of array."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from barlow import crops
from barlow.crops import Draws, crop
from barlow.errors import UserError
from barlow.views import PRESETS, View, draw


def photo(height: int, width: int, channels: int, seed: int = 0, low: int = 40, high: int = 216) -> np.ndarray:
    """Structure at three scales, uint8, away from black and white: a bicubic overshoot is clipped nowhere."""
    rng = np.random.default_rng(seed)
    made = np.zeros((height, width, channels))
    for k in (2, 7, 19):
        for c in range(channels):
            layer = Image.fromarray(rng.random((k, k)).astype(np.float32))
            made[..., c] += np.asarray(layer.resize((width, height), Image.Resampling.BILINEAR))
    made -= made.min()
    return (low + made / made.max() * (high - low)).astype(np.uint8)


def drawn(sizes: list[tuple[int, int]], channels: int, view: View | None = None, seed: int = 0) -> Draws:
    n = len(sizes)
    view = view or replace(PRESETS["overhead"][0])
    return draw(view, seed, np.zeros(n, np.int64), np.arange(n), 0, np.array(sizes), channels)


def with_pillow(image: np.ndarray, d: Draws, i: int, size: int) -> np.ndarray:
    x, y, w, h = d.box[i]
    cut = image[y : y + h, x : x + w]
    bands = [Image.fromarray(np.ascontiguousarray(cut[..., k])) for k in range(image.shape[2])]
    made = np.stack([np.asarray(b.resize((size, size), Image.Resampling.BICUBIC)) for b in bands], axis=2)
    made = made[:, ::-1] if d.flip[i] else made
    made = made[::-1] if d.flip_vertical[i] else made
    return np.rot90(made, d.turn[i])


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 13])
@pytest.mark.parametrize("size", [16, 50])
@pytest.mark.parametrize("together", [True, False])
def test_crops_are_pillows(channels: int, size: int, together: bool, monkeypatch: pytest.MonkeyPatch):
    """Up to 2 of 255: Pillow, torch and the products round the same weights to 22, 15 and 24 bits, and to bytes twice.

    Pillow may resize the columns first; where nothing is clipped in between, that is the same.
    """
    monkeypatch.setattr(crops, "TOGETHER", 10**9 if together else 0)
    images = np.stack([photo(40, 33, channels, seed) for seed in range(24)])
    d = drawn([(40, 33)] * 24, channels)
    assert d.flip.any()
    assert d.flip_vertical.any()
    assert set(d.turn.tolist()) == {0, 1, 2, 3}
    made = crop(images, d, size)
    assert made.dtype == np.uint8
    assert made.shape == (24, size, size, channels)
    gaps = [np.abs(made[i].astype(int) - with_pillow(images[i], d, i, size)) for i in range(24)]
    assert np.max(gaps) <= 2
    assert np.mean(np.array(gaps) > 1) < 0.001


@pytest.mark.parametrize("channels", [1, 3])
def test_both_ways_agree_where_values_are_clipped(channels: int, monkeypatch: pytest.MonkeyPatch):
    images = np.random.default_rng(0).integers(0, 2, (64, 28, 30, channels), dtype=np.uint8) * 255
    d = drawn([(28, 30)] * 64, channels)
    together = crop(images, d, 31).astype(int)
    monkeypatch.setattr(crops, "TOGETHER", 0)
    gap = np.abs(together - crop(images, d, 31))
    assert gap.max() <= 2
    assert (gap > 0).mean() < 0.02


def test_bytes_and_other_numbers_in_one_list_are_refused():
    """Kills: reals cast to bytes 0 and 1, or bytes beside shares of 1, as the first image decided for all."""
    byte = photo(20, 20, 3)
    for other in (byte / 255, byte.astype(np.uint16)):
        for images in ([byte, other], [other, byte]):
            with pytest.raises(ValueError, match="on different scales"):
                crop(images, drawn([(20, 20)] * 2, 3), 16)


def test_images_of_different_sizes():
    sizes = [(30, 80), (200, 111), (7, 5), (1, 1), (1, 300), (64, 64)]
    images = [photo(h, w, 3, k) for k, (h, w) in enumerate(sizes)]
    d = drawn(sizes, 3)
    made = crop(images, d, 24)
    for i, image in enumerate(images):
        assert np.abs(made[i].astype(int) - with_pillow(image, d, i, 24)).max() <= 2


def test_the_whole_image_at_its_own_size_is_itself():
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    d = drawn([(32, 32)] * 5, 3, View())
    assert np.array_equal(crop(images, d, 32), images)
    assert np.array_equal(crop(list(images), d, 32), images)


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_sixteen_bits_and_floats_keep_their_depth(channels: int):
    image = photo(60, 50, channels).astype(np.float64) / 255
    image += np.linspace(0, 1 / 255, 50)[:, None]  # finer than a byte
    d = drawn([(60, 50)] * 3, channels)
    bytes_, floats = crop([photo(60, 50, channels)] * 3, d, 20), crop([image.astype(np.float32)] * 3, d, 20)
    words = crop([np.rint(image * 65535).astype(np.uint16)] * 3, d, 20)
    assert floats.dtype == words.dtype == np.float32
    assert np.abs(words - floats).max() < 2e-5
    assert np.abs(floats - bytes_ / 255).max() < 3 / 255
    assert len(np.unique(floats)) > 256
    assert np.array_equal(crop([image] * 3, d, 20), floats)


def test_floats_are_clipped_where_bicubic_overshoots():
    edge = np.zeros((20, 20, 1), np.float32)
    edge[:, 10:] = 1
    made = crop([edge], drawn([(20, 20)], 1, View()), 37)
    assert made.min() == 0
    assert made.max() == 1


@pytest.mark.parametrize("value", [1.01, -0.01, np.nan, np.inf])
def test_floats_outside_their_range_are_refused(value: float):
    image = np.full((9, 9, 1), 0.5, np.float32)
    image[4, 4] = value
    with pytest.raises(UserError, match="0 to 1"):
        crop([image], drawn([(9, 9)], 1, View()), 8)


def test_as_many_draws_as_images():
    with pytest.raises(ValueError, match="2 images but 3 draws"):
        crop([np.zeros((4, 4, 1), np.uint8)] * 2, drawn([(4, 4)] * 3, 1), 4)


@pytest.mark.parametrize(("size", "channels"), [((28, 28), 1), ((32, 32), 3), ((70, 90), 3)])
def test_a_crop_is_the_same_in_any_company(size: tuple[int, int], channels: int):
    images = np.stack([photo(*size, channels, seed) for seed in range(50)])
    d = drawn([size] * 50, channels)
    whole = crop(images, d, 40)
    mixed = np.random.default_rng(0).permutation(50)
    assert np.array_equal(crop(images[mixed], d[mixed], 40), whole[mixed])
    assert np.array_equal(crop(images[7:8], d[7:8], 40), whole[7:8])
    assert np.array_equal(crop(images[:33], d[:33], 40), whole[:33])


def test_a_crop_is_the_same_with_any_number_of_threads():
    """Loaders run with one thread, a run without workers with as many as there are cores."""
    images = np.stack([photo(32, 32, 3, seed) for seed in range(40)])
    large = [photo(300, 400, 3, seed) for seed in range(3)]
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append(crop(images, drawn([(32, 32)] * 40, 3), 64).tobytes())
            made.append(crop(large, drawn([(300, 400)] * 3, 3), 224).tobytes())
    finally:
        torch.set_num_threads(before)
    assert made[:2] == made[2:]


def test_rows_of_draws():
    d = drawn([(20, 20)] * 6, 3)
    assert len(d) == 6
    assert len(d[2:4]) == 2
    assert len(d[d.flip]) == d.flip.sum()
    assert np.array_equal(d[np.array([5, 0])].box, d.box[[5, 0]])
    assert d[:1].reach == d.reach == 6


def test_a_read_only_image_is_read_without_a_warning():
    image = photo(30, 30, 1)
    image.setflags(write=False)  # as a memory-mapped cache is
    d = drawn([(30, 30)] * 4, 1, View())
    torch.set_warn_always(True)
    try:
        crop([image] * 4, d, 16)
        crop(np.broadcast_to(image, (4, 30, 30, 1)), d, 16)
    finally:
        torch.set_warn_always(False)
