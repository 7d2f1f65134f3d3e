"""A network and views of one's own, from Python: what of them a run records, and what it asks for again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

from torch import Tensor, nn

from barlow.batches import ViewLike
from barlow.config import OWN, Config
from barlow.errors import UserError, first_line
from barlow.network import feature_count
from barlow.views import View


@final
@dataclass(frozen=True, eq=False)
class Own:
    """``views``: functions or rows of numbers, or None. ``encoders``: one module, or one for each twin, or none."""

    views: tuple[ViewLike, ...] | None = None
    encoders: tuple[nn.Module, ...] = ()

    def recorded(self, config: Config) -> Config:
        """``config`` with these as its settings: rows of numbers as they are, code by its name. Raises UserError."""
        if self.views is not None:
            if config.views is not None:
                raise UserError("views are given twice, in the settings and from Python: leave one of the two out.")
            if len(self.views) < 2:
                raise UserError(f"{len(self.views)} view is given; at least two are needed.")
            config = config.replace(views=_recorded_views(self.views))
        if self.encoders:
            for word in ("encoder", "encoder_args", "pretrained"):
                if getattr(config, word) is not None:
                    raise UserError(f"encoder is a module of your own: leave {word} out of the settings.")
            names = dict.fromkeys(_name(type(encoder)) for encoder in self.encoders)
            config = config.replace(encoder=OWN + "/".join(names), encoder_args={}, pretrained=False)
            if config.twins is None and len(self.encoders) == 2:
                config = config.replace(twins="unshared")
        return config

    def modules(self, config: Config, shapes: Sequence[Sequence[int]]) -> list[nn.Module]:
        """Copies of the modules, one for each of ``shapes`` (of one sample, channels first). Raises UserError."""
        if not self.encoders:
            raise UserError(
                f"The encoder of this run is a module of your own ({str(config.encoder).removeprefix(OWN)}), which its "
                "settings cannot rebuild: go on from Python, with pretrain(config, encoder=…)."
            )
        if len(self.encoders) != len(shapes):
            raise UserError(
                f"{config.twins} twins need {len(shapes)} encoder{'s' * (len(shapes) > 1)}, and {len(self.encoders)} "
                "of your own is given: encoder=net for shared twins, encoder=(net, net_b) for unshared ones and pairs."
            )
        if len({id(encoder) for encoder in self.encoders}) < len(self.encoders):
            raise UserError("unshared twins need two networks, and one is given twice: build it twice.")
        for encoder, shape in zip(self.encoders, shapes, strict=True):
            try:
                feature_count(encoder, shape)
            except (TypeError, RuntimeError, AssertionError, ValueError, IndexError, KeyError) as error:
                if isinstance(error, UserError):
                    raise
                what = f"Your encoder {type(encoder).__name__} cannot take (1, {' × '.join(map(str, shape))})"
                raise UserError(f"{what}: {first_line(error)}") from None
            _storable(encoder)
        return [copy.deepcopy(encoder) for encoder in self.encoders]


def _storable(encoder: nn.Module) -> None:
    """UserError for what a checkpoint does not take, before the hours that it would cost."""
    for name, value in encoder.state_dict().items():
        if not isinstance(value, Tensor):
            raise UserError(f"Your encoder's {name} is a {type(value).__name__}; checkpoints hold tensors only.")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise UserError(f"Your encoder's {name} is not finite, and checkpoints are: in a mask take -1e9 for -inf, "
                            "or register the buffer with persistent=False.")  # fmt: skip


def own(views: Any, encoder: Any) -> Own:
    """What ``pretrain`` was given, checked. Raises UserError."""
    given = () if encoder is None else tuple(encoder) if isinstance(encoder, list | tuple) else (encoder,)
    encoders = tuple(getattr(one, "_orig_mod", one) for one in given)  # of torch.compile: weights under plain names
    for one in encoders:
        if not isinstance(one, nn.Module):
            raise UserError(
                f"encoder is a {type(one).__name__}, not a torch module: name one of timm's in the settings."
            )
    if len(encoders) > 2:
        raise UserError(f"{len(encoders)} encoders are given; there are two twins.")
    if callable(views) or isinstance(views, View):
        raise UserError("views is one view; at least two are needed: views=(f, g).")
    if isinstance(views, str) or (views is not None and not isinstance(views, Iterable)):
        raise UserError(f"views is a {type(views).__name__}, not two or more of them: views=(f, g).")
    rows = None if views is None else tuple(views)
    for row in rows or ():
        if not (isinstance(row, View) or callable(row)):
            raise UserError(f"a view is a {type(row).__name__}, neither a View nor a function (images, generator).")
    return Own(rows, encoders)


def _recorded_views(views: Sequence[ViewLike]) -> Any:
    rows = [asdict(view) for view in views if isinstance(view, View)]
    if len(rows) == len(views):
        return tuple({word: list(v) if isinstance(v, tuple) else v for word, v in row.items()} for row in rows)
    return OWN + "/".join(_name(view if hasattr(view, "__qualname__") else type(view)) for view in views)


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
