"""The end of a run: the encoder for other tools, its card, and the report."""

from __future__ import annotations

from pathlib import Path

from barlow.agreement import together
from barlow.card import write_card
from barlow.console import WORD, in_shell, say
from barlow.encoder import save_encoder
from barlow.errors import Stopped
from barlow.report import draw_report
from barlow.session import Session


def finish(session: Session, quiet: bool) -> None:
    """Writes the encoder and the report, and says where they are. Raises Stopped where the disk does not take them."""
    with together():
        if session.run:
            write_results(session, session.run.folder, quiet)


def write_results(session: Session, folder: Path, quiet: bool) -> None:
    """The first process's part of ``finish``."""
    if not session.settle():
        raise Stopped(f"All {session.steps:,} steps are done, but the last checkpoint could not be written. "
                      f"Make room for it in {folder}, then: barlow pretrain --resume {in_shell(folder)}")  # fmt: skip
    if session.quarantine:
        session.quarantine.append(last=True)
    parts, config = session.parts, session.parts.config
    assert config.encoder
    try:
        for k, encoder in enumerate(parts.network.encoders):
            mean, std = parts.scales[k % len(parts.scales)]
            images = parts.source.sources[k % len(parts.source.sources)]
            span = images.value_range if images.dtype != "uint8" and not images.shape else None
            save_encoder(
                folder / ("encoder", "encoder_b")[k], encoder, name=config.encoder, arguments=parts.arguments[k],
                size=config.image_size or 0, mean=mean, std=std, shape=images.shape,
                origin={"images": config.images, "steps": session.step, "seed": config.seed, "value_range": span,
                        "value_dtype": images.dtype if span else None},
            )  # fmt: skip
        report = draw_report(folder)
        for name in ("encoder", "encoder_b")[: len(parts.network.encoders)]:
            write_card(folder / name)
    except OSError as error:
        raise Stopped(f"Training is done and saved, but {folder} does not take its results: {error.strerror or error}. "
                      f"Make room, then: barlow pretrain --resume {in_shell(folder)}") from None  # fmt: skip
    if not quiet:
        if session.quarantine and (count := len(session.quarantine.written)):
            say(f"{'left out':<{WORD}} {count:,} unusable image{'s' * (count > 1)}, each with its reason in "
                f"{folder / 'quarantine.jsonl'}")  # fmt: skip
        say(f"{'encoder':<{WORD}} {folder / 'encoder'}\n{'report':<{WORD}} {report}")
