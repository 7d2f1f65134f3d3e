from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from barlow.environment import environment
from barlow.errors import UserError
from barlow.runlog import Run, open_run, read_metrics


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_run_is_made_locked_and_left(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    with open_run(out) as run:
        assert not run.held
        assert run.checkpoints == out / "checkpoints"
        run.write_config("seed = 1\n")
        assert json.loads((out / "run.lock").read_text())["pid"] == os.getpid()
    assert sorted(content(out)) == ["config.toml", "environment.json", "metrics.jsonl"]
    with open_run(out) as run:  # the same command again
        assert run.held
        assert (out / "config.toml").read_text() == "seed = 1\n"
    (out / "notes.txt").write_text("mine")
    open_run(out).close()


@pytest.mark.parametrize("names", [["photo.jpg"], ["config.toml"], ["checkpoints/x"], ["environment.json"]])
def test_a_folder_that_is_no_run_is_refused_untouched(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"torch": "1"}')
    before = content(tmp_path)
    with pytest.raises(UserError, match=r"and is no run of barlow: give --out"):
        open_run(tmp_path)
    assert content(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({name.partition("/")[0] for name in names})


@pytest.mark.parametrize("about", [None, b"", b'{"barlow": "1', b"[]"])
def test_a_run_that_lost_its_environment_is_one_all_the_same(tmp_path: Path, about: bytes | None) -> None:
    """Kills: a run whose environment.json is damaged, called no run of barlow, so that nothing can go on from it."""
    with open_run(tmp_path) as run:
        run.write_config("seed = 1\n")
    (tmp_path / "index.parquet").write_bytes(b"PAR1")
    (tmp_path / "environment.json").unlink() if about is None else (tmp_path / "environment.json").write_bytes(about)
    with open_run(tmp_path) as run:
        assert run.held
        assert json.loads((tmp_path / "environment.json").read_text()).keys() == {"barlow"}
        assert run.write_environment({"started": "now"}) == []
    assert json.loads((tmp_path / "environment.json").read_text()) == {"started": "now"}


def test_what_a_kill_left_half_written_goes_at_the_next_start(tmp_path: Path) -> None:
    """Kills: half a snapshot, or half an encoder, that lies hidden in the run for ever."""
    open_run(tmp_path).close()
    for name in ("snapshots/.step-0000004.npz", "encoder/.model.safetensors", "encoder_b/.config.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.01234567.tmp").write_bytes(b"half")
    (tmp_path / "snapshots" / ".mine").write_bytes(b"")
    open_run(tmp_path).close()
    assert sorted(content(tmp_path)) == ["environment.json", "metrics.jsonl", "snapshots/.mine"]


def test_a_file_and_no_permission_are_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        open_run(tmp_path / "file")
    with pytest.raises(UserError, match="cannot write in"):
        open_run(tmp_path / "file" / "below")


def test_a_run_interrupted_at_birth_begins_again(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text("")
    (tmp_path / ".environment.json.01234567.tmp").write_text("{")
    with open_run(tmp_path) as run:
        assert not run.held
    assert sorted(content(tmp_path)) == ["environment.json", "metrics.jsonl"]
    with open_run(tmp_path) as run:
        assert not run.held


def test_a_run_that_cannot_be_opened_lets_the_lock_go(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot write in"):
        open_run(tmp_path)
    (tmp_path / "metrics.jsonl").rmdir()
    open_run(tmp_path).close()


# ---------------------------------------------------------------- metrics.jsonl


def test_lines_are_strict_json_with_exact_numbers(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.log("train", np.int64(3), loss=0.1 + 0.2, lr=np.float32(0.1), floor=torch.tensor(0.5), n=torch.tensor(2))
        run.log("health", 3, rank=float("nan"), ratio=np.float64("inf"), many=[1.0, float("-inf")], of="features",
                deep={"x": np.nan}, ok=np.True_)  # fmt: skip
        run.log("event", 3, message="λ b\udcffd.jpg\nnext\x85\u2028")
        with pytest.raises(ValueError, match="no kind of line 'tain'"):
            run.log("tain", 3)
        lines = (tmp_path / "metrics.jsonl").read_bytes()  # at once, without waiting for close
    assert lines.count(b"\n") == 3
    assert "λ".encode() in lines
    assert b"NaN" not in lines
    assert b"Infinity" not in lines
    train, health, event = read_metrics(tmp_path / "metrics.jsonl")
    assert train == {"kind": "train", "step": 3, "loss": 0.1 + 0.2, "lr": float(np.float32(0.1)), "floor": 0.5, "n": 2}
    assert list(train)[:2] == ["kind", "step"]
    assert health == {"kind": "health", "step": 3, "rank": None, "ratio": None, "many": [1.0, None], "of": "features",
                      "deep": {"x": None}, "ok": True}  # fmt: skip
    assert event["message"] == "λ b\udcffd.jpg\nnext\x85\u2028"


def log_steps(run: Run, steps: range) -> None:
    for step in steps:
        run.log("train", step, loss=1 / step)
        run.log("speed", step, images_per_s=9.0)
        if step % 4 == 0:
            run.log("health", step, of="features", rank=step / 3)
            run.snapshot(f"step-{step:07d}", features=np.full((2, 2), step, np.float32))


def test_after_a_resume_the_run_reads_as_if_never_stopped(tmp_path: Path) -> None:
    with open_run(tmp_path / "whole") as run:
        run.snapshot("held_out", keys=np.array(["a"]))
        log_steps(run, range(1, 21))
    with open_run(tmp_path / "broken") as run:
        run.snapshot("held_out", keys=np.array(["a"]))
        log_steps(run, range(1, 18))
        run.log("event", 17, message="killed")
    with open_run(tmp_path / "broken") as run:
        run.rewind(10)
        assert max(line["step"] for line in read_metrics(run.folder / "metrics.jsonl")) == 10
        assert sorted(p.name for p in (run.folder / "snapshots").iterdir()) == [
            "held_out.npz", "step-0000004.npz", "step-0000008.npz"]  # fmt: skip
        log_steps(run, range(11, 21))
    whole, broken = content(tmp_path / "whole"), content(tmp_path / "broken")
    assert whole.pop("environment.json") == broken.pop("environment.json")
    assert whole == broken
    assert {line["kind"] for line in read_metrics(tmp_path / "whole" / "metrics.jsonl")} == {"train", "speed", "health"}


def test_from_step_0_on_the_first_look_is_written_again(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.log("event", 0, message="seed = 0: chosen")
        chosen = (tmp_path / "metrics.jsonl").read_bytes()
        run.log("health", 0, of="features")
        run.log("train", 1, loss=2.0)
        written = (tmp_path / "metrics.jsonl").read_bytes()
        run.rewind(1)
        assert (tmp_path / "metrics.jsonl").read_bytes() == written
        run.rewind(0)
        assert (tmp_path / "metrics.jsonl").read_bytes() == chosen
        run.rewind(-1)
        assert (tmp_path / "metrics.jsonl").read_bytes() == b""


@pytest.mark.parametrize("tail", [b'{"kind": "train", "st', b'{"kind": "train", "step": 9}', b"\0" * 4096,
                                  b"\0" * 50 + b"\n", b"[1]\n", b'{"a": 1}\n', b'{"kind": "train"}\n',
                                  b'{"kind": "tain", "step": 1}\n', b'{"kind": "train", "step": true}\n',
                                  b"\xff\n", b"[" * 99999 + b"\n"])  # fmt: skip
def test_a_torn_end_is_not_read_and_is_cut(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    with open_run(tmp_path) as run:
        run.log("train", 1, loss=2.0)
        good = path.read_bytes()
    path.write_bytes(good + tail)
    assert [line["step"] for line in read_metrics(path)] == [1]
    with open_run(tmp_path) as run:
        run.log("train", 2, loss=1.0)
    assert path.read_bytes() == good + b'{"kind": "train", "step": 2, "loss": 1.0}\n'


def test_a_damaged_line_in_the_middle_is_named_and_goes_at_the_next_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with open_run(tmp_path) as run:
        for step in (1, 2, 3):
            run.log("train", step)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0\0\0\n" + lines[2] + b'{"a": 1}\n' + b'{"kind": "train", "step": 4}\n')
    with pytest.raises(UserError, match=r"line 2 of .*metrics\.jsonl is damaged"):
        read_metrics(path)
    with open_run(tmp_path) as run:
        assert run.rewind(3) == 1  # the other one stood among lines that are written again
        assert run.rewind(3) == 0
    assert [line["step"] for line in read_metrics(path)] == [1, 3]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_a_full_disk_delays_lines_and_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(tmp_path)

    class Disk:
        closed = False
        room = 30

        def __init__(self, file: object) -> None:
            self.file = file

        def write(self, data: bytearray) -> int:
            if not Disk.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            part = bytes(data[: Disk.room])
            Disk.room -= len(part)
            return self.file.write(part)  # type: ignore[attr-defined, no-any-return]

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

    monkeypatch.setattr(run, "_metrics", Disk(run._metrics))
    for step in (1, 2, 3):
        run.log("train", step, loss=0.5)
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert capsys.readouterr().err.count("waits for the disk") == 1
    with pytest.raises(OSError, match="No space left"):
        run.sync()
    Disk.room = 10**6
    run.log("train", 4, loss=0.5)
    run.sync()
    run.close()
    run.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


# ---------------------------------------------------------------- the other files


def test_snapshots_are_whole_and_without_pickle(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        path = run.snapshot("held_out", images=np.zeros((2, 3), np.uint8), keys=np.array(["ä", "b"]))
        with pytest.raises(TypeError, match="holds Python objects"):
            run.snapshot("bad", keys=np.array([{}], dtype=object))
    with np.load(path, allow_pickle=False) as back:
        assert back["keys"].tolist() == ["ä", "b"]
        assert back["images"].shape == (2, 3)
    assert [each.name for each in (tmp_path / "snapshots").iterdir()] == ["held_out.npz"]


def test_the_environment_of_the_first_start_stays_and_changes_are_kept(tmp_path: Path) -> None:
    about = environment(["cpu"], ["barlow", "pretrain", "my images"])
    assert about["command"] == "barlow pretrain 'my images'"
    assert about["started"].endswith("+00:00")
    assert about["torch"] == torch.__version__
    assert about["cores"] >= 1
    assert about["device"] == about["cpu"] == about["devices"][0]
    with open_run(tmp_path) as run:
        assert run.write_environment(about) == []
        assert run.write_environment({**about, "started": "later"}) == []
        assert run.write_environment({**about, "started": "later still", "torch": "9.9"}) == ["torch"]
    stored = json.loads((tmp_path / "environment.json").read_text())
    assert stored.pop("resumed") == [{"started": "later"}, {"started": "later still", "torch": "9.9"}]
    assert stored == about
