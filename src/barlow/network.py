"""The networks: an encoder from timm, a projector, and the two of them as twins."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from barlow.errors import UserError, first_line

# Arguments with which timm loads files, with pickle too: settings from a stranger must not name one.
FOREIGN = frozenset({"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"})


def build_encoder(name: str, arguments: Mapping[str, Any], *, channels: int, size: int, pretrained: bool) -> nn.Module:
    """A timm model without its classifier: (n, channels, size, size) → (n, features).

    Architectures of fixed input size (vision transformers) are built for ``size``. UserError when timm does not know
    the name or its arguments, or the network cannot take images of this size.
    """
    if name not in timm.list_models() and timm.models.get_arch_name(name) not in timm.list_models():
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise UserError(f"timm knows no encoder {name!r}{'; near it are ' + ', '.join(near) if near else ''}.")
    if foreign := sorted(FOREIGN & arguments.keys()):
        raise UserError(f"encoder_args cannot hold {foreign[0]}: it would load weights from elsewhere; leave it out.")
    arguments = model_arguments(name, arguments, channels, size)
    try:
        encoder = timm.create_model(name, pretrained=pretrained, **arguments)
        feature_count(encoder, (channels, size, size))
    except OSError as error:  # those of the Hub are such
        if not pretrained:
            raise
        raise UserError(f"timm's weights of {name} cannot be fetched: {first_line(error)}; connect this machine once, "
                        "which keeps them, or leave --pretrained out.") from None  # fmt: skip
    except (TypeError, RuntimeError, AssertionError, ValueError, IndexError, KeyError) as error:
        what = f"cannot take {channels} × {size} × {size}" + (", or weights of timm's" if pretrained else "")
        raise UserError(f"The encoder {name} with {arguments} {what}: {first_line(error)}") from None
    return cast(nn.Module, encoder)


def model_arguments(name: str, arguments: Mapping[str, Any], channels: int, size: int) -> dict[str, Any]:
    """The arguments that timm needs to build the encoder again: channels, no classifier, the size where it is fixed."""
    full: dict[str, Any] = {"in_chans": channels, "num_classes": 0, **arguments}
    default = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if default is not None and getattr(default, "fixed_input_size", False):
        full.setdefault("img_size", size)
    return full


def feature_count(encoder: nn.Module, shape: Sequence[int]) -> int:
    """Number of features of an encoder, read from one sample of ``shape`` (channels first); UserError when its output
    is not (n, features)."""
    training = encoder.training
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    with torch.inference_mode():
        out = encoder.eval()(torch.zeros(1, *shape, device=device))
    encoder.train(training)
    if not isinstance(out, Tensor) or out.ndim != 2:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise UserError(f"The encoder returns {got} for one sample; (1, features) is needed.")
    return int(out.shape[1])


def build_projector(features: int, widths: Sequence[int]) -> nn.Sequential:
    """The paper's projector (section 2.2): Linear-BatchNorm-ReLU for all widths but the last, then Linear; no biases.

    (n, features) → (n, widths[-1])
    """
    layers: list[nn.Module] = []
    for i, width in enumerate(widths):
        layers.append(nn.Linear(features, width, bias=False))
        if i < len(widths) - 1:
            layers += [nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        features = width
    return nn.Sequential(*layers)


class Twins(nn.Module):
    """Encoder and projector for every view: one pair (shared) or one pair a view (unshared).

    With one shared network all views go through in one pass, so BatchNorm's statistics are those of all views together;
    the objective standardises each view by itself. An unshared pair sees its own view only.
    """

    def __init__(self, encoders: Sequence[nn.Module], projectors: Sequence[nn.Module]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.projectors = nn.ModuleList(projectors)

    def forward(self, *views: Tensor, twin: int | None = None) -> tuple[Tensor, ...]:
        """V views (n, …) → V embeddings (n, D); ``twin``: one view, through that twin alone."""
        if twin is not None:
            return (self.projectors[twin](self.encoders[twin](views[0])),)
        if len(self.encoders) == 1:
            z = self.projectors[0](self.encoders[0](torch.cat(views) if len(views) > 1 else views[0]))
            return cast(tuple[Tensor, ...], z.chunk(len(views)))
        pairs = zip(self.encoders, self.projectors, strict=True)
        return tuple(projector(encoder(view)) for (encoder, projector), view in zip(pairs, views, strict=True))


class OneTwin(nn.Module):
    """One twin of ``Twins`` (wrapped or not) as a plain network: a view (n, c, h, w) → its embedding (n, D)."""

    def __init__(self, twins: nn.Module, twin: int) -> None:
        super().__init__()
        self.twins, self.twin = twins, twin

    def forward(self, view: Tensor) -> Tensor:
        """The embedding of ``view``."""
        return cast(Tensor, self.twins(view, twin=self.twin)[0])


def build_twins(encoders: Sequence[nn.Module], widths: Sequence[int], shapes: Sequence[Sequence[int]]) -> Twins:
    """Twins around one encoder (shared) or one for each view (unshared), with projectors of the same widths.

    ``shapes``: of one sample as each encoder takes it, channels first.
    """
    counts = [feature_count(encoder, shape) for encoder, shape in zip(encoders, shapes, strict=True)]
    return Twins(encoders, [build_projector(count, widths) for count in counts])
