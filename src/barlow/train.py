"""The main job, told in order: images → views → network → objective → optimiser, step after step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from barlow import ranks
from barlow.agreement import agree, leave, share, together
from barlow.batches import Batch
from barlow.console import Display, say
from barlow.endings import NotFinite, collapse, diverged, farewell, trouble
from barlow.errors import NumbersError
from barlow.launch import patience
from barlow.looks import warm_up
from barlow.microbatch import backward
from barlow.network import OneTwin
from barlow.objective import BarlowTwinsLoss, Terms, barlow_twins_loss
from barlow.optimise import rate, set_rate
from barlow.prepare import Ready, largest_share, seed_step
from barlow.readers import batches
from barlow.session import TOO_LARGE, Session
from barlow.signals import StopRequest

SOME = 10  # logged losses whose mean is compared


def train(session: Session, stop: StopRequest, *, quiet: bool = False) -> None:
    """Steps ``session.step`` to ``session.steps``. Raises Stopped after saving, NumbersError before an update.

    Before each step all processes agree: whether to save, to stop, or to give up, for what one of them has met.
    """
    parts, config = session.parts, session.parts.config
    coming = batches(parts.source, session.step, session.steps, session.readers(), patience=patience(config))
    with Display(quiet=quiet or ranks.rank() > 0) as display, closing(coming):
        display.update(steps=session.steps, **{"lambda": config.lambda_})
        if session.step == 0:
            advise(session, session.look(warm_up=True))
        while True:
            batch, waited, failure = fetch(coming)
            news = session.news(batch)
            wish = stop.signal is not None or session.out_of_time()
            ill = bool(config.stop_on_collapse and session.watch.collapsed)
            stopping, saving, failing, bad, collapsed = agree(
                wish, session.save_due(), failure is not None, bool(news), ill
            )
            if saving or stopping or failing or collapsed:
                with together():  # the first process may find that what it saves is not finite
                    session.save()
            if failing:
                share(trouble(session, failure) if failure else None)
            if collapsed:
                leave(collapse(session))
            if batch is None:
                return
            if stopping:
                leave(farewell(session, stop))
            if bad:
                session.tell(news)
            try:
                terms, lr, skipped = one_step(parts, batch, session.steps)
                session.took(batch, waited, skipped)
            except NumbersError as error:
                leave(diverged(session, batch, error))
            if session.due(session.log_every):
                line = train_line(session, terms, lr)
                session.log("train", **line)
                worry(session, line, quiet)
                display.update(step=session.step, **line)
            if session.looks.due(session.step):
                display.update(**session.log_speed(), **session.look(warm_up=warming_up(session)))
            display.update(**session.speed())


def fetch(coming: Iterator[tuple[Batch, float]]) -> tuple[Batch | None, float, Exception | None]:
    """(the next batch or None, seconds waited for it, what went wrong instead): the others must hear of it first."""
    try:
        batch, waited = next(coming)
        return batch, waited, None
    except StopIteration:
        return None, 0.0, None
    except Exception as error:
        return None, 0.0, error


def advise(session: Session, seen: Mapping[str, Any]) -> None:
    """Before the first step: views that are the same make a loss that nothing can be learned from."""
    if seen.get("verdict") == "identical views":
        message = "the two views of every image are the same: nothing can be learned from them; check --views"
        say(f"warning: {message}")
        session.log("event", message=message)


def worry(session: Session, line: Mapping[str, float], quiet: bool) -> None:
    """Says, once, what a learning rate that is too large looks like before its numbers are no longer finite."""
    session.losses.append(line["loss"])
    session.diagonals.append(line["diagonal"])
    first, last = session.losses[:SOME], session.losses[-SOME:]
    if session.worried:
        return
    if line["diagonal"] == 0.0:
        what = "every output of the projector has become constant"
    elif len(session.losses) >= 4 * SOME and not warming_up(session) and sum(last) > 1.5 * sum(first):
        what = "the loss is far higher than at the start"
    else:
        return
    session.worried = True
    lr = session.parts.config.lr or 0.0
    message = f"{what}: {TOO_LARGE}; try --lr {lr / 3:.2g} in a new --out"
    session.log("event", message=message)
    if not quiet:
        say(f"warning: {message}")


def warming_up(session: Session) -> bool:
    """Whether the run is still in its first steps."""
    return session.step < warm_up(session.parts.config, session.steps)


def one_step(parts: Ready, batch: Batch, steps: int) -> tuple[Terms, float, bool]:
    """Views, embeddings, loss, gradients, update: one step of the method, for the images of this process.

    Returns the terms, the learning rate, and whether float16 has skipped the update. NumbersError before an update.
    """
    config, fabric = parts.config, parts.fabric
    seed_step(config.seed or 0, batch.step)
    views = parts.source.finish(batch, fabric.device, parts.scales)
    parts.optimizer.zero_grad()
    if config.micro_batch:
        terms = in_micro_batches(parts, views, config.micro_batch)
    else:
        terms = barlow_twins_loss(*parts.wrapped(*views), lambda_=config.lambda_)
        fabric.backward(terms.loss)
    check_gradient(parts, terms)
    factor = rate(batch.step, steps, config.warmup or 0.0)
    set_rate(parts.optimizer, factor)
    scale = parts.scaler.get_scale() if parts.scaler else 0.0
    parts.optimizer.step()
    skipped = parts.scaler is not None and parts.scaler.get_scale() < scale
    return terms, factor * (config.lr or 0.0), skipped


def in_micro_batches(parts: Ready, views: Sequence[Tensor], micro_batch: int) -> Terms:
    """Loss and gradients of the whole batch in two passes over micro-batches, each view by itself."""
    twins = [OneTwin(parts.wrapped, twin) for twin in range(len(parts.network.encoders))]
    networks = twins[0] if len(twins) == 1 else twins
    loss = BarlowTwinsLoss(parts.config.lambda_)
    return backward(
        networks,
        views,
        loss,
        micro_batch,
        rows=largest_share(parts.config),
        run=lambda z, gradient: parts.fabric.backward(z, gradient),
        hold=lambda _: parts.fabric.no_backward_sync(parts.wrapped),
    )


def check_gradient(parts: Ready, terms: Terms) -> None:
    """NumbersError when a gradient is not finite. (Float16 is left to its scaler, which skips such a step.)"""
    gradients = [p.grad for p in parts.network.parameters() if p.grad is not None]
    if parts.scaler is None and not math.isfinite(float(torch.nn.utils.get_total_norm(gradients))):
        raise NotFinite("a gradient holds NaN or infinity", told(terms))


def train_line(session: Session, terms: Terms, lr: float) -> dict[str, Any]:
    """The line of kind "train" in metrics.jsonl, everything in it a function of settings, seed and images."""
    line = {"epoch": round(session.epoch, 4), **told(terms), "lr": lr}
    return line | ({"skipped": session.skipped} if session.parts.scaler else {})


def told(terms: Terms) -> dict[str, float]:
    """The terms of a loss by name, as they are written down."""
    return {
        "loss": float(terms.loss.detach()),
        "floor": terms.floor,
        "invariance": terms.invariance,
        "redundancy": terms.redundancy,
        "diagonal": terms.mean_diagonal,
    }
