"""The whole network trained on labels, from where the encoder stands: fine-tuning, and for an untrained encoder the
supervised network trained from scratch on the same labels."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, cast, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW

from barlow.draws import IntArray, stream
from barlow.encoder import Encoder
from barlow.errors import UserError
from barlow.features import features_of
from barlow.labelled import Labelled
from barlow.optimise import parameter_groups, rate
from barlow.progress import progress
from barlow.protocols import stratified
from barlow.reading import Images
from barlow.views import View, crop, draw, finish

FEW = 0.1  # of the labels, for fine-tuning

VIEW = View(crop=(0.4, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5)  # mild: labels must survive it
BATCH, EPOCHS, LEAST = 64, 10, 100  # images a step; passes over the labels, and at least so many steps
LR, LR_HEAD, DECAY, WARM_UP = 1e-3, 1e-2, 0.05, 0.05


def fine_tuned(
    encoder: Encoder, images: Images, rows: IntArray, labels: NDArray[Any], classes: int, *, seed: int = 0,
    what: str = "fine-tuning",
) -> nn.Module:  # fmt: skip
    """A network (n, c, h, w) → (n, classes): a copy of the encoder and a new linear head, both trained on labels.

    ``rows``: the images to train on, all readable; ``labels``: their classes, 0 … classes − 1. AdamW with a cosine, ten
    passes over the labels and at least a hundred steps: fixed settings, the same for every encoder, so nothing is
    chosen on images that it is tested on. The encoder itself stays as it is.
    """
    torch.manual_seed(seed)
    body = copy.deepcopy(encoder)
    head = nn.Linear(encoder.features, classes)
    nn.init.zeros_(head.weight)
    network = nn.Sequential(body, head).to(next(encoder.parameters()).device).train()
    weights, small = parameter_groups(body)
    groups: list[dict[str, Any]] = [
        {"params": weights, "peak": LR, "weight_decay": DECAY},
        {"params": small, "peak": LR, "weight_decay": 0.0},
        {"params": list(head.parameters()), "peak": LR_HEAD, "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=LR)
    batch = min(BATCH, len(rows))
    steps = max(LEAST, math.ceil(EPOCHS * len(rows) / batch))
    targets = torch.from_numpy(labels)
    for step in progress(range(steps), what, steps):
        epochs, slots = stream(seed, step * batch, batch, len(rows))
        views = _views(encoder, images, rows[slots], epochs, seed)
        for group in groups:
            group["lr"] = group["peak"] * rate(step, steps, WARM_UP)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(views), targets[slots].to(views.device))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network.eval()


def _views(encoder: Encoder, images: Images, chosen: IntArray, epochs: IntArray, seed: int) -> Tensor:
    arrays = [images.read(int(i)) for i in chosen]
    sizes = np.array([array.shape[:2] for array in arrays], np.int64)
    drawn = draw(VIEW, seed, epochs, chosen, 0, sizes, encoder.channels)
    pixels = torch.from_numpy(crop(arrays, drawn, encoder.size)).to(next(encoder.parameters()).device)
    mean, std = (cast(Tensor, value).flatten().tolist() for value in (encoder.mean, encoder.std))
    return finish(pixels, drawn, mean, std)


@final
class Tuned(nn.Module):
    """A fine-tuned network where an encoder is asked for: its features (n, classes) are the classes' logits."""

    def __init__(self, encoder: Encoder, network: nn.Module, classes: int) -> None:
        super().__init__()
        self.network, self.normalised = network, encoder.normalised
        self.features, self.channels, self.value_dtype = classes, encoder.channels, encoder.value_dtype

    def forward(self, x: Tensor) -> Tensor:
        """Logits of preprocessed images."""
        return cast(Tensor, self.network(x))


def fine_tuned_answers(
    labelled: Labelled, encoders: Mapping[str, Encoder], train: NDArray[np.bool_], test: NDArray[np.bool_], seed: int,
    batch_size: int,
) -> Iterator[tuple[str, str, int, IntArray]]:  # fmt: skip
    """(protocol, name of the encoder, labels used, answers on the test images), for a tenth and for all of the labels.

    UserError where the labels are no classes. All training images lie in the first source.
    """
    if labelled.targets.kind != "classes":
        raise UserError("fine-tuning needs labels that are classes: leave out --fine-tune")
    values, classes = labelled.targets.values, len(labelled.targets.names)
    every = np.flatnonzero(train)
    few = every[stratified(values[every], FEW, np.random.default_rng(seed))]
    for protocol, rows in ((f"fine-tuned, {FEW * 100:g} % of labels", few), ("fine-tuned", every)):
        for name, encoder in encoders.items():
            what = f"{protocol}, {name}"
            network = fine_tuned(encoder, labelled.images[0], rows, values[rows], classes, seed=seed, what=what)
            tuned = cast(Encoder, Tuned(encoder, network, classes))
            answers = features_of(tuned, labelled.images, batch_size, what, told=True)[test].argmax(axis=1)
            yield protocol, name, len(rows), answers
