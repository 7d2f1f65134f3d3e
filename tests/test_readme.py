"""The README and the recipes keep their word: the Python runs, the commands are understood, the files are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from barlow.cli import app
from barlow.config import read_toml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
COMMANDS = re.findall(r"^(?:#   )?barlow [a-z].*$", "\n".join([README, *(r.read_text("utf-8") for r in RECIPES)]), re.M)


@pytest.mark.filterwarnings("ignore:Pretrained (mean|std)")
def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert (tmp_path / "runs/readme/report.html").is_file()
    import timm

    assert timm.create_model("local-dir:runs/readme/encoder", pretrained=True).num_classes == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_are_understood(command: str) -> None:
    words = shlex.split(command.removeprefix("#   "), comments=True)
    app.parse_args(words[1:], exit_on_error=False, print_error=False)


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 7


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_settings(recipe: Path) -> None:
    read_toml(recipe)


def test_every_link_leads_to_a_file() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
