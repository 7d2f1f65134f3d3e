"""The stream of training batches: which images, their draws and their crops, each a pure function of the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from barlow.draws import IntArray, order, stream
from barlow.images import Bad, Images
from barlow.reading import SCALES, Array
from barlow.views import Draws, OwnView, View, apply_own, call_own, crop, crop_one, draw, finish, generator

ViewLike = View | OwnView
Scale = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation of each channel
SPLIT_EPOCH = 2**32 - 1  # the address of the split into training and held-out images; no run has so many epochs


@dataclass(frozen=True)
class Batch:
    """One step's images as this process sees them: for each view the crops (n, size, size, c) and what was drawn.
    Of samples, which are not cropped, for each view the samples (n, …), and nothing drawn."""

    step: int
    images: IntArray
    epochs: IntArray
    crops: list[Tensor]
    draws: list[Draws]
    bad: list[Bad]


def split(seed: int, images: int, held_out: int) -> tuple[IntArray, IntArray]:
    """(training, held-out) image numbers, both sorted: a keyed choice, the same for the same seed and number."""
    out = order(seed, SPLIT_EPOCH, images, np.arange(held_out))
    mask = np.ones(images, bool)
    mask[out] = False
    return np.flatnonzero(mask), np.sort(out)


@final
class Stream(Dataset[Batch]):
    """Batch number ``step`` of an endless stream; consecutive epochs follow each other without a gap.

    ``batch_size`` images over all processes; this process (``rank`` of ``world``) makes its own part of each.
    ``sources``: one collection of images for all views; of given pairs two, view 0 from the first, view 1 from the
    second.
    """

    def __init__(
        self, images: Images, train: IntArray, views: Sequence[ViewLike], *, seed: int, size: int, batch_size: int,
        rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        self.images, self.train, self.views = images, train, tuple(views)
        self.sources = (images,) if images.second is None else (images, images.second)
        self.seed, self.size, self.batch_size = seed, size, batch_size
        self.mine = np.array_split(np.arange(batch_size), world)[rank]

    def __getitem__(self, step: int) -> Batch:
        first, count = step * self.batch_size + int(self.mine[0]), len(self.mine)
        epochs, slots = stream(self.seed, first, count, len(self.train))
        return self.batch(step, self.train[slots], epochs, self.views)

    def batch(self, step: int, chosen: IntArray, epochs: IntArray, views: Sequence[ViewLike]) -> Batch:
        """``views`` of the images ``chosen``, each with the draws of its epoch.

        Images are read, cropped and dropped one by one: a batch of photographs never lies in memory as a whole. The
        boxes are drawn before an image is read, so that a JPEG is decoded no larger than its smallest crop asks for.
        """
        held = [self.sources[k % len(self.sources)].array for k in range(len(views))]
        ready = [array[chosen] for array in held if array is not None]
        if self.images.shape:
            return Batch(step, chosen, epochs, [torch.from_numpy(array) for array in ready], [], [])
        drawn = self._draw(chosen, epochs, views, [source.sizes[chosen] for source in self.sources])
        if len(ready) == len(views):
            crops = [torch.from_numpy(crop(array, d, self.size)) for array, d in zip(ready, drawn, strict=True)]
            return Batch(step, chosen, epochs, crops, drawn, [])
        scales = [self._scales(source, k, chosen, drawn) for k, source in enumerate(self.sources)]
        sizes = [-(-source.sizes[chosen] // scale[:, None]) for source, scale in zip(self.sources, scales, strict=True)]
        if any((scale > 1).any() for scale in scales):
            drawn = self._draw(chosen, epochs, views, sizes)
        made, bad = [self._room(k, len(chosen)) for k in range(len(views))], []
        for i, image in enumerate(chosen.tolist()):
            arrays, wrong = self._read(image, [int(scale[i]) for scale in scales])
            bad += [wrong] if wrong else []
            if any(array.shape[:2] != tuple(size[i]) for array, size in zip(arrays, sizes, strict=True)):
                fitted = [np.array([array.shape[:2]]) for array in arrays]  # another image, or no JPEG
                for d, own in zip(drawn, self._draw(chosen[[i]], epochs[[i]], views, fitted), strict=True):
                    d.put(i, own)
            for k, (out, d) in enumerate(zip(made, drawn, strict=True)):
                out[i] = crop_one(arrays[k % len(arrays)], d, i, self.size)
        return Batch(step, chosen, epochs, made, drawn, bad)

    def _draw(
        self, chosen: IntArray, epochs: IntArray, views: Sequence[ViewLike], sizes: Sequence[IntArray]
    ) -> list[Draws]:
        """What is drawn for each view of images of these sizes (n, 2), one array a source."""
        drawn = []
        for k, view in enumerate(views):
            row, channels = view if isinstance(view, View) else View(), self.sources[k % len(sizes)].channels
            drawn.append(draw(row, self.seed, epochs, chosen, k, sizes[k % len(sizes)], channels))
        return drawn

    def _scales(self, source: Images, number: int, chosen: IntArray, drawn: Sequence[Draws]) -> IntArray:
        """(n,) 1, 2, 4 or 8: how much smaller each image may be decoded with every crop at least ``size`` still."""
        crops = [d.box[:, 2:].min(axis=1) for d in drawn[number :: len(self.sources)]]
        room = np.min([source.sizes[chosen].min(axis=1), *crops], axis=0) // self.size
        scales = np.array([max(k for k in SCALES if k <= max(1, most)) for most in room.tolist()], np.int64)
        for i in np.flatnonzero(scales > 1):
            scales[i] = scales[i] if source.reducible(chosen[i]) else 1
        return scales

    def _read(self, image: int, scales: Sequence[int]) -> tuple[tuple[Array, ...], Bad | None]:
        """The array of each source, and what was wrong with the image that a training image now stands in for."""
        least = [
            None if k == 1 else (int(source.sizes[image, 0]) // k, int(source.sizes[image, 1]) // k)
            for source, k in zip(self.sources, scales, strict=True)
        ]
        if len(self.sources) == 1:
            array, _, bad = self.images.read_or_replace(image, least[0], self.train)
            return (array,), bad
        arrays, _, bad = self.images.read_pair_or_replace(image, least, self.train)
        return arrays, bad

    def _room(self, view: int, count: int) -> Tensor:
        source = self.sources[view % len(self.sources)]
        kind = torch.uint8 if source.dtype == "uint8" else torch.float32
        return torch.empty((count, self.size, self.size, source.channels), dtype=kind)

    def finish(self, batch: Batch, device: torch.device, scales: Sequence[Scale]) -> list[Tensor]:
        """The views in ``batch`` as the network takes them, float32 (n, c, size, size); the work is on ``device``.

        ``scales``: mean and standard deviation of each channel, for each source.
        """
        made = []
        for number, (view, crops) in enumerate(zip(self.views, batch.crops, strict=False)):
            crops, (mean, std) = crops.to(device, non_blocking=True), scales[number % len(scales)]
            if isinstance(view, View):
                made.append(finish(crops, batch.draws[number], mean, std))
                continue
            chance = generator(self.seed, batch.epochs, batch.images, number)
            made.append(call_own(view, crops.clone(), chance) if self.images.shape else
                        apply_own(view, crops, chance, mean, std))  # fmt: skip
        return made

    def as_they_are(self, batch: Batch, device: torch.device, scale: Scale) -> Tensor:
        """The first crops of ``batch`` as the network takes them, without what views do to them after the crop."""
        crops = batch.crops[0].to(device)
        return crops if self.images.shape else finish(crops, batch.draws[0], *scale)

    def __getstate__(self) -> dict[str, Any]:
        """For workers, who only cut: functions of one's own stay here, and need not be such as can be sent."""
        return self.__dict__ | {"views": tuple(view if isinstance(view, View) else View() for view in self.views)}
