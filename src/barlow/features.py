"""What evaluation judges: the features of an encoder, raw pixels, and the fingerprint that shows them unchanged."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from barlow.embedding import embed_images
from barlow.encoder import Encoder
from barlow.guard import BadImage
from barlow.index import in_threads
from barlow.reading import Images

Floats = NDArray[np.float32]

PIXELS = 32  # largest side of raw pixels; larger images, and images of different sizes, become PIXELS × PIXELS


def raw_pixels(sources: Sequence[Images]) -> tuple[Floats, list[bytes | None], str]:
    """(pixels (n, p) in 0..1, digest of each image's content or None where it cannot be read, how they were made).

    As they are where all images have one size of at most ``PIXELS`` a side, else each resized to PIXELS × PIXELS
    (bilinear, antialiased, the aspect not kept). Equal digests: equal decoded pixels, whatever the file.
    """
    sizes = np.unique(np.concatenate([images.sizes for images in sources]), axis=0)
    whole = len(sizes) == 1 and int(sizes.max()) <= PIXELS
    height, width = sizes[0].tolist() if whole else (PIXELS, PIXELS)
    channels = sources[0].channels
    total = sum(len(images) for images in sources)
    pixels, digests = np.zeros((total, height * width * channels), np.float32), list[bytes | None]()
    for images in sources:
        for row in in_threads(partial(_pixels, images, height, width), len(images), "raw pixels"):
            if row is not None:
                pixels[len(digests)] = row[0]
            digests.append(row[1] if row else None)
    return pixels, digests, f"{height}×{width}×{channels}, {'as they are' if whole else 'resized'}"


def _pixels(images: Images, height: int, width: int, i: int) -> tuple[Floats, bytes] | None:
    try:
        image = images.read(i)
    except BadImage:
        return None
    digest = hashlib.blake2b(f"{image.shape} {image.dtype}".encode(), digest_size=16)
    digest.update(image.tobytes())
    scale = np.float32(np.iinfo(image.dtype).max) if image.dtype.kind == "u" else np.float32(1)
    unit = image.astype(np.float32) / scale
    if image.shape[:2] != (height, width):
        planes = torch.from_numpy(unit).permute(2, 0, 1)[None]
        resized = nn.functional.interpolate(planes, (height, width), mode="bilinear", antialias=True)
        unit = resized[0].permute(1, 2, 0).numpy()
    return unit.reshape(-1), digest.digest()


def features_of(encoder: Encoder, sources: Sequence[Images], batch_size: int, what: str, told: bool = False) -> Floats:
    """Features (n, d) of all images of all sources; nan where one cannot be read, which is said unless ``told``."""
    parts = []
    for images in sources:
        place = {images.key(i): i for i in range(len(images))}
        features = np.full((len(images), encoder.features), np.nan, np.float32)
        for keys, batch in embed_images(encoder, images, batch_size, what, told=told):
            features[[place[key] for key in keys]] = batch
        parts.append(features)
    return np.concatenate(parts)


def fingerprint(module: nn.Module) -> str:
    """sha256 over the names, types, shapes and bits of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
