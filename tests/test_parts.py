"""Embedding split over processes: the parts, joined, are the single run to the bit, however they came to be."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import blobs
from PIL import Image
from test_encoder import write

import barlow.parts
from barlow import embed
from barlow.embedding import embed_to_file, numbers
from barlow.errors import DataError, UserError
from barlow.parts import embed_part, parse_part

BATCH = 4


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("encoder"), channels=3)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """25 pictures of several sizes; one that no header shows to be broken, and one whose header is no picture's."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, picture in enumerate(blobs(25, size=40)):
        Image.fromarray(picture[: 20 + i]).convert("RGB").save(folder / f"{i:02d}.png")
    whole = (folder / "09.png").read_bytes()
    (folder / "09.png").write_bytes(whole[: len(whole) // 2])
    (folder / "words.jpg").write_text("this is no picture")
    return folder


@pytest.mark.parametrize(("count", "batch", "of"), [(25, 4, 3), (25, 4, 9), (1, 256, 3), (0, 4, 2), (1000, 256, 4)])
def test_every_image_is_in_one_part(count: int, batch: int, of: int) -> None:
    parts = [numbers(count, batch, (k, of)) for k in range(1, of + 1)]
    assert [i for part in parts for i in part] == list(range(count))
    assert all(part.start % batch == 0 for part in parts if part)


def test_parts_join_to_the_single_run(encoder: Path, images: Path, tmp_path: Path) -> None:
    """In any order of the parts, to the bit; read as one folder by pyarrow."""
    embed_to_file(encoder, images, tmp_path / "one.parquet", batch_size=BATCH)
    folder = tmp_path / "parts"
    done = [embed_part(encoder, images, folder, (k, 3), batch_size=BATCH) for k in (3, 1, 2)]
    assert [part.done for part in done] == [1, 2, 3]
    assert sum(part.rows for part in done) == 24
    one, joined = pq.read_table(tmp_path / "one.parquet"), pq.read_table(folder)
    assert joined["path"].to_pylist() == one["path"].to_pylist()
    a, b = (np.stack(table["embedding"].to_numpy()).view(np.uint32) for table in (one, joined))
    np.testing.assert_array_equal(a, b)
    assert joined.schema.field("embedding").type == pa.list_(pa.float32(), 16)


def test_parts_in_memory(encoder: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), np.uint8)
    keys, features = embed(encoder, array, batch_size=BATCH)
    parts = [embed(encoder, array, batch_size=BATCH, part=(k, 5)) for k in range(1, 6)]
    assert [key for some, _ in parts for key in some] == keys
    assert np.concatenate([some for _, some in parts]).tobytes() == features.tobytes()
    with pytest.raises(UserError, match="no part 6 of 5"):
        embed(encoder, array, part=(6, 5))


def test_a_part_is_kept_until_something_differs(encoder: Path, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "parts"

    def again(by: Path = encoder) -> tuple[bool, int]:
        part = embed_part(by, images, folder, (2, 3), batch_size=BATCH)
        return part.kept, part.done

    embed_part(encoder, images, folder, (1, 3), batch_size=BATCH)
    assert again() == (False, 2)
    path = folder / "part-002-of-003.parquet"
    first = path.read_bytes()
    assert again() == (True, 2)
    for damaged in (first[:-30], first[:200] + bytes([first[200] ^ 1]) + first[201:], b"", b"PAR1 no PAR1"):
        path.write_bytes(damaged)
        assert again() == (False, 2)
        assert path.read_bytes() == first
    other = Path(shutil.copytree(encoder, tmp_path / "other"))
    (other / "config.json").write_text((other / "config.json").read_text().replace('"test"', '"others"'))
    assert again(other) == (False, 1)  # the first part is of another encoder
    assert path.read_bytes() != first
    assert again() == (False, 2)
    Image.fromarray(blobs(1)[0]).save(images / "new.png")
    assert again() == (False, 1)


def test_an_array_that_has_changed(encoder: Path, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    kept = []
    for where in (None, 0, 7):  # only part 2 holds image 7
        if where is not None:
            array[where, 0, 0, 0] ^= 1
        np.save(tmp_path / "images.npy", array)
        kept.append(embed_part(encoder, tmp_path / "images.npy", tmp_path / "parts", (2, 2), batch_size=BATCH).kept)
    assert kept == [False, True, False]


def test_killed_half_way_and_repeated(encoder: Path, images: Path, tmp_path: Path) -> None:
    """Killed while it writes: nothing has the name of the part, and the next one sweeps up and is whole."""
    folder = tmp_path / "parts"
    program = f"""
import os, signal
from pathlib import Path
from barlow import embedding, parts
real = embedding._groups
def groups(rows):
    for some in real(rows):
        yield some
        os.kill(os.getpid(), signal.SIGKILL)
embedding._groups, embedding.GROUP = groups, 1
parts.embed_part({str(encoder)!r}, {str(images)!r}, Path({str(folder)!r}), (1, 2), batch_size={BATCH})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert [path.suffix for path in folder.iterdir()] == [".tmp"]
    part = embed_part(encoder, images, folder, (1, 2), batch_size=BATCH)
    assert (part.kept, part.done) == (False, 1)
    assert [path.name for path in folder.iterdir()] == ["part-001-of-002.parquet"]


@pytest.mark.parametrize("text", ["", "2", "0/3", "4/3", "a/b", "1/0", "-1/3", "1/3/2", "1.0/3", "٢/٣٣x"])
def test_wrong_parts(text: str) -> None:
    with pytest.raises(UserError, match=r"is not a part such as 2/8|There is no part"):
        parse_part(text)


def test_wrong_folders(encoder: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, words in ((tmp_path / "e.parquet", "give -o a folder"), (tmp_path / "file", "give -o a folder"),
                          (tmp_path / "none" / "parts", "make it first")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            embed_part(encoder, images, folder, (1, 2))
    embed_part(encoder, images, tmp_path / "parts", (1, 2))
    with pytest.raises(UserError, match="holds parts of 2, not of 3"):
        embed_part(encoder, images, tmp_path / "parts", (1, 3))


def test_two_processes_at_one_part_leave_each_other_alone(
    encoder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: the file of a process that is at work taken for one that was left over, and removed under its hands."""
    (tmp_path / "parts").mkdir()
    torn = tmp_path / "parts" / ".part-001-of-002.parquet.0123abcd.tmp"
    torn.write_bytes(b"PAR1")
    real, inner = barlow.parts.embed_images, []

    def interrupted(*given: Any) -> Any:
        for rows in real(*given):
            if not inner:
                inner.append(None)  # no further one inside the second
                inner[0] = embed_part(encoder, images, tmp_path / "parts", (1, 2), batch_size=BATCH)
            yield rows

    monkeypatch.setattr(barlow.parts, "embed_images", interrupted)
    first = embed_part(encoder, images, tmp_path / "parts", (1, 2), batch_size=BATCH)
    assert (first.rows, first.kept) == (inner[0].rows, inner[0].kept) == (11, False)
    assert [file.name for file in (tmp_path / "parts").iterdir()] == ["part-001-of-002.parquet"]


def test_what_another_user_left_over_stays(
    encoder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / ".part-001-of-002.parquet.0123abcd.tmp").write_bytes(b"PAR1")
    opened = Path.open

    def denied(path: Path, mode: str = "r", **more: Any) -> Any:
        if mode == "r+b":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, mode, **more)

    monkeypatch.setattr(Path, "open", denied)
    assert embed_part(encoder, images, tmp_path / "parts", (1, 2), batch_size=BATCH).rows == 11


def test_numbers_and_notes_of_ones_own_are_not_replaced(encoder: Path, images: Path, tmp_path: Path) -> None:
    """Kills: any two-dimensional .npy with a .txt beside it taken for an earlier output."""
    array, notes = tmp_path / "x.npy", tmp_path / "x.txt"
    for mine, text in ((np.zeros((3, 2)), "a\nb\nc\n"), (np.zeros((3, 2), np.float32), "my precious notes\n")):
        np.save(array, mine)
        notes.write_text(text)
        with pytest.raises(UserError, match=r"x\.npy"):
            embed_to_file(encoder, images, array)
        assert np.array_equal(np.load(array), mine)
        assert notes.read_text() == text
    array.unlink()
    notes.unlink()
    assert [embed_to_file(encoder, images, array) for _ in range(2)] == [24, 24]


def test_no_image_is_no_file(encoder: Path, images: Path, tmp_path: Path) -> None:
    for file in images.glob("*.png"):
        file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(DataError, match="none of the 25 images can be used"):
        embed_to_file(encoder, images, tmp_path / "x.parquet")
    with pytest.raises(DataError, match="none of the 25 images can be used"):
        embed_to_file(encoder, images, tmp_path / "x.npy")
    assert not list(tmp_path.glob("x.*"))
