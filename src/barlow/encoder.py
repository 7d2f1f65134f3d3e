"""The trained encoder as files that other tools open: save, load, preprocess."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from barlow.arrays import as_images
from barlow.bounds import bounded
from barlow.config import OWN
from barlow.console import in_shell, say
from barlow.convert import FULL, WHOLE, convert
from barlow.decode import tidy
from barlow.errors import UserError
from barlow.files import atomic_write
from barlow.guard import BadImage
from barlow.kinds import as_path
from barlow.network import build_encoder, feature_count
from barlow.samples import as_samples
from barlow.views import View, crop, draw

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = 1  # of this folder: a folder of another one is refused, not misread
OURS = {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}  # the preprocessing; timm knows others
LARGEST = 1 << 20  # bytes of config.json
PLACES = 4  # on the way through an encoder that are looked at, before its output


@final
class Encoder(nn.Module):
    """An encoder with its preprocessing: images → ``preprocess`` → (n, c, h, w) → ``forward`` → (n, features).

    ``model`` is the plain network, timm's or your own. ``features``, ``channels`` and ``size`` say what goes in and
    comes out; ``value_dtype`` says which images it was trained on: uint8, uint16 (1 being 65,535) or float32, and
    ``value_range`` what became 0 and 1 of them: of uint8 the full range, (0, 1).
    ``shape``: of one sample, where it was trained on ``Samples`` and not on images; they have no preprocessing.
    """

    def __init__(
        self, model: nn.Module, *, size: int, mean: Sequence[float], std: Sequence[float],
        value_range: tuple[float, float] | None = None, value_dtype: str | None = None, shape: Sequence[int] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.shape = model, tuple(shape)
        self.value_range, self.value_dtype = value_range or WHOLE, value_dtype if value_range or shape else "uint8"
        self.size, self.channels = size, len(mean)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.features = feature_count(model, self.shape or (self.channels, size, size))

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, features) of preprocessed images (n, channels, size, size) or samples (n, …), float32."""
        return cast(Tensor, self.model(x))

    def depths(self, x: Tensor) -> list[Tensor]:
        """What ``forward`` gives, and before it the mean over the image of what lies on the way: at most ``PLACES``
        (n, channels there) each, from the first layers to the last. Of a network that timm does not know, only the
        features."""
        look = getattr(self.model, "forward_intermediates", None)
        if look is None:
            return [self(x)]
        last, maps = look(x)
        between = maps[:-1]  # the last one is what the features are made of
        places = np.unique(np.linspace(0, max(len(between) - 1, 0), min(PLACES, len(between))).round().astype(int))
        return [*(between[k].mean((2, 3)) for k in places.tolist()), cast(Any, self.model).forward_head(last)]

    def preprocess(self, images: Sequence[NDArray[Any]]) -> Tensor:
        """Images (h, w, c) of any size, with the numbers that their files hold, to float32 (n, c, size, size).

        Scaled to 0..1, the largest centred square cut out, resized (bicubic, antialiased) and normalised with the
        channels' mean and standard deviation: what timm's transform does with a square picture; it cuts after resizing.
        Each image by its own type: uint8 is divided by 255 and uint16 by 65,535; of an encoder trained on one of
        uint16 and real numbers these are brought from its range to 0..1 and clipped, what is not finite being the least
        of its channel; else real numbers must lie in 0..1 (UserError). ValueError for another number of channels.
        Gray images may be (h, w), and one alone. Samples are stacked as they are; ValueError for another shape, and for
        NaN.
        """
        if self.shape:
            return self.normalised(list(self._samples(images)))
        ready = []
        for k, image in enumerate(as_images(images, self.channels)):
            try:
                ready.append(self._ranged(image))
            except BadImage as bad:
                raise UserError(f"image {k} {bad.reason}") from None
        if len({image.dtype == np.uint8 for image in ready}) > 1:
            return torch.cat([self.normalised([one]) for one in ready]).contiguous(memory_format=torch.channels_last)
        return self.normalised(ready)

    def _samples(self, given: Any) -> NDArray[np.float32]:
        listed = isinstance(given, Sequence) or np.ndim(given) > 0
        shapes = [tuple(getattr(one, "shape", ())) for one in given] if listed else []
        if not shapes or () in shapes:
            raise UserError(f"give a list of samples {self.shape}, each a NumPy array, and at least one")
        if odd := [shape for shape in shapes if shape != self.shape]:
            raise UserError(f"the encoder takes samples of shape {self.shape}, not {odd[0]}")
        return as_samples(given)

    def _ranged(self, image: NDArray[Any]) -> NDArray[Any]:
        if self.value_dtype == "uint8":
            return image
        plain = tidy(image)  # as the images of a file are
        self.check_dtype(plain.dtype.name)
        return convert(plain, self.channels, plain.dtype.name, self.value_range)

    def check_dtype(self, dtype: str) -> None:
        """UserError for images of this type of numbers where the encoder's range is one of another: every pixel would
        be brought to one end of it, and all images get the same features. Of 16 bits for one of 8, a note."""
        if self.value_dtype == "uint8" and dtype == "uint16":
            say("note: the encoder was trained on 8-bit images; of these 16 bits the full range is taken")
        if self.value_dtype in ("uint8", None, dtype):
            return
        low, high = (f"{value * FULL[self.value_dtype or dtype]:,.6g}" for value in self.value_range)
        raise UserError(f"the encoder was trained on {self.value_dtype} images, whose values from {low} to {high} "
                        f"became the full range, and these are {dtype}: save them as {self.value_dtype}")  # fmt: skip

    def normalised(self, images: Sequence[NDArray[Any]]) -> Tensor:
        """``preprocess`` of images that ``open_images`` has read with the encoder's channels and range."""
        if self.shape:
            return torch.from_numpy(np.stack(images).astype(np.float32))
        sizes = np.array([image.shape[:2] for image in images], np.int64)
        none = np.zeros(len(images), np.int64)
        side = sizes.min(axis=1)
        box = np.stack([(sizes[:, 1] - side) // 2, (sizes[:, 0] - side) // 2, side, side], axis=1)
        central = replace(draw(View(), 0, none, none, 0, sizes, self.channels), box=box)
        pixels = torch.from_numpy(crop(images, central, self.size))
        mean, std = cast(Tensor, self.mean), cast(Tensor, self.std)
        unit = pixels.to(mean.device).permute(0, 3, 1, 2).float()
        if pixels.dtype == torch.uint8:
            unit = unit / 255
        return ((unit - mean) / std).contiguous(memory_format=torch.channels_last)


def save_encoder(
    folder: Path, model: nn.Module, *, name: str, arguments: Mapping[str, Any], size: int,
    mean: Sequence[float], std: Sequence[float], origin: Mapping[str, Any], shape: Sequence[int] = (),
) -> None:  # fmt: skip
    """Writes a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` opens without this package; of a
    module of one's own (``name`` begins with ``OWN``), its weights and what goes in. ``shape``: of samples.

    ``arguments`` are those of ``timm.create_model`` (with in_chans and num_classes=0); ``origin`` is kept in
    the config as it is (what trained this, when, on what). Each file is replaced atomically.
    """
    folder.mkdir(parents=True, exist_ok=True)
    features = feature_count(model, shape or (len(mean), size, size))
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": features,
        "global_pool": pool if isinstance(pool := getattr(model, "global_pool", None), str) else "avg",
        # without num_classes: it stands above, and transformers gives it a second time
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
        "pretrained_cfg": {
            "tag": "barlow",
            "custom_load": False,
            "input_size": list(shape) or [len(mean), size, size],
            "fixed_input_size": "img_size" in arguments,
            **OURS,
            "mean": list(mean),
            "std": list(std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": None,
            "classifier": None,
        },
        "barlow": {"format": FORMAT, **origin} | ({"shape": list(shape)} if shape else {}),
    }
    whole = torch.contiguous_format  # clones: a module that is used under two names shares its tensors
    tensors = {key: value.detach().cpu().clone(memory_format=whole) for key, value in model.state_dict().items()}
    atomic_write(folder / WEIGHTS, to_safetensors(tensors, metadata={"format": "pt"}))
    atomic_write(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def load_encoder(path: str | Path, model: nn.Module | None = None) -> Encoder:
    """The encoder in a run folder or an encoder folder, in evaluation mode, with its preprocessing.

    Nothing in the folder is executed: weights are safetensors, the rest is JSON, the architecture is timm's by name.
    ``model``: where a module of your own was trained, one like it; it takes the trained weights.
    UserError when the folder is not such an encoder, is damaged, or does not fit its weights.
    """
    folder = encoder_folder(path)
    config = read_config(folder)
    model = getattr(model, "_orig_mod", model)  # of torch.compile: as in training
    if model is None:
        with bounded(folder / WEIGHTS):
            model = rebuild(config, folder)
    elif not config["architecture"].startswith(OWN):
        raise UserError(f"{folder} holds timm's {config['architecture']}, which is rebuilt by name: give no model.")
    try:
        tensors = load_file(folder / WEIGHTS)
        model.load_state_dict(tensors, strict=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"The encoder's weights {folder / WEIGHTS} cannot be read: {error}.") from None
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        what = "your module" if config["architecture"].startswith(OWN) else "their config.json"
        raise UserError(f"The weights in {folder} do not fit {what}: {reason}") from None
    if not all(t.isfinite().all() for t in tensors.values() if t.is_floating_point()):
        raise UserError(f"The encoder's weights {folder / WEIGHTS} hold values that are not finite.")
    return wrap(model, config)


def untrained(path: str | Path, seed: int) -> Encoder:
    """The same architecture as ``load_encoder(path)`` with random weights by ``seed``, also where timm's began it."""
    folder = encoder_folder(path)
    config = read_config(folder)
    with bounded(folder / WEIGHTS):
        torch.default_generator.manual_seed(seed)  # that of the CPU, which is put back; there the weights are drawn
        return wrap(rebuild(config, folder), config)


def encoder_folder(path: str | Path) -> Path:
    """The folder with config.json: ``path`` itself, or ``path``/encoder of a run folder (UserError when neither)."""
    given = as_path(path, "a run")
    for folder in (given, given / "encoder"):
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            return folder
    if (given / "config.toml").is_file():
        raise UserError(f"The run {path} is not finished: go on with barlow pretrain --resume {in_shell(path)}")
    raise UserError(f"{path} is neither a run folder with an encoder nor an encoder folder (config.json, {WEIGHTS}).")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of an encoder folder, its fields checked (UserError)."""
    try:
        if (folder / CONFIG).stat().st_size > LARGEST:
            raise ValueError("a config has no megabytes")
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        cfg = config["pretrained_cfg"]
        shape = config.get("barlow", {}).get("shape")
        channels, size, width = cfg["input_size"] if shape is None else (0, 1, 1)
        sound = (
            isinstance(config["architecture"], str)
            and isinstance(config["model_args"], dict)
            and (shape is None or _is_shape(shape, config["architecture"]))
            and type(size) is type(width) is type(channels) is int
            and size == width
            and 0 < size <= 16384
            and 0 <= channels <= 65536
            and (channels > 0 or shape is not None)
            and len(cfg["mean"]) == len(cfg["std"]) == channels
            and all(isinstance(v, (int, float)) and math.isfinite(v) for v in (*cfg["mean"], *cfg["std"]))
            and all(v > 0 for v in cfg["std"])
            and _is_range(config.get("barlow", {}).get("value_range"))
            and config.get("barlow", {}).get("value_dtype") in (None, *FULL)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        sound = False
    if not sound:
        raise UserError(f"{folder / CONFIG} is damaged, or is not an encoder that this program wrote.")
    if (theirs := config.get("barlow", {}).get("format", FORMAT)) != FORMAT:
        raise UserError(f"{folder} is of another version of barlow (format {theirs!r}, this one reads {FORMAT}).")
    if other := [f"{key} {cfg[key]!r}" for key, value in OURS.items() if cfg.get(key, value) != value]:
        raise UserError(f"{folder / CONFIG} asks for a preprocessing that barlow does not have ({', '.join(other)}).")
    return cast(dict[str, Any], config)


def _is_shape(shape: Any, architecture: str) -> bool:
    whole = isinstance(shape, list) and all(type(n) is int and 0 < n < 2**31 for n in shape)
    return whole and 0 < len(shape) < 8 and architecture.startswith(OWN)


def _is_range(span: Any) -> bool:
    return span is None or (len(span) == 2 and math.isfinite(span[0]) and math.isfinite(span[1]) and span[0] < span[1])


def rebuild(config: Mapping[str, Any], folder: Path) -> nn.Module:
    """The network that config.json describes, with fresh weights. Only names that timm knows, never a hub address."""
    name, cfg = config["architecture"], config["pretrained_cfg"]
    if name.startswith(OWN):
        raise UserError(
            f"{folder} holds the weights of a module of your own ({name.removeprefix(OWN)}), not the module: give one "
            "like it, load_encoder(path, model)."
        )
    if ":" in name or "/" in name:
        raise UserError(f"{folder / CONFIG} asks for the architecture {name!r}, which is not the name of a timm model.")
    arguments = {k: v for k, v in config["model_args"].items() if not k.startswith("pretrained")}
    channels, size, _ = cfg["input_size"]
    return build_encoder(name, arguments, channels=channels, size=size, pretrained=False)


def wrap(model: nn.Module, config: Mapping[str, Any]) -> Encoder:
    """A trained ``model`` with the preprocessing of its config.json, in evaluation mode."""
    cfg, about = config["pretrained_cfg"], config.get("barlow", {})
    span, shape = about.get("value_range"), about.get("shape", ())
    return Encoder(model, size=0 if shape else cfg["input_size"][1], mean=cfg["mean"], std=cfg["std"], shape=shape,
                   value_range=(float(span[0]), float(span[1])) if span else None,
                   value_dtype=about.get("value_dtype")).eval()  # fmt: skip
