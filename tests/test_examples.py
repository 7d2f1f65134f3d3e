"""The examples run, shortened, and learn what they say; those of other tools where the tools are installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "count"), [("few_labels", 3), ("tiles", 4), ("signals", 3), ("two_sensors", 6)])
def test_the_worked_examples(name: str, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    accuracies = example(name).main(quick=True)
    assert len(accuracies) == count
    assert all(0 < accuracy <= 1 for accuracy in accuracies.values())
    assert len(capsys.readouterr().out.splitlines()) == count


def test_the_loss_in_a_plain_loop() -> None:
    losses = example("loss_plain_loop").main(quick=True)
    assert losses[-1] < 0.7 * losses[0]


# Lightning warns of the number of workers and of things in torch that it still uses.
@pytest.mark.filterwarnings("default")
def test_the_loss_in_a_lightning_module() -> None:
    pytest.importorskip("lightning", reason="lightning is not installed", exc_type=ImportError)
    losses = example("loss_lightning").main(quick=True)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.filterwarnings("default")
def test_the_loss_in_lightlys_loop() -> None:
    """Ours in the place of theirs: the same number."""
    pytest.importorskip("lightly", reason="lightly is not installed", exc_type=ImportError)
    ours, theirs = np.array(example("loss_lightly").main(quick=True)).T
    assert np.allclose(ours, theirs, rtol=1e-4)


def test_every_example_is_run_by_a_test() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.stem}"' in text
