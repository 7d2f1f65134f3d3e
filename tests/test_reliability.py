"""docs/reliability.md: forty faults in order, and every test that it names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
TEXT = (HERE.parent / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_the_table_has_all_faults_each_with_a_test() -> None:
    rows = re.findall(r"^\| (\d+) \|(.*)$", TEXT, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 41))
    assert all(re.search(r"`test_\w+\.py::test_\w+`", row) for _, row in rows)


def test_every_test_it_names_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", TEXT)
    assert len(named) > 40
    for file, name in named:
        tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"
