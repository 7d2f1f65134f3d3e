"""Loggers: each real tool, offline, holds what metrics.jsonl holds, once, after a resume too; a broken one warns."""

from __future__ import annotations

import json
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from barlow import loggers, pretrain
from barlow.cli import main
from barlow.config import Config, read_toml
from barlow.errors import Stopped, UserError
from barlow.loggers import Copy, Record, scalars
from barlow.runlog import open_run, read_metrics

Points = dict[str, list[tuple[int, float]]]


def told(run: Path) -> Points:
    """What metrics.jsonl holds: (step, value) of each scalar by name."""
    points: Points = {}
    for line in read_metrics(run / "metrics.jsonl"):
        for name, value in scalars(line)[1].items():
            points.setdefault(name, []).append((line["step"], value))
    return points


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder where the tools may leave what they like, and no setting of theirs from outside."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fake(monkeypatch: pytest.MonkeyPatch, opener: Callable[[Any], Record]) -> None:
    """In place of TensorBoard."""
    monkeypatch.setitem(loggers.OPENERS, "tensorboard", opener)
    monkeypatch.setattr(loggers, "find_spec", lambda name: SimpleNamespace(origin="somewhere"))


def keep(points: Points, done: dict[str, float]) -> Callable[[Any], Record]:
    def write(step: int, values: Any) -> None:
        for name, value in values.items():
            points.setdefault(name, []).append((step, value))

    return lambda about: Record(write, lambda: None, done)


def interrupted(config: Config, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that is stopped after step 6, four steps after its last checkpoint, then continued to its end."""
    from barlow.session import Session

    took = Session.took

    def stop_at_6(self: Session, batch: Any, *rest: Any) -> None:
        took(self, batch, *rest)
        if self.step == 6:
            raise Stopped("enough")

    with monkeypatch.context() as patch:
        patch.setattr(Session, "took", stop_at_6)
        with pytest.raises(Stopped):
            pretrain(config.replace(checkpoint_every=4, health_every=2), quiet=True)
    assert max(line["step"] for line in read_metrics(Path(config.out or "") / "metrics.jsonl")) == 5
    return pretrain(config.replace(checkpoint_every=4, health_every=2), quiet=True)


def test_a_logger_gets_every_line_once(
    tiny: Callable[..., Config], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points: Points = {}
    fake(monkeypatch, keep(points, {}))
    run = pretrain(tiny(logger="tensorboard", steps=4), quiet=True)
    assert points == told(run)
    assert {"train/loss", "train/lr", "health/features/effective_rank", "speed/images_per_s"} <= points.keys()
    assert read_toml(run / "config.toml").logger == ("tensorboard",)


def test_a_resumed_run_goes_on_where_the_record_is(
    tiny: Callable[..., Config], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record was two steps ahead of the checkpoint: those are not written again, and none is missing."""
    points: Points = {}
    done: dict[str, float] = {}
    opened = []

    def opener(about: Any) -> Record:
        opened.append(about)
        done.update({name.rpartition("/")[0]: max(step for step, _ in of) for name, of in points.items()})
        return keep(points, dict(done))(about)

    fake(monkeypatch, opener)
    run = interrupted(tiny(logger="tensorboard", checkpoint_every=4), monkeypatch)
    assert len(opened) == 2
    assert opened[0].id == opened[1].id
    assert opened[0].views is not None
    assert opened[0].views.shape[2] == 3
    assert opened[1].config["lambda"] == 0.02
    kept = {name: of for name, of in points.items() if not name.startswith("speed")}
    assert kept == {name: of for name, of in told(run).items() if not name.startswith("speed")}
    assert [step for step, _ in points["train/loss"]] == list(range(1, 9))


@pytest.mark.parametrize("where", ["open", "write", "close"])
def test_a_logger_that_fails_is_one_warning(
    tiny: Callable[..., Config], home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:  # fmt: skip
    def fail(*_: object) -> Any:
        raise SystemExit("no answer\nmore") if where == "open" else OSError("server is gone")

    opened = Record(fail if where == "write" else lambda step, values: None, fail, {})
    fake(monkeypatch, fail if where == "open" else lambda about: opened)
    run = pretrain(tiny(logger="tensorboard", steps=4), quiet=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if "tensorboard" in line]
    why = "SystemExit: no answer" if where == "open" else "OSError: server is gone"
    assert lines == [f"warning: tensorboard gets no more of this run ({why}); metrics.jsonl has all of it"]
    assert (run / "report.html").is_file()


def test_a_logger_that_hangs_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(loggers, "PATIENCE", 0.05)
    about: Any = None
    copy = Copy("slow", lambda _: Record(lambda step, values: gate.wait(), lambda: None, {}), about)
    begun = time.monotonic()
    for step in range(1000):
        copy.take({"kind": "train", "step": step, "loss": 1.0})
    copy.close()
    assert time.monotonic() - begun < 5
    gate.set()
    assert "slow gets no more of this run (it has not answered for 0 s)" in capsys.readouterr().err


def test_what_is_copied() -> None:
    line = {"kind": "health", "step": 3, "of": "features", "verdict": "healthy", "rank": 2.5, "lost": None, "on": True}
    assert scalars(line) == ("health/features", {"health/features/rank": 2.5})
    assert scalars({"kind": "event", "step": 3, "message": "hello", "count": 3})[1] == {}


def test_settings_and_mistakes(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.toml").write_text('logger = "wandb"\n')
    (tmp_path / "b.toml").write_text('logger = ["wandb", "mlflow"]\n')
    (tmp_path / "c.toml").write_text('logger = ["wendb"]\n')
    assert read_toml(tmp_path / "a.toml").logger == ("wandb",)
    assert read_toml(tmp_path / "b.toml").logger == ("wandb", "mlflow")
    with pytest.raises(UserError, match="logger = "):
        read_toml(tmp_path / "c.toml")
    with pytest.raises(UserError, match=r"logger = \('wendb',\) is not one or more of tensorboard, wandb"):
        Config(logger="wendb")  # type: ignore[arg-type]
    monkeypatch.setattr(loggers, "find_spec", lambda name: SimpleNamespace(origin=None) if name == "mlflow" else None)
    words = ["pretrain", "sample", "--out", str(tmp_path / "o"), "--logger", "mlflow", "--logger", "wandb"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err == "barlow: --logger mlflow needs the package mlflow: pip install 'barlow[mlflow]'.\n"
    )
    assert not (tmp_path / "o").exists()


# The real tools. What they hold after a run that was interrupted and resumed is what metrics.jsonl holds.


def read_tensorboard(run: Path) -> tuple[Points, bool, str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    record.Reload()
    points = {tag: [(event.step, event.value) for event in record.Scalars(tag)] for tag in record.Tags()["scalars"]}
    text = record.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    return points, len(record.Images("views")) == 1, text


def records_of(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: a head of 7 bytes, then LevelDB's log, pieces in blocks of 32 KiB."""
    at, record = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def read_wandb(run: Path) -> tuple[Points, bool, str]:
    from wandb.proto import wandb_internal_pb2

    (folder,) = (run / "wandb").glob("offline-run-*")
    points: Points = {}
    config, picture = {}, False
    for data in records_of(next(folder.glob("*.wandb")).read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name, value in row.items():
            if "/" in name and not name.startswith("views"):
                points.setdefault(name, []).append((int(row["_step"]), value))
            picture = picture or name.startswith("views")
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return points, picture, str(config)


def read_mlflow(run: Path) -> tuple[Points, bool, str]:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("barlow")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    points = {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, name)]
        for name in found.data.metrics
    }
    pictures = [file.path for file in client.list_artifacts(found.info.run_id)]
    return points, "views.png" in pictures, str(found.data.params)


def read_trackio(run: Path) -> tuple[Points, bool, str]:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (found,) = trackio.Api().runs("barlow")
    points: Points = {}
    picture = False
    for row in SQLiteStorage.get_logs("barlow", found.name):
        for name, value in row.items():
            if "/" in name and isinstance(value, int | float):
                points.setdefault(name, []).append((int(row["step"]), value))
        picture = picture or "views" in row
    return points, picture, str(found.config)


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("default")
def test_the_real_tool_after_a_resume(
    tiny: Callable[..., Config], home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    name: str,
) -> None:  # fmt: skip
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    if name == "trackio" and "trackio" not in sys.modules:
        monkeypatch.setenv("TRACKIO_DIR", str(home / "trackio"))  # read once, when it is imported
    run = interrupted(tiny(logger=(name,)), monkeypatch)
    said = capfd.readouterr()
    assert "warning" not in said.err, said.err
    assert said.out == ""
    points, picture, config = READERS[name](run)
    expected = told(run)
    assert points.keys() == expected.keys()
    for tag, of in expected.items():
        assert [step for step, _ in points[tag]] == [step for step, _ in of], tag
        if not tag.startswith("speed"):
            np.testing.assert_allclose([v for _, v in points[tag]], [v for _, v in of], rtol=1e-6, err_msg=tag)
    assert picture
    assert "resnetv2_18" in config


def test_the_id_of_a_run_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same at a resume, another for another folder."""
    seen: list[str] = []
    fake(monkeypatch, lambda about: seen.append(about.id) or Record(lambda step, values: None, lambda: None, {}))  # type: ignore[func-returns-value]
    for name in ("a", "a", "b"):
        with open_run(tmp_path / name) as run, loggers.copies(run, Config(logger=("tensorboard",))):
            pass
    assert seen[0] == seen[1] != seen[2]
