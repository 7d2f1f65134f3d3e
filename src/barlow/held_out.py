"""A fixed set of images that are never trained on: what the encoder makes of them, and what that says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from barlow.batches import SPLIT_EPOCH, Batch, Scale, Stream
from barlow.draws import IntArray
from barlow.errors import DataError
from barlow.health import Diagnosis, measure, measure_pair
from barlow.neighbours import lidar
from barlow.network import Twins
from barlow.repeats import many_views
from barlow.verdict import judge
from barlow.views import View, crop, draw

THUMBNAIL = 96  # pixels, the largest side kept for the report
STRIP = 24  # pixels, the height of a sample that is no image
PAIRS = 8  # of views kept for the report
CHUNK = 128  # images a pass
LIDAR_VIEWS = 10  # of each image; fewer say too little of how an image varies


@final
class HeldOut:
    """Held-out images, their clean crops and one fixed draw of each view, kept ready on the host.

    ``outputs`` costs three passes of the network without gradient over at most a few hundred images. Of given pairs the
    clean image is the first of each, as the first encoder is the one that the run is about. ``bad``: those of the
    chosen that cannot be used; nothing stands in for them. Raises DataError where fewer than two can be.
    """

    def __init__(self, source: Stream, chosen: IntArray, *, scales: Sequence[Scale], device: torch.device) -> None:
        images, size, epochs = source.images, source.size, np.full(len(chosen), SPLIT_EPOCH)
        clean, batch = (source.batch(-1, chosen, epochs, views) for views in ((View(),), source.views))
        self.bad = list({bad.image: bad for bad in (*clean.bad, *batch.bad)}.values())
        good = ~np.isin(chosen, [bad.image for bad in self.bad])
        if good.sum() < 2:
            first = f"{self.bad[0].key}: {self.bad[0].reason}"
            raise DataError(f"of {len(chosen)} held-out images fewer than two can be used; the first, {first}")
        if self.bad:
            chosen, epochs = chosen[good], epochs[good]
            clean, batch = part(clean, good), part(batch, good)
        self.clean, self.batch = clean, batch
        self.source, self.scales, self.device = source, scales, device
        self.keys = [images.key(int(i)) for i in chosen]
        if images.shape:
            self.thumbnails = drawings(self.clean.crops[0])
            return
        side = min(size, THUMBNAIL, int(images.sizes[chosen].min(1).max()))
        whole = draw(View(), 0, epochs, chosen, 0, np.full((len(chosen), 2), size), images.channels)
        self.thumbnails = crop(self.clean.crops[0].numpy(), whole, side)

    def pictures(self) -> dict[str, NDArray[Any]]:
        """What the report shows: thumbnails, keys, and a few pairs of views as the network sees them, uint8."""
        plain = [([0.0] * len(mean), [1.0] * len(std)) for mean, std in self.scales]
        made = self.source.finish(part(self.batch, slice(PAIRS)), torch.device("cpu"), plain)
        if self.source.images.shape:
            return {"images": self.thumbnails, "views_a": drawings(made[0]), "views_b": drawings(made[1]),
                    "keys": np.array(self.keys)}  # fmt: skip
        views = [np.rint(v.clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8) for v in made]
        thumbnails = self.thumbnails
        if thumbnails.dtype != np.uint8:
            thumbnails = np.rint(thumbnails * 255).astype(np.uint8)
        return {"images": thumbnails, "views_a": views[0], "views_b": views[1], "keys": np.array(self.keys)}

    def outputs(self, network: Twins, autocast: Callable[[], AbstractContextManager[Any]]) -> dict[str, Tensor]:
        """``features`` (m, d) of the clean images, ``embedding_a`` and ``embedding_b`` (m, D) of two views, float32.

        Also ``features_a`` and, where one encoder makes both, ``features_b``, its output for the two views: the numbers
        of two encoders do not correspond. In evaluation mode.
        """
        training = network.training
        network.eval()
        parts: dict[str, list[Tensor]] = {}
        with torch.inference_mode():
            for at in range(0, len(self.keys), CHUNK):
                for name, value in self._pass(network, slice(at, at + CHUNK), autocast).items():
                    parts.setdefault(name, []).append(value.float().cpu())
        network.train(training)
        return {name: torch.cat(values) for name, values in parts.items()}

    def lidar(self, network: Twins, autocast: Callable[[], AbstractContextManager[Any]]) -> dict[str, float]:
        """LiDAR of the encoder's output ("features") and of the embedding, over ``LIDAR_VIEWS`` views of each image."""
        training, encoder, projector = network.training, network.encoders[0], network.projectors[0]
        network.eval()

        def encode(view: Tensor) -> Tensor:
            with autocast():
                h = encoder(view)
                return torch.cat([h.float(), projector(h).float()], dim=1)

        z = many_views(self.source, self.batch.images, LIDAR_VIEWS, encode, device=self.device, scales=self.scales)
        network.train(training)
        width = z.shape[2] - list(projector.parameters())[-1].shape[0]
        return {"features": lidar(z[:, :, :width]), "embedding": lidar(z[:, :, width:])}

    def _pass(
        self, network: Twins, rows: slice, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> dict[str, Tensor]:
        # the views as in training, outside autocast
        seen = self.source.as_they_are(part(self.clean, rows), self.device, self.scales[0])
        two = self.source.finish(part(self.batch, rows), self.device, self.scales)
        with autocast():
            made = {"features": network.encoders[0](seen)}
            for letter, number, view in zip("ab", range(2), two, strict=False):
                h = network.encoders[number % len(network.encoders)](view)
                made[f"features_{letter}"] = h
                made[f"embedding_{letter}"] = network.projectors[number % len(network.projectors)](h)
        return made


def drawings(samples: Tensor) -> NDArray[np.uint8]:
    """Samples (n, …) of any numbers as pictures (n, h, w, 1) for the report: one sample's last axis across, the others
    down, its smallest number black and its largest white."""
    rows = samples.float().reshape(len(samples), 1, -1, samples.shape[-1])
    low, high = rows.amin((2, 3), keepdim=True), rows.amax((2, 3), keepdim=True)
    unit = (rows - low) / (high - low).clamp_min(1e-12)
    tall = functional.interpolate(unit, (STRIP, THUMBNAIL), mode="area" if rows.shape[3] > THUMBNAIL else "nearest")
    return (tall.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()


def part(batch: Batch, rows: slice | NDArray[np.bool_]) -> Batch:
    """Some images of a batch."""
    crops, draws = [c[rows] for c in batch.crops], [d[rows] for d in batch.draws]
    return Batch(batch.step, batch.images[rows], batch.epochs[rows], crops, draws, [])


def health_lines(
    step: int,
    out: dict[str, Tensor],
    *,
    warm_up: bool,
    shared: bool = True,
    train_diagonal: float | None = None,
    first: float | None = None,
) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of kind "health": of the encoder's output first, of the projector's last.

    The encoder's output is that of the clean images, as it will be used; whether twins are found is asked of the views.
    Two networks (not ``shared``) give features that have no direction in common, so each encoder is judged by itself,
    the second in a line of its own; the embeddings are compared as ever. ``train_diagonal``: mean diagonal of the
    cross-correlation in the last batches, if there were any. ``first``: ``twins_near`` of the embedding before the
    first step, which is known once that has been looked at.
    """
    z = {name: value.numpy() for name, value in out.items()}
    features = measure(z["features"])
    if shared:
        features |= measure_pair(z["features_a"], z["features_b"])
    judged = {"features": judge(features, warm_up=warm_up)}
    if not shared:
        judged["features_b"] = judge(measure(z["features_b"]), warm_up=warm_up)
    embedding = measure(z["embedding_a"], z["embedding_b"])
    if train_diagonal is not None:
        embedding["train_diagonal"] = train_diagonal
    if first is not None or step == 0:
        embedding["twins_near_first"] = embedding["twins_near"] if first is None else first
    judged["embedding"] = judge(embedding, warm_up=warm_up, embedding=True)
    return [
        {"kind": "health", "step": step, "of": of, **_words(found), **found.measures} for of, found in judged.items()
    ]


def _words(found: Diagnosis) -> dict[str, Any]:
    advice = {"causes": found.causes, "remedy": found.remedy} if found.causes else {}
    return {"verdict": found.verdict, "sentence": found.sentence, **advice}
