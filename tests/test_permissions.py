"""What this user may not read or write: one sentence that names it, and exit code 2, before any long work."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_ARGS, blobs
from PIL import Image

from barlow import Config, pretrain
from barlow.files import in_the_way

SETTINGS = ["--steps", "2", "--encoder", "resnetv2_18", "--encoder-args", json.dumps(TINY_ARGS), "--projector", "32-32",
            "--batch-size", "16", "--workers", "0", "--held-out", "8"]  # fmt: skip
CASES = {  # the command, and what the sentence must say
    "pretrain closed --out o": "closed cannot be listed (Permission denied): give this user the right to read it",
    "pretrain open --out o": "open/b/sub cannot be listed (Permission denied)",
    "pretrain closed.npy --out o": "closed.npy cannot be read as an array: Permission denied",
    "pretrain closed.txt --out o": "closed.txt cannot be used: Permission denied",
    "pretrain closed/in --out o": "closed cannot be used: Permission denied",
    "pretrain open/a --config closed.toml": "closed.toml cannot be read: Permission denied",
    "pretrain open/a --out full/o": "cannot write in full/o: ",
    "pretrain nowhere --out full/b/o": "full: Permission denied",  # before the images are looked for
    "pretrain nowhere --out closed.npy/o": "closed.npy: Not a directory",
    "pretrain open/a --out closed/o": "closed cannot be used: Permission denied",
    "pretrain --resume kept": "cannot write in kept: Permission denied",
    "pretrain --resume shut": "shut cannot be used: Permission denied",
    "check closed": "closed cannot be listed",
    "views closed -o v.png": "closed cannot be listed",
    "views open/a -o full/v.png": "This user may not write in the folder full",
    "embed run closed -o e.npy": "closed cannot be listed",
    "embed run open/a -o full/e.parquet": "This user may not write in the folder full",
    "embed run open/a -o full --part 1/2": "This user may not write in the folder full",
    "embed shut open/a -o e.npy": "shut cannot be used: Permission denied",
    "evaluate run --labels closed": "closed cannot be listed",
    "evaluate run --labels closed.csv": "closed.csv cannot be read as a table (Permission denied)",
    "evaluate kept --labels open/a": "kept takes no evaluation.json",
    "report kept": "kept/report.html: Permission denied",
    "report shut": "shut cannot be used: Permission denied",
    "compare run shut": "shut cannot be used: Permission denied",
    "export run --to torch -o full/e.pt2": "This user may not write in the folder full",
    "curate run open/a -o full/c.csv": "This user may not write in the folder full",
}
PROGRAM = """
import contextlib, io, json, os, sys
from barlow.cli import main

if os.access("closed", os.R_OK):
    sys.exit("may read all")
for words in json.load(sys.stdin):
    said, code = io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(words)
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, said.getvalue()]))
"""


def as_others_do() -> None:
    """Root gives up its right to read and write all, in a process to be: files of root's with no mode are closed to it.

    Another user would not do: a Python that lies in root's home cannot even be started by it.
    """
    if os.geteuid() == 0:
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("open/a", "open/b/sub", "closed/in", "full"):
        Path(name).mkdir(parents=True)
    for i, picture in enumerate(blobs(40)):
        Image.fromarray(picture).save(f"open/a/{i}.png")
    np.save("closed.npy", blobs(8))
    for name, text in {"txt": "open/a/1.png", "toml": "steps = 1", "csv": "path,label\nopen/a/1.png,x\n"}.items():
        Path(f"closed.{name}").write_text(text)
    for out in ("run", "kept", "shut"):
        pretrain(
            Config("open/a", out=out, encoder="resnetv2_18", encoder_args=TINY_ARGS, image_size=32, projector=(32, 32),
                   batch_size=16, held_out=8, workers=0, steps=1, cache=False),
            quiet=True,
        )  # fmt: skip
    return tmp_path


def test_what_is_closed_is_named(folder: Path) -> None:
    modes = dict.fromkeys(("closed", "open/b/sub", "shut", *map(str, folder.glob("closed.*"))), 0)
    modes |= {"full": 0o555, **{str(path): 0o555 for path in Path("kept").glob("**/") if path.is_dir()}}
    for name, mode in modes.items():
        Path(name).chmod(mode)
    commands = [[*words.split(), *(SETTINGS if words.startswith("pretrain open/a --out") else [])] for words in CASES]
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], input=json.dumps(commands), capture_output=True, text=True, timeout=200,
            check=False, preexec_fn=as_others_do,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
    finally:
        for name in modes:
            Path(name).chmod(0o755)
    if done.stderr.endswith("may read all\n"):
        pytest.skip("this user may read everything, and cannot give that up")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(CASES), done.stderr
    for (words, sentence), (code, said) in zip(CASES.items(), answers, strict=True):
        assert code == 2, (words, said)
        assert sentence in said, (words, said)
        assert len([line for line in said.splitlines() if line.startswith("barlow: ")]) == 1, (words, said)
    assert not Path("o").exists()


def test_the_way_to_what_does_not_exist_is_open(tmp_path: Path) -> None:
    assert in_the_way(tmp_path / "nowhere" / "x.png") == tmp_path / "nowhere" / "x.png"
