"""Before any training: what the views look like, what is in the pile, what would be chosen, what it would cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from barlow.check import check
from barlow.check_table import rows
from barlow.config import Config
from barlow.console import WORD, spelled
from barlow.errors import UserError
from barlow.files import check_output, keep_foreign
from barlow.prepare import views_of
from barlow.sheet import contact_sheet, is_sheet
from barlow.sources import keep_apart
from barlow.survey import survey


def show_views(config: Config, output: Path, count: int) -> Path:
    """Writes a contact sheet of ``count`` images of ``config.images`` with the views that a run would draw."""
    if count < 1:
        raise UserError(f"count = {count}: a contact sheet shows at least one image.")
    check_output(output)
    if output.suffix.lower() != ".png":
        raise UserError(f"a contact sheet is a PNG file: name it {output.with_suffix('.png').name}")
    keep_apart(config.images, output)
    keep_foreign(output, is_sheet)
    images, resolved, _ = survey(config, None)
    size, seed = resolved.image_size, resolved.seed
    assert size is not None and seed is not None
    return contact_sheet(
        images, views_of(resolved), size=size, seed=seed, count=count, path=output, partners=images.second
    )


def check_images(images: str, splits: Sequence[str]) -> dict[str, Any]:
    """The report of ``check``, and where the images can be trained on the settings that pretrain would choose."""
    report = check(images, {name: name for name in splits})
    if report["usable"]:
        _, _, choices = survey(Config(images), None)
        report["settings"] = {choice.word: [choice.value, choice.reason] for choice in choices}
    return report


def table(report: dict[str, Any]) -> str:
    """The report as lines of text: what was found, then the settings with their reasons."""
    found = rows(report)
    wide = max(len(what) for what, _ in found)
    lines = [f"{what:<{wide}}  {finding}" for what, finding in found]
    lines += ["", "These images can be trained on." if report["usable"] else "These images cannot be trained on."]
    for word, (value, reason) in report.get("settings", {}).items():
        lines.append(f"  {word:<{WORD}} {spelled(value)}: {reason}")
    return "\n".join(lines)
