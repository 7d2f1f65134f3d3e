"""Curation: planted duplicates and outliers are found, picks cover planted clusters, and the table says so."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import blobs
from PIL import Image
from test_export import a_run

from barlow.curate import curate
from barlow.curation import FAR, curate_features, nearest, unit
from barlow.errors import DataError, UserError

SPREAD = 0.3


def planted(seed: int = 0, d: int = 32) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(features, cluster, group, outlier): 6 clusters, 8 images with 1 to 3 copies each, 5 images far from all."""
    rng = np.random.default_rng(seed)
    centres = 3 * np.linalg.qr(rng.standard_normal((d, d)))[0][:11]
    cluster = np.repeat(np.arange(6), [100, 90, 80, 70, 60, 50])
    z = centres[cluster] + SPREAD * rng.standard_normal((len(cluster), d))
    group = np.zeros(len(z), np.int64)
    copied = rng.choice(len(z), 8, replace=False)
    group[copied] = np.arange(1, 9)
    origin = np.repeat(copied, 1 + np.arange(8) % 3)
    copies = z[origin] + 0.02 * SPREAD * rng.standard_normal((len(origin), d))
    far = centres[6:] + 0 * z[:5]
    outlier = np.r_[np.zeros(len(z) + len(copies), bool), np.ones(5, bool)]
    return (np.concatenate([z, copies, far]), np.r_[cluster, cluster[origin], np.full(5, -1)],
            np.r_[group, group[origin], np.zeros(5, np.int64)], outlier)  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_planted_duplicates_and_outliers_are_found(seed: int) -> None:
    z, _, group, outlier = planted(seed)
    found = curate_features(z, 0)
    for one in range(1, 9):
        named = set(found.group[group == one].tolist())
        assert len(named) == 1
        assert 0 not in named
    assert (found.group[group == 0] == 0).all()
    assert (found.outlier[outlier] >= FAR).all()
    assert (found.outlier[~outlier] >= FAR).mean() < 0.03
    assert found.outlier[outlier].min() > np.sort(found.outlier[~outlier])[-2]


@pytest.mark.parametrize("seed", range(4))
def test_picks_cover_the_clusters_and_ask_neither_copies_nor_outliers(seed: int) -> None:
    z, cluster, _, outlier = planted(seed)
    found = curate_features(z, 6, seed)
    picked = np.flatnonzero(found.pick)
    assert sorted(found.pick[picked]) == [1, 2, 3, 4, 5, 6]
    assert set(cluster[picked].tolist()) == set(range(6))
    assert cluster[found.pick == 1] == [0]  # the largest first
    many = curate_features(z, 60, seed)
    assert (many.pick > 0).sum() == 60
    assert not outlier[many.pick > 0].any()
    named = many.group[(many.pick > 0) & (many.group > 0)]
    assert len(named) == len(set(named.tolist()))
    again = curate_features(z, 60, seed)
    np.testing.assert_array_equal(again.pick, many.pick)


@pytest.mark.parametrize("n", [2, 3, 21, 1030])
def test_nearest_is_the_obvious_one(n: int) -> None:
    z = unit(np.random.default_rng(n).standard_normal((n, 5)))
    k = min(4, n - 1)
    near, distance = nearest(z, k)
    full = np.linalg.norm(z[:, None].astype(np.float64) - z[None], axis=2)
    np.fill_diagonal(full, np.inf)
    np.testing.assert_allclose(distance, np.sort(full, axis=1)[:, :k], atol=2e-3)
    np.testing.assert_allclose(np.take_along_axis(full, near, 1), distance, atol=2e-3)


def test_comparing_features_is_no_silence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: minutes without a word where the features of very many images are compared."""
    monkeypatch.setattr("barlow.progress.PLAIN_EVERY", 0.0)
    nearest(unit(np.random.default_rng(0).standard_normal((2100, 5))), 3)
    assert "comparing features, block by block: 3 of 3" in capsys.readouterr().err


def test_outliers_of_any_depth_are_found() -> None:
    """Each of three images is far out at one depth alone, and only where that depth is looked at."""
    rng = np.random.default_rng(0)
    depths = [rng.standard_normal((300, d)) for d in (16, 32, 64)]
    for k, z in enumerate(depths):
        z[k] *= 8
    found = curate_features(depths[-1], 0, before=depths[:-1])
    assert (found.outlier[:3] >= FAR).all()
    assert (found.outlier[3:] >= FAR).mean() < 0.03
    output = curate_features(depths[-1], 0)
    assert (output.outlier[:3] >= FAR).tolist() == [False, False, True]


def test_few_images_and_equal_images() -> None:
    two = curate_features(np.array([[0.0, 1], [1, 0]]), 5)
    assert sorted(two.pick) == [1, 2]
    same = curate_features(np.tile(np.array([[0.0, 1], [1, 0]]), (30, 1)), 5)
    assert set(same.group.tolist()) == {1, 2}
    assert (same.pick > 0).sum() == 2


def test_the_table_and_the_sheet(tmp_path: Path) -> None:
    run, folder = a_run(tmp_path / "run"), tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(30):
        pixels = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        if i in (3, 4):
            Image.fromarray(pixels).save(folder / f"{i:02d}, copy.jpg", quality=95, subsampling=0)
    (folder / "broken.png").write_text("no picture")
    said = curate(run, str(folder), tmp_path / "found.csv", picks=4)
    assert said.startswith("32 images: ")
    assert said.endswith("4 to label first")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "found.csv").read_text())))
    assert [row["path"] for row in rows][:6] == ["00.png", "01.png", "02.png", "03, copy.jpg", "03.png", "04, copy.jpg"]
    group = {row["path"]: row["group"] for row in rows}
    assert group["03.png"] == group["03, copy.jpg"] != ""
    assert group["04.png"] == group["04, copy.jpg"] != ""
    assert group["03.png"] != group["04.png"]
    assert sorted(row["pick"] for row in rows if row["pick"]) == ["1", "2", "3", "4"]
    with Image.open(tmp_path / "found.png") as sheet:
        assert sheet.width > 8 * 200 or sheet.width > 4 * 200
        assert (
            len(set(sheet.getdata() if not hasattr(sheet, "get_flattened_data") else sheet.get_flattened_data())) > 20
        )


def test_noise_between_images_is_marked(tmp_path: Path) -> None:
    """The features of an encoder hardly show it; what lies before them does."""
    run = a_run(tmp_path / "run")
    rng = np.random.default_rng(0)
    images = np.stack([blobs(80, 32, seed) for seed in range(3)], axis=3)
    images[[7, 50]] = rng.integers(0, 256, (2, 32, 32, 3))
    np.save(tmp_path / "images.npy", images)
    curate(run, str(tmp_path / "images.npy"), tmp_path / "found.csv", picks=0)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "found.csv").read_text())))
    order = np.argsort([-float(row["outlier"]) for row in rows])
    assert set(order[:2].tolist()) == {7, 50}
    assert [rows[i]["is_outlier"] for i in (7, 50)] == ["1", "1"]


def test_an_encoder_that_is_barely_trained_is_no_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last verdict of the run counts, and only the one on the encoder's output."""
    run = a_run(tmp_path / "run")
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8))

    def warned(*verdicts: str) -> str:
        lines = [{"kind": "health", "step": k, "of": "features", "verdict": v} for k, v in enumerate(verdicts)]
        lines += [{"kind": "health", "step": 9, "of": "embedding", "verdict": "complete collapse"}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        curate(run, str(tmp_path / "images.npy"), tmp_path / "found.csv")
        return capsys.readouterr().err

    assert "at step 1, is 'not learning yet': do not trust" in warned("healthy", "not learning yet")
    assert warned("not learning yet", "healthy") == ""
    assert warned() == ""


def test_mistakes(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    np.save(tmp_path / "one.npy", np.zeros((1, 8, 8, 3), np.uint8))
    for output, words in (("a.parquet", "must end in .csv"), ("none/a.csv", "does not exist")):
        with pytest.raises(UserError, match=words):
            curate(run, str(tmp_path / "one.npy"), tmp_path / output)
    with pytest.raises(UserError, match="picks = -1"):
        curate(run, str(tmp_path / "one.npy"), tmp_path / "a.csv", picks=-1)
    with pytest.raises(DataError, match="nothing to compare"):
        curate(run, str(tmp_path / "one.npy"), tmp_path / "a.csv")
    assert not (tmp_path / "a.csv").exists()


@pytest.mark.parametrize("n", [20, 24, 40, 60])
def test_images_of_a_small_pile_are_no_copies_of_each_other(n: int) -> None:
    """Kills: distances in the one or two directions that so few images give, where half of them lie close."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((n, 256)) * np.arange(1, 257) ** -0.5
    z[:3] = z[3:6] + 1e-3 * rng.standard_normal((3, 256))
    found = curate_features(z, 10)
    assert (found.group[:3] == found.group[3:6]).all()
    assert found.group[:3].all()
    assert (found.group[6:] > 0).sum() <= 2
    assert (found.pick > 0).sum() == 10


@pytest.mark.parametrize("noise", [0.0, 1e-4])
@pytest.mark.parametrize("share", [0.3, 0.51, 0.8])
def test_a_pile_of_mostly_blank_pages(share: float, noise: float) -> None:
    """Kills: every image that is not blank an outlier as soon as most are, and no duplicates once they differ a bit."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((600, 64)) * np.arange(1, 65) ** -0.5
    blank = int(600 * share)
    z[:blank] = z[0] + noise * rng.standard_normal((blank, 64))
    found = curate_features(z, 20)
    assert (found.group[:blank] == found.group[0]).all()
    assert (found.group > 0).sum() == blank
    assert (found.outlier >= FAR).mean() < 0.02
    assert (found.pick > 0).sum() == 20
