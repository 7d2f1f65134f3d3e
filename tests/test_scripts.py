"""A user's own program around ``pretrain``: processes that we start run it again, in part or from its top."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import TINY_ARGS, blobs
from test_run import lines, same, weights

import barlow.launch
from barlow import Config, pretrain
from barlow.errors import UserError
from barlow.launch import CALL, end_here, for_a_later_call, start_others
from barlow.readers import runs_again

Make = Callable[..., Config]


def run_as_main(monkeypatch: pytest.MonkeyPatch, file: Path, text: str, **names: Any) -> dict[str, Any]:
    """Runs a program as ``python file`` would, but in this process; returns its names."""
    main = ModuleType("__main__")
    main.__file__ = str(file)
    vars(main).update(names)
    file.write_text(text, encoding="utf-8")
    monkeypatch.setitem(sys.modules, "__main__", main)
    exec(compile(text, file, "exec"), vars(main))
    return vars(main)


@pytest.mark.parametrize(
    ("text", "again"),
    [
        ("found = ask()", True),
        ("def main():\n    return ask()\nfound = main()", True),
        ("if True:\n    found = ask()", True),
        ("if __name__ == '__main__':\n    found = ask()", False),
        ("def main():\n    return ask()\nif '__main__' == __name__:\n    found = main()", False),
        ("del __file__\nfound = ask()", False),
        ("from threading import Thread\nall = []\nt = Thread(target=lambda: all.append(ask()))\n"
         "t.start()\nt.join()\nfound = all[0]", False),
    ],
)  # fmt: skip
def test_whether_a_program_would_come_here_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, again: bool
) -> None:
    assert run_as_main(monkeypatch, tmp_path / "a.py", text, ask=runs_again)["found"] is again


def test_without_a_guard_a_program_trains_without_workers_and_says_so(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With workers each of them would train, too: the first one is refused the folder, and the run waits for it."""
    whole = pretrain(tiny(out=str(tmp_path / "whole")), quiet=True)
    names = {"pretrain": pretrain, "config": tiny(workers=1)}
    run = run_as_main(monkeypatch, tmp_path / "a.py", "run = pretrain(config, quiet=True)", **names)["run"]
    assert "no workers, for they would run this script again" in capsys.readouterr().err
    assert "no workers" in lines(run, "event")[-1]["message"]
    assert same(weights(run), weights(whole))


def test_the_calls_of_a_program_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(barlow.launch, "_calls", 0)
    assert not for_a_later_call()
    monkeypatch.setenv(CALL, "3")
    assert [for_a_later_call() for _ in range(3)] == [True, False, False]
    with pytest.raises(SystemExit) as ended, ExitStack() as stack:
        stack.push(end_here)
    assert ended.value.code == 0
    end_here(UserError)  # an error is not hidden
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))  # as of python - < program
    with pytest.raises(UserError, match="use the command line or a script"):
        start_others(2)


TWO_RUNS = f"""
import os
from barlow import Config, pretrain

given = dict(encoder="resnetv2_18", encoder_args={TINY_ARGS}, image_size=32, projector=(32, 32), batch_size=32, steps=6,
             held_out=16, precision="float32", workers=0, timeout="60s")
for out in ("one", "two"):
    run = pretrain(Config("images.npy", out=out, devices=2, **given), quiet=True)
    with open("after.txt", "a") as file:
        print(os.getpid(), run, file=file)
pretrain(Config("images.npy", out="alone", devices=1, **given), quiet=True)
if "LOCAL_RANK" not in os.environ:
    pretrain(Config("images.npy", out="three", devices=2, **given), quiet=True)
"""


@pytest.mark.long
def test_several_runs_on_two_processes_from_one_program(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", blobs(96))
    (tmp_path / "a.py").write_text(TWO_RUNS)
    done = subprocess.run(
        [sys.executable, "a.py"], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
        env=os.environ | {"PYTHONPATH": str(Path(barlow.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == "barlow: process 1 of 2 ended before it came to this call"
    assert done.returncode == UserError.exit_code
    after = [line.split() for line in (tmp_path / "after.txt").read_text().splitlines()]
    here = after[0][0]
    assert [out for pid, out in after if pid == here] == ["one", "two"]
    assert sorted(out for pid, out in after if pid != here) == ["one", "one", "two"]  # on the way to a later call
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))
    assert len(lines(tmp_path / "alone", "train")) == 6
