"""The main job from Python: a run folder as promised, the same bits again, resumed to the bit, fit to be overfitted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import blobs
from PIL import Image
from safetensors.torch import load_file

import barlow.launch
import barlow.length
import barlow.prepare
import barlow.run
import barlow.train
from barlow import Config, embed, load_encoder, pretrain
from barlow.batches import Batch, Stream
from barlow.config import read_toml
from barlow.cores import Wait
from barlow.encoder import untrained
from barlow.errors import NumbersError, Stopped, UserError
from barlow.length import FINISH_SECONDS, Pace
from barlow.looks import LIDAR
from barlow.prepare import Ready
from barlow.quarantine import read_quarantine
from barlow.runlog import read_metrics

QUIET = Wait(0.0, 0.0, 0.0)
Make = Callable[..., Config]


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == kind]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "encoder" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_run_folder_as_promised(tiny: Make) -> None:
    run = pretrain(tiny(), quiet=True)
    assert {path.name for path in run.iterdir()} >= {
        "config.toml", "environment.json", "index.parquet", "metrics.jsonl", "checkpoints", "encoder", "report.html",
    }  # fmt: skip
    config = read_toml(run / "config.toml")
    assert config.steps == 8
    assert config.batch_size == 32
    trained = lines(run, "train")
    assert [line["step"] for line in trained] == list(range(1, 9))
    assert trained[-1].keys() >= {"epoch", "loss", "floor", "invariance", "redundancy", "diagonal", "lr"}
    for line in trained:
        assert line["loss"] == pytest.approx(line["invariance"] + 0.02 * line["redundancy"], rel=1e-5)
        assert line["loss"] > line["floor"]
    assert {line["of"] for line in lines(run, "health")} == {"features", "embedding"}
    assert 0 <= lines(run, "health")[-1]["twins_found"] <= 1
    assert json.loads((run / "environment.json").read_text())["torch"] == torch.__version__


def test_every_look_remembers_how_near_the_twins_were_at_first(tiny: Make) -> None:
    run = pretrain(tiny(health_every=3), quiet=True)
    looks = [line for line in lines(run, "health") if line["of"] == "embedding"]
    assert [line["step"] for line in looks] == [0, 3, 6, 8]
    assert {line["twins_near_first"] for line in looks} == {looks[0]["twins_near"]}
    assert looks[0]["verdict"] != "healthy"  # nothing can be said of a network that nothing was done to
    assert not any("twins_near_first" in line for line in lines(run, "health") if line["of"] == "features")


def test_same_seed_same_bits_other_seed_other_bits(tiny: Make, tmp_path: Path) -> None:
    a = pretrain(tiny(), quiet=True)
    b = pretrain(tiny(out=str(tmp_path / "b")), quiet=True)
    c = pretrain(tiny(out=str(tmp_path / "c"), seed=2), quiet=True)
    assert same(weights(a), weights(b))
    assert lines(a, "train") == lines(b, "train")
    assert lines(a, "health") == lines(b, "health")
    assert not same(weights(a), weights(c))


@pytest.mark.parametrize("stop_at", [1, 5])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resume_is_exact(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int, precision: str
) -> None:
    """Kills: randomness carried instead of addressed; optimiser or BatchNorm state left out; a schedule begun anew."""
    whole = pretrain(tiny(out=str(tmp_path / "whole"), precision=precision), quiet=True)
    config = tiny(precision=precision)
    with monkeypatch.context() as patch:
        patch.setattr(barlow.run.Session, "out_of_time", lambda session: session.step >= stop_at)
        with pytest.raises(Stopped, match=f"after step {stop_at} of 8, saved") as stopped:
            pretrain(config, quiet=True)
    assert stopped.value.exit_code == 75
    run = pretrain(config, quiet=True)  # the same command again
    assert same(weights(whole), weights(run))
    assert lines(whole, "train") == lines(run, "train")
    assert lines(whole, "health") == lines(run, "health")


def test_complete_run_is_left_alone(tiny: Make) -> None:
    run = pretrain(tiny(), quiet=True)
    before = (run / "encoder" / "model.safetensors").read_bytes(), lines(run, "train")
    pretrain(tiny(), quiet=True)
    assert ((run / "encoder" / "model.safetensors").read_bytes(), lines(run, "train")) == before


def test_other_settings_in_the_same_folder_are_refused(tiny: Make) -> None:
    pretrain(tiny(), quiet=True)
    with pytest.raises(UserError, match=r"other settings \(lambda: 0.02 → 0.5; lr: .* → 0.1\)"):
        pretrain(tiny(lambda_=0.5, lr=0.1), quiet=True)


def test_a_run_computes_in_the_precision_that_it_records(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is made when the images are known, after the processes are launched. Kills: a launch that chooses."""
    for room in (barlow.launch, barlow.prepare):
        monkeypatch.setattr(room, "machine", lambda: ("cpu", 1, 2, True))  # bfloat16 would pay
    images = tiny().images or ""
    for size, precision in ((32, "float32"), (48, "bfloat16")):
        out = Path(images).with_name(str(size))
        chosen = pretrain(tiny(out=f"{out}-chosen", image_size=size, precision=None, steps=2), quiet=True)
        given = pretrain(tiny(out=f"{out}-given", image_size=size, precision=precision, steps=2), quiet=True)
        assert read_toml(chosen / "config.toml").precision == precision
        assert lines(chosen, "train") == lines(given, "train")


def test_resume_without_a_run(tiny: Make) -> None:
    with pytest.raises(UserError, match="no run to resume"):
        pretrain(tiny(), resume=True, quiet=True)


def test_64_images_are_overfitted(tmp_path: Path) -> None:
    """With no augmentation but a small crop, a few dozen steps bring nearly every twin together."""
    views = ({"crop": [0.8, 1.0]}, {"crop": [0.8, 1.0]})
    config = Config(out=str(tmp_path / "run"), views=views, encoder="resnetv2_18", image_size=32, lambda_=0.02,
                    encoder_args={"layers": [1, 1, 1, 1], "channels": [16, 16, 32, 32], "stem_chs": 8},
                    projector=(64, 32), batch_size=64, steps=60, held_out=2, precision="float32",
                    devices=1, optimizer="adamw", lr=3e-3)  # fmt: skip
    run = pretrain(config, images=blobs(66), quiet=True)
    trained = lines(run, "train")
    assert trained[-1]["loss"] < 0.15 * trained[0]["loss"]
    assert trained[-1]["diagonal"] > 0.8


def test_golden_loss_curve(tiny: Make) -> None:
    """Twenty steps of the loss, as they came out when this file was written.

    A changed draw, view, weight, loss, group or schedule moves them by more than 0.1 % (λ by a twentieth: 0.3 %, the
    learning rate by a twentieth: 1 %); another number of threads moves them by 0.0002 %.
    """
    view = {"crop": (0.4, 1.0), "ratio": (3 / 4, 4 / 3), "flip": 0.5, "jitter": 0.8, "brightness": 0.4, "contrast": 0.4}
    run = pretrain(tiny(steps=20, lr=2e-4, optimizer="adamw", views=(view, view)), quiet=True)
    golden = json.loads((Path(__file__).parent / "golden" / "loss.json").read_text())
    assert [line["loss"] for line in lines(run, "train")] == pytest.approx(golden["loss"], rel=1e-3)


def test_unshared_twins_leave_two_encoders(tiny: Make) -> None:
    run = pretrain(tiny(twins="unshared"), quiet=True)
    assert not same(weights(run), load_file(run / "encoder_b" / "model.safetensors"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("twins", ["shared", "unshared"])
def test_micro_batches_run(tiny: Make, precision: str, twins: str) -> None:
    run = pretrain(tiny(micro_batch=8, precision=precision, twins=twins), quiet=True)
    assert len(lines(run, "train")) == 8


def test_minutes_are_turned_into_steps_once(tiny: Make) -> None:
    run = pretrain(tiny(steps=None, minutes=0.2), quiet=True)
    config = read_toml(run / "config.toml")
    assert config.steps is not None
    assert lines(run, "train")[-1]["step"] == config.steps
    assert config.minutes == 0.2


def test_minutes_do_not_change_the_bits(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps that are timed are thrown away, those that workers have read included: a run of n measured steps is
    the run of n given steps."""
    timed = []

    def measured(parts: Ready, seconds: float) -> Pace:
        timed.append(barlow.length.trial(parts, seconds / 10))
        return Pace(step=40.0, look=0.1, wait=QUIET)

    monkeypatch.setattr(barlow.run, "trial", measured)
    run = pretrain(tiny(steps=None, minutes=10, workers=1), quiet=True)
    assert timed[0].step > 0 < timed[0].look
    steps = read_toml(run / "config.toml").steps
    assert 10 <= (steps or 0) <= 14  # some of the time is gone before, and some kept for looks, saving and the report
    other = pretrain(tiny(steps=steps, out=str(tmp_path / "b")), quiet=True)
    assert same(weights(run), weights(other))


@pytest.mark.parametrize("every", [None, 7])
def test_the_steps_that_fit_in_a_time(every: int | None) -> None:
    """As many looks as the run will have are counted: few in a short run, hundreds in a long one of quick steps."""
    pace, config = Pace(step=0.01, look=2.0, wait=QUIET), Config(health_every=every, batch_size=256, held_out=256)
    for seconds in (20.0, 100.0, 36000.0):
        steps = pace.steps_in(seconds, config)
        assert pace.whole(steps, config) <= seconds < pace.whole(steps + 1, config)
    few = 2 + LIDAR  # looks: before the first step, and after the last with LiDAR
    assert pace.whole(5, config) == pytest.approx(5 * 0.01 + few * 2.0 + FINISH_SECONDS)
    many = 141 if every is None else 10_001
    assert pace.whole(70000, config) == pytest.approx(700 + (many + LIDAR) * 2.0 + FINISH_SECONDS)
    assert pace.steps_in(1.0, config) == 1


def test_a_dry_run_of_minutes_takes_them(tiny: Make, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Kills: steps counted by one measurement, and their time told by another."""
    paces = iter([Pace(step=0.1, look=1.0, wait=QUIET), Pace(step=0.2, look=1.0, wait=QUIET)])
    monkeypatch.setattr(barlow.run, "trial", lambda *_: next(paces))
    pretrain(tiny(steps=None, minutes=60), dry_run=True)
    assert "100 ms each, about 1 h 0 min in all" in capfd.readouterr().err


@pytest.mark.parametrize("where", ["pixels", "gradient"])
def test_nan_stops_before_the_update(tiny: Make, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A value that is not finite at step 4 ends the run with the advice, and no update is made with it."""
    finish, stepped = Stream.finish, []

    def poisoned(self: Stream, batch: Batch, *rest: Any) -> list[torch.Tensor]:
        views = finish(self, batch, *rest)
        if batch.step == 3 and where == "pixels":
            views[1][0, 0, 0, 0] = float("inf")
        if batch.step == 3 and where == "gradient":
            monkeypatch.setattr(barlow.train.torch.nn.utils, "get_total_norm", lambda _: torch.tensor(float("nan")))
        return views

    monkeypatch.setattr(Stream, "finish", poisoned)
    monkeypatch.setattr(barlow.train, "set_rate", lambda *_, real=barlow.train.set_rate: stepped.append(real(*_)))
    with pytest.raises(NumbersError, match=r"At step 4 .*NaN.*learning rate that is too large: try --lr"):
        pretrain(tiny(), quiet=True)
    assert len(stepped) == 3


def test_untrained_is_the_network_before_training(tiny: Make) -> None:
    run = pretrain(tiny(), quiet=True)
    before = untrained(run, 1)
    assert not same(dict(before.model.state_dict()), dict(load_encoder(run).model.state_dict()))
    again = untrained(run, 1)
    assert same(dict(before.model.state_dict()), dict(again.model.state_dict()))


def pairs(folder: Path) -> str:
    """A table of 96 pairs: an image in colour, and the same scene in two bands of 16 bits at another size."""
    (folder / "a").mkdir()
    rows = []
    for k, (small, large) in enumerate(zip(blobs(96, 24), blobs(96, 40), strict=True)):
        Image.fromarray(np.stack([large, 255 - large, large // 2], 2)).save(folder / "a" / f"{k}.png")
        np.save(folder / "a" / f"{k}.npy", np.stack([small, small // 2], 2).astype(np.uint16) * 200)
        rows.append(f"a/{k}.png,a/{k}.npy")
    (folder / "pairs.csv").write_text("\n".join(rows))
    return str(folder / "pairs.csv")


@pytest.mark.parametrize("cache", [True, False])
def test_given_pairs(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two kinds of image, two networks, two encoders; stopped and resumed to the bit. The form of the cache stays."""
    monkeypatch.setenv("BARLOW_CACHE", str(tmp_path / "store"))
    table = pairs(tmp_path)
    whole = pretrain(tiny(images=table, out=str(tmp_path / "whole"), image_size=32, cache=cache), quiet=True)
    config = read_toml(whole / "config.toml")
    assert (config.channels, config.channels_b, config.twins) == (3, 2, "unshared")
    assert config.views == "small/many-channel"
    assert len(config.mean_b or ()) == 2
    assert (config.cache, config.cache_form) == ((True, "raw") if cache else (False, None))
    assert [load_encoder(whole / name).channels for name in ("encoder", "encoder_b")] == [3, 2]
    assert list(load_encoder(whole / "encoder_b").mean.flatten()) == pytest.approx(config.mean_b)
    health = lines(whole, "health")
    assert {line["of"] for line in health} == {"features", "features_b", "embedding"}
    assert {line["of"] for line in health if "twins_found" in line} == {"embedding"}
    assert (whole / "report.html").stat().st_size > 10_000
    embed(whole, table)
    assert "note: of a table of pairs the first images are taken" in capsys.readouterr().err
    config = tiny(images=table, image_size=32, cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(barlow.run.Session, "out_of_time", lambda session: session.step >= 3)
        with pytest.raises(Stopped):
            pretrain(config, quiet=True)
    with pytest.raises(UserError, match=r"other settings.*cache: "):
        pretrain(Config(out=config.out, cache=not cache), resume=True, quiet=True)
    if cache:
        with monkeypatch.context() as patch:  # the cache is gone and does not fit any more
            patch.setenv("BARLOW_CACHE", str(tmp_path / "other"))
            patch.setattr("barlow.cache.free_bytes", lambda: 10)
            with pytest.raises(UserError, match=r"reads its images from a cache \(raw\), but it needs .*: make room"):
                pretrain(Config(out=config.out), resume=True, quiet=True)
    run = pretrain(Config(out=config.out), resume=True, quiet=True)
    for name in ("encoder", "encoder_b"):
        one, other = (load_file(folder / name / "model.safetensors") for folder in (run, whole))
        assert same(one, other)
    assert lines(run, "train") == lines(whole, "train")


def test_of_a_pair_the_image_that_is_broken_is_quarantined(tiny: Make, tmp_path: Path) -> None:
    """Kills: the sound first image written down, whenever the second is broken."""
    table = pairs(tmp_path)
    for k in range(0, 96, 5):
        (tmp_path / "a" / f"{k}.npy").write_bytes((tmp_path / "a" / f"{k}.npy").read_bytes()[:200])
    run = pretrain(tiny(images=table, image_size=32, cache=False, max_bad=0.5), quiet=True)
    named = {row["path"] for row in read_quarantine(run / "quarantine.jsonl")}
    assert len(named) > 10
    assert named <= {f"a/{k}.npy" for k in range(0, 96, 5)}


def test_pairs_that_cannot_be_trained_are_refused(tiny: Make, tmp_path: Path) -> None:
    table = pairs(tmp_path)
    for changes, words in (
        ({"twins": "shared"}, "pairs of 3 and 2 channels cannot share a network"),
        ({"views": ({}, {}, {})}, "pairs take two views, not 3"),
        ({"views": "small/wide"}, "'wide' is not known"),
        ({"mean_b": (0.5,)}, "mean_b has 1 values for 2 channels"),
        ({"images": str(tmp_path / "images.npy"), "channels_b": 1}, "channels_b is for a table of pairs|mean_b has"),
        ({"images": str(tmp_path / "images.npy"), "views": "small/small"}, "for given pairs"),
    ):
        with pytest.raises(UserError, match=words):
            pretrain(tiny(**{"images": table} | changes), quiet=True)


@pytest.mark.parametrize("views", ["natural", "overhead"])
def test_colour_images_train_in_bfloat16(tiny: Make, tmp_path: Path, views: str) -> None:
    """Kills: views made under the autocast of the looks, which solarising ends with an error and others make coarse."""
    np.save(tmp_path / "images.npy", np.stack([blobs(96, seed=k) for k in range(3)], axis=3))
    config = tiny(precision="bfloat16", views=views)
    exact = pretrain(config.replace(out=str(config.out) + "-32", precision="float32"), quiet=True)
    run = pretrain(config, quiet=True)
    (first, *_), (as_exact, *_) = lines(run, "health"), lines(exact, "health")
    assert first["step"] == as_exact["step"] == 0
    assert first["twins_found"] == pytest.approx(as_exact["twins_found"], abs=0.2)


def test_a_run_on_pairs_that_do_not_belong_together_says_so(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    own, mild = barlow.train.barlow_twins_loss, ({"crop": (0.5, 1.0), "flip": 0.5},) * 2
    sound = lines(pretrain(tiny(steps=24, views=mild), quiet=True), "health")[-1]
    assert sound["train_diagonal"] > 0.1
    monkeypatch.setattr(barlow.train, "barlow_twins_loss", lambda a, b, lambda_: own(a, b.roll(1, 0), lambda_=lambda_))
    config = tiny(steps=24, views=mild, out=str(tiny().out) + "-mixed")
    mixed = lines(pretrain(config, quiet=True), "health")[-1]
    assert mixed["verdict"] == "not learning yet"
    assert "In training" in mixed["sentence"]


def test_a_run_that_is_continued_fetches_no_weights(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a pretrained run that no node without a network can resume, though its checkpoint holds all weights."""
    create, asked = timm.create_model, list[bool]()

    def noted(name: str, pretrained: bool = False, **options: Any) -> Any:
        asked.append(pretrained)
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", noted)
    with monkeypatch.context() as patch:
        patch.setattr(barlow.run.Session, "out_of_time", lambda session: session.step >= 3)
        with pytest.raises(Stopped):
            pretrain(tiny(pretrained=True), quiet=True)
    assert set(asked) == {True}
    asked.clear()
    pretrain(tiny(pretrained=True), quiet=True)
    assert set(asked) == {False}
