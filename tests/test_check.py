"""The report before a run names what is wrong with a pile of images, and nothing else."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import pytest
from corpus import encoded, npy
from PIL import Image

from barlow import check as room
from barlow.check import check, measured
from barlow.check_table import rows
from barlow.config import Config
from barlow.duplicates import SOME, near_groups, near_partners, normalised, same, thumbnail
from barlow.errors import DataError, UserError
from barlow.images import open_images
from barlow.prepare import look
from barlow.survey import long_images, show_choices

Array = np.ndarray[Any, np.dtype[Any]]


def scene(seed: int, height: int = 60, width: int = 80) -> Array:
    """A smooth picture in colour: large blobs, as photographs have."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def scenes(folder: Path, count: int = 20, first: int = 0) -> None:
    corpus.write(folder, {f"{k:02}.png": encoded(scene(first + k), "PNG") for k in range(count)})


def test_a_clean_pile(tmp_path: Path) -> None:
    scenes(tmp_path)
    report = check(tmp_path)
    assert report["images"] == 20
    assert report["modes"] == {"RGB": 20}
    assert report["height"] == {"least": 60, "median": 60, "most": 60}
    for finding in ("unreadable", "tiny", "constant", "exact_duplicates", "near_duplicates"):
        assert report[finding]["count"] == 0, finding
    assert (report["usable"], report["problems"], report["leaks"]) == (True, [], [])
    pixels = np.stack([scene(k) for k in range(20)]).reshape(-1, 3) / 255
    np.testing.assert_allclose(report["mean"], pixels.mean(0), atol=1e-4)
    np.testing.assert_allclose(report["sd"], pixels.std(0), atol=1e-4)


def test_each_finding(tmp_path: Path) -> None:
    scenes(tmp_path, 40)
    first = Image.fromarray(scene(0))
    grey = scene(200).mean(2, dtype=np.float64).astype(np.uint8)[..., None].repeat(3, 2)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "copy.png": encoded(scene(3), "PNG"),
        "copy2.png": encoded(scene(3), "PNG"),
        "again.jpg": encoded(first.resize((40, 30)), "JPEG", quality=70),
        "brighter.png": encoded(first.point(lambda v: int(v * 0.8 + 30)), "PNG"),
        "tiny.png": encoded(scene(100, 7, 9), "PNG"),
        "black.png": encoded(np.zeros((60, 80, 3), np.uint8), "PNG"),
        "white.jpg": encoded(np.full((60, 80, 3), 255, np.uint8), "JPEG"),
        "grey.png": encoded(grey, "PNG"),
        "page.jpg": b"<html>",
        "cut.png": encoded(scene(101), "PNG")[:-300],
        "turned.jpg": encoded(scene(102), "JPEG", exif=exif),
        "notes.txt": b"x",
    }
    corpus.write(tmp_path, files)
    report = check(tmp_path)
    assert report["images"] == 49
    assert report["unreadable"]["examples"] == [
        "page.jpg: a web page, not an image",
        "cut.png: image file is truncated",
    ]
    assert report["tiny"]["examples"] == ["tiny.png: 7×9"]
    assert report["constant"]["examples"] == ["black.png", "white.jpg"]
    assert report["grey_saved_as_colour"] == 3  # black and white are grey too
    assert report["exact_duplicates"] == {"count": 2, "groups": 1, "examples": ["03.png = copy.png = copy2.png"]}
    assert report["near_duplicates"]["examples"] == ["00.png = again.jpg = brighter.png"]
    assert report["near_duplicates"]["count"] == 2
    assert (report["turned"], report["animated"], report["passed_over"]) == (1, 0, {".txt": 1})
    assert report["modes"] == {"RGB": 49, "RGB turned": 1}
    assert report["usable"]
    assert json.loads(json.dumps(report)) == report
    table = dict(rows(report))
    assert table["exact duplicates"] == "2 (03.png = copy.png = copy2.png …)"
    assert table["unreadable"].startswith("2 (page.jpg: a web page")
    assert table["height"] == "7 to 80, half of them up to 60"


def test_leaks_between_all_splits(tmp_path: Path) -> None:
    scenes(tmp_path / "train", 20)
    scenes(tmp_path / "val", 5, first=50)
    scenes(tmp_path / "test", 5, first=60)
    corpus.write(tmp_path / "val", {"a.png": encoded(scene(7), "PNG")})
    corpus.write(
        tmp_path / "test", {"b.jpg": encoded(scene(8), "JPEG", quality=60), "c.png": encoded(scene(52), "PNG")}
    )
    report = check(tmp_path / "train", {"val": tmp_path / "val", "test": tmp_path / "test"})
    found = {tuple(leak["between"]): (leak["exact"]["examples"], leak["near"]["examples"]) for leak in report["leaks"]}
    assert found == {
        ("images", "val"): (["07.png = a.png"], []),
        ("images", "test"): ([], ["08.png = b.jpg"]),
        ("val", "test"): (["02.png = c.png"], []),
    }
    assert len(report["problems"]) == 3
    assert report["problems"][0] == "images and val share 1 images: results on one would be too good"
    assert report["usable"]
    assert dict(rows(report))["images and val: same"] == "1 (07.png = a.png)"


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"a.png": encoded(scene(0), "PNG")}, "1 usable image: two views of many"),
        (
            {f"{k}.png": encoded(np.full((9, 9, 3), 10 * k, np.uint8), "PNG") for k in range(5)},
            "all images are constant",
        ),
        ({f"{k}.png": encoded(scene(k), "PNG") for k in range(9)} | {"x.png": b""}, "1 of 10 images cannot be read"),
    ],
)
def test_unusable(tmp_path: Path, files: dict[str, bytes], problem: str) -> None:
    corpus.write(tmp_path, files)
    report = check(tmp_path)
    assert not report["usable"]
    assert report["problems"][0].startswith(problem)


def test_nothing_to_check(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images"):
        check(tmp_path)
    corpus.write(tmp_path, {"a.png": b"", "b.png": b"<html>"})
    with pytest.raises(DataError, match="none of the 2 images"):
        check(tmp_path)


def test_arrays_and_many_channels(tmp_path: Path) -> None:
    bands = [np.random.default_rng(k).integers(0, 9000, (20, 24, 7)).astype(np.uint16) for k in range(6)]
    corpus.write(tmp_path / "in", {f"{k}.npy": npy(a) for k, a in enumerate(bands)})
    for source in (tmp_path / "in", np.stack(bands), bands):
        report = check(source)
        assert (report["channels"], report["dtype"]) == (7, "uint16")
        low, high = report["value_range"]
        mean = (np.stack(bands).reshape(-1, 7).mean(0) / 65535 - low) / (high - low)
        np.testing.assert_allclose(report["mean"], mean, atol=1e-4)
        assert "values from 0 to 9,8" in dict(rows(report))["become"]
        assert report["problems"] == []
    assert check(np.stack([bands[0], bands[1], bands[0]]))["exact_duplicates"]["examples"] == ["0 = 2"]


def test_grey_saved_as_colour_is_said(tmp_path: Path) -> None:
    corpus.write(tmp_path, {f"{k}.png": encoded(scene(k)[..., :1].repeat(3, 2), "PNG") for k in range(4)})
    assert check(tmp_path)["problems"] == ["all images are grey although saved as colour: one channel is enough"]
    corpus.write(tmp_path, {f"{k}.png": encoded(scene(k)[..., 0], "PNG") for k in range(10, 16)})
    corpus.write(tmp_path, {"one.png": encoded(scene(20), "PNG")})
    assert check(tmp_path)["problems"][0].startswith("10 of 11 images are grey: --channels 1 makes the others so")


def test_copies_and_parts_before_a_fixed_camera_are_told_apart(tmp_path: Path) -> None:
    part = scene(1)
    noisy = [part + np.random.default_rng(k).integers(0, 9, part.shape, dtype=np.uint8) for k in range(3)]
    corpus.write(tmp_path, {f"{k}.png": encoded(image, "PNG") for k, image in enumerate([*noisy, noisy[0], scene(2)])})
    copies, near = check(tmp_path)["problems"]
    assert copies.startswith("1 images are copies of others")
    assert near.startswith("2 images are nearly the same as others when made small")


def test_thumbnail_is_the_mean_of_its_cells() -> None:
    image = np.random.default_rng(0).integers(0, 255, (64, 160, 3), dtype=np.uint8)
    cells = image.reshape(16, 4, 16, 10, 3).mean((1, 3))
    np.testing.assert_allclose(thumbnail(image), cells @ [0.299, 0.587, 0.114], rtol=1e-5)
    np.testing.assert_allclose(thumbnail(image[..., :2]), cells[..., :2].mean(2), rtol=1e-5)
    ramp = np.arange(10.0)[:, None, None].repeat(16, 1)  # cells of 0.625 rows: the last here from 1.875 to 2.5
    np.testing.assert_allclose(thumbnail(ramp)[:4, 0], [0, 0.25 / 0.625, 1, (0.125 + 0.5 * 2) / 0.625])
    assert thumbnail(np.full((1, 20000, 1), 9, np.uint8)).tolist() == [[9.0] * 16] * 16
    assert thumbnail(np.full((33, 5, 1), 9, np.uint16)).shape == (16, 16)


def test_pairs_across_blocks_and_against_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("barlow.duplicates.BLOCK", 7)
    rng = np.random.default_rng(0)
    thumbs = rng.integers(0, 255, (40, 16, 16)).astype(np.uint8)
    thumbs[31], thumbs[9], thumbs[12] = thumbs[2], thumbs[8], 77  # the last is flat and resembles nothing
    z = normalised(thumbs)
    slow = [[i, j] for i in range(40) for j in range(i + 1, 40) if float(z[i] @ z[j]) >= 0.995]
    assert near_groups(z) == slow == [[2, 31], [8, 9]]
    assert near_partners(z[:5], z[5:]) == {26: 2}
    assert near_partners(z[[2, 0, 2, 1]], z[5:]) == {26: 2}  # of several the last


@pytest.mark.parametrize(("correlation", "found"), [(0.994, {}), (0.996, {0: 0}), (1.0, {0: 0})])
def test_how_alike_is_nearly_the_same(correlation: float, found: dict[int, int]) -> None:
    a, b = np.zeros((1, 256), np.float32), np.zeros((1, 256), np.float32)
    a[0, 0], b[0, :2] = 1, (correlation, np.sqrt(1 - correlation**2))
    assert near_partners(a, b) == found


@pytest.mark.parametrize("block", [3, 16, 1024])
def test_groups(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chains, shuffled: each image is nearly that beside it, and no image is nearly the one at the other end."""
    monkeypatch.setattr("barlow.duplicates.BLOCK", block)
    angle = np.append(np.arange(30) * 0.08, 3.5 + np.arange(15) * 0.08)
    z = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    assert z[0] @ z[29] < 0
    order = np.random.default_rng(0).permutation(45)
    chains = sorted(np.flatnonzero(of).tolist() for of in (order < 30, order >= 30))
    assert near_groups(z[order]) == chains
    assert near_groups(z[:1]) == near_groups(z[:0]) == []
    assert same([b"a", b"", b"b", b"a", b""]) == [[0, 3]]


def test_a_pile_before_a_fixed_camera_is_compared_in_little_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: every pair of a pile that is all alike as Python numbers: 28 s, 1.3 GB and no word for 6,000 images."""
    monkeypatch.setattr("barlow.progress.PLAIN_EVERY", 0.0)
    z = normalised(scene(0, 16, 16)[..., 0] + np.random.default_rng(0).integers(0, 3, (2500, 16, 16)))
    tracemalloc.start()
    found = near_groups(z)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == [list(range(2500))]
    assert peak < 120e6
    assert "comparing images, block by block: 6 of 6" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_a_large_image_is_measured_without_a_copy_of_it(dtype: str) -> None:
    """Kills: copies of whole images as float64 (2 GB for one of 8,000 × 8,000), and a block at the end left out."""
    full = {"uint8": 255, "uint16": 65535, "float32": 1}[dtype]
    image = (np.random.default_rng(0).uniform(0, 1, (1501, 1400, 3)) ** [1, 2, 3] * full).astype(dtype)
    tracemalloc.start()
    mean, square, constant, grey = measured(image)
    small = thumbnail(image)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12e6
    assert not constant
    assert not grey
    shares = image.astype(np.float64) / full
    np.testing.assert_allclose(mean, shares.mean((0, 1)), rtol=1e-9)
    np.testing.assert_allclose(square, np.square(shares).mean((0, 1)), rtol=1e-9)
    np.testing.assert_allclose(small.mean(), (shares.mean((0, 1)) * full) @ [0.299, 0.587, 0.114], rtol=1e-5)
    for value, said in ((0, (True, True)), (2 * full / 255, (True, True)), (3 * full / 255, (False, False))):
        flat = np.zeros((900, 700, 3), dtype)
        flat[-1, -1, 2] = value
        assert measured(flat)[2:] == said
    halves = np.zeros((2, SOME // 3, 3), dtype)  # each of them is measured by itself
    for half in (0, 1):
        halves[half], halves[1 - half] = 3 * full / 255, 0
        assert measured(halves)[2:] == (False, True)
    assert measured(image[..., :1].repeat(3, 2))[2:] == (False, True)
    assert measured(image[..., :1])[2:] == (False, False)


def test_of_very_many_images_some_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes(tmp_path, 20)
    monkeypatch.setattr(room, "COMPARED", 5)
    assert check(tmp_path)["near_duplicates"]["compared"] == 5


def test_both_columns_of_given_pairs_are_looked_at(tmp_path: Path) -> None:
    scenes(tmp_path, 12)
    files = {f"b{k:02}.npy": npy(scene(50 + k)[..., [0, 1]].astype(np.uint16) * 200) for k in range(10)}
    files["b10.npy"] = b"no array"
    corpus.write(tmp_path, files)
    table = tmp_path / "pairs.csv"
    table.write_text("first,second\n" + "".join(f"{k:02}.png,b{k:02}.npy\n" for k in range(11)))
    report = check(table)
    second = report["second"]
    assert (report["channels"], second["channels"], second["dtype"]) == (3, 2, "uint16")
    assert (report["images"], second["images"]) == (10, 10)
    assert second["unreadable"]["count"] == 1
    assert not report["usable"]  # one of eleven is more than the 5 % that pretrain allows
    assert "second images: 1 of 11 images cannot be read" in " ".join(report["problems"])
    words = dict(rows(report))
    assert words["become"] == "3 channels of uint8"
    assert words["second: become"] == "2 channels of uint16"
    json.dumps(report)

    table.write_text(
        "first,second\n" + "".join(f"{k:02}.png,{(k if k < 3 else 3 + (k - 2) % 9):02}.png\n" for k in range(12))
    )
    report = check(table)
    assert report["equal_pairs"] == {"count": 3, "examples": ["00.png", "01.png", "02.png"]}
    assert report["usable"]
    assert report["problems"] == ["3 pairs are one file twice: there is nothing in them to agree on"]


def test_one_image_many_times_is_no_data_set(tmp_path: Path) -> None:
    corpus.write(tmp_path, {f"{k}.png": encoded(scene(0), "PNG") for k in range(4)})
    report = check(tmp_path)
    assert not report["usable"]
    assert report["problems"][0] == "all images are one and the same: there is nothing to tell apart"


def test_pages_that_are_not_used_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for k in range(3):
        first, *more = (Image.fromarray(scene(3 * k + j)) for j in range(3))
        first.save(tmp_path / f"{k}.tif", save_all=True, append_images=more)
    said = "3 files hold several pages or frames, of which only the first is used"
    assert check(tmp_path)["problems"][0].startswith(said)
    images = open_images(tmp_path)
    show_choices(images, Config(batch_size=8, projector=(8, 8), lambda_=0.1), [])
    assert f"note: {said}" in capsys.readouterr().err


def test_bands_that_are_laid_on_white_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kills: a fourth band of bytes that is lost without a word, because it is marked as transparency."""
    for k in range(3):
        bands = np.dstack([scene(k), 255 - scene(k)[:, :, :1]])
        Image.fromarray(bands).save(tmp_path / f"{k}.tif")
    Image.fromarray(bands).save(tmp_path / "3.png")  # here it is what it says
    said = "3 TIFF files have a fourth channel that is marked as transparency and laid on white"
    said += ": if it is a band, give --channels 4"
    report = check(tmp_path)
    assert (report["marked"], report["channels"]) == (3, 3)
    assert said in report["problems"]
    config = Config(batch_size=8, projector=(8, 8), lambda_=0.1)
    show_choices(open_images(tmp_path), config, [])
    assert f"note: {said}" in capsys.readouterr().err
    show_choices(open_images(tmp_path, channels=4), config, [])
    assert "transparency" not in capsys.readouterr().err
    kept = room.contents(open_images(tmp_path, channels=4))
    assert (kept["marked"], kept["channels"]) == (0, 4)


def test_some_long_images_among_others_are_warned_of() -> None:
    """Kills: a warning by the usual size alone, which two strips in five images do not change."""
    found = look(open_images(np.zeros((10, 40, 48, 3), np.uint8)))
    sizes = np.array([(40, 48)] * 6 + [(40, 400)] * 2 + [(400, 40)] * 2)
    assert long_images(found, sizes).startswith("4 of 10 images are more than twice as long as wide")
    assert not long_images(found, np.array([(40, 80)] * 9 + [(40, 400)]))


def test_what_is_not_finite_is_counted_and_named(tmp_path: Path) -> None:
    """Kills: a count of zero where images go through NaN → the least of the channel, from files and from memory."""
    real = np.random.default_rng(0).uniform(0, 1, (6, 20, 24, 1)).astype(np.float32)
    real[1, :3, :5] = np.nan
    real[4, 0, 0] = -np.inf
    wide = real.astype(np.float64)
    wide[5, :2, :2] = 1e300  # no float32
    corpus.write(tmp_path / "in", {f"{k}.npy": npy(array) for k, array in enumerate(real)})
    Image.fromarray(real[1, :, :, 0]).save(tmp_path / "in" / "6.tif")
    np.save(tmp_path / "all.npy", real)
    found = ["1: 15 numbers", "4: 1 numbers"]
    for source, named in (
        (tmp_path / "in", ["1.npy: 15 numbers", "6.tif: 15 numbers", "4.npy: 1 numbers"]),
        (tmp_path / "all.npy", found),
        (real, found),
        (list(real), found),
        (wide, ["1: 15 numbers", "5: 4 numbers", "4: 1 numbers"]),
        (real[2:4], []),
    ):
        report = check(source)
        assert report["filled"] == {"count": len(named), "examples": named}
        row = dict(rows(report)).get("not finite")
        said = f"{len(named)} ({'; '.join(named)}): NaN and infinity become the least of the channel"
        assert row == (said if named else None)
        assert report["clipped"]["count"] == 0


def test_what_lies_beyond_the_range_is_counted_and_named() -> None:
    narrow = np.random.default_rng(0).integers(20000, 20300, (6, 20, 24, 1)).astype(np.uint16)
    assert "beyond the range" not in dict(rows(check(narrow)))
    narrow[3, 4, 5], narrow[2, :3, 0] = 65535, 0
    report = check(narrow)
    assert report["clipped"]["examples"] == ["2: 0.62 %", "3: 0.21 %"]
    assert dict(rows(report))["beyond the range"] == "2 (2: 0.62 %; 3: 0.21 %): become its ends"
