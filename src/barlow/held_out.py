"""A fixed set of images that are never trained on: what the encoder makes of them, and what that says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from barlow.batches import SPLIT_EPOCH, Batch, Stream
from barlow.draws import IntArray
from barlow.health import Diagnosis, measure, measure_pair
from barlow.neighbours import lidar
from barlow.network import Twins
from barlow.repeats import many_views
from barlow.verdict import judge
from barlow.views import View, crop, draw, finish

THUMBNAIL = 96  # pixels, the largest side kept for the report
PAIRS = 8  # of views kept for the report
CHUNK = 128  # images a pass
LIDAR_VIEWS = 10  # of each image; fewer say too little of how an image varies


@final
class HeldOut:
    """Held-out images, their clean crops and one fixed draw of each view, kept ready on the host.

    ``look`` costs three passes of the network without gradient over at most a few hundred images.
    """

    def __init__(
        self, source: Stream, chosen: IntArray, *, mean: Sequence[float], std: Sequence[float], device: torch.device
    ) -> None:
        images, size = source.images, source.size
        arrays = [images.read_or_replace(int(i))[0] for i in chosen]
        sizes = np.array([array.shape[:2] for array in arrays], np.int64)
        epochs = np.full(len(chosen), SPLIT_EPOCH)
        clean = draw(View(), source.seed, epochs, chosen, 0, sizes, images.channels)
        self.clean = torch.from_numpy(crop(arrays, clean, size))
        made = list(source.views_of(arrays, epochs, chosen))
        self.batch = Batch(-1, chosen, epochs, [c for _, c in made], [d for d, _ in made], [])
        self.clean_draws, self.source, self.device = clean, source, device
        self.mean, self.std = list(mean), list(std)
        self.keys = [images.key(int(i)) for i in chosen]
        self.thumbnails = np.asarray(crop(arrays, clean, min(size, THUMBNAIL, int(sizes.min(1).max()))))

    def pictures(self) -> dict[str, NDArray[Any]]:
        """What the report shows: thumbnails, keys, and a few pairs of views as the network sees them, uint8."""
        few = Batch(-1, self.batch.images[:PAIRS], self.batch.epochs[:PAIRS],
                    [c[:PAIRS] for c in self.batch.crops], [d[:PAIRS] for d in self.batch.draws], [])  # fmt: skip
        plain = self.source.finish(few, torch.device("cpu"), [0.0] * len(self.mean), [1.0] * len(self.std))
        views = [np.rint(v.clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8) for v in plain]
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
        with torch.inference_mode(), autocast():
            for at in range(0, len(self.clean), CHUNK):
                rows = slice(at, at + CHUNK)
                for name, value in self._pass(network, rows).items():
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

        z = many_views(self.source, self.batch.images, LIDAR_VIEWS, encode, device=self.device, mean=self.mean,
                       std=self.std)  # fmt: skip
        network.train(training)
        width = z.shape[2] - list(projector.parameters())[-1].shape[0]
        return {"features": lidar(z[:, :, :width]), "embedding": lidar(z[:, :, width:])}

    def _pass(self, network: Twins, rows: slice) -> dict[str, Tensor]:
        clean = finish(self.clean[rows].to(self.device), self.clean_draws[rows], self.mean, self.std)
        part = Batch(-1, self.batch.images[rows], self.batch.epochs[rows],
                     [c[rows] for c in self.batch.crops[:2]], [d[rows] for d in self.batch.draws[:2]], [])  # fmt: skip
        made = {"features": network.encoders[0](clean)}
        two = self.source.finish(part, self.device, self.mean, self.std)
        for letter, number, view in zip("ab", range(2), two, strict=True):
            h = network.encoders[number % len(network.encoders)](view)
            if letter == "a" or len(network.encoders) == 1:
                made[f"features_{letter}"] = h
            made[f"embedding_{letter}"] = network.projectors[number % len(network.projectors)](h)
        return made


def health_lines(step: int, out: dict[str, Tensor], *, warm_up: bool) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of kind "health", one for the encoder's output and one for the projector's.

    The encoder's output is that of the clean images, as it will be used; whether twins are found is asked of the views.
    """
    z = {name: value.numpy() for name, value in out.items()}
    features = measure(z["features"])
    if "features_b" in z:
        features |= measure_pair(z["features_a"], z["features_b"])
    embedding = measure(z["embedding_a"], z["embedding_b"])
    judged = {
        "features": judge(features, warm_up=warm_up),
        "embedding": judge(embedding, warm_up=warm_up, embedding=True),
    }
    return [
        {"kind": "health", "step": step, "of": of, **_words(found), **found.measures} for of, found in judged.items()
    ]


def _words(found: Diagnosis) -> dict[str, Any]:
    advice = {"causes": found.causes, "remedy": found.remedy} if found.causes else {}
    return {"verdict": found.verdict, "sentence": found.sentence, **advice}
