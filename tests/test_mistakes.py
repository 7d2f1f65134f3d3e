"""The worst mistakes of k-NN: the surest wrong answers, the neighbours that voted, and their pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from barlow.labelled import open_labelled
from barlow.mistakes import A_KIND, NEIGHBOURS, SIDE, named, pictures, worst_mistakes
from barlow.protocols import knn, neighbour_votes


def circle(degrees: list[float]) -> np.ndarray:
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


def test_the_surest_wrong_answer_comes_first_with_those_who_voted_for_it() -> None:
    bank, labels = circle([0, 1, 2, 90, 91, 180]), np.array([0, 0, 0, 1, 1, 2])
    queries, truth = circle([1, 47, 0.5, 90.5]), np.array([0, 0, 1, 1])  # right, wrong, wrong for sure, right
    sure, unsure = worst_mistakes(neighbour_votes(bank, labels, queries, k=3, temperature=0.07, classes=3), truth)
    assert (sure["query"], sure["label"], sure["answer"], sure["certainty"]) == (2, 1, 0, 1.0)
    assert (unsure["query"], unsure["label"], unsure["answer"]) == (1, 0, 1)
    votes = np.exp(np.cos(np.deg2rad([43, 44, 45])) / 0.07)
    assert unsure["certainty"] == pytest.approx(votes[:2].sum() / votes.sum())
    assert unsure["neighbours"] == [3, 4, 2]
    assert unsure["cosines"] == pytest.approx(np.cos(np.deg2rad([43, 44, 45])), abs=1e-4)


def test_one_kind_of_mistake_does_not_fill_the_page() -> None:
    rng = np.random.default_rng(0)
    bank, labels = rng.standard_normal((60, 4)), rng.integers(0, 3, 60)
    queries, truth = rng.standard_normal((200, 4)), rng.integers(0, 3, 200)
    votes = neighbour_votes(bank, labels, queries, k=20, temperature=0.07, classes=3)
    found = worst_mistakes(votes, truth)
    answers = knn(bank, labels, queries, k=20, classes=3)
    kinds = [(row["label"], row["answer"]) for row in found]
    assert len(found) == 8
    assert max(map(kinds.count, kinds)) == A_KIND
    assert all(row["answer"] == answers[row["query"]] != truth[row["query"]] == row["label"] for row in found)
    assert [row["certainty"] for row in found] == sorted((row["certainty"] for row in found), reverse=True)
    assert all(len(row["neighbours"]) == NEIGHBOURS for row in found)
    assert worst_mistakes(votes, answers) == []


def test_the_pictures_are_those_of_the_images_named(tmp_path: Path) -> None:
    images = np.arange(6, dtype=np.uint8)[:, None, None].repeat(9, axis=1).repeat(9, axis=2) * 40
    np.savez(tmp_path / "train.npz", images=images[:4], labels=[0, 0, 1, 1])
    np.savez(tmp_path / "test.npz", images=images[4:], labels=[1, 0])
    labelled = open_labelled(tmp_path)
    found = [{"query": 1, "label": 0, "answer": 1, "certainty": 0.7, "neighbours": [3, 2], "cosines": [0.9, 0.8]}]
    rows = named(found, labelled, np.array([0, 1, 2, 3]), np.array([4, 5]))
    assert rows[0] | {"neighbours": []} == {
        "place": 5, "image": "1", "label": "0", "answer": "1", "certainty": 0.7, "neighbours": [],
    }  # fmt: skip
    assert [n["place"] for n in rows[0]["neighbours"]] == [3, 2]
    drawn = pictures(rows, labelled)
    assert drawn.shape == (1, 1 + NEIGHBOURS, SIDE, SIDE, 1)
    assert drawn[0, :, 30, 30, 0].tolist() == [200, 120, 80, 0, 0, 0]


def test_pictures_of_real_numbers_span_the_grey_levels(tmp_path: Path) -> None:
    images = np.linspace(-3, 5, 4, dtype=np.float32)[:, None, None].repeat(80, axis=1).repeat(90, axis=2)
    np.savez(tmp_path / "all.npz", images=images, labels=[0, 1, 0, 1])
    labelled = open_labelled(tmp_path / "all.npz")
    rows = [{"place": 0, "neighbours": [{"place": 3}]}]
    drawn = pictures(rows, labelled)
    assert drawn[0, 0].max() == 0
    assert drawn[0, 1].min() == 255
