"""The encoder with its preprocessing inside, in operations that every runtime has: uint8 images in, features out."""

from __future__ import annotations

from typing import cast, final

import torch
from torch import Tensor, nn

from barlow.encoder import Encoder


@final
class FromBytes(nn.Module):
    """uint8 images (n, h, w, c), n, h and w free → features (n, features): ``Encoder.preprocess`` and ``Encoder``.

    The resize (antialiased bicubic, a = -0.5, of the largest centred square) is two matrix products whose weights are
    computed from the shape of the images, so that nothing depends on how a runtime resizes. The values are those of
    ``Encoder.preprocess`` but for one or two of 255, where the native resample rounds its weights.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder, self.size = encoder, encoder.size

    def forward(self, images: Tensor) -> Tensor:
        """Features (n, features), float32, of uint8 images (n, h, w, c)."""
        return cast(Tensor, self.encoder(self.pixels(images)))

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 (n, h, w, c) → what the network takes, float32 (n, c, size, size)."""
        x = images.permute(0, 3, 1, 2).float()
        rows, columns = torch.ones_like(x[0, 0, :, 0]), torch.ones_like(x[0, 0, 0, :])
        side = torch.minimum(rows.sum(), columns.sum())  # the shape as numbers of the graph: it stays free
        x = _to_bytes(x @ self._weights(columns, side).mT)  # to bytes between, as the native resample
        x = _to_bytes(self._weights(rows, side) @ x)
        return (x / 255 - cast(Tensor, self.encoder.mean)) / cast(Tensor, self.encoder.std)

    def _weights(self, ones: Tensor, side: Tensor) -> Tensor:
        """(size, extent): what each pixel of the result takes from each of the ``extent`` ones of a row or column."""
        first = ((ones.sum() - side) / 2).floor()
        pixel = ones.cumsum(0) - 1 - first  # counted from where the square begins
        scale = (side / self.size).clamp(min=1.0)  # made wider when shrinking: the antialiasing
        centre = (torch.arange(self.size, dtype=torch.float32)[:, None] + 0.5) * (side / self.size)
        begin = torch.maximum((centre - 2 * scale + 0.5).floor(), torch.zeros_like(centre))
        end = torch.minimum((centre + 2 * scale + 0.5).floor(), side)
        inside = ((pixel >= begin) & (pixel < end)).float()
        weights = _cubic((pixel + 0.5 - centre) / scale) * inside
        return weights / weights.sum(dim=1, keepdim=True)


def _to_bytes(x: Tensor) -> Tensor:
    """Rounded half up, as the native resample does: resizing to twice the size makes many halves."""
    return (x + 0.5).floor().clamp(0, 255)


def _cubic(x: Tensor, a: float = -0.5) -> Tensor:
    """Keys' cubic convolution kernel (IEEE Trans. ASSP 29, 1981)."""
    x = x.abs()
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
