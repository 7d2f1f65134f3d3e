"""Data sets, lists of pictures and tensors as sources of images: what works, and what is refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import blobs
from PIL import Image

from barlow import Config, embed, pretrain
from barlow.errors import Stopped, UserError
from barlow.guard import BadImage
from barlow.images import open_images, write_index
from barlow.samples import Items

SMALL = {"encoder": "resnetv2_18", "encoder_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "stem_chs": 8},
         "image_size": 32, "projector": (16, 16), "batch_size": 16, "held_out": 16, "steps": 2, "devices": 1,
         "precision": "float32", "workers": 0}  # fmt: skip


class Made:
    """A data set of 60 items, each made by a function of its number."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __len__(self) -> int:
        return 60

    def __getitem__(self, i: int) -> Any:
        return self.make(i)


def colour() -> np.ndarray[Any, Any]:
    return np.repeat(blobs(60)[..., None], 3, axis=3)


def raising(error: BaseException, every: int = 1) -> Made:
    def make(i: int) -> Any:
        if i % every == every - 1:
            raise error
        return blobs(1)[0]

    return Made(make)


def test_whatever_an_item_raises_is_a_bad_image(tmp_path: Path) -> None:
    """Kills: a run that ends at the first broken JPEG, for which torchvision raises RuntimeError."""
    data = raising(RuntimeError("decode_jpeg: Image is incomplete\nor truncated, in <buffer at 0x7f00>"), every=16)
    run = pretrain(Config(out=str(tmp_path / "run"), max_bad=0.5, **SMALL), images=data, quiet=True)  # type: ignore[arg-type]
    sentence = "cannot be read: RuntimeError: decode_jpeg: Image is incomplete or truncated, in …"
    assert sentence in (run / "quarantine.jsonl").read_text(encoding="utf-8")
    for error, words in ((KeyError("x"), "KeyError: 'x'"), (OSError(2, "gone"), "FileNotFoundError: "),
                         (RuntimeError(), "RuntimeError$")):  # fmt: skip
        with pytest.raises(BadImage, match=f"^cannot be read: {words}"):
            Items(raising(error))[0]
    for none in (MemoryError(), Stopped("by a signal"), KeyboardInterrupt()):  # not the item's fault
        with pytest.raises(type(none)):
            Items(raising(none))[0]


def test_a_mistake_in_the_data_set_itself_is_named() -> None:
    words = "^the data set brings no images: item 0 cannot be read: AttributeError: no attribute 'files'$"
    with pytest.raises(UserError, match=words):
        open_images(raising(AttributeError("no attribute 'files'")))  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tensors_with_their_channels_last_are_refused(channels: int) -> None:
    """Kills: pictures of 24 × 24 taken for ones of 24 channels and 3 columns."""
    last = torch.zeros((60, 24, 20, channels), dtype=torch.uint8)
    with pytest.raises(UserError, match=rf"shape \(60, 24, 20, {channels}\), channels last: .*permute\(0, 3, 1, 2\)"):
        open_images(last)  # type: ignore[arg-type]
    sentence = rf"is a tensor of shape \(24, 20, {channels}\), channels last: give it with .permute\(2, 0, 1\)"
    for items in (list(last), Made(lambda i: last[i]), Made(lambda i: (last[i], 1))):
        with pytest.raises(UserError, match=sentence):
            open_images(items)  # type: ignore[arg-type]
    first = last.permute(0, 3, 1, 2)
    for good in (first, list(first), Made(lambda i: first[i]), last.numpy()):
        assert open_images(good).channels == channels  # type: ignore[arg-type]
    assert open_images(torch.zeros((60, 9, 4, 4))).channels == 9  # type: ignore[arg-type]
    assert open_images([torch.zeros((9, 4, 4))]).channels == 9  # that small, it could be either


def test_a_data_set_with_chance_in_it_is_told_so(tmp_path: Path) -> None:
    """Kills: a first run that is refused because "the array has changed"."""
    rng = np.random.default_rng(0)
    data: Any = Made(lambda i: rng.permuted(blobs(60)[i]))
    for _ in range(2):  # a first run, and one that goes on
        with pytest.raises(
            UserError, match=r"not bring the same images twice: .*index.parquet, or .*random .*views=…$"
        ):
            pretrain(Config(out=str(tmp_path / "run"), **SMALL), images=data, quiet=True)  # type: ignore[arg-type]
    write_index(open_images(blobs(60)), tmp_path / "i.parquet")
    with pytest.raises(UserError, match="the array has changed since"):
        open_images(255 - blobs(60), index=tmp_path / "i.parquet")


def test_lists_of_pictures_with_and_without_labels(tmp_path: Path) -> None:
    """Kills: "a path, such as 'photos/one', not <PIL…>"; pictures not yet loaded whose open files workers share."""
    tiles = colour()
    for k, tile in enumerate(tiles):
        Image.fromarray(tile).save(tmp_path / f"{k}.png")
    pictures = [Image.open(tmp_path / f"{k}.png") for k in range(60)]
    config = Config(out=str(tmp_path / "run"), **(SMALL | {"workers": 1}))  # type: ignore[arg-type]
    run = pretrain(config, images=pictures, quiet=True)
    expected = embed(run, tiles)[1]
    labelled = [(picture, 7) for picture in pictures]
    tensors = [(torch.from_numpy(tile).permute(2, 0, 1), 7) for tile in tiles]
    for same in (pictures, tuple(pictures), labelled, tensors, [(tile, "cat") for tile in tiles]):
        assert np.array_equal(embed(run, same)[1], expected)
    for none in ([1, 2], [None], [[0, 1]]):
        with pytest.raises(UserError, match="item 0 of the list of images is a path, such as"):
            open_images(none)


def test_items_by_name_are_refused_with_the_way_out() -> None:
    """As Hugging Face data sets bring them."""
    rows: Any = [{"label": 7, "img": Image.fromarray(one)} for one in blobs(60)]
    sentence = (
        r"item 0 is a dict with the keys label, img: give a data set that returns the image, such as ds\['img'\]$"
    )
    for given in (rows, Made(lambda i: rows[i])):
        with pytest.raises(UserError, match=sentence):
            open_images(given)
    assert len(open_images([row["img"] for row in rows])) == 60


def test_images_of_other_channels_than_the_encoder_takes() -> None:
    """Kills: "give another number of channels", which `embed` does not have."""
    clear = np.concatenate([colour(), colour()[..., :1]], 3)
    way = "leave channels out, or take an encoder of such images$"
    with pytest.raises(UserError, match=rf"4 channels where the data set has 3: convert the images \(.*:3.*\), {way}"):
        open_images(clear, channels=3)
    with pytest.raises(UserError, match=f"3 channels where the data set has 5: convert the images, {way}"):
        open_images(colour(), channels=5)
