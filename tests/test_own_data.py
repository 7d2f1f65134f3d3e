"""Data, network and views of one's own, from Python: trained, resumed to the bit, loaded again, or refused clearly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import blobs
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

import barlow.run
from barlow import Config, Pairs, Samples, View, embed, load_encoder, pretrain
from barlow.config import read_toml
from barlow.errors import Stopped, UserError
from barlow.images import open_images
from barlow.runlog import read_metrics

Make = Callable[..., Config]


class Net(nn.Module):
    """Any module: samples (n, c, length) → (n, 8)."""

    def __init__(self, channels: int = 2, width: int = 8) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(channels, width, 5), nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x))).mean(2)


class Small(nn.Module):
    """Any module: images (n, c, h, w) → (n, 6)."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x)).mean((2, 3))


class Pictures(Dataset[Any]):
    """Items as data sets have them: (image, label)."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i], 7


def noisy(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + 0.3 * torch.randn(x.shape, generator=generator)


def scaled(x: Tensor, generator: torch.Generator) -> Tensor:
    return x * (1 + 0.2 * torch.randn(x.shape[:1] + (1,) * (x.ndim - 1), generator=generator))


def dimmed(x: Tensor, generator: torch.Generator) -> Tensor:
    return (x * (0.5 + 0.5 * torch.rand((len(x), 1, 1, 1), generator=generator))).clamp(0, 1)


VIEWS = (noisy, scaled)


def waves(count: int, channels: int = 2, length: int = 40) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(0)
    t = np.linspace(0, 6, length)[None, None]
    return np.sin(rng.uniform(1, 4, (count, 1, 1)) * t + rng.uniform(0, 6, (count, channels, 1))) * 30 + 5


@pytest.fixture
def bare(tmp_path: Path) -> Make:
    """Settings with nothing of images in them."""
    base = {"out": str(tmp_path / "run"), "projector": (16, 16), "batch_size": 32, "steps": 6, "held_out": 16}
    return lambda **changes: Config(**(base | {"devices": 1, "seed": 1} | changes))


def trained(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]


def weights(run: Path, model: nn.Module) -> dict[str, Tensor]:
    return dict(load_encoder(run, model).model.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("give", [
    lambda x: x, lambda x: torch.from_numpy(x), list, lambda x: [torch.from_numpy(one) for one in x],
    lambda x: Pictures(torch.from_numpy(x)),
], ids=["array", "tensor", "list", "tensors", "dataset"])  # fmt: skip
def test_samples_reach_views_and_network_as_they_are(bare: Make, give: Callable[[Any], Any]) -> None:
    """Neither cropped nor scaled, whatever they come as."""
    data, seen = waves(60), []

    def watched(x: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(x.clone())
        return noisy(x, generator)

    run = pretrain(bare(steps=1), images=Samples(give(data)), views=(watched, scaled), encoder=Net(), quiet=True)
    rows = torch.from_numpy(data.astype(np.float32))
    first = seen[0]
    assert first.shape[1:] == (2, 40)
    assert all((rows == one).all((1, 2)).any() for one in first)
    keys, features = embed(run, data, model=Net())
    assert keys == [str(k) for k in range(60)]
    model = load_encoder(run, Net()).eval()
    assert np.allclose(features, model(rows).detach().numpy(), atol=1e-5)
    assert (run / "report.html").is_file()


def test_own_samples_resume_to_the_bit(bare: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: views drawn from a carried state; a module that a first start has changed; settings that forget code."""
    net, data = Net(), Samples(waves(60))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    whole = pretrain(bare(out=str(tmp_path / "whole")), images=data, views=VIEWS, encoder=net, quiet=True)
    assert same(before, dict(net.state_dict()))
    with monkeypatch.context() as patch:
        patch.setattr(barlow.run.Session, "out_of_time", lambda session: session.step >= 3)
        with pytest.raises(Stopped):
            pretrain(bare(), images=data, views=VIEWS, encoder=net, quiet=True)
    run = tmp_path / "run"
    for given, sentence in (
        ({}, r"images of this run were given from Python: .*images=…"),
        ({"images": data}, r"views of this run are functions .*noisy/test_own_data.scaled.*views=…"),
        (
            {"images": data, "views": VIEWS},
            r"encoder of this run is a module .*\(test_own_data.Net\).*encoder=…",
        ),
        ({"images": data, "encoder": net, "views": VIEWS[::-1]}, "other settings"),
        ({"images": data, "encoder": Small(2), "views": VIEWS}, "other settings"),
        ({"images": data, "encoder": Net(width=9), "views": VIEWS}, "The network is not that of"),
        ({"images": Samples(waves(60) + 1), "encoder": net, "views": VIEWS}, "samples have changed"),
    ):
        with pytest.raises(UserError, match=sentence):
            pretrain(Config(out=str(run)), resume=True, quiet=True, **given)
    run = pretrain(Config(out=str(run)), images=data, views=VIEWS, encoder=net, resume=True, quiet=True)
    assert trained(run) == trained(whole)
    assert same(weights(run, Net()), weights(whole, Net()))


def test_a_module_of_ones_own_is_asked_for_again(bare: Make, tiny: Make) -> None:
    run = pretrain(bare(steps=1), images=Samples(waves(60)), views=VIEWS, encoder=Net(), quiet=True)
    with pytest.raises(UserError, match=r"a module of your own \(test_own_data.Net\), not the module.*load_encoder"):
        load_encoder(run)
    with pytest.raises(UserError, match="do not fit your module"):
        load_encoder(run, Net(width=9))
    with pytest.raises(UserError, match=r"shape \(2, 40\), not \(2, 39\)"):
        embed(run, waves(60)[:, :, 1:], model=Net())
    card = (run / "encoder" / "README.md").read_text()
    assert "load_encoder(FOLDER, model)" in card
    assert "timm.create_model" not in card
    other = pretrain(tiny(steps=1, out=str(run) + "-other"), quiet=True)
    with pytest.raises(UserError, match="give no model"):
        load_encoder(other, Net())
    with pytest.raises(UserError, match="batch_size = 0 is not a whole number"):
        embed(other, blobs(4), batch_size=0)


@pytest.mark.parametrize(("changes", "given", "sentence"), [
    ({}, {"images": waves(60)[:, 0]}, r"shape \(60, 40\).*Samples\("),
    ({}, {"images": Samples(waves(60)), "encoder": Net()}, "no views can be chosen"),
    ({}, {"images": Samples(waves(60)), "views": VIEWS}, "no encoder can be chosen"),
    ({"image_size": 32}, {"images": Samples(waves(60)), "views": VIEWS, "encoder": Net()}, "image_size is for images"),
    ({}, {"images": Samples([np.zeros(4), np.zeros(5)])}, r"sample 1 has the shape \(5,\), the first \(4,\)"),
    ({}, {"images": Samples(np.array([[1.0, np.nan]] * 9))}, "sample 0 holds NaN"),
    ({}, {"images": Samples(waves(60)), "views": VIEWS, "encoder": Net(3)}, r"encoder Net cannot take \(1, 2 × 40"),
    ({}, {"images": Samples(waves(60)), "views": (View(), View()), "encoder": Net()}, "no views can be chosen"),
    ({}, {"images": blobs(60), "views": (dimmed,)}, "1 view is given"),
    ({}, {"images": blobs(60), "views": (dimmed, 3)}, "a view is a int"),
    ({"views": "small"}, {"images": blobs(60), "views": (dimmed, dimmed)}, "views are given twice"),
    ({"encoder": "resnet18"}, {"images": blobs(60), "encoder": Small()}, "leave encoder out"),
    ({}, {"images": blobs(60), "encoder": "resnet18"}, "encoder is a str, not a torch module"),
    ({"twins": "unshared"}, {"images": blobs(60), "encoder": Small()}, "need 2 encoders, and 1 of your own is given"),
    ({"twins": "shared"}, {"images": blobs(60), "encoder": (Small(), Small())}, "need 1 encoder, and 2 of your own"),
    ({}, {"images": Pairs(blobs(60), blobs(50))}, "as many of both: 60 and 50"),
    ({}, {"images": Pairs(blobs(60), ["a.png"])}, "one is a list of paths"),
    ({}, {"images": Pictures([1, 2, 3])}, "brings no images: item 0 is no image"),
    ({}, {"images": (k for k in range(3))}, "a generator has no length"),
    ({}, {"images": {"train": blobs(60), "test": blobs(9)}}, r"a dict holds images by name \(train, test\)"),
    ({}, {"images": blobs(60), "allow": "lr"}, r"several names: allow=\('lr',\)"),
])  # fmt: skip
def test_what_cannot_work_is_said_in_a_sentence(bare: Make, changes: Any, given: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        pretrain(bare(**changes), quiet=True, **given)


@pytest.mark.parametrize("given", ["photos", None, {"images": "photos"}])
def test_settings_that_are_none(given: Any) -> None:
    with pytest.raises(UserError, match=rf"takes a Config, not a {type(given).__name__}: pretrain\(Config"):
        pretrain(given)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_encoder_is_kept_under_plain_names(bare: Make) -> None:
    """Kills: weights named ``_orig_mod.…``, which then do not fit the module that they are of."""
    compiled = torch.compile(Net(), backend="eager")
    run = pretrain(bare(steps=1), images=Samples(waves(60)), views=VIEWS, encoder=compiled, quiet=True)
    plain = load_encoder(run, Net())
    assert read_toml(run / "config.toml").encoder == "python:test_own_data.Net"
    again = load_encoder(run, torch.compile(Net(), backend="eager"))
    assert same(dict(plain.model.state_dict()), dict(again.model.state_dict()))


def test_preprocess_of_samples_says_what_does_not_fit(bare: Make) -> None:
    """Kills: errors of NumPy and torch, and features of NaN."""
    data = waves(60)
    run = pretrain(bare(steps=1), images=Samples(data), views=VIEWS, encoder=Net(), quiet=True)
    encoder, rows = load_encoder(run, Net()), torch.from_numpy(data.astype(np.float32))
    for given in (data, list(data), rows, list(rows)):
        assert torch.equal(encoder.preprocess(given), rows)
    with pytest.raises(UserError, match=r"takes samples of shape \(2, 40\), not \(2, 39\)"):
        encoder.preprocess(data[:, :, 1:])
    for odd in ([], (), data[:0], data[:2].tolist(), data[0].tolist(), np.float32(3), 3, None, "a"):
        with pytest.raises(UserError, match=r"give a list of samples \(2, 40\), each a NumPy array, and at least one"):
            encoder.preprocess(odd)
    data[3, 0, 7] = np.nan
    with pytest.raises(UserError, match="sample 3 holds NaN or infinity"):
        encoder.preprocess(data)


def test_a_dataset_of_pictures(bare: Make, tmp_path: Path) -> None:
    """Read by workers, item by item; the same images as an array, the same run; one that cannot be read is replaced."""
    many = {"encoder": "resnetv2_18", "encoder_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "stem_chs": 8},
            "image_size": 32, "steps": 2, "precision": "float32"}  # fmt: skip
    pictures = [Image.fromarray(one) for one in blobs(60)]
    a = pretrain(bare(**many, workers=1, out=str(tmp_path / "a")), images=Pictures(pictures), quiet=True)
    b = pretrain(bare(**many, out=str(tmp_path / "b")), images=list(blobs(60)), quiet=True)
    assert trained(a) == trained(b)
    tensors = Pictures(torch.from_numpy(blobs(60))[:, None])
    assert np.array_equal(open_images(tensors).read(3), open_images(blobs(60)).read(3))
    assert np.array_equal(open_images(tensors.items).read(3), open_images(blobs(60)).read(3))
    odd = pretrain(bare(**many, out=str(tmp_path / "c"), max_bad=0.5),
                   images=Pictures([*pictures[:59], "no picture"]), quiet=True)  # fmt: skip
    assert "is no image" in (odd / "quarantine.jsonl").read_text()


def test_own_functions_need_not_be_such_as_workers_can_be_sent(tiny: Make) -> None:
    run = pretrain(tiny(workers=1, steps=2), views=(lambda x, g: dimmed(x, g), dimmed), quiet=True)
    assert read_toml(run / "config.toml").views.endswith("/test_own_data.dimmed")  # type: ignore[union-attr]


def test_view_rows_are_settings_as_any(tiny: Make) -> None:
    rows = (View(crop=(0.5, 1.0), flip=0.5), View(crop=(0.4, 1.0)))
    run = pretrain(tiny(steps=2), views=rows, quiet=True)
    pretrain(tiny(steps=2), views=rows, quiet=True)  # complete, and the same
    assert read_toml(run / "config.toml").views[1]["crop"] == [0.4, 1.0]  # type: ignore[index]


def test_own_encoder_on_images(bare: Make) -> None:
    run = pretrain(bare(image_size=24), images=blobs(60), encoder=Small(), quiet=True)
    encoder = load_encoder(run, Small())
    assert (encoder.features, encoder.channels, encoder.size) == (6, 1, 24)
    _, features = embed(run, blobs(60), model=Small())
    assert features.shape == (60, 6)


def test_pairs_with_a_network_each(bare: Make) -> None:
    """Two sensors: of images with presets and a network of timm's each, of samples of two shapes with one's own."""
    small, large = blobs(60, 24), np.repeat(blobs(60, 32)[..., None], 2, axis=3)
    run = pretrain(bare(image_size=24, steps=2), images=Pairs(small, large), encoder=(Small(1), Small(2)), quiet=True)
    config = read_toml(run / "config.toml")
    assert (config.twins, config.channels, config.channels_b) == ("unshared", 1, 2)
    assert load_encoder(run / "encoder_b", Small(2)).channels == 2
    with pytest.raises(UserError, match="has changed"):
        pretrain(Config(out=str(run)), images=Pairs(small, 255 - large), encoder=(Small(1), Small(2)), quiet=True)
    with pytest.raises(UserError, match="made from other images"):
        pretrain(Config(out=str(run)), images=small, encoder=(Small(1), Small(2)), quiet=True)


def test_pairs_of_samples(bare: Make) -> None:
    data = Samples(waves(60), waves(60, 1, 20))
    run = pretrain(bare(steps=2), images=data, views=VIEWS, encoder=(Net(2), Net(1)), quiet=True)
    assert load_encoder(run / "encoder_b", Net(1)).shape == (1, 20)
    with pytest.raises(UserError, match="cannot share a network"):
        pretrain(bare(twins="shared", out=str(run) + "x"), images=data, views=VIEWS, encoder=Net(), quiet=True)


def test_pairs_of_lists_of_paths(bare: Make, tmp_path: Path) -> None:
    paths = []
    for k, one in enumerate(blobs(40)):
        Image.fromarray(one).save(tmp_path / f"{k}.png")
        paths.append(tmp_path / f"{k}.png")
    found = open_images(Pairs(paths, paths[::-1]))
    assert found.second is not None
    assert np.array_equal(found.read(0), found.second.read(39))
    tiny = {"encoder": "resnetv2_18", "encoder_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "stem_chs": 8}}
    settings = bare(image_size=32, steps=1, batch_size=16, held_out=8, cache=False, **tiny)
    pretrain(settings, images=Pairs(paths, paths[::-1]), quiet=True)
    pretrain(settings, images=Pairs(paths, paths[::-1]), quiet=True)  # complete, and the same


def test_tensors_of_bfloat16_are_numbers(bare: Make) -> None:
    images = torch.rand(60, 1, 24, 24)
    expected, same = (pretrain(bare(image_size=24, steps=1, out=bare().out + name), images=given, quiet=True)
                      for name, given in (("a", images.bfloat16().float()), ("b", images.bfloat16())))  # fmt: skip
    assert read_toml(expected / "config.toml").mean == read_toml(same / "config.toml").mean


class Twice(Small):
    """One layer under two names, and whatever else a module may hold."""

    def __init__(self, **buffers: Tensor) -> None:
        super().__init__()
        self.second = self.first = nn.Conv2d(6, 6, 3, padding=1)
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(self.first(self.conv(x)))).mean((2, 3))


class Extra(Small):
    def get_extra_state(self) -> dict[str, int]:
        return {"a": 1}

    def set_extra_state(self, _: object) -> None:
        pass


def test_a_layer_that_is_used_twice_is_written(bare: Make) -> None:
    """Kills: all steps done, and no encoder, as its file does not take tensors that share their memory."""
    run = pretrain(bare(image_size=24, steps=2), images=blobs(60, 24), encoder=Twice(), quiet=True)
    loaded = load_encoder(run, Twice())
    assert torch.equal(loaded.model.first.bias, loaded.model.second.bias)


@pytest.mark.parametrize(
    ("encoder", "words"),
    [(Twice(mask=torch.full((2,), -torch.inf)), "encoder's mask is not finite, .*persistent=False"),
     (Extra(), "encoder's _extra_state is a dict; checkpoints hold tensors only")],
)  # fmt: skip
def test_what_no_checkpoint_takes_is_refused_before_the_first_step(bare: Make, encoder: nn.Module, words: str) -> None:
    with pytest.raises(UserError, match=words):
        pretrain(bare(image_size=24, steps=2), images=blobs(60, 24), encoder=encoder, quiet=True)


@pytest.mark.parametrize("channels", [3, 4])
def test_one_colour_image_is_not_taken_for_many_gray_ones(tmp_path: Path, channels: int) -> None:
    image = np.zeros((40, 50, channels), np.uint8)
    np.save(tmp_path / "one.npy", image)
    for source in (image, torch.from_numpy(image), tmp_path / "one.npy"):
        with pytest.raises(UserError, match=(
            rf"shape \(40, 50, {channels}\) is one colour image, or 40 gray ones {channels} pixels wide: "
            rf"give \(1, 40, 50, {channels}\), or \(40, 50, {channels}, 1\)"
        )):  # fmt: skip
            open_images(source)
    assert open_images(image[None]).channels == channels
    assert len(open_images(image[..., None])) == 40
