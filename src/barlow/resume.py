"""Continuing a run: what must be as it was, what may differ, and what is accepted when it is asked for by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from barlow.config import WORDS, Config, differences, from_text, read_toml, word
from barlow.console import say
from barlow.errors import UserError
from barlow.images import Images, open_images, write_index
from barlow.index import REMEDY, place
from barlow.index import read as read_index
from barlow.machine import machine
from barlow.plan import consistent
from barlow.runlog import Run, read_metrics
from barlow.sources import size_and_time

# Fields that may differ when a run is continued: they change where and how fast, not what is computed.
FREE = frozenset({"out", "workers", "devices", "checkpoint_every", "keep_every", "stop_on_collapse", "time_limit",
                  "timeout", "max_bad", "logger"})  # fmt: skip
# Which images are never trained on follows from two of them; the state of the third is of no use to another.
FIXED = ("seed", "held_out", "optimizer")
NEEDED = ("projector", "twins", "lambda_", "batch_size", "optimizer", "lr", "weight_decay", "warmup", "precision",
          "seed", "held_out")  # fmt: skip
LENGTHS = ("epochs", "steps", "minutes")
KEPT_TEXT = 'Its text, as it was, lies in checkpoints/step-…/state.json under "settings".'
ACCEPTED = re.compile(r"setting accepted: steps: (\d+) → ")  # how an event tells of another length
NAMED = 5  # differences in one sentence


def check_allowed(allow: Collection[str]) -> None:
    """UserError for a word of --allow that is no setting, nor index nor network, and for a text in place of words."""
    if isinstance(allow, str) or not isinstance(allow, Collection) or not all(isinstance(one, str) for one in allow):
        raise UserError(f"allow takes several names: allow=({allow if isinstance(allow, str) else 'lr'!r},)")
    if fixed := [one for one in allow if one.replace("-", "_") in FIXED]:
        raise UserError(f"--allow {fixed[0]} cannot be: {in_one(FIXED)} stay for the whole run; give another --out.")
    known = [*WORDS, "index", "network"]
    for one in allow:
        if one.replace("-", "_") not in known:
            near = difflib.get_close_matches(one.replace("-", "_"), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; it takes the names of settings, index and network."
            raise UserError(f"--allow {one} is not known{hint}")


def continued(stored: Config, given: Config, out: Path, allow: Collection[str] = ()) -> Config:
    """The stored settings with those of ``FREE``, and those that ``allow`` names, as they are given anew.

    Raises UserError with the difference when another one differs.
    """
    accepted = _settings(allow)
    changed = differences(stored, given, ignore=FREE | accepted)
    if changed:
        raise UserError(
            f"{out} holds a run with other settings ({'; '.join(changed)}). Repeat its own settings to continue it, "
            f"{_ways(changed, 'give another --out')}."
        )
    if any(getattr(given, name) not in (None, getattr(stored, name)) for name in accepted.intersection(LENGTHS)):
        stored = stored.replace(epochs=None, steps=None, minutes=None)  # the three are one choice
    taken = {name: value for name, value in given.given().items() if name in (FREE - {"out"}) | accepted}
    return stored.replace(**taken)


def check_settings(saved: str | None, config: Config, where: Path, allow: Collection[str]) -> list[str]:
    """Whether the settings are those that the checkpoint ``where`` was made with, which ``saved`` holds as TOML: what
    was edited in config.toml by hand since then would change the run without a word. (None: it is older than this.)

    Returns the differences that ``allow`` names. Raises UserError with the others.
    """
    if saved is None:
        return []
    was = from_text(saved, str(where))
    changed = differences(was, config, ignore=FREE | _settings(allow), unset=True)
    if changed:
        raise UserError(
            f"config.toml has other settings than {where} was made with ({'; '.join(changed)}). "
            f"{_ways(changed, 'Put them back as they were')}."
        )
    return differences(was, config, ignore=FREE, unset=True)


def _settings(allow: Collection[str]) -> frozenset[str]:
    """The fields that words of --allow name; one of the lengths names all three, for they are one choice."""
    named = {WORDS[one.replace("-", "_")] for one in allow if one.replace("-", "_") in WORDS}
    return frozenset(named.union(LENGTHS) if named.intersection(LENGTHS) else named)


def _ways(changed: Collection[str], first: str) -> str:
    """What to do about settings that differ: ``first``, or to accept them, where all can be."""
    names = [line.split(":")[0] for line in changed]
    if any(name in FIXED for name in names):
        return f"{first}: {in_one(FIXED)} stay for the whole run"
    return f"{first}, or accept the change: {' '.join(f'--allow {name}' for name in names)}"


def in_one(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return f"{', '.join(names[:-1])} and {names[-1]}"


def reopen(run: Run, config: Config, images: Any, allow: Collection[str]) -> None:
    """Before a run is continued: its settings and its images are as they were, or the difference is accepted."""
    stored = stored_settings(run.folder)
    check_whole(stored)
    now = continued(stored, config, run.folder, allow)
    if "index" in allow and (note := renew_index(now, images, run.folder)):
        say(f"note: {note}")
        run.log("event", 0, message=note)
    opened = open_run_images(now, images, run.folder)
    for source in (opened, *([opened.second] if opened.second else [])):
        for note in check_index(source, str(now.images), allow):
            say(f"note: {note}")
            run.log("event", 0, message=note)
    consistent(now, len(opened), opened.second.channels if opened.second else 0)


def open_run_images(config: Config, images: Any, out: Path) -> Images:
    """The images of a run that is in ``out``: those of its index, whatever lies in the folder by now.

    Raises UserError where the index is gone: other images, of which others are held out, would be another run.
    """
    index = out / "index.parquet"
    source: Any = images if images is not None else config.images
    if not index.exists():
        raise UserError(f"{index}, the list of the images of this run, is gone: {REMEDY}")
    return open_images(source, channels=config.channels, channels_b=config.channels_b, index=index)


def renew_index(config: Config, images: Any, out: Path) -> str:
    """Where the index of a run is gone or damaged, writes one of the images that are there now; returns a note then.

    Raises UserError, and writes nothing, where the run cannot train on them.
    """
    index = out / "index.parquet"
    try:
        read_index(index)
        return ""
    except UserError:
        source: Any = images if images is not None else config.images
        opened = open_images(source, channels=config.channels, channels_b=config.channels_b)
    consistent(config, len(opened), opened.second.channels if opened.second else 0)
    write_index(opened, index)
    return f"{index} was gone or damaged: a new one lists the {len(opened):,} images there now; others may be held out"


def stored_settings(out: Path) -> Config:
    """config.toml of a run. UserError, with where its text can be found, when it cannot be read."""
    try:
        return read_toml(out / "config.toml")
    except UserError as error:
        raise UserError(f"{error} {KEPT_TEXT}") from None


def lacking(run: Run, config: Config, damaged: int, step: int, most: int) -> str:
    """What metrics.jsonl lacks of the steps up to ``step``, in a sentence; nothing where it lacks nothing.

    ``damaged``: its lines that could not be read. A run of n steps has a line of kind "train" every n / ``most`` steps,
    where n may have been another one before: by config.toml until now, or by the events of earlier resumes.
    """
    told = read_metrics(run.folder / "metrics.jsonl")
    earlier = [found[1] for line in told if (found := ACCEPTED.match(str(line.get("message"))))]
    lengths = [config.steps, stored_settings(run.folder).steps, *earlier]
    every = max(1, *(int(length or 0) // most for length in lengths))
    last = max((line["step"] for line in told if line["kind"] == "train"), default=0)
    lost = [f"{damaged:,} damaged"] if damaged else []
    lost += [f"of training those of steps {last + 1:,} to {step:,}"] if step - last >= every else []
    return f"metrics.jsonl lacks lines ({'; '.join(lost)}): the report will lack them too" if lost else ""


def in_folder(config: Config, folder: Path | None, out: str | None) -> Config:
    """The settings with --resume ``folder`` as their run folder. UserError where --out ``out`` names another one."""
    if folder is None:
        return config
    if out is not None and Path(out).resolve() != folder.resolve():
        raise UserError(f"--resume {folder} continues the run there, and --out {out} is another folder: leave one out.")
    return config.replace(out=str(folder))


def check_whole(stored: Config) -> None:
    """UserError where config.toml lacks what every run has: then a line of it was taken out."""
    gone = ", ".join(word(name) for name in NEEDED if getattr(stored, name) is None)
    if gone:
        raise UserError(f"config.toml of this run lacks {gone}: put back what was taken out. {KEPT_TEXT}")


def on_as_many(config: Config, out: Path) -> Config:
    """The settings with the number of devices that a run in ``out`` began with, unless they name one: with another the
    last digits differ."""
    file = out / "config.toml"
    if config.devices is not None or not file.is_file() or (stored := stored_settings(out).devices) is None:
        return config
    device, count, _, _ = machine()
    return config.replace(devices=stored if device == "cpu" else min(stored, count))


def check_index(images: Images, source: str, allow: Collection[str]) -> list[str]:
    """Whether the files of a run are still those of its index. Returns what is worth a note.

    Files that were added do not matter: the run keeps to its index. Raises UserError when some are gone or have
    another length, unless ``allow`` holds "index": the run then goes on, and others stand in for the images that
    cannot be read.
    """
    if images.kind == "array" or not images.root:
        return []  # arrays are compared by content when they are opened
    gone, other, newer = [], [], []
    seen: dict[bytes, tuple[int, int]] = {}
    sizes, times = images.rows["bytes"].to_numpy(), images.rows["modified"].to_numpy()
    for i in range(len(images)):
        file, _, length = place(images.rows, images.root, i)
        size, time = seen[file] if file in seen else seen.setdefault(file, size_and_time(file))
        if (size, time) == (0, 0):
            gone.append(i)
        elif length < 0 and size != sizes[i]:
            other.append(i)
        elif time != times[i]:
            newer.append(i)
    lines = [
        f"{len(rows):,} {what}: {_some(images, rows)}" for rows, what in ((gone, "gone"), (other, "changed")) if rows
    ]
    if lines and "index" not in allow:
        raise UserError(
            f"{source} no longer holds the images that this run began with ({'; '.join(lines)}). Bring them back, or "
            "accept it: --allow index (others stand in for images that cannot be used)."
        )
    touched = [f"{len(newer):,} files were written anew, with the same length: {_some(images, newer)}"] if newer else []
    return lines + touched


def _some(images: Images, rows: list[int]) -> str:
    names = ", ".join(images.key(i) for i in rows[:NAMED])
    return names + (", …" if len(rows) > NAMED else "")


def fitting(saved: Mapping[str, Tensor], network: Mapping[str, Tensor], where: Path, allow: Collection[str]) -> bool:
    """True when the tensors of a checkpoint are those of the network, by name and shape.

    False where they differ and ``allow`` holds "network"; else UserError with the difference.
    """
    lines = [f"{name} is not in the checkpoint" for name in network if name not in saved]
    lines += [f"{name} is not in the network" for name in saved if name not in network]
    lines += [f"{name}: {list(tensor.shape)} → {list(network[name].shape)}" for name, tensor in saved.items()
              if name in network and tensor.shape != network[name].shape]  # fmt: skip
    if lines and "network" not in allow:
        more = f"; and {len(lines) - NAMED:,} more" if len(lines) > NAMED else ""
        raise UserError(
            f"The network is not that of {where} ({'; '.join(lines[:NAMED])}{more}). Take the versions and settings it "
            "began with, or accept it: --allow network (weights that fit are kept, the rest begins anew)."
        )
    return not lines
