"""The report of a run: one HTML file that holds everything it shows, drawn from the run folder alone.

No script, no font, no picture from elsewhere, and a content policy that forbids them; every string from the outside
(file names are hostile) is escaped. What is not there yet, or cannot be read, is left out with a sentence.
"""

from __future__ import annotations

import functools
import json
import tomllib
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from numpy.typing import NDArray

from barlow import __version__
from barlow.errors import UserError
from barlow.figures import (
    Snapshot,
    embedding_map,
    matrices,
    mistakes,
    neighbours,
    spectra,
    spectrum_over_time,
    strips,
    strongest,
    umap,
)
from barlow.files import atomic_write
from barlow.health import diagnose, spectrum
from barlow.judgement import evaluation_table
from barlow.kinds import as_path
from barlow.pictures import sheet, thumbnail
from barlow.runlog import SNAPSHOT, read_arrays, read_environment
from barlow.story import cards, choices, health_charts, loss_charts, notes, overall

Arrays = dict[str, NDArray[Any]]
LOOKS = 40  # columns of the picture of the spectrum over time at most


class Folder(NamedTuple):
    """What was found in a run folder; whatever was missing or unreadable is empty."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    lines: dict[str, list[dict[str, Any]]]  # of metrics.jsonl, by kind
    held_out: Arrays
    snapshots: list[Snapshot]  # the first, two between, the last: fewer where there are fewer
    spectra: list[tuple[int, NDArray[Any], NDArray[Any]]]  # step, of the features, of the embedding, at every look
    evaluation: Any
    mistakes: Arrays  # their pictures
    quarantined: list[dict[str, Any]]


def write_report(run: Path | str) -> Path:
    """Draws report.html of the run folder ``run`` again and returns its path; reads nothing outside the folder.

    Raises UserError when ``run`` is no run folder or cannot be written to.
    """
    run = as_path(run, "a run")
    if not (run / "config.toml").is_file() and not (run / "metrics.jsonl").is_file():
        raise UserError(f"{run} is no run folder: it holds neither config.toml nor metrics.jsonl")
    try:
        return draw_report(run)
    except OSError as error:
        raise UserError(f"cannot write {run / 'report.html'}: {error.strerror or error}") from error


def draw_report(run: Path) -> Path:
    """The same for a folder that is known to hold a run. Raises OSError when the disk does not take the page."""
    path = run / "report.html"
    atomic_write(path, render(read_folder(run)).encode("utf-8", "replace"))
    return path


def read_folder(run: Path) -> Folder:
    """Reads what the report needs; damaged lines and files count as absent."""
    lines: dict[str, list[dict[str, Any]]] = {"train": [], "health": [], "speed": [], "event": []}
    for line in _json_lines(run / "metrics.jsonl"):
        if isinstance(line.get("step"), int):
            lines.setdefault(str(line.get("kind")), []).append(line)
    return Folder(
        run, _toml(run / "config.toml"), read_environment(run), lines, _held_out(run / "snapshots" / "held_out.npz"),
        _snapshots(run / "snapshots"), _spectra(run / "snapshots"), _json(run / "evaluation.json"),
        read_arrays(run / "snapshots" / "mistakes.npz"), _json_lines(run / "quarantine.jsonl"),
    )  # fmt: skip


def render(folder: Folder) -> str:
    """The page as text."""
    return str(template().render(**context(folder)))


@functools.cache  # compiling it takes longer than all that a small run trains
def template() -> jinja2.Template:
    """The page without its content."""
    source = (files("barlow") / "report.html.j2").read_text(encoding="utf-8")
    engine = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return engine.from_string(source)


def context(folder: Folder) -> dict[str, Any]:
    """Everything the template shows."""
    health = folder.lines["health"] or _health_of(folder.snapshots)
    table = evaluation_table(folder.evaluation)
    started = str(folder.environment.get("started", ""))
    shown = {
        "name": folder.path.resolve().name,
        "started": _day(started),
        "version": folder.environment.get("barlow", __version__),
        "verdict": overall(health, table),
        "cards": cards(folder.config, folder.lines, health),
        "loss": loss_charts(folder.config, folder.lines["train"]),
        "health": health_charts(health),
        "matrices": [], "spectra": [], "over_time": [], "neighbours": [], "strips": [], "sheet": None, "maps": [],
        "views": [],
        "evaluation": table,
        "mistakes": _mistakes(folder),
        "settings": choices(folder.config, folder.lines["event"]),
        "machine": [(key, _in_words(it)) for key, it in folder.environment.items() if it not in (None, "", [])],
        "notes": notes(folder.lines["event"]),
        "quarantined": len(folder.quarantined),
        "examples": [(str(q.get("path", "?")), str(q.get("reason", ""))) for q in folder.quarantined[:5]],
    }  # fmt: skip
    _draw(folder, shown)
    return shown


def _draw(folder: Folder, shown: dict[str, Any]) -> None:
    snapshots, held_out = folder.snapshots, folder.held_out
    if "views_a" in held_out:
        pairs = zip(held_out["views_a"], held_out["views_b"], strict=False)
        shown["views"] = [(thumbnail(a), thumbnail(b)) for a, b in pairs][:8]
    if not snapshots:
        return
    shown["dimensions"] = snapshots[-1].embedding_a.shape[1]
    shown["matrices"], shown["spectra"] = matrices(snapshots), spectra(snapshots)
    if len(folder.spectra) > 2:
        steps, of_features, of_embedding = map(list, zip(*folder.spectra, strict=True))
        for title, found in (("Encoder output", of_features), ("Embedding", of_embedding)):
            shown["over_time"].append({"title": title, **spectrum_over_time(steps, found)})
    if "images" in held_out and len(held_out["images"]) == len(snapshots[-1].features):
        images, keys = held_out["images"], [str(key) for key in held_out["keys"]]
        shown["neighbours"] = neighbours(snapshots, images, keys)
        shown["strips"] = strips(snapshots, images, keys)
        shown["sheet"], shown["cells"] = sheet(images)
        plane, share = strongest(snapshots[-1].features)
        about = f"The two strongest directions of the encoder's output (PCA; {share} of the variance)"
        shown["maps"].append({"about": about, "points": embedding_map(plane, keys, shown["cells"])})
        if (plane_of_umap := umap(snapshots[-1].features)) is not None:
            about = "The same by UMAP, which keeps neighbours together; distances between groups say little"
            shown["maps"].append({"about": about, "points": embedding_map(plane_of_umap, keys, shown["cells"])})


def _mistakes(folder: Folder) -> list[dict[str, Any]]:
    try:
        return mistakes(folder.evaluation["mistakes"], _pictures(folder.mistakes["pictures"], 5))
    except (KeyError, TypeError, ValueError):  # none, of another time, or damaged
        return []


def _pictures(array: NDArray[Any], axes: int) -> NDArray[np.uint8]:
    if array.ndim != axes or array.dtype != np.uint8 or not array.size:
        raise ValueError("no pictures")
    return array


def _health_of(snapshots: list[Snapshot]) -> list[dict[str, Any]]:
    """Health lines made from the snapshots, for a run that has logged none."""
    lines = []
    for s in snapshots:
        for of, found in (
            ("features", diagnose(s.features)),
            ("embedding", diagnose(s.embedding_a, s.embedding_b, embedding=True)),
        ):
            words = {"verdict": found.verdict, "sentence": found.sentence}
            lines.append({"step": s.step, "of": of, **words, **found.measures})
    return lines


def _spectra(folder: Path) -> list[tuple[int, NDArray[Any], NDArray[Any]]]:
    """(step, spectrum of the features, of the embedding) of up to ``LOOKS`` snapshots, spread evenly."""
    found = _numbered(folder)
    chosen = sorted(set(np.linspace(0, len(found) - 1, LOOKS).astype(int))) if found else []
    made = [snapshot for i in chosen if (snapshot := _snapshot(*found[i]))]
    return [(s.step, spectrum(s.features), spectrum(s.embedding_a)) for s in made]


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of all snapshots, in order."""
    return sorted((int(name[1]), path) for path in folder.glob("step-*.npz") if (name := SNAPSHOT.fullmatch(path.name)))


def _snapshots(folder: Path) -> list[Snapshot]:
    steps = _numbered(folder)
    chosen: dict[int, Snapshot] = {}
    for target in (0.0, 1.0, 1 / 3, 2 / 3):  # a damaged file gives way to the sound one nearest to it
        place = target * (len(steps) - 1)
        for i in sorted(range(len(steps)), key=[abs(i - place) for i in range(len(steps))].__getitem__):
            made = chosen.get(steps[i][0]) or _snapshot(*steps[i])
            if made:
                chosen[made.step] = made
                break
    kept = [chosen[step] for step in sorted(chosen)]
    return [s for s in kept if all(a.shape == b.shape for a, b in zip(s[1:], kept[-1][1:], strict=True))]


def _snapshot(step: int, path: Path) -> Snapshot | None:
    stored = read_arrays(path)
    wanted = [stored.get(name) for name in Snapshot._fields[1:]]
    arrays = [a.astype(np.float32) for a in wanted if a is not None and a.ndim == 2 and len(a) > 1 and a.shape[1] > 0]
    if len(arrays) < 3 or not all(np.isfinite(a).all() for a in arrays) or arrays[1].shape != arrays[2].shape:
        return None
    return Snapshot(step, *arrays)


def _held_out(path: Path) -> Arrays:
    stored = read_arrays(path)
    pictures = {k: a for k, a in stored.items() if k != "keys" and a.ndim == 4 and a.dtype == np.uint8 and a.size}
    if "images" in pictures:
        count = len(pictures["images"])
        keys = stored.get("keys", np.zeros(0))
        pictures["keys"] = keys if len(keys) == count else np.arange(count).astype(str)
    if "views_b" not in pictures:
        pictures.pop("views_a", None)
    return pictures


def _json(path: Path) -> Any:
    try:
        return _value(path.read_bytes())
    except OSError:
        return None


def _json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    return [value for line in lines if isinstance(value := _value(line), dict)]


def _value(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _day(started: str) -> str:
    try:
        moment = datetime.fromisoformat(started)
    except ValueError:
        return ""
    return f"{moment.day} {moment:%B %Y}, {moment:%H:%M}"


def _in_words(value: Any) -> str:
    """What environment.json says of something; of resumes, when each began and what was another than before."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {said}" for name, said in value.items())
    return "; ".join(map(_in_words, value)) if isinstance(value, list) else str(value)
