"""Self-supervised learning with Barlow Twins that people can trust.

    from barlow import Config, pretrain, load_encoder, embed, BarlowTwinsLoss, barlow_twins_loss

Nothing heavy is imported until it is used: ``barlow --help`` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from barlow.config import Config
    from barlow.embedding import embed
    from barlow.encoder import load_encoder
    from barlow.objective import BarlowTwinsLoss, barlow_twins_loss
    from barlow.run import pretrain
    from barlow.samples import Pairs, Samples
    from barlow.views import View

__version__ = "0.1.0"
__all__ = [
    "BarlowTwinsLoss",
    "Config",
    "Pairs",
    "Samples",
    "View",
    "barlow_twins_loss",
    "embed",
    "load_encoder",
    "pretrain",
]

_ROOMS = {
    "BarlowTwinsLoss": "objective",
    "Config": "config",
    "Pairs": "samples",
    "Samples": "samples",
    "View": "views",
    "barlow_twins_loss": "objective",
    "embed": "embedding",
    "load_encoder": "encoder",
    "pretrain": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'barlow' has no attribute {name!r}")
    return getattr(import_module(f"barlow.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
