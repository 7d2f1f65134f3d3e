"""A contact sheet: some originals, their views as the network will see them, and what was drawn written under each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from barlow.draws import order
from barlow.errors import DataError
from barlow.guard import BadImage
from barlow.views import Draws, OwnView, View, apply_own, crop, draw, finish, generator

CELL, GAP, LETTERS, LINE = 224, 20, 13, 17  # pixels: a picture, between pictures, a letter's and a line's height
INK, PAPER = "#333333", "#ffffff"
MARK = ("Software", "barlow views")  # what a contact sheet says of itself
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # of the views; safe for colour-blind eyes


class Readable(Protocol):
    """What a contact sheet asks of its images; ``read`` gives (h, w, c) or raises BadImage."""

    def __len__(self) -> int: ...
    def read(self, i: int) -> NDArray[Any]: ...
    def key(self, i: int) -> str: ...


class Cell(NamedTuple):
    picture: Image.Image
    text: str


def contact_sheet(
    images: Readable, views: Sequence[View | OwnView], *, size: int, seed: int, count: int = 8, path: Path,
    partners: Readable | None = None,
) -> Path:  # fmt: skip
    """Writes a PNG of ``count`` images, one a row: the original with the crops marked, then its views of ``size``.

    The seed chooses the images; what is drawn for them is what epoch 0 of a run with this seed draws. Unreadable
    images are passed over. Of more than three channels the first three are shown, stretched to what the original holds.
    ``partners``: the second images of given pairs; each row then begins with both originals, and the views alternate.
    """
    sources = [images] if partners is None else [images, partners]
    chosen, arrays = _readable(sources, seed, count)
    columns = [_view(view, k, arrays[k % len(arrays)], chosen, size, seed) for k, view in enumerate(views)]
    rows = []
    for r, number in enumerate(chosen.tolist()):
        cells = []
        for s, source in enumerate(sources):
            boxes = [(k, drawn.box[r]) for k, (drawn, _) in enumerate(columns) if k % len(sources) == s]
            cells.append(_original(source.key(number), arrays[s][r], boxes))
        for k, (view, (drawn, made)) in enumerate(zip(views, columns, strict=True)):
            text = ", ".join(caption(drawn, r)) if isinstance(view, View) else "your own view"
            low, high = _range(arrays[k % len(arrays)][r])
            cells.append(Cell(_fitted(_picture(made[r], low, high))[0], text))
        rows.append(cells)
    mark = PngInfo()
    mark.add_text(*MARK)
    _composed(rows, originals=len(sources)).save(path, format="PNG", pnginfo=mark)
    return path


def is_sheet(path: Path) -> bool:
    """Whether a PNG is a contact sheet that ``contact_sheet`` wrote."""
    with Image.open(path, formats=["PNG"]) as image:
        return bool(image.info.get(MARK[0]) == MARK[1])


def cell(array: NDArray[Any], key: str, text: str) -> Cell:
    """One picture (h, w, c) of a sheet, its name and a line of text under it."""
    low, high = _range(array)
    return Cell(_fitted(_picture(array, low, high))[0], f"{_shortened(key)}\n{text}" if text else _shortened(key))


def strips(rows: Sequence[tuple[str, Sequence[Cell]]]) -> Image.Image:
    """A sheet of titled rows of pictures, each row as long as it is; a blank page when there are none."""
    pages = [_composed([list(cells)], [title]) for title, cells in rows if cells]
    width, height = max((p.width for p in pages), default=CELL), sum(p.height for p in pages)
    sheet, top = Image.new("RGB", (width, height or CELL), PAPER), 0
    for page in pages:
        sheet.paste(page, (0, top))
        top += page.height
    return sheet


def _original(key: str, array: NDArray[Any], boxes: list[tuple[int, NDArray[np.int64]]]) -> Cell:
    """An image with the crops of these views marked, each in the colour of its view."""
    picture, scale = _fitted(_picture(array, *_range(array)))
    marks = ImageDraw.Draw(picture)
    for k, box in boxes:
        x, y, w, h = (box * scale).tolist()
        for inset in range(2):
            edges = (x + inset, y + inset, max(x + inset, x + w - 1 - inset), max(y + inset, y + h - 1 - inset))
            marks.rectangle(edges, outline=COLOURS[k % len(COLOURS)])
    return Cell(picture, f"{_shortened(key)}\n{array.shape[1]} × {array.shape[0]} pixels")


def caption(draws: Draws, i: int) -> list[str]:
    """What was drawn for image ``i`` in a few words each; what was left as it is goes unmentioned."""
    width, height = draws.box[i, 2:].tolist()
    said = [f"crop {width} × {height}"]
    said += ["flipped"] if draws.flip[i] else []
    said += ["upside down"] if draws.flip_vertical[i] else []
    said += [f"turned {90 * draws.turn[i]}°"] if draws.turn[i] else []
    for name in ("brightness", "contrast", "saturation"):
        change = round(100 * (float(getattr(draws, name)[i]) - 1))
        said += [f"{name} {_signed(change)} %"] if change and not (name == "saturation" and draws.gray[i]) else []
    turned = round(360 * float(draws.hue[i]))
    said += [f"hue {_signed(turned)}°"] if turned and not draws.gray[i] else []
    if (draws.gain[i] != 1).any():
        said.append(f"gains {draws.gain[i].min():.2f} to {draws.gain[i].max():.2f}")
    if draws.offset[i].any():
        said.append(f"offsets {_signed(100 * draws.offset[i].min())} to {_signed(100 * draws.offset[i].max())} %")
    said += ["gray"] if draws.gray[i] else []
    said += [f"blur σ {draws.sigma[i]:.1f}"] if draws.sigma[i] else []
    said += ["solarised"] if np.isfinite(draws.solarize[i]) else []
    erased = float(draws.erased[i, 2] * draws.erased[i, 3])
    said += [f"{100 * erased:.0f} % painted over"] if erased else []
    return said


def _signed(number: float) -> str:
    return f"{number:+.0f}".replace("-", "−")


def _readable(sources: Sequence[Readable], seed: int, count: int) -> tuple[NDArray[np.int64], list[list[NDArray[Any]]]]:
    """Numbers of images that can be read, and for each source their arrays."""
    chosen: list[int] = []
    rows: list[list[NDArray[Any]]] = []
    for i in order(seed, 0, len(sources[0]), np.arange(len(sources[0]))) if len(sources[0]) else ():
        if len(rows) == count:
            break
        try:
            rows.append([source.read(int(i)) for source in sources])
            chosen.append(int(i))
        except BadImage:
            continue
    if not rows:
        raise DataError("no image could be read, so there is nothing to show; `barlow check` lists the reasons")
    return np.array(chosen), [list(arrays) for arrays in zip(*rows, strict=True)]


def _view(
    view: View | OwnView, number: int, arrays: list[NDArray[Any]], chosen: NDArray[np.int64], size: int, seed: int
) -> tuple[Draws, NDArray[Any]]:
    """What is drawn for a view, and its pictures, float (n, size, size, c) in [0, 1]."""
    sizes, channels = np.array([array.shape[:2] for array in arrays]), arrays[0].shape[2]
    epochs = np.zeros(len(chosen), np.int64)
    drawn = draw(view if isinstance(view, View) else View(), seed, epochs, chosen, number, sizes, channels)
    crops, plain = torch.from_numpy(crop(arrays, drawn, size)), ([0.0] * channels, [1.0] * channels)
    if isinstance(view, View):
        made = finish(crops, drawn, *plain)
    else:
        made = apply_own(view, crops, generator(seed, epochs, chosen, number), *plain)
    return drawn, made.permute(0, 2, 3, 1).numpy()


def _range(array: NDArray[Any]) -> tuple[float, float]:
    """What is shown as black and white: the full range of photographs, the central 98 % of anything else."""
    if array.dtype == np.uint8 and array.shape[2] in (1, 3):
        return 0.0, 1.0
    low, high = np.percentile(_unit(array[..., :3]), (1, 99))
    return float(low), float(max(high, low + 1e-6))


def _unit(array: NDArray[Any]) -> NDArray[Any]:
    return array / np.iinfo(array.dtype).max if array.dtype.kind == "u" else array


def _picture(array: NDArray[Any], low: float, high: float) -> Image.Image:
    """(h, w, c) of any channels as RGB: one or two show the first as gray, more the first three."""
    shown = _unit(array[..., :3] if array.shape[2] >= 3 else array[..., :1].repeat(3, axis=2))
    return Image.fromarray(np.rint(np.clip((shown - low) / (high - low), 0, 1) * 255).astype(np.uint8))


def _fitted(picture: Image.Image) -> tuple[Image.Image, float]:
    """The picture at the size of a cell and the factor: small ones by a whole number, so that pixels can be seen."""
    scale = CELL / max(picture.size)
    scale, how = (int(scale), Image.Resampling.NEAREST) if scale >= 1 else (scale, Image.Resampling.LANCZOS)
    width, height = (max(1, round(v * scale)) for v in picture.size)
    return picture.resize((width, height), how), scale


def _shortened(key: str) -> str:
    return key if len(key) <= 30 else f"{key[:12]}…{key[-17:]}"


def _composed(rows: list[list[Cell]], headings: Sequence[str] = (), originals: int = 1) -> Image.Image:
    """The sheet: a line of headings (without any: original, view 1, …), then rows of pictures with their text."""
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"  # Pillow's own font has no σ
    font = ImageFont.truetype(str(file), LETTERS)
    lines = [[_wrapped(cell.text, font) for cell in row] for row in rows]
    heights = [
        max(cell.picture.height + LINE * len(text) for cell, text in zip(row, said, strict=True))
        for row, said in zip(rows, lines, strict=True)
    ]
    step = CELL + GAP
    sheet = Image.new("RGB", (GAP + step * len(rows[0]), 2 * GAP + LINE + sum(heights) + GAP * len(rows)), PAPER)
    pen = ImageDraw.Draw(sheet)
    views = [(f"view {k + 1}", COLOURS[k % len(COLOURS)]) for k in range(len(rows[0]) - originals)]
    shown = [(heading, INK) for heading in headings] or [("original", INK)] * originals + views
    for k, (heading, colour) in enumerate(shown):
        pen.text((GAP + k * step, GAP), heading, fill=colour, font=font)
    top = 2 * GAP + LINE - 8
    for row, said, height in zip(rows, lines, heights, strict=True):
        for k, (cell, text) in enumerate(zip(row, said, strict=True)):
            left, below = GAP + k * step, top + cell.picture.height + 4
            sheet.paste(cell.picture, (left, top))
            for number, line in enumerate(text):
                pen.text((left, below + number * LINE), line, fill=INK, font=font)
        top += height + GAP
    return sheet


def _wrapped(text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines no wider than a cell, broken after commas and at line ends."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        lines.append("")
        for word in paragraph.split(", "):
            longer = f"{lines[-1]}, {word}" if lines[-1] else word
            if lines[-1] and font.getlength(longer) > CELL:
                lines[-1] += ","
                lines.append(word)
            else:
                lines[-1] = longer
    return lines
