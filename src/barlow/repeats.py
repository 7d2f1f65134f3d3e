"""Many random views of the same few images, for measures that ask what of an image survives its views."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from barlow.batches import SPLIT_EPOCH, Scale, Stream
from barlow.draws import IntArray

CHUNK = 128  # images a pass


def many_views(
    source: Stream, chosen: IntArray, count: int, encode: Callable[[Tensor], Tensor], *, device: torch.device,
    scales: Sequence[Scale],
) -> NDArray[np.float32]:  # fmt: skip
    """What ``encode`` makes of ``count`` random views of each chosen image: (images, count, d).

    The views take turns as the source has them (of given pairs those of the first images only); every draw is
    addressed, and none is one that training or the held-out images use, so the same source gives the same views
    whatever the encoder. ``scales``: as in ``Stream.finish``.
    """
    rows = [
        np.stack(list(islice(_rounds(source, chosen[at : at + CHUNK], encode, device, scales), count)), axis=1)
        for at in range(0, len(chosen), CHUNK)
    ]
    return np.concatenate(rows)


def _rounds(
    source: Stream, chosen: IntArray, encode: Callable[[Tensor], Tensor], device: torch.device, scales: Sequence[Scale]
) -> Iterator[NDArray[np.float32]]:
    for start in itertools.count(0, len(source.views)):
        batch = source.batch(-1, chosen, np.full(len(chosen), SPLIT_EPOCH - 1 - start), source.views)
        for view in source.finish(batch, device, scales)[:: len(source.sources)]:
            with torch.inference_mode():
                yield encode(view).float().cpu().numpy()
