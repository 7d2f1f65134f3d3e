"""Rows of a table: a network and random views for plain vectors, where there are no pixels to crop.

The views are those of SCARF (Bahri et al., ICLR 2022, arXiv:2106.15147): some values of a row are replaced by what
other rows have in the same column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from barlow.errors import UserError


def moments(table: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(mean, standard deviation) of each column (columns,), 1 where it is constant but for rounding; numbers near the
    ends of the range too. UserError where their mean is past it."""
    with np.errstate(over="ignore"):
        mean = table.mean(axis=0)
        away = np.abs(table - mean)
    span = away.max(axis=0)
    if not (np.isfinite(mean) & np.isfinite(span)).all():
        column = int(np.flatnonzero(~(np.isfinite(mean) & np.isfinite(span)))[0])
        raise UserError(f"The numbers in column {column} are too large to be averaged: scale them down.")
    varies = span > 10 * np.finfo(np.float64).eps * np.abs(mean)
    span = np.where(varies, span, 1.0)
    scale = span * np.sqrt(np.square(away / span).mean(axis=0))
    return mean, np.where(varies, scale, 1.0)


@final
@dataclass(frozen=True, eq=False)
class Corrupted:
    """A view: every value is replaced, with probability ``share``, by that of a random row of ``table`` in its column.

    ``table``: (n, columns) float32, the rows that are trained on.
    """

    table: Tensor
    share: float

    def __call__(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """(m, columns) → the same shape, drawn from ``generator``; on the device of ``rows``."""
        others = torch.randint(len(self.table), rows.shape, generator=generator)
        replaced = torch.rand(rows.shape, generator=generator) < self.share
        drawn = self.table.gather(0, others).to(rows.device)
        return torch.where(replaced.to(rows.device), drawn, rows)


@final
class TableEncoder(nn.Module):
    """Linear-BatchNorm-ReLU for all ``widths``: standardised rows (n, columns) → (n, widths[-1])."""

    def __init__(self, columns: int, widths: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Linear(columns, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
            columns = width
        self.layers = nn.Sequential(*layers)

    def forward(self, rows: Tensor) -> Tensor:
        """(n, columns) → (n, widths[-1])."""
        return cast(Tensor, self.layers(rows))
