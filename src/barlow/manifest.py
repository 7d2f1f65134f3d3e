"""The manifest of a checkpoint: the list of what belongs to it, read as if a stranger had written it."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from barlow.errors import UserError

FORMAT = 1
FOLDER = re.compile(r"step-(\d{9,18})(\.old)?")
FILE = re.compile(r"[a-z][a-z_]*\.safetensors|state\.json")  # no slash, no dot-dot: nothing outside can be named
LARGEST_JSON = 64 << 20  # bytes; ours are a thousand times smaller


def seal(manifest: Mapping[str, object]) -> str:
    """sha256 over the manifest itself, its own ``sha256`` left out: a flipped bit in it is found as in any file."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, checked against the names, kinds and sizes of the files (not yet their content).

    Keys: format, step, files (name → bytes, sha256), strides, aliases, versions. Raises UserError with the reason, and
    OSError where the disk fails: ``exists`` would take that for an absent file.
    """
    try:
        manifest = read_json(path / "manifest.json")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is not a complete checkpoint (it has no manifest.json)") from None
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path} has checkpoint format {manifest.get('format')!r}, this barlow reads {FORMAT}")
    kinds = {"step": int, "files": dict, "strides": dict, "aliases": dict}
    right = all(type(manifest.get(key)) is kind for key, kind in kinds.items())
    if not right or manifest.get("sha256") != seal(manifest):
        raise UserError(f"{path} is damaged (its manifest is not the one it was saved with)")
    numbered = FOLDER.fullmatch(path.name)
    if numbered and int(numbered[1]) != manifest["step"]:
        raise UserError(f"{path} is damaged (it holds step {manifest['step']})")
    check_files(path, manifest["files"])
    return manifest


def check_files(path: Path, files: Mapping[str, Any]) -> None:
    """Raises UserError unless the folder holds exactly the plain files that its manifest names (hidden ones apart)."""
    for name in files:
        if not FILE.fullmatch(name):
            raise UserError(f"{path} names a file {name!r}, which no checkpoint of ours holds: do not trust it")
    if "state.json" not in files:
        raise UserError(f"{path} is damaged (its manifest names no state.json)")
    there = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
    wrong = sorted(there ^ {*files, "manifest.json"})
    if wrong:
        raise UserError(f"{path} is damaged ({wrong[0]} is {'not expected' if wrong[0] in there else 'missing'})")
    for name, entry in files.items():
        about = (path / name).lstat()
        if not stat.S_ISREG(about.st_mode):
            raise UserError(f"{path / name} is not a plain file: do not trust this checkpoint")
        if not isinstance(entry, dict) or entry.get("bytes") != about.st_size:
            raise UserError(f"{path / name} is damaged ({about.st_size} bytes are not the ones it was saved with)")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that may be hostile: too large, too deep, not a file. Raises UserError."""
    about = path.lstat()
    if not stat.S_ISREG(about.st_mode) or about.st_size > LARGEST_JSON:
        raise UserError(f"{path} is not a plain file of at most {LARGEST_JSON >> 20} MiB: do not trust it")
    try:
        value = json.loads(path.read_bytes(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged (it is not JSON)") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (it is not a JSON object)")
    return value


def refuse(word: str) -> None:
    """json reads NaN and Infinity by default; a number that is none has no place in our files."""
    raise ValueError(f"{word} is not JSON")
