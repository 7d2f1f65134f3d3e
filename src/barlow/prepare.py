"""From settings to everything that training needs: images looked at, choices made, networks built."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.optim import Optimizer

from barlow import ranks
from barlow.batch_norm import exact_batch_norm
from barlow.batches import Scale, Stream, split
from barlow.cache import cached, plan_cache
from barlow.check import measured
from barlow.config import OWN, Config
from barlow.draws import IntArray
from barlow.errors import UserError
from barlow.held_out import HeldOut
from barlow.images import Images
from barlow.index import in_threads
from barlow.launch import compute_in, share, use_threads
from barlow.machine import machine
from barlow.network import Twins, build_encoder, build_twins, model_arguments
from barlow.optimise import build_optimizer
from barlow.own import Own
from barlow.plan import Choice, Findings
from barlow.progress import progress
from barlow.sources import shown
from barlow.views import PRESETS, View

LOOKED_AT = 1000  # images that mean and standard deviation are measured on
NONE = Own()
LOOK = 256  # pixels of a side that are enough for it: larger JPEGs are read smaller


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
    arguments: list[dict[str, Any]]  # of timm.create_model, for each encoder
    scales: list[Scale]  # mean and standard deviation of the channels; of pairs one for each

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """What scales the loss under float16, and skips steps that overflow; None under other precisions."""
        return getattr(self.fabric.strategy.precision, "scaler", None)


def look(images: Images, wanted: int | None = None) -> Findings:
    """What the automatic choices depend on, from up to a thousand images spread evenly over the collection.

    ``wanted``: the number of devices where it is given."""
    if len(images) < 2:
        only = "no usable image" if len(images) == 0 else "only one usable image"
        bad = [f"{shown(row['path'])}: {row['status']}" for row in images.bad.slice(0, 1).to_pylist()]
        why = f" ({images.bad.num_rows:,} files cannot be used, the first {bad[0]})" if bad else ""
        raise UserError(f"There is {only} here{why}; training needs many. Check the path; barlow check says more.")
    device, count, cores, native = machine()
    devices, cores, started = share(os.environ, wanted or count, cores)
    threads = min(torch.get_num_threads(), cores)
    if images.shape:
        return Findings(
            images=len(images), height=0, width=0, channels=0, in_memory=True, mean=(), std=(), measured=0,
            device=device, devices=devices, cores=cores, bfloat16=native, channels_b=int(images.second is not None),
            shape=images.shape, started=started, threads=threads,
        )  # fmt: skip
    chosen = np.unique(np.linspace(0, len(images) - 1, LOOKED_AT).astype(np.int64))
    mean, std = moments(images, chosen)
    height, width = np.median(images.sizes, axis=0).astype(int).tolist()
    partners: dict[str, Any] = {}
    if images.second is not None:
        partners["channels_b"] = images.second.channels
        partners["mean_b"], partners["std_b"] = moments(images.second, chosen)
        other = np.median(images.second.sizes, axis=0).astype(int).tolist()
        height, width = min((height, width), other, key=min)  # the smaller of the two decides
    return Findings(
        images=len(images), height=height, width=width, channels=images.channels,
        in_memory=images.array is not None or (images.held is not None and images.held.in_memory),
        mean=mean, std=std, measured=len(chosen),
        device=device, devices=devices, cores=cores, bfloat16=native, started=started, threads=threads, **partners,
    )  # fmt: skip


def moments(images: Images, chosen: IntArray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation) of each channel over these images, in units of the full range; with progress."""

    def one(k: int) -> tuple[Any, Any]:
        return measured(images.read_or_replace(int(chosen[k]), (LOOK, LOOK))[0])[:2]

    what, places, sums = "measuring colours", range(len(chosen)), np.zeros((2, images.channels))
    # in threads, but in the order of the images; a Dataset may not bear being read by threads
    found = in_threads(one, len(chosen), what) if images.root else progress(map(one, places), what, len(chosen))
    for both in found:
        sums += both
    mean, square = sums / len(chosen)
    return _rounded(mean), _rounded(np.sqrt(np.maximum(square - mean**2, 1e-6)))


def choose_cache(config: Config, images: Images, asked: bool) -> tuple[Config, list[Choice]]:
    """Whether prepared images are kept, and in which form: decided once, so that a resume reads the same pixels.

    Where they do not fit, the run goes on without; UserError where they were ``asked`` for.
    """
    if not config.cache or not config.image_size:
        return config.replace(cache_form=None), []
    plan = plan_cache(images, config.image_size, config.cache_form)
    if plan.form != "none":
        return config.replace(cache_form=plan.form), [Choice("cache_form", plan.form, plan.reason)]
    if asked:
        raise UserError(f"a cache was asked for, but {plan.reason}: leave --cache and --cache-form out")
    return config.replace(cache=False, cache_form=None), [Choice("cache", False, plan.reason)]


def prepared(config: Config, images: Images) -> Images:
    """The images as the run reads them: from the cache in the form that the run began with, or as they lie."""
    if not config.cache or not config.image_size:
        return images
    ready = cached(images, config.image_size, config.cache_form)
    if ready is images and config.cache_form:
        why = plan_cache(images, config.image_size, config.cache_form).reason
        raise UserError(f"this run reads its images from a cache ({config.cache_form}), but {why}: make room there")
    return ready


def _rounded(values: Any) -> tuple[float, ...]:
    return tuple(round(float(v), 4) for v in values)


def views_of(config: Config) -> tuple[View, ...]:
    """The rows of numbers that ``config.views`` names or holds (UserError for an unknown name or number)."""
    if isinstance(config.views, str):
        if config.views.startswith(OWN):
            raise UserError(
                f"The views of this run are functions of your own ({config.views.removeprefix(OWN)}), which its "
                "settings cannot rebuild: go on from Python, with pretrain(config, views=…)."
            )
        names = config.views.split("/")
        if unknown := set(names) - PRESETS.keys():
            raise UserError(f"views = {sorted(unknown)[0]!r} is not known; there are {', '.join(PRESETS)}.")
        if len(names) > 2 or (len(names) == 2 and not config.channels_b):
            raise UserError(f"views = {config.views!r}: two names are for given pairs, one for each image of a pair.")
        return PRESETS[names[0]] if len(names) == 1 else (PRESETS[names[0]][0], PRESETS[names[1]][1])
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


def ready(config: Config, fabric: Fabric, images: Images, own: Own = NONE, fresh: bool = True) -> Ready:
    """Builds all parts for a resolved ``config``. The initial weights depend on the seed alone; a module of one's own
    brings those of its encoder. ``fresh``: False where a checkpoint will bring all weights, and none are fetched."""
    assert config.seed is not None and config.batch_size and config.held_out and config.precision
    compute_in(fabric, config.precision)
    use_threads(config)
    assert config.encoder and isinstance(config.projector, tuple)
    train, kept = split(config.seed, len(images), config.held_out)
    source = Stream(prepared(config, images), train, own.views or views_of(config), seed=config.seed,
                    size=config.image_size or 0, batch_size=config.batch_size, rank=ranks.rank(),
                    world=ranks.world_size())  # fmt: skip
    scales: list[Scale] = [(config.mean or (), config.std or ())]
    scales += [(config.mean_b, config.std_b)] if config.mean_b and config.std_b else []
    held_out = HeldOut(source, kept, scales=scales, device=fabric.device)
    torch.manual_seed(config.seed)
    encoders, arguments = build_encoders(config, images, own, fresh)
    network = build_twins(encoders, config.projector, shapes_of(config, images))
    layout = torch.preserve_format if images.shape else torch.channels_last
    network = network.to(fabric.device, memory_format=layout)  # type: ignore[call-overload]
    exact_batch_norm(network)  # in place: the network itself is no normalisation
    if config.micro_batch and len(encoders) > 1 and ranks.world_size() > 1:
        raise UserError("micro_batch with unshared twins works on one device only; give --devices 1 or --twins shared.")
    least = config.batch_size // ranks.world_size()
    if config.micro_batch and -(-largest_share(config) // config.micro_batch) > least:
        raise UserError(f"micro_batch = {config.micro_batch} makes more micro-batches than some processes have images "
                        f"({least}): give a larger one, or a --batch-size that their number divides.")  # fmt: skip
    assert config.optimizer and config.lr
    optimizer = build_optimizer(network, config.optimizer, lr=config.lr, lr_bias=config.lr_bias or config.lr,
                                weight_decay=config.weight_decay or 0.0)  # fmt: skip
    wrapped, optimizer = fabric.setup(network, optimizer)
    return Ready(config, fabric, images, source, held_out, network, wrapped, optimizer, arguments, scales)


def largest_share(config: Config) -> int:
    """The most images of a batch that one process has."""
    return -(-(config.batch_size or 0) // ranks.world_size())


def shapes_of(config: Config, images: Images) -> list[tuple[int, ...]]:
    """What one sample is to each encoder, channels first: one shape for shared twins, two for unshared ones."""
    first, second = images.shape, images.second.shape if images.second else images.shape
    if not first:
        assert config.channels and config.image_size
        first = (config.channels, config.image_size, config.image_size)
        second = (config.channels_b or config.channels, config.image_size, config.image_size)
    if config.twins == "shared" and first != second:
        raise UserError(f"pairs of the shapes {first} and {second} cannot share a network.")
    return [first, second] if config.twins == "unshared" else [first]


def build_encoders(
    config: Config, images: Images, own: Own = NONE, fresh: bool = True
) -> tuple[list[nn.Module], list[dict[str, Any]]]:
    """(encoders, arguments by which timm builds each again): one for shared twins, two for unshared ones, with fresh
    weights from torch's generator, or timm's where the settings ask for them and the run is ``fresh``; of modules of
    one's own copies, and no arguments."""
    assert config.encoder and isinstance(config.encoder_args, dict)
    name, arguments, shapes = config.encoder, config.encoder_args, shapes_of(config, images)
    if name.startswith(OWN):
        return own.modules(config, shapes), [{} for _ in shapes]
    sized = [(shape[0], shape[-1]) for shape in shapes]
    pretrained = bool(config.pretrained) and fresh
    built = [build_encoder(name, arguments, channels=c, size=size, pretrained=pretrained) for c, size in sized]
    return built, [model_arguments(name, arguments, c, size) for c, size in sized]


def seed_step(seed: int, step: int) -> None:
    """Addresses the network's own randomness (dropout, drop path) by the step, so that nothing needs saving."""
    words = hashlib.blake2b(f"{seed} {step} {ranks.rank()}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(words, "little") >> 1)
