"""The stream of batches: the same bits whoever makes them, JPEGs decoded no larger than needed, pairs side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from threading import enumerate as enumerate_threads
from typing import Any

import corpus
import numpy as np
import pytest
import tifffile
import torch
from corpus import encoded, folder_of, picture
from PIL import Image

from barlow import reading
from barlow.batches import Batch, Stream
from barlow.images import Images, open_images
from barlow.readers import ahead, batches
from barlow.views import PRESETS, View, crop, draw


def smooth(seed: int, height: int = 400, width: int = 500) -> np.ndarray[Any, np.dtype[np.uint8]]:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def stream(images: Images, size: int = 32, batch_size: int = 8, views: Any = PRESETS["natural"]) -> Stream:
    return Stream(images, np.arange(len(images)), views, seed=5, size=size, batch_size=batch_size)


def bits(batch: Batch) -> list[bytes]:
    drawn = [np.asarray(v).tobytes() for d in batch.draws for v in vars(d).values()]
    return [batch.images.tobytes(), batch.epochs.tobytes(), *(c.numpy().tobytes() for c in batch.crops), *drawn]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """JPEGs that can be read smaller, a turned one, a PNG that cannot, and one cut in half."""
    files = {f"{k}.jpg": encoded(smooth(k), "JPEG", quality=92) for k in range(6)}
    exif = Image.Exif()
    exif[0x0112] = 6
    files["turned.jpg"] = encoded(smooth(7), "JPEG", exif=exif)
    files |= {"a.png": encoded(smooth(8), "PNG"), "cut.jpg": files["2.jpg"][: len(files["2.jpg"]) // 2]}
    corpus.write(tmp_path / "in", files)
    return tmp_path / "in"


def test_any_number_of_workers_makes_the_same_batches(folder: Path) -> None:
    """Three epochs, no draw twice. Kills: a state that is carried, a worker that draws for itself."""
    source = stream(open_images(folder))
    steps = 4  # 32 of 9 images: three and a half epochs
    expected = [bits(source[step]) for step in range(steps)]
    boxes = np.concatenate([d.brightness for step in range(steps) for d in source[step].draws])
    jittered = boxes[boxes != 1]
    assert len(np.unique(jittered)) == len(jittered) > 40
    seen = Counter(np.concatenate([source[step].images for step in range(steps)]).tolist())
    assert set(seen.values()) <= {3, 4}
    for workers in (1, 2):
        made = [bits(batch) for batch, _ in batches(source, 1, steps, workers)]  # as after a resume at step 1
        assert made == expected[1:]


def test_a_jpeg_is_read_no_larger_than_its_crops_ask_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is seen in a crop is the same, up to how the smaller picture was made."""
    asked = []

    def spy(data: bytes, at_least: Any = None, *more: Any) -> Any:
        array = decode(data, at_least, *more)
        asked.append((at_least, array.shape[:2]))
        return array

    decode = reading.decode
    monkeypatch.setattr(reading, "decode", spy)
    images = open_images(folder)
    source = stream(images, views=(View(crop=(0.1, 1), flip=0.5), View(crop=(0.5, 1))))
    chosen, epochs = np.arange(len(images)), np.zeros(len(images), np.int64)
    made = source.batch(0, chosen, epochs, source.views)
    sizes = {images.key(i): images.sizes[i] for i in range(len(images))}
    scales = [min(sizes["0.jpg"]) / min(shape) for least, shape in asked if least]
    assert set(scales) == {4.0, 8.0}  # crops of 141 pixels and more for 32: a quarter, an eighth from 256 on
    for crops, drawn in zip(made.crops, made.draws, strict=True):
        assert (drawn.box[:, 2:] >= 32).all()
        assert crops.shape == (9, 32, 32, 3)
    for k, view in enumerate(source.views):  # beside crops of the whole pictures
        for i in range(len(images)):
            if images.key(i) == "cut.jpg":
                continue
            whole = images.read(i)
            d = draw(view, 5, epochs[[i]], chosen[[i]], k, np.array([whole.shape[:2]]), 3)
            both = np.stack([crop([whole], d, 32)[0].ravel(), made.crops[k][i].numpy().ravel()])
            assert np.corrcoef(both)[0, 1] > 0.9  # a box of the small picture is rounded to whole pixels of it
    assert [bad.key for bad in made.bad] == ["cut.jpg"]


def test_a_view_that_needs_every_pixel_gets_it(folder: Path) -> None:
    images = open_images(folder)
    i = next(k for k in range(9) if images.key(k) == "0.jpg")
    made = stream(images, size=300, views=(View(), View(crop=(0.3, 0.5)))).batch(
        0, np.array([i]), np.zeros(1, np.int64), (View(),)
    )
    d = draw(View(), 5, np.zeros(1, np.int64), np.array([i]), 0, np.array([[400, 500]]), 3)
    assert np.array_equal(made.crops[0].numpy(), crop([images.read(i)], d, 300))


def test_pairs_each_view_from_its_own_image(tmp_path: Path) -> None:
    """Kills: both views from one image, draws for the other's size or channels."""
    rows = []
    (tmp_path / "b").mkdir()
    for k in range(9):
        corpus.write(tmp_path / "a", {f"{k}.jpg": encoded(smooth(k), "JPEG", quality=92)})
        bands = picture(40, 50, 5, seed=k).astype(np.uint16) * 200
        tifffile.imwrite(tmp_path / "b" / f"{k}.tif", bands, photometric="minisblack", planarconfig="contig")
        rows.append(f"a/{k}.jpg,b/{k}.tif")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    images = open_images(tmp_path / "pairs.csv")
    assert images.second is not None
    (tmp_path / "b" / "4.tif").write_bytes((tmp_path / "b" / "4.tif").read_bytes()[:900])
    source = stream(images, batch_size=9, views=(PRESETS["small"][0], PRESETS["many-channel"][1]))
    batch = source[0]
    assert [(tuple(c.shape), c.dtype) for c in batch.crops] == [
        ((9, 32, 32, 3), torch.uint8), ((9, 32, 32, 5), torch.float32)
    ]  # fmt: skip
    ((bad),) = batch.bad
    assert (bad.key, bad.partner) == ("b/4.tif", True)
    assert "truncated" in bad.reason
    for row, image in enumerate(batch.images.tolist()):
        if image != 4:
            d = draw(source.views[1], 5, batch.epochs[[row]], np.array([image]), 1, np.array([[40, 50]]), 5)
            assert np.array_equal(batch.crops[1][row].numpy(), crop([images.second.read(image)], d, 32)[0])
    first, second = source.finish(batch, torch.device("cpu"), [([0.5] * 3, [0.2] * 3), ([0.1] * 5, [0.3] * 5)])
    assert first.shape == (9, 3, 32, 32)
    assert second.shape == (9, 5, 32, 32)
    row = batch.images.tolist().index(4)
    other = reading.replacements(4, 9)[0]
    assert not np.array_equal(batch.crops[0][row].numpy(), batch.crops[0][batch.images.tolist().index(other)].numpy())


def test_no_held_out_image_stands_in_for_a_broken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: replacements drawn from all images, so that held-out ones are trained on."""
    folder_of(tmp_path, 40, height=20, width=20)
    images, read, taken = open_images(tmp_path), reading.Images.read, list[int]()
    for k in range(0, 20, 2):
        (tmp_path / f"{k:02d}.png").write_bytes((tmp_path / f"{k:02d}.png").read_bytes()[:60])

    def noted(of: reading.Images, i: int, *rest: Any) -> Any:
        array = read(of, i, *rest)
        taken.append(int(i))
        return array

    monkeypatch.setattr(reading.Images, "read", noted)
    batch = Stream(images, np.arange(20), (View(), View()), seed=5, size=16, batch_size=20)[0]
    assert sorted(bad.image for bad in batch.bad) == list(range(0, 20, 2))
    assert len(taken) == 20
    assert set(taken) <= set(range(1, 20, 2))


def test_ahead_gives_the_same_items_and_raises_in_turn() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise KeyError("sixth")

    coming = ahead(items())
    assert [next(coming) for _ in range(5)] == list(range(5))
    with pytest.raises(KeyError, match="sixth"):
        next(coming)
    assert list(ahead(iter([]))) == []


def test_ahead_fetches_one_while_the_one_before_is_used_and_no_more() -> None:
    asked, fetched = list[int](), [Event() for _ in range(9)]

    def items() -> Iterator[int]:
        for k in range(9):
            asked.append(k)
            fetched[k].set()
            yield k

    coming = ahead(items())
    assert next(coming) == 0
    for k in (1, 2):  # one waits in the queue, one in the thread's hand
        assert fetched[k].wait(10)
    coming.close()  # while the thread waits to hand one over
    assert all(thread.name != "batches" for thread in enumerate_threads())
    assert asked == list(range(len(asked)))
    assert len(asked) <= 4


def test_no_thread_and_no_worker_is_left_where_a_run_stops_early(folder: Path) -> None:
    source = stream(open_images(folder))
    coming = batches(source, 0, 1000, 1)
    assert next(coming)[0].step == 0
    coming.close()
    assert all(thread.name != "batches" for thread in enumerate_threads())
