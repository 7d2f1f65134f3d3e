"""Checkpoints: a folder of tensors and JSON that is whole or does not count, and that never runs code.

    checkpoints/latest, checkpoints/best            the names of two of them, for people and shell scripts
    checkpoints/step-000001234/
        model.safetensors, optimizer.safetensors    tensors, grouped by what stands before the first "/" of their key
        state.json                                  everything that is no tensor
        manifest.json                               sizes, sha256, step, versions; written last: without it, none

Every file is forced to the disk before the folder gets its name, so a crash at any instant leaves the older checkpoints
and at most one hidden left-over, which the next save removes.
"""

from __future__ import annotations

import errno
import json
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from barlow import __version__
from barlow.console import say
from barlow.errors import NumbersError, Stopped, UserError
from barlow.files import atomic_write, digest, sweep, sync_folder, write_synced
from barlow.manifest import FILE, FOLDER, FORMAT, read_json, read_manifest, seal
from barlow.tensorfile import HostCopy, host_copy, is_finite, read_tensors, restride, tensor_blocks

LEFT_OVER = re.compile(r"\.(writing|deleting)-.*|\.(latest|best)\..*\.tmp")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MISSING = (FileNotFoundError, NotADirectoryError)  # of all that reading can meet, these are damage and do not pass
WAITS = (0.05, 0.25, 1.0)  # seconds before the second, third and fourth try

T = TypeVar("T")


class SaveFailed(OSError):
    """A checkpoint could not be written; the older ones are untouched and the same call may be tried again later."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: ``tensors`` by key on the device asked for, ``state`` as JSON gives it back (no tuples)."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]

    def group(self, name: str) -> dict[str, Tensor]:
        """The tensors whose key begins with ``name/``, without that beginning."""
        start = f"{name}/"
        return {key.removeprefix(start): value for key, value in self.tensors.items() if key.startswith(start)}


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Writes ``folder/step-…`` and returns it; one of the same step is replaced.

    ``tensors``: keys like ``model/conv1.weight``; the part before the first "/" names the file. Any strides, tied
    tensors, every dtype of ``tensorfile.DTYPES``. ``state``: JSON-able, finite.
    Raises NumbersError (a value is not finite) and SaveFailed (disk full, quota, input/output error).
    """
    what = host_copy(tensors, own=False)
    check_finite(step, tensors)
    return write(folder, step, what, state_bytes(step, state))


def check_finite(step: int, tensors: Mapping[str, Tensor]) -> None:
    """Raises NumbersError naming the first tensor that holds NaN or an infinity: such a state is never saved."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise NumbersError(f"{name} is not finite at step {step}: not saved, the older checkpoints are untouched")


def state_bytes(step: int, state: Mapping[str, Any]) -> bytes:
    """``state`` as strict JSON. Raises NumbersError for NaN and infinities, TypeError for what JSON does not know."""
    try:
        return (json.dumps(state, indent=1, allow_nan=False) + "\n").encode()
    except ValueError as error:
        raise NumbersError(f"the state of step {step} holds a number that is not finite: not saved") from error


def write(folder: Path, step: int, what: HostCopy, state: bytes) -> Path:
    """The writing half of ``save``: files, manifest last, rename, ``latest``. Raises SaveFailed."""
    target = folder / f"step-{step:09d}"
    beside = folder / f".writing-{target.name}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder, LEFT_OVER)
        beside.mkdir()
        write_files(beside, step, what, state)
        put_in_place(beside, target)
        atomic_write(folder / "latest", f"{target.name}\n")
    except OSError as error:
        raise save_failed(f"the checkpoint of step {step}", folder, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def write_files(beside: Path, step: int, what: HostCopy, state: bytes) -> None:
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in what.tensors.items():
        group, _, name = key.partition("/")
        if not name or not FILE.fullmatch(f"{group}.safetensors"):
            raise ValueError(f"tensor key {key!r} does not read group/name")
        groups.setdefault(f"{group}.safetensors", {})[name] = tensor
    written = {name: write_synced(beside / name, tensor_blocks(group)) for name, group in sorted(groups.items())}
    written["state.json"] = write_synced(beside / "state.json", [state])
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "files": {name: {"bytes": size, "sha256": sha256} for name, (size, sha256) in written.items()},
        "strides": what.strides,
        "aliases": what.aliases,
        "versions": {"barlow": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    manifest["sha256"] = seal(manifest)
    write_synced(beside / "manifest.json", [(json.dumps(manifest, indent=1) + "\n").encode()])
    sync_folder(beside)


def put_in_place(beside: Path, target: Path) -> None:
    """Renames ``beside`` to ``target``. One of the same step steps aside first, under a name that still counts."""
    aside = target.with_suffix(".old")
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    beside.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def save_failed(what: str, folder: Path, error: OSError) -> SaveFailed:
    """The failure as one sentence, with the free space where space is what lacks."""
    reason = error.strerror or str(error)
    if error.errno in NO_SPACE:
        free = f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB free" if folder.is_dir() else "nothing free"
        reason += f" ({free}; make room, or raise the quota or the limit on file sizes)"
    failed = SaveFailed(f"could not save {what} in {folder}: {reason}; the older checkpoints are untouched")
    failed.errno = error.errno
    return failed


def load(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Reads one checkpoint folder, checking every name, size and sha256 first. No code can run from it.

    Raises UserError when it is incomplete, damaged, not finite or not one of ours; Stopped when the disk fails.
    """

    def read() -> Checkpoint:
        manifest = read_manifest(path)
        tensors = {key: tensor.to(device, copy=True) for key, tensor in read_contents(path, manifest)}
        tensors.update({name: tensors[other] for name, other in manifest["aliases"].items()})
        return Checkpoint(manifest["step"], tensors, read_json(path / "state.json"))

    return patiently(read, path)


def patiently(read: Callable[[], T], path: Path) -> T:
    """``read()`` of something below ``path``. A fault of a disk or a network (not ``MISSING``) is tried again, then
    raised as Stopped: a checkpoint that cannot be read just now is not damaged."""
    for wait in (*WAITS, None):
        try:
            return read()
        except MISSING:
            raise
        except OSError as error:
            if wait is None:
                reason = error.strerror or error
                raise Stopped(f"{path} cannot be read now ({reason}): give the same command again") from error
            time.sleep(wait)
    raise AssertionError


def verify(path: Path) -> None:
    """Reads all of a checkpoint, one tensor at a time, and keeps nothing. Raises UserError as ``load`` does."""
    for _ in read_contents(path, read_manifest(path)):
        pass
    read_json(path / "state.json")


def read_contents(path: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yields (key, tensor) of the files whose size and sha256 are the promised ones; strides restored, finite."""
    seen = set()
    for file, entry in manifest["files"].items():
        size, sha256 = digest(path / file)
        if entry != {"bytes": size, "sha256": sha256}:
            raise UserError(f"{path / file} is damaged (its sha256 is not the one it was saved with)")
        for name, tensor in read_tensors(path / file) if file != "state.json" else ():
            key = f"{file.removesuffix('.safetensors')}/{name}"
            if not is_finite(tensor):
                raise UserError(f"{path} holds {key} with a value that is not finite: take an older checkpoint")
            seen.add(key)
            yield key, restride(tensor, manifest["strides"][key]) if key in manifest["strides"] else tensor
    for name, other in manifest["aliases"].items():
        if name in seen or not isinstance(other, str) or other not in seen:
            raise UserError(f"{path} is damaged ({name!r} cannot share the tensor {other!r})")


def candidates(folder: Path) -> list[Path]:
    """The checkpoint folders, newest step first, whole or not; of one step the one put aside comes last."""
    found = [(int(name[1]), name[2] is None, name[0]) for name in map(FOLDER.fullmatch, names(folder)) if name]
    return [folder / name for _, _, name in sorted(found, reverse=True)]


def names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except MISSING:
        return []


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that is complete and undamaged, read from end to end; None when there is none.

    For each newer one that is not, the reason is said. The file ``latest`` is not asked: the folders say it.
    Raises Stopped when one cannot be read now: an older one in its place would be another run from there on.
    """
    there = patiently(lambda: candidates(folder), folder)
    for path in there:
        try:
            patiently(partial(verify, path), path)
        except (UserError, *MISSING) as error:
            say(f"barlow: {error}" + ("; trying the checkpoint before it" if path != there[-1] else ""))
        else:
            return path
    return None


def set_aside(folder: Path, newest: Path) -> None:
    """Takes the names from the checkpoints newer than ``newest``, which are damaged: a run that goes on from there must
    not meet them again as its newest. The next save deletes them."""
    there = candidates(folder)
    for path in there[: there.index(newest)]:
        path.rename(folder / f".deleting-{path.name}-{secrets.token_hex(4)}")


def keep(folder: Path, *, last: int, every: int | None = None, best: int | None = None) -> list[Path]:
    """Deletes checkpoints once the newest has been read back whole; returns those deleted.

    Kept: the newest ``last``, every step that ``every`` divides, the step ``best``, and all that is newer than the
    newest undamaged one. With nothing undamaged nothing is deleted. Raises SaveFailed when the disk does not obey, and
    Stopped as ``latest`` does.
    """
    newest = latest(folder)
    if newest is None:
        return []
    older = candidates(folder)[candidates(folder).index(newest) + 1 :]
    whole = [path for path in older if not path.name.endswith(".old") and (path / "manifest.json").exists()]
    stay = whole[: last - 1]
    stay += [path for path in whole if number(path) == best or (every and number(path) % every == 0)]
    gone = [path for path in older if path not in stay]
    try:
        for path in gone:
            path.rename(hidden := folder / f".deleting-{path.name}-{secrets.token_hex(4)}")
            shutil.rmtree(hidden, ignore_errors=True)
    except OSError as error:
        raise save_failed("the deletion of older checkpoints", folder, error) from error
    return gone


def number(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(path.name.removeprefix("step-").removesuffix(".old"))
