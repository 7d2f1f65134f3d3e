"""Continuing a run: what must be as it was, what may differ, and what is accepted when it is asked for by name."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from barlow.config import WORDS, Config, differences, from_text, read_toml
from barlow.errors import UserError
from barlow.images import Images
from barlow.index import place
from barlow.machine import machine
from barlow.sources import size_and_time

# Fields that may differ when a run is continued: they change where and how fast, not what is computed.
FREE = frozenset({"out", "workers", "devices", "checkpoint_every", "keep_every", "stop_on_collapse", "time_limit",
                  "timeout", "max_bad", "logger"})  # fmt: skip
LENGTHS = ("epochs", "steps", "minutes")
NAMED = 5  # differences in one sentence


def check_allowed(allow: Collection[str]) -> None:
    """UserError for a word of --allow that is no setting, nor index nor network, and for a text in place of words."""
    if isinstance(allow, str) or not isinstance(allow, Collection):
        raise UserError(f"allow takes several names: allow=({allow if isinstance(allow, str) else 'lr'!r},)")
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
            f"give another --out, or accept the change: {_flags(changed)}."
        )
    if any(getattr(given, name) not in (None, getattr(stored, name)) for name in accepted.intersection(LENGTHS)):
        stored = stored.replace(epochs=None, steps=None, minutes=None)  # the three are one choice
    taken = {name: getattr(given, name) for name in (FREE - {"out"}) | accepted if getattr(given, name) is not None}
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
            f"config.toml has other settings than {where} was made with ({'; '.join(changed)}). Put them back as they "
            f"were, or accept the change: {_flags(changed)}."
        )
    return differences(was, config, ignore=FREE, unset=True)


def _settings(allow: Collection[str]) -> frozenset[str]:
    """The fields that words of --allow name; one of the lengths names all three, for they are one choice."""
    named = {WORDS[one.replace("-", "_")] for one in allow if one.replace("-", "_") in WORDS}
    return frozenset(named.union(LENGTHS) if named.intersection(LENGTHS) else named)


def _flags(changed: Collection[str]) -> str:
    return " ".join(f"--allow {line.split(':')[0]}" for line in changed)


def on_as_many(config: Config, out: Path) -> Config:
    """The settings with the number of devices that a run in ``out`` began with, unless they name one: with another the
    last digits differ."""
    file = out / "config.toml"
    if config.devices is not None or not file.is_file() or (stored := read_toml(file).devices) is None:
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
