"""The pages of the documentation as blocks that run: every ```bash and ```python block, in order, page by page.

A page runs in a folder of its own, with ``photos/`` (pictures in two class folders) and ``labels.csv`` there, offline.
What a page says about its blocks stands in comments that readers do not see, in the line before the block:

    <!-- not run: why -->             the block is only checked for words that the command line knows
    <!-- needs: MODULE -->            passed over where that module is not installed
    <!-- starts with: runs/photos --> anywhere in the page: a trained run lies there from the start

``# exit code N`` at the end of a command line: it ends so. A ```toml block with title="NAME" becomes that file.

Pages show what people would type, `--minutes 60` and all. What makes an hour short is one function, ``short``: what the
command line and Python train with is replaced by a function that fills in ``TINY`` where a page gives nothing, and
trains ``TINY.steps`` steps at most; and `sample` is an eighth of itself. Nothing else differs from what is written.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shlex
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import barlow.images
import barlow.labelled
import barlow.run
from barlow.cli import main
from barlow.config import Config, merge
from barlow.samples import Samples

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.name != "log.md")]
BLOCK = re.compile(
    r"^(?P<notes>(?:[ ]*<!--[^\n]*-->\n)*)(?P<indent> *)```(?P<language>\w+)(?P<title>[^\n]*)\n"
    r"(?P<code>.*?)\n?^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
TINY = Config(
    encoder="resnetv2_18", encoder_args={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "stem_chs": 8},
    image_size=16, projector=(16, 16), batch_size=16, held_out=16, steps=6, workers=0, devices=1, precision="float32",
)  # fmt: skip
OF_IMAGES = ("encoder", "encoder_args", "image_size")


@dataclass(frozen=True)
class Block:
    """One block of a page: its first line's number, its language, its text, the title given to it, and the notes."""

    page: Path
    line: int
    language: str
    code: str
    title: str
    notes: dict[str, str]

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def missing(self) -> bool:
        """True where the block needs a module that is not installed."""
        return "needs" in self.notes and importlib.util.find_spec(self.notes["needs"]) is None

    def commands(self) -> list[str]:
        """Its commands, each on one line."""
        joined = re.sub(r"\s*\\\n\s*", " ", self.code)
        return [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that run or are checked."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in BLOCK.finditer(text):
        notes = dict(re.findall(r"<!-- ([\w ]+): (.*?) -->", match["notes"]))
        title = re.search(r'title="([^"]+)"', match["title"])
        line = text.count("\n", 0, match.start("code")) + 1
        code = textwrap.dedent(match["code"])
        found.append(Block(page, line, match["language"], code, title[1] if title else "", notes))
    return found


def starts_with(page: Path) -> str:
    """The run that a page takes for granted, or nothing."""
    found = re.search(r"<!-- starts with: (\S+) -->", page.read_text(encoding="utf-8"))
    return found[1] if found else ""


@contextlib.contextmanager
def short(sample: Path) -> Iterator[None]:
    """Trainings take a second: see the head of this file. ``sample``: as ``small_sample`` has left it."""
    real = barlow.run.pretrain

    def pretrain(config: Config, *, resume: bool = False, **given: Any) -> Path:
        if not resume:
            own = given.get("encoder") is not None
            left_out = OF_IMAGES if isinstance(given.get("images"), Samples) else OF_IMAGES[:2] if own else ()
            steps = min(config.steps or 6, TINY.steps or 6)
            config = config.replace(minutes=None, epochs=None, steps=steps)
            config = merge(TINY.replace(**dict.fromkeys(left_out)), config)
        return real(config, resume=resume, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(barlow.run, "pretrain", pretrain)
        patch.setattr(barlow.images, "SAMPLE", sample)
        patch.setattr(barlow.labelled, "SAMPLE", sample)
        yield


def small_sample(folder: Path) -> Path:
    """Writes an eighth of both parts of the sample into ``folder``; returns the path of the first."""
    folder.mkdir()
    for part in ("train", "test"):
        with np.load(barlow.images.SAMPLE.with_name(f"{part}.npz")) as whole:
            eighth = {name: whole[name][: len(whole[name]) // 8] for name in ("images", "labels")}
            np.savez(folder / f"{part}.npz", names=whole["names"], **eighth)
    return folder / "train.npz"


def run_page(page: Path) -> list[str]:
    """Runs the blocks of a page in this folder; returns those that were passed over, each with the module it needs."""
    names: dict[str, Any] = {"__name__": "__main__"}
    passed_over = []
    for block in blocks(page):
        if "not run" in block.notes:
            continue
        if block.missing:
            passed_over.append(f"{block.where} needs {block.notes['needs']}")
        elif block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.code, str(block.page), "exec"), names)
        elif block.language == "bash":
            for command in block.commands():
                run_command(command, block.where)
        elif block.language == "toml" and block.title:
            Path(block.title).write_text(block.code + "\n", encoding="utf-8")
    return passed_over


def run_command(command: str, where: str) -> None:
    """One command line: barlow's within this process, for speed; any other by bash."""
    told = re.search(r"#.*\bexit code (\d+)", command)
    expected = int(told[1]) if told else 0
    words = shlex.split(command, comments=True)
    if words[0] == "barlow" and not {"|", ">", "&&", ";"} & set(words):
        code = ended(lambda: main(words[1:]))
    else:
        code = subprocess.run(["bash", "-c", command], check=False).returncode
    assert code == expected, f"{where}: {command!r} ended with {code}, not {expected}"


def ended(call: Callable[[], object]) -> int:
    """The exit code of a command line called within this process."""
    try:
        call()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0
