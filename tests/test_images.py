"""Sources of every kind open as the same thing, in every process."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import pytest
from corpus import encoded, folder_of, keys, npy, picture, same
from PIL import Image

from barlow import sources
from barlow.convert import choose, convert, find_range
from barlow.guard import BadImage
from barlow.images import open_images, write_index
from barlow.prepare import look, moments

Array = np.ndarray[Any, np.dtype[Any]]


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
    others = {"._00.png": b"\0\5", ".DS_Store": b"x", ".hidden.png": b"x", "Thumbs.db": b"x", "notes.txt": b"x"}
    others |= {"README": b"read me", "clip.mp4": b"x", "m.txt": b""}
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


@pytest.mark.parametrize("channels", [2, 4])
def test_given_channels_keep_transparency(tmp_path: Path, channels: int) -> None:
    """Kills: a band that is marked as transparency, refused with --channels 4; other arrays after a resume."""
    bands = [picture(channels=channels, seed=k) for k in range(4)]
    kind = ("LA", "RGBA")[channels // 4]
    made = [Image.fromarray(array, kind) for array in bands]
    files = {f"{k}.{'tif' if k % 2 else 'png'}": encoded(one, "TIFF" if k % 2 else "PNG") for k, one in enumerate(made)}
    corpus.write(tmp_path / "in", files)
    assert open_images(tmp_path / "in").channels == channels - 1
    kept = open_images(tmp_path / "in", channels=channels)
    same(kept, bands)
    write_index(kept, tmp_path / "i.parquet")
    same(open_images(tmp_path / "in", index=tmp_path / "i.parquet"), bands)
    corpus.write(tmp_path / "in", {"plain.png": encoded(picture(channels=channels - 1), "PNG")})
    more = open_images(tmp_path / "in", channels=channels)
    assert len(more) == 4
    assert more.bad["status"].to_pylist() == [f"has {channels - 1} channels where the data set has {channels}"]


def test_transparency_of_16_bits_meets_plain_images(tmp_path: Path) -> None:
    deep = picture(channels=4).astype(np.uint16) * 257
    corpus.write(tmp_path / "in", {"0.png": corpus.deep_png(deep), "1.png": encoded(picture(channels=4), "PNG")})
    images = open_images(tmp_path / "in", channels=4)
    assert (images.dtype, len(images)) == ("uint16", 2)
    np.testing.assert_array_equal(images.read(0), images.read(1))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_mean_and_deviation_do_not_depend_on_threads(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: sums in the order in which threads end; and large images that are measured without a word, in float64."""
    full = {"uint8": 255, "uint16": 65535, "float32": 1}[dtype]
    many = [(np.random.default_rng(k).uniform(0, 1, (400, 500, 3)) * full).astype(dtype) for k in range(9)]
    many.append((np.random.default_rng(9).uniform(0, 1, (1300, 1200, 3)) * full).astype(dtype))
    corpus.write(tmp_path, {f"{k}.npy": npy(array) for k, array in enumerate(many)})
    images, given = open_images(tmp_path), open_images(many)
    chosen = np.arange(10)
    monkeypatch.setattr("barlow.progress.PLAIN_EVERY", 0.0)
    found = set()
    for threads in (1, 2, 5):
        monkeypatch.setattr("barlow.index.cores", lambda threads=threads: threads)
        found.add(moments(images, chosen))
        assert "measuring colours: 10 of 10" in capsys.readouterr().err
    found.add(moments(given, chosen))
    assert "measuring colours: 10 of 10" in capsys.readouterr().err
    ((mean, sd),) = found
    means = np.stack([np.mean(array / full, axis=(0, 1), dtype=np.float64) for array in many])
    squares = np.stack([np.square(array / full, dtype=np.float64).mean((0, 1)) for array in many])
    np.testing.assert_allclose(mean, means.mean(0), atol=1e-4)
    np.testing.assert_allclose(sd, np.sqrt(squares.mean(0) - means.mean(0) ** 2), atol=1e-4)
    tracemalloc.start()
    moments(given, chosen[-1:])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * many[-1].nbytes + 12e6


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


def test_sixteen_bits_of_which_few_are_used_are_stretched_and_others_kept(tmp_path: Path) -> None:
    """A detector with an offset: kills brightness that is drawn for the full range."""
    rng = np.random.default_rng(0)
    narrow = [(20000 + rng.integers(0, 301, (20, 24, 1))).astype(np.uint16) for _ in range(5)]
    corpus.write(tmp_path / "in", {f"{k}.npy": npy(array) for k, array in enumerate(narrow)})
    for source in (tmp_path / "in", np.stack(narrow), narrow):
        images = open_images(source)
        low, high = images.value_range
        assert images.dtype == "uint16"
        assert (round(low * 65535), round(high * 65535)) == (19970, 20330)
        for k, array in enumerate(narrow):  # to the level of a count, and in order
            counts = images.read(k) / 65535 * (high - low) * 65535 + low * 65535
            np.testing.assert_allclose(counts, array, atol=0.01)
        write_index(images, tmp_path / "i.parquet")
        again = open_images(source, index=tmp_path / "i.parquet")
        np.testing.assert_array_equal(again.read(1), images.read(1))
        same(open_images(source, value_range=(0.0, 1.0)), narrow)  # of a run that was trained on the full range
    wide = [*narrow, np.full((20, 24, 1), 40000, np.uint16)]
    same(open_images(wide), wide)
    flat = [np.full((4, 4, 1), 7, np.uint16)] * 3
    same(open_images(flat), flat)
    assert find_range([]) == (0.0, 1.0)


def specks(name: str, images: Array) -> None:
    """Into images of 20,000 to 20,300: what no optics has drawn, or has."""
    draw = np.random.default_rng(1)
    if name == "one hot pixel":
        images[0, 5, 7] = 65535
    elif name == "hot pixels everywhere":
        for image in images:
            image[draw.integers(24, size=3), draw.integers(32, size=3)] = draw.integers(25000, 65536, (3, 1))
    elif name == "hot and dead pixels, the same in each":
        images[:, 0, 0], images[:, 3, 31], images[:, 23, 9], images[:, 11, 11:13] = 65535, 41000, 0, 50000
    elif name == "a border of 0":
        images[:, :4], images[:, :, -2:] = 0, 0
    elif name == "a border of 0 beside low values":
        images -= 15000
        images[:, :4] = 0
    elif name == "a hot pixel within a quarter":
        images[0, 5, 7] = 27000
    elif name == "saturated":
        images[2, 5:9, 5:9] = 65535
    elif name == "a spot":
        images[0, 5:7, 5:7] = 60000
    elif name == "a line":
        images[0, 5, 5:20] = 60000


@pytest.mark.parametrize("name", ["one hot pixel", "hot pixels everywhere", "hot and dead pixels, the same in each",
                                  "a border of 0", "a border of 0 beside low values", "a hot pixel within a quarter",
                                  "saturated", "a spot", "a line"])  # fmt: skip
def test_faults_of_a_detector_do_not_set_the_range_and_what_optics_drew_does(name: str) -> None:
    """Kills: one pixel at 65,535 that leaves 16 bits as they are; a bright spot that is lost."""
    images = np.random.default_rng(0).integers(20000, 20301, (8, 24, 32, 1)).astype(np.uint16)
    clean = open_images(images).value_range
    specks(name, images)
    found = open_images(images).value_range
    if name in ("a spot", "a line"):
        assert found == (0.0, 1.0)
    else:
        lower = 15000 if "low values" in name else 0
        assert np.abs(np.subtract(found, clean) * 65535 + lower).max() < 30
    assert open_images(list(images)).value_range == found


def test_single_photons_are_no_faults() -> None:
    """Kills: a range for which a pixel that counted three is no brighter than one that counted one."""
    for mean in (0.02, 0.1, 0.3, 1, 30):
        counts = np.random.default_rng(0).poisson(mean, (32, 64, 64, 1)).astype(np.uint16)
        assert open_images(counts).value_range[1] * 65535 >= counts.max()


def test_a_list_of_mixed_numbers_is_scaled_as_a_folder_of_them_is(tmp_path: Path) -> None:
    grey, deep = picture(channels=1), picture(channels=1).astype(np.uint16) + 300
    for k, many in enumerate(([grey, deep, deep], [grey, grey, deep], [grey, grey, deep * np.float32(3)])):
        corpus.write(tmp_path / str(k), {f"{i}.npy": npy(array) for i, array in enumerate(many)})
        from_files, held = open_images(tmp_path / str(k)), open_images(many)
        assert (held.dtype, held.value_range) == (from_files.dtype, from_files.value_range)
        same(held, [from_files.read(i) for i in range(3)])


def test_what_is_not_finite_is_filled_image_by_image_wherever_it_lies(tmp_path: Path) -> None:
    """Kills: the least of all images of an array in place of the least of one; an image of NaN alone taken as black."""
    many = np.random.default_rng(0).uniform(0.2, 0.9, (5, 6, 6, 2)).astype(np.float32)
    many[1, 0], many[3] = np.nan, np.nan
    corpus.write(tmp_path / "in", {f"{i}.npy": npy(array) for i, array in enumerate(many)})
    from_files, held = open_images(tmp_path / "in"), open_images(many)
    for i in (0, 1, 2, 4):
        np.testing.assert_array_equal(held.read(i), from_files.read(i))
    assert (held.read(1)[0] == many[1, 1:].min((0, 1))).all()
    for images in (held, from_files):
        with pytest.raises(BadImage, match="no finite number"):
            images.read(3)
    assert look(held).in_memory  # no processes and no prepared cache for what needs no decoding
    assert not look(from_files).in_memory


@pytest.mark.parametrize("nothing", [-9999, -32768, np.finfo(np.float32).min, 9.96921e36])
def test_numbers_for_no_data_do_not_set_the_range(nothing: float) -> None:
    """A map with a border: kills a range in which all that was measured is one value."""
    maps = np.random.default_rng(0).uniform(200, 2900, (4, 16, 16, 1)).astype(np.float32)
    low, high = open_images(maps).value_range
    maps[:, :5] = nothing
    images = open_images(maps)
    assert images.value_range == pytest.approx((low, high), rel=0.05)
    assert np.ptp(images.read(0)[:5]) == 0
    assert np.ptp(images.read(0)[5:]) > 0.9


def test_a_few_bright_pixels_do_not_hide_the_numbers_for_no_data() -> None:
    """Reflectance times 10,000 with clouds. Kills: the distance to -9999 compared with that of the brightest pixel."""
    ground = np.random.default_rng(0).uniform(0, 4000, (4, 64, 64)).astype(np.float32)
    ground[:, 0, :2], ground[:, 5:9] = 16000, -9999
    assert open_images(ground).value_range[0] == pytest.approx(0, abs=60)
    dark = np.random.default_rng(0).uniform(-3000, 5000, (4, 64, 64)).astype(np.float32)
    dark[:, 5:9] = -9999
    assert open_images(dark).value_range[0] == pytest.approx(-3000, abs=60)


def test_ordinary_least_values_are_measured() -> None:
    for least in (-9999.0, 0.0, -5000.0):
        heights = np.random.default_rng(0).uniform(least, least + 12000, (4, 16, 16)).astype(np.float32)
        heights[0, 0, 0] = least
        assert open_images(heights).value_range[0] == pytest.approx(least, abs=60)
    assert find_range([np.float32([[[5.0], [2.0]]])]) != (0.0, 1.0)
    assert find_range([np.full((2, 2, 1), -9999, np.float32)]) == (-9999.0, -9998.0)
