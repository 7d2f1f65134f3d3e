"""The report: one file that holds everything, escapes everything, and bears with whatever is missing."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import corpus
import numpy as np
import pytest
from test_story import HOSTILE, JUDGED

from barlow import report, story
from barlow.errors import UserError
from barlow.health import diagnose
from barlow.images import open_images
from barlow.quarantine import Quarantine
from barlow.report import write_report
from barlow.verdict import WORDS

SAMPLE = Path(report.__file__).parent / "sample" / "test.npz"

Maker = Callable[..., Path]


class Page(HTMLParser):
    """Tags and attributes of a page, the text between them, and whether every tag was closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words, self.open = "", [""]
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "line", "polyline", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "polyline"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data if self.open[-1] != "style" else ""


@pytest.fixture
def run(tmp_path: Path) -> Maker:
    """Makes a run folder like those of training: pixels of the sample before, their best directions after."""
    return lambda **options: make_run(tmp_path / "a run", **options)


def make_run(folder: Path, *, steps: tuple[int, ...] = (0, 50, 100), channels: int = 1, m: int = 60) -> Path:
    (folder / "snapshots").mkdir(parents=True)
    images = np.load(SAMPLE)["images"][:m, :, :, None].repeat(channels, axis=3)
    pixels = images.reshape(m, -1) / 255.0
    draw = np.random.default_rng(0)
    u, s, _ = np.linalg.svd(pixels - pixels.mean(axis=0), full_matrices=False)
    keys = np.array([f"{i}/{HOSTILE}" for i in range(m)])
    np.savez(
        folder / "snapshots/held_out.npz",
        images=images,
        views_a=images[:8, 2:26],
        views_b=images[:8, 2:26, ::-1],
        keys=keys,
    )
    lines = [{"kind": "event", "step": 0, "message": "projector = (64, 32): narrow: it is enough"}]
    for step in steps:
        features = (
            pixels @ draw.standard_normal((pixels.shape[1], 48)) if step == 0 else u[:, :48] * s[:48] ** 0.5
        ) + 1
        a, b = (features[:, :32] + 0.1 * draw.standard_normal((m, 32)) * features.std() for _ in "ab")
        np.savez(folder / f"snapshots/step-{step:07d}.npz", features=features.astype(np.float32),
                 embedding_a=a.astype(np.float16), embedding_b=b.astype(np.float16))  # fmt: skip
        for of in ("features", "embedding"):
            found = diagnose(a, b)
            lines.append(
                {
                    "kind": "health",
                    "step": step,
                    "of": of,
                    "verdict": found.verdict,
                    "sentence": found.sentence,
                    **found.measures,
                }
            )
    for step in range(1, max(steps, default=0) + 1):
        terms = {"loss": 90 / step, "floor": 0.4, "invariance": 60 / step, "redundancy": 3000 / step, "diagonal": 0.4}
        lines.append({"kind": "train", "step": step, "epoch": step / 30, **terms, "lr": 0.01})
        lines.append({"kind": "speed", "step": step, "images_per_s": 512.0, "data_wait": 0.1, "seconds": step * 2.0})
    lines.append({"kind": "event", "step": 7, "message": f"quarantined {HOSTILE}"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.toml").write_text(
        f'images = """{HOSTILE.encode("ascii", "ignore").decode()}"""\n'
        "projector = [64, 32]\nbatch_size = 256\nlambda = 0.01\n"
    )
    (folder / "environment.json").write_text(
        json.dumps({"barlow": "0.1.0", "device": "a CPU", "started": "2026-11-23T01:18:36+00:00"})
    )
    (folder / "quarantine.jsonl").write_text(json.dumps({"path": HOSTILE, "reason": "truncated"}) + "\n")
    return folder


def page_of(folder: Path) -> tuple[str, Page]:
    path = write_report(folder)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [""]
    return text, page


def test_a_whole_run_is_told(run: Maker) -> None:
    text, page = page_of(run())
    for words in (
        "Is it learning?", "Before training", "After 100 steps", "Nearest neighbours", "Map of the images", "25,600",
        "Twins found", "floor 0.4", "3 min 20 s", "narrow: it is enough", "23 November 2026", "1 image was set aside",
    ):  # fmt: skip
        assert words in page.words, words
    assert len(text) < 2_000_000
    assert sum(tag == "svg" for tag, _ in page.tags) == 10  # loss, its terms, two spectra, six measures


def test_resumes_are_told_in_words(run: Maker) -> None:
    folder = run()
    resumed = [{"started": "2026-11-24T08:00:00+00:00", "torch": "2.16"}, {"started": "2026-11-25T09:00:00+00:00"}]
    about = json.loads((folder / "environment.json").read_text()) | {"resumed": resumed, "devices": ["cpu"]}
    (folder / "environment.json").write_text(json.dumps(about))
    _, page = page_of(folder)
    assert "started: 2026-11-24T08:00:00+00:00, torch: 2.16; started: 2026-11-25T09:00:00+00:00" in page.words
    assert "['" not in page.words


def test_nothing_is_loaded_from_elsewhere(run: Maker) -> None:
    text, page = page_of(run())
    assert not re.search(r"https?://|//[a-z]+\.", text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert str(attributes.get("src", "data:image/")).startswith("data:image/")
        assert str(attributes.get("href", "#")).startswith("#")
    assert all(address.startswith("data:image/") for address in re.findall(r'url\("?([^")]*)', text))
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_hostile_names_stay_text(run: Maker) -> None:
    text, page = page_of(run())
    assert "<script" not in text
    assert "alert('x')" in page.words
    assert "{{ 7 * 7 }}" in page.words
    titles = [str(a["title"]) for _, a in page.tags if "title" in a]
    assert titles
    assert all("<script>alert('x')</script>\"' onerror" in title for title in titles)


def test_the_words_of_every_verdict_have_a_picture_and_a_colour(run: Maker) -> None:
    folder = run(steps=(0, 5))
    _, page = page_of(folder)
    sections = {a["id"] for tag, a in page.tags if tag == "section"}
    for word in WORDS:
        shown = story.overall(
            [{"of": "embedding", "verdict": word, "sentence": "so"}, {"of": "features", "verdict": "healthy"}]
        )
        assert shown["word"] == word
        assert shown["tone"] == {"healthy": "good", "not learning yet": "wait"}.get(word, "bad")
        assert bool(shown["remedy"]) == bool(shown["causes"]) == (word != "healthy")
        assert shown["evidence"] is None if word == "healthy" else shown["evidence"][0] in sections
        assert shown["evidence"] is None or shown["evidence"][1] in page.words


def test_the_worse_verdict_is_on_top_and_the_newest_counts() -> None:
    lines = [
        {"of": "embedding", "verdict": "shortcut"}, {"of": "embedding", "verdict": "not learning yet"},
        {"of": "features", "verdict": "cluster collapse"},
    ]  # fmt: skip
    assert story.overall(lines)["word"] == "cluster collapse"
    assert story.overall(lines[:2])["word"] == "not learning yet"
    assert story.overall([])["word"] == "no verdict yet"


@pytest.mark.parametrize("missing", [
    "config.toml", "environment.json", "metrics.jsonl", "quarantine.jsonl", "snapshots/held_out.npz",
    "snapshots/step-0000000.npz", "snapshots/step-0000100.npz",
])  # fmt: skip
@pytest.mark.parametrize("damage", [None, b"", b"PK\x03\x04 torn", b"\xff\x00{"])
def test_what_is_missing_or_damaged_is_left_out(run: Maker, missing: str, damage: bytes | None) -> None:
    folder = run()
    if damage is None:
        (folder / missing).unlink()
    else:
        (folder / missing).write_bytes(damage)
    _, page = page_of(folder)
    if "step-" in missing:
        assert "50 steps" in page.words or "After 50" in page.words
    if "held_out" in missing:
        assert "No views have been kept" in page.words
        assert "Nearest neighbours" not in page.words
    if missing == "metrics.jsonl":
        assert "No step has been logged yet" in page.words
        assert "healthy" in page.words  # the verdict comes from the snapshots then


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("steps = 10\n")
    _, page = page_of(tmp_path)
    assert "no verdict yet" in page.words
    assert "has only just begun" in page.words
    with pytest.raises(UserError, match="no run folder"):
        write_report(tmp_path / "elsewhere")


def test_one_snapshot_and_broken_numbers(run: Maker) -> None:
    folder = run(steps=(0,))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(
            '{"kind": "train", "step": 3, "loss": null, "floor": null}\n{"kind": "health", "step": 3}\n'
            'not json\n{"kind": 3}\n[]\n'
        )
    np.savez(
        folder / "snapshots/step-0000009.npz",
        features=np.full((60, 48), np.nan),
        embedding_a=np.ones((60, 32)),
        embedding_b=np.ones((60, 32)),
    )
    _, page = page_of(folder)
    assert "Before training" in page.words
    assert "9 steps" not in page.words


def test_colours_many_channels_and_collapsed_features_are_drawn(run: Maker) -> None:
    folder = run(channels=5, steps=(0, 4))
    same = np.ones((60, 48), np.float32)
    np.savez(folder / "snapshots/step-0000004.npz", features=same, embedding_a=same[:, :32], embedding_b=same[:, :32])
    _, page = page_of(folder)
    assert "After 4 steps" in page.words


def test_an_unwritable_folder_is_one_sentence(run: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    folder = run()
    monkeypatch.setattr(report, "atomic_write", refuse)
    with pytest.raises(UserError, match=r"report\.html: No space left"):
        write_report(folder)


def test_the_old_report_survives_a_failure(run: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run()
    (folder / "report.html").write_text("old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(5, "gone")))
    with pytest.raises(UserError):
        write_report(folder)
    assert (folder / "report.html").read_text() == "old"
    assert [path.name for path in folder.iterdir() if "tmp" in path.name] == []


def test_the_evaluation_is_shown(run: Maker) -> None:
    folder = run()
    (folder / "evaluation.json").write_text(json.dumps(JUDGED))
    text, page = page_of(folder)
    for words in ("With labels", "87.6%", "8,000 labels", "What k-NN answers", "better", f"dog {HOSTILE[:25]}"):
        assert words in page.words, words
    assert "<script" not in text


def test_the_spectrum_of_every_look_is_one_picture(tmp_path: Path) -> None:
    many, two = make_run(tmp_path / "many", steps=(0, 10, 20, 30)), make_run(tmp_path / "two", steps=(0, 10))
    assert page_of(many)[0].count("Spectrum of the") == 2
    assert "Spectrum of the" not in page_of(two)[0]


def test_spectrum_over_time_shows_where_the_variance_is() -> None:
    from barlow.figures import spectrum_over_time

    made = spectrum_over_time([0, 5, 10], [np.array([1.0, 0.1, 0.01, 0.0])] * 3)
    other = spectrum_over_time([0, 5, 10], [np.array([0.01, 0.1, 1.0, 0.0])] * 3)
    assert made["picture"] != other["picture"]
    assert made["first"] == "0"
    assert made["room"] == "4"
    assert made["picture"].startswith("data:image/png;base64,")


def with_mistakes(folder: Path) -> Path:
    near = [{"place": i, "image": HOSTILE, "label": "bag", "cosine": 0.9} for i in range(5)]
    row = {"place": 7, "image": HOSTILE, "label": HOSTILE, "answer": "bag", "certainty": 0.875, "neighbours": near}
    (folder / "evaluation.json").write_text(json.dumps(JUDGED | {"mistakes": [row, row]}))
    np.savez(folder / "snapshots/mistakes.npz", pictures=np.zeros((2, 6, 8, 8, 1), np.uint8))
    return folder


def test_the_worst_mistakes_are_shown(run: Maker) -> None:
    text, page = page_of(with_mistakes(run()))
    assert "Worst mistakes" in page.words
    assert "88% of the votes" in page.words
    assert "<script" not in text
    assert page.words.count("taken for") == 2


@pytest.mark.parametrize("damage", [b"", b"torn", None])
def test_mistakes_without_their_pictures_are_left_out(run: Maker, damage: bytes | None) -> None:
    folder = with_mistakes(run())
    path = folder / "snapshots/mistakes.npz"
    if damage is None:
        np.savez(path, pictures=np.zeros((3, 6, 8, 8, 1), np.uint8))
    else:
        path.write_bytes(damage)
    _, page = page_of(folder)
    assert "Worst mistakes" not in page.words
    assert "With labels" in page.words


def test_umap_is_a_second_map_where_it_is_installed(run: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    class Umap:
        def __init__(self, **settings: Any) -> None:
            assert settings["random_state"] == 0

        def fit_transform(self, features: np.ndarray) -> np.ndarray:
            return features[:, :2]

    folder = run()
    monkeypatch.setitem(sys.modules, "umap", None)
    _, page = page_of(folder)
    alone = sum(tag == "i" for tag, _ in page.tags)
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Umap))
    _, page = page_of(folder)
    assert sum(tag == "i" for tag, _ in page.tags) == alone + 60
    assert "UMAP" in page.words


def test_umap_that_fails_costs_its_map_and_is_named(
    run: Maker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**_: Any) -> None:
        raise ValueError("no neighbours")

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=broken))
    _, page = page_of(run())
    assert "PCA" in page.words
    assert "UMAP" not in page.words
    said = capsys.readouterr()
    assert "no map by UMAP in the report (ValueError: no neighbours)" in said.out + said.err


def test_images_set_aside_are_named_as_the_run_writes_them(run: Maker, tmp_path: Path) -> None:
    corpus.write(
        tmp_path / "in", {"a.png": corpus.encoded(corpus.picture(), "PNG"), "half.png": b"\x89PNG and no more"}
    )
    folder = run()
    (folder / "quarantine.jsonl").unlink()
    Quarantine(open_images(tmp_path / "in"), folder / "quarantine.jsonl", max_bad=1).start()
    assert "half.png" in page_of(folder)[1].words
