"""Whole runs on a disk that is full, or fails, at one file: a warning, or an end that can be resumed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import blobs
from PIL import Image
from test_processes import run as on_several
from test_processes import settings
from test_run import lines, same, weights

import barlow.report
from barlow import Config, pretrain
from barlow.errors import NumbersError, Stopped
from barlow.quarantine import Quarantine, read_quarantine
from barlow.runlog import Run
from barlow.session import Session

Make = Callable[..., Config]
Patch = pytest.MonkeyPatch


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def some_broken(folder: Path) -> Path:
    """96 pictures: of each twelfth the pixels are cut off, and one file is none."""
    folder.mkdir()
    for i, picture in enumerate(blobs(96)):
        file = folder / f"{i:03d}.png"
        Image.fromarray(picture).save(file)
        if i % 12 == 0:
            file.write_bytes(file.read_bytes()[:60])
    (folder / "page.png").write_text("<html>")
    return folder


def refuse(at: Callable[[Quarantine], bool], error: int, patch: Any = None) -> None:
    """The disk refuses rows of quarantine.jsonl where ``at`` says so."""
    flush = Quarantine._flush

    def sometimes(quarantine: Quarantine) -> None:
        if quarantine._pending and at(quarantine):
            raise OSError(error, os.strerror(error))
        flush(quarantine)

    (patch.setattr if patch else setattr)(Quarantine, "_flush", sometimes)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_is_full_at_a_broken_image_costs_a_warning(
    tiny: Make, tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str], error: int
) -> None:
    """Kills: "standard output cannot be written" and no checkpoint at all; with EIO a traceback. Then the rows come
    with the next save, or are said to be lost: those of headers come back at a resume."""
    config = tiny(images=str(some_broken(tmp_path / "in")), max_bad=0.5, cache=False, checkpoint_every=3)
    whole = pretrain(config.replace(out=str(tmp_path / "whole")), quiet=True)
    rows = read_quarantine(whole / "quarantine.jsonl")
    assert rows[0]["path"] == "page.png"
    assert len(rows) > 5
    with monkeypatch.context() as patch:
        refuse(lambda quarantine: 0 < quarantine.seen < 96, error, patch)
        run = pretrain(config, quiet=True)
    waits = f"warning: quarantine.jsonl waits for the disk ({os.strerror(error)})\n"
    assert capsys.readouterr().err == waits
    assert read_quarantine(run / "quarantine.jsonl") == rows
    with monkeypatch.context() as patch:
        refuse(lambda quarantine: quarantine.seen > 0, error, patch)
        run = pretrain(config.replace(out=str(tmp_path / "stays full")), quiet=True)
    lost = f"warning: the last rows of {run / 'quarantine.jsonl'} found no room ({os.strerror(error)})\n"
    assert capsys.readouterr().err == waits + lost
    assert read_quarantine(run / "quarantine.jsonl") == rows[:1]
    assert same(weights(whole), weights(run))
    (run / "quarantine.jsonl").write_bytes(b"\0" * 99)
    pretrain(config.replace(out=str(run)), quiet=True)
    assert read_quarantine(run / "quarantine.jsonl")[:1] == rows[:1]


def test_rows_that_wait_are_written_with_the_next_save(tiny: Make, tmp_path: Path, monkeypatch: Patch) -> None:
    """Kills: a run that is stopped where no broken image comes any more, whose rows are lost though there is room."""
    config = tiny(images=str(some_broken(tmp_path / "in")), max_bad=0.5, cache=False)
    monkeypatch.setattr(Session, "out_of_time", lambda session: session.step == 3)
    with pytest.raises(Stopped):
        pretrain(config.replace(out=str(tmp_path / "whole")), quiet=True)
    add = Quarantine.add

    def refused(quarantine: Quarantine, bad: Any) -> None:
        with monkeypatch.context() as patch:
            refuse(lambda _: True, errno.ENOSPC, patch)
            add(quarantine, bad)

    monkeypatch.setattr(Quarantine, "add", refused)
    with pytest.raises(Stopped):
        pretrain(config, quiet=True)
    rows, wanted = (read_quarantine(tmp_path / run / "quarantine.jsonl") for run in ("run", "whole"))
    assert rows == wanted
    assert len(rows) > 3


def refuse_in_training(_: int) -> None:
    refuse(lambda quarantine: quarantine.seen > 0, errno.EIO)


def refuse_at_the_start(_: int) -> None:
    refuse(lambda _: True, errno.ENOSPC)


def test_several_processes_end_as_one_where_the_disk_of_the_first_refuses(tmp_path: Path) -> None:
    """Only the first process writes. Kills: exit code 1 of the others, and others that wait until their patience ends,
    at the start and at a resume."""
    config = settings(tmp_path, images=str(some_broken(tmp_path / "in")), max_bad=0.5, cache=False, steps=4)
    first, second = on_several(2, tmp_path, config, refuse_at_the_start)
    assert (first[0], second) == (75, [75, ""])
    assert "quarantine.jsonl cannot be written: No space left on device. Make room" in first[1]
    assert on_several(2, tmp_path, config, refuse_in_training) == [[0, ""], [0, ""]]
    file = Path(config.out or "") / "quarantine.jsonl"
    file.unlink()
    file.mkdir()
    first, second = on_several(2, tmp_path, config)
    assert (first[0], second) == (2, [2, ""])
    assert "quarantine.jsonl cannot be written: Is a directory" in first[1]


def test_a_report_that_finds_no_room_stops_resumably(tiny: Make, monkeypatch: Patch) -> None:
    """Kills: exit code 2 as for a mistake, with no word that the training is done."""
    with monkeypatch.context() as patch:
        patch.setattr(barlow.report, "atomic_write", full)
        with pytest.raises(Stopped, match=r"Training is done and saved, but .* its results: No space left on") as stop:
            pretrain(tiny(), quiet=True)
    assert stop.value.exit_code == 75
    run = pretrain(tiny(), quiet=True)
    assert (run / "report.html").exists()
    assert (run / "encoder" / "README.md").exists()


def test_a_run_that_collapses_on_a_full_disk_ends_as_one_that_collapses(
    tiny: Make, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kills: exit code 2 and a sentence about report.html in the place of the verdict; evidence that is not there."""
    monkeypatch.setattr(barlow.report, "atomic_write", full)
    config = tiny(views=({}, {}), health_every=2, stop_on_collapse=True)
    with pytest.raises(NumbersError, match=r"after step 2 of 8, saved: identical views of .* barlow report ") as stop:
        pretrain(config, quiet=True)
    assert "The evidence is in" not in str(stop.value)
    assert "warning: the report could not be written: No space left on device\n" in capsys.readouterr().err


def test_a_snapshot_that_finds_no_room_is_named(
    tiny: Make, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kills: "[Errno 28] No space left on device: '…' -> '…'" as a warning."""
    snapshot = Run.snapshot

    def sometimes(run: Run, name: str, **arrays: Any) -> Path:
        if name == "step-0000008":
            full()
        return snapshot(run, name, **arrays)

    monkeypatch.setattr(Run, "snapshot", sometimes)
    run = pretrain(tiny(), quiet=True)
    message = "the snapshot of step 8 could not be written: No space left on device"
    assert capsys.readouterr().err == f"warning: {message}\n"
    assert message in [line["message"] for line in lines(run, "event")]
