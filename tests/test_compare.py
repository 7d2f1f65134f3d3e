"""Runs ranked without labels: the order, how sure it is, the same questions to all; LiDAR's relatives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from barlow import Config, pretrain
from barlow.cli import app
from barlow.compare import common, compare, score, seen, table
from barlow.encoder import load_encoder
from barlow.errors import UserError
from barlow.health import lidar
from barlow.neighbours import between_over_within, view_information
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


def test_information_is_that_of_the_two_gaussians() -> None:
    """Against ½ log det(B + W) − ½ log det W, the way it is written down."""
    draw = np.random.default_rng(0)
    z = draw.standard_normal((200, 1, 6)) * [3, 2, 1, 1, 0.5, 0] + 0.7 * draw.standard_normal((200, 5, 6))
    means = z.mean(axis=1)
    between = np.cov(means.T, bias=True)
    rest = (z - means[:, None]).reshape(-1, 6)
    within = rest.T @ rest / len(rest) + 1e-4 * np.eye(6)
    expected = 0.5 * (np.linalg.slogdet(between + within)[1] - np.linalg.slogdet(within)[1])
    assert view_information(z) == pytest.approx(expected, rel=1e-6)
    values = between_over_within(z)
    assert (np.diff(values) <= 0).all()
    assert 1 <= lidar(z) <= 6


def test_more_directions_and_closer_views_are_better() -> None:
    draw = np.random.default_rng(0)
    images, noise = draw.standard_normal((100, 1, 8)), draw.standard_normal((100, 6, 8))
    whole, near, flat = images + 0.5 * noise, images + 0.2 * noise, images * ([1] * 4 + [0] * 4) + 0.5 * noise
    assert score(near) > score(whole) > score(flat)
    assert score(1000 * whole) == pytest.approx(score(whole))
    assert score(np.ones((10, 3, 4))) == 0


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
    assert first["low"] < first["value"] < first["high"]
    assert 0 <= first["before_next"] <= 1
    assert second["before_next"] is None
    assert "of 100 halves" in table(result)
    app(["compare", *map(str, pair), "--json"], exit_on_error=False, result_action="return_value")
    assert json.loads(capsys.readouterr().out) == result


def test_mistakes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two runs or more"):
        compare(pair[:1])
    with pytest.raises(UserError, match="named twice"):
        compare([pair[0], pair[0]])
    with pytest.raises(UserError, match=r"no config\.toml"):
        compare([tmp_path, pair[0]])


def test_other_images_can_be_asked_about(pair: tuple[Path, Path], tmp_path: Path) -> None:
    from conftest import blobs

    np.save(tmp_path / "others.npy", blobs(20, seed=3))
    assert compare(pair, str(tmp_path / "others.npy"))["images"] == 20


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
