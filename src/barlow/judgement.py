"""What labels said of a run, for the report: evaluation.json as a table, a confusion picture and a curve."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup

from barlow.pictures import Line, chart, diverging, number


def evaluation_table(stored: Any) -> dict[str, Any] | None:
    """evaluation.json as a table, the best of each row marked; None without rows and columns."""
    found, named = (stored.get(key) for key in ("rows", "columns")) if isinstance(stored, dict) else (None, None)
    if not isinstance(found, list) or not isinstance(named, list):
        return None
    rows = [row for row in found if isinstance(row, dict) and "protocol" in row]
    columns = [c for c in dict.fromkeys(map(str, named)) if any(number(row.get(c)) is not None for row in rows)]
    if not columns:
        return None
    counts = stored.get("training_labels")
    table = []
    for row in rows:
        count = number(counts.get(row["protocol"])) if isinstance(counts, dict) else None
        note = f"{count:,.0f} labels" if count else ""
        table.append({"protocol": str(row["protocol"]), "note": note, "cells": _cells(row, columns)})
    return {"columns": columns, "rows": table, "confusion": _confusion(stored), "curve": _curve(stored, rows, columns)}


def _cells(row: dict[str, Any], columns: list[str]) -> list[dict[str, Any]]:
    share = row.get("unit", "accuracy") != "R²"
    stored = row.get("intervals")
    ends: dict[str, Any] = stored if isinstance(stored, dict) else {}
    values = [number(row.get(column)) for column in columns]
    best = max((v for v in values if v is not None), default=None)
    return [
        {"text": _score(v, share), "best": v is not None and v == best, "interval": _interval(ends.get(c), share),
         "width": 100 * min(max(v, 0.0), 1.0) if v else 0.0}
        for c, v in zip(columns, values, strict=True)
    ]  # fmt: skip


def _score(value: float | None, share: bool) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}%" if share else f"{value:.3f}"


def _interval(ends: Any, share: bool) -> str:
    if isinstance(ends, list | tuple) and len(ends) == 2 and all(number(end) is not None for end in ends):
        return f"{_score(float(ends[0]), share)} – {_score(float(ends[1]), share)}"
    return ""


def _confusion(stored: dict[str, Any]) -> dict[str, Any] | None:
    """The first confusion matrix of the trained encoder: its picture (rows sum to 1), protocol and class names."""
    try:
        protocols = stored["details"]["trained"].items()
        protocol, counts = next(
            (name, np.array(d["confusion"], np.float64)) for name, d in protocols if "confusion" in d
        )
        names = [str(name) for name in stored["classes"]]
    except (AttributeError, KeyError, StopIteration, TypeError, ValueError):
        return None
    if counts.ndim != 2 or not len(counts) == counts.shape[1] == len(names) > 0:
        return None
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return {"picture": diverging(-shares), "protocol": protocol, "names": names if len(names) <= 24 else []}


def judged(table: dict[str, Any] | None) -> dict[str, Any] | None:
    """The first row of the table as a line under the verdict: whether training has paid, where labels tell."""
    if table is None or "trained" not in table["columns"] or len(table["columns"]) < 2:
        return None
    row = table["rows"][0]
    cells = dict(zip(table["columns"], row["cells"], strict=True))
    sentence = f"{row['protocol']}: " + ", ".join(f"{cell['text']} {column}" for column, cell in cells.items()) + "."
    best = cells["trained"]["best"] and sum(cell["best"] for cell in row["cells"]) == 1  # a tie has not paid
    return {
        "of": "With labels",
        "word": "better" if best else "not better yet",
        "sentence": sentence,
        "tone": "good" if best else "wait",
    }


def _curve(stored: dict[str, Any], rows: list[dict[str, Any]], columns: list[str]) -> Markup:
    """Accuracy of linear probes by the number of labels they were given, a line for each kind of features."""
    counts = stored.get("training_labels")
    probes = [row for row in rows if row["protocol"] == "linear" or str(row["protocol"]).endswith("% of labels")]
    if not isinstance(counts, dict) or len(probes) < 2 or any(row.get("unit") == "R²" for row in probes):
        return Markup("")
    lines = []
    for place, column in enumerate(columns):
        points = sorted(
            (count, value)
            for row in probes
            if (count := number(counts.get(row["protocol"]))) and (value := number(row.get(column))) is not None
        )
        tone = ("one", "two", "faint", "between")[min(place, 3)]
        lines.append(Line(column, [p[0] for p in points], [p[1] for p in points], tone, dashed=place > 1))
    return chart(lines, title="Linear probes by number of labels", x_label="labels", x_log=True, percent=True)
