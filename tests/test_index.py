"""An index keeps a run what it was."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus import encoded, folder_of, picture, same

from barlow import images as room
from barlow.errors import UserError
from barlow.guard import BadImage
from barlow.images import open_images, write_index
from barlow.index import WORDS, read, write

Array = np.ndarray[Any, np.dtype[Any]]


def test_an_index_keeps_a_run_what_it_was(tmp_path: Path) -> None:
    pictures = folder_of(tmp_path / "in", 4)
    corpus.write(tmp_path / "in", {"01b.png": b"broken"})
    write_index(open_images(tmp_path / "in"), tmp_path / "i.parquet")
    corpus.write(
        tmp_path / "in", {"00b.png": encoded(picture(seed=99), "PNG"), "grey.png": encoded(picture(channels=1), "PNG")}
    )
    again = open_images(tmp_path / "in", index=tmp_path / "i.parquet")
    same(again, pictures)
    assert again.bad["path"].to_pylist() == [b"01b.png"]
    write_index(again, tmp_path / "j.parquet")
    same(open_images(tmp_path / "in", index=tmp_path / "j.parquet"), pictures)
    (tmp_path / "in").rename(tmp_path / "moved")
    same(open_images(tmp_path / "moved", index=tmp_path / "i.parquet"), pictures)
    corpus.write(tmp_path / "moved", {"02.png": encoded(picture(9, 9), "PNG")})
    again = open_images(tmp_path / "moved", index=tmp_path / "i.parquet")
    with pytest.raises(BadImage, match="is 9×9 now and was 24×32 when it was indexed"):
        again.read(2)


def test_a_disk_without_room_for_the_index_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: "standard output cannot be written", as Arrow's error has no name."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("barlow.files.write_synced", full)
    images = open_images(np.zeros((4, 6, 6), np.uint8))
    with pytest.raises(OSError, match="No space left") as refused:
        write_index(images, tmp_path / "i.parquet")
    assert refused.value.filename == str(tmp_path / "i.parquet")
    assert list(tmp_path.iterdir()) == []


def test_index_of_an_array(tmp_path: Path) -> None:
    array = np.float32(picture(4 * 6, 6, 1)).reshape(4, 6, 6, 1)
    np.save(tmp_path / "a.npy", array)
    images = open_images(tmp_path / "a.npy")
    write_index(images, tmp_path / "i.parquet")
    np.testing.assert_array_equal(open_images(tmp_path / "a.npy", index=tmp_path / "i.parquet").array, images.array)
    write_index(open_images(tmp_path / "a.npy", channels=3), tmp_path / "j.parquet")
    assert open_images(tmp_path / "a.npy", index=tmp_path / "j.parquet").channels == 3
    for other in (array[:3], array[::-1]):
        np.save(tmp_path / "a.npy", other)
        with pytest.raises(UserError, match=r"has changed since .* \(4 images then\)"):
            open_images(tmp_path / "a.npy", index=tmp_path / "i.parquet")
    many = np.zeros((100, 4, 4), np.uint8)
    np.save(tmp_path / "a.npy", many)
    write_index(open_images(tmp_path / "a.npy"), tmp_path / "k.parquet")
    many[1] = 1  # of many images, too, each counts
    np.save(tmp_path / "a.npy", many)
    with pytest.raises(UserError, match="has changed since"):
        open_images(tmp_path / "a.npy", index=tmp_path / "k.parquet")
    np.save(tmp_path / "a.npy", array[:3])
    with pytest.raises(UserError, match=r"has changed since .* \(4 images then\)"):
        open_images(tmp_path / "a.npy", index=tmp_path / "i.parquet")


def test_files_that_are_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path / "in", 2)
    (tmp_path / "i.parquet").write_bytes(b"hello")
    with pytest.raises(UserError, match="not an index of images"):
        open_images(tmp_path / "in", index=tmp_path / "i.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "i.parquet")
    with pytest.raises(UserError, match="not an index of images"):
        open_images(tmp_path / "in", index=tmp_path / "i.parquet")
    write(pa.table({"path": [b"a"]}), {}, tmp_path / "i.parquet")
    with pytest.raises(UserError, match="lacks the columns bytes, height"):
        open_images(tmp_path / "in", index=tmp_path / "i.parquet")
    write_index(open_images(tmp_path / "in"), tmp_path / "i.parquet")
    monkeypatch.setattr(room, "RULE", 99)
    with pytest.raises(UserError, match="another version of barlow"):
        open_images(tmp_path / "in", index=tmp_path / "i.parquet")


def test_memory_of_an_index(tmp_path: Path) -> None:
    n = 100_000
    names = [b"class-%03d/2024/camera-%02d/IMG_%09d_%09d.jpg" % (k % 999, k % 50, k, k) for k in range(n)]
    rows = {"path": pa.array(names, pa.large_binary())}
    rows |= {name: pa.array(np.arange(n)) for name in ("bytes", "modified")}
    rows |= {name: pa.array([5] * n, pa.int32()) for name in ("width", "height")}
    rows |= {name: pa.array([word] * n, WORDS) for name, word in (("mode", "RGB"), ("status", "ok"))}
    settings = {"rule": room.RULE, "kind": "folder", "channels": 3, "dtype": "uint8", "value_range": (0.0, 1.0)}
    write(pa.table(rows), settings, tmp_path / "i.parquet")
    del rows, names
    before = pa.total_allocated_bytes()
    images = open_images(tmp_path, index=tmp_path / "i.parquet")
    held = pa.total_allocated_bytes() - before + images.sizes.nbytes
    assert len(images) == n
    assert held < 150 * n  # bytes: a million images in 150 MB
    assert read(tmp_path / "i.parquet")[1]["channels"] == 3
