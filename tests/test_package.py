"""What is shipped: the wheel and the sdist hold all that the main job needs, and run without this folder."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import barlow

ROOT = Path(__file__).parent.parent


def test_citation_names_this_version() -> None:
    about = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert about["version"] == barlow.__version__
    assert {"cff-version", "message", "title", "authors"} <= about.keys()


@pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="needs hatchling: pip install '.[dev]'")
def test_wheel_and_sdist_hold_everything_and_run_the_main_job(tmp_path: Path) -> None:
    """Built, unpacked into an empty folder and run from there; the sdist builds the same wheel again."""
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,), (sdist,) = (tmp_path / "dist").glob("*.whl"), (tmp_path / "dist").glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        packed.extractall(tmp_path / "empty")
    shipped = {f"barlow/{path.relative_to(ROOT / 'src' / 'barlow')}" for path in (ROOT / "src" / "barlow").rglob("*")
               if path.is_file() and "__pycache__" not in path.parts}  # fmt: skip
    assert shipped <= names
    assert {"barlow/py.typed", "barlow/report.html.j2", "barlow/sample/train.npz"} <= names
    assert {name.split("/")[0] for name in names} == {"barlow", f"barlow-{barlow.__version__}.dist-info"}
    with tarfile.open(sdist) as packed_source:
        packed_source.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    again = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "again")]
    subprocess.run(again, cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next((tmp_path / "again").glob("*.whl"))) as packed:
        assert set(packed.namelist()) == names
    program = "import barlow.cli; print(barlow.__file__); barlow.cli.main()"
    words = ["pretrain", "sample", "--out", "run", "--steps", "1", "--batch-size", "8", "--held-out", "8",
             "--workers", "0", "--projector", "16-16", "--no-cache"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=tmp_path, capture_output=True, text=True,
                          check=False, env={**os.environ, "PYTHONPATH": str(tmp_path / "empty")})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == tmp_path / "empty" / "barlow"
    assert (tmp_path / "run" / "report.html").is_file()
