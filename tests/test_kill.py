"""The scripts that show what a run survives, each in small: kills, two hosts, a long day."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def script(name: str) -> ModuleType:
    """A benchmark as a module; by its own name among the others, so that processes it starts can find it."""
    folder = Path(__file__).parents[1] / "benchmarks"
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin == str(folder / f"{name}.py")
    return importlib.import_module(name)


def test_five_kills_change_no_bit(tmp_path: Path) -> None:
    found = script("kill").kill_again_and_again(tmp_path, count=5, steps=40, workers=0, seed=0)
    assert found["killed"] == 5
    assert found["differs"] == set()


@pytest.mark.long
def test_two_hosts_of_which_one_is_cut_off(tmp_path: Path) -> None:
    hosts = script("two_hosts")
    if why := hosts.missing():
        pytest.skip(why)
    found = hosts.cut_and_resume(tmp_path)
    assert [code for code, _ in found["ended"]] == [75, 75]
    for me, (_, sentence) in enumerate(found["ended"]):
        assert f"process {1 - me} of 2" in sentence
    assert found["seconds"] < hosts.PATIENCE + 30
    assert [code for code, _ in found["resumed"]] == [0, 0]
    assert found["off"] < 1e-3


@pytest.mark.long
def test_torchrun_on_two_hosts(tmp_path: Path) -> None:
    hosts = script("two_hosts")
    if why := hosts.missing():
        pytest.skip(why)
    found = hosts.under_torchrun(tmp_path)
    assert 0 not in found["stopped"]  # torchrun's own
    assert 4 <= found["at"] < 60
    assert found["done"] == [0, 0]
    assert found["steps"] == 60
    assert found["off"] < 1e-3


@pytest.mark.long
def test_a_long_day_leaves_no_trace(tmp_path: Path) -> None:
    soak = script("soak")
    found = soak.soak(tmp_path, steps=2000, images=300, workers=0)
    assert all(soak.verdict(found, 2000).values()), (soak.verdict(found, 2000), found["samples"])
