"""What the benchmarks of many short runs share: settings of a run that takes seconds, and how good its encoder is.

A run here is the package's own loop on the sample's images, with a network narrow enough for one core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import barlow.run
import barlow.train
from barlow import Config, pretrain
from barlow.embedding import embed_images
from barlow.encoder import Encoder
from barlow.errors import Stopped
from barlow.images import open_images
from barlow.protocols import knn

ARGS = {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128], "stem_chs": 16}
WIDTH, BATCH = 128, 64
BANK, ASKED = 2000, 1500  # labelled images that vote, and test images that are judged


# The views of gray images when the tables of these trainings were made: milder than what is chosen today.
MILD = {"crop": (0.5, 1.0), "ratio": (4 / 5, 5 / 4), "flip": 0.5, "jitter": 0.8, "brightness": 0.4, "contrast": 0.4}


def settings(**changes: Any) -> Config:
    """A run of 28-pixel images in batches of 64; keywords change it."""
    fields: dict[str, Any] = {
        "images": "sample", "encoder": "resnetv2_18", "encoder_args": ARGS, "image_size": 28, "batch_size": BATCH,
        "projector": (WIDTH,) * 3, "lambda_": 2.56 / WIDTH, "held_out": 256, "devices": 1, "workers": 0, "seed": 0,
        "views": (MILD, MILD),
    }  # fmt: skip
    return Config(**(fields | changes))


def sample(part: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(images (n, 28, 28), labels (n,)) of the sample's part "train" or "test"."""
    with as_file(files("barlow") / "sample" / f"{part}.npz") as path, np.load(path) as stored:
        return stored["images"], stored["labels"].astype(np.int64)


def train(config: Config, *, images: Any = None, views: Any = None, cut: int | None = None) -> Path:
    """Trains as ``config`` says, only so far as step ``cut`` of its budget where that is given."""
    with replaced(barlow.run.Session, "out_of_time", lambda session: cut is not None and session.step >= cut):
        try:
            return pretrain(config, images=images, views=views, quiet=True)
        except Stopped as stopped:
            if cut is None or stopped.exit_code != 75:
                raise
            return Path(config.out or ".")


@contextmanager
def replaced(place: Any, name: str, other: Callable[..., Any]) -> Iterator[None]:
    """``place.name`` is ``other`` for a while: a fault that the product has no switch for."""
    own = getattr(place, name)
    setattr(place, name, other)
    try:
        yield
    finally:
        setattr(place, name, own)


def accuracy(encoder: Encoder) -> float:
    """Weighted k-NN on 1,500 of the sample's test images with 2,000 labelled others."""
    (images, labels), (asked, truth) = sample("train"), sample("test")
    parts = []
    for part in (images[:BANK], asked[:ASKED]):
        opened = open_images(part[..., None])
        parts.append(np.concatenate([z for _, z in embed_images(encoder, opened, 256, "embedding")]))
    z, q = parts
    return float((knn(z, labels[:BANK], q, k=20) == truth[:ASKED]).mean())


def one_thread() -> None:
    """The same sums on every machine."""
    torch.set_num_threads(1)
