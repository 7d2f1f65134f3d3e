"""Mistakes in one sentence; broken files replaced by rule, written down, and the end of a run when they are many."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import pytest
from corpus import folder_of, npy, picture

from barlow import images as room
from barlow import sources
from barlow.errors import DataError, Stopped, UserError
from barlow.guard import BadImage
from barlow.images import Images, open_images
from barlow.quarantine import MAX_BAD, Quarantine, read_quarantine
from barlow.reading import Bad, replacements

Array = np.ndarray[Any, np.dtype[Any]]


BAD_SOURCES: dict[str, tuple[dict[str, bytes], str, str]] = {
    "no such place": ({}, "nothing here", "there is no file or folder .*nothing here"),
    "empty folder": ({}, "", "no images in"),
    "folder of other things": ({"a.txt": b"x", "b.mp4": b"x"}, "", r"no images in .* \(passed over: 1 \.(mp4|txt), 1"),
    "only broken images": ({"a.jpg": b"<html>"}, "", "none of the 1 images .* a.jpg: a web page, not an image"),
    "a text file renamed": ({"a.jpg": b"hello"}, "a.jpg", "a.jpg: text, not an image"),
    "an empty file": ({"a.png": b""}, "a.png", "a.png: an empty file"),
    "an empty list": ({"a.txt": b"\n# only this\n"}, "a.txt", "no images in .*a.txt"),
    "a zip": ({"a.zip": b"PK\x03\x04\0\0"}, "a.zip", "is a compressed archive: unpack it"),
    "a spreadsheet": ({"a.xlsx": b"PK\x03\x04\0\0"}, "a.xlsx", "is a spreadsheet: save it as CSV"),
    "a compressed tar": ({"a.tar.gz": b"\x1f\x8b\0\0"}, "a.tar.gz", "is a compressed archive: unpack it"),
    "a list that is none": ({"a.bin": b"\0\1\2\0"}, "a.bin", "neither an image nor a text file of paths"),
    "a microscope's file": ({"a.czi": b"ZISRAWFILE\0\0"}, "a.czi", "paths: save them as TIFF first, for example with"),
    "only DICOM": ({"a.DCM": b"x", "b.txt": b"x"}, "", r"passed over: 1 .*: save their pixels as 16-bit TIFF or .npy"),
    "only HEIC": ({"a.heic": b"x"}, "", r"passed over: 1 .heic\): save them as PNG, JPEG or TIFF first"),
    "complex numbers": ({"a.npy": npy(np.ones((4, 4), complex))}, "", "is no image; save its magnitude"),
    "a list of files that are gone": ({"a.txt": b"b.png\nc.png"}, "a.txt", "first, b.png: cannot be read"),
    "pickled array": ({"a.npy": npy(np.array([{}, None]), allow_pickle=True)}, "a.npy", "pickled objects, which"),
    "pickled file": ({"a.npy": pickle.dumps([1])}, "a.npy", "pickled objects, which"),
    "empty npy": ({"a.npy": b""}, "a.npy", "cannot be read as an array"),
    "cut npy": ({"a.npy": npy(np.zeros((3, 4, 5)))[:-9]}, "a.npy", "cannot be read as an array"),
    "npz that is none": ({"a.npz": b"hello"}, "a.npz", "cannot be read as an array"),
    "wrong shape": ({"a.npy": npy(np.zeros((3, 4, 5, 6, 7)))}, "a.npy", r"shape \(3, 4, 5, 6, 7\)"),
    "channels first": ({"a.npy": npy(np.zeros((9, 3, 32, 32)))}, "a.npy", r"channels first: transpose it"),
    "words": ({"a.npy": npy(np.array([[["a"]]]))}, "a.npy", "type <U1"),
    "none in it": ({"a.npy": npy(np.zeros((0, 4, 4)))}, "a.npy", "holds no images"),
    "no number finite": ({"a.npy": npy(np.full((2, 4, 4), np.nan))}, "a.npy", "holds no finite number"),
    "cut tar": ({"a.tar": b"hello" * 200}, "a.tar", "not a whole, uncompressed tar"),
    "empty csv": ({"a.csv": b""}, "a.csv", "a.csv is empty"),
    "csv without paths": ({"a.csv": b"a,b\n1,2\n"}, "a.csv", "one column of image paths, .* it has none"),
    "csv with three": ({"a.csv": b"a.png,b.png,c.png\n"}, "a.csv", "it has 3"),
    "ragged csv": ({"a.csv": b"a,b\n1,2\n3\n"}, "a.csv", "row 3 of .* another number of columns"),
    "a run": ({"config.toml": b"", "index.parquet": b"PAR1"}, "", "is the folder of a run, not of images: give the"),
    "broken parquet": ({"a.parquet": b"PAR1 and no more"}, "a.parquet", "cannot be read as a table"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_mistakes_in_one_sentence(tmp_path: Path, name: str) -> None:
    files, source, sentence = BAD_SOURCES[name]
    corpus.write(tmp_path, files)
    with pytest.raises(UserError, match=sentence) as mistake:
        open_images(tmp_path / source)
    assert "\n" not in str(mistake.value)
    assert len(str(mistake.value)) < 400


def test_more_mistakes(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 3, 3)), y=np.zeros((2, 3, 3)))
    with pytest.raises(UserError, match="holds x, y: name the array of images 'images'"):
        open_images(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 3, 3)), labels=np.zeros(3, int))
    with pytest.raises(UserError, match=r"labels in .* shape \(3,\)"):
        open_images(tmp_path / "a.npz")
    with pytest.raises(UserError, match="channels = 0 is not a whole number"):
        open_images("sample", channels=0)
    with pytest.raises(UserError, match="has 1 channels where the data set has 4"):
        open_images("sample", channels=4)
    with pytest.raises(UserError, match="item 1 of the list"):
        open_images([picture(), np.zeros(3)])
    with pytest.raises(UserError, match="no images"):
        open_images([])
    folder_of(tmp_path / "in", 2)
    with pytest.raises(UserError, match="can have 7 channels"):
        open_images(tmp_path / "in", channels=7)


def test_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path, 1)

    def refuse(path: bytes) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cannot be listed \(Permission denied\): give this user the right"):
        open_images(tmp_path)


@pytest.mark.parametrize("faults", [1, 3, 4])
def test_passing_faults_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: int) -> None:
    images_of = folder_of(tmp_path / "in", 2)
    images, waits, real, left = open_images(tmp_path / "in"), [], os.open, [faults]

    def flaky(path: bytes, *args: Any, **options: Any) -> int:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", flaky)
    monkeypatch.setattr("time.sleep", waits.append)
    if faults < 4:
        np.testing.assert_array_equal(images.read(0), images_of[0])
        assert waits == list(sources.WAITS[:faults])
    else:
        with pytest.raises(BadImage, match="cannot be read: Input/output error"):
            images.read(0)


def test_a_vanished_source_stops_the_run_and_does_not_blame_its_images(tmp_path: Path) -> None:
    folder_of(tmp_path / "in", 2)
    images = open_images(tmp_path / "in")
    (tmp_path / "in").rename(tmp_path / "out")
    with pytest.raises(Stopped, match="is gone: bring it back and resume") as stop:
        images.read(0)
    assert stop.value.exit_code == 75


def corpus_run(folder: Path) -> tuple[list[bytes], list[int], set[str]]:
    images = open_images(folder)
    out = [images.read_or_replace(i) for i in range(len(images))]
    bad = {b.key for _, _, b in out if b is not None} | {k.decode() for k in images.bad["path"].to_pylist()}
    return [array.tobytes() for array, _, _ in out], [used for _, used, _ in out], bad


def test_a_run_over_the_corpus_completes_with_the_same_bits(tmp_path: Path) -> None:
    broken = corpus.broken_files()
    assert len(broken) >= 200
    corpus.write(tmp_path / "in", broken)
    folder_of(tmp_path / "in" / "good", 30)
    pixels, used, bad = corpus_run(tmp_path / "in")
    assert bad == set(broken)
    assert corpus_run(tmp_path / "in") == (pixels, used, bad)
    with pytest.raises(DataError) as stop:
        Quarantine(open_images(tmp_path / "in"), tmp_path / "quarantine.jsonl", MAX_BAD).start()
    assert str(stop.value).count(",") >= 9  # ten names


def test_replacements_depend_on_the_number_alone() -> None:
    assert replacements(5, 1000) == replacements(5, 1000)
    assert replacements(5, 1000)[:5] != replacements(6, 1000)[:5]
    assert all(0 <= k < 7 for k in replacements(3, 7))
    spread = np.bincount([replacements(i, 10)[0] for i in range(2000)], minlength=10)
    assert 140 < spread.min() < spread.max() < 270  # 200 each, within 4.5 sd


def test_nothing_left_to_replace_with(tmp_path: Path) -> None:
    folder_of(tmp_path / "in", 2)
    images = open_images(tmp_path / "in")
    for file in (tmp_path / "in").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"00.png cannot be read \(an empty file\), nor can 1 more that"):
        images.read_or_replace(0)


def test_quarantine_records_each_file_once(tmp_path: Path) -> None:
    folder_of(tmp_path / "in", 300)
    corpus.write(tmp_path / "in", {"page.jpg": b"<html>", "new\nline.png": b""})
    images, file = open_images(tmp_path / "in"), tmp_path / "quarantine.jsonl"
    (tmp_path / "in" / "05.png").write_bytes(corpus.good_files()["colour.png"][:-500])
    for _ in range(2):  # the second time as a resume
        quarantine = Quarantine(images, file, MAX_BAD, 300)
        quarantine.start()
        for _ in range(2):
            _, _, bad = images.read_or_replace(5)
            quarantine.add([bad, bad])
    rows = read_quarantine(file)
    assert [row["path"] for row in rows] == ["new\\x0aline.png", "page.jpg", "05.png"]
    assert [row["reason"] for row in rows] == ["an empty file", "a web page, not an image", "image file is truncated"]
    assert [row["found"] for row in rows] == ["header", "header", "pixels"]
    whole = (tmp_path / "in" / "05.png").read_bytes()
    assert rows[2]["sha256"] == hashlib.sha256(whole).hexdigest()
    assert rows[2]["bytes"] == len(whole)
    with file.open("a") as out:
        out.write('{"path": "cut o')  # a crash while writing
    quarantine = Quarantine(images, file, MAX_BAD)
    assert len(quarantine.written) == 3
    assert [json.loads(line)["path"] for line in file.read_text().splitlines()] == [row["path"] for row in rows]


def bads(images: Images, count: int) -> list[Any]:
    return [room.Bad(k, images.key(k), "an empty file") for k in range(count)]


@pytest.mark.parametrize(
    ("total", "steps", "max_bad", "stops"),
    [
        (1000, [(100, 5)], 0.05, False),
        (1000, [(100, 6)], 0.05, True),
        (1000, [(20, 5)], 0.05, False),  # a share of twenty says little yet
        (1000, [(20, 6)], 0.05, True),  # but six are more than 5 of the first hundred can be
        (1000, [(400, 20)], 0.05, False),
        (1000, [(400, 21)], 0.05, True),
        (1000, [(99, 99)], 1.0, False),
        (1000, [(100, 100)], 1.0, True),
        (1000, [(100, 99)], 1.0, False),
        (40, [(40, 2)], 0.05, False),
        (40, [(40, 3)], 0.05, True),
        (40, [(40, 1)], 0.0, True),
    ],
)
def test_the_rule_for_too_many(
    tmp_path: Path, total: int, steps: list[tuple[int, int]], max_bad: float, stops: bool
) -> None:
    images = open_images(np.zeros((total, 2, 2, 1), np.uint8))
    seen, count = steps[0]
    quarantine = Quarantine(images, tmp_path / "quarantine.jsonl", max_bad, seen)
    if not stops:
        quarantine.add(bads(images, count))
        return
    with pytest.raises(DataError) as stop:
        quarantine.add(bads(images, count))
    assert stop.value.exit_code == 3
    assert f"The first: {', '.join(str(k) for k in range(min(count, 10)))}" in str(stop.value)


def test_headers_and_pixels_count_together(tmp_path: Path) -> None:
    folder_of(tmp_path / "in", 194, height=2, width=2)
    corpus.write(tmp_path / "in", {f"x{k}.png": b"" for k in range(6)})  # 3 %
    images = open_images(tmp_path / "in")
    quarantine = Quarantine(images, tmp_path / "quarantine.jsonl", MAX_BAD)
    quarantine.start()
    quarantine.seen = 194
    quarantine.add(bads(images, 4))  # 2 %: 5 % in all
    with pytest.raises(DataError, match="11 images of 200"):
        quarantine.add(bads(images, 5))
    with pytest.raises(DataError, match=r"max_bad = 0\.01"):
        Quarantine(images, tmp_path / "other.jsonl", 0.01).start()


def test_images_looked_at_are_counted_by_their_headers_at_first(tmp_path: Path) -> None:
    folder_of(tmp_path / "in", 8)
    corpus.write(tmp_path / "in", {"x.png": b"", "y.png": b""})
    with pytest.raises(DataError, match=r"2 images of 10 looked at cannot be used, .* The first: x.png, y.png"):
        Quarantine(open_images(tmp_path / "in"), tmp_path / "quarantine.jsonl", 0.1).start()


def test_a_resume_judges_the_images_that_it_has_seen(tmp_path: Path) -> None:
    """Those written down in steps that are lost count when they are met again. Kills: a killed run with a few broken
    images that no resume can continue, as all of them stand against none seen."""
    images = open_images(np.zeros((1000, 4, 4), np.uint8))
    bad = [[Bad(32 * step, f"{32 * step}", "broken")] for step in range(20)]  # 3 % of each batch of 32

    def go(first: int, last: int) -> Quarantine:
        quarantine = Quarantine(images, tmp_path / "quarantine.jsonl", 0.05, 32 * first)
        for step in range(first, last):
            quarantine.seen = 32 * step
            quarantine.add(bad[step])
        return quarantine

    whole = go(0, 20)
    for first in (0, 7):
        again = Quarantine(images, tmp_path / "quarantine.jsonl", 0.05, 32 * first)
        assert len(again.bad) == first + 1  # of the next step already, as when it is met
        assert go(first, 20).bad == whole.bad
    assert len(read_quarantine(tmp_path / "quarantine.jsonl")) == 20


# The file of a run whose disk is full, fails, or has damaged it


class Refusing:
    """The disk under one file: while ``error`` is set it takes ``first`` bytes of what is written, and no more."""

    def __init__(self, patch: pytest.MonkeyPatch, file: Path) -> None:
        self.error, self.first, opened = 0, 0, Path.open

        def open_(path: Path, mode: str = "r", *words: Any, **more: Any) -> Any:
            made: Any = opened(path, mode, *words, **more)
            return Half(made, self) if path == file and "a" in mode else made

        patch.setattr(Path, "open", open_)


class Half:
    def __init__(self, file: Any, disk: Refusing) -> None:
        self.file, self.disk = file, disk

    def write(self, data: bytes) -> int:
        if not self.disk.error:
            return int(self.file.write(data))
        if not self.disk.first:
            raise OSError(self.disk.error, os.strerror(self.disk.error))
        taken, self.disk.first = int(self.file.write(data[: self.disk.first])), 0
        return taken

    def __enter__(self) -> Half:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("first", [0, 10])
def test_rows_that_find_no_room_wait_for_the_next_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: int, first: int
) -> None:
    """Kills: a run that ends, unsaved, because the disk is full when it meets a broken image; half a row that swallows
    the next one; a warning at each try."""
    images, file = open_images(np.zeros((1000, 4, 4), np.uint8)), tmp_path / "quarantine.jsonl"
    disk, quarantine = Refusing(monkeypatch, file), Quarantine(images, file, MAX_BAD, 500)
    quarantine.add(bads(images, 1))
    disk.error, disk.first = error, first
    for count in (2, 3):
        quarantine.add(bads(images, count))
    quarantine.append()
    why = os.strerror(error)
    assert capsys.readouterr().err == f"warning: quarantine.jsonl waits for the disk ({why})\n"
    assert [row["path"] for row in read_quarantine(file)] == ["0"]
    quarantine.append(last=True)
    assert capsys.readouterr().err == f"warning: the last rows of {file} found no room ({why})\n"
    disk.error = 0
    quarantine.append()
    assert [json.loads(line)["path"] for line in file.read_text().splitlines()] == ["0", "1", "2"]


@pytest.mark.parametrize(("error", "kind", "code", "remedy"), [
    (errno.ENOSPC, Stopped, 75, "Make room, or mend the disk, then give the same command again."),
    (errno.EIO, Stopped, 75, "Make room, or mend the disk"), (errno.EACCES, UserError, 2, "or give another --out"),
])  # fmt: skip
def test_a_disk_that_refuses_before_the_first_step_ends_the_run_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, kind: type[Stopped | UserError], code: int, remedy: str
) -> None:
    """Kills: "standard output cannot be written"; a traceback."""
    folder_of(tmp_path / "in", 2)
    corpus.write(tmp_path / "in", {"page.jpg": b"<html>"})
    file = tmp_path / "quarantine.jsonl"
    Refusing(monkeypatch, file).error = error
    with pytest.raises(kind, match=f"quarantine.jsonl cannot be written: {os.strerror(error)}.*{remedy}") as stop:
        Quarantine(open_images(tmp_path / "in"), file, 0.5).start()
    assert stop.value.exit_code == code
    with pytest.raises(UserError, match="cannot be written: Is a directory; move it away"):
        Quarantine(open_images(tmp_path / "in"), tmp_path / "in", 0.5)


ROW = b'{"path": "05.png", "reason": "broken", "found": "pixels", "seen": 0, "bytes": 1, "sha256": null}\n'


@pytest.mark.parametrize(("data", "lost", "kept"), [
    (ROW[:20], 1, 0), (bytes(64), 1, 0), (ROW + bytes(64), 1, 1), (ROW + ROW[:20], 1, 1), (ROW[:-1], 0, 1),
    (b"\xff\xfe\x80 \xc3(", 1, 0), (b"[1, 2]\n" + ROW, 1, 1), (b'{"a": 1}\n' + ROW, 1, 1), (b"", 0, 0),
    (ROW + b'{"path": 1, "reason": "", "found": ""}\nnull\n' + b"[" * 100_000 + b"\n", 3, 1),
    (ROW + ROW.replace(b": 0", b': "0"'), 1, 1),
], ids=range(11))  # fmt: skip
def test_a_damaged_quarantine_is_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes, lost: int, kept: int
) -> None:
    """Kills: a traceback at the resume; a torn line that swallows the next row; images whose rows are lost for good."""
    folder_of(tmp_path / "in", 300)
    corpus.write(tmp_path / "in", {"page.jpg": b"<html>"})
    images, file = open_images(tmp_path / "in"), tmp_path / "quarantine.jsonl"
    file.write_bytes(data)
    quarantine = Quarantine(images, file, MAX_BAD, 300)
    said = f"warning: {lost} damaged line{'s' * (lost > 1)} of {file} had to be removed\n" if lost else ""
    assert capsys.readouterr().err == said
    assert len(quarantine.bad) == kept
    quarantine.add([Bad(7, "07.png", "broken")])
    paths = [json.loads(line)["path"] for line in file.read_text().splitlines()]
    assert paths == [*["05.png"] * kept, "page.jpg", "07.png"]
    again = Quarantine(images, file, MAX_BAD, 300)
    again.add([])
    assert again.written == set(paths)
    assert len(read_quarantine(file)) == len(paths)
    assert capsys.readouterr().err == ""
