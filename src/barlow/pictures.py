"""The pictures of the report: charts as inline SVG that stretches with the page and takes its colours from it, arrays
and thumbnails as data URIs. Transparent, so that they stand on light and dark pages alike; nothing refers outside.

Drawn here and not with a plotting library: text stays text at any width, a chart costs a few kB instead of fifty, and
a report is written in a fraction of a second.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]

POINTS = 300  # of a line; more are averaged in groups
MINUS, PLUS = (44, 112, 178), (208, 92, 56)  # the two ends of the diverging palette; zero is transparent
LEVELS = 24  # steps of each half of the palette
SMALL = 40  # pixels: the largest side of a picture that is kept without loss, and of one on a sheet of many


class Line(NamedTuple):
    """One line of a chart. ``tone`` is a CSS class: "one", "two", "faint" or "between"; bounds are ``dashed``."""

    label: str
    x: Sequence[float] | Array
    y: Sequence[float] | Array
    tone: str = "one"
    dashed: bool = False


class Axis(NamedTuple):
    """A scale from data to 0..1: its ends, whether it is logarithmic, and the values that get a tick."""

    low: float
    high: float
    log: bool
    ticks: list[float]

    def place(self, values: Array) -> Array:
        """Where the values lie between the ends, 0..1."""
        if self.log:
            values = np.log10(np.maximum(values, 1e-300))
            low, high = math.log10(self.low), math.log10(self.high)
        else:
            low, high = self.low, self.high
        return np.asarray(np.clip((values - low) / (high - low), -0.02, 1.02))


def number(value: Any) -> float | None:
    """``value`` as a finite float; None for anything else (missing, null, a word)."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def short(value: float) -> str:
    """A number as people write it on an axis: 1,200 · 0.05 · 1e-7."""
    size = abs(value)
    if value == 0:
        return "0"
    if 1e-4 <= size < 1e-2:
        return f"{value:.5f}".rstrip("0").rstrip(".") if size >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")
    if 1e-2 <= size < 1e6:
        return f"{value:,.3f}".rstrip("0").rstrip(".") if size < 100 else f"{value:,.0f}"
    return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")


def axis(values: Array, *, log: bool = False, zero: bool = False, low: float | None = None) -> Axis:
    """An axis that holds the finite ``values`` (positive ones when ``log``), with three to six round ticks."""
    values = values[np.isfinite(values) & (values > 0 if log else True)]
    if not values.size:
        values = np.array([1.0])
    bottom, top = float(values.min()), float(values.max())
    if log:
        bottom = max(bottom if low is None else max(low, bottom), top * 1e-12)
        first, last = math.floor(math.log10(bottom) + 1e-9), math.ceil(math.log10(top) - 1e-9)
        last = max(last, first + 1)
        step = max(1, math.ceil((last - first) / 5))
        return Axis(10.0**first, 10.0**last, True, [10.0**k for k in range(first, last + 1, step)])
    bottom = min(bottom, 0.0) if zero else bottom
    if top - bottom <= 1e-12 * max(abs(top), 1.0):
        bottom, top = (0.0, top * 1.25) if top > 0 else (bottom if zero else bottom - 1, top + 1)
    raw = (top - bottom) / 4
    unit = 10 ** math.floor(math.log10(raw))
    step_size = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999)
    first, last = math.floor(bottom / step_size + 1e-9), math.ceil(top / step_size - 1e-9)
    return Axis(first * step_size, last * step_size, False, [k * step_size for k in range(first, last + 1)])


def thin(x: Array, y: Array) -> tuple[Array, Array]:
    """At most ``POINTS`` points: groups of neighbours become their mean; the last point stays as it is."""
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) <= POINTS:
        return x, y
    edges = np.linspace(0, len(x) - 1, POINTS).astype(int)
    count = np.diff(edges)
    means = [np.append(np.add.reduceat(v[:-1], edges[:-1]) / count, v[-1]) for v in (x, y)]
    return means[0], means[1]


def chart(
    lines: Sequence[Line], *, title: str, x_label: str, x_log: bool = False, y_log: bool = False, zero: bool = False,
    low: float | None = None, percent: bool = False, note: str | None = None,
) -> Markup:  # fmt: skip
    """A line chart as HTML: SVG for the lines, text for everything that is read. Empty lines are left out.

    ``zero`` lets a linear y axis begin at 0; ``low`` bounds a logarithmic one below; ``percent`` writes y as shares. A
    ``note`` stands in place of the key to the lines.
    """
    drawn = [(line, *thin(np.asarray(line.x, np.float64), np.asarray(line.y, np.float64))) for line in lines]
    drawn = [entry for entry in drawn if len(entry[1])]
    if not drawn:
        return Markup("")
    every_x, every_y = (np.concatenate([entry[i] for entry in drawn]) for i in (1, 2))
    across = axis(every_x, log=x_log)
    if not x_log:  # steps end where the run ends, not at the next round number
        across = across._replace(low=float(every_x.min()), high=max(float(every_x.max()), float(every_x.min()) + 1e-9))
    up = axis(every_y, log=y_log, zero=zero, low=low)
    paths = "".join(_path(line, across.place(x), up.place(y)) for line, x, y in drawn)
    rules = "".join(f'<line x1="0" x2="1000" y1="{h:.1f}" y2="{h:.1f}"/>' for h in _heights(up))
    name = escape(f"{title}: " + ", ".join(line.label for line, _, _ in drawn))
    label = (lambda v: f"{100 * v:.4g}%") if percent else short
    heights = _heights(up)
    ys = "".join(f'<span style="top:{h / 10:.2f}%">{label(t)}</span>' for h, t in zip(heights, up.ticks, strict=True))
    xs = "".join(
        f'<span style="left:{100 * p:.2f}%">{short(t)}</span>'
        for p, t in zip(across.place(np.array(across.ticks)), across.ticks, strict=True)
        if -0.001 <= p <= 1.001
    )
    key = "".join(_key(line) for line, _, _ in drawn) if note is None else f'<span class="quiet">{escape(note)}</span>'
    return Markup(
        f'<figure class="chart"><figcaption><b>{escape(title)}</b>{key}</figcaption>'
        f'<div class="plot"><div class="ys">{ys}</div>'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{name}">'
        f'<g class="rules">{rules}</g>{paths}</svg>'
        f'<div class="xs">{xs}</div></div><p class="axis">{escape(x_label)}</p></figure>'
    )


def _heights(up: Axis) -> list[float]:
    return [float(1000 * (1 - p)) for p in up.place(np.array(up.ticks))]


def _path(line: Line, x: Array, y: Array) -> str:
    style = f'class="line {line.tone}{" dashed" if line.dashed else ""}"'
    if len(x) == 1:  # one point shows as a short stroke
        x, y = np.array([x[0] - 0.01, x[0] + 0.01]), np.repeat(y, 2)
    points = " ".join(f"{1000 * a:.1f},{1000 * (1 - b):.1f}" for a, b in zip(x, y, strict=True))
    return f'<polyline {style} points="{points}"/>'


def _key(line: Line) -> str:
    return f'<span class="key {line.tone}{" dashed" if line.dashed else ""}">{escape(line.label)}</span>'


def data_uri(image: Image.Image, **options: Any) -> str:
    """A PNG (or, with ``format``, another file) of the image as a data URI."""
    buffer = io.BytesIO()
    kind = options.pop("format", "PNG")
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def diverging(values: Array) -> str:
    """A (h, w) array in −1 … 1 as a picture: blue below zero, red above, zero transparent; the rest is cut off."""
    level = np.rint(np.clip(np.nan_to_num(values), -1, 1) * LEVELS).astype(np.int64) + LEVELS
    image = Image.frombytes("P", values.shape[::-1], level.astype(np.uint8).tobytes())
    image.putpalette([c for k in range(-LEVELS, LEVELS + 1) for c in (MINUS if k < 0 else PLUS)])
    alpha = bytes(round(255 * (abs(k) / LEVELS) ** 0.75) for k in range(-LEVELS, LEVELS + 1))
    return data_uri(image, transparency=alpha, optimize=True)


def picture(array: Array) -> Image.Image:
    """A uint8 (h, w, c) array as an image: one channel gray, two the first of them, more the first three as colours."""
    array = np.asarray(array, np.uint8)
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1] < 3 else array[..., :3]))


def thumbnail(array: Array) -> str:
    """One image as a data URI: PNG when small, else JPEG."""
    image = picture(array)
    return data_uri(image, optimize=True) if max(image.size) <= SMALL else data_uri(image, format="JPEG", quality=85)


def sheet(images: Array) -> tuple[str, int]:
    """All images (m, s, s, c) on one square sheet of cells of at most ``SMALL`` pixels: (data URI, cells a row)."""
    cells = math.ceil(math.sqrt(len(images)))
    side = min(SMALL, images.shape[1])
    canvas = Image.new("L" if images.shape[-1] < 3 else "RGB", (cells * side, cells * side))
    for i, array in enumerate(images):
        small = picture(array).resize((side, side), Image.Resampling.BOX)
        canvas.paste(small, (i % cells * side, i // cells * side))
    return data_uri(canvas, format="JPEG", quality=80), cells


def apart(points: Array, gap: float, most: int) -> NDArray[np.bool_]:
    """Marks up to ``most`` of the points (m, 2), in order, none within ``gap`` (in both directions) of another."""
    chosen: list[int] = []
    for i, point in enumerate(points):
        if len(chosen) < most and all(np.abs(point - points[j]).max() >= gap for j in chosen):
            chosen.append(i)
    marks = np.zeros(len(points), dtype=bool)
    marks[chosen] = True
    return marks
