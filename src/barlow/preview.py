"""Before any training: what the views look like, what is in the pile, what would be chosen, what it would cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from barlow.check import check
from barlow.config import Config
from barlow.prepare import views_of
from barlow.run import survey
from barlow.sheet import contact_sheet


def show_views(config: Config, output: Path, count: int) -> Path:
    """Writes a contact sheet of ``count`` images of ``config.images`` with the views that a run would draw."""
    images, resolved, _ = survey(config, None)
    size, seed = resolved.image_size, resolved.seed
    assert size is not None and seed is not None
    return contact_sheet(images, views_of(resolved), size=size, seed=seed, count=count, path=output)


def check_images(images: str, splits: Sequence[str], as_json: bool) -> tuple[str, bool]:
    """(report as text or JSON, whether the images can be trained on), with the settings that pretrain would choose."""
    report = check(images, {name: name for name in splits})
    if report["usable"]:
        _, _, choices = survey(Config(images), None)
        report["settings"] = {choice.word: [choice.value, choice.reason] for choice in choices}
    if as_json:
        return json.dumps(report, indent=2, ensure_ascii=False), report["usable"]
    return table(report), report["usable"]


def table(report: Mapping[str, Any]) -> str:
    """The report as lines of text: what was found, then problems, then the settings with their reasons."""
    lines = [f"{name.replace('_', ' '):<22} {shown(value)}" for name, value in report.items()
             if name not in ("problems", "settings", "usable", "leaks")]  # fmt: skip
    for leak in report["leaks"]:
        both = " and ".join(leak["between"])
        lines.append(f"{'shared by':<22} {both}: {shown(leak['exact'])}; near: {shown(leak['near'])}")
    lines += ["", *(f"! {problem}" for problem in report["problems"])]
    lines.append("usable" if report["usable"] else "not usable")
    for word, (value, reason) in report.get("settings", {}).items():
        lines.append(f"  {word:<14} {value}: {reason}")
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A finding in a few words: counts with a few examples, spreads as least to most."""
    if isinstance(value, Mapping):
        if "count" in value:
            named = ", ".join(map(str, value.get("examples") or value.get("first") or ()))
            return f"{value['count']:,}" + (f" ({named})" if named else "")
        if "median" in value:
            return f"{value['least']} to {value['most']}, median {value['median']}"
        return ", ".join(f"{key} {shown(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(inner) for inner in value) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
