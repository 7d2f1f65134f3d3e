"""What befalls a long run, and what is left of it: one process, tiny runs, the whole job from settings to folder."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import blobs
from lightning_fabric.plugins.precision import MixedPrecision
from PIL import Image
from test_run import lines, same, weights

import barlow.checkpoint
import barlow.finish
import barlow.launch
import barlow.length
import barlow.readers
import barlow.replay
import barlow.resume
import barlow.run
import barlow.session
import barlow.train
from barlow import Config, pretrain
from barlow.batches import Batch, Stream, split
from barlow.checkpoint import latest, load
from barlow.cli import main
from barlow.config import read_toml
from barlow.errors import DataError, NumbersError, Stopped, UserError
from barlow.images import open_images
from barlow.quarantine import read_quarantine
from barlow.readers import WorkerLost, batches
from barlow.run import replay
from barlow.runlog import Run
from barlow.session import Session
from barlow.signals import Deadline
from barlow.train import one_step
from barlow.watch import Watch

Make = Callable[..., Config]
Patch = pytest.MonkeyPatch


def after(patch: Patch, step: int, what: Callable[[Session], object]) -> None:
    """Does something once, when so many steps are done."""
    took = Session.took

    def also(session: Session, *rest: Any) -> None:
        took(session, *rest)
        if session.step == step:
            what(session)

    patch.setattr(Session, "took", also)


def pictures(path: Path, count: int = 96) -> Path:
    path.mkdir()
    for i, picture in enumerate(blobs(count)):
        Image.fromarray(picture).save(path / f"{i:03d}.png")
    return path


def saved(run: Path) -> int:
    newest = latest(run / "checkpoints")
    assert newest is not None
    return load(newest).step


def events(run: Path) -> str:
    return "\n".join(line["message"] for line in lines(run, "event"))


# Signals, time, SLURM


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 75)])
def test_a_signal_finishes_the_step_saves_and_leaves(tiny: Make, monkeypatch: Patch, name: str, code: int) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with monkeypatch.context() as patch:
        after(patch, 3, lambda _: signal.raise_signal(signal.Signals[name]))
        with pytest.raises(Stopped, match=f"signal {name} after step 3 of 8, saved") as stopped:
            pretrain(tiny(checkpoint_every=1000), quiet=True)  # the end of an epoch would save, too
    assert stopped.value.exit_code == code
    run = Path(tiny().out or "")
    assert saved(run) == 3 == lines(run, "train")[-1]["step"]


@pytest.mark.parametrize("where", ["first look", "third step"])
def test_killed_before_the_first_checkpoint_a_run_leaves_no_line_twice(
    tiny: Make, tmp_path: Path, monkeypatch: Patch, where: str
) -> None:
    whole = pretrain(tiny(out=str(tmp_path / "whole")), quiet=True)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "first look":  # its lines are written by then
            patch.setattr(Watch, "see", killed)
        else:
            after(patch, 3, killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(tiny(), quiet=True)
    run = pretrain(tiny(), quiet=True)
    told = ("train", "health", "event")
    assert [lines(run, kind) for kind in told] == [lines(whole, kind) for kind in told]
    assert same(weights(whole), weights(run))


def test_killed_while_it_chooses_a_run_begins_anew(tiny: Make, tmp_path: Path, monkeypatch: Patch) -> None:
    whole = pretrain(tiny(out=str(tmp_path / "whole")), quiet=True)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_config", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(tiny(), quiet=True)
    run = pretrain(tiny(), quiet=True)
    assert lines(run, "event") == lines(whole, "event")
    (run / "config.toml").unlink()
    with pytest.raises(UserError, match=r"holds checkpoints of a run whose config.toml is gone"):
        pretrain(tiny(), quiet=True)


def test_a_signal_with_workers_and_a_resume_with_another_number_of_them(
    tiny: Make, tmp_path: Path, monkeypatch: Patch
) -> None:
    """The signal goes to the workers too, as from a terminal; they go on. Then two workers continue what one began."""
    whole = pretrain(tiny(out=str(tmp_path / "whole")), quiet=True)

    def everyone(_: Session) -> None:
        for process in [*multiprocessing.active_children()]:
            os.kill(process.pid or 0, signal.SIGINT)
            os.kill(process.pid or 0, signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        after(patch, 3, everyone)
        with pytest.raises(Stopped, match="after step 3 of 8, saved"):
            pretrain(tiny(workers=1), quiet=True)
    assert not multiprocessing.active_children()
    run = pretrain(tiny(workers=2), quiet=True)
    assert same(weights(whole), weights(run))
    assert lines(whole, "train") == lines(run, "train")


@pytest.mark.parametrize(("name", "code", "where"), [
    ("SIGUSR1", 75, "survey"), ("SIGTERM", 143, "survey"), ("SIGTERM", 143, "finish"), ("SIGUSR1", 75, "finish"),
])  # fmt: skip
def test_a_signal_outside_training_ends_the_run_with_its_code(
    tiny: Make, tmp_path: Path, monkeypatch: Patch, name: str, code: int, where: str
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    whole = pretrain(tiny(out=str(tmp_path / "whole")), quiet=True)
    room, what = (barlow.run, "survey") if where == "survey" else (barlow.finish, "draw_report")
    with monkeypatch.context() as patch:
        patch.setattr(room, what, lambda *_: signal.raise_signal(signal.Signals[name]))
        with pytest.raises(Stopped, match=f"Stopped by signal {name} outside training; nothing is lost") as stopped:
            pretrain(tiny(), quiet=True)
    assert stopped.value.exit_code == code
    assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    run = pretrain(tiny(), quiet=True)
    assert same(weights(whole), weights(run))
    assert (run / "report.html").exists()


def test_a_run_that_begins_in_the_same_folder_meanwhile_is_left_alone(tiny: Make, monkeypatch: Patch) -> None:
    survey = barlow.run.survey

    def meanwhile(*words: Any) -> Any:
        monkeypatch.setattr(barlow.run, "survey", survey)
        pretrain(tiny(seed=2), quiet=True)
        return survey(*words)

    monkeypatch.setattr(barlow.run, "survey", meanwhile)
    with pytest.raises(UserError, match=r"another run has begun in .* meanwhile"):
        pretrain(tiny(), quiet=True)
    assert read_toml(Path(tiny().out or "") / "config.toml").seed == 2


def test_signals_during_the_save_do_not_spoil_it(tiny: Make, monkeypatch: Patch) -> None:
    write = barlow.checkpoint.write_files

    def interrupted(*words: Any) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), each)
        write(*words)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(barlow.checkpoint, "write_files", interrupted)
        after(patch, 3, lambda _: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Stopped, match="saved"):
            pretrain(tiny(), quiet=True)
    assert saved(Path(tiny().out or "")) == 3


def test_the_time_limit_stops_with_room_for_the_save(tiny: Make, monkeypatch: Patch) -> None:
    near, asked = Deadline.near, []

    def spied(limit: Deadline, step: float, save: float) -> bool:
        asked.append((step, save))
        return near(limit, step, save)

    monkeypatch.setattr(Deadline, "near", spied)
    with pytest.raises(Stopped, match=r"Stopped by the time limit after step [\d,]+ of 1,000,000, saved") as stopped:
        pretrain(tiny(steps=10**6, time_limit="5s", checkpoint_every=2), quiet=True)
    assert min(asked[-1]) > 0  # the slowest step and the last save are counted
    assert stopped.value.exit_code == 75
    assert f"after step {saved(Path(tiny().out or '')):,} of" in str(stopped.value)


def test_the_signal_of_slurm_requeues_the_job(tiny: Make, tmp_path: Path, monkeypatch: Patch) -> None:
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with monkeypatch.context() as patch:
        after(patch, 2, lambda _: signal.raise_signal(signal.SIGUSR1))
        with pytest.raises(Stopped, match="SLURM: job 4711 is requeued") as stopped:
            pretrain(tiny(), quiet=True)
    assert stopped.value.exit_code == 75
    assert (tmp_path / "called").read_text() == "requeue 4711\n"


# Workers


def test_a_killed_worker_is_named_and_the_run_continues_to_the_bit(
    tiny: Make, tmp_path: Path, monkeypatch: Patch
) -> None:
    whole = pretrain(tiny(out=str(tmp_path / "whole"), steps=24), quiet=True)

    def kill(_: Session) -> None:
        for worker in multiprocessing.active_children():
            worker.kill()

    with monkeypatch.context() as patch:
        after(patch, 3, kill)
        words = r"worker that reads images \(pid \d+\) was killed by SIGKILL.*fewer --workers.* saved.*--resume"
        with pytest.raises(Stopped, match=words) as stopped:
            pretrain(tiny(workers=1, steps=24), quiet=True)
    assert stopped.value.exit_code == 75
    run = pretrain(tiny(steps=24), quiet=True)
    assert same(weights(whole), weights(run))


class Late:
    """A stream whose later batches take a while, so that a worker is killed over one."""

    def __getitem__(self, step: int) -> int:
        if step:
            time.sleep(0.5)
        return step


def test_a_killed_worker_is_missed_long_before_the_patience_ends(monkeypatch: Patch) -> None:
    monkeypatch.setattr(barlow.readers, "LOOK_SECONDS", 0.2)
    stream: Any = Late()
    with closing(batches(stream, 0, 20, 2, patience=600.0)) as coming:
        assert [next(coming)[0] for _ in range(3)] == [0, 1, 2]  # a look that comes too early changes nothing
        multiprocessing.active_children()[0].kill()
        begun = time.monotonic()
        with pytest.raises(WorkerLost, match="was killed by SIGKILL"):
            list(coming)
    assert time.monotonic() - begun < 60
    barlow.run.kill_workers()


class Slow:
    """A stream whose second batch never comes."""

    def __getitem__(self, step: int) -> int:
        if step:
            time.sleep(1000)
        return step


HANGING = """
import barlow.run
from barlow.readers import WorkerLost, batches
from test_survive import Slow
if __name__ == "__main__":
    coming = batches(Slow(), 0, 2, 1, patience=20.0)
    assert next(coming)[0] == 0
    try:
        next(coming)
    except WorkerLost as lost:
        print(lost)
    barlow.run.kill_workers()
"""


@pytest.mark.long
def test_a_worker_that_hangs_is_given_up_and_says_where(tmp_path: Path) -> None:
    """In a program of its own: the server that workers come from keeps the standard error it was started with."""
    (tmp_path / "hanging.py").write_text(HANGING)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "hanging.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert "no batch in 20 s" in done.stdout
    assert "in __getitem__" in done.stderr


def test_workers_start_beside_busy_threads(tiny: Make) -> None:
    """The threads of OpenMP are at work when the workers are started."""
    torch.set_num_threads(2)
    torch.randn(512, 512) @ torch.randn(512, 512)
    run = pretrain(tiny(workers=1, steps=3), quiet=True)
    assert len(lines(run, "train")) == 3


def test_little_shared_memory_means_fewer_workers(tiny: Make, monkeypatch: Patch) -> None:
    monkeypatch.setattr(barlow.readers, "fit_shared_memory", lambda *_: (0, "reading with 0"))
    run = pretrain(tiny(workers=2), quiet=True)
    assert "reading with 0" in events(run)


# Numbers


def poisoned(patch: Patch, step: int) -> None:
    finish = Stream.finish

    def with_infinity(self: Stream, batch: Batch, *rest: Any) -> list[torch.Tensor]:
        views = finish(self, batch, *rest)
        if batch.step == step:
            views[1][5, 0, 0, 0] = float("inf")
        return views

    patch.setattr(Stream, "finish", with_infinity)


def test_a_step_that_is_not_finite_can_be_replayed(
    tiny: Make, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(tiny().out or "")
    with monkeypatch.context() as patch:
        poisoned(patch, 5)
        with pytest.raises(NumbersError, match=rf"At step 6 .* --lr .* barlow pretrain --replay {run} shows it again"):
            pretrain(tiny(checkpoint_every=2), quiet=True)
        assert saved(run) == 4
        before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
        with pytest.raises(
            NumbersError, match=r"Reproduced: the same at step 6: .* View 2 of (\d+) is not finite"
        ) as told:
            replay(run)
        assert before == {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    bundle = json.loads((run / "nonfinite" / "step-000000006.json").read_text())
    assert bundle.keys() == {"step", "seed", "reason", "terms", "images", "processes"}
    assert bundle["seed"] == 1
    assert len(bundle["images"]) == 32
    assert f"View 2 of {bundle['images'][5][0]} " in str(told.value)
    replay(run)  # without the poison
    told_again = (run / "config.toml").read_text()
    (run / "config.toml").write_text(told_again.replace("lambda = 0.02", "lambda = 0.5"))
    with pytest.raises(UserError, match=r"was made with \(lambda: 0\.02 → 0\.5\)"):
        replay(run)
    (run / "config.toml").write_text(told_again)
    assert "is finite this time" in capsys.readouterr().err
    pretrain(tiny(), quiet=True)  # the run itself goes on from its last sound checkpoint


def test_a_replay_names_the_layer_that_broke(tiny: Make, monkeypatch: Patch) -> None:
    """Kills: the name of what stands behind the broken layer, as timm's norms compute by themselves and hand on."""

    def overflowing(parts: Any, batch: Batch, steps: int) -> Any:
        if batch.step == 5:
            weight = dict(parts.network.named_parameters())["encoders.0.stages.1.blocks.0.norm2.weight"]
            torch.nn.init.constant_(weight, float("inf"))
        return one_step(parts, batch, steps)

    monkeypatch.setattr(barlow.train, "one_step", overflowing)
    monkeypatch.setattr(barlow.replay, "one_step", overflowing)
    with pytest.raises(NumbersError):
        pretrain(tiny(checkpoint_every=2), quiet=True)
    with pytest.raises(NumbersError, match=r"first layer that is not finite is encoders.0.stages.1.blocks.0.norm2 \("):
        replay(Path(tiny().out or ""))


def test_nothing_to_replay(tiny: Make) -> None:
    run = pretrain(tiny(), quiet=True)
    with pytest.raises(UserError, match="holds no step to replay"):
        replay(run)


def test_a_learning_rate_that_is_far_too_large_says_so(tiny: Make) -> None:
    with pytest.raises(NumbersError, match="learning rate that is too large: try --lr 33 "):
        pretrain(tiny(lr=100.0, steps=60), quiet=True)


def test_statistics_that_overflow_end_the_run_with_the_same_remedy(
    tiny: Make, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where they do not reach the loss before the last step, the look at the held-out images meets them first."""
    took = Session.took

    def overflow(session: Session, *rest: Any) -> None:
        took(session, *rest)
        if session.step == session.steps:
            buffers = dict(session.parts.network.named_buffers())
            next(v for name, v in buffers.items() if name.endswith("running_var")).fill_(float("nan"))

    monkeypatch.setattr(Session, "took", overflow)
    with pytest.raises(NumbersError, match=r"running_var is not finite at step 8.*not saved.*too large: try --lr 0.1 "):
        pretrain(tiny(lr=0.3))
    assert "step 8: the held-out images have features that are not finite" in capsys.readouterr().err


def test_an_output_that_is_constant_is_told_once_over_a_resume(tiny: Make, monkeypatch: Patch) -> None:
    """When such a rate first shows differs from processor to processor, so it is made to show."""
    told = barlow.train.told
    monkeypatch.setattr(barlow.train, "told", lambda terms: {**told(terms), "diagonal": 0.0})
    run = stopped_at(tiny(lr=0.3), 3)
    pretrain(tiny(lr=0.3), quiet=True)
    words = "every output of the projector has become constant: the learning rate is probably too large; try --lr 0.1 "
    assert events(run).count(words) == 1


def test_float16_counts_the_steps_it_skips_and_resumes_to_the_bit(
    tiny: Make, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Float16 with a scaler, on this processor: a gradient that overflows costs a step, not the run."""
    scalers = []

    def plugin(*_: str) -> MixedPrecision:
        scalers.append(torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3))
        return MixedPrecision("16-mixed", device="cpu", scaler=scalers[-1])

    monkeypatch.setattr(barlow.launch, "precision_plugin", plugin)
    whole = pretrain(tiny(out=str(tmp_path / "whole"), steps=60), quiet=True)
    trained = lines(whole, "train")
    assert 10 < trained[-1]["skipped"] < 50
    assert trained[0]["skipped"] == 1
    with monkeypatch.context() as patch:
        after(patch, 45, lambda _: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Stopped):
            pretrain(tiny(steps=60), quiet=True)
    run = pretrain(tiny(steps=60), quiet=True)
    assert lines(run, "train") == trained
    assert same(weights(run), weights(whole))
    monkeypatch.setattr(barlow.session, "SKIPPED", 5)
    with pytest.raises(NumbersError, match="float16 has skipped 5 steps in a row"):
        pretrain(tiny(out=str(tmp_path / "b"), steps=60), quiet=True)


def test_views_that_are_the_same_are_told_before_the_first_step(tiny: Make) -> None:
    run = pretrain(tiny(views=({}, {}), steps=1, held_out=32), quiet=True)
    assert "the two views of every image are the same" in events(run)


# Disk, memory, loggers


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_for_a_while_costs_a_warning(
    tiny: Make, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, calls = barlow.checkpoint.write_files, []

    def sometimes(*words: Any) -> None:
        calls.append(words[1])
        full() if len(calls) in (2, 3) else write(*words)

    monkeypatch.setattr(barlow.checkpoint, "write_files", sometimes)
    run = pretrain(tiny(checkpoint_every=2), quiet=True)
    assert calls == [2, 4, 6, 8]
    assert saved(run) == 8
    assert "could not save the checkpoint of step 4" in events(run)
    assert "the older checkpoints are untouched" in capsys.readouterr().err


def test_a_disk_that_stays_full_keeps_the_old_checkpoint_and_stops_resumably(tiny: Make, monkeypatch: Patch) -> None:
    write = barlow.checkpoint.write_files
    with monkeypatch.context() as patch:
        patch.setattr(barlow.checkpoint, "write_files", lambda *w: write(*w) if w[1] == 4 else full())
        with pytest.raises(Stopped, match=r"the last checkpoint could not be written\. Make room") as stopped:
            pretrain(tiny(checkpoint_every=4), quiet=True)
    assert stopped.value.exit_code == 75
    assert saved(Path(tiny().out or "")) == 4
    pretrain(tiny(), quiet=True)
    assert saved(Path(tiny().out or "")) == 8


def test_a_disk_too_full_for_a_line_is_no_checkpoint_and_is_said(
    tiny: Make, tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kills: "saved" where metrics.jsonl, which comes before the checkpoint, was refused; a traceback at the end."""
    whole = pretrain(tiny(out=str(tmp_path / "whole"), checkpoint_every=4), quiet=True)
    flush = Run._flush

    def no_room(run: Run) -> None:
        flush(run) if b'"step": 6' not in run._pending else full()

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_flush", no_room)
        with pytest.raises(Stopped, match=r"the last checkpoint could not be written\. Make room"):
            pretrain(tiny(checkpoint_every=4), quiet=True)
    words = capsys.readouterr().err
    assert "warning: could not write " in words
    assert "metrics.jsonl (No space left on device), so there is no new checkpoint" in words
    assert "the last lines of" in words
    assert saved(Path(tiny().out or "")) == 4
    run = pretrain(tiny(), quiet=True)
    assert lines(run, "train") == lines(whole, "train")
    assert same(weights(run), weights(whole))


def test_results_that_find_no_room_stop_resumably(tiny: Make, monkeypatch: Patch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(barlow.finish, "save_encoder", full)
        with pytest.raises(Stopped, match=r"does not take its results: No space left .* --resume"):
            pretrain(tiny(), quiet=True)
    assert (pretrain(tiny(), quiet=True) / "encoder" / "model.safetensors").exists()


def test_a_log_that_fails_never_stops_training(tiny: Make, tmp_path: Path, monkeypatch: Patch) -> None:
    """metrics.jsonl answers with errors for a while; standard error is closed for good."""
    opened = Path.open

    class Failing:
        def __init__(self, file: Any) -> None:
            self.file, self.calls = file, 0

        def write(self, data: bytes) -> int:
            self.calls += 1
            if 3 < self.calls < 9:
                raise OSError(errno.EIO, "Input/output error")
            return int(self.file.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    def open_(path: Path, *words: Any, **more: Any) -> Any:
        file = opened(path, *words, **more)
        return Failing(file) if path.name == "metrics.jsonl" and "ab" in words else file

    monkeypatch.setattr(Path, "open", open_)
    closed = (tmp_path / "log").open("w")
    closed.close()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", closed)
        run = pretrain(tiny())
    assert [line["step"] for line in lines(run, "train")] == list(range(1, 9))


NO_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000 bytes")


@pytest.mark.parametrize("error", [MemoryError(), NO_MEMORY])
def test_out_of_memory_in_one_sentence_with_the_way_out(tiny: Make, monkeypatch: Patch, error: Exception) -> None:
    def broke(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(barlow.train, "one_step", broke)
        with pytest.raises(
            UserError, match=r"out of memory on cpu: .* at the peak.*--micro-batch 16 --allow micro_batch"
        ):
            pretrain(tiny(), quiet=True)
    pretrain(tiny(micro_batch=16), allow=["micro_batch"], quiet=True)  # the advice, followed in the same folder
    monkeypatch.setattr(barlow.length, "one_step", broke)
    with pytest.raises(UserError, match=r"out of memory on cpu: .*--micro-batch 16"):
        pretrain(tiny(steps=None, minutes=1), dry_run=True)


# What is kept


def test_kept_are_the_last_two_the_best_and_every_nth(tiny: Make, monkeypatch: Patch) -> None:
    look = Session.look

    def best_at_three(session: Session, **words: Any) -> Any:
        shown = look(session, **words)
        session.measure = {3: 9.0}.get(session.step, 1.0 + session.step / 100)
        return shown

    monkeypatch.setattr(Session, "look", best_at_three)
    run = pretrain(tiny(steps=10, checkpoint_every=1, keep_every=5, health_every=1), quiet=True)
    kept = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert kept == [f"step-{step:09d}" for step in (3, 5, 9, 10)]
    assert (run / "checkpoints" / "best").read_text() == "step-000000003\n"


def test_the_best_is_remembered_over_a_resume(tiny: Make, monkeypatch: Patch) -> None:
    with monkeypatch.context() as patch:
        after(patch, 4, lambda session: setattr(session, "measure", 99.0))
        after(patch, 5, lambda _: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Stopped):
            pretrain(tiny(checkpoint_every=1), quiet=True)
    run = pretrain(tiny(checkpoint_every=1), quiet=True)
    assert (run / "checkpoints" / "step-000000004").exists()


def test_saving_takes_little_of_the_time(tiny: Make, monkeypatch: Patch) -> None:
    """Without --checkpoint-every, the ends of epochs are saved as long as saving takes less than 2 % of the time."""
    times = iter(np.arange(0, 1e6, 1.0).tolist())
    monkeypatch.setattr(barlow.session.time, "monotonic", lambda: next(times))
    made: list[Session] = []
    begin = Session.begin
    monkeypatch.setattr(Session, "begin", lambda self: (begin(self), made.append(self))[0])
    pretrain(tiny(steps=1), quiet=True)
    one = made[0]
    assert one.saver is not None
    one.step, one._saved_step, one.steps = 5, 4, 100  # 32 × 5 = two epochs of 80
    one.saver.seconds, one.saved = 1.0, next(times)
    assert not one.save_due()
    one.saver.seconds, one.saved = 0.001, next(times)
    assert one.save_due()
    one.step, one._saved_step = 6, 5
    assert not one.save_due()
    one.saved = next(times) - 601
    assert one.save_due()


# What a resume accepts


def stopped_at(config: Config, step: int) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        after(patch, step, lambda _: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Stopped):
            pretrain(config, quiet=True)
    return Path(config.out or "")


def test_other_settings_are_refused_with_the_difference_and_accepted_by_name(tiny: Make) -> None:
    run = stopped_at(tiny(), 3)
    words = r"\(lambda: 0.02 → 0.5; steps: 8 → 12\).*--allow lambda --allow steps"
    with pytest.raises(UserError, match=words):
        pretrain(tiny(lambda_=0.5, steps=12), quiet=True)
    with pytest.raises(UserError, match=r"\(steps: 8 → 12\).*--allow steps"):
        pretrain(tiny(lambda_=0.5, steps=12), allow=["lambda"], quiet=True)
    with pytest.raises(UserError, match="--allow lamda is not known; did you mean 'lambda'"):
        pretrain(tiny(lambda_=0.5), allow=["lamda"], quiet=True)
    pretrain(tiny(lambda_=0.5, steps=12), allow=["lambda", "steps"], quiet=True)
    assert (read_toml(run / "config.toml").lambda_, saved(run)) == (0.5, 12)
    assert "setting accepted: lambda: 0.02 → 0.5" in events(run)
    pretrain(Config(out=str(run)), resume=True, quiet=True)  # and stays
    with pytest.raises(UserError, match=r"lambda: 0\.5 → 0\.02"):
        pretrain(tiny(steps=12), quiet=True)


def test_a_config_that_was_edited_by_hand_is_refused_with_the_difference_and_accepted_by_name(tiny: Make) -> None:
    """Kills: a resume that takes what config.toml says by now, and so is another run from here on, without a word."""
    run = stopped_at(tiny(), 3)
    file = run / "config.toml"
    began = file.read_text()
    edited = began.replace("lambda = 0.02", "lambda = 0.5").replace("steps = 8", "steps = 12\ncheckpoint_every = 1")
    file.write_text(edited)
    with pytest.raises(UserError, match=r"step-000000003 was made with \(lambda: 0.02 → 0.5; steps: 8 → 12\)\. Put"):
        pretrain(Config(out=str(run)), resume=True, quiet=True)
    assert file.read_text() == edited
    for lacking in ("weight_decay", "lr", "seed", "projector"):
        file.write_text(re.sub(f"{lacking} = .*\n", "", began))
        with pytest.raises(UserError, match=f"config.toml of this run lacks {lacking}: put back"):
            pretrain(Config(out=str(run)), resume=True, allow=["lr"], quiet=True)
    for wrong, words in (("mean = [0.1, 0.2]", "mean has 2 values for 1 channels"), ("batch_size = 90", "larger than")):
        name = wrong.split()[0]
        file.write_text(re.sub(f"{name} = .*\n", f"{wrong}\n", began))
        with pytest.raises(UserError, match=words):
            pretrain(Config(out=str(run)), resume=True, allow=[name], quiet=True)
    file.write_text(began.replace("seed = 1", "seed = 2"))
    with pytest.raises(UserError, match=r"seed: 1 → 2.*as they were: seed, held_out and optimizer stay"):
        pretrain(Config(out=str(run)), resume=True, quiet=True)
    file.write_text(edited)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt  # before the first step, so that no later checkpoint is made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(barlow.run, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(Config(out=str(run)), resume=True, allow=["lambda", "steps"], quiet=True)
    assert "setting accepted: lambda: 0.02 → 0.5" in events(run)
    assert saved(pretrain(Config(out=str(run)), resume=True, quiet=True)) == 12  # accepted once and for all


@pytest.mark.parametrize("changes", [{"lr": 0.05}, {"weight_decay": 5.0}, {"lambda_": 0.5}, {"warmup": 0.9}])
def test_what_is_accepted_reaches_the_training(tiny: Make, changes: dict[str, Any]) -> None:
    """Kills: a rate, or decay, from the checkpoint in place of the one that was accepted, written down and logged."""
    plain = weights(pretrain(tiny(out=str(stopped_at(tiny(), 3))), quiet=True))
    run = stopped_at(tiny(out=(tiny().out or "") + "2"), 3)
    pretrain(tiny(out=str(run), **changes), allow=[name.rstrip("_") for name in changes], quiet=True)
    assert not same(plain, weights(run))


def test_what_says_which_images_are_never_trained_on_stays(tiny: Make) -> None:
    """Kills: another seed half way, whose held-out images have been trained on, under pictures of the first ones."""
    run = stopped_at(tiny(), 3)
    for changes in ({"seed": 2}, {"held_out": 20}, {"optimizer": "lars"}):
        (name,) = changes
        with pytest.raises(UserError, match=rf"{name}: .*give another --out: seed, held_out and optimizer stay"):
            pretrain(tiny(**changes), quiet=True)
        with pytest.raises(UserError, match=f"--allow {name} cannot be: seed, held_out and optimizer stay"):
            pretrain(tiny(**changes), allow=[name], quiet=True)
    with pytest.raises(UserError, match="allow takes several names"):
        pretrain(tiny(), allow=[1], quiet=True)  # type: ignore[list-item]
    assert saved(run) == 3


def test_the_pictures_of_the_held_out_images_are_those_of_accepted_settings(tiny: Make) -> None:
    run = stopped_at(tiny(), 3)
    file = run / "snapshots" / "held_out.npz"
    before = np.load(file)
    pretrain(tiny(image_size=40), allow=["image_size"], quiet=True)
    after = np.load(file)
    assert before["keys"].tolist() == after["keys"].tolist()
    assert any(before[name].shape != after[name].shape for name in before.files)


def test_a_complete_run_says_so(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(tiny(), quiet=True)
    pretrain(tiny())
    assert "note: all 8 steps are done already; for a longer run: --steps N --allow steps" in capsys.readouterr().err


@contextmanager
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        assert torch.get_default_dtype() == torch.float64
        torch.set_default_dtype(torch.float32)


AROUND: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": float64_by_default,
    "another device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("around", AROUND)
def test_whatever_the_program_around_a_run_is_doing(tiny: Make, tmp_path: Path, around: str, precision: str) -> None:
    """Kills: a run in the caller's precision, type or device, which config.toml does not say; weights of the first step
    used in all, as an autocast around the run keeps what it has cast; and a caller's random numbers that begin anew
    with every run."""
    plain = pretrain(tiny(out=str(tmp_path / "plain"), precision=precision), quiet=True)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with AROUND[around]():
        run = pretrain(tiny(precision=precision), quiet=True)
    assert same(weights(run), weights(plain))
    assert torch.equal(torch.rand(3), expected)


def test_a_length_that_is_refused_is_not_written(tiny: Make) -> None:
    """Kills: the number of steps of --allow epochs in config.toml, although another change beside it was refused."""
    run = stopped_at(tiny(), 3)
    began = (run / "config.toml").read_text()
    with pytest.raises(UserError, match="The network is not that of"):
        pretrain(tiny(steps=None, epochs=4, projector=(48, 32)), allow=["epochs", "projector"], quiet=True)
    assert (run / "config.toml").read_text() == began


def test_another_length_is_worked_out_anew(tiny: Make) -> None:
    run = stopped_at(tiny(), 3)
    pretrain(tiny(steps=None, epochs=4), allow=["epochs"], quiet=True)
    config = read_toml(run / "config.toml")
    assert (config.epochs, config.steps) == (4, 10)


def test_another_network_is_refused_and_accepted_by_name(tiny: Make) -> None:
    run = stopped_at(tiny(), 3)
    wider = tiny(projector=(48, 32))
    with pytest.raises(UserError, match=r"The network is not that of .*\[32, 16\] → \[48, 16\].*--allow network"):
        pretrain(wider, allow=["projector"], quiet=True)
    assert read_toml(run / "config.toml").projector == (32, 32)  # a refusal changes nothing
    pretrain(wider, allow=["projector", "network"], quiet=True)
    assert saved(run) == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"projector": (48, 32)}, "The network is not that of"),
     ({"batch_size": 90}, "batch_size = 90 is larger than the 80 images to train on"),
     ({"steps": 2}, "is at step 3 already, past the 2 that are asked for: give a greater length")],
)  # fmt: skip
def test_what_is_accepted_must_work_and_else_changes_nothing(tiny: Make, changes: dict[str, Any], words: str) -> None:
    """Kills: a batch larger than the data, a run that is "done" before its end; and a folder whose own command is
    refused after that."""
    run = stopped_at(tiny(), 3)
    with pytest.raises(UserError, match=words):
        pretrain(tiny(**changes), allow=list(changes), quiet=True)
    assert saved(pretrain(tiny(), quiet=True)) == 8
    assert saved(run) == 8


def test_images_that_are_gone_or_changed_are_refused_and_accepted_by_name(
    tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pictures(tmp_path / "in")
    config = tiny(images=str(folder), max_bad=0.5, cache=False)
    run = stopped_at(config, 3)
    (folder / "007.png").unlink()
    Image.fromarray(blobs(1, 8)[0]).save(folder / "008.png")
    (folder / "009.png").touch()
    with pytest.raises(UserError, match=r"\(1 gone: 007.png; 1 changed: 008.png\).*--allow index"):
        pretrain(config, quiet=True)
    pretrain(config, allow=["index"], quiet=True)
    assert "1 files were written anew, with the same length: 009.png" in capsys.readouterr().err
    quarantined = [json.loads(line)["path"] for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert set(quarantined) <= {"007.png", "008.png"}


@pytest.mark.parametrize("damage", [None, b"", b"PAR1"])
def test_an_index_that_is_gone_or_damaged_is_refused_and_made_anew_by_name(
    tiny: Make, tmp_path: Path, damage: bytes | None
) -> None:
    """Kills: a run that goes on, without a word, with the images that are there now and others held out; advice to
    delete a damaged index, which led there; a new index that the next resume does not know of."""
    folder = pictures(tmp_path / "in")
    config = tiny(images=str(folder), cache=False)
    run = stopped_at(config, 3)
    for i, picture in enumerate(blobs(4, seed=5)):
        Image.fromarray(picture).save(folder / f"a{i}.png")
    index = run / "index.parquet"
    index.unlink() if damage is None else index.write_bytes(damage)
    words = (
        "index.parquet, the list of .* is gone: bring it" if damage is None else "is not an index of images .*bring it"
    )
    for again in ({"config": config}, {"config": Config(out=str(run)), "resume": True}):
        with pytest.raises(UserError, match=rf"{words} back, or let --allow index make a new one") as told:
            pretrain(**again, quiet=True)  # type: ignore[arg-type]
        assert "delete" not in str(told.value)
    if damage is None:
        with pytest.raises(UserError, match="is gone: bring it back"):
            barlow.run.open_run_images(read_toml(run / "config.toml"), None, run)  # as a replay does
    with pytest.MonkeyPatch.context() as patch:  # what cannot train changes nothing
        patch.setattr(barlow.resume, "open_images", lambda *_, **__: open_images(blobs(17)))
        with pytest.raises(UserError, match="held-out"):
            pretrain(config, allow=["index"], quiet=True)
    assert (index.read_bytes() if index.exists() else None) == damage
    with pytest.MonkeyPatch.context() as patch:
        after(patch, 5, lambda _: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Stopped):
            pretrain(config, allow=["index"], quiet=True)
    assert "index.parquet was gone or damaged: a new one lists the 100 images there now" in events(run)
    with np.load(run / "snapshots" / "held_out.npz") as shown:
        assert sorted(shown["keys"]) == sorted(_names(folder)[i] for i in split(1, 100, 16)[1])
    (folder / "a0.png").unlink()
    with pytest.raises(UserError, match=r"1 gone: a0\.png"):
        pretrain(config, quiet=True)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_index_of_images_from_python_that_is_gone(tiny: Make) -> None:
    config, images = tiny(images=None), blobs(96)
    with pytest.MonkeyPatch.context() as patch:
        after(patch, 3, lambda _: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Stopped):
            pretrain(config, images=images, quiet=True)
    index = Path(config.out or "") / "index.parquet"
    began = index.read_bytes()
    index.unlink()
    with pytest.raises(UserError, match="is gone: bring it back, or let --allow index"):
        pretrain(config, images=images, quiet=True)
    pretrain(config, images=images, allow=["index"], quiet=True)
    assert index.read_bytes() == began


# What is damaged in the run folder


def test_a_fault_of_the_disk_over_the_newest_checkpoint_makes_no_hole(
    tiny: Make, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Kills: one fault in reading the newest checkpoint, for which the run goes on from an older one and rewinds the
    lines; killed then, the next resume finds the newest one, and a hole in the lines before it."""
    whole = pretrain(tiny(out=str(tmp_path / "whole"), checkpoint_every=2), quiet=True)
    run = stopped_at(tiny(checkpoint_every=2), 5)
    before = (run / "metrics.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(barlow.checkpoint, "WAITS", (0.0,))
        patch.setattr(barlow.checkpoint, "read_manifest", stale)
        with pytest.raises(Stopped, match=r"step-000000005 cannot be read now \(Stale file handle\): give the same"):
            pretrain(tiny(), quiet=True)
    assert (run / "metrics.jsonl").read_bytes() == before
    pretrain(tiny(), quiet=True)
    assert lines(run, "train") == lines(whole, "train")
    assert same(weights(run), weights(whole))


def stale(*_: object) -> None:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def test_a_checkpoint_that_cannot_be_read_back_costs_a_warning(
    tiny: Make, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kills: a run that is complete and saved, and ends with 75 as its last checkpoint could not be read back."""
    monkeypatch.setattr(barlow.checkpoint, "WAITS", ())
    monkeypatch.setattr(barlow.checkpoint, "read_manifest", stale)
    run = pretrain(tiny(checkpoint_every=4), quiet=True)
    assert (run / "encoder" / "model.safetensors").exists()
    assert "step 8 cannot be read back now ([Errno 116] Stale file handle), so no older" in capsys.readouterr().err


def test_a_damaged_checkpoint_that_was_passed_over_is_never_the_newest_again(
    tiny: Make, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Kills: the same hole, where the bytes come back (a disk that was mounted anew, a copy put back by hand)."""
    whole = pretrain(tiny(out=str(tmp_path / "whole"), checkpoint_every=2), quiet=True)
    run = stopped_at(tiny(checkpoint_every=2), 5)
    (run / "checkpoints" / "step-000000005" / "manifest.json").rename(tmp_path / "kept")
    with monkeypatch.context() as patch:
        patch.setattr(barlow.run, "train", lambda *_, **__: full())  # killed before the first save
        with pytest.raises(OSError, match="No space"):
            pretrain(tiny(), quiet=True)
    assert saved(run) == 4
    assert barlow.checkpoint.candidates(run / "checkpoints")[0].name == "step-000000004"
    (aside,) = (run / "checkpoints").glob(".deleting-step-000000005-*")
    (tmp_path / "kept").rename(aside / "manifest.json")
    pretrain(tiny(checkpoint_every=2), quiet=True)
    assert lines(run, "train") == lines(whole, "train")
    assert same(weights(run), weights(whole))


def test_checkpoints_of_which_none_is_whole_are_refused(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """Kills: a run that begins again at step 0, and deletes its lines, after "trying the checkpoint before it"."""
    run = stopped_at(tiny(checkpoint_every=2), 3)
    before = (run / "metrics.jsonl").read_bytes()
    for path in barlow.checkpoint.candidates(run / "checkpoints"):
        (path / "manifest.json").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds no checkpoint that is whole.* give another --out to begin again"):
        pretrain(tiny(), quiet=True)
    assert (run / "metrics.jsonl").read_bytes() == before
    assert capsys.readouterr().err.count("trying the checkpoint before it") == 1  # there are two


LOST = {
    "emptied": (lambda told: b"", "of training those of steps 1 to 3"),
    "gone": (None, "of training those of steps 1 to 3"),
    "end": (
        lambda told: b"".join(line for line in told if b'"train", "step": 3' not in line),
        "of training those of steps 3 to 3",
    ),
    "middle": (
        lambda told: b"".join(line[:-9] + b"\n" if b'"train", "step": 2' in line else line for line in told),
        "1 damaged",
    ),
    "all": (lambda told: b'{"a": 1}\n' * 9, "of training those of steps 1 to 3"),
    "foreign": (lambda told: b'{"a": 1}\n' * 2 + b"".join(told[:-5]), "2 damaged; of training those of steps 1 to 3"),
}


@pytest.mark.parametrize("how", LOST)
def test_lines_that_metrics_lost_are_missed(tiny: Make, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Kills: a report of half a run, without a word; a traceback over a line that is none of ours."""
    run = stopped_at(tiny(), 3)
    damage, words = LOST[how]
    file = run / "metrics.jsonl"
    told = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(damage(told)) if damage else file.unlink()
    pretrain(tiny(), quiet=True)
    sentence = f"metrics.jsonl lacks lines ({words}): the report will lack them too"
    assert sentence in events(run)
    assert f"warning: {sentence}" in capsys.readouterr().err
    pretrain(tiny(steps=9), allow=["steps"], quiet=True)
    assert events(run).count("lacks lines") == 1  # told once


def test_nothing_is_missed_where_nothing_is_lost(tiny: Make, monkeypatch: Patch) -> None:
    """Kills: false alarms: at step 0, with a line every so many steps only, and where a new length changed how many."""

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def on(config: Config, to: int) -> None:
        with monkeypatch.context() as patch:
            after(patch, to, lambda _: signal.raise_signal(signal.SIGTERM))
            with pytest.raises(Stopped):
                pretrain(config, allow=["steps"], quiet=True)

    with monkeypatch.context() as patch:
        patch.setattr(barlow.run, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(tiny(), quiet=True)
    pretrain(tiny(), quiet=True)
    long = tiny(steps=40, out=(tiny().out or "") + "2")
    monkeypatch.setattr(barlow.session, "LINES", 10)  # one in four steps
    monkeypatch.setattr(barlow.run, "LINES", 10)
    on(long, 3)
    with monkeypatch.context() as patch:  # another length, and killed before its first line
        patch.setattr(barlow.run, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(long.replace(steps=10), allow=["steps"], quiet=True)
    for steps, to in ((10, 5), (30, 8), (20, 11), (60, 16), (17, 17)):
        on(long.replace(steps=steps), to) if to < steps else pretrain(
            long.replace(steps=17), allow=["steps"], quiet=True
        )
    assert "lacks lines" not in events(Path(tiny().out or "")) + events(Path(long.out or ""))


def test_a_config_that_was_cut_off_says_where_its_text_is(tiny: Make) -> None:
    """Kills: "other settings" as the word for half a config.toml, and the same command again as the remedy."""
    run = stopped_at(tiny(), 3)
    file, where = run / "config.toml", 'checkpoints/step-…/state.json under "settings"'
    began = file.read_text()
    for cut, words in ((began[: began.index("projector")], "lacks projector, "), ("", "lacks projector, "),
                       (began[: began.index("projector") + 14], "is not TOML")):  # fmt: skip
        file.write_text(cut)
        for again in ({"config": tiny()}, {"config": Config(out=str(run)), "resume": True}):
            with pytest.raises(UserError, match=f"{words}.*{where}"):
                pretrain(**again, quiet=True)  # type: ignore[arg-type]
    file.unlink()
    for again in ({"config": tiny()}, {"config": Config(out=str(run)), "resume": True}):
        with pytest.raises(UserError, match=f"config.toml is gone: bring it back .*{where}"):
            pretrain(**again, quiet=True)  # type: ignore[arg-type]
    file.write_text(json.loads((run / "checkpoints" / "step-000000003" / "state.json").read_text())["settings"])
    assert file.read_text() == began


def test_resume_and_another_out_are_refused(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """Kills: --resume A --out B, which went on in A and left B out without a word."""
    run = stopped_at(tiny(), 3)
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", "--resume", str(run), "--out", f"{run}2"])
    assert ended.value.code == 2
    assert f"--resume {run} continues the run there, and --out {run}2 is another folder" in capsys.readouterr().err
    assert saved(run) == 3
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", "--resume", str(run), "--out", f"{run}/../run"])
    assert ended.value.code == 0
    assert saved(run) == 8


def test_files_that_come_later_do_not_change_a_run(tiny: Make, tmp_path: Path) -> None:
    whole = pretrain(tiny(images=str(pictures(tmp_path / "in")), out=str(tmp_path / "whole"), cache=False), quiet=True)
    run = stopped_at(tiny(images=str(tmp_path / "in"), cache=False), 3)
    for i, picture in enumerate(blobs(20, seed=5)):
        Image.fromarray(picture).save(tmp_path / "in" / f"0{i:02d}b.png")
    pretrain(tiny(images=str(tmp_path / "in"), cache=False), quiet=True)
    assert same(weights(whole), weights(run))


# Images


def test_a_source_that_vanishes_stops_resumably(tiny: Make, tmp_path: Path, monkeypatch: Patch) -> None:
    whole = pretrain(tiny(images=str(pictures(tmp_path / "in")), out=str(tmp_path / "whole"), cache=False), quiet=True)
    config = tiny(images=str(tmp_path / "in"), cache=False)
    with monkeypatch.context() as patch:
        after(patch, 3, lambda _: (tmp_path / "in").rename(tmp_path / "away"))
        with pytest.raises(Stopped, match=r"in is gone: .* after step 3, saved") as stopped:
            pretrain(config, quiet=True)
    assert stopped.value.exit_code == 75
    (tmp_path / "away").rename(tmp_path / "in")
    assert same(weights(whole), weights(pretrain(config, quiet=True)))


def broken(folder: Path, share: float) -> None:
    """Leaves the headers whole and cuts the pixels off."""
    files = sorted(folder.glob("*.png"))
    for file in files[:: round(1 / share)]:
        file.write_bytes(file.read_bytes()[:60])


def test_too_many_broken_images_end_the_run_with_their_names(tiny: Make, tmp_path: Path) -> None:
    broken(pictures(tmp_path / "in", 200), 1 / 3)
    config = tiny(images=str(tmp_path / "in"), cache=False)
    with pytest.raises(DataError, match=r"more than max_bad = 0.05 .*The first: (\d+\.png, ){9}\d+\.png") as error:
        pretrain(config, quiet=True)
    assert error.value.exit_code == 3
    assert len((Path(config.out or "") / "quarantine.jsonl").read_text().splitlines()) >= 10


def test_a_run_with_broken_images_resumes_to_the_bit_and_counts_each_once(tiny: Make, tmp_path: Path) -> None:
    broken(pictures(tmp_path / "in"), 1 / 12)
    config = tiny(images=str(tmp_path / "in"), max_bad=0.5, cache=False)
    whole = pretrain(config.replace(out=str(tmp_path / "whole")), quiet=True)
    run = stopped_at(config, 3)
    pretrain(config.replace(workers=1), quiet=True)
    assert same(weights(whole), weights(run))
    rows = [json.loads(line)["path"] for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(rows) == sorted(set(rows))
    assert set(rows) <= {f"{i:03d}.png" for i in range(0, 96, 12)}
    assert len(rows) > 3


def test_two_runs_in_one_folder(tiny: Make) -> None:
    def second(_: Session) -> None:
        with pytest.raises(UserError, match=rf"is in use by pid {os.getpid()} on .*choose another --out"):
            pretrain(tiny(), quiet=True)

    with pytest.MonkeyPatch.context() as patch:
        after(patch, 2, second)
        pretrain(tiny(), quiet=True)


def test_broken_held_out_images_are_left_out_and_counted(
    tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kills: another image measured, and shown, under the name of a broken held-out one; broken ones that nobody
    counts, or that stop a run because none have been seen; a card that counts all files; a report of two sets."""
    folder = pictures(tmp_path / "in")
    config = tiny(images=str(folder), max_bad=0.16, cache=False)
    _, kept = split(1, 96, 16)
    names = [f"{i:03d}.png" for i in kept]
    for name in names[:13]:
        (folder / name).write_bytes((folder / name).read_bytes()[:60])
    run = stopped_at(config, 3)
    (folder / names[15]).unlink()
    pretrain(config.replace(max_bad=0.2), allow=["index", "max_bad"])
    told = capsys.readouterr().err
    rows = read_quarantine(run / "quarantine.jsonl")
    assert sorted(row["path"] for row in rows) == sorted([*names[:13], names[15]])
    assert f"left out          14 unusable images, each with its reason in {run / 'quarantine.jsonl'}" in told
    with np.load(run / "snapshots" / "held_out.npz") as shown, np.load(run / "snapshots" / "step-0000008.npz") as last:
        assert shown["keys"].tolist() == names[13:15]
        assert len(shown["images"]) == len(last["features"]) == 2
    assert {line["n"] for line in lines(run, "health")} == {3, 2}
    assert "on 80 images of `in`" in (run / "encoder" / "README.md").read_text()
    (folder / names[14]).unlink()
    with pytest.raises(DataError, match=f"of 16 held-out images fewer than two can be used; the first, {names[0]}: "):
        pretrain(config, allow=["index", "max_bad", "steps"], quiet=True)


def test_held_out_images_count_as_seen(tiny: Make, tmp_path: Path) -> None:
    """Kills: a run with 6 % of broken held-out images that stops at once, as they stand against none seen."""
    folder = pictures(tmp_path / "in", 300)
    for i in split(1, 300, 200)[1][:12]:
        (folder / f"{i:03d}.png").write_bytes((folder / f"{i:03d}.png").read_bytes()[:60])
    run = pretrain(tiny(images=str(folder), max_bad=0.08, held_out=200, steps=1, cache=False), quiet=True)
    assert len(read_quarantine(run / "quarantine.jsonl")) == 12
