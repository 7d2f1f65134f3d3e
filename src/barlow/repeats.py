"""Many random views of the same few images, for measures that ask what of an image survives its views."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from barlow.batches import SPLIT_EPOCH, Batch, Stream
from barlow.draws import IntArray

CHUNK = 128  # images a pass


def many_views(
    source: Stream, chosen: IntArray, count: int, encode: Callable[[Tensor], Tensor], *, device: torch.device,
    mean: Sequence[float], std: Sequence[float],
) -> NDArray[np.float32]:  # fmt: skip
    """What ``encode`` makes of ``count`` random views of each chosen image: (images, count, d).

    The views take turns as the source has them; every draw is addressed, and none is one that training or the held-out
    images use, so the same source gives the same views whatever the encoder.
    """
    rows = [
        np.stack(list(_rounds(source, chosen[at : at + CHUNK], count, encode, device, mean, std)), axis=1)
        for at in range(0, len(chosen), CHUNK)
    ]
    return np.concatenate(rows)


def _rounds(
    source: Stream, chosen: IntArray, count: int, encode: Callable[[Tensor], Tensor], device: torch.device,
    mean: Sequence[float], std: Sequence[float],
) -> Iterator[NDArray[np.float32]]:  # fmt: skip
    arrays = [source.images.read_or_replace(int(i))[0] for i in chosen]
    for start in range(0, count, len(source.views)):
        epochs = np.full(len(chosen), SPLIT_EPOCH - 1 - start)
        drawn, crops = zip(*source.views_of(arrays, epochs, chosen), strict=True)
        made = source.finish(Batch(-1, chosen, epochs, list(crops), list(drawn), []), device, mean, std)
        for view in made[: count - start]:
            with torch.inference_mode():
                yield encode(view).float().cpu().numpy()
