"""Every broken or hostile file is a BadImage, with a reason, cheaply and silently."""

from __future__ import annotations

import io
import resource
import threading
import warnings

import corpus
import numpy as np
import pytest
from corpus import encoded, npy, picture
from PIL import Image

from barlow import guard
from barlow.decode import decode, header
from barlow.errors import Stopped
from barlow.guard import BadImage

BROKEN = corpus.broken_files()


def test_the_corpus_is_large() -> None:
    assert len(BROKEN) >= 300
    for data in corpus.good_files().values():
        assert header(data)
        assert decode(data).ndim == 3


def refused_early(data: bytes) -> str:
    """The reason that the header gives, or "" where only the body is broken."""
    try:
        header(data)
    except BadImage as refusal:
        return refusal.reason
    return ""


@pytest.mark.parametrize("ending", sorted({name.rpartition(".")[2] for name in BROKEN}))
def test_broken_files_are_refused_with_a_reason_that_stays(ending: str, capfd: pytest.CaptureFixture[str]) -> None:
    for name, data in BROKEN.items():
        if name.rpartition(".")[2] != ending:
            continue
        reasons = set()
        for _ in range(2):
            with pytest.raises(BadImage) as refusal:
                decode(data)
            reasons.add(refusal.value.reason)
        assert len(reasons) == 1, name
        reason = reasons.pop()
        assert 5 < len(reason) < 250, name
        assert "0x" not in reason, f"{name}: {reason} holds an address, which differs from run to run"
        assert refused_early(data) in ("", reason), name
    assert capfd.readouterr() == ("", "")


def test_bombs_are_refused_before_memory_is_taken() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, data in corpus.bombs().items():
        with pytest.raises(BadImage, match=r"over the limit of|pixels are over"):
            header(data)
        with pytest.raises(BadImage, match="over the limit of"):
            decode(data)
        assert len(data) < 8000, name
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB; any would take 179 MB


def test_the_pixel_limit_stands_where_somebody_raised_that_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(BadImage, match="2,500,000,000 pixels"):
        header(corpus.bombs()["bomb.png"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(BadImage, match="768 pixels"):
        header(encoded(picture(), "PNG"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "an empty file"),
        (b"\0" * 10, "only zero bytes"),
        (b"<html>", "a web page, not an image"),
        (b"hello, world", "text, not an image"),
        (b"%PDF-1.7", "a PDF, which is not read"),
        (bytes(128) + b"DICM\2", "a DICOM file, which is not read: save it as PNG or TIFF first"),
        (b"\0\0\0\x18ftypheic\0", "a HEIC, AVIF or video file, which is not read: save it as PNG or TIFF first"),
        (corpus.good_files()["colour.png"][:300], "image file is truncated"),
        (corpus.bombs()["bomb.png"], "2,500,000,000 pixels are over the limit of 178,956,970: cut it into tiles"),
        (
            corpus.npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (20000, 10000), }"),
            "200,000,000 pixels are over the limit of 178,956,970: cut it into tiles",
        ),
        (npy(np.zeros((2, 3, 4, 5))), "an array of shape (2, 3, 4, 5) is no image (rows, columns, channels)"),
    ],
)
def test_reasons(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage) as refusal:
        decode(data)
    assert refusal.value.reason == reason


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA", "PCX", "JPEG2000", "SGI", "DDS"])
def test_formats_off_the_list_are_not_even_tried(kind: str) -> None:
    with pytest.raises(BadImage):
        header(encoded(picture(16, 16), kind))


def test_running_out_of_memory_is_not_the_fault_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", full)
    with pytest.raises(MemoryError):
        decode(encoded(picture(), "PNG"))


def test_warnings_raise_inside_and_are_restored_after_threads() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as a user may have set it: inside, it must not hold
        before = list(warnings.filters)
        inside, leave = threading.Event(), threading.Event()

        def stay() -> None:
            with guard.warnings_raise:
                inside.set()
                leave.wait(10)

        thread = threading.Thread(target=stay)
        thread.start()
        assert inside.wait(10)
        with guard.warnings_raise:
            leave.set()
            thread.join()
            with pytest.raises(UserWarning, match="lost pixels"):
                warnings.warn("lost pixels", UserWarning, stacklevel=1)
            warnings.warn("Metadata Warning, tag 1", UserWarning, stacklevel=1)  # harmless: silent
        assert list(warnings.filters) == before


def test_a_large_photograph_below_the_limit_is_read_without_a_warning() -> None:
    data = corpus.png(10_000, 9_000, 1, 0, b"\0" * (1251 * 9000))  # 90 Mpx: Pillow alone would warn
    assert header(data).width == 10_000


def test_a_signal_while_a_file_is_read_is_no_fault_of_the_file() -> None:
    """Kills: the end of the program, asked for while a file is read, taken for a broken file."""
    with pytest.raises(Stopped, match="by a signal"), guard.only_bad_images(io.BytesIO()):
        raise Stopped("ended by a signal", 143)
