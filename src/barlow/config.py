"""One tree of settings: the same words in Python, on the command line and in TOML.

Every field may be left out (None): ``plan.resolve`` then fills it from what it finds and says why.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

from barlow.errors import UserError
from barlow.kinds import fits, in_words, parse_duration, plain, shown

OWN = "python:"  # before the names of code of one's own: settings and files can name it, but not bring it back

Logger = Literal["tensorboard", "wandb", "mlflow", "trackio"]


@dataclass(frozen=True)
class Config:
    """All that decides a run. A field that is None is chosen from the images and the machine, with its reason printed.

    Attributes:
        images: A folder (recursive), .npy or .npz array, text file of paths, tar shards, Parquet, or sample.
        out: Run folder. [default: runs/ and the name of the images]
        encoder: Any timm model by name. [default: by image size and device]
        encoder_args: Arguments of the timm model, as JSON ('{"layers": [1, 1, 1, 1]}') or a TOML table.
        pretrained: Start from timm's pretrained weights (downloads them). [default: no]
        image_size: Side of the square that the network sees, in pixels.
        channels: Number of channels that images are converted to.
        channels_b: The same for the second image of given pairs.
        mean: Mean of each channel, images scaled to 0..1. [default: measured]
        mean_b: The same for the second image of given pairs.
        std: Standard deviation of each channel, images scaled to 0..1. [default: measured]
        std_b: The same for the second image of given pairs.
        views: The random views: natural, small, grayscale, overhead, many-channel (of pairs also two of them, joined by
            a slash); in TOML also a list of rows.
        projector: Widths of the projector's layers, such as 2048-2048-2048.
        twins: One network for all views (shared), or two networks (unshared). [default: shared; for pairs unshared]
        lambda_: Weight of the redundancy term (the paper's λ).
        batch_size: Images per step, over all processes.
        micro_batch: Images per pass where a whole batch does not fit in memory: two exact passes.
        epochs: Length as passes over the images (one of epochs, steps, minutes).
        steps: Length as optimiser steps (one of epochs, steps, minutes).
        minutes: Length as time: the first steps are measured, then the number of steps is fixed and recorded.
        optimizer: lars, muon or adamw.
        lr: Highest learning rate of weights, reached after warm-up; not scaled any further.
        lr_bias: Highest learning rate of biases and norms under lars, for the true gradient.
        weight_decay: Weight decay of weights; biases and norms have none.
        warmup: Share of the steps over which the rate rises from zero.
        precision: float32, bfloat16 (autocast) or float16 (autocast with loss scaling).
        workers: Processes that read images; 0 reads in the main one.
        threads: Threads of each process without GPU; a resume keeps it: the last digits depend on it. [default: cores]
        devices: Number of processes, one a device. [default: all GPUs, else 1]
        seed: Seed of every draw.
        held_out: Images kept from training for the label-free measures.
        health_every: Steps between two looks at the held-out images. [default: about 20 looks, within 2 % of the time]
        checkpoint_every: Steps between checkpoints. [default: every 10 minutes and at each end of an epoch]
        keep_every: Steps between checkpoints that are kept for good, beside the last two and the best. [default: none]
        stop_on_collapse: Stop, save and exit with code 4 when two looks in a row find a collapse. [default: go on]
        time_limit: Stop, save and exit with code 75 before this much time has passed: 2h, 90m, 1:30:00.
        timeout: Longest wait for another process, a worker or a device's, before it is taken for dead. [default: 15m]
        cache: Keep decoded images, resized to just above the crop, on disk. [default: when they fit]
        cache_form: Keep them as raw pixels, or as jpeg, a fifth of that. [default: raw where that fits]
        max_bad: Largest share of unreadable images that a run goes on with. [default: 0.05]
        logger: Where metrics.jsonl is also copied to: tensorboard, wandb, mlflow, trackio. May be repeated.
    """

    images: str | None = None
    _: KW_ONLY
    out: str | None = None
    encoder: str | None = None
    encoder_args: dict[str, Any] | str | None = None
    pretrained: bool | None = None
    image_size: int | None = None
    channels: int | None = None
    channels_b: int | None = None
    mean: tuple[float, ...] | None = None
    mean_b: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    std_b: tuple[float, ...] | None = None
    views: str | tuple[dict[str, Any], ...] | None = None
    projector: str | tuple[int, ...] | None = None
    twins: Literal["shared", "unshared"] | None = None
    lambda_: float | None = None
    batch_size: int | None = None
    micro_batch: int | None = None
    epochs: float | None = None
    steps: int | None = None
    minutes: float | None = None
    optimizer: Literal["lars", "muon", "adamw"] | None = None
    lr: float | None = None
    lr_bias: float | None = None
    weight_decay: float | None = None
    warmup: float | None = None
    precision: Literal["float32", "bfloat16", "float16"] | None = None
    workers: int | None = None
    threads: int | None = None
    devices: int | None = None
    seed: int | None = None
    held_out: int | None = None
    health_every: int | None = None
    checkpoint_every: int | None = None
    keep_every: int | None = None
    stop_on_collapse: bool | None = None
    time_limit: str | None = None
    timeout: str | None = None
    cache: bool | None = None
    cache_form: Literal["raw", "jpeg"] | None = None
    max_bad: float | None = None
    logger: tuple[Logger, ...] | None = None

    def __post_init__(self) -> None:
        """Brings what people write to one form; refuses wrong types and values outside their range (UserError)."""
        for name, value in self.given().items():
            value = _canonical(name, plain(value))
            if not fits(value, _TYPES[name]):
                raise UserError(f"{word(name)} = {shown(value)} is not {in_words(_TYPES[name])}.")
            object.__setattr__(self, name, value)
        _in_range(self)

    def replace(self, **changes: Any) -> Config:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def given(self) -> dict[str, Any]:
        """The fields that are set, by name, in their order."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def word(field: str) -> str:
    """The field as users write it: ``lambda_`` → ``lambda``."""
    return field.rstrip("_")


WORDS = {word(f.name): f.name for f in dataclasses.fields(Config)}
_TYPES = get_type_hints(Config)


def from_mapping(table: Mapping[str, Any], source: str) -> Config:
    """A Config from a table of words; an unknown word or a wrong type is a UserError that names ``source``."""
    fields: dict[str, Any] = {}
    for key, value in table.items():
        name = WORDS.get(key.replace("-", "_"))
        if name is None:
            near = difflib.get_close_matches(key.replace("-", "_"), WORDS, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(WORDS))}."
            raise UserError(f"{source} has an unknown key {key!r}{hint}")
        fields[name] = value
    try:
        return Config(**fields)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def read_toml(path: Path) -> Config:
    """The Config in a TOML file (UserError when it cannot be read or has unknown keys)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"The config file {path} cannot be read: {reason}.") from None
    return from_text(text, str(path))


def from_text(text: str, source: str) -> Config:
    """The Config in TOML that stands in ``source`` (UserError when it is none or has unknown keys)."""
    try:
        return from_mapping(tomllib.loads(text), source)
    except tomllib.TOMLDecodeError as error:
        hint = ". Write a path with '/', or between single quotes" if "\\" in str(error) else ""
        raise UserError(f"The config file {source} is not TOML: {error}{hint}.") from None


def to_toml(config: Config) -> str:
    """The fields that are set, one a line, in the order of the dataclass; ``read_toml`` gives the same Config back."""
    return "\n".join(f"{word(name)} = {_toml(value)}" for name, value in config.given().items()) + "\n"


def merge(below: Config, above: Config) -> Config:
    """Fields of ``above`` where they are set, else those of ``below`` (the command line over a file).

    The three lengths (epochs, steps, minutes) are one choice: a length above replaces any length below.
    """
    fields = above.given()
    if {"epochs", "steps", "minutes"} & fields.keys():
        below = below.replace(epochs=None, steps=None, minutes=None)
    return below.replace(**fields)


def differences(old: Config, new: Config, ignore: frozenset[str] = frozenset(), unset: bool = False) -> list[str]:
    """One line for each field that is set in ``new`` and differs: ``lambda: 0.005 → 0.01``; ``unset``: also of those
    that are not set."""
    lines = []
    for field in dataclasses.fields(old):
        a, b = getattr(old, field.name), getattr(new, field.name)
        if (b is not None or unset) and a != b and field.name not in ignore:
            lines.append(f"{word(field.name)}: {a} → {b}")
    return lines


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # which TOML takes only so
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return repr(value)


def _canonical(name: str, value: Any) -> Any:
    if name == "projector" and isinstance(value, str):
        try:
            return tuple(int(width) for width in value.replace("-", ",").replace("x", ",").split(","))
        except ValueError:
            raise UserError(f"projector {value!r} is not a list of widths such as 2048-2048-2048.") from None
    if name == "encoder_args" and isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"encoder_args {value!r} is not JSON: {error}.") from None
        if not isinstance(value, dict):
            raise UserError(f"encoder_args {value!r} is not a JSON object such as '{{\"layers\": [1, 1, 1, 1]}}'.")
    if name == "encoder_args" and isinstance(value, Mapping) and _holds_none(list(value.values())):
        raise UserError(f"encoder_args {value!r} holds null, which settings cannot keep: leave it out.")
    if name == "logger" and isinstance(value, str):
        return (value,)
    return value


def _holds_none(value: Any) -> bool:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return value is None or any(map(_holds_none, inner))


# field: (lowest, highest, lowest itself allowed)
_RANGES: dict[str, tuple[float, float, bool]] = {
    "image_size": (8, 4096, True), "channels": (1, 1024, True), "channels_b": (1, 1024, True),
    "lambda_": (0, 1e6, True), "batch_size": (2, 2**24, True),
    "micro_batch": (1, 2**24, True), "epochs": (0, 1e6, False), "steps": (1, 1e12, True), "minutes": (0, 1e6, False),
    "lr": (0, 1e3, False), "lr_bias": (0, 1e3, False), "weight_decay": (0, 1e3, True), "warmup": (0, 1, True),
    "workers": (0, 1024, True), "threads": (1, 1024, True), "devices": (1, 1024, True), "seed": (0, 2**63 - 1, True),
    "held_out": (2, 10**6, True), "health_every": (1, 1e12, True), "checkpoint_every": (1, 1e12, True),
    "keep_every": (1, 1e12, True), "max_bad": (0, 1, True),
}  # fmt: skip


def _in_range(config: Config) -> None:
    for name, (low, high, closed) in _RANGES.items():
        value = getattr(config, name)
        if value is not None and not (low <= value <= high and (closed or value > low)):
            raise UserError(f"{word(name)} = {value} is outside its range, {low:g} to {high:g}.")
    if isinstance(config.projector, tuple) and min(config.projector, default=0) < 1:
        raise UserError(f"projector = {config.projector} has no width, or one below 1.")
    for name, least, above in (("mean", -math.inf, ""), ("std", 0.0, " above 0")):
        for full in (name, f"{name}_b"):
            value = getattr(config, full) or ()
            if not all(least < number < math.inf for number in value):
                raise UserError(f"{full} = {value} holds something that is no finite number{above}.")
    for name in ("time_limit", "timeout"):
        if text := getattr(config, name):
            try:
                parse_duration(text)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
    for name in ("images", "out", "encoder", "views", "time_limit", "timeout"):
        if getattr(config, name) == "":
            raise UserError(f"{word(name)} is empty: say which, or leave it out.")
