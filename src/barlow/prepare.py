"""From settings to everything that training needs: images looked at, choices made, networks built."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.optim import Optimizer

from barlow import ranks
from barlow.batches import Stream, ViewLike, split
from barlow.cache import cached
from barlow.config import Config
from barlow.errors import UserError
from barlow.held_out import HeldOut
from barlow.images import Images
from barlow.network import Twins, build_encoder, build_twins, model_arguments
from barlow.optimise import build_optimizer
from barlow.plan import Findings, machine
from barlow.sources import shown
from barlow.views import PRESETS, View

LOOKED_AT = 1000  # images that mean, standard deviation and median size are measured on


@dataclass(frozen=True)
class Ready:
    """All the parts of a run, on their device. ``network`` is the plain module, ``wrapped`` the one that trains."""

    config: Config
    fabric: Fabric
    images: Images  # as they lie where the user keeps them; ``source`` may read prepared copies
    source: Stream
    held_out: HeldOut
    network: Twins
    wrapped: Any  # Fabric's module
    optimizer: Optimizer
    arguments: dict[str, Any]  # of timm.create_model

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """What scales the loss under float16, and skips steps that overflow; None under other precisions."""
        return getattr(self.fabric.strategy.precision, "scaler", None)


def look(images: Images) -> Findings:
    """What the automatic choices depend on, from up to a thousand images spread evenly over the collection."""
    if len(images) < 2:
        only = "no usable image" if len(images) == 0 else "only one usable image"
        bad = [f"{shown(row['path'])}: {row['status']}" for row in images.bad.slice(0, 1).to_pylist()]
        why = f" ({images.bad.num_rows:,} files cannot be used, the first {bad[0]})" if bad else ""
        raise UserError(f"There is {only} here{why}; training needs many. Check the path; barlow check says more.")
    device, devices, cores, native = machine()
    chosen = np.unique(np.linspace(0, len(images) - 1, LOOKED_AT).astype(np.int64))
    moments = np.zeros((2, images.channels))
    for i in chosen:
        pixels = images.read_or_replace(int(i))[0].reshape(-1, images.channels).astype(np.float64)
        pixels /= {"uint8": 255, "uint16": 65535}.get(images.dtype, 1)
        moments += pixels.mean(0), np.square(pixels).mean(0)
    mean, square = moments / len(chosen)
    std = np.sqrt(np.maximum(square - mean**2, 1e-6))
    height, width = np.median(images.sizes, axis=0).astype(int)
    return Findings(
        images=len(images), height=int(height), width=int(width), channels=images.channels,
        in_memory=images.array is not None, mean=_rounded(mean), std=_rounded(std), measured=len(chosen),
        device=device, devices=devices, cores=cores, bfloat16=native,
    )  # fmt: skip


def _rounded(values: Any) -> tuple[float, ...]:
    return tuple(round(float(v), 4) for v in values)


def views_of(config: Config) -> tuple[View, ...]:
    """The rows of numbers that ``config.views`` names or holds (UserError for an unknown name or number)."""
    if isinstance(config.views, str):
        if config.views not in PRESETS:
            raise UserError(f"views = {config.views!r} is not known; there are {', '.join(PRESETS)}.")
        return PRESETS[config.views]
    known = {field.name for field in fields(View)}
    rows = []
    for row in config.views or ():
        if unknown := row.keys() - known:
            raise UserError(f"a view has no {sorted(unknown)[0]!r}; it has {', '.join(sorted(known))}.")
        numbers: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in row.items()}
        rows.append(View(**numbers))
    if len(rows) < 2:
        raise UserError(f"views holds {len(rows)} row; at least two views are needed.")
    return tuple(rows)


def ready(config: Config, fabric: Fabric, images: Images, views: Sequence[ViewLike] | None = None) -> Ready:
    """Builds all parts for a resolved ``config``. The initial weights depend on the seed alone."""
    assert config.seed is not None and config.image_size and config.batch_size and config.held_out
    assert config.mean and config.std and config.encoder and isinstance(config.projector, tuple)
    train, kept = split(config.seed, len(images), config.held_out)
    prepared = cached(images, config.image_size) if config.cache else images
    source = Stream(prepared, train, views or views_of(config), seed=config.seed, size=config.image_size,
                    batch_size=config.batch_size, rank=ranks.rank(), world=ranks.world_size())  # fmt: skip
    held_out = HeldOut(source, kept, mean=config.mean, std=config.std, device=fabric.device)
    assert isinstance(config.encoder_args, dict) and config.channels
    arguments = model_arguments(config.encoder, config.encoder_args, config.channels, config.image_size)
    torch.manual_seed(config.seed)
    encoders = build_encoders(config)
    network = build_twins(encoders, config.projector, channels=config.channels, size=config.image_size)
    network = network.to(fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    ranks.synchronise_batch_norm(network)  # in place: the network itself is no normalisation
    if config.micro_batch and len(encoders) > 1 and ranks.world_size() > 1:
        raise UserError("micro_batch with unshared twins works on one device only; give --devices 1 or --twins shared.")
    assert config.optimizer and config.lr
    optimizer = build_optimizer(network, config.optimizer, lr=config.lr, lr_bias=config.lr_bias or config.lr,
                                weight_decay=config.weight_decay or 0.0)  # fmt: skip
    wrapped, optimizer = fabric.setup(network, optimizer)
    return Ready(config, fabric, images, source, held_out, network, wrapped, optimizer, arguments)


def build_encoders(config: Config) -> list[nn.Module]:
    """One encoder for shared twins, two for unshared ones, with fresh weights from torch's generator."""
    assert config.encoder and isinstance(config.encoder_args, dict) and config.channels and config.image_size
    return [
        build_encoder(
            config.encoder,
            config.encoder_args,
            channels=config.channels,
            size=config.image_size,
            pretrained=bool(config.pretrained),
        )
        for _ in range(1 if config.twins == "shared" else 2)
    ]


def seed_step(seed: int, step: int) -> None:
    """Addresses the network's own randomness (dropout, drop path) by the step, so that nothing needs saving."""
    words = hashlib.blake2b(f"{seed} {step} {ranks.rank()}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(words, "little") >> 1)
