"""The trained encoder for other tools: written beside, opened again by its tool, compared, then put in place."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from barlow import __version__
from barlow.card import CARD, model_card
from barlow.encoder import CONFIG, WEIGHTS, Encoder, encoder_folder, load_encoder
from barlow.errors import NumbersError, UserError, first_line
from barlow.files import check_output, keep_foreign, sync_folder
from barlow.hub import check_push, upload
from barlow.images import open_images
from barlow.portable import FromBytes
from barlow.runlog import read_arrays

Tool = Literal["timm", "onnx", "torch"]
Bytes = NDArray[np.uint8]
Opened = Callable[[Tensor], Tensor]

TESTED = 64  # held-out images that an export is compared on
TOOLS = {"timm": "timm", "onnx": "ONNX Runtime", "torch": "torch.export"}
ENDINGS = {"timm": "", "onnx": ".onnx", "torch": ".pt2"}
MARK = "barlow"  # in our files, by which a later export knows that it may replace them
# Largest difference allowed, as a share of the largest feature: rounding of float32; and where the images are resized
# inside, also one or two of 255 in some pixels (see ``portable``).
LIMIT, LIMIT_BYTES = 1e-4, 2e-2


@dataclass(frozen=True)
class Exported:
    """What was written, by what it was opened, and its largest difference from ours beside the largest feature."""

    path: Path
    tool: str
    images: int
    difference: float
    largest: float


def export_encoder(
    run: str | Path, to: Tool, output: str | Path, *, with_preprocessing: bool = False, images: Any = None,
    push: str | None = None,
) -> Exported:  # fmt: skip
    """Writes the encoder of ``run`` (a run folder or an encoder folder) to ``output`` for another tool.

    ``timm``: a folder for ``timm.create_model("local-dir:…")`` and ``transformers.AutoModel``, with a model card.
    ``onnx``: a file for ONNX Runtime. ``torch``: a ``torch.export`` archive, without pickle inside. The two files take
    preprocessed float32 (n, c, size, size) or, ``with_preprocessing``, uint8 (n, h, w, c); n, h and w are free.

    The export is opened again by its tool and compared with ours on the held-out images of the run, or on ``images``;
    when it differs (NumbersError) nothing is left behind. ``push`` then uploads the folder as that Hub repository.
    UserError for a missing extra, a wrong ending, an encoder that the tool cannot express, and ``with_preprocessing``
    for one that was not trained on uint8 images.
    """
    output = check_output(output)
    _check(to, output, with_preprocessing, push)
    encoder = load_encoder(run)
    if with_preprocessing and not encoder.shape and encoder.value_dtype != "uint8":
        raise UserError(f"{run}: this encoder takes {encoder.value_dtype or 'uint16 or float32'} images: export it "
                        "without --with-preprocessing and scale them (docs: how-to/many-channels).")  # fmt: skip
    shown = _test_images(Path(run), encoder, images)
    beside = output.with_name(f".{output.name}.{secrets.token_hex(4)}.tmp{ENDINGS[to]}")
    try:
        opened = _WRITERS[to](encoder, encoder_folder(run), beside, with_preprocessing)
        difference, largest = compare(encoder, opened, shown, with_preprocessing)
        beside.replace(output)
        sync_folder(output.parent)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside)
        else:
            beside.unlink(missing_ok=True)
    if push is not None:
        upload(output, push)
    return Exported(output, TOOLS[to], len(shown), difference, largest)


def compare(encoder: Encoder, opened: Opened, images: Sequence[Bytes], from_bytes: bool) -> tuple[float, float]:
    """(largest difference, largest feature) of an opened export and ours; NumbersError when they differ.

    Batches of one and of several; from bytes also images that are not square.
    """
    shown = [*images, *(image[:, : max(1, image.shape[1] * 3 // 4)] for image in images[: TESTED // 4] if from_bytes)]
    difference = largest = 0.0
    with torch.inference_mode():
        for batch in _batches(shown):
            ready = encoder.normalised(batch)
            ours = encoder(ready)
            theirs = opened(torch.from_numpy(np.stack(batch)) if from_bytes else ready.contiguous())
            if theirs.shape != ours.shape:
                raise NumbersError(f"The export returns {tuple(theirs.shape)} for {tuple(ours.shape)}: it was removed.")
            difference = max(difference, float((ours - theirs).abs().max().nan_to_num(torch.inf)))
            largest = max(largest, float(ours.abs().max()))
    limit = (LIMIT_BYTES if from_bytes else LIMIT) * max(largest, 1e-6)
    if not difference <= limit:
        raise NumbersError(
            f"The export's features differ from ours by up to {difference:.2g}, of {largest:.2g}; "
            f"allowed is {limit:.2g}. It was removed."
        )
    return difference, largest


def _batches(images: Sequence[Bytes]) -> Iterator[list[Bytes]]:
    """One image, then batches of images of one shape: a dynamic batch that is not dynamic shows here."""
    yield [images[0]]
    for shape in dict.fromkeys(image.shape for image in images):
        yield [image for image in images if image.shape == shape]


def _check(to: Tool, output: Path, with_preprocessing: bool, push: str | None) -> None:
    """Refuses what cannot work before anything is loaded."""
    if to not in ENDINGS:
        raise UserError(f"An encoder is exported to {', '.join(ENDINGS)}, not to {to!r}.")
    if to != "timm" and output.suffix != ENDINGS[to]:
        raise UserError(f"The output {output} must end in {ENDINGS[to]} for --to {to}.")
    if to == "timm" and (output.is_file() or (output.is_dir() and any(output.iterdir()))):
        raise UserError(f"The output {output} exists already; give -o a new or an empty folder.")
    if to != "timm" and output.is_dir():
        raise UserError(f"The output {output} is a folder; give -o a file that ends in {ENDINGS[to]}.")
    if to == "timm" and with_preprocessing:
        raise UserError("--with-preprocessing is for onnx and torch; a timm folder names its own in config.json.")
    if to == "onnx" and (missing := [m for m in ("onnx", "onnxscript", "onnxruntime") if find_spec(m) is None]):
        raise UserError(f"Export to ONNX needs {', '.join(missing)}: pip install 'barlow[onnx]'.")
    if to != "timm":
        keep_foreign(output, _FORMER[to])
    if push is not None:
        if to != "timm":
            raise UserError("--push uploads the timm folder; give --to timm with it.")
        check_push(push)


def _test_images(run: Path, encoder: Encoder, images: Any) -> list[Bytes]:
    """Up to ``TESTED`` images as bytes (h, w, c): some of ``images``, or the held-out ones that the run has kept."""
    if images is not None:
        source = open_images(images, channels=encoder.channels, value_range=encoder.value_range)
        if source.dtype != "uint8":
            raise UserError(f"The images {images} are {source.dtype}; an export is compared on 8-bit images; "
                            "without --images those are taken that the run has kept.")  # fmt: skip
        chosen = np.unique(np.linspace(0, len(source) - 1, TESTED).astype(np.int64))
        return [source.read_or_replace(int(i))[0] for i in chosen]
    for folder in (run, encoder_folder(run).parent):
        kept = read_arrays(folder / "snapshots" / "held_out.npz").get("images", np.zeros(0))
        if kept.dtype == np.uint8 and kept.ndim == 4 and len(kept) and kept.shape[3] == encoder.channels:
            return list(kept[:TESTED])
    raise UserError(f"{run} keeps no held-out images to compare the export on; name some with --images.")


def _write_timm(encoder: Encoder, folder: Path, path: Path, _: bool) -> Opened:
    """A copy of the encoder folder with its model card as it is now, opened by timm from there."""
    import timm

    path.mkdir()
    for name in (WEIGHTS, CONFIG):
        shutil.copyfile(folder / name, path / name)
    (path / CARD).write_text(model_card(folder), encoding="utf-8")
    for written in path.iterdir():
        with written.open("rb") as file:
            os.fsync(file.fileno())
    with _quiet():
        model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    return _called(model)


def _write_torch(encoder: Encoder, _: Path, path: Path, with_preprocessing: bool) -> Opened:
    network, example, free = _traced(encoder, with_preprocessing)
    dims = {axis: torch.export.Dim(name) for axis, name in free.items()}
    with _in_words("torch.export"), _quiet():
        program = torch.export.export(network, (example,), dynamic_shapes=(dims,))
        program.example_inputs = None  # they are stored as pickle, and nobody needs them
        torch.export.save(program, path, extra_files={MARK: __version__})
    _holds_no_pickle(path)
    with _quiet():
        return _called(torch.export.load(path).module())


def _write_onnx(encoder: Encoder, _: Path, path: Path, with_preprocessing: bool) -> Opened:
    import onnx
    import onnxruntime

    network, example, free = _traced(encoder, with_preprocessing)
    name = "images" if with_preprocessing else "pixel_values"
    with _in_words("ONNX"), _quiet():
        program = torch.onnx.export(network, (example,), dynamo=True, dynamic_shapes=(free,), input_names=[name],
                                    output_names=["features"], verbose=False)  # fmt: skip
        assert program is not None
        program.model.metadata_props[MARK] = __version__
        program.save(path)
        onnx.checker.check_model(path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["features"], {name: x.numpy()})[0])


def _is_former_torch(there: Path) -> bool:
    with zipfile.ZipFile(there) as archive:
        return any(name.endswith(f"/{MARK}") for name in archive.namelist())


def _is_former_onnx(there: Path) -> bool:
    import onnx

    return any(entry.key == MARK for entry in onnx.load(there, load_external_data=False).metadata_props)


_FORMER = {"torch": _is_former_torch, "onnx": _is_former_onnx}
_WRITERS: dict[str, Callable[[Encoder, Path, Path, bool], Opened]] = {
    "timm": _write_timm, "onnx": _write_onnx, "torch": _write_torch,
}  # fmt: skip


def _traced(encoder: Encoder, with_preprocessing: bool) -> tuple[nn.Module, Tensor, dict[int, str]]:
    """(network, example of its input, axes that stay free)."""
    if with_preprocessing:
        example = torch.zeros(2, encoder.size + 3, encoder.size + 7, encoder.channels, dtype=torch.uint8)
        return FromBytes(encoder).eval(), example, {0: "batch", 1: "height", 2: "width"}
    return encoder, torch.zeros(2, encoder.channels, encoder.size, encoder.size), {0: "batch"}


def _holds_no_pickle(path: Path) -> None:
    """UserError when torch has put anything into the archive that its loader would unpickle."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            pickled = b'"use_pickle": true' in archive.read(entry) if entry.filename.endswith("_config.json") else False
            if pickled or (entry.file_size and "/sample_inputs/" in entry.filename):
                raise UserError(
                    f"torch would store {entry.filename} of this encoder as pickle; export to onnx or timm."
                )


def _called(network: nn.Module) -> Opened:
    return lambda x: network(x)


@contextmanager
def _in_words(tool: str) -> Iterator[None]:
    """Whatever a tracer raises on a network that it cannot express is one sentence (UserError)."""
    try:
        yield
    except (UserError, MemoryError, KeyboardInterrupt):
        raise
    except OSError as error:
        raise UserError(f"The export cannot be written: {error.strerror or error}.") from None
    except Exception as error:  # each tracer has its own family of exceptions
        reason = f"{type(error).__name__}: {first_line(error)[:200]}"
        raise UserError(f"This encoder cannot be exported to {tool}: {reason}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """What the tools warn about while they write and read is about themselves, not about the encoder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "timm", "onnxscript", "onnx_ir")]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
