"""Tar shards, tables of images and tables of pairs open like folders."""

from __future__ import annotations

import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from corpus import encoded, folder_of, keys, npy, picture, same

from barlow.errors import DataError, UserError
from barlow.images import open_images, write_index

Array = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BARLOW_CACHE", str(tmp_path / "store"))
    return tmp_path / "store"


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


def test_tables_of_one_name_in_several_folders(tmp_path: Path) -> None:
    """As data sets of several parts are converted. Kills: two images of one name, of which features know but one."""
    pictures = folder_of(tmp_path / "in", 4)
    for k, part in enumerate("ab"):
        rows = [{"bytes": encoded(picture, "PNG"), "path": None} for picture in pictures[2 * k : 2 * k + 2]]
        (tmp_path / "set" / part).mkdir(parents=True)
        pq.write_table(pa.table({"image": rows}), tmp_path / "set" / part / "0000.parquet")
    images = open_images(tmp_path / "set")
    assert [images.key(i) for i in range(4)] == [f"{part}/0000.parquet/{k}" for part in "ab" for k in range(2)]
    same(images, pictures)


def test_a_table_that_names_files_is_moved_with_them(tmp_path: Path) -> None:
    """Kills: files looked for, or worse found, where the table lay when it was first read."""
    pictures = folder_of(tmp_path / "old" / "in", 2)
    pq.write_table(pa.table({"image": [{"bytes": None, "path": f"in/0{k}.png"} for k in range(2)]}),
                   tmp_path / "old" / "t.parquet")  # fmt: skip
    same(open_images(tmp_path / "old"), pictures)
    (tmp_path / "old").rename(tmp_path / "new")
    folder_of(tmp_path / "old" / "in", 4)  # others lie there now
    same(open_images(tmp_path / "new"), pictures)


def test_many_channel_tiffs_in_a_folder(tmp_path: Path) -> None:
    """Kills: a header that is read from memory only, never from an open file."""
    bands = [picture(seed=k, channels=13) for k in range(3)]
    tmp_path.joinpath("in").mkdir()
    for k, array in enumerate(bands):
        tifffile.imwrite(tmp_path / "in" / f"{k}.tif", array, photometric="minisblack", planarconfig="contig")
    same(open_images(tmp_path / "in"), bands)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_pairs_have_channels_of_their_own(tmp_path: Path, ending: str) -> None:
    colour = folder_of(tmp_path / "rgb", 5)
    deep = [picture(seed=9 + k, channels=5) for k in range(5)]
    corpus.write(tmp_path / "bands", {f"{k}.npy": npy(array) for k, array in enumerate(deep)} | {"2.npy": b"broken"})
    corpus.write(tmp_path / "rgb", {"04.png": b"broken"})
    before, after = [f"rgb/{k:02}.png" for k in range(5)], [f"bands/{k}.npy" for k in range(5)]
    table = pa.table({"n": ["7"] * 5, "before": before, "after": after})
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
        assert pairs.second.bad["status"].to_pylist()[1].startswith("its partner: ")
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


def test_pairs_of_which_none_is_whole(tmp_path: Path) -> None:
    folder_of(tmp_path / "in", 2)
    corpus.write(tmp_path / "in", {"x.png": b"broken", "y.png": b""})
    (tmp_path / "t.csv").write_text("in/00.png,in/x.png\nin/y.png,in/01.png\n")
    with pytest.raises(DataError, match="of 2 pairs there is none"):
        open_images(tmp_path / "t.csv")


def test_labels_of_some_images_are_labels_of_none(tmp_path: Path) -> None:
    values = [{"bytes": encoded(picture(seed=k), "PNG"), "path": None} for k in range(2)]
    pq.write_table(pa.table({"image": values, "label": pa.array([1, None])}), tmp_path / "t.parquet")
    assert open_images(tmp_path / "t.parquet").labels is None


def tables(folder: Path, *columns: str) -> Path:
    """A folder of one Parquet file a column, each with two images."""
    folder.mkdir()
    for k, column in enumerate(columns):
        data = [encoded(picture(seed=2 * k + j), "PNG") for j in range(2)]
        pq.write_table(pa.table({column: data}), folder / f"{k}.parquet")
    return folder


def test_tables_that_do_not_fit_together_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1.parquet has no column 'image' as .*0.parquet has, but pixels: give"):
        open_images(tables(tmp_path / "other", "image", "pixels"))
    torn = tables(tmp_path / "torn", "image", "image")
    (torn / "1.parquet").write_bytes((torn / "1.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"1.parquet cannot be read as a table .*: fetch it again"):
        open_images(torn)
    pq.write_table(pa.table({"thumb": [b"x"], "full": [b"y"]}), tmp_path / "two.parquet")
    with pytest.raises(UserError, match="has 2 columns of bytes, thumb, full: name the one with the images 'image'"):
        open_images(tmp_path / "two.parquet")


def test_a_shard_that_was_cut_never_loses_images_unsaid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kills: tarfile's way to take half a header, or nothing, for the end."""
    file, ends = tmp_path / "a.tar", []
    with tarfile.open(file, "w") as tar:
        for k in range(3):
            data = encoded(picture(seed=k), "PNG")
            info = tarfile.TarInfo(f"{k}.png")
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
            ends.append(tar.offset)
    whole = file.read_bytes()
    assert len(open_images(file)) == 3
    assert capsys.readouterr().err == ""
    for cut, words in ((ends[1] + 100, "in the middle of a name"), (ends[1] + 700, "is not a whole")):
        file.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=words):
            open_images(file)
    file.write_bytes(whole[: ends[1]])
    assert len(open_images(file)) == 2
    assert "has no end mark; compare its length" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_list_in_the_encodings_of_windows(tmp_path: Path, encoding: str) -> None:
    """Kills: the mark of the encoding taken for a part of the first path."""
    pictures = folder_of(tmp_path / "ünï", 2)
    (tmp_path / "l.txt").write_text("ünï/01.png\r\nünï/00.png\r\n", encoding=encoding)
    same(open_images(tmp_path / "l.txt"), [pictures[1], pictures[0]])
