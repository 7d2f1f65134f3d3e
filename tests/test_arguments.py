"""Arguments of a wrong kind from Python: one sentence that names what is wrong, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from barlow import BarlowTwinsLoss, Config, embed, load_encoder, pretrain
from barlow.check import check
from barlow.compare import compare
from barlow.curate import curate
from barlow.embedding import embed_to_file
from barlow.errors import UserError
from barlow.evaluate import evaluate
from barlow.export import export_encoder
from barlow.images import open_images
from barlow.kinds import as_whole
from barlow.parts import embed_part
from barlow.report import write_report

WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: load_encoder(None), "a run is a path, such as 'photos/one', not None"),  # type: ignore[arg-type]
    (lambda: load_encoder(b"run"), "a run is a path, .* not b'run'"),  # type: ignore[arg-type]
    (lambda: load_encoder(""), "a run is a path, .* not ''"),
    (lambda: embed(3, "sample"), "a run is a path, .* not 3"),  # type: ignore[arg-type]
    (lambda: embed("run", "sample", part="1/2"), r"part = '1/2' is not two whole numbers such as \(2, 8\)"),  # type: ignore[arg-type]
    (lambda: embed("run", "sample", part=None), "part = None is not two whole numbers"),  # type: ignore[arg-type]
    (lambda: embed("run", "sample", part=(1.0, 2)), "part = .* is not two whole numbers"),  # type: ignore[arg-type]
    (lambda: embed("run", "sample", part=(3, 2)), "There is no part 3 of 2"),
    (lambda: embed_to_file("run", "sample", None), "the output is a path, .* not None"),  # type: ignore[arg-type]
    (lambda: embed_part("run", "sample", None, (1, 2)), "the output is a path"),  # type: ignore[arg-type]
    (lambda: evaluate(None, "sample"), "a run is a path"),  # type: ignore[arg-type]
    (lambda: curate("run", "sample", 4), "the output is a path"),  # type: ignore[arg-type]
    (lambda: curate("run", "sample", "a.csv", picks="3"), "picks = '3' is not a whole number"),  # type: ignore[arg-type]
    (lambda: curate("run", "sample", "a.csv", seed=-4), "seed = -4 is not a whole number from 0 to 4294967295"),
    (lambda: compare("run"), "compare takes a list of run folders, not 'run'"),
    (lambda: compare(None), "compare takes a list of run folders, not None"),  # type: ignore[arg-type]
    (lambda: compare(["run", None]), "a run is a path, .* not None"),  # type: ignore[list-item]
    (lambda: export_encoder("run", "tim", "a"), "An encoder is exported to timm, onnx, torch, not to 'tim'"),  # type: ignore[arg-type]
    (lambda: export_encoder("run", "timm", None), "the output is a path"),  # type: ignore[arg-type]
    (lambda: pretrain(Config("sample"), views=3), r"views is a int, not two or more of them"),  # type: ignore[arg-type]
    (lambda: pretrain(Config("sample"), allow=3), "allow takes several names"),  # type: ignore[arg-type]
    (lambda: open_images([1, 2]), "item 0 of the list of images is a path, .* not 1"),
    (lambda: open_images(""), "images is a path, .* not ''"),
    (lambda: open_images("sample", channels="3"), "channels = '3' is not a whole number"),  # type: ignore[arg-type]
    (lambda: check("sample", "test"), "splits are other images by name"),  # type: ignore[arg-type]
    (lambda: write_report(None), "a run is a path"),  # type: ignore[arg-type]
    (lambda: BarlowTwinsLoss("a"), "lambda must be a number from 0 to 1e\\+30, given a"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "sentence"), WRONG, ids=[str(k) for k in range(len(WRONG))])
def test_a_wrong_kind_of_argument_is_one_sentence(
    call: Callable[[], Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        call()
    assert list(tmp_path.iterdir()) == []


def test_of_an_encoder_too(tiny: Callable[..., Config]) -> None:
    run = pretrain(tiny(steps=1), quiet=True)
    for batch_size in ("5", 2.5, 0):
        with pytest.raises(UserError, match=r"batch_size = .* is not a whole number of at least 1"):
            embed(run, "sample", batch_size=batch_size)  # type: ignore[arg-type]
    for labels, seed, sentence in ((None, 0, "labels is a path"), ("sample", -1, "seed = -1"), ("sample", "a", "seed")):
        with pytest.raises(UserError, match=sentence):
            evaluate(run, labels, seed=seed)  # type: ignore[arg-type]


def test_numbers_of_numpy_and_paths_as_texts_are_fine(tiny: Callable[..., Config], tmp_path: Path) -> None:
    run, output = pretrain(tiny(steps=1), quiet=True), tmp_path / "a.csv"
    assert as_whole(np.int64(7), "seed", 0) == 7
    few = np.zeros((4, 16, 16), np.uint8) + np.arange(4, dtype=np.uint8)[:, None, None]
    keys, _ = embed(str(run), few, part=(np.int64(1), np.int64(1)), batch_size=np.int32(2))  # type: ignore[arg-type]
    assert len(keys) == 4
    assert curate(run, few, str(output), picks=np.int64(2)).startswith("4 images")  # type: ignore[arg-type]
    assert output.is_file()
