"""Labels from class folders and from tables."""

from __future__ import annotations

import os
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
