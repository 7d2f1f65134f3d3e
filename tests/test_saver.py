from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch

from barlow import checkpoint
from barlow.checkpoint import SaveFailed, load
from barlow.errors import NumbersError
from barlow.saver import Saver


def there(folder: Path) -> list[str]:
    return sorted(path.name.removeprefix("step-").lstrip("0") for path in folder.iterdir() if path.name != "latest")


def test_what_is_saved_is_what_was_there_at_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    real = checkpoint.write_files
    monkeypatch.setattr(checkpoint, "write_files", lambda *a: (gate.wait(20), real(*a)))
    base = torch.arange(6.0).reshape(2, 3)
    tensors = {"model/x": base, "model/row": base[1], "model/turned": base.t(), "model/scalar": base[0, 0]}
    want = {name: tensor.clone() for name, tensor in tensors.items()}
    with Saver(tmp_path, last=1) as saver:
        for step in (1, 2):
            saver.save(step, tensors, {})
            base.fill_(9.0)
            gate.set()
        saver.join()
        assert (saver.seconds > 0, saver.stalled > 0) == (True, True)
        assert there(tmp_path) == ["2"]
        base.fill_(float("nan"))
        with pytest.raises(NumbersError):
            saver.save(3, tensors, {})
    assert load(tmp_path / "step-000000002").tensors["model/row"].tolist() == [9.0, 9.0, 9.0]
    gate.clear()
    base.copy_(want["model/x"])
    with Saver(tmp_path, last=1) as saver:
        saver.save(4, tensors, {})
        base.fill_(9.0)
        gate.set()
    back = load(tmp_path / "step-000000004").tensors
    assert all(torch.equal(back[name], want[name]) for name in want)


def test_an_error_in_the_background_comes_up_once_where_it_can_be_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    saver = Saver(tmp_path, last=1)
    saver.save(1, {"model/x": torch.ones(2)}, {})
    saver.join()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_synced", full)
        saver.save(2, {"model/x": torch.ones(2)}, {})
        with pytest.raises(SaveFailed, match="No space left on device"):
            saver.join()
        saver.join()
        with pytest.raises(KeyError), saver:  # noqa: PT012 - the error of the body is the one told
            saver.save(2, {"model/x": torch.ones(2)}, {})
            raise KeyError
        with pytest.raises(SaveFailed), saver:
            saver.save(2, {"model/x": torch.ones(2)}, {})
        saver.save(2, {"model/x": torch.ones(2)}, {})
        assert saver._thread is not None
        saver._thread.join()
    with pytest.raises(SaveFailed, match="step 2"):
        saver.save(3, {"model/x": torch.ones(2)}, {})  # tells of the one before, and is the retry itself
    saver.join()
    assert there(tmp_path) == ["3"]


def test_the_name_of_the_best_is_written_by_the_next_save_where_the_disk_refused_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: "[Errno 28] No space left on device: '…/best'" as a warning; a best checkpoint that nobody names."""

    def full(path: Path, _: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    saver, tensors = Saver(tmp_path, last=1), {"model/x": torch.ones(2)}
    with monkeypatch.context() as patch:
        patch.setattr("barlow.saver.atomic_write", full)
        saver.save(1, tensors, {}, best=1)
        with pytest.raises(
            SaveFailed, match=r"^could not save the name of the best checkpoint in .*: No space left on"
        ):
            saver.join()
    for step in (2, 3):
        saver.save(step, tensors, {}, best=1)
    saver.join()
    assert (tmp_path / "best").read_text() == "step-000000001\n"
    assert there(tmp_path) == ["1", "3", "best"]
    saver.save(4, tensors, {}, best=4)
    saver.join()
    assert (tmp_path / "best").read_text() == "step-000000004\n"
