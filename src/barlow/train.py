"""The main job, told in order: images → views → network → objective → optimiser, step after step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from barlow import ranks
from barlow.batches import Batch, batches
from barlow.console import Display
from barlow.errors import NumbersError, Stopped
from barlow.microbatch import backward
from barlow.network import OneTwin
from barlow.objective import BarlowTwinsLoss, Terms, barlow_twins_loss
from barlow.optimise import rate, set_rate
from barlow.prepare import Ready, seed_step
from barlow.session import Session, agree
from barlow.signals import StopRequest


def train(session: Session, stop: StopRequest, *, quiet: bool = False) -> None:
    """Steps ``session.step`` to ``session.steps``. Raises Stopped after saving, NumbersError before an update."""
    parts, config = session.parts, session.parts.config
    with Display(quiet=quiet or ranks.rank() > 0) as display:
        display.update(steps=session.steps, **{"lambda": config.lambda_})
        if session.step == 0:
            session.look(warm_up=True)
        for batch, waited in batches(parts.source, session.step, session.steps, config.workers or 0):
            try:
                terms, lr = one_step(parts, batch, session.steps)
            except NumbersError as error:
                raise diverged(session, batch, error) from None
            session.took(batch, waited)
            if session.due(session.log_every):
                line = train_line(session, terms, lr)
                session.log("train", **line)
                display.update(step=session.step, **line)
            if session.due(session.health_every):
                session.log_speed()
                display.update(**session.look(warm_up=warming_up(session)))
            display.update(**session.speed())
            stopping, saving = agree(stop.signal is not None or session.out_of_time(), session.save_due())
            if stopping or saving:
                session.save()
            if stopping and session.step < session.steps:
                raise Stopped(*farewell(session, stop))


def warming_up(session: Session) -> bool:
    """Early on few directions are learned, which is no alarm: the rate's warm-up, and at least thirty steps."""
    return session.step < max(30, (session.parts.config.warmup or 0) * session.steps)


def one_step(parts: Ready, batch: Batch, steps: int) -> tuple[Terms, float]:
    """Views, embeddings, loss, gradients, update: one step of the method, for the images of this process."""
    config, fabric = parts.config, parts.fabric
    seed_step(config.seed or 0, batch.step)
    views = parts.source.finish(batch, fabric.device, config.mean or (), config.std or ())
    parts.optimizer.zero_grad()
    if config.micro_batch:
        terms = in_micro_batches(parts, views, config.micro_batch)
    else:
        terms = barlow_twins_loss(*parts.wrapped(*views), lambda_=config.lambda_)
        fabric.backward(terms.loss)
    check_gradient(parts)
    factor = rate(batch.step, steps, config.warmup or 0.0)
    set_rate(parts.optimizer, factor)
    parts.optimizer.step()
    return terms, factor * (config.lr or 0.0)


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
        run=lambda z, gradient: parts.fabric.backward(z, gradient),
        hold=lambda _: parts.fabric.no_backward_sync(parts.wrapped),
    )


def check_gradient(parts: Ready) -> None:
    """NumbersError when a gradient is not finite. (Float16 is left to its scaler, which skips such a step.)"""
    gradients = [p.grad for p in parts.network.parameters() if p.grad is not None]
    if parts.config.precision != "float16" and not math.isfinite(float(torch.nn.utils.get_total_norm(gradients))):
        raise NumbersError("a gradient holds NaN or infinity")


def diverged(session: Session, batch: Batch, error: NumbersError) -> NumbersError:
    """The same error with the step, what it means for the run, and the remedy."""
    lr = session.parts.config.lr or 0.0
    return NumbersError(
        f"At step {batch.step + 1} {error}. Nothing was updated, and the last checkpoint is sound. "
        f"The usual cause is a learning rate that is too large: try --lr {lr / 3:.2g} in a new --out."
    )


def train_line(session: Session, terms: Terms, lr: float) -> dict[str, Any]:
    """The line of kind "train" in metrics.jsonl, everything in it a function of settings, seed and images."""
    return {
        "epoch": round(session.epoch, 4),
        "loss": float(terms.loss.detach()),
        "floor": terms.floor,
        "invariance": terms.invariance,
        "redundancy": terms.redundancy,
        "diagonal": terms.mean_diagonal,
        "lr": lr,
    }


def farewell(session: Session, stop: StopRequest) -> tuple[str, int]:
    """What to tell someone whose run stops before its end, and the exit code."""
    saved = session.settle()
    why = f"signal {stop.signal.name}" if stop.signal else "the time limit"
    where = session.run.folder if session.run else session.parts.config.out
    what = "saved" if saved else f"NOT saved ({where} cannot be written; the checkpoint before it is sound)"
    sentence = f"Stopped by {why} after step {session.step:,} of {session.steps:,}, {what}. "
    return sentence + f"Continue with: barlow pretrain --resume {where}", stop.exit_code or 75
