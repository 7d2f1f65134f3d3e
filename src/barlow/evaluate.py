"""Features judged by labels: the trained encoder beside the untrained one and raw pixels, all in one call.

Protocols: weighted k-NN, a linear probe on all labels, linear probes on 1 % and on 10 % of them; for labels that do not
exclude each other and for real values a linear probe each. The encoder stays frozen, which is checked to the bit.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from barlow import protocols, scores
from barlow.config import read_toml
from barlow.embedding import load_on_device, on_device
from barlow.encoder import Encoder, encoder_folder, read_config, untrained
from barlow.errors import NumbersError, UserError
from barlow.features import features_of, fingerprint, raw_pixels
from barlow.files import atomic_write
from barlow.finetune import fine_tuned_answers
from barlow.kinds import as_path, as_whole
from barlow.labelled import Labelled, divided, open_labelled
from barlow.mistakes import named, pictures, worst_mistakes
from barlow.pairs import ENDINGS_OF_TABLES, path_columns, read_table
from barlow.progress import Tell, headed, shown
from barlow.runlog import write_arrays

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

K, TEMPERATURE = 20, 0.07
SHARES, DRAWS = (0.01, 0.1), 5
UNITS = {"classes": "accuracy", "labels": "mean average precision", "values": "R²"}
PIXELS_COLUMN = "raw pixels"


class Judged(NamedTuple):
    """What a protocol says of one kind of features."""

    value: float | None  # None: undefined, such as the R² of constant targets
    labels: int  # used for training
    interval: tuple[float, float] | None = None
    draws: list[float] | None = None
    detail: dict[str, Any] | None = None
    mistakes: list[dict[str, Any]] | None = None  # see ``worst_mistakes``


Protocol = Callable[[Floats, Floats, Tell], Judged]  # of the features for training and for testing


def evaluate(
    run: str | Path, labels: str | Path, *, images: str | None = None, test: str | Path | None = None, seed: int = 0,
    batch_size: int = 256, fine_tune: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Measures the encoder of a run, writes ``evaluation.json`` into the run folder and returns the same.

    ``labels``, ``images`` and ``test`` as in ``open_labelled``. ``seed`` draws the few labels, the parts that penalties
    are chosen on, and the test part where the labels bring none; ``batch_size`` images are embedded at a time.
    ``fine_tune`` also trains the whole network on the labels, which takes minutes. Keys of the result: see ``compare``.
    Raises UserError; NumbersError for features that are not finite; RuntimeError where an
    encoder was changed by being used.
    """
    config = read_config(encoder_folder(run))
    run = Path(run)
    as_whole(seed, "seed", 0)
    for source, what in ((labels, "labels"), (test, "test"), (images, "images")):
        if source is not None or what == "labels":
            as_path(source, what)
    if not os.access(run, os.W_OK):
        raise UserError(f"{run} takes no evaluation.json: it may not be written to. Copy it to where it may")
    trained, fresh = load_on_device(run), untrained(run, config.get("barlow", {}).get("seed") or 0)
    images = images or images_of_run(run, Path(labels))
    labelled = open_labelled(
        labels, images=images, test=test, channels=trained.channels, value_range=trained.value_range
    )
    for opened in labelled.images:
        trained.check_dtype(opened.dtype)
    encoders = {"trained": trained, "untrained": on_device(fresh)}
    result = {"labels": str(labels)} | compare(
        labelled, encoders, seed=seed, batch_size=batch_size, fine_tune=fine_tune
    )
    if result["mistakes"]:
        write_arrays(run / "snapshots" / "mistakes.npz", pictures=pictures(result["mistakes"], labelled))
    atomic_write(run / "evaluation.json", json.dumps(result, ensure_ascii=False) + "\n")
    return result


def images_of_run(run: Path, labels: Path) -> str | None:
    """The images that a run was trained on, where ``labels`` is a CSV that does not lie beside its own; else None."""
    if labels.suffix.lower() not in ENDINGS_OF_TABLES or not (run / "config.toml").is_file() or not labels.is_file():
        return None
    columns = path_columns(table := read_table(labels))
    beside = any((labels.parent / name).exists() for column in columns for name in table[column])
    images = None if beside else read_toml(run / "config.toml").images
    if images and images != "sample" and not Path(images).exists():
        raise UserError(f"{run} was trained on {images}, which is not there as seen from {Path.cwd()}: name the images "
                        "of the table with --images")  # fmt: skip
    return images


def compare(
    labelled: Labelled, encoders: Mapping[str, Encoder], *, seed: int = 0, batch_size: int = 256,
    fine_tune: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """All protocols on the features of each encoder and on raw pixels; plain values, ready for JSON.

    ``rows``: one a protocol, with the figure of each of ``columns`` under its name, ``unit`` (which figure), and 95 %
    ``intervals`` by column, that of the first also as ``interval``: Wilson over the test images; for few labels
    Student's t over the ``draws``, which stand beside it. ``training_labels``: how many each protocol used.
    ``details``: per encoder and protocol balanced accuracy, a row a class, and the confusion matrix (row: label,
    column: answer). ``mistakes``: the surest wrong answers of k-NN on the first encoder's features, see
    ``mistakes.named``. ``weights``: sha256 of each encoder, before as after.
    """
    pixels, digests, how = raw_pixels(labelled.images)
    labelled = divided(labelled, digests, seed)
    read = np.array([digest is not None for digest in digests])
    columns, weights = dict[str, Floats](), {}
    for name, encoder in encoders.items():
        weights[name] = fingerprint(encoder)
        columns[name] = features_of(encoder, labelled.images, batch_size, f"embedding, {name}", told=bool(columns))
        if fingerprint(encoder) != weights[name]:
            raise RuntimeError(f"the {name} encoder was changed by being used: its figures would not be its own")
        if not np.isfinite(columns[name][read]).all():
            raise NumbersError(f"the {name} encoder gives features that are not finite")
    columns[PIXELS_COLUMN] = pixels
    assert labelled.test is not None
    train, test = read & ~labelled.test, read & labelled.test
    _refuse(labelled, train, test)
    parts = {name: (x[train], x[test]) for name, x in columns.items()}
    targets = labelled.targets.values[train], labelled.targets.values[test]
    kind, names = labelled.targets.kind, labelled.targets.names
    judges = _of_classes(*targets, names, seed) if kind == "classes" else _of_numbers(*targets, kind, seed)
    found = _found(judges, parts)
    if fine_tune:
        for protocol, name, used, answers in fine_tuned_answers(labelled, encoders, train, test, seed, batch_size):
            found.append((protocol, name, _of_answers(answers, targets[1], names, used)))
    measured = _table_of(found, UNITS[kind])
    surest = next((judged.mistakes for _, _, judged in found if judged.mistakes is not None), [])
    mistakes = named(surest, labelled, np.flatnonzero(train), np.flatnonzero(test))
    bad = sum(len(images.bad) for images in labelled.images)
    return {
        "images": {"train": int(train.sum()), "test": int(test.sum()), "unreadable": bad + int((~read).sum())},
        "classes": names,
        "split": labelled.split,
        "seed": seed,
        "settings": {"k": min(K, int(train.sum())), "temperature": TEMPERATURE, "draws": DRAWS, PIXELS_COLUMN: how},
        "columns": list(columns),
        **measured,
        "mistakes": mistakes,
        "weights": weights,
    }


def _refuse(labelled: Labelled, train: NDArray[np.bool_], test: NDArray[np.bool_]) -> None:
    """UserError for labels that nothing can be measured with."""
    values, names = labelled.targets.values, labelled.targets.names
    if labelled.targets.kind == "classes" and not test.any() and len(names) == train.sum() > 1:
        raise UserError(f"each of the {len(names):,} labels, such as {names[0]}, is on one image alone, so that none "
                        "is left to test on: is it the right column?")  # fmt: skip
    if not train.any() or not test.any():
        raise UserError(f"there are {train.sum()} images to train on and {test.sum()} to test on: both parts need some")
    if labelled.targets.kind != "classes":
        if (values[train] == values[train][0]).all():
            raise UserError("all training images have the same labels: there is nothing to tell apart")
        return
    if len(np.unique(values[train])) < 2:
        raise UserError(f"all training images are of class {names[values[train][0]]}: there is nothing to tell apart")
    if lost := sorted(set(values[test]) - set(values[train])):
        raise UserError(f"no training image of class {names[lost[0]]} can be used, but test images of it are there")


def _found(judges: Mapping[str, Protocol], parts: Mapping[str, Any]) -> list[tuple[str, str, Judged]]:
    """What every protocol says of every column; how far it is and what the one at work does is shown meanwhile."""
    jobs, found = [(protocol, name) for name in parts for protocol in judges], []
    with shown() as tell:
        for done, (protocol, name) in enumerate(jobs):
            tell_job = headed(tell, f"protocols: {done} of {len(jobs)} done · {protocol}, {name}")
            train, test = parts[name]
            found.append((protocol, name, judges[protocol](train, test, tell_job)))
    return found


def _table_of(found: Sequence[tuple[str, str, Judged]], unit: str) -> dict[str, Any]:
    """What the protocols said of the columns, in the parts of the result."""
    rows: dict[str, dict[str, Any]] = {}
    details: dict[str, dict[str, Any]] = {}
    used: dict[str, int] = {}
    for protocol, name, judged in found:
        row = rows.setdefault(protocol, {"protocol": protocol, "unit": unit, "intervals": {}, "draws": {}})
        row[name], used[protocol] = judged.value, judged.labels
        if judged.interval:
            row["intervals"][name] = list(judged.interval)
            row.setdefault("interval", list(judged.interval))
        if judged.draws:
            row["draws"][name] = judged.draws
        if judged.detail and name != PIXELS_COLUMN:
            details.setdefault(name, {})[protocol] = judged.detail
    return {"rows": list(rows.values()), "training_labels": used, "details": details}


def _of_answers(answers: Ints, truth: Ints, names: list[str], used: int) -> Judged:
    interval = scores.wilson(int((answers == truth).sum()), len(truth))
    return Judged(scores.accuracy(truth, answers), used, interval, detail=scores.detail(truth, answers, names))


def _of_classes(labels: Ints, truth: Ints, names: list[str], seed: int) -> Mapping[str, Protocol]:
    def judged(answers: Ints) -> Judged:
        return _of_answers(answers, truth, names, len(labels))

    def knn(train: Floats, test: Floats, tell: Tell) -> Judged:
        votes = protocols.neighbour_votes(
            train, labels, test, k=min(K, len(labels)), temperature=TEMPERATURE, classes=len(names), tell=tell
        )
        return judged(votes.answers)._replace(mistakes=worst_mistakes(votes, truth))

    def even(train: Floats, test: Floats, tell: Tell) -> Judged:
        return knn(*protocols.whitened(train, test), tell)._replace(mistakes=None)

    def linear(train: Floats, test: Floats, tell: Tell) -> Judged:
        return judged(protocols.linear_probe(train, labels, test, seed=seed, tell=tell))

    def few(share: float, train: Floats, test: Floats, tell: Tell) -> Judged:
        found = protocols.few_labels(train, labels, test, truth, share=share, draws=DRAWS, seed=seed, tell=tell)
        return Judged(found.mean, found.labels, (found.low, found.high), found.draws)

    shares = {f"{share * 100:g} % of labels": partial(few, share) for share in SHARES}
    return {"k-NN": knn, "k-NN whitened": even, "linear": linear, **shares}


def _of_numbers(targets: NDArray[Any], truth: NDArray[Any], kind: str, seed: int) -> Mapping[str, Protocol]:
    def linear(train: Floats, test: Floats, tell: Tell) -> Judged:
        if kind == "values":
            value = scores.r2(truth, protocols.ridge(train, targets, test, seed=seed, tell=tell))
        else:
            found = protocols.multi_label_probe(train, targets, test, seed=seed, tell=tell)
            value = scores.mean_average_precision(truth, found)
        return Judged(None if math.isnan(value) else value, len(targets))

    return {"linear": linear}


def table(result: Mapping[str, Any]) -> str:
    """The result as lines of text: a row a protocol, a column for each kind of features, 95 % intervals behind."""
    images, names = result["images"], result["columns"]
    lines = [["", *names]]
    for row in result["rows"]:
        cells = [_cell(row.get(name), row["intervals"].get(name)) for name in names]
        lines.append([f"{row['protocol']} ({result['training_labels'][row['protocol']]:,} labels)", *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    unit = result["rows"][0]["unit"]
    head = f"{unit} on {images['test']:,} images, {images['train']:,} for training: {result['split']}"
    if images["unreadable"]:
        head += f"; {images['unreadable']:,} unreadable"
    return "\n".join([head, "", *text])


def _cell(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" + (f"  {interval[0]:.3f}–{interval[1]:.3f}" if interval else "")
