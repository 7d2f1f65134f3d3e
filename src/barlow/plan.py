"""The automatic choices: what is not given is chosen from the images and the machine, each with its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from barlow.config import OWN, Config, word
from barlow.errors import UserError
from barlow.objective import default_lambda
from barlow.quarantine import MAX_BAD
from barlow.views import suggest

# For small images without a GPU, by measurement (docs/log.md, "Three stages, …"): four end in maps of 2 by 2 pixels.
NARROW = ("resnetv2_18", {"layers": [1, 1, 1], "channels": [32, 64, 256], "stem_chs": 16})
# What is chosen from pixels, and does not apply to samples that are no images.
PIXELS = frozenset({"channels", "channels_b", "image_size", "mean", "mean_b", "std", "std_b", "views", "encoder",
                    "encoder_args", "pretrained", "cache", "cache_form"})  # fmt: skip
MANY = 16  # channels; with fewer, nobody's columns are taken for them


@dataclass(frozen=True)
class Findings:
    """What the choices depend on: the images (number, median height and width in pixels, channels) and the machine."""

    images: int
    height: int
    width: int
    channels: int
    in_memory: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    measured: int  # images that mean and std were measured on
    device: str  # "cpu", "cuda" or "mps"
    devices: int  # used on this machine, each by a process
    cores: int  # of each process
    bfloat16: bool  # the hardware multiplies bfloat16 natively, and is faster for it
    channels_b: int = 0  # of the second images of pairs; 0 where there are none
    mean_b: tuple[float, ...] = ()
    std_b: tuple[float, ...] = ()
    shape: tuple[int, ...] = ()  # of one sample, where they are no images
    started: str = "all that are here"  # why so many devices
    threads: int = 1  # that torch would compute with, of each process

    @property
    def side(self) -> int:
        """The shorter of the median height and width, in pixels."""
        return min(self.height, self.width)


@dataclass(frozen=True)
class Choice:
    """One automatic choice, as it is printed."""

    word: str
    value: Any
    reason: str


def resolve(config: Config, found: Findings) -> tuple[Config, list[Choice]]:
    """Fills every field that is None and tells why; fields that are given stay. UserError when they cannot work.

    The rules run in the order of ``RULES``, so a rule may lean on every field above its own.
    """
    choices: list[Choice] = []
    if found.shape:
        _for_samples(config)
    for name, rule in RULES.items():
        if getattr(config, name) is None and not (found.shape and name in PIXELS):
            value, reason = rule(config, found)
            if value is not None:
                config = config.replace(**{name: value})
                choices.append(Choice(word(name), getattr(config, name), reason))
    consistent(config, found.images, found.channels_b)
    return config, choices


def _for_samples(config: Config) -> None:
    """Refuses settings of images where there are none, and asks for what only the user can know."""
    for name in ("views", "encoder"):
        if not str(getattr(config, name)).startswith(OWN):
            raise UserError(f"Samples are no images, so no {name} can be chosen for them: pretrain(…, views=(f, g), "
                            "encoder=net), with functions (samples, generator) and a torch module.")  # fmt: skip
    given = sorted(name for name in PIXELS - {"views", "encoder"} if getattr(config, name))
    if given:
        raise UserError(f"{given[0]} is for images, and Samples are none: leave it out.")


def consistent(config: Config, images: int, channels_b: int) -> None:
    """Refuses settings that cannot train."""
    left = images - (config.held_out or 0)
    if left < 2:
        raise UserError(
            f"{images:,} usable images, of which {config.held_out:,} are held out, leave {max(left, 0)} to "
            "train on; training needs at least 2, and many to learn anything: give more images or a smaller --held-out."
        )
    if config.batch_size and config.batch_size > left:
        raise UserError(
            f"batch_size = {config.batch_size} is larger than the {left:,} images to train on; "
            "give a smaller --batch-size or more images."
        )
    for letter, channels in (("", config.channels), ("_b", config.channels_b)):
        for name in ("mean" + letter, "std" + letter):
            given = getattr(config, name) or ()
            if len(given) != (channels or 0):
                raise UserError(f"{name} has {len(given)} values for {channels or 'no'} channels.")
    if channels_b == 0 and config.channels_b:
        raise UserError("channels_b is for a table of pairs, with two columns of paths; leave it out.")
    two = "pairs" if channels_b else "unshared twins" if config.twins == "unshared" else ""
    if two and isinstance(config.views, tuple) and len(config.views) != 2:
        raise UserError(f"{two} take two views, not {len(config.views)}.")
    if channels_b and config.twins == "shared" and config.channels_b != config.channels:
        raise UserError(f"pairs of {config.channels} and {config.channels_b} channels cannot share a network.")


Rule = Callable[[Config, Findings], tuple[Any, str]]


def run_folder(config: Config) -> str:
    """Where a run goes: the folder that is given, or one named after the images."""
    name = Path(config.images or "images").resolve().name
    return config.out or f"runs/{name.split('.')[0] or 'images'}"


def _image_size(config: Config, found: Findings) -> tuple[int, str]:
    side = found.side
    if side <= 40:
        larger = max(8, 8 * round((1.5 if found.device == "cpu" else 2.0) * side / 8))
        return larger, f"images of {side} px, drawn larger: the usual networks halve the size twice at once"
    fit = max(size for size in (64, 96, 128, 160, 224) if size <= max(side, 64))
    if found.device == "cpu" and fit > 64:
        return 64, f"images of {side} px; 64 px crops are what a processor without GPU trains in reasonable time"
    return fit, f"the largest usual crop within images of {side} px" if side >= 64 else f"images of {side} px"


def _encoder(config: Config, found: Findings) -> tuple[str, str]:
    assert config.image_size is not None
    if found.device == "cpu":
        narrow = NARROW[0], "a narrow residual network, for a processor without GPU"
        return ("resnet18", "a small network that timm has weights of") if config.pretrained else narrow
    return ("resnet18", "small images") if config.image_size <= 96 else ("resnet50", "the paper's encoder")


def _encoder_args(config: Config, found: Findings) -> tuple[dict[str, Any], str]:
    if found.device == "cpu" and config.encoder == NARROW[0] and not config.pretrained:
        return dict(NARROW[1]), "narrow layers: the most accurate of those tried in the same time"
    return {}, "timm's defaults"


def _batch_size(config: Config, found: Findings) -> tuple[int, str]:
    left = found.images - (config.held_out or 0)
    batch = usual = 256
    while batch > max(left // 4, 2):
        batch //= 2
    enough = "small batches are enough for this objective, and give more steps in the same time"
    return batch, enough if batch == usual else f"only {left:,} images to train on"


def _projector(config: Config, found: Findings) -> tuple[tuple[int, ...], str]:
    if found.device == "cpu":
        return (256, 256, 256), "narrow: in a short time a wide embedding is not decorrelated"
    return (2048,) * 3, f"batches of {config.batch_size}: a wider embedding raises the loss's floor, not the quality"


def _lambda(config: Config, found: Findings) -> tuple[float, str]:
    assert isinstance(config.projector, tuple)
    dim = config.projector[-1]
    return max(default_lambda(dim), 8 / dim), f"by the width of the embedding, {dim}: the narrower, the larger"


def _optimizer(config: Config, found: Findings) -> tuple[str, str]:
    assert config.batch_size is not None
    if "vit" in str(config.encoder) or "mixer" in str(config.encoder):
        return "adamw", "LARS collapses on transformers"
    if config.batch_size >= 1024:
        return "lars", "a large batch and a convolutional network, as in the paper"
    if found.device == "cpu":
        return "muon", "learns all directions of the embedding at once: the most of those tried in a short time"
    return "adamw", "better than LARS at this batch size"


# Base rates by batch size, as the authors gave them for LARS (times batch / 256).
LARS_BASE = {128: 0.7, 256: 0.4, 512: 0.3, 1024: 0.25, 2048: 0.2}


def _lr(config: Config, found: Findings) -> tuple[float, str]:
    assert config.batch_size is not None
    if config.optimizer == "lars":
        base = LARS_BASE[max([b for b in LARS_BASE if b <= config.batch_size], default=128)]
        return base * config.batch_size / 256, f"the authors' {base} × batch / 256"
    if config.optimizer == "muon":
        return 5e-3, "Muon: 0.003 to 0.01 did equally well"
    if "vit" in str(config.encoder):
        return 5e-4, "AdamW on a vision transformer"
    return 3e-3 * (config.batch_size / 256) ** 0.5, "AdamW: 0.003 at batch 256, by the root of the batch"


def _lr_bias(config: Config, found: Findings) -> tuple[float | None, str]:
    if config.optimizer != "lars" or config.batch_size is None:
        return None, ""
    rate = 0.0048 / 32 * config.batch_size / 256
    return rate, "the paper's 0.0048 × batch / 256, over its 32 GPUs: its gradients were divided by their number"


def _epochs(config: Config, found: Findings) -> tuple[float | None, str]:
    if config.steps is not None or config.minutes is not None:
        return None, ""
    views = 2e6 if found.device == "cpu" else 2e7
    epochs = float(np.clip(round(views / max(found.images, 1)), 10, 800))
    seen = f"about {epochs * found.images:,.0f} images seen"
    return epochs, f"{seen}; give --minutes, --epochs or --steps for another length"


def _precision(config: Config, found: Findings) -> tuple[str, str]:
    if found.shape:
        return "float32", "numbers of any range"
    if _one_pixel(config, found):
        return "float32", "in maps of one pixel, processors' bfloat16 has given wrong gradients (docs/log.md)"
    if found.bfloat16:
        return "bfloat16", "this hardware multiplies bfloat16 natively and faster; the objective stays float32"
    return "float32", "bfloat16 is not faster here"


def _one_pixel(config: Config, found: Findings) -> bool:
    layers = config.encoder_args.get("layers") if isinstance(config.encoder_args, dict) else None  # of a ResNet,
    stride = 2 ** (len(layers) + 1) if isinstance(layers, list | tuple) else 32  # whose stem halves the size twice
    return found.device == "cpu" and not found.shape and (config.image_size or 0) <= stride


def doubt(config: Config, found: Findings) -> str:
    """What to warn of in resolved settings that were given: a sentence, or nothing."""
    if config.precision == "bfloat16" and _one_pixel(config, found):
        return (f"with crops of {config.image_size} px, maps are one pixel in the end, where processors' bfloat16 has "
                "given wrong gradients: --precision float32 is safe, and so are larger crops")  # fmt: skip
    height, width, channels = found.height, found.width, found.channels
    if channels >= MANY and 2 * height <= min(width, channels) and max(width, channels) <= 2 * min(width, channels):
        return (f"these images have {height} rows, {width} columns and {channels} channels: if that is channels first, "
                "save them as rows, columns, channels (numpy.moveaxis(image, 0, -1))")  # fmt: skip
    return ""


def _workers(config: Config, found: Findings) -> tuple[int, str]:
    if found.in_memory:
        return 0, "the images are in memory"
    if found.device == "cpu":
        return 1, "the network needs the cores"
    return max(1, min(8, found.cores - 1)), f"{found.cores} cores" + (" for each process" if found.devices > 1 else "")


def _held_out(config: Config, found: Findings) -> tuple[int, str]:
    most = 256 if found.device == "cpu" else 512  # there a look at 256 takes as long as half a step
    return max(2, min(most, found.images // 10)), "for the label-free measures"


def _views(config: Config, found: Findings) -> tuple[str, str]:
    first, reason = suggest(config.channels or found.channels, found.side)
    if not found.channels_b:
        return first, reason
    second, other = suggest(config.channels_b or found.channels_b, found.side)
    return (first, reason) if first == second else (f"{first}/{second}", f"{reason}; of the second image {other}")


RULES: dict[str, Rule] = {
    "out": lambda c, f: (run_folder(c), "named after the images"),
    "seed": lambda c, f: (0, "the same seed gives the same run"),
    "held_out": _held_out,
    "channels": lambda c, f: (f.channels, "what the images have"),
    "channels_b": lambda c, f: (f.channels_b or None, "what the second images of the pairs have"),
    "image_size": _image_size,
    "mean": lambda c, f: (f.mean, f"measured on {f.measured:,} images"),
    "std": lambda c, f: (f.std, f"measured on {f.measured:,} images"),
    "mean_b": lambda c, f: (f.mean_b or None, f"measured on {f.measured:,} second images"),
    "std_b": lambda c, f: (f.std_b or None, f"measured on {f.measured:,} second images"),
    "views": _views,
    "twins": lambda c, f: ("unshared", "given pairs: one each") if f.channels_b else ("shared", "one kind of image"),
    "pretrained": lambda c, f: (False, "from random weights"),
    "encoder": _encoder,
    "encoder_args": _encoder_args,
    "batch_size": _batch_size,
    "projector": _projector,
    "lambda_": _lambda,
    "optimizer": _optimizer,
    "lr": _lr,
    "lr_bias": _lr_bias,
    "weight_decay": lambda c, f: (
        (1.5e-6, "the paper's") if c.optimizer == "lars" else (0.05, "usual for AdamW and Muon")
    ),
    "warmup": lambda c, f: (0.01, "10 of 1,000 epochs, as in the paper") if c.optimizer == "lars" else (0.05, "usual"),
    "epochs": _epochs,
    "precision": _precision,
    "devices": lambda c, f: (f.devices, f.started),
    "workers": _workers,
    "threads": lambda c, f: (f.threads if f.device == "cpu" else None, "a resume keeps it: digits depend on it"),
    "cache": lambda c, f: (not f.in_memory, "decode once" if not f.in_memory else "nothing to decode"),
    "max_bad": lambda c, f: (MAX_BAD, "more broken files than this are a broken collection"),
}
