"""One run from its settings to its folder: start or continue, measure, train, leave encoder and report behind."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from barlow import ranks
from barlow.batches import ViewLike
from barlow.checkpoint import latest, load
from barlow.config import Config, differences, read_toml, to_toml
from barlow.console import say
from barlow.encoder import save_encoder
from barlow.environment import environment
from barlow.errors import Stopped, UserError
from barlow.images import Images, open_images, write_index
from barlow.objective import floor
from barlow.plan import RULES, Choice, Findings, resolve
from barlow.prepare import Ready, build_encoders, launch, look, ready, views_of
from barlow.progress import duration
from barlow.quarantine import Quarantine
from barlow.report import write_report
from barlow.resources import check_disk, explain_out_of_memory, is_out_of_memory, peak_memory, readable
from barlow.runlog import Run, open_run
from barlow.saver import Saver
from barlow.session import Session
from barlow.signals import Deadline, StopRequest, kill_workers, parse_duration
from barlow.train import one_step, train

KEPT = 2  # checkpoints
# Fields that may differ when a run is continued: they change where and how fast, not what is computed.
FREE = frozenset({"out", "workers", "devices", "checkpoint_every", "time_limit", "cache", "max_bad"})
TRIAL_SECONDS = 6.0  # of timed steps at most; less where the whole run is short
FINISH_SECONDS = 6.0  # for the last save, the encoder and the report


@dataclass(frozen=True)
class Begun:
    """A run that is open: its settings, all resolved; its images; its folder on the first process, else None."""

    config: Config
    images: Images
    run: Run | None
    fresh: bool


def pretrain(
    config: Config,
    *,
    images: Any = None,
    views: Sequence[ViewLike] | None = None,
    resume: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> Path:
    """Trains on unlabelled images as ``config`` says; returns the run folder with the encoder and the report.

    ``images`` and ``views`` take the place of ``config.images`` and ``config.views`` from Python: arrays in memory,
    rows of numbers or functions. A run that is already in the folder is continued to the bit; a complete one is left
    alone.
    ``dry_run`` prints the plan, with time and memory measured on a few steps, and stops.
    Raises UserError, DataError, NumbersError and Stopped, with the exit codes of ``barlow.errors``.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        fabric = launch(config)
        quiet = quiet or ranks.rank() > 0
        if dry_run:
            return show_plan(config, fabric, images, views)
        begun = begin(config, images, resume, quiet, stack)
        if begun.fresh:
            begun = fix_length(begun, fabric, views, started, quiet)
        parts = ready(begun.config, fabric, begun.images, views)
        session = open_session(parts, begun, started, stack)
        stack.callback(kill_workers)  # they ignore the stop signals; none may outlive us
        if session.step < session.steps:
            with StopRequest() as stop, out_of_memory_in_words(parts):
                train(session, stop, quiet=quiet)
        finish(session, quiet)
        return Path(begun.config.out or ".")


def begin(config: Config, images: Any, resume: bool, quiet: bool, stack: ExitStack) -> Begun:
    """Opens the run on the first process, new or continued; the others then read what it wrote."""
    out = Path(config.out or RULES["out"](config, _NOTHING)[0])
    trouble, run, fresh = "", None, not (out / "config.toml").is_file()
    if ranks.rank() == 0:
        try:
            if fresh and resume:
                raise UserError(f"There is no run to resume in {out}: it holds no config.toml.")
            run = (
                start(config.replace(out=str(out)), images, out, quiet, stack)
                if fresh
                else stack.enter_context(open_run(out))
            )
        except UserError as error:
            if ranks.world_size() == 1:
                raise
            trouble = str(error)
    told: dict[str, Any] = ranks.broadcast({"trouble": trouble, "fresh": fresh})
    if told["trouble"]:  # the others must not wait for a run that does not begin
        raise UserError(told["trouble"])
    resolved = read_toml(out / "config.toml")
    if not told["fresh"]:
        resolved = continued(resolved, config, out)
    source: Any = images if images is not None else resolved.images
    index = out / "index.parquet"
    opened = open_images(source, channels=resolved.channels, index=index if images is None and index.exists() else None)
    return Begun(resolved, opened, run, told["fresh"])


def start(config: Config, images: Any, out: Path, quiet: bool, stack: ExitStack) -> Run:
    """Looks at the images, chooses, says so, and writes the new run folder's first files."""
    if out.exists():
        run = stack.enter_context(open_run(out))  # before the images: a wrong folder should not cost an indexing
    opened, resolved, choices = survey(config, images)
    if not out.exists():
        run = stack.enter_context(open_run(out))
    if not quiet:
        show_choices(opened, resolved, choices)
    if images is None:
        write_index(opened, out / "index.parquet")
    Quarantine(opened, out / "quarantine.jsonl", resolved.max_bad or 0.0).start()
    run.write_config(to_toml(resolved))
    for choice in choices:
        run.log("event", 0, message=f"{choice.word} = {choice.value}: {choice.reason}")
    return run


def survey(config: Config, images: Any) -> tuple[Images, Config, list[Choice]]:
    """(images, resolved settings, automatic choices with their reasons)."""
    if images is None and config.images is None:
        raise UserError("No images are named: barlow pretrain IMAGES, with a folder, an array file or sample.")
    if sum(value is not None for value in (config.epochs, config.steps, config.minutes)) > 1:
        raise UserError("Give one of --epochs, --steps and --minutes, not several.")
    source: Any = images if images is not None else config.images
    opened = open_images(source, channels=config.channels)
    resolved, choices = resolve(config, look(opened))
    views_of(resolved)  # what cannot be built is refused before anything is printed or written
    build_encoders(resolved)
    return opened, resolved, choices


def continued(stored: Config, given: Config, out: Path) -> Config:
    """The stored settings with those of ``FREE`` that are given anew; UserError when another one differs."""
    changed = differences(stored, given, ignore=FREE)
    if changed:
        raise UserError(
            f"{out} holds a run with other settings ({'; '.join(changed)}). "
            "Repeat its own settings to continue it, or give another --out."
        )
    fresh = {name: getattr(given, name) for name in FREE - {"out"} if getattr(given, name) is not None}
    return stored.replace(**fresh)


def fix_length(begun: Begun, fabric: Fabric, views: Sequence[ViewLike] | None, started: float, quiet: bool) -> Begun:
    """Turns epochs or minutes into a number of steps, once, and records it: a resume then needs no clock."""
    config, train = begun.config, len(begun.images) - (begun.config.held_out or 0)
    if config.steps is None and config.minutes is not None:
        parts = ready(config, fabric, begun.images, views)
        seconds, looking = trial(parts, min(TRIAL_SECONDS, 1.5 * config.minutes))
        left = config.minutes * 60 - (time.monotonic() - started) - FINISH_SECONDS - 21 * looking
        steps: int = ranks.broadcast(max(1, int(left / seconds)))
        config = config.replace(steps=steps)
        if not quiet:
            epochs = steps * parts.source.batch_size / train
            each = f"{seconds * 1e3:.0f} ms each"
            say(f"steps        {steps:,}: {config.minutes:g} minutes at {each}; {epochs:.1f} epochs")
    elif config.steps is None:
        config = config.replace(steps=max(1, round((config.epochs or 0) * train / (config.batch_size or 1))))
    if begun.run:
        begun.run.write_config(to_toml(config))
    ranks.barrier()
    return Begun(config, begun.images, begun.run, True)


def trial(parts: Ready, seconds: float) -> tuple[float, float]:
    """(seconds a step, seconds a look at the held-out images), measured on throw-away steps of ``parts``."""

    def timed(first: int, count: int) -> float:
        begun = time.monotonic()
        for step in range(first, first + count):
            one_step(parts, parts.source[step], 10**6)
        if parts.fabric.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.monotonic() - begun) / count

    timed(0, 2)  # the first steps pay for allocations
    once = timed(2, 2)
    count = ranks.broadcast(max(3, min(200, int(seconds / once))))
    each = timed(4, count)
    begun = time.monotonic()
    parts.held_out.outputs(parts.network, parts.fabric.autocast)
    return each, time.monotonic() - begun


def open_session(parts: Ready, begun: Begun, started: float, stack: ExitStack) -> Session:
    """The session at its newest sound checkpoint, or at step 0; writes the pictures of the held-out images once."""
    run, config = begun.run, parts.config
    assert config.steps and config.out
    if run:
        devices = [str(parts.fabric.device)]
        others = run.write_environment(environment(devices))
        if others:
            say(f"note: this run began with other versions ({', '.join(others)}); it may not continue to the bit")
        check_disk(run.folder, sum(3 * p.numel() * p.element_size() for p in parts.network.parameters()))
    limit = Deadline(parse_duration(config.time_limit) if config.time_limit else None, begun=started)
    saver = stack.enter_context(Saver(run.checkpoints, last=KEPT)) if run else None
    session = Session(parts, run, saver, config.steps, limit)
    newest = latest(Path(config.out) / "checkpoints") if ranks.rank() == 0 else None
    name = ranks.broadcast(newest.name if newest else "")
    if name:
        session.restore(load(Path(config.out) / "checkpoints" / name, parts.fabric.device))
    if run:
        run.rewind(session.step)
        if not name:
            run.snapshot("held_out", **parts.held_out.pictures())
    return session


def finish(session: Session, quiet: bool) -> None:
    """Writes the encoder and the report, and says where they are."""
    if session.run is None:
        return
    parts, config, folder = session.parts, session.parts.config, session.run.folder
    assert config.encoder and config.image_size and config.mean and config.std
    for encoder, name in zip(parts.network.encoders, ("encoder", "encoder_b"), strict=False):
        save_encoder(
            folder / name, encoder, name=config.encoder, arguments=parts.arguments, size=config.image_size,
            mean=config.mean, std=config.std,
            origin={"images": config.images, "steps": session.step, "seed": config.seed},
        )  # fmt: skip
    session.settle()
    report = write_report(folder)
    if not quiet:
        say(f"encoder      {folder / 'encoder'}\nreport       {report}")


@contextmanager
def out_of_memory_in_words(parts: Ready) -> Iterator[None]:
    """Turns an allocation that fails into one sentence with the largest batch that fits (UserError)."""
    device = str(parts.fabric.device)
    before = peak_memory(device)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, Stopped) or not is_out_of_memory(error):
            raise
        batch = parts.config.micro_batch or parts.config.batch_size or 1
        raise UserError(explain_out_of_memory(error, batch=batch, before=before, device=device)) from None


def show_choices(images: Images, config: Config, choices: Sequence[Choice]) -> None:
    """Prints what was found, then every automatic choice with its reason."""
    left_out = f", {images.bad.num_rows:,} unusable ones left out" if images.bad.num_rows else ""
    say(f"{len(images):,} images{left_out}")
    for choice in choices:
        value = "-".join(map(str, choice.value)) if choice.word == "projector" else choice.value
        say(f"{choice.word:<12} {value}: {choice.reason}")
    dim = config.projector[-1] if isinstance(config.projector, tuple) else 0
    least = floor(config.batch_size or 0, int(dim), config.lambda_ or 0)
    say(f"{'floor':<12} {least:.2f}: the least this loss can be here")


def show_plan(config: Config, fabric: Fabric, images: Any, views: Sequence[ViewLike] | None) -> Path:
    """The dry run: choices, number of steps, time and memory as measured on a few steps; writes nothing."""
    opened, resolved, choices = survey(config, images)
    show_choices(opened, resolved, choices)
    begun = fix_length(Begun(resolved, opened, None, True), fabric, views, time.monotonic(), False)
    parts = ready(begun.config, fabric, opened, views)
    seconds, looking = trial(parts, TRIAL_SECONDS)
    steps = begun.config.steps or 0
    total = duration(steps * seconds + 21 * looking + FINISH_SECONDS)
    memory = readable(peak_memory(fabric.device.type))
    say(f"{'plan':<12} {steps:,} steps of {seconds * 1e3:.0f} ms, about {total}; peak memory {memory}")
    return Path(resolved.out or ".")


_NOTHING = Findings(0, 1, 1, 1, True, (), (), 0, "cpu", 1, 1, False)
