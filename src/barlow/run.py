"""One run from its settings to its folder: start or continue, measure, train, leave encoder and report behind."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from torch import nn

from barlow import ranks
from barlow.agreement import leave, together
from barlow.checkpoint import candidates, latest, load, set_aside
from barlow.config import Config, differences, read_toml, to_toml
from barlow.console import in_shell, say, say_choice
from barlow.endings import out_of_memory_in_words, signals_outside_training
from barlow.environment import environment
from barlow.errors import UserError
from barlow.finish import finish
from barlow.images import Images, write_index
from barlow.kinds import parse_duration
from barlow.launch import for_a_later_call, launch, undisturbed
from barlow.length import TRIAL_SECONDS, Pace, steps_of_epochs, steps_of_minutes, trial
from barlow.loggers import check_installed, copies
from barlow.looks import looks
from barlow.own import Own, own
from barlow.plan import Choice, run_folder
from barlow.prepare import Ready, ready
from barlow.progress import duration
from barlow.quarantine import Quarantine
from barlow.replay import read_bundle
from barlow.replay import replay as repeat
from barlow.resources import check_disk, peak_memory, readable
from barlow.resume import FREE, check_allowed, check_settings, continued, lacking, on_as_many, open_run_images, reopen
from barlow.roll_call import roll_call
from barlow.runlog import Run, check_place, check_text, open_run
from barlow.saver import Saver
from barlow.session import LINES, Session
from barlow.signals import Deadline, StopRequest, kill_workers
from barlow.survey import show_choices, survey
from barlow.train import train
from barlow.views import OwnView, View

KEPT = 2  # checkpoints


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
    views: Sequence[View | OwnView] | None = None,
    encoder: nn.Module | Sequence[nn.Module] | None = None,
    resume: bool = False,
    allow: Collection[str] = (),
    dry_run: bool = False,
    quiet: bool = False,
) -> Path:
    """Trains on unlabelled images as ``config`` says; returns the run folder with the encoder and the report.

    ``images``, ``views`` and ``encoder`` take the place of the settings of these names, with what only Python has:
    arrays, a sequence of arrays, a torch Dataset, ``Pairs``, ``Samples``; ``View`` rows or functions (images (n, c, h,
    w) in 0 to 1, generator) → the same shape; a module (n, c, h, w) → (n, features), of unshared twins two. The module
    is copied. Code is recorded by its name only, so a resume and ``load_encoder`` need it given again.

    A run that is already in the folder is continued to the bit; a complete one is left alone.
    ``allow``: settings that may differ from those of that run, "index" for images, "network" for weights.
    ``dry_run`` prints the plan, with time and memory measured on a few steps, and stops.
    Raises UserError, DataError, NumbersError and Stopped, with the exit codes of ``barlow.errors``.
    """
    started = time.monotonic()
    check_allowed(allow)
    mine, others = own(views, encoder), multiprocessing.active_children()
    config = mine.recorded(settings(config))
    check_installed(config.logger or ())
    out = Path(run_folder(config))
    if for_a_later_call():
        return out
    with ExitStack() as stack:
        check_text(images=config.images or "", out=out)
        stack.enter_context(signals_outside_training(out))
        stack.enter_context(undisturbed())
        config = on_as_many(config, out)
        fabric = launch(config, stack)
        quiet = quiet or ranks.rank() > 0
        if dry_run:
            return show_plan(config, fabric, images, mine)
        stack.enter_context(roll_call(f"Bring it back and continue with: barlow pretrain --resume {in_shell(out)}"))
        begun = begin(config, images, mine, out, resume, allow, quiet, stack)
        if begun.fresh or begun.config.steps is None:
            begun = fix_length(begun, fabric, mine, started, quiet)
        parts = ready(begun.config, fabric, begun.images, mine, fresh=not candidates(out / "checkpoints"))
        session = open_session(parts, begun, started, allow, stack)
        stack.callback(kill_workers, others)  # ours ignore the stop signals; none may outlive us
        if session.step < session.steps:
            with StopRequest() as stop, out_of_memory_in_words(parts):
                train(session, stop, quiet=quiet)
        elif not quiet:
            say(f"note: all {session.steps:,} steps are done already; for a longer run: --steps N --allow steps")
        finish(session, quiet)
        return Path(begun.config.out or ".")


def settings(given: Any) -> Config:
    """UserError for settings that are none, such as the path of the images alone."""
    if not isinstance(given, Config):
        raise UserError(f"pretrain takes a Config, not a {type(given).__name__}: pretrain(Config('photos')), or "
                        "pretrain(Config(), images=…) for images from Python.")  # fmt: skip
    return given


def replay(out: Path) -> None:
    """Repeats the step of a run at which a number was not finite, from the last sound checkpoint; writes nothing.

    Raises NumbersError when it is not finite again, saying what broke first; UserError when there is no such step.
    """
    bundle = read_bundle(out)
    config = read_toml(out / "config.toml")
    with ExitStack() as stack:
        saved_once = bool(candidates(out / "checkpoints"))
        parts = ready(config, launch(config, stack), open_run_images(config, None, out), fresh=not saved_once)
        session = Session(parts, None, None, config.steps or 0, Deadline(None))
        newest = latest(out / "checkpoints")
        if newest:
            saved = load(newest, parts.fabric.device)
            check_settings(saved.state.get("settings"), config, newest, ())
            session.restore(saved, newest)
        error = repeat(session, bundle)
        if error:
            leave(error)
        if ranks.rank() == 0:
            say(f"Step {bundle['step']:,} is finite this time: other versions, another machine, or changed images.")


def begin(
    config: Config, images: Any, mine: Own, out: Path, resume: bool, allow: Collection[str], quiet: bool,
    stack: ExitStack,
) -> Begun:  # fmt: skip
    """Opens the run on the first process, new or continued; the others then read what it wrote."""
    run, fresh = None, False
    with together():
        if ranks.rank() == 0:
            fresh = not (out / "config.toml").is_file()
            if fresh and resume and not candidates(out / "checkpoints"):
                raise UserError(f"There is no run to resume in {out}: it holds no config.toml.")
            if fresh:
                run = start(config, images, mine, out, quiet, stack)
            else:
                run = stack.enter_context(open_run(out))
                reopen(run, config, images, allow)
    fresh = ranks.broadcast(fresh)
    resolved = read_toml(out / "config.toml").replace(out=str(out))
    if not fresh:
        resolved = continued(resolved, config, out, allow)
        check_installed(resolved.logger or ())
    return Begun(resolved, open_run_images(resolved, images, out), run, fresh)


def start(config: Config, images: Any, mine: Own, out: Path, quiet: bool, stack: ExitStack) -> Run:
    """Looks at the images, chooses, says so, and writes the new run folder's first files."""
    if candidates(out / "checkpoints"):
        raise UserError(
            f"{out} holds checkpoints of a run whose config.toml is gone: bring it back (its text lies in checkpoints/"
            'step-…/state.json under "settings"), or give another --out.'
        )
    there = out.exists()
    if there:
        run = stack.enter_context(open_run(out))  # before the images: a wrong folder should not cost an indexing
    else:
        check_place(out)
    opened, resolved, choices = survey(config, images, mine)
    if not there:
        run = stack.enter_context(open_run(out))
    if run.held:
        raise UserError(f"another run has begun in {out} meanwhile: give another --out, or repeat its own settings.")
    if not quiet:
        show_choices(opened, resolved, choices)
    run.rewind(-1)  # what a run left behind that was killed before it had settings
    write_index(opened, out / "index.parquet")
    Quarantine(opened, out / "quarantine.jsonl", resolved.max_bad or 0.0).start()
    for choice in choices:
        run.log("event", 0, message=f"{choice.word} = {choice.value}: {choice.reason}")
    run.write_config(to_toml(resolved))  # last: from here on there is a run to continue
    return run


def fix_length(begun: Begun, fabric: Fabric, mine: Own, started: float, quiet: bool, pace: Pace | None = None) -> Begun:
    """Turns epochs or minutes into a number of steps, once, and records it: a resume then needs no clock.

    ``pace``: what was measured, where it has been; minutes need it.
    """
    config, chosen = begun.config, list[Choice]()
    if config.steps is None and config.minutes is not None:
        parts = ready(config, fabric, begun.images, mine)
        pace = pace or trial(parts, min(TRIAL_SECONDS, 1.5 * config.minutes))
        left = 60 * config.minutes - (time.monotonic() - started)
        chosen.append(steps_of_minutes(config, pace, len(parts.source.train), left))
        if not quiet and (advice := pace.wait.advice(config.threads or 1)):
            say(f"warning: the steps that were measured are slow ones, so few are planned: {advice}")
    elif config.steps is None:
        chosen.append(steps_of_epochs(config, len(begun.images)))
    config = config.replace(**{choice.word: choice.value for choice in chosen})
    if not quiet:
        for choice in chosen:
            say_choice(choice.word, choice.value, choice.reason)
        if config.health_every is None:
            planned = looks(config, config.steps or 1)
            say_choice("health_every", planned.every, f"{planned.count} looks at the held-out images in all")
        if config.checkpoint_every is None:
            say_choice("checkpoint_every", "10 minutes", "a run that is killed loses no more; and at the end")
    if begun.run and read_toml(begun.run.folder / "config.toml").steps is None:  # else --allow gives another length
        begun.run.write_config(to_toml(config))
    ranks.barrier()
    return replace(begun, config=config)


def open_session(parts: Ready, begun: Begun, started: float, allow: Collection[str], stack: ExitStack) -> Session:
    """The session at its newest sound checkpoint, or at step 0; writes the pictures of the held-out images once."""
    run, config = begun.run, parts.config
    assert config.steps and config.out
    newest, changed = None, list[str]()
    with together():
        if run:
            others = run.write_environment(environment([str(parts.fabric.device)]))
            others = [name for name in others if name != "cores" or config.threads is None]  # they decide the threads
            if others:
                say(f"note: this run began with other versions ({', '.join(others)}); it may not continue to the bit")
            size = sum(3 * p.numel() * p.element_size() for p in parts.network.parameters())
            check_disk(run.folder, size, len(candidates(run.checkpoints)))
            newest = latest(run.checkpoints)
            if newest is None and candidates(run.checkpoints):
                raise UserError(f"{run.checkpoints} holds no checkpoint that is whole, so this run cannot go on: bring "
                                "one back, or give another --out to begin again.")  # fmt: skip
    limit = Deadline(parse_duration(config.time_limit) if config.time_limit else None, begun=started)
    saver = stack.enter_context(Saver(run.checkpoints, last=KEPT, every=config.keep_every)) if run else None
    session = Session(parts, run, saver, config.steps, limit)
    name = ranks.broadcast(newest.name if newest else "")
    if name:
        where = Path(config.out) / "checkpoints" / name
        with together():
            saved = load(where, parts.fabric.device)
            changed = check_settings(saved.state.get("settings"), config, where, allow)
            session.restore(saved, where, allow)
            if session.step > session.steps:
                raise UserError(f"{config.out} is at step {session.step:,} already, past the {session.steps:,} that "
                                "are asked for: give a greater length.")  # fmt: skip
    if run and newest:
        set_aside(run.checkpoints, newest)
    session.begin()
    if run:
        damaged = run.rewind(session.step)
        session.recall()
        if lost := lacking(run, config, damaged, session.step, LINES):
            session.warn(lost)
        changed += differences(read_toml(run.folder / "config.toml"), config, ignore=FREE)
        for line in dict.fromkeys(changed):
            session.note(f"setting accepted: {line}")
        if changed:  # what --allow accepts is written only now, as it has turned out to work
            run.write_config(to_toml(config))
            session.save()
        if not name or changed or parts.held_out.bad or "index" in allow:
            run.snapshot("held_out", **parts.held_out.pictures())
        stack.enter_context(copies(run, config))
    return session


def show_plan(config: Config, fabric: Fabric, images: Any, mine: Own) -> Path:
    """The dry run: choices, number of steps, time and memory as measured on a few steps; writes nothing."""
    started = time.monotonic()
    opened, resolved, choices = survey(config, images, mine)
    show_choices(opened, resolved, choices)
    pace = trial(ready(resolved, fabric, opened, mine), TRIAL_SECONDS)
    config = fix_length(Begun(resolved, opened, None, True), fabric, mine, started, False, pace).config
    steps = config.steps or 0
    total = duration(time.monotonic() - started + pace.whole(steps, config))
    memory = readable(peak_memory(fabric.device.type))
    say_choice("plan", f"{steps:,} steps", f"{pace.step * 1e3:.0f} ms each, about {total} in all; peak memory {memory}")
    return Path(resolved.out or ".")
