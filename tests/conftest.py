"""Small things that several test files share: tiny images with structure, and settings that train in a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from barlow.config import Config

TINY_ARGS = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_chs": 8}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The same sums on every machine, and no thread that waits for another on a busy one."""
    torch.set_num_threads(1)


def blobs(count: int, size: int = 16, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 (count, size, size): a bright bar at a random place and angle on a dark ground, a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size - 0.5
    angle, shift = rng.uniform(0, np.pi, count), rng.uniform(-0.3, 0.3, count)
    width = rng.uniform(0.05, 0.2, count)
    away = np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y - shift[:, None, None]
    picture = np.exp(-((away / width[:, None, None]) ** 2)) + 0.05 * rng.standard_normal((count, size, size))
    return (np.clip(picture, 0, 1) * 255).astype(np.uint8)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Config]:
    """Settings of a run over 96 tiny images that takes about a second; keywords change them."""

    def make(**changes: Any) -> Config:
        path = tmp_path / "images.npy"
        if not path.exists():
            np.save(path, blobs(96))
        fields = dict(  # noqa: C408 - reads like the Config it becomes
            images=str(path), out=str(tmp_path / "run"), encoder="resnetv2_18", encoder_args=TINY_ARGS, image_size=32,
            projector=(32, 32), lambda_=0.02, batch_size=32, steps=8, held_out=16, precision="float32", devices=1,
            workers=0, seed=1,
        )  # fmt: skip
        return Config(**{**fields, **changes})

    return make
