"""The contact sheet: what is on it, for any kind of image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from barlow.crops import crop
from barlow.draws import order
from barlow.errors import DataError
from barlow.guard import BadImage
from barlow.sheet import CELL, COLOURS, GAP, caption, contact_sheet
from barlow.views import PRESETS, View, draw, finish


class Shelf:
    """Images in memory, some of which cannot be read."""

    def __init__(self, arrays: list[np.ndarray | None]) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays)

    def read(self, i: int) -> np.ndarray:
        array = self.arrays[i]
        if array is None:
            raise BadImage("cut off")
        return array

    def key(self, i: int) -> str:
        return f"a/long/folder/name/that/goes/on/image {i}.png"


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def sheet(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.mode == "RGB"
        return np.asarray(image)


def test_a_row_is_an_original_with_its_crops_and_its_views(tmp_path: Path):
    arrays: list[np.ndarray | None] = [noise(40, 60, 3, seed=k) for k in range(9)]
    views = PRESETS["natural"]
    path = contact_sheet(Shelf(arrays), views, size=32, seed=5, count=3, path=tmp_path / "sheet.png")
    made = sheet(path)
    assert made.shape[1] == GAP + 3 * (CELL + GAP)
    chosen = order(5, 0, 9, np.arange(3))
    originals = made[:, GAP : GAP + 60 * 3]
    for k, view in enumerate(views):
        drawn = draw(view, 5, np.zeros(3, np.int64), chosen, k, np.full((3, 2), (40, 60)), 3)
        pixels = finish(torch.from_numpy(crop([arrays[i] for i in chosen], drawn, 32)), drawn, [0.0] * 3, [1.0] * 3)
        expected = np.rint(pixels.permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)
        left = GAP + (k + 1) * (CELL + GAP)
        column = made[:, left : left + 224 : 7]  # 32 pixels, each seven times as large
        rows = [[y for y in range(len(made) - 224) if np.array_equal(column[y : y + 224 : 7], e)] for e in expected]
        assert [len(found) for found in rows] == [7, 7, 7]  # the seven lines of its first pixel
        assert rows[0] < rows[1] < rows[2]
        mark = np.array([int(COLOURS[k][c : c + 2], 16) for c in (1, 3, 5)])
        for (top, *_), (x, y, w, h) in zip(rows, drawn.box * 3, strict=True):
            marked = (originals[top : top + 120] == mark).all(axis=2)
            across, down = np.flatnonzero(marked.any(axis=0)), np.flatnonzero(marked.any(axis=1))
            assert (across[0], across[-1], down[0], down[-1]) == (x, x + w - 1, y, y + h - 1)


def test_the_same_seed_the_same_sheet(tmp_path: Path):
    shelf = Shelf([noise(30, 30, 1, seed=k) for k in range(20)])
    first, again, other = (
        contact_sheet(shelf, PRESETS["grayscale"], size=28, seed=seed, path=tmp_path / f"{k}.png").read_bytes()
        for k, seed in enumerate((1, 1, 2))
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_any_image_can_be_shown(channels: int, kind: type, tmp_path: Path):
    arrays: list[np.ndarray | None] = [noise(20 + 300 * k, 400 - 190 * k, channels).astype(kind) for k in range(2)]
    if kind == np.float32:
        arrays = [array / 255 for array in arrays if array is not None]
    views = PRESETS["many-channel" if channels not in (1, 3) else "small"]
    made = sheet(contact_sheet(Shelf(arrays), views, size=300, seed=0, path=tmp_path / "s.PNG"))
    for k in range(3):  # something is seen in every column, uint16 of low values included
        left = GAP + k * (CELL + GAP)
        assert made[60:100, left : left + 100].std() > 10


def test_more_views_and_a_users_own(tmp_path: Path):
    def black(images: torch.Tensor, _: torch.Generator) -> torch.Tensor:
        return images * 0

    shelf = Shelf([noise(50, 50, 3, seed=k) + 1 for k in range(4)])
    views = (*PRESETS["overhead"], View(), black)
    made = sheet(contact_sheet(shelf, views, size=64, seed=0, count=2, path=tmp_path / "s.png"))
    assert made.shape[1] == GAP + 5 * (CELL + GAP)
    assert (made[60:200, GAP + 4 * (CELL + GAP) :][:, :190] == 0).all()


def test_what_cannot_be_read_is_passed_over(tmp_path: Path):
    arrays: list[np.ndarray | None] = [None] * 10
    arrays[3] = arrays[8] = noise(20, 20, 1)
    made = sheet(contact_sheet(Shelf(arrays), PRESETS["grayscale"], size=20, seed=0, count=8, path=tmp_path / "s.png"))
    full = Shelf([noise(20, 20, 1)] * 10)
    two = sheet(contact_sheet(full, PRESETS["grayscale"], size=20, seed=0, count=2, path=tmp_path / "t.png"))
    assert abs(made.shape[0] - two.shape[0]) < 80
    for shelf in (Shelf([None] * 5), Shelf([])):
        with pytest.raises(DataError, match="no image could be read"):
            contact_sheet(shelf, PRESETS["grayscale"], size=20, seed=0, path=tmp_path / "u.png")


def test_a_caption_says_what_was_drawn():
    everything = View(
        crop=(0.5, 0.5), ratio=(1, 1), flip=1, flip_vertical=1, turn=1, jitter=1, brightness=0.4, contrast=0.4,
        saturation=0.2, hue=0.1, gain=0.2, offset=0.1, blur=1, solarize=1,
    )  # fmt: skip
    d = draw(everything, 0, np.zeros(1, np.int64), np.zeros(1, np.int64), 0, np.array([[100, 100]]), 3)
    said = caption(d, 0)
    assert said[:3] == ["crop 71 × 71", "flipped", "upside down"]
    words = ["turned", "brightness", "contrast", "saturation", "hue", "gains", "offsets", "blur σ", "solarised"]
    assert [any(part.startswith(word) for part in said) for word in words] == [True] * len(words)
    assert f"turned {90 * d.turn[0]}°" in said
    assert f"blur σ {d.sigma[0]:.1f}" in said
    change = round(100 * (d.brightness[0] - 1))
    assert f"brightness {'+' if change > 0 else '−'}{abs(change)} %" in said
    nothing = draw(View(), 0, np.zeros(1, np.int64), np.zeros(1, np.int64), 0, np.array([[100, 100]]), 3)
    assert caption(nothing, 0) == ["crop 100 × 100"]
    gray = draw(View(gray=1), 0, np.zeros(1, np.int64), np.zeros(1, np.int64), 0, np.array([[100, 100]]), 3)
    assert caption(gray, 0) == ["crop 100 × 100", "gray"]
