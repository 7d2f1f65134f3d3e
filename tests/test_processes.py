"""Whole runs on several real processes over gloo: the same curve on any number of them, and one ending for all."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_ARGS, blobs
from lightning_fabric import Fabric
from PIL import Image
from test_run import lines, same, weights

from barlow import Config, pretrain, ranks
from barlow.batches import Batch, Stream
from barlow.checkpoint import latest, load
from barlow.errors import DataError, NumbersError, Stopped, UserError
from barlow.launch import end_others, launch, requeue, share, surroundings
from barlow.session import Session


def settings(folder: Path, **changes: Any) -> Config:
    """A rate and views with which rounding does not grow: at 0.001 AdamW turns differences in the seventh digit into
    2 % in 30 steps, and of views that are nearly one gray little but rounding is left."""
    mild = dict(crop=(0.5, 1.0), flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4)  # noqa: C408 - reads like the View
    fields = dict(  # noqa: C408 - reads like the Config it becomes
        images=str(folder / "images.npy"), out=str(folder / "run"), encoder="resnetv2_18", encoder_args=TINY_ARGS,
        image_size=32, projector=(32, 32), lambda_=0.02, batch_size=32, steps=8, held_out=16, precision="float32",
        optimizer="adamw", lr=2e-4, workers=0, seed=1, timeout="60s", checkpoint_every=1000, views=(mild, mild),
    )  # fmt: skip
    return Config(**{**fields, **changes})


def child(rank: int, world: int, port: int, folder: Path, config: Config, mischief: Any) -> None:
    """One process as torchrun would start it; leaves its ending in a file."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"}  # fmt: skip
    if mischief:
        mischief(rank)
    ending: list[Any] = [0, ""]
    try:
        pretrain(config, quiet=True)
    except SystemExit as quietly:
        ending = [quietly.code, ""]
    except (UserError, DataError, NumbersError, Stopped) as error:
        ending = [error.exit_code, str(error)]
    (folder / f"ending-{rank}.json").write_text(json.dumps(ending))
    os._exit(0)


def run(world: int, folder: Path, config: Config, mischief: Callable[[int], None] | None = None) -> list[list[Any]]:
    """(exit code, sentence) of every process; of one that died, nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["barlow.run", "timm.layers", "torch.nn.parallel", "pytest", "PIL.PngImagePlugin"])
    started = [
        context.Process(target=child, args=(rank, world, port, folder, config, mischief)) for rank in range(world)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(240)
        if process.is_alive():
            process.kill()
            process.join()
    endings = []
    for rank in range(world):
        file = folder / f"ending-{rank}.json"
        endings.append(json.loads(file.read_text()) if file.exists() else [])
        file.unlink(missing_ok=True)
    return endings


def after(step: int, what: Callable[[Session], object]) -> None:
    took = Session.took

    def also(session: Session, *rest: Any) -> None:
        took(session, *rest)
        if session.step == step:
            what(session)

    Session.took = also  # type: ignore[method-assign]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "images.npy", blobs(96))
    return tmp_path


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 1e-3), ("muon", 2e-3)])
@pytest.mark.parametrize("worlds", [(1, 2), pytest.param((1, 4), marks=pytest.mark.long)])
def test_one_two_and_four_processes_have_the_same_curve(
    folder: Path, worlds: tuple[int, ...], optimizer: str, lr: float
) -> None:
    """A network without ReLU and maximum: where an input of one is zero, or two of the other are equal, up to rounding,
    the curves of equal gradients jump apart (docs/log.md, "Batch normalisation that rounds less")."""
    curves = []
    smooth: dict[str, Any] = {"encoder": "test_efficientnet", "encoder_args": {}, "projector": (32,)}
    for world in worlds:
        config = settings(folder, out=str(folder / f"{world}"), steps=30, optimizer=optimizer, lr=lr, **smooth)
        assert run(world, folder, config) == [[0, ""]] * world
        curves.append([line["loss"] for line in lines(Path(config.out or ""), "train")])
    assert len(curves[0]) == 30
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)


def stop_the_second_at_ten(rank: int) -> None:
    if rank == 1:
        after(10, lambda _: signal.raise_signal(signal.SIGTERM))


def test_a_signal_to_one_process_stops_all_at_one_step_and_one_process_continues(folder: Path) -> None:
    config = settings(folder, steps=20, lr=1e-4)  # twice that makes of rounding 3e-5 at one step
    endings = run(2, folder, config, stop_the_second_at_ten)
    stopped = Path(config.out or "")
    assert [code for code, _ in endings] == [143, 143]
    assert "Stopped by signal SIGTERM after step 10 of 20, saved" in endings[0][1]
    newest = latest(stopped / "checkpoints")
    assert newest is not None
    assert load(newest).step == 10
    assert run(1, folder, config) == [[0, ""]]
    run(1, folder, settings(folder, steps=20, lr=1e-4, out=str(folder / "whole")))
    theirs = [[line["loss"] for line in lines(folder / name, "train")] for name in ("run", "whole")]
    np.testing.assert_allclose(*theirs, rtol=1e-5)


def die_at_five(rank: int) -> None:
    if rank == 1:
        after(5, lambda _: os._exit(1))


def test_a_process_that_dies_is_named_and_the_others_end(folder: Path) -> None:
    first, second = run(2, folder, settings(folder), die_at_five)
    assert second == []
    assert first[0] == 75
    assert "process 1 of 2 (pid " in first[1]
    assert "is gone or cannot be reached" in first[1]
    assert first[1].endswith(f"Bring it back and continue with: barlow pretrain --resume {folder / 'run'}")


def test_micro_batches_of_a_batch_that_two_processes_do_not_divide(folder: Path) -> None:
    config = settings(folder, batch_size=33, micro_batch=16, steps=2)
    assert run(2, folder, config) == [[0, ""], [0, ""]]
    endings = run(2, folder, config.replace(micro_batch=1, out=str(folder / "one")))
    assert [code for code, _ in endings] == [2, 2]
    assert "more micro-batches than some processes have images (16)" in endings[0][1]


def spoil_the_statistics_at_three(rank: int) -> None:
    def spoil(session: Session) -> None:
        buffers = dict(session.parts.network.named_buffers())
        next(v for name, v in buffers.items() if name.endswith("running_var")).fill_(float("nan"))

    after(3, spoil)


def test_a_save_that_is_refused_ends_all_at_once(folder: Path) -> None:
    """Only the first process saves. Kills: the others wait for it in the next step, until their patience ends."""
    first, second = run(2, folder, settings(folder, checkpoint_every=4), spoil_the_statistics_at_three)
    assert first[0] == 4
    assert "running_var is not finite at step 4: not saved" in first[1]
    assert second == [4, ""]


def kill_the_second_at_five(rank: int) -> None:
    if rank == 1:
        after(5, lambda _: signal.raise_signal(signal.SIGKILL))


def kill_the_first_at_nine(rank: int) -> None:
    if rank == 0:
        after(9, lambda _: signal.raise_signal(signal.SIGKILL))


@pytest.mark.long
def test_whichever_process_is_killed_the_same_command_ends_with_the_same_weights(folder: Path) -> None:
    config = settings(folder, steps=12, checkpoint_every=2)
    assert run(2, folder, config.replace(out=str(folder / "whole"))) == [[0, ""], [0, ""]]
    first, second = run(2, folder, config, kill_the_second_at_five)
    assert second == []
    assert first[0] == 75
    assert "process 1 of 2 (pid " in first[1]
    first, second = run(2, folder, config, kill_the_first_at_nine)
    assert first == []
    assert second[0] == 75
    assert "process 0 of 2 (pid " in second[1]
    newest = latest(folder / "run" / "checkpoints")
    assert newest is not None
    assert load(newest).step in (6, 8)
    assert run(2, folder, config) == [[0, ""], [0, ""]]
    assert same(weights(folder / "run"), weights(folder / "whole"))
    assert lines(folder / "run", "train") == lines(folder / "whole", "train")


def unreadable_for_the_second(rank: int) -> None:
    """Rank 1 meets images that nothing can stand in for; rank 0 would wait for it in the next message."""
    make = Stream.__getitem__

    def getitem(self: Stream, step: int) -> Batch:
        if rank == 1 and step == 3:
            raise DataError("a.png cannot be read, nor can 100 others")
        return make(self, step)

    Stream.__getitem__ = getitem  # type: ignore[method-assign]


def test_an_error_of_one_process_ends_all_with_its_words(folder: Path) -> None:
    endings = run(2, folder, settings(folder), unreadable_for_the_second)
    assert endings == [[3, ""], [3, "a.png cannot be read, nor can 100 others"]]


def test_uneven_data_never_hangs_and_all_bad_images_are_counted(tmp_path: Path) -> None:
    """101 images, batches of 9 on two processes; some of the files are cut off."""
    (tmp_path / "in").mkdir()
    for i, picture in enumerate(blobs(101)):
        Image.fromarray(picture).save(tmp_path / "in" / f"{i:03d}.png")
    for i in range(0, 101, 10):
        file = tmp_path / "in" / f"{i:03d}.png"
        file.write_bytes(file.read_bytes()[:60])
    config = settings(
        tmp_path, images=str(tmp_path / "in"), batch_size=9, held_out=10, steps=13, max_bad=0.5, cache=False
    )
    assert run(2, tmp_path, config) == [[0, ""], [0, ""]]
    bad = [json.loads(line)["path"] for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert len(bad) == len(set(bad))
    assert set(bad) <= {f"{i:03d}.png" for i in range(0, 101, 10)}
    assert len(bad) >= 8  # 13 × 9 images are more than an epoch of 91; a few may be held out
    too_many = run(2, tmp_path, config.replace(out=str(tmp_path / "strict"), max_bad=0.05, steps=40))
    assert too_many[0][0] == too_many[1][0] == 3
    assert "max_bad = 0.05" in too_many[0][1]


def test_a_mistake_in_the_settings_ends_all(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "thesis.tex").touch()
    endings = run(2, folder, settings(folder))
    assert [code for code, _ in endings] == [2, 2]
    assert "thesis.tex" in endings[0][1]


def test_processes_that_do_not_find_each_other_are_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> None:
        raise torch.distributed.DistNetworkError("Broken pipe. Exception raised from sendBytes")

    monkeypatch.setattr(Fabric, "launch", broken)
    with pytest.raises(
        Stopped, match=r"did not find each other \(Broken pipe\): give the same command again"
    ) as stopped:
        launch(settings(folder, devices=1), ExitStack())
    assert stopped.value.exit_code == 75


# Who started us


@pytest.mark.parametrize(
    ("variables", "kind", "local", "nodes"),
    [
        ({}, "LightningEnvironment", 3, 1),
        ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}, "TorchElasticEnvironment", 4, 2),
        ({"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "3", "SLURM_NTASKS": "6"}, "SLURMEnvironment", 2, 3),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "6", "SLURM_PROCID": "0"}, "LightningEnvironment", 3, 1),
    ],
)
def test_who_started_this_process(
    variables: dict[str, str], kind: str, local: int, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "")
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    environment, processes, machines = surroundings(variables, 3)
    assert (type(environment).__name__, processes, machines) == (kind, local, nodes)


SRUN = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4"}


@pytest.mark.parametrize(
    ("variables", "cores", "processes", "each"),
    [
        ({}, 16, 3, 5),
        ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}, 16, 4, 4),
        ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}, 2, 4, 1),
        (SRUN | {"SLURM_CPUS_PER_TASK": "8"}, 8, 4, 8),  # bound to its own cores
        (SRUN | {"SLURM_CPUS_PER_TASK": "8"}, 64, 4, 8),  # not bound
        (SRUN, 32, 4, 8),
    ],
)
def test_the_share_of_each_process(
    variables: dict[str, str], cores: int, processes: int, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert share(variables, 3, cores)[:2] == (processes, each)


def test_a_gpu_that_srun_hides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("barlow.launch.machine", lambda: ("cuda", 1, 8, True))
    with pytest.raises(UserError, match=r"4 tasks on this machine, but a task sees only 1 .*--gpus-per-node=4"):
        launch(Config(), ExitStack())


def test_uneven_tasks_of_slurm_are_refused() -> None:
    with pytest.raises(UserError, match="5 tasks on 2 nodes"):
        surroundings({"SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_NUM_NODES": "2"}, 1)


def test_where_slurm_is_installed_a_run_outside_it_says_nothing_of_it(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a login node srun is there and not used: no warning (which would be an error here) that asks for it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with ExitStack() as stack:
        assert launch(tiny(), stack).world_size == 1


def test_outside_slurm_nothing_is_requeued(monkeypatch: pytest.MonkeyPatch) -> None:
    assert requeue({}) is None
    monkeypatch.setenv("PATH", "")
    assert requeue({"SLURM_JOB_ID": "7"}) == "job 7 is not requeued: there is no scontrol here"
    end_others([])


def test_alone_there_is_nothing_to_gather() -> None:
    assert ranks.gather({"a": (1, 2)}) == [{"a": (1, 2)}]
