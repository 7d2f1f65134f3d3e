"""The automatic choices: sensible for what is found, overridden by what is given, each with a reason."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from barlow.config import Config
from barlow.errors import UserError
from barlow.network import build_encoder
from barlow.plan import RULES, Findings, doubt, resolve
from barlow.survey import long_images

SMALL = Findings(images=8000, height=28, width=28, channels=1, in_memory=True, mean=(0.3,), std=(0.3,), measured=1000,
                 device="cpu", devices=1, cores=2, bfloat16=True, threads=2)  # fmt: skip
PHOTOS = dataclasses.replace(SMALL, images=100_000, height=375, width=500, channels=3, in_memory=False,
                             mean=(0.5,) * 3, std=(0.2,) * 3)  # fmt: skip
GPU = dataclasses.replace(PHOTOS, device="cuda", devices=4, cores=16)


def test_everything_is_chosen_with_a_reason() -> None:
    for found in (SMALL, PHOTOS, GPU):
        config, choices = resolve(Config("a"), found)
        assert all(choice.reason for choice in choices)
        chosen = {choice.word for choice in choices}
        assert {"encoder", "batch_size", "projector", "lambda", "lr", "views", "precision", "epochs"} <= chosen
        left = {name for name in RULES if getattr(config, name) is None}
        assert left <= {"lr_bias", "channels_b", "mean_b", "std_b", "threads"}  # of LARS, of pairs, of processors
        assert config.threads == (None if found is GPU else 2)


def test_what_is_given_stays() -> None:
    given = Config("a", encoder="resnet18", lambda_=0.1, batch_size=64, views="natural", minutes=3, lr=0.5)
    config, choices = resolve(given, SMALL)
    for field in ("encoder", "lambda_", "batch_size", "views", "minutes", "lr"):
        assert getattr(config, field) == getattr(given, field)
    assert not {"encoder", "lambda", "batch_size", "views", "lr", "epochs"} & {choice.word for choice in choices}


def test_size_and_network_follow_images_and_machine() -> None:
    small, photos, gpu = (resolve(Config("a"), found)[0] for found in (SMALL, PHOTOS, GPU))
    assert (small.image_size, photos.image_size, gpu.image_size) == (40, 64, 224)
    assert (gpu.encoder, gpu.devices, gpu.workers) == ("resnet50", 4, 8)
    assert (small.views, photos.views, gpu.views) == ("grayscale", "natural", "natural")
    assert (small.workers, photos.workers) == (0, 1)
    begun = resolve(Config("a", pretrained=True), SMALL)[0]  # nobody has weights of the narrow network
    assert (begun.encoder, begun.encoder_args) == ("resnet18", {})
    assert resolve(Config("a", pretrained=True, encoder="resnetv2_18"), SMALL)[0].encoder_args == {}


@pytest.mark.parametrize("side", [28, 64])
def test_the_narrow_network_ends_in_maps_of_three_pixels_and_more(side: int) -> None:
    config, _ = resolve(Config("a"), dataclasses.replace(SMALL, height=side, width=side))
    assert config.encoder
    assert isinstance(config.encoder_args, dict)
    assert config.image_size
    size = config.image_size
    model = build_encoder(config.encoder, config.encoder_args, channels=1, size=size, pretrained=False).eval()
    maps = model.forward_features(torch.zeros(1, 1, size, size))  # type: ignore[operator]
    assert min(maps.shape[2:]) >= 3
    assert model.num_features == 256


@pytest.mark.parametrize("side", range(1, 12))
def test_the_smallest_images_get_a_size_that_may_be_given(side: int) -> None:
    for found in (SMALL, GPU):
        config, _ = resolve(Config("a"), dataclasses.replace(found, height=side, width=1000))
        assert (config.image_size or 0) >= 8


def test_bfloat16_where_it_pays_and_where_maps_are_larger_than_a_pixel() -> None:
    slow = dataclasses.replace(SMALL, bfloat16=False)
    assert resolve(Config("a"), SMALL)[0].precision == "bfloat16"
    assert resolve(Config("a"), slow)[0].precision == "float32"
    assert resolve(Config("a", image_size=32), SMALL)[0].precision == "bfloat16"  # three stages
    assert resolve(Config("a", image_size=16), SMALL)[0].precision == "float32"
    four = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
    assert resolve(Config("a", image_size=32, encoder_args=four), SMALL)[0].precision == "float32"
    assert resolve(Config("a", image_size=32, encoder="resnet18"), SMALL)[0].precision == "float32"
    assert resolve(Config("a", image_size=32), GPU)[0].precision == "bfloat16"


def test_bfloat16_that_is_asked_for_where_maps_are_a_pixel_is_warned_of() -> None:
    asked = Config("a", image_size=32, precision="bfloat16", channels=1)
    assert "with crops of 32 px, maps are one pixel" in doubt(asked, SMALL)
    assert doubt(asked, GPU) == doubt(asked.replace(image_size=48), SMALL) == ""
    assert doubt(asked.replace(precision="float32"), SMALL) == ""


def test_optimiser_follows_batch_and_architecture() -> None:
    small, _ = resolve(Config("a"), SMALL)
    assert (small.optimizer, small.lr, small.weight_decay) == ("muon", 5e-3, 0.05)
    assert resolve(Config("a"), GPU)[0].optimizer == "adamw"
    large, _ = resolve(Config("a", batch_size=2048), GPU)
    assert (large.optimizer, large.lr, large.weight_decay, large.warmup) == ("lars", pytest.approx(1.6), 1.5e-6, 0.01)
    assert large.lr_bias == pytest.approx(0.0048 / 32 * 8)  # the paper's, for the true gradient
    vit, _ = resolve(Config("a", batch_size=2048, encoder="vit_small_patch16_224"), GPU)
    assert (vit.optimizer, vit.lr) == ("adamw", 5e-4)


@pytest.mark.parametrize(("images", "batch"), [(2, 2), (10, 2), (60, 8), (300, 64), (1200, 256), (10**6, 256)])
def test_batch_fits_the_images(images: int, batch: int) -> None:
    found = dataclasses.replace(SMALL, images=images)
    if images == 2:
        with pytest.raises(UserError, match="of which 2 are held out"):
            resolve(Config("a"), found)
    else:
        assert resolve(Config("a"), found)[0].batch_size == batch


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 7900}, "batch_size = 7900 is larger than the 7,744 images"),
        ({"channels": 3, "mean": (0.1,)}, "mean has 1 values for 3 channels"),
        ({"twins": "unshared", "views": ({}, {}, {})}, "two views, not 3"),
    ],
)
def test_settings_that_cannot_train(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve(Config("a", **changes), SMALL)  # type: ignore[arg-type]


def test_channels_first_is_warned_of() -> None:
    """Kills: (5, 64, 64) taken for five rows of 64 channels without a word."""
    for height, width, channels, warned in (
        (5, 64, 64, True), (13, 48, 64, True), (3, 224, 224, True), (64, 64, 5, False), (64, 64, 64, False),
        (20, 30, 200, False), (28, 28, 1, False), (4, 600, 3, False),
    ):  # fmt: skip
        found = dataclasses.replace(SMALL, height=height, width=width, channels=channels)
        sentence = doubt(Config("a", precision="float32"), found)
        assert bool(sentence) == warned, (height, width, channels)
        assert not warned or f"have {height} rows, {width} columns and {channels} channels" in sentence


def test_long_images_are_warned_of() -> None:
    """Kills: strips of which the encoder sees a seventh, without a word."""
    for height, width, share in ((90, 700, "13%"), (700, 90, "13%"), (100, 201, "50%"), (100, 200, ""), (0, 0, "")):
        sentence = long_images(dataclasses.replace(SMALL, height=height, width=width))
        assert f"middle square, {share} of an image" in sentence if share else not sentence
