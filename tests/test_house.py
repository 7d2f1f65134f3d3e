"""The rules of the house: the rooms and who may import whom, the public names, no dead setting, no pickle."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

import barlow
from barlow.config import Config

SOURCE = Path(barlow.__file__).parent
ROOMS = {path.stem: path for path in sorted(SOURCE.glob("*.py"))}
TOLD = re.findall(r"^\| `(\w+)\.py` \| (.*) \|$", (SOURCE / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
TABLE = [room for room, _ in TOLD]
ALONE = {  # rooms that work on plain arrays and tensors, and all that they may import
    "draws": {"numpy"}, "measures": {"numpy"}, "neighbours": {"numpy"}, "health": {"numpy"},
    "verdict": set(), "scores": {"numpy", "sklearn", "scipy"}, "forms": {"torch"}, "objective": {"torch"},
    "decode": {"numpy", "PIL"}, "config": set(), "cli": {"cyclopts"},
}  # fmt: skip
STANDARD = {
    "__future__", "abc", "argparse", "base64", "collections", "contextlib", "copy", "csv", "dataclasses", "datetime",
    "difflib", "enum", "errno", "functools", "hashlib", "html", "io", "itertools", "json", "math", "numbers", "os",
    "pathlib", "re", "sys", "threading", "time", "tomllib", "types", "typing", "warnings", "zlib",
}  # fmt: skip


def imports(path: Path, *, lazy: bool = True) -> list[str]:
    """Modules that a file imports, in full; without ``lazy`` only those at its top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            rooms = [f"barlow.{alias.name}" for alias in node.names]
            found += rooms if node.module == "barlow" else [node.module]
    return found


def ours(path: Path) -> set[str]:
    names = {name.split(".")[1] for name in imports(path) if name.startswith("barlow.")}
    return names & ROOMS.keys()


def test_the_table_has_every_room_once() -> None:
    assert sorted(TABLE) == sorted(ROOMS.keys() - {"__init__", "__main__"})


@pytest.mark.parametrize(("room", "told"), TOLD, ids=TABLE)
def test_the_table_says_what_the_room_says_of_itself(room: str, told: str) -> None:
    head = ast.get_docstring(ast.parse(ROOMS[room].read_text(encoding="utf-8"))) or ""
    assert " ".join(head.split("\n\n")[0].split()) == told


@pytest.mark.parametrize("room", sorted(ROOMS.keys() - {"__init__", "__main__"}))
def test_arrows_point_downwards_only(room: str) -> None:
    """A room imports only rooms below it in the table: no circle, and nobody imports the command line."""
    below = set(TABLE[TABLE.index(room) + 1 :])
    assert ours(ROOMS[room]) - {room} <= below


@pytest.mark.parametrize("room", sorted(ALONE))
def test_rooms_that_are_useful_alone(room: str) -> None:
    outside = {name.split(".")[0] for name in imports(ROOMS[room], lazy=False)} - STANDARD - {"barlow"}
    assert outside <= ALONE[room]


def test_public_names_are_sorted_and_real() -> None:
    assert barlow.__all__ == sorted(barlow.__all__)
    assert set(barlow.__all__) == {
        "BarlowTwinsLoss", "Config", "Pairs", "Samples", "View", "barlow_twins_loss", "embed",
        "load_encoder", "pretrain",
    }  # fmt: skip
    for name in barlow.__all__:
        assert callable(getattr(barlow, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        barlow.nothing  # noqa: B018


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Config)])
def test_every_setting_is_read_by_something(field: str) -> None:
    readers = [room for room, path in ROOMS.items() if room not in ("config", "plan")
               and re.search(rf"config\.{field}\b", path.read_text(encoding="utf-8"))]  # fmt: skip
    assert readers, f"nothing reads {field}"


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_files_and_functions_read_in_one_sitting(room: str) -> None:
    text = ROOMS[room].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name


def test_nothing_unpickles_or_downloads() -> None:
    banned = re.compile(r"import pickle|pickle\.loads?|torch\.load\(|allow_pickle=True|urlopen|urlretrieve|requests\.")
    for room, path in ROOMS.items():
        assert not banned.search(path.read_text(encoding="utf-8")), room


def test_changelog_has_this_version() -> None:
    changelog = (SOURCE.parent.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {barlow.__version__}" in changelog


def test_contributing_is_short() -> None:
    assert len((SOURCE.parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 45
