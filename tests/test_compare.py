"""Runs ranked without labels: the order, how sure it is, the same questions to all; LiDAR's relatives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus import folder_of

from barlow import Config, pretrain
from barlow.batches import split
from barlow.cli import app
from barlow.compare import MOST, common, compare, finds, has_not_seen, of_range, seen, spread, table
from barlow.config import to_toml
from barlow.encoder import load_encoder
from barlow.errors import UserError
from barlow.health import lidar
from barlow.images import open_images, write_index
from barlow.neighbours import between_over_within
from barlow.runlog import read_metrics


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from conftest import TINY_ARGS, blobs

    folder = tmp_path_factory.mktemp("runs")
    np.save(folder / "images.npy", blobs(96))
    made = []
    for name, size in (("a", 32), ("b", 24)):
        config = Config(
            str(folder / "images.npy"), out=str(folder / name), encoder="resnetv2_18", encoder_args=TINY_ARGS,
            image_size=size, projector=(32, 32), lambda_=0.02, batch_size=32, steps=2, held_out=16, devices=1,
            precision="float32", workers=0, seed=1,
        )  # fmt: skip
        made.append(pretrain(config, quiet=True))
    return made[0], made[1]


def test_finds_against_counting_one_by_one() -> None:
    draw = np.random.default_rng(0)
    z = draw.standard_normal((12, 1, 5)) + 0.7 * draw.standard_normal((12, 4, 5))
    unit = z / np.linalg.norm(z, axis=2, keepdims=True)
    for image in range(12):
        hits = 0
        for a in range(4):
            for b in range(4):
                nearest = max(range(12), key=lambda other: unit[image, a] @ unit[other, b])
                hits += a != b and nearest == image
        assert finds(z)[image] == pytest.approx(hits / 12)


def test_closer_views_are_found_more_often_and_equal_ones_never() -> None:
    draw = np.random.default_rng(0)
    images, noise = draw.standard_normal((100, 1, 8)), draw.standard_normal((100, 6, 8))
    near, far = finds(images + 0.3 * noise), finds(images + noise)
    assert near.mean() > 2 * far.mean() > 0.1
    assert np.array_equal(finds(1000 * (images + noise)), finds(images + noise))
    assert finds(np.ones((10, 3, 4))).max() == 0
    assert finds(np.zeros((10, 3, 4))).max() == 0
    assert 0 < finds(noise).mean() < 0.03  # chance is a hundredth


def test_lidar_counts_directions_of_the_image_only() -> None:
    draw = np.random.default_rng(0)
    z = draw.standard_normal((200, 1, 6)) * [3, 2, 1, 1, 0.5, 0] + 0.7 * draw.standard_normal((200, 5, 6))
    values = between_over_within(z)
    assert (np.diff(values) <= 0).all()
    assert 1 <= lidar(z) <= 6


def test_all_runs_answer_the_same_views(pair: tuple[Path, Path]) -> None:
    about = common(pair[0])
    z = seen(load_encoder(pair[0]), about)
    assert z.shape == (16, 10, 16)
    assert np.array_equal(z, seen(load_encoder(pair[0]), about))
    assert not np.allclose(z[:, 0], z[:, 2])


def test_the_ranking_and_how_sure_it_is(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    result = compare(pair)
    first, second = result["rows"]
    assert {first["run"], second["run"]} == {str(run) for run in pair}
    assert first["value"] >= second["value"]
    assert 0 <= first["low"] <= first["value"] <= first["high"] <= 1
    assert 0 <= first["before_next"] <= 1
    assert second["before_next"] is None
    assert "% sure" in table(result)
    assert "chance 6.2%" in table(result)
    app(["compare", *map(str, pair), "--json"], exit_on_error=False, result_action="return_value")
    assert json.loads(capsys.readouterr().out) == result


def test_a_run_that_may_know_the_images_is_told(
    tiny: Callable[..., Config], pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another seed holds out other images. Kills: a run that is asked about what it was trained on, and wins by it."""
    images = str(pair[0].parent / "images.npy")
    other = pretrain(tiny(images=images, out=str(tmp_path / "c"), seed=2, steps=2), quiet=True)
    capsys.readouterr()
    compare([pair[0], pair[1]])
    compare([pair[0], other], images)
    assert capsys.readouterr().err == ""
    compare([pair[0], pair[1], other])
    assert f"note: {other} held out other images than {pair[0]} and may have trained" in capsys.readouterr().err


def test_which_runs_have_not_seen_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: settings compared, not images: the same ones over a pile that has grown hold out others, and one folder
    under two names is one."""
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "photos", 60)
    folder_of(tmp_path / "others", 60)

    def run(name: str, **changes: Any) -> Path:
        config = Config(**{"images": "photos", "seed": 1, "held_out": 20} | changes)
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text(to_toml(config))
        write_index(open_images(config.images or ""), tmp_path / name / "index.parquet")
        return tmp_path / name

    about = common(run("first"))
    assert has_not_seen(run("same", steps=9, images=str(tmp_path / "photos")), about)
    assert has_not_seen(run("more", held_out=30), about)
    for name, changes in {"fewer": {"held_out": 10}, "seed": {"seed": 2}, "other": {"images": "others"}}.items():
        assert not has_not_seen(run(name, **changes), about)
    folder_of(tmp_path / "photos" / "later", 10)
    assert not has_not_seen(run("grown"), about)
    (tmp_path / "same" / "index.parquet").write_bytes(b"PAR1")
    assert not has_not_seen(tmp_path / "same", about)
    (tmp_path / "same" / "index.parquet").unlink()
    assert not has_not_seen(tmp_path / "same", about)
    with pytest.raises(UserError, match=r"same/index.parquet, which names the images of the run, is gone: name some"):
        common(tmp_path / "same")


def test_of_many_held_out_images_some_of_all_are_asked_about() -> None:
    """Kills: the first of them, which with folders of classes or days are those of the first folders."""
    held_out = split(1, 2000, 700)[1]
    asked = spread(held_out)
    assert len(asked) == MOST
    assert (asked[0], asked[-1]) == (held_out[0], held_out[-1])
    assert np.array_equal(spread(held_out[:MOST]), held_out[:MOST])


def test_a_copy_of_a_run_is_a_coin(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[0], tmp_path / "copy")
    assert compare([pair[0], tmp_path / "copy"])["rows"][0]["before_next"] == 0.5


def test_mistakes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two runs or more"):
        compare(pair[:1])
    with pytest.raises(UserError, match="named twice"):
        compare([pair[0], pair[0]])
    (tmp_path / "link").symlink_to(pair[0])
    with pytest.raises(UserError, match="named twice"):
        compare([pair[0], tmp_path / "link"])
    with pytest.raises(UserError, match=r"no config\.toml"):
        compare([tmp_path, pair[0]])


def test_other_images_can_be_asked_about(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And then nobody asks what the runs were trained on."""
    from conftest import blobs

    np.save(tmp_path / "others.npy", blobs(20, seed=3))
    shutil.copytree(pair[1], tmp_path / "copy")
    (tmp_path / "copy" / "index.parquet").write_bytes(b"PAR1")
    assert compare([pair[0], tmp_path / "copy"], str(tmp_path / "others.npy"))["images"] == 20
    assert "note" not in capsys.readouterr().err


def test_lidar_stands_in_the_last_health_lines(pair: tuple[Path, Path]) -> None:
    lines = [line for line in read_metrics(pair[0] / "metrics.jsonl") if line["kind"] == "health"]
    assert {"lidar" in line for line in lines if line["step"] == 0} == {False}
    last = [line for line in lines if line["step"] == 2]
    assert [line["of"] for line in last] == ["features", "embedding"]
    assert all(1 <= line["lidar"] <= 15 for line in last)


def test_a_run_from_python_needs_images(tiny: Callable[..., Config], pair: tuple[Path, Path]) -> None:
    from conftest import blobs

    run = pretrain(tiny(steps=1, images=None), images=blobs(96)[..., None], quiet=True)
    with pytest.raises(UserError, match="from Python"):
        compare([run, pair[0]])


@pytest.mark.parametrize("kind", ["float32", "uint16"])
def test_each_encoder_sees_the_values_that_it_was_trained_on(tmp_path: Path, kind: str) -> None:
    """Kills: the images scaled as the first run had them, whatever the others were trained with."""
    draw = np.random.default_rng(0)
    full, wanted = (1, (-20.0, 80.0)) if kind == "float32" else (65535, (0.1, 0.2))
    arrays = (draw.uniform(0.11, 0.19, (6, 8, 8, 1)) * (full if full > 1 else 100)).astype(kind)
    (tmp_path / "in").mkdir()
    for k, array in enumerate(arrays):
        np.save(tmp_path / "in" / f"{k}.npy", array)
    for source in (arrays, list(arrays), tmp_path / "in"):
        images, right = open_images(source), open_images(source, value_range=wanted)
        assert images.value_range != wanted
        inside = (arrays[2] / full - images.value_range[0]) / np.ptp(images.value_range)
        inside = (inside > 0) & (inside < 1)  # what the first range has clipped is gone
        seen_now = of_range(images, wanted).read(2)
        np.testing.assert_allclose(seen_now[inside], right.read(2)[inside], atol=1e-5 if full == 1 else 1)
