"""Sources of every kind open as the same thing, bad images are replaced by rule, and an index keeps a run what it was."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus import encoded, npy, picture

from barlow import images as room
from barlow import sources
from barlow.convert import choose, convert, find_range
from barlow.errors import DataError, Stopped, UserError
from barlow.guard import BadImage
from barlow.images import Images, open_images, write_index
from barlow.index import WORDS, read, write
from barlow.labels import labels_from_csv, labels_from_folders
from barlow.quarantine import Quarantine, read_quarantine
from barlow.reading import replacements

Array = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BARLOW_CACHE", str(tmp_path / "store"))
    return tmp_path / "store"


def folder_of(path: Path, count: int = 12, **shape: int) -> list[Array]:
    """``count`` PNG files 00.png … and their pixels."""
    pictures = [picture(seed=k, **shape) for k in range(count)]
    corpus.write(path, {f"{k:02}.png": encoded(array, "PNG") for k, array in enumerate(pictures)})
    return pictures


def same(images: Images, arrays: list[Array]) -> None:
    assert len(images) == len(arrays)
    for i, array in enumerate(arrays):
        np.testing.assert_array_equal(images.read(i), array)
        assert tuple(images.sizes[i]) == array.shape[:2]
        assert images.channels == array.shape[2]
        assert images.read(i).flags.writeable


def keys(images: Images) -> list[str]:
    return [images.key(i) for i in range(len(images))]


# Sources


def test_folder_is_read_to_its_depth_in_the_order_of_bytes(tmp_path: Path) -> None:
    a, b, c = folder_of(tmp_path / "in", 3)
    corpus.write(tmp_path / "b", {"z.png": encoded(a, "PNG")})
    corpus.write(tmp_path / "a" / "deep" / "er", {"Z.PNG": encoded(b, "PNG"), "a.png": encoded(c, "PNG")})
    for name in ("00", "01", "02"):
        (tmp_path / "in" / f"{name}.png").unlink()
    images = open_images(tmp_path)
    assert keys(images) == ["a/deep/er/Z.PNG", "a/deep/er/a.png", "b/z.png"]
    same(images, [b, c, a])
    assert images.kind == "folder"
    assert images.array is None
    assert images.labels is None


def test_awkward_names_are_used_and_shown_apart(tmp_path: Path) -> None:
    good = encoded(picture(), "PNG")
    names = [b"with space.png", b"new\nline.png", b"\xff\xfe.png", b"\\xff\\xfe.png", b"\\.png", b"UPPER.PNG",
             b"Mixed.JpEg", "ünïcode \u2028 雪.png".encode(), b"no ending", b"png as.jpg", b"-dash.png", b"'q\".png",
             b"dots.in.name.png", b" .png", b"a" * 250 + b".png"]  # fmt: skip
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:  # noqa: PTH118, PTH123 - bytes
            file.write(good)
    images = open_images(tmp_path)
    assert len(images) == len(names)
    assert len(images.bad) == 0
    assert len(set(keys(images))) == len(names)
    assert all(key.isprintable() and key.encode() for key in keys(images))
    assert {"new\\x0aline.png", "\\xff\\xfe.png", "\\\\xff\\\\xfe.png"} <= set(keys(images))
    for i in range(len(images)):
        np.testing.assert_array_equal(images.read(i), picture())


def test_what_is_no_image_is_passed_over_and_counted(tmp_path: Path) -> None:
    folder_of(tmp_path, 2)
    others = {"._00.png": b"\0\5", ".DS_Store": b"x", ".hidden.png": b"x", "Thumbs.db": b"x", "notes.txt": b"x", "m.txt": b"",
              "README": b"read me", "clip.mp4": b"x"}  # fmt: skip
    corpus.write(tmp_path, others)
    corpus.write(tmp_path / ".cache", {"x.png": encoded(picture(), "PNG")})
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    images = open_images(tmp_path)
    assert keys(images) == ["00.png", "01.png"]
    assert images.passed_over == {".txt": 2, ".db": 1, ".mp4": 1, "no ending": 1}
    with pytest.raises(BadImage, match="not a regular file"):
        sources.read_bytes(os.fsencode(tmp_path / "pipe.png"))


def test_links_are_followed_once(tmp_path: Path) -> None:
    folder_of(tmp_path / "a", 1)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "other.png").symlink_to(tmp_path / "a" / "00.png")
    images = open_images(tmp_path)
    assert keys(images) == ["a/00.png", "other.png"]
    bad = dict(zip(images.bad["path"].to_pylist(), images.bad["status"].to_pylist(), strict=True))
    assert bad[b"nowhere.png"] == "cannot be read: No such file or directory"
    assert b"self.png" in bad


def test_list_of_paths(tmp_path: Path) -> None:
    pictures = folder_of(tmp_path / "in", 3)
    lines = ["# a comment", "in/02.png", "", str(tmp_path / "in" / "00.png") + "\r", "in/missing.png"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    images = open_images(tmp_path / "list.txt")
    same(images, [pictures[2], pictures[0]])
    assert images.bad["path"].to_pylist() == [b"in/missing.png"]
    same(open_images([tmp_path / "in" / "01.png", str(tmp_path / "in" / "00.png")]), [pictures[1], pictures[0]])
    same(open_images(tmp_path / "in" / "01.png"), [pictures[1]])


@pytest.mark.parametrize("with_channel_axis", [True, False])
def test_arrays_in_memory_and_on_disk(tmp_path: Path, with_channel_axis: bool) -> None:
    array = picture(5 * 6, 7, 1).reshape(5, 6, 7, 1)
    given = array if with_channel_axis else array[..., 0]
    np.save(tmp_path / "a.npy", given)
    np.savez(tmp_path / "a.npz", images=given, labels=np.arange(5, dtype=np.uint8))
    np.savez(tmp_path / "b.npz", anything=given)
    for source in (given, tmp_path / "a.npy", tmp_path / "a.npz", tmp_path / "b.npz", list(given)):
        images = open_images(source)
        same(images, list(array))
        assert images.kind == "array"
        assert keys(images) == ["0", "1", "2", "3", "4"]
        if not isinstance(source, list):
            assert images.array is not None
            np.testing.assert_array_equal(images.array, array)
    labels = open_images(tmp_path / "a.npz").labels
    assert labels is not None
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 1, 2, 3, 4]


def test_a_large_npy_stays_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = picture(5 * 6, 7, 3).reshape(5, 6, 7, 3)
    np.save(tmp_path / "a.npy", array)
    monkeypatch.setattr("barlow.arrays.IN_MEMORY", 10)
    images = open_images(tmp_path / "a.npy")
    assert images.array is None
    same(images, list(array))
    packed = pickle.dumps(images)
    same(pickle.loads(packed), list(array))
    assert array.tobytes() not in packed


def test_sample_is_an_array_source_with_labels() -> None:
    images = open_images("sample")
    assert (len(images), images.channels, images.dtype) == (8000, 1, "uint8")
    assert images.array is not None
    assert images.array.shape == (8000, 28, 28, 1)
    assert images.labels is not None
    assert np.bincount(images.labels).min() > 700


def test_arrays_of_many_sizes() -> None:
    arrays = [picture(4, 5), picture(9, 3), picture(1, 1)]
    same(open_images(arrays), arrays)


def test_tar_shards_are_read_by_offset(tmp_path: Path) -> None:
    pictures = [picture(seed=k) for k in range(6)]
    for shard in range(2):
        with tarfile.open(tmp_path / f"set-{shard:03}.tar", "w") as tar:
            for k in range(3 * shard, 3 * shard + 3):
                files = {f"d/{k:04}.png": encoded(pictures[k], "PNG"), f"d/{k:04}.cls": b"%d\n" % (k % 3)}
                for name, data in (files | {f"d/{k:04}.json": b"{}", f"d/._{k:04}.png": b"x"}).items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, BytesIO(data))
    for source in (tmp_path, str(tmp_path / "set-{000..001}.tar")):
        images = open_images(source)
        same(images, pictures)
        assert keys(images)[4] == "set-001.tar/d/0004.png"
        assert images.labels is not None
        assert images.labels.tolist() == [0, 1, 2, 0, 1, 2]
        assert images.kind == "tar"
        assert images.passed_over == {".json": 6}
    write_index(images, tmp_path / "i.parquet")
    same(open_images(tmp_path, index=tmp_path / "i.parquet"), pictures)
    same(open_images(tmp_path / "set-001.tar"), pictures[3:])


def parquet(path: Path, pictures: list[Array], first: int = 0, plain: bool = False) -> None:
    data = [encoded(array, "PNG") for array in pictures]
    values = data if plain else [{"bytes": d, "path": None} for d in data]
    kind = pa.binary() if plain else pa.struct({"bytes": pa.binary(), "path": pa.string()})
    labels = pa.array(range(first, first + len(data)), pa.int64())
    pq.write_table(
        pa.table({"id": ["x"] * len(data), "image": pa.array(values, kind), "label": labels}), path, row_group_size=2
    )


@pytest.mark.parametrize("plain", [True, False])
def test_parquet_with_an_image_column(tmp_path: Path, store: Path, plain: bool) -> None:
    pictures = [picture(seed=k) for k in range(5)]
    (tmp_path / "data").mkdir()
    parquet(tmp_path / "data" / "train-00000-of-00002.parquet", pictures[:3], 0, plain)
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet", pictures[3:], 3, plain)
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", pictures[:1], 9, plain)
    images = open_images(tmp_path / "data")
    same(images, pictures)
    assert keys(images)[3] == "train-00001-of-00002.parquet/0"
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 2, 3, 4]
    assert images.passed_over == {"other splits": 1}
    write_index(images, tmp_path / "i.parquet")
    for copied in store.iterdir():  # a store that was cleaned is filled again
        for file in copied.iterdir():
            file.unlink()
        copied.rmdir()
    same(open_images(tmp_path / "data", index=tmp_path / "i.parquet"), pictures)
    same(open_images(tmp_path / "data" / "test-00000-of-00001.parquet"), pictures[:1])


def test_hugging_face_folder_as_saved_to_disk(tmp_path: Path) -> None:
    pictures = [picture(seed=k) for k in range(3)]
    (tmp_path / "train").mkdir()
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    table = pa.table({"image": pa.array([{"bytes": encoded(p, "PNG"), "path": None} for p in pictures])})
    with (
        pa.OSFile(str(tmp_path / "train" / "data-00000-of-00001.arrow"), "wb") as out,
        pa.ipc.new_stream(out, table.schema) as w,
    ):
        w.write_table(table)
    same(open_images(tmp_path), pictures)
    same(open_images(tmp_path / "train"), pictures)


def test_table_that_names_files(tmp_path: Path) -> None:
    pictures = folder_of(tmp_path / "in", 2)
    rows = [{"bytes": None, "path": "in/01.png"}, {"bytes": encoded(pictures[0], "PNG"), "path": "in/00.png"}]
    pq.write_table(pa.table({"image": rows}), tmp_path / "t.parquet")
    same(open_images(tmp_path / "t.parquet"), [pictures[1], pictures[0]])


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_pairs_have_channels_of_their_own(tmp_path: Path, ending: str) -> None:
    colour = folder_of(tmp_path / "rgb", 4)
    deep = [picture(seed=9 + k, channels=5) for k in range(4)]
    corpus.write(tmp_path / "bands", {f"{k}.npy": npy(array) for k, array in enumerate(deep)} | {"2.npy": b"broken"})
    table = pa.table(
        {"n": ["7"] * 4, "before": [f"rgb/{k:02}.png" for k in range(4)], "after": [f"bands/{k}.npy" for k in range(4)]}
    )
    if ending == "csv":
        rows = [",".join(row.values()) for row in table.to_pylist()]
        (tmp_path / "t.csv").write_text("\n".join(["n,before,after", *rows]))
    else:
        pq.write_table(table, tmp_path / "t.parquet")
    images = open_images(tmp_path / f"t.{ending}")
    write_index(images, tmp_path / "i.parquet")
    for pairs in (images, open_images(tmp_path / f"t.{ending}", index=tmp_path / "i.parquet")):
        assert pairs.second is not None
        assert (pairs.channels, pairs.second.channels) == (3, 5)
        same(pairs, [colour[0], colour[1], colour[3]])
        same(pairs.second, [deep[0], deep[1], deep[3]])
        assert pairs.bad["status"].to_pylist()[0].startswith("its partner: ")
    (tmp_path / "bands" / "1.npy").unlink()
    (first, second), used, bad = images.read_pair_or_replace(1)
    assert used != 1
    assert bad is not None
    np.testing.assert_array_equal(first, images.read(used))
    assert images.second is not None
    np.testing.assert_array_equal(second, images.second.read(used))


def test_csv_without_a_line_of_names(tmp_path: Path) -> None:
    pictures = folder_of(tmp_path, 2)
    (tmp_path / "t.csv").write_text("01.png,4\n00.png,5\n")
    same(open_images(tmp_path / "t.csv"), [pictures[1], pictures[0]])


# One kind of array


@pytest.mark.parametrize(
    ("modes", "kind"),
    [
        ({"L": 5}, (1, "uint8")),
        ({"L": 999, "RGB": 1}, (3, "uint8")),
        ({"1": 1, "LA": 1}, (1, "uint8")),
        ({"P animated": 1}, (3, "uint8")),
        ({"uint16x13": 3, "RGB": 2}, (13, "uint16")),
        ({"I;16": 3, "L": 1}, (1, "uint16")),
        ({"I;16": 1, "L": 3}, (1, "uint8")),
        ({"F": 1}, (1, "float32")),
        ({"uint8x4": 1, "uint8x5": 1}, (5, "uint8")),
    ],
)
def test_channels_and_numbers_are_chosen_from_the_data(modes: dict[str, int], kind: tuple[int, str]) -> None:
    assert choose(modes) == kind


def test_conversion_between_kinds() -> None:
    grey = np.uint8([[[0], [255]]])
    assert convert(grey, 3, "uint8").tolist() == [[[0] * 3, [255] * 3]]
    assert convert(grey, 1, "uint16").tolist() == [[[0], [65535]]]
    assert convert(grey, 1, "float32").tolist() == [[[0.0], [1.0]]]
    assert convert(np.uint16([[[65535], [257]]]), 1, "uint8").tolist() == [[[255], [1]]]
    colour = np.uint8([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]]])
    assert convert(colour, 1, "uint8").tolist() == [[[76], [150], [29], [9]]]  # ITU-R 601-2
    np.testing.assert_allclose(convert(colour, 1, "float32")[0, :, 0], [0.299, 0.587, 0.114, 9 / 255], atol=1e-4)
    real = np.float32([[[-10], [0], [10], [99]]])
    assert convert(real, 1, "float32", (-10, 10)).tolist() == [[[0], [0.5], [1], [1]]]
    assert convert(real, 1, "uint8", (-10, 10)).tolist() == [[[0], [128], [255], [255]]]
    with pytest.raises(BadImage, match="has 4 channels where the data set has 3"):
        convert(picture(channels=4), 3, "uint8")


def test_range_of_float_images(tmp_path: Path) -> None:
    assert find_range([np.float32([[[0.2], [1.0]]])]) == (0.0, 1.0)
    assert find_range([np.full((2, 2, 1), 7, np.float32)]) == (7.0, 8.0)
    ramp = np.linspace(-100, 300, 10001, dtype=np.float32).reshape(1, -1, 1)
    assert find_range([ramp[:, :256]])[0] == pytest.approx(-100, abs=1)
    arrays = [np.float32(picture(seed=k)) * 10 - 500 for k in range(3)]
    corpus.write(tmp_path / "in", {f"{k}.npy": npy(a) for k, a in enumerate(arrays)})
    images = open_images(tmp_path / "in")
    assert images.dtype == "float32"
    low, high = images.value_range
    assert -505 < low < -400
    assert 1500 < high < 2100
    read = np.stack([images.read(i) for i in range(3)])
    assert (read.min(), read.max()) == (0, 1)
    np.testing.assert_allclose(read, np.clip((np.stack(arrays) - low) / (high - low), 0, 1), atol=1e-6)
    whole = open_images(np.stack(arrays))
    assert whole.value_range == (low, high)
    np.testing.assert_array_equal(whole.array, read)
    write_index(images, tmp_path / "i.parquet")
    assert open_images(tmp_path / "in", index=tmp_path / "i.parquet").value_range == (low, high)
    assert open_images(tmp_path / "in", value_range=(0, 10)).value_range == (0, 10)


def test_given_channels(tmp_path: Path) -> None:
    folder_of(tmp_path / "in", 2)
    grey = open_images(tmp_path / "in", channels=1)
    assert grey.read(0).shape == (24, 32, 1)
    assert open_images(picture()[None], channels=1).read(0).shape == (24, 32, 1)
    corpus.write(tmp_path / "in", {"odd.npy": npy(picture(channels=4))})
    mixed = open_images(tmp_path / "in")
    assert (len(mixed), mixed.channels) == (2, 3)
    assert mixed.bad["status"].to_pylist() == ["has 4 channels where the data set has 3"]
    four = open_images(tmp_path / "in", channels=4)
    assert keys(four) == ["odd.npy"]


# The user's mistakes: one sentence each

BAD_SOURCES: dict[str, tuple[dict[str, bytes], str, str]] = {
    "no such place": ({}, "nothing here", "there is no file or folder .*nothing here"),
    "empty folder": ({}, "", "no images in"),
    "folder of other things": ({"a.txt": b"x", "b.mp4": b"x"}, "", r"no images in .*passed over: 1 \.mp4, 1 \.txt|1 \.txt, 1 \.mp4"),
    "only broken images": ({"a.jpg": b"<html>"}, "", "none of the 1 images .* a.jpg: a web page, not an image"),
    "a text file renamed": ({"a.jpg": b"hello"}, "a.jpg", "a.jpg: text, not an image"),
    "an empty file": ({"a.png": b""}, "a.png", "a.png: an empty file"),
    "an empty list": ({"a.txt": b"\n# only this\n"}, "a.txt", "no images in .*a.txt"),
    "a list that is none": ({"a.bin": b"\0\1\2\0"}, "a.bin", "neither an image nor a text file of paths"),
    "a list of files that are gone": ({"a.txt": b"b.png\nc.png"}, "a.txt", "none of the 2 images .* b.png: cannot be read"),
    "pickled array": ({"a.npy": npy(np.array([{}, None]), allow_pickle=True)}, "a.npy", "pickled objects, which are not loaded"),
    "pickled file": ({"a.npy": pickle.dumps([1])}, "a.npy", "pickled objects, which are not loaded"),
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
    "csv without paths": ({"a.csv": b"a,b\n1,2\n"}, "a.csv", "one column of image paths, or two for pairs; it has none"),
    "csv with three": ({"a.csv": b"a.png,b.png,c.png\n"}, "a.csv", "it has 3"),
    "ragged csv": ({"a.csv": b"a,b\n1,2\n3\n"}, "a.csv", "row 3 of .* another number of columns"),
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
    with pytest.raises(UserError, match="channels must be 1 or more"):
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


# Faults of disks


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


# The index


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
    with pytest.raises(BadImage, match="is 9×9 now and was 24×32 when it was indexed"):
        again = open_images(tmp_path / "moved", index=tmp_path / "i.parquet")
        again.read(2)


def test_index_of_an_array(tmp_path: Path) -> None:
    array = np.float32(picture(4 * 6, 6, 1)).reshape(4, 6, 6, 1)
    np.save(tmp_path / "a.npy", array)
    images = open_images(tmp_path / "a.npy")
    write_index(images, tmp_path / "i.parquet")
    np.testing.assert_array_equal(open_images(tmp_path / "a.npy", index=tmp_path / "i.parquet").array, images.array)
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
    rows = {
        "path": pa.array([b"class-%03d/2024/camera-%02d/IMG_%09d_%09d.jpg" % (k % 999, k % 50, k, k) for k in range(n)], pa.large_binary()),
        "bytes": pa.array(np.arange(n)), "modified": pa.array(np.arange(n)), "width": pa.array([5] * n, pa.int32()),
        "height": pa.array([4] * n, pa.int32()), "mode": pa.array(["RGB"] * n, WORDS), "status": pa.array(["ok"] * n, WORDS),
    }  # fmt: skip
    settings = {"rule": room.RULE, "kind": "folder", "channels": 3, "dtype": "uint8", "value_range": (0.0, 1.0)}
    write(pa.table(rows), settings, tmp_path / "i.parquet")
    del rows
    before = pa.total_allocated_bytes()
    images = open_images(tmp_path, index=tmp_path / "i.parquet")
    held = pa.total_allocated_bytes() - before + images.sizes.nbytes
    assert len(images) == n
    assert held < 150 * n  # bytes: a million images in 150 MB
    assert read(tmp_path / "i.parquet")[1]["channels"] == 3


# Bad images in a run


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
        Quarantine(open_images(tmp_path / "in"), None).start()
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
    with pytest.raises(DataError, match=r"00.png cannot be read \(an empty file\), nor can 100 others"):
        images.read_or_replace(0)


def test_quarantine_records_each_file_once(tmp_path: Path) -> None:
    folder_of(tmp_path / "in", 300)
    corpus.write(tmp_path / "in", {"page.jpg": b"<html>", "new\nline.png": b""})
    images, file = open_images(tmp_path / "in"), tmp_path / "quarantine.jsonl"
    (tmp_path / "in" / "05.png").write_bytes(corpus.good_files()["colour.png"][:-500])
    for _ in range(2):  # the second time as a resume
        quarantine = Quarantine(images, file)
        quarantine.start()
        for _ in range(2):
            _, _, bad = images.read_or_replace(5)
            quarantine.add(150, [None, bad, bad])
    rows = read_quarantine(file)
    assert [row["path"] for row in rows] == ["new\\x0aline.png", "page.jpg", "05.png"]
    assert [row["reason"] for row in rows] == ["an empty file", "a web page, not an image", "image file is truncated"]
    assert [row["found"] for row in rows] == ["header", "header", "pixels"]
    whole = (tmp_path / "in" / "05.png").read_bytes()
    assert rows[2]["sha256"] == hashlib.sha256(whole).hexdigest()
    assert rows[2]["bytes"] == len(whole)
    with file.open("a") as out:
        out.write('{"path": "cut o')  # a crash while writing
    quarantine = Quarantine(images, file)
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
    quarantine = Quarantine(images, None, max_bad)
    seen, count = steps[0]
    if not stops:
        quarantine.add(seen, bads(images, count))
        return
    with pytest.raises(DataError) as stop:
        quarantine.add(seen, bads(images, count))
    assert stop.value.exit_code == 3
    assert f"The first: {', '.join(str(k) for k in range(min(count, 10)))}" in str(stop.value)


def test_headers_and_pixels_count_together(tmp_path: Path) -> None:
    folder_of(tmp_path / "in", 194, height=2, width=2)
    corpus.write(tmp_path / "in", {f"x{k}.png": b"" for k in range(6)})  # 3 %
    images = open_images(tmp_path / "in")
    quarantine = Quarantine(images)
    quarantine.start()
    quarantine.add(194, bads(images, 4))  # 2 %: 5 % in all
    with pytest.raises(DataError, match="11 images of 200"):
        quarantine.add(0, bads(images, 5))
    with pytest.raises(DataError, match=r"max_bad = 0\.01"):
        Quarantine(images, None, 0.01).start()
    with pytest.raises(UserError, match="share between 0 and 1"):
        Quarantine(images, None, 5)


# Other processes


WORKERS = """
import hashlib, multiprocessing, sys
from barlow.images import open_images

def look(images):
    digest = hashlib.sha256()
    for i in range(len(images)):
        array, used, bad = images.read_or_replace(i)
        digest.update(array.tobytes() + repr((used, bad)).encode())
    return digest.hexdigest()

if __name__ == "__main__":
    images = open_images(sys.argv[1])
    open(sys.argv[1] + "/02.png", "wb").close()
    seen = {look(images)}
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            seen |= set(pool.map(look, [images] * 2))
    print(len(seen))
"""


def test_worker_processes_read_the_same_under_fork_and_spawn(tmp_path: Path) -> None:
    folder_of(tmp_path / "in", 5)
    (tmp_path / "workers.py").write_text(WORKERS)
    command = [sys.executable, "-W", "error", str(tmp_path / "workers.py"), str(tmp_path / "in")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_what_a_worker_receives_is_small(tmp_path: Path) -> None:
    folder_of(tmp_path / "in", 50)
    images = open_images(tmp_path / "in")
    assert len(pickle.dumps(images)) < 20_000


# Labels


def test_labels_from_folders(tmp_path: Path) -> None:
    for name in ("dog", "cat"):
        folder_of(tmp_path / name / "deep", 2)
    labels, names = labels_from_folders(open_images(tmp_path))
    assert (labels.tolist(), names) == ([0, 0, 1, 1], ["cat", "dog"])
    corpus.write(tmp_path, {"loose.png": encoded(picture(), "PNG")})
    with pytest.raises(UserError, match="1 of 5 images lie in no class folder, for example loose.png"):
        labels_from_folders(open_images(tmp_path))
    with pytest.raises(UserError, match="need a folder of images"):
        labels_from_folders(open_images("sample"))


def test_labels_from_csv(tmp_path: Path) -> None:
    folder_of(tmp_path / "in" / "a", 3)
    images = open_images(tmp_path / "in")
    table = tmp_path / "l.csv"
    table.write_text(f"path,label\na/00.png,10\n02.png,9\n{tmp_path}/in/a/01.png,10\n")
    labels, names = labels_from_csv(table, images)
    assert (labels.tolist(), names) == ([1, 1, 0], ["9", "10"])
    table.write_text("a/00.png,x\na/01.png,y\na/02.png,x\n")
    assert labels_from_csv(table, images)[0].tolist() == [0, 1, 0]
    table.write_text("a/00.png,x\na/01.png,y\nb/77.png,x\n")
    with pytest.raises(
        UserError,
        match=r"1 images have no label, for example a/02.png and 1 labels belong to no image, for example b/77",
    ):
        labels_from_csv(table, images)
    table.write_text("a/00.png,x\na/00.png,y\n")
    with pytest.raises(UserError, match="two labels, x and y"):
        labels_from_csv(table, images)
    table.write_text("a/00.png\n")
    with pytest.raises(UserError, match="has 1 column"):
        labels_from_csv(table, images)


def test_a_file_name_that_two_images_share_does_not_decide(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder_of(tmp_path / "in" / name, 1)
    (tmp_path / "l.csv").write_text("path,label\n00.png,1\n")
    with pytest.raises(UserError, match="2 images have no label"):
        labels_from_csv(tmp_path / "l.csv", open_images(tmp_path / "in"))
