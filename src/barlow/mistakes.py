"""The worst mistakes of weighted k-NN: test images that it was surest of and wrong, with the neighbours that voted."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from barlow.guard import BadImage
from barlow.labelled import Labelled
from barlow.protocols import Votes

Ints = NDArray[np.int64]

WORST, NEIGHBOURS = 8, 5
A_KIND = 2  # mistakes of one label and one answer at most: the same confusion eight times would say one thing
SIDE = 64  # pixels of the pictures, the aspect not kept


def worst_mistakes(votes: Votes, truth: Ints) -> list[dict[str, Any]]:
    """Up to ``WORST`` wrong answers, the surest first, at most ``A_KIND`` of one label and one answer.

    Each: ``query`` (its number), ``label``, ``answer`` (class numbers), ``certainty`` (the answer's share of the votes,
    0..1), ``neighbours`` (up to ``NEIGHBOURS`` rows of the bank, nearest first), ``cosines`` beside them. Of equally
    sure ones that with the nearest neighbour comes first.
    """
    answers, certainty = votes.answers, votes.certainty
    neighbours, cosines = votes.rows[:, :NEIGHBOURS], votes.cosines[:, :NEIGHBOURS]
    chosen: list[int] = []
    kinds: dict[tuple[int, int], int] = {}
    for i in np.lexsort((-cosines[:, 0], -certainty)):
        kind = (int(truth[i]), int(answers[i]))
        if answers[i] != truth[i] and kinds.get(kind, 0) < A_KIND and len(chosen) < WORST:
            kinds[kind] = kinds.get(kind, 0) + 1
            chosen.append(int(i))
    return [
        {"query": i, "label": int(truth[i]), "answer": int(answers[i]), "certainty": float(certainty[i]),
         "neighbours": neighbours[i].tolist(), "cosines": np.round(cosines[i].astype(float), 4).tolist()}
        for i in chosen
    ]  # fmt: skip


def named(found: list[dict[str, Any]], labelled: Labelled, train: Ints, test: Ints) -> list[dict[str, Any]]:
    """The same in the words of the labels, for evaluation.json: keys of images instead of rows, names of classes.

    ``train``, ``test``: which of all labelled images the rows of the bank and the queries are. ``image`` and the
    ``image`` of each neighbour are [place among all labelled images, key].
    """
    names, values = labelled.targets.names, labelled.targets.values

    def image(place: int) -> dict[str, Any]:
        return {"place": place, "image": labelled.key(place), "label": names[values[place]]}

    return [
        image(int(test[row["query"]]))
        | {"answer": names[row["answer"]], "certainty": row["certainty"]}
        | {"neighbours": [
            image(int(train[j])) | {"cosine": cosine}
            for j, cosine in zip(row["neighbours"], row["cosines"], strict=True)
        ]}
        for row in found
    ]  # fmt: skip


def pictures(mistakes: list[dict[str, Any]], labelled: Labelled) -> NDArray[np.uint8]:
    """(m, 1 + ``NEIGHBOURS``, SIDE, SIDE, c) pictures of each mistake and its neighbours; what is missing is black.

    One scale for all of them where they are not 8 bits: from their smallest number to their largest.
    """
    channels = labelled.images[0].channels
    out = np.zeros((len(mistakes), 1 + NEIGHBOURS, SIDE, SIDE, channels), np.float32)
    whole = True
    for row, mistake in zip(out, mistakes, strict=True):
        for cell, image in zip(row, [mistake, *mistake["neighbours"]], strict=False):
            try:
                array = labelled.read(image["place"])
            except BadImage:
                continue
            whole = whole and array.dtype == np.uint8
            planes = torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1)[None]
            mode = {"mode": "nearest"} if max(array.shape[:2]) <= SIDE else {"mode": "bilinear", "antialias": True}
            cell[:] = nn.functional.interpolate(planes, (SIDE, SIDE), **mode)[0].permute(1, 2, 0).numpy()
    if not whole:
        low = float(out.min())
        out = (out - low) * (255 / max(float(out.max()) - low, 1e-30))
    shown: NDArray[np.uint8] = np.rint(out.clip(0, 255)).astype(np.uint8)
    return shown
