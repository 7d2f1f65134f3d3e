"""Encoders from timm for any channels and size, the paper's projector, twins shared and unshared."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from barlow.errors import UserError
from barlow.network import build_encoder, build_projector, build_twins, feature_count

TINY = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16]}


def encoder(channels: int = 1) -> nn.Module:
    return build_encoder("resnetv2_18", {**TINY, "stem_chs": 8}, channels=channels, size=32, pretrained=False)


@pytest.mark.parametrize("channels", [1, 3, 13])
def test_any_number_of_channels(channels: int) -> None:
    assert encoder(channels)(torch.zeros(2, channels, 32, 32)).shape == (2, 16)


def test_fixed_size_architectures_are_built_for_the_size() -> None:
    arguments = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    vit = build_encoder("vit_tiny_patch16_224", arguments, channels=1, size=32, pretrained=False)
    assert feature_count(vit, (1, 32, 32)) == 16


def test_unknown_names_and_arguments_are_one_sentence() -> None:
    with pytest.raises(UserError, match="timm knows no encoder 'resnet81'; near it are resnet"):
        build_encoder("resnet81", {}, channels=3, size=64, pretrained=False)
    with pytest.raises(UserError, match=r"resnet18 with .* cannot take 3 × 64 × 64"):
        build_encoder("resnet18", {"depths": 3}, channels=3, size=64, pretrained=False)


def test_feature_count_leaves_the_training_mode() -> None:
    network = encoder().train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    feature_count(network, (1, 32, 32))
    assert network.training
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_projector_is_the_papers() -> None:
    """Linear-BatchNorm-ReLU twice, then Linear; no biases anywhere but in the normalisation."""
    kinds = [type(layer) for layer in build_projector(16, (32, 24, 8))]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    projector = build_projector(16, (32, 24, 8))
    assert [tuple(p.shape) for n, p in projector.named_parameters() if p.ndim == 2] == [(32, 16), (24, 32), (8, 24)]
    assert all(layer.bias is None for layer in projector if isinstance(layer, nn.Linear))


def test_shared_twins_are_one_pass_over_both_views() -> None:
    network = build_twins([encoder()], (8, 8), [(1, 32, 32)])
    a, b = torch.randn(2, 4, 1, 32, 32)
    both = network.projectors[0](network.encoders[0](torch.cat([a, b])))
    for z, expected in zip(network(a, b), both.chunk(2), strict=True):
        torch.testing.assert_close(z, expected)


def test_unshared_twins_see_their_own_view_only() -> None:
    network = build_twins([encoder(), encoder()], (8, 8), [(1, 32, 32)] * 2).eval()
    a, b = torch.randn(2, 4, 1, 32, 32)
    z_a, z_b = network(a, b)
    torch.testing.assert_close(network(a, torch.zeros_like(b))[0], z_a)
    torch.testing.assert_close(network(torch.zeros_like(a), b)[1], z_b)
    assert not torch.allclose(network(b, a)[0], z_b)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError("no network\nand more"), r"^timm's weights of resnet18 cannot be fetched: no network; connect"),
        (
            RuntimeError("size mismatch"),
            r"^The encoder resnet18 .* 3 × 32 × 32, or weights of timm's: size mism",
        ),
    ],
)
def test_weights_that_cannot_be_had_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def create(*_: Any, **options: Any) -> Any:
        assert options["pretrained"]
        raise error

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(UserError, match=words):
        build_encoder("resnet18", {}, channels=3, size=32, pretrained=True)
