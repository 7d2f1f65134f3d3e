"""A step whose numbers were not finite, once more, from the last sound checkpoint on: what broke first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from barlow.batches import Batch
from barlow.console import say
from barlow.endings import keys
from barlow.errors import NumbersError, UserError
from barlow.manifest import read_json
from barlow.prepare import Ready, seed_step
from barlow.session import Session
from barlow.train import one_step


def read_bundle(out: Path) -> dict[str, Any]:
    """The newest record of a step that was not finite in a run folder. Raises UserError."""
    files = sorted((out / "nonfinite").glob("step-*.json"))
    if not files:
        raise UserError(f"{out} holds no step to replay: none of its losses or gradients was other than finite.")
    bundle = read_json(files[-1])
    if type(bundle.get("step")) is not int or not isinstance(bundle.get("reason"), str):
        raise UserError(f"{files[-1]} is damaged: it names no step and reason.")
    return bundle


def replay(session: Session, bundle: dict[str, Any]) -> NumbersError | None:
    """Trains from where ``session`` is to the step of ``bundle``; writes nothing. The error met, with what broke."""
    parts, last = session.parts, bundle["step"]
    if session.step >= last:
        raise UserError(f"the newest checkpoint, of step {session.step:,}, is past step {last:,}: nothing to replay.")
    say(f"replay       steps {session.step + 1:,} to {last:,}")
    for step in range(session.step, last):
        batch = parts.source[step]
        try:
            one_step(parts, batch, session.steps)
        except NumbersError as error:
            same = step + 1 == last and str(error) == bundle["reason"] and keys(parts, batch) == bundle.get("images")
            what = "Reproduced: the same" if same else f"Not the same ({bundle['reason']} at step {last:,}), but"
            return NumbersError(f"{what} at step {step + 1:,}: {error}. {first_broken(parts, batch)}")
    return None


def first_broken(parts: Ready, batch: Batch) -> str:
    """Where the first value that is not finite comes up: images, a layer on the way forward, or gradients."""
    config = parts.config
    seed_step(config.seed or 0, batch.step)
    views = parts.source.finish(batch, parts.fabric.device, parts.scales)
    for number, view in enumerate(views):
        broken = [parts.images.key(int(i)) for i, x in zip(batch.images, view, strict=True) if not x.isfinite().all()]
        if broken:
            return f"View {number + 1} of {', '.join(broken[:5])} is not finite before the network."
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:  # the innermost module is asked first
            if not found and not _finite(output) and all(map(_finite, inputs)):
                found.append(f"{name} ({type(module).__name__})")

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in parts.network.named_modules() if name]
    with torch.no_grad(), parts.fabric.autocast():
        parts.network(*views)
    for handle in hooks:
        handle.remove()
    if found:
        return f"On the way forward the first layer that is not finite is {found[0]}."
    gradients = [
        name for name, p in parts.network.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
    ]
    if gradients:
        return f"Everything is finite on the way forward; gradients that are not: {', '.join(gradients[:5])}."
    return "Everything is finite on the way forward."


def _finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or bool(value.isfinite().all())
