"""Prepared images: the right pixels, made once, never stale, and safe when two runs make them."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import pytest
from corpus import encoded, npy, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from barlow import cache as room
from barlow import store as stores
from barlow.cache import cached, plan_cache, prepared_sizes, shrink
from barlow.errors import UserError
from barlow.guard import BadImage
from barlow.images import open_images
from barlow.store import content_name, made, sweep

Array = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BARLOW_CACHE", str(tmp_path / "store"))
    return tmp_path / "store"


def photos(folder: Path, count: int = 6) -> None:
    """JPEG files of different shapes, 0.jpg … ."""
    files = {f"{k}.jpg": encoded(picture(100 + 10 * k, 140, seed=k), "JPEG", quality=95) for k in range(count)}
    corpus.write(folder, files)


def test_prepared_pixels(tmp_path: Path) -> None:
    photos(tmp_path / "in")
    images = open_images(tmp_path / "in")
    ready = cached(images, 32)
    assert (ready.kind, len(ready), ready.channels) == ("raw", 6, 3)
    assert ready.sizes.tolist() == [[37, 52], [37, 47], [37, 43], [37, 40], [37, 37], [40, 37]]
    for i in range(6):
        array = ready.read(i)
        height, width = ready.sizes[i]
        assert array.shape == (height, width, 3)
        assert array.flags.writeable
        expected = Image.fromarray(images.read(i, (37, 37))).resize((width, height), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(array, np.asarray(expected))
        assert ready.key(i) == images.key(i)


def test_images_that_are_small_already_stay_as_they_are(tmp_path: Path) -> None:
    arrays = [picture(20, 30, 1), picture(1, 90, 1), picture(37, 500, 1)]
    corpus.write(tmp_path / "in", {f"{k}.png": encoded(a, "PNG") for k, a in enumerate(arrays)})
    ready = cached(open_images(tmp_path / "in"), 32)
    for i, array in enumerate(arrays):
        np.testing.assert_array_equal(ready.read(i), array)


@pytest.mark.parametrize("kind", ["uint16", "float32", "uint8"])
def test_any_numbers_and_channels(tmp_path: Path, kind: str) -> None:
    arrays = [picture(80, 90, 5, seed=k).astype(kind) for k in range(3)]
    corpus.write(tmp_path / "in", {f"{k}.npy": npy(a) for k, a in enumerate(arrays)})
    images = open_images(tmp_path / "in")
    ready = cached(images, 32)
    for i in range(3):
        small, whole = ready.read(i), images.read(i)
        assert (small.dtype, small.shape) == (np.dtype(kind), (37, 42, 5))
        full = {"float32": 1, "uint8": 255, "uint16": 65535}[kind]
        assert abs(small.mean() - whole.mean()) < 0.01 * full  # nothing shifted, nothing scaled
        band = Image.fromarray(whole[..., 3].astype(np.float32)).resize((42, 37), Image.Resampling.BICUBIC)
        np.testing.assert_allclose(small[..., 3], np.clip(band, 0, full), atol=0.51 if full > 1 else 1e-6)


def test_jpeg_where_raw_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path / "in")
    images = open_images(tmp_path / "in")
    raw = plan_cache(images, 32)
    assert raw.form == "raw"
    monkeypatch.setattr(room, "free_bytes", lambda: raw.bytes)  # a cache may take half of it
    plan = plan_cache(images, 32)
    assert (plan.form, plan.ready) == ("jpeg", False)
    ready = cached(images, 32)
    assert ready.kind == "jpeg"
    assert plan_cache(images, 32).ready
    for i in range(6):
        exact = shrink(images.read(i, (37, 37)), *ready.sizes[i])
        assert np.abs(ready.read(i).astype(int) - exact).mean() < 12  # noise is what JPEG keeps worst
    monkeypatch.setattr(room, "free_bytes", lambda: 100)
    assert cached(images, 48) is images
    assert "and" in plan_cache(images, 48).reason
    assert plan_cache(images, 32).form == "jpeg"  # what is there is used, however full the disk is


def test_a_run_can_insist_on_its_form(tmp_path: Path) -> None:
    photos(tmp_path / "in")
    images = open_images(tmp_path / "in")
    assert cached(images, 32).kind == "raw"
    assert cached(images, 32, form="jpeg").kind == "jpeg"
    assert cached(images, 32).kind == "raw"
    corpus.write(tmp_path / "bands", {f"{k}.npy": npy(picture(channels=5)) for k in range(2)})
    assert plan_cache(open_images(tmp_path / "bands"), 32, form="jpeg").form == "none"


def test_arrays_need_no_cache(tmp_path: Path) -> None:
    images = open_images(picture()[None])
    assert cached(images, 8) is images
    assert "nothing to decode" in plan_cache(images, 8).reason


def test_made_once_and_named_by_content(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path / "in")
    images = open_images(tmp_path / "in")
    first = [a.tobytes() for a in map(cached(images, 32).read, range(6))]
    monkeypatch.setattr(room, "shrink", lambda *_: pytest.fail("made again"))
    assert [a.tobytes() for a in map(cached(images, 32).read, range(6))] == first
    shutil.copytree(tmp_path / "in", tmp_path / "copy", copy_function=shutil.copy2)
    cached(open_images(tmp_path / "copy"), 32)  # the same files elsewhere
    assert len(list(store.iterdir())) == 1
    monkeypatch.undo()
    monkeypatch.setenv("BARLOW_CACHE", str(store))
    names = {
        plan_cache(images, 32).name,
        plan_cache(images, 33).name,
        plan_cache(open_images(tmp_path / "in", channels=1), 32).name,
    }
    monkeypatch.setattr(room, "RULE", 99)
    names.add(plan_cache(images, 32).name)
    (tmp_path / "in" / "3.jpg").write_bytes((tmp_path / "in" / "3.jpg").read_bytes())
    os.utime(tmp_path / "in" / "3.jpg", ns=(0, 12345))
    names.add(plan_cache(open_images(tmp_path / "in"), 32).name)
    assert len(names) == 5


def test_a_file_that_changed_after_the_index_does_not_make_a_stale_cache(tmp_path: Path, store: Path) -> None:
    photos(tmp_path / "in")
    images = open_images(tmp_path / "in")
    name = plan_cache(images, 32).name
    corpus.write(tmp_path / "in", {"0.jpg": encoded(picture(100, 140, seed=77), "JPEG", quality=95)})
    ready = cached(images, 32)
    np.testing.assert_array_equal(ready.read(0), shrink(images.read(0, (37, 37)), 37, 52))
    assert not (store / name).exists()
    assert (store / plan_cache(open_images(tmp_path / "in"), 32).name).exists()


def test_bad_images_keep_their_numbers(tmp_path: Path) -> None:
    photos(tmp_path / "in", 8)
    images = open_images(tmp_path / "in")
    data = (tmp_path / "in" / "2.jpg").read_bytes()
    (tmp_path / "in" / "2.jpg").write_bytes(data[: len(data) // 2])
    for form in ("raw", "jpeg"):
        ready = cached(images, 32, form)
        assert len(ready) == 8
        with pytest.raises(BadImage) as here:
            ready.read(2)
        with pytest.raises(BadImage) as there:
            images.read(2)
        assert here.value.reason == there.value.reason
        assert ready.read_or_replace(2)[1:] == images.read_or_replace(2)[1:]
        assert ready.key(3) == "3.jpg"


def test_labels_pairs_and_pickling(tmp_path: Path) -> None:
    photos(tmp_path / "in", 3)
    (tmp_path / "t.csv").write_text("in/0.jpg,in/1.jpg\nin/1.jpg,in/2.jpg\n")
    ready = pickle.loads(pickle.dumps(cached(open_images(tmp_path / "t.csv"), 32)))
    assert ready.kind == ready.second.kind == "raw"
    (first, second), used, bad = ready.read_pair_or_replace(0)
    assert (used, bad) == (0, None)
    np.testing.assert_array_equal(second, ready.read(1))
    np.testing.assert_array_equal(first, ready.read(0))


def test_a_cache_that_was_cut_off_is_noticed(tmp_path: Path, store: Path) -> None:
    photos(tmp_path / "in")
    ready = cached(open_images(tmp_path / "in"), 32)
    file = next(store.glob("raw-*/pixels.bin"))
    os.truncate(file, file.stat().st_size - 5)
    with pytest.raises(BadImage, match="cut off in the prepared cache"):
        ready.read(5)


BUILDER = """
import sys, hashlib
from barlow.cache import cached
from barlow.images import open_images
ready = cached(open_images(sys.argv[1]), 32)
print(hashlib.sha256(b"".join(ready.read(i).tobytes() for i in range(len(ready)))).hexdigest())
"""


def test_two_builders_at_once(tmp_path: Path, store: Path) -> None:
    photos(tmp_path / "in", 60)
    command = [sys.executable, "-W", "error", "-c", BUILDER, str(tmp_path / "in")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    out = [process.communicate(timeout=120) for process in both]
    assert out[0][0] == out[1][0]
    said = [words for _, words in out if words]
    assert len(said) <= 1  # whoever came second waited, unless the first was done
    assert all(words.startswith("waiting for another process") for words in said)
    assert [folder.name[:4] for folder in store.iterdir()] == ["raw-"]


def test_who_is_dead_is_not_waited_for(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead, alive = store / ".thing.0.1", store / ".thing.0.2"
    dead.mkdir(parents=True)
    past = time.time() - 2 * stores.SILENT
    os.utime(dead, (past, past))

    def make(folder: Path) -> None:
        (folder / "a").write_text("mine")

    monkeypatch.setattr(stores.time, "sleep", lambda _: pytest.fail("waited for the dead"))
    assert (made("thing", make) / "a").read_text() == "mine"
    shutil.rmtree(store / "thing")
    alive.mkdir()

    def finishes(_: float) -> None:  # while we wait
        (alive / "a").write_text("theirs")
        alive.rename(store / "thing")

    monkeypatch.setattr(stores.time, "sleep", finishes)
    assert (made("thing", make) / "a").read_text() == "theirs"
    alive.mkdir()
    shutil.rmtree(store / "thing")
    monkeypatch.setattr(stores.time, "sleep", lambda _: alive.rmdir())  # they give up
    assert (made("thing", make) / "a").read_text() == "mine"


def test_whoever_comes_second_throws_the_own_work_away(store: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "a").write_text("mine")
        other = store / "thing"
        if not other.exists():  # meanwhile somebody else is done
            other.mkdir()
            (other / "a").write_text("theirs")

    assert (made("thing", make) / "a").read_text() == "theirs"
    assert [p.name for p in store.iterdir()] == ["thing"]


def test_a_builder_that_fails_leaves_nothing(store: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made("thing", fail)
    assert list(store.iterdir()) == []

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\): set BARLOW_CACHE"):
        made("thing", full)
    assert list(store.iterdir()) == []


def test_abandoned_work_is_swept(store: Path) -> None:
    for name in (".old.1.1", ".new.1.1", "done"):
        (store / name).mkdir(parents=True)
        (store / name / "a").write_text("x")
    past = time.time() - 2 * stores.ABANDONED
    for path in (store / ".old.1.1" / "a", store / ".old.1.1", store / "done" / "a", store / "done"):
        os.utime(path, (past, past))
    sweep()
    assert sorted(p.name for p in store.iterdir()) == [".new.1.1", "done"]


def test_where_the_store_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("BARLOW_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert stores.store_root() == tmp_path / "barlow"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert stores.store_root() == tmp_path / "home" / ".cache" / "barlow"
    assert stores.free_bytes() > 0


def test_names_tell_contents_apart() -> None:
    assert content_name(b"ab", b"c") != content_name(b"a", b"bc")
    assert content_name([1, "a"]) == content_name([1, "a"])


@given(st.integers(1, 20000), st.integers(1, 20000), st.integers(1, 512))
@settings(deadline=None)
def test_prepared_sizes(height: int, width: int, size: int) -> None:
    ((new_height, new_width),) = prepared_sizes(np.array([[height, width]]), size)
    assert 1 <= new_height <= height
    assert 1 <= new_width <= width
    assert min(new_height, new_width) >= min(height, width, size)
    assert min(new_height, new_width) <= size * room.MARGIN + 1
    assert (
        abs(new_height / new_width - height / width) <= 0.51 * (1 / new_width + new_height / new_width**2) + 1e-9
        or min(new_height, new_width) == 1
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 20000), (20000, 1), (3, 777)])
def test_strange_shapes(tmp_path: Path, shape: tuple[int, int]) -> None:
    corpus.write(tmp_path / "in", {"a.png": encoded(Image.new("L", shape[::-1], 7), "PNG")})
    ready = cached(open_images(tmp_path / "in"), 2)
    assert ready.read(0).shape == (*ready.sizes[0], 1)
    assert np.unique(ready.read(0)).tolist() == [7]
