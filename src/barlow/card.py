"""The model card of an encoder folder: what it is, how to open it, what trained it, what was measured, limits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from barlow.config import OWN
from barlow.encoder import read_config
from barlow.files import atomic_write
from barlow.index import OK
from barlow.judgement import evaluation_table
from barlow.report import Folder, read_folder
from barlow.story import last, overall, spell

CARD = "README.md"

FRONT = """---
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- timm
- transformers
- self-supervised-learning
- barlow-twins
---
"""
SETTINGS = (
    "image_size", "channels", "views", "twins", "projector", "lambda", "batch_size", "steps", "optimizer", "lr",
    "weight_decay", "precision", "seed", "pretrained",
)  # fmt: skip
MEASURES = (  # measure, words
    ("twins_found", "held-out images that find their second view among all others"),
    ("effective_rank", "effective rank: directions in use"),
    ("relative_spread", "relative spread: 0 is the same answer for every image"),
    ("mean_diagonal", "agreement of the two views"),
    ("off_diagonal_excess", "redundancy between features; 1 is chance"),
)
SQUARE = """\
def square(im):  # barlow cuts the middle square first
    s = min(im.size)
    left, top = (im.width - s) // 2, (im.height - s) // 2
    return im.crop((left, top, left + s, top + s))
"""
LIMITS = """\
- The features know what separates the training images under these random views, and nothing else. What the views change
  (colour, position, scale …) the encoder was trained to ignore.
- The measures above are label-free: they show that the encoder has not collapsed, not that it is good at a task.
  Measure that with labels of your own.
- Images of another kind, size or number of channels than the training images are outside what was measured.
- No licence is stated here. It depends on the training images: choose one before you publish.
"""


def write_card(folder: Path) -> None:
    """Writes README.md into an encoder folder."""
    atomic_write(folder / CARD, model_card(folder))


def model_card(folder: Path) -> str:
    """The card of an encoder folder, as Markdown with front matter; from the run folder around it what is there.

    No path, host or user name goes into it: a card is made to be published.
    """
    config = read_config(folder)
    run = read_folder(folder.parent)
    takes = config["pretrained_cfg"]["input_size"]
    features = config.get("num_features", "")
    name = _escaped(str(config["architecture"]).removeprefix(OWN))
    usage = _usage_of_own(name) if name != config["architecture"] else _usage(config, *takes[:2])
    usage += _range(config["barlow"].get("value_range"), config["barlow"].get("value_dtype"))
    what, unit = ("A", "numbers") if "shape" in config["barlow"] else ("An image", "pixels")
    size = " × ".join(map(str, takes))
    parts = [
        FRONT,
        f"# {name}, trained with Barlow Twins\n",
        f"{what} encoder ({name}, {features} features, {size} {unit}), trained without labels with "
        f"[Barlow Twins](https://arxiv.org/abs/2103.03230) on {_images(run)}.\n",
        usage,
        f"## Training\n\n{_settings(config, run)}",
        f"## Label-free measures\n\n{_measures(run)}",
        _labels(run),
        f"## Limits\n\n{LIMITS}",
    ]
    return "\n".join(part for part in parts if part)


def _usage(config: dict[str, Any], channels: int, size: int) -> str:
    pictures = channels == 3 and config["barlow"].get("value_range") is None  # such as Pillow opens
    code = [
        "import timm", *(["from PIL import Image, ImageOps"] if pictures else []), "",
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # on the Hub: "hf-hub:user/name"',
    ]  # fmt: skip
    if pictures:
        code += ["transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))",
                 "", "", SQUARE, "",
                 'image = square(ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB"))',
                 "features = model(transform(image).unsqueeze(0))",
                 "", "from transformers import AutoImageProcessor, AutoModel", "",
                 'model = AutoModel.from_pretrained("FOLDER")',
                 'processor = AutoImageProcessor.from_pretrained("FOLDER")',
                 'features = model(**processor(image, return_tensors="pt")).pooler_output']  # fmt: skip
    else:
        code += ["# timm's transform is for RGB pictures; this encoder takes the middle square of an image, resized"
                 f"\n# (bicubic, antialiased) to {channels} × {size} × {size}, scaled to 0..1, less "
                 "model.pretrained_cfg['mean'],\n# divided by model.pretrained_cfg['std']"]  # fmt: skip
    return "## Use\n\n```python\n" + "\n".join(code) + "\n```\n"


def _range(span: Sequence[float] | None, dtype: str | None) -> str:
    if span is None:
        return ""
    low, high = (f"{end:.8g}" for end in span)
    code = [f"lo, hi = {low}, {high}", "x = np.clip((x - lo) / (hi - lo), 0, 1)"]
    if dtype != "uint16":
        code = ["finite = np.isfinite(x)  # what is not becomes the least number of its channel",
                "least = np.where(finite, x, np.inf).min((0, 1))",
                "x = np.where(finite, x, np.where(least < np.inf, least, 0))", *code]  # fmt: skip
    return ("\nValues (of 16 bits as shares of 65,535, others as they are) are brought to 0..1 first, as\n"
            "`barlow embed` and `Encoder.preprocess` do, of an image `x` (rows, columns, channels):\n\n"
            "```python\n" + "\n".join(code) + "\n```\n")  # fmt: skip


def _usage_of_own(name: str) -> str:
    code = f"from barlow import load_encoder\n\nencoder = load_encoder(FOLDER, model)  # model: a {name}, newly built"
    return f"## Use\n\nThe network is code that is not in this folder.\n\n```python\n{code}\n```\n"


def _images(run: Folder) -> str:
    source = run.config.get("images")
    name = _plain(Path(str(source)).name) if source else "images that the run does not name"
    count = _count(run)
    return f"{count:,} images of `{name}`" if source and count else f"`{name}`" if source else name


def _count(run: Folder) -> int:
    """Number of images that were trained on, which neither the held-out nor the quarantined ones were; 0 where there
    is no index."""
    import pyarrow.parquet as pq

    index = run.path / "index.parquet"
    try:
        status = pq.read_table(index, columns=["status"])["status"].to_pylist() if index.is_file() else []
    except (OSError, ValueError):
        return 0
    usable = [word for word in status if word == OK]
    broken = [row for row in run.quarantined if row.get("found") == "pixels"]
    return max(0, len(usable) - len(broken) - len(run.held_out.get("keys", ())))


def _settings(config: dict[str, Any], run: Folder) -> str:
    rows = [("encoder", f"{config['architecture']} {config['model_args']}")]
    rows += [(word, spell(run.config[word])) for word in SETTINGS if word in run.config]
    rows += [(word, str(run.environment[word])) for word in ("barlow", "torch", "timm") if word in run.environment]
    return _table(("setting", "value"), rows)


def _measures(run: Folder) -> str:
    health = run.lines["health"]
    if not health:
        return "None were recorded beside these files.\n"
    verdict = overall(health)
    rows = []
    for measure, words in MEASURES:
        found = [last(health, measure, of=of) for of in ("features", "embedding")]
        if any(value is not None for value in found):
            rows.append((words, *("" if value is None else f"{value:.3g}" for value in found)))
    images = last(health, "n", of="features")
    told = f"Verdict: **{verdict['word']}**. {_escaped(verdict['sentence'])}"
    note = f"On {images:,.0f} images that were not trained on:\n" if images else ""
    return "\n".join([told + "\n", note, _table(("measure", "encoder", "projector"), rows)])


def _labels(run: Folder) -> str:
    table = evaluation_table(run.evaluation)
    if table is None:
        return ""
    rows = [(row["protocol"], *(cell["text"] for cell in row["cells"])) for row in table["rows"]]
    return "## Measured with labels\n\n" + _table(("protocol", *table["columns"]), rows)


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(_escaped(str(cell)) for cell in line) + " |" for line in lines) + "\n"


def _plain(text: str) -> str:
    """Text from outside as one line that cannot end a table, a code span or the front matter."""
    return re.sub(r"[\s|`<>]+", " ", text).strip()


def _escaped(text: str) -> str:
    """``_plain`` text outside a code span, where brackets would make a link."""
    return re.sub(r"([\\\[\]])", r"\\\1", _plain(text))
