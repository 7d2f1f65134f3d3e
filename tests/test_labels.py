"""Labels from class folders and from tables."""

from __future__ import annotations

import functools
import os
import unicodedata
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import pytest
from corpus import encoded, folder_of, picture

from barlow.errors import UserError
from barlow.images import open_images
from barlow.labels import bad_in_csv, labels_from_csv, labels_from_folders, named_in_csv

Array = np.ndarray[Any, np.dtype[Any]]


def test_labels_from_folders(tmp_path: Path) -> None:
    for name in ("dog", "cat"):
        folder_of(tmp_path / name / "deep", 2)
    labels, names = labels_from_folders(open_images(tmp_path))
    assert (labels.tolist(), names) == ([0, 0, 1, 1], ["cat", "dog"])
    corpus.write(tmp_path, {"loose.png": encoded(picture(), "PNG")})
    with pytest.raises(UserError, match=r"1 of 5 images lie in no class folder, for example loose.png"):
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
        match=r"1 images have no label, for example a/02.png and 1 rows belong to no image, for example b/77",
    ):
        labels_from_csv(table, images)
    table.write_text("a/00.png,x\na/01.png,y\n")
    with pytest.raises(UserError, match=r"1 images have no label, for example a/02.png; bring"):
        labels_from_csv(table, images)
    table.write_text("a/00.png,x\na/01.png,y\na/02.png,y\nb/77.png,x\n")
    with pytest.raises(UserError, match=r": 1 rows belong to no image, for example b/77.png; bring"):
        labels_from_csv(table, images)
    table.write_text("a/00.png,x\na/00.png,y\n")
    with pytest.raises(UserError, match="two labels, x and y"):
        labels_from_csv(table, images)
    table.write_text("a/00.png\n")
    with pytest.raises(UserError, match="has 1 column"):
        labels_from_csv(table, images)


def test_a_table_may_name_a_few_of_many(tmp_path: Path) -> None:
    folder_of(tmp_path / "in" / "a", 3)
    images, table = open_images(tmp_path / "in"), tmp_path / "l.csv"
    table.write_text("path,label\na/02.png,x\na/00.png,y\n")
    assert named_in_csv(table, images).tolist() == [0, 2]
    table.write_text("path,label\nb/02.png,x\n".replace("02", "77"))
    with pytest.raises(UserError, match=r"none of the paths in .*, such as b/77.png, is one of the 3 images"):
        named_in_csv(table, images)


def test_a_file_name_that_two_images_share_does_not_decide(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder_of(tmp_path / "in" / name, 1)
    (tmp_path / "l.csv").write_text("path,label\n00.png,1\n")
    with pytest.raises(UserError, match="2 images have no label"):
        labels_from_csv(tmp_path / "l.csv", open_images(tmp_path / "in"))


def test_a_table_as_spreadsheets_write_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of(tmp_path / "in" / "a", 4)
    images, table = open_images(tmp_path / "in"), tmp_path / "l.csv"
    rows = [
        ("path", "label"),
        ("C:\\pics\\in\\a\\00.png", "cat "),
        ("a/01.png", '"dog; big"'),
        ("02.png", " cat"),
        ("03.png", ""),
    ]
    for encoding in ("utf-8-sig", "utf-16"):
        for comma in (";", "\t", ","):
            table.write_text("\n".join(comma.join(row) for row in rows) + "\n", encoding=encoding)
            assert named_in_csv(table, images).tolist() == [0, 1, 2], (encoding, comma)
            assert f"1 rows of {table} have no label" in capsys.readouterr().err
    table.write_text("".join(f"a/{k:02d}.png,{'cat ' if k % 2 else 'cat'}\n" for k in range(4)))
    assert labels_from_csv(table, images)[1] == ["cat"]
    table.write_text("path,label\n00.png,\n01.png, \n")
    with pytest.raises(UserError, match=r"no row of .* has a label"):
        named_in_csv(table, images)


def test_a_tsv_is_split_at_its_tabs(tmp_path: Path) -> None:
    """Kills: a .tsv split at the comma in the name of a column or of a file."""
    folder_of(tmp_path / "in", 2)
    images, table = open_images(tmp_path / "in"), tmp_path / "l.TSV"
    for text in (
        "path\tlabel\tseen by, when\n00.png\tcat\tJo, May\n01.png\tdog\tAl\n",
        "00.png\tcat, big\n01.png\tdog\n",
    ):
        table.write_text(text)
        assert labels_from_csv(table, images)[0].tolist() == [0, 1]
    table.write_text("path,label\n00.png,cat\n01.png,dog\n")  # no tab at all
    assert labels_from_csv(table, images)[1] == ["cat", "dog"]


def test_labels_that_are_not_utf_8_are_refused_and_such_paths_are_not(tmp_path: Path) -> None:
    """Kills: hours of work that end where the name of a class cannot be written down."""
    folder_of(tmp_path / "in", 2)
    (tmp_path / "in" / "00.png").rename(tmp_path / "in" / os.fsdecode(b"caf\xe9.png"))
    images, table = open_images(tmp_path / "in"), tmp_path / "l.csv"
    for text in (
        b"path,label\n01.png,caf\xe9\ncaf\xe9.png,tea\n",
        b"path,label,split\n01.png,a,t\xe9st\ncaf\xe9.png,b,train\n",
    ):
        table.write_bytes(text)
        column = "split" if b"split" in text else None
        with pytest.raises(UserError, match=r"^the labels of .*l.csv are not UTF-8: save it as UTF-8$"):
            labels_from_csv(table, images, column)
    table.write_bytes(b"path,label\n01.png,caf\xe9\n")
    with pytest.raises(UserError, match=r"are not UTF-8"):
        named_in_csv(table, images)
    table.write_bytes(b"path,label\n01.png,coffee\ncaf\xe9.png,tea\n")
    assert labels_from_csv(table, images)[1] == ["coffee", "tea"]
    table.write_text("path,label\n01.png,caf\u00e9\n")
    assert named_in_csv(table, images).tolist() == [0]


def test_bad_images_that_a_table_labels(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "a"
    folder.mkdir(parents=True)
    corpus.write(folder, {f"{k}.png": encoded(picture(), "PNG")[: 20 if k else None] for k in range(5)})
    images, table = open_images(tmp_path / "in"), tmp_path / "l.csv"
    table.write_text(f"path,label\na/0.png,x\n./a/2.png,x\n{tmp_path}/in/a/4.png,y\na/3.png,\n")
    named = images.bad.take(bad_in_csv(table, images))["path"].to_pylist()
    assert named == [b"a/2.png", b"a/4.png"]


def test_which_column_holds_the_labels_is_never_guessed(tmp_path: Path) -> None:
    folder_of(tmp_path / "in", 2)
    images, table = open_images(tmp_path / "in"), tmp_path / "l.csv"
    table.write_text("number,picture,species\n1,00.png,cat\n2,01.png,dog\n")
    with pytest.raises(UserError, match="has the columns number, picture, species: name the one with the labels"):
        labels_from_csv(table, images)
    table.write_text("number,picture,Label\n1,00.png,cat\n2,01.png,dog\n")
    assert labels_from_csv(table, images)[1] == ["cat", "dog"]
    table.write_text("picture,split,species\n00.png,train,cat\n01.png,test,dog\n")
    assert labels_from_csv(table, images)[1] == ["cat", "dog"]


def test_a_row_that_names_a_folder_labels_no_image_of_another(tmp_path: Path) -> None:
    """Classes are often numbered from 0 each. Kills: the label of an image that is gone on one of the same name."""
    corpus = tmp_path / "in"
    folder_of(corpus / "sound", 4)
    folder_of(corpus / "scratch", 2)
    (corpus / "sound" / "03.png").rename(corpus / "03.png")
    rows = "scratch/00.png,s\nscratch/01.png,s\nsound/00.png,o\nsound/01.png,o\nsound/02.png,o\n"
    table = tmp_path / "l.csv"
    for gone in ("scratch/02.png", "data/scratch/02.png", "scratch/03.png", "sound/03.png"):
        table.write_text(f"path,label\n{rows}{gone},s\n")
        with pytest.raises(UserError, match=f"1 rows belong to no image, for example {gone}.*bring the images back"):
            labels_from_csv(table, open_images(corpus))
    table.write_text(f"path,label\n{rows}photos/03.png,o\n")  # a folder that the source does not have
    assert labels_from_csv(table, open_images(corpus))[1] == ["o", "s"]


def test_two_paths_that_could_be_one_image_do_not_decide(tmp_path: Path) -> None:
    folder_of(tmp_path / "site_b", 2)
    images, table = open_images(tmp_path / "site_b"), tmp_path / "l.csv"
    rows = [f"site_{site}/0{k}.png,{site}{k}\n" for site in "ab" for k in range(2)]
    table.write_text("".join(rows))
    with pytest.raises(UserError, match=r"two labels, a0 and b0 \(in the rows site_a/00.png and site_b/00.png\)"):
        labels_from_csv(table, images)
    folder_of(tmp_path / "deep" / "x" / "y", 2)
    table.write_text("old/y/00.png,1\nx/y/01.png,2\nolder/z/00.png,3\n")
    with pytest.raises(UserError, match=r"2 rows belong to no image, for example old/y/00.png"):
        labels_from_csv(table, open_images(tmp_path / "deep"))


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_an_accent_may_be_written_either_way(tmp_path: Path, forms: tuple[str, str]) -> None:
    """macOS writes é as e and an accent. Kills: such a table belongs to no image; a folder that is not known again."""
    of_files, of_table = (functools.partial(unicodedata.normalize, form) for form in forms)
    folder = tmp_path / "in"
    for name in ("été/00.png", "été/ü.png", "b/01.png", "b/broken ä.png"):
        (folder / of_files(name)).parent.mkdir(parents=True, exist_ok=True)
        (folder / of_files(name)).write_bytes(encoded(picture(), "PNG")[: 20 if "broken" in name else None])
    images, table = open_images(folder), tmp_path / "l.csv"
    rows = "path,label\nété/00.png,x\nü.png,y\nb/01.png,z\nbroken ä.png,z\n"
    table.write_text(of_table(rows), "utf-8")
    labels, names = labels_from_csv(table, images)
    assert {images.key(i): names[labels[i]] for i in range(3)} == {
        of_files("été/00.png"): "x", of_files("été/ü.png"): "y", "b/01.png": "z"
    }  # fmt: skip
    assert bad_in_csv(table, images).tolist() == [0]
    table.write_text(of_table(f"{rows}été/01.png,z\n"), "utf-8")  # is not b/01.png
    with pytest.raises(UserError, match="1 rows belong to no image, for example "):
        labels_from_csv(table, images)


def test_names_that_differ_in_the_writing_of_an_accent_alone_stay_apart(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    both = [unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD")]
    for name in both:
        (folder / name).write_bytes(encoded(picture(), "PNG"))
    if len(list(folder.iterdir())) < 2:
        pytest.skip("this file system does not tell them apart")
    images, table = open_images(folder), tmp_path / "l.csv"
    table.write_text(f"path,label\n{both[0]},c\n{both[1]},d\n", "utf-8")
    labels, names = labels_from_csv(table, images)
    assert {images.key(i): names[labels[i]] for i in range(2)} == dict(zip(both, "cd", strict=True))


def test_names_without_their_ending(tmp_path: Path) -> None:
    """Kills: a table of wells, A01 for plate 1/A01.tif, that belongs to no image, with no word on why."""
    good = encoded(picture(), "PNG")
    folder = tmp_path / "in"
    for plate in ("p 1", "p 2"):
        (folder / plate).mkdir(parents=True)
    corpus.write(folder, {"p 1/A01.png": good, "p 1/A02.v2.png": good, "p 1/A03": good, "p 1/A04.png": good[:20]})
    images, table = open_images(folder), tmp_path / "l.csv"
    table.write_text("well,dye\nA01,x\np 1/A02.v2,y\nA03,z\nA04,z\n")
    assert labels_from_csv(table, images)[0].tolist() == [0, 1, 2]
    assert bad_in_csv(table, images).tolist() == [0]
    table.write_text("path,label\nA01.tif,x\nA02,x\nA03.v2,x\n")  # another ending; not the whole name
    with pytest.raises(UserError, match=r"such as A01.tif, is one of the 3 images: give the folder"):
        named_in_csv(table, images)
    for more in ("p 1/A01.tif", "p 2/A01.png"):  # which of the two?
        corpus.write(folder, {more: good})
        table.write_text("path,label\nA01,x\n")
        with pytest.raises(UserError, match=r"such as A01, .*images: write names in full, such as p 1/A01.png, give"):
            named_in_csv(table, open_images(folder))
        table.write_text("path,label\nA03,y\nA01,x\n")
        with pytest.raises(UserError, match=r"for example A01; bring the images back, write names in full, such as"):
            labels_from_csv(table, open_images(folder))
        (folder / more).unlink()


def test_broken_images_count_where_a_name_must_be_the_only_one(tmp_path: Path) -> None:
    """Kills: the label of a broken image on another one that has its name; a broken image named without its folder
    that is none of the images."""
    good = encoded(picture(), "PNG")
    for name in "ab":
        (tmp_path / "in" / name).mkdir(parents=True)
    corpus.write(tmp_path / "in", {"a/0.png": good[:20], "b/0.png": good, "b/1.png": good, "b/2.png": good[:20]})
    images, table = open_images(tmp_path / "in"), tmp_path / "l.csv"
    table.write_text("path,label\n0.png,x\n1.png,y\n")
    with pytest.raises(UserError, match=r"1 images have no label, for example b/0.png and 1 rows .* example 0.png"):
        labels_from_csv(table, images)
    table.write_text("path,label\nb/0.png,x\n1.png,y\n2.png,y\n")
    assert labels_from_csv(table, images)[0].tolist() == [0, 1]
    assert [images.bad["path"][i].as_py() for i in bad_in_csv(table, images).tolist()] == [b"b/2.png"]
