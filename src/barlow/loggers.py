"""Copies of a run in the tools where people watch their experiments: TensorBoard, Weights & Biases, MLflow, trackio.

metrics.jsonl stays the truth, and every record is made from its lines. So a run that is resumed continues the same
record with no point twice: where a record can be written anew it is (TensorBoard, W&B offline); of the others it is
asked how far they are, for a resumed run repeats its steps to the bit. Each tool works in a thread of its own: a
slow one holds up nothing, one that fails is one warning. Nothing leaves the machine unless the tool was told to.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, final

import numpy as np

from barlow.config import Config, word
from barlow.console import say
from barlow.errors import UserError, first_line
from barlow.runlog import Line, Run, read_arrays, read_environment, read_metrics

PATIENCE = 30.0  # seconds that a finished run waits for a tool
PROJECT = "barlow"
Scalars = Mapping[str, float]


@dataclass(frozen=True)
class About:
    """What a record begins with. ``id``: of the run, for good; ``config``: its settings; ``views``: (h, w, 3) uint8."""

    folder: Path
    id: str
    config: Mapping[str, Any]
    views: np.ndarray[Any, np.dtype[np.uint8]] | None


@dataclass(frozen=True)
class Record:
    """An open record. ``done``: the step up to which it holds the scalars of a group (``train``, ``health/features``)
    already, under "" that of all others; where neither is named it holds none."""

    write: Callable[[int, Scalars], object]
    close: Callable[[], object]
    done: Mapping[str, float]


Opener = Callable[[About], Record]


def tensorboard(about: About) -> Record:
    """In the folder ``tensorboard`` of the run, written anew: ``tensorboard --logdir runs`` shows all runs."""
    from torch.utils.tensorboard import SummaryWriter

    folder = about.folder / "tensorboard"
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    writer = SummaryWriter(str(folder), purge_step=0, flush_secs=30)  # a TensorBoard that is open forgets the old ones
    writer.add_text("config", "\n".join(f"    {key} = {value}" for key, value in about.config.items()), 0)
    if about.views is not None:
        writer.add_image("views", about.views, 0, dataformats="HWC")

    def write(step: int, values: Scalars) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Record(write, writer.close, {})


def wandb(about: About) -> Record:
    """Offline, in the folder ``wandb`` of the run, unless WANDB_MODE or WANDB_API_KEY say otherwise."""
    mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb as tool

    if mode == "offline":
        for old in (about.folder / "wandb").glob(f"offline-run-*-{about.id}"):
            shutil.rmtree(old, ignore_errors=True)
    quiet = tool.Settings(silent=True, console="off", disable_git=True, save_code=False, disable_code=True)
    run = tool.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT), dir=str(about.folder), id=about.id, resume="allow",
        name=about.folder.name, config=dict(about.config), mode=mode, settings=quiet, reinit="create_new",
        allow_val_change=True,
    )  # fmt: skip
    done = run.step - 1 if run.resumed else -1
    if about.views is not None and done < 0:
        run.log({"views": tool.Image(about.views)}, step=0)
    return Record(lambda step, values: run.log(dict(values), step=step), run.finish, {"": done})


def mlflow(about: About) -> Record:
    """Where MLFLOW_TRACKING_URI says, else where MLflow itself keeps its runs: on this machine, in the folder that one
    is in. A resumed run is found by a tag."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client, project = MlflowClient(), os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    known = client.get_experiment_by_name(project)
    experiment = known.experiment_id if known else client.create_experiment(project)
    found = client.search_runs([experiment], f"tags.barlow = '{about.id}'", max_results=1)
    done: dict[str, float] = {}
    if found:
        run = found[0].info.run_id
        client.update_run(run, status="RUNNING")
        for name in found[0].data.metrics:
            last = max(metric.step for metric in client.get_metric_history(run, name))
            done[name.rpartition("/")[0]] = max(last, done.get(name.rpartition("/")[0], -1))
    else:
        tags = {"barlow": about.id}
        run = client.create_run(experiment, run_name=about.folder.name, tags=tags).info.run_id
        client.log_batch(run, params=[Param(key, str(value)[:6000]) for key, value in about.config.items()])
        if about.views is not None:
            client.log_image(run, about.views, artifact_file="views.png")

    def write(step: int, values: Scalars) -> None:
        client.log_batch(
            run, metrics=[Metric(name, value, int(1000 * time.time()), step) for name, value in values.items()]
        )

    return Record(write, lambda: client.set_terminated(run), done)


def trackio(about: About) -> Record:
    """In trackio's own folder on this machine, unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say otherwise."""
    import trackio as tool

    with redirect_stdout(io.StringIO()):  # standard output is for results
        run = tool.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=f"{about.folder.name} {about.id[:6]}",
            config=dict(about.config), resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip
    done = run._next_step - 1
    if about.views is not None and done < 0:
        run.log({"views": tool.Image(about.views)}, step=0)

    def close() -> None:
        with redirect_stdout(io.StringIO()):
            run.finish()

    return Record(lambda step, values: run.log(dict(values), step=step), close, {"": done})


OPENERS: dict[str, Opener] = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow, "trackio": trackio}


def check_installed(names: Sequence[str]) -> None:
    """UserError, naming what to install, for a logger whose package is not there."""
    for name in names:
        found = find_spec(name)
        if found is None or found.origin is None:  # a mere folder of that name, such as W&B leaves, is no package
            raise UserError(f"--logger {name} needs the package {name}: pip install 'barlow[{name}]'.")


@contextmanager
def copies(run: Run, config: Config) -> Iterator[None]:
    """While it is open, every line that ``run`` logs is copied to the tools of ``config.logger``, after those that it
    holds already."""
    settings = {word(name): value for name, value in config.given().items()}
    first = read_environment(run.folder)
    started = [str(first.get(key)) for key in ("started", "host", "command")]
    name = hashlib.blake2b("\n".join([run.folder.resolve().name, *started]).encode(), digest_size=8).hexdigest()
    about = About(run.folder, name, settings, _views(run.folder / "snapshots" / "held_out.npz"))
    held = read_metrics(run.folder / "metrics.jsonl")
    threads = [Copy(name, OPENERS[name], about) for name in config.logger or ()]
    for thread in threads:
        for line in held:
            thread.take(line)
    run.copies += [thread.take for thread in threads]
    try:
        yield
    finally:
        run.copies.clear()
        for thread in threads:
            thread.close()


@final
class Copy:
    """One record, written in a thread. ``take`` only queues; what goes wrong is said once, and then all is dropped."""

    def __init__(self, name: str, opener: Opener, about: About) -> None:
        self.name = name
        self._failed = False
        self._lines: SimpleQueue[Line | None] = SimpleQueue()
        self._thread = Thread(target=self._work, args=(opener, about), name=name, daemon=True)
        self._thread.start()

    def take(self, line: Line) -> None:
        """Queues a line of metrics.jsonl; it must not be changed afterwards."""
        if not self._failed:
            self._lines.put(line)

    def close(self) -> None:
        """Waits for the tool to have it all, but not for ever."""
        self._lines.put(None)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self._give_up(f"it has not answered for {PATIENCE:.0f} s")

    def _work(self, opener: Opener, about: About) -> None:
        try:
            record = opener(about)
            while (line := self._lines.get()) is not None:
                group, values = scalars(line)
                if values and line["step"] > record.done.get(group, record.done.get("", -1)):
                    record.write(line["step"], values)
            record.close()
        except BaseException as error:  # tools also end the program where a question to the user stays unanswered
            self._give_up(f"{type(error).__name__}: {first_line(error)}")

    def _give_up(self, why: str) -> None:
        self._failed = True
        say(f"warning: {self.name} gets no more of this run ({why}); metrics.jsonl has all of it")


def scalars(line: Line) -> tuple[str, dict[str, float]]:
    """(group, numbers by name) of a line: ``health/features/rankme``. What is not finite is left out."""
    group = "/".join(str(line[key]) for key in ("kind", "of") if key in line)
    numbers = {key: value for key, value in line.items() if type(value) in (int, float) and key != "step"}
    if line["kind"] == "event":
        return group, {}
    return group, {f"{group}/{key}": float(value) for key, value in numbers.items() if math.isfinite(value)}


def _views(snapshot: Path) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
    """The pairs of views that the report shows, one above the other; None where there are none."""
    arrays = read_arrays(snapshot)
    with suppress(ValueError, KeyError):
        rows = [np.concatenate(list(arrays[name]), axis=1) for name in ("views_a", "views_b")]
        picture = np.concatenate([row[..., :3] if row.shape[2] >= 3 else row[..., :1].repeat(3, 2) for row in rows])
        return np.ascontiguousarray(picture, np.uint8)
    return None
