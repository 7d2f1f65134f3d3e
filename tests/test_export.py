"""Exports: each opened again by its own tool, compared, and gone when it differs; the model card; the mistakes."""

from __future__ import annotations

import importlib.util
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import blobs
from huggingface_hub.errors import OfflineModeIsEnabled
from PIL import Image

from barlow import export as room
from barlow.card import model_card
from barlow.encoder import load_encoder, save_encoder
from barlow.errors import NumbersError, UserError
from barlow.export import export_encoder
from barlow.network import build_encoder, model_arguments
from barlow.portable import FromBytes

ARGS = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16], "stem_chs": 8}
needs_onnx = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs pip install '.[onnx]'")


def a_run(path: Path, channels: int = 3, name: str = "resnetv2_18", size: int = 32, **origin: Any) -> Path:
    """A run folder as far as an export looks at it: an encoder, held-out images, settings and measures."""
    torch.manual_seed(0)
    arguments = ARGS if name == "resnetv2_18" else {}
    model = build_encoder(name, arguments, channels=channels, size=size, pretrained=False)
    save_encoder(path / "encoder", model, name=name, arguments=model_arguments(name, arguments, channels, size),
                 size=size, mean=[0.3] * channels, std=[0.2] * channels, origin=origin)  # fmt: skip
    (path / "snapshots").mkdir()
    shown = np.stack([blobs(12, 24, seed) for seed in range(channels)], axis=3)
    np.savez(path / "snapshots" / "held_out.npz", images=shown, keys=np.arange(12).astype(str))
    (path / "config.toml").write_text('images = "/home/me/secret | place/photos"\nlambda = 0.02\nsteps = 8\n')
    health = {"kind": "health", "step": 8, "of": "features", "verdict": "healthy", "sentence": "It | learns.", "n": 12,
              "effective_rank": 7.5}  # fmt: skip
    (path / "metrics.jsonl").write_text(json.dumps(health) + "\n")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_run(tmp_path_factory.mktemp("export") / "run")


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (32, 32), (100, 7), (16, 16), (15, 16), (301, 200), (3, 2)])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_from_bytes_are_those_of_preprocess(run: Path, shape: tuple[int, int], channels: int) -> None:
    """The resize as matrix products against the native one, never more than two of 255 apart."""
    encoder = load_encoder(run)
    if channels == 1:
        encoder.mean, encoder.std, encoder.channels = encoder.mean[:1], encoder.std[:1], 1
    images = np.random.default_rng(0).integers(0, 256, (2, *shape, channels), np.uint8)
    ours = FromBytes(encoder).pixels(torch.from_numpy(images))
    far = (ours - encoder.preprocess(list(images))).abs() * 0.2 * 255
    assert far.max() < 2.01
    assert (far > 0.01).float().mean() < 0.02


@pytest.mark.filterwarnings("ignore:Pretrained (mean|std)")
def test_timm_folder(run: Path, tmp_path: Path) -> None:
    done = export_encoder(run, "timm", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert done.images == 12
    assert done.difference <= 1e-5
    assert done.largest > 0.1  # a network that answers nothing would pass any comparison
    assert timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).num_features == 16
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("with_preprocessing", [False, True])
def test_torch_archive(run: Path, tmp_path: Path, with_preprocessing: bool) -> None:
    path = tmp_path / "e.pt2"
    done = export_encoder(run, "torch", path, with_preprocessing=with_preprocessing)
    assert done.difference <= (2e-2 if with_preprocessing else 1e-4) * done.largest
    with zipfile.ZipFile(path) as archive:  # read by torch without unpickling anything
        names = {info.filename: archive.read(info) for info in archive.infolist()}
    assert not any(data.startswith(b"PK") or data.startswith(b"\x80") for data in names.values())
    assert not any(b'"use_pickle": true' in data for data in names.values())
    shape = (3, 40, 28, 3) if with_preprocessing else (3, 3, 32, 32)
    x = torch.zeros(shape, dtype=torch.uint8 if with_preprocessing else torch.float32)
    assert torch.export.load(path).module()(x).shape == (3, 16)


@pytest.mark.parametrize("depth", ["uint16", "float32"])
def test_preprocessing_inside_is_for_encoders_of_bytes(tmp_path: Path, depth: str) -> None:
    """Kills: a file that takes bytes and knows no range, of an encoder that saw neither."""
    run = a_run(tmp_path / "run", value_range=[0.0, 1.0], value_dtype=depth)
    with pytest.raises(UserError, match=f"run: this encoder takes {depth} images: export it without --with-prep"):
        export_encoder(run, "torch", tmp_path / "e.pt2", with_preprocessing=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    export_encoder(run, "torch", tmp_path / "e.pt2")


@needs_onnx
@pytest.mark.parametrize("with_preprocessing", [False, True])
def test_onnx_file(run: Path, tmp_path: Path, with_preprocessing: bool) -> None:
    import onnxruntime

    path = tmp_path / "e.onnx"
    done = export_encoder(run, "onnx", path, with_preprocessing=with_preprocessing)
    assert done.difference <= (2e-2 if with_preprocessing else 1e-4) * done.largest
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    if with_preprocessing:
        assert (given.name, given.type) == ("images", "tensor(uint8)")
        assert given.shape == ["batch", "height", "width", 3]
        x: Any = np.random.default_rng(0).integers(0, 256, (5, 50, 41, 3), np.uint8)
        encoder = load_encoder(run)
        with torch.inference_mode():
            ours = encoder(encoder.preprocess(list(x))).numpy()
        np.testing.assert_allclose(session.run(None, {"images": x})[0], ours, atol=0.03 * np.abs(ours).max())
    else:
        assert (given.name, given.shape, given.type) == ("pixel_values", ["batch", 3, 32, 32], "tensor(float)")
    assert (made.name, made.shape) == ("features", ["batch", 16])


@pytest.mark.parametrize("to", ["timm", "torch"])
def test_an_export_that_differs_is_an_error_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Any
) -> None:
    """What the tool opened answers something else by a thousandth."""

    def wrong(encoder: Any, folder: Path, path: Path, _: bool) -> room.Opened:
        if to == "timm":
            room._write_timm(encoder, folder, path, False)
        else:
            path.write_bytes(b"something")
        return lambda x: encoder(x) * 1.001

    monkeypatch.setitem(room._WRITERS, to, wrong)
    with pytest.raises(NumbersError, match="differ from ours"):
        export_encoder(run, to, tmp_path / f"e{room.ENDINGS[to]}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("answer", [lambda y: y * torch.nan, lambda y: y[:1], lambda y: y + 0.01 * y.abs().max()])
def test_compare_sees_nan_a_fixed_batch_and_a_shift(run: Path, answer: Any) -> None:
    encoder = load_encoder(run)
    images = room._test_images(run, encoder, None)
    assert room.compare(encoder, encoder, images, False)[0] <= 1e-5
    with pytest.raises(NumbersError):
        room.compare(encoder, lambda x: answer(encoder(x)), images, False)


def test_unsupported_network_is_one_sentence(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) > 0 else x + 1  # a branch on the values of a tensor

    monkeypatch.setattr("barlow.encoder.Encoder.forward", cannot)
    with pytest.raises(UserError, match=r"cannot be exported to torch\.export"):
        export_encoder(run, "torch", tmp_path / "e.pt2")
    assert list(tmp_path.iterdir()) == []


def test_images_given_and_encoder_folder_alone(run: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.stack([blobs(5)] * 3, axis=3))
    assert export_encoder(run / "encoder", "timm", tmp_path / "a").images == 12  # of the run around it
    alone = tmp_path / "a"
    with pytest.raises(UserError, match="name some with --images"):
        export_encoder(alone, "timm", tmp_path / "b")
    assert export_encoder(alone, "timm", tmp_path / "b", images=str(tmp_path / "x.npy")).images == 5


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"to": "onnx", "output": "e.pt2"}, "must end in .onnx"),
        ({"to": "torch", "output": "e"}, "must end in .pt2"),
        ({"to": "torch", "output": "none/e.pt2"}, "does not exist"),
        ({"to": "timm", "output": "full"}, "exists already"),
        ({"to": "timm", "output": "e", "with_preprocessing": True}, "--with-preprocessing"),
        ({"to": "torch", "output": "e.pt2", "push": "me/e"}, "--to timm"),
        ({"to": "timm", "output": "e", "push": "me"}, "user/name"),
        ({"to": "timm", "output": "e", "push": "me/a--b"}, "'me/a--b' is not a name that the Hub takes: Cannot"),
        ({"to": "timm", "output": "e", "push": "me/.a"}, "'me/.a' is not a name that the Hub takes"),
        ({"to": "timm", "output": "e", "push": "me/e"}, "needs credentials"),
    ],
)
def test_mistakes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: dict[str, Any], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("barlow.hub.get_token", lambda: None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(UserError, match=sentence):
        export_encoder(run, **{**words, "output": Path(words["output"])})
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_missing_extra_names_it(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'barlow\[onnx\]'"):
        export_encoder(run, "onnx", tmp_path / "e.onnx")


def test_push_sends_the_folder_when_asked(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    class Api:
        def __init__(self, **_: Any) -> None: ...

        def create_repo(self, name: str, **words: Any) -> str:
            sent.append((name, words["private"]))
            return f"the hub/{name}"

        def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> None:
            sent.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr("barlow.hub.get_token", lambda: "something")
    monkeypatch.setattr("barlow.hub.HfApi", Api)
    export_encoder(run, "timm", tmp_path / "out", push="me/photos")
    assert sent == [("me/photos", True), ("me/photos", ["README.md", "config.json", "model.safetensors"])]


@pytest.mark.parametrize(("error", "reason"), [
    (type("ConnectError", (Exception,), {})("no route\nto it"), "could not be pushed to me/photos: no route$"),
    (RuntimeError(), "could not be pushed to me/photos: RuntimeError$"),
    (OfflineModeIsEnabled("it is"), "out is written.$"),
])  # fmt: skip
@pytest.mark.parametrize("call", ["create_repo", "upload_folder"])
def test_a_push_that_fails_is_one_sentence_and_says_where_the_folder_is(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: Exception, reason: str
) -> None:
    """Kills: a traceback without network, as the client's errors are not all OSErrors."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("barlow.hub.get_token", lambda: "something")
    monkeypatch.setattr("barlow.hub.HfApi.create_repo", lambda *_, **__: "the hub")
    monkeypatch.setattr(f"barlow.hub.HfApi.{call}", fail)
    with pytest.raises(UserError, match=reason) as raised:
        export_encoder(run, "timm", tmp_path / "out", push="me/photos")
    assert str(tmp_path / "out") in str(raised.value)
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize(("to", "name"), [pytest.param("onnx", "a.onnx", marks=needs_onnx), ("torch", "a.pt2")])
def test_only_an_earlier_export_is_replaced(run: Path, tmp_path: Path, to: Any, name: str) -> None:
    """Kills: the network of somebody else, or a text, gone because it had that name."""
    torch.save({"a": torch.ones(2)}, tmp_path / "other")
    for content in (b"hello", (tmp_path / "other").read_bytes()):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="is no earlier output of this command"):
            export_encoder(run, to, tmp_path / name)
        assert (tmp_path / name).read_bytes() == content
    (tmp_path / name).write_bytes(b"")
    for _ in range(2):
        export_encoder(run, to, tmp_path / name)


def test_a_card_shows_arguments_as_they_are_and_makes_no_link(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run") / "encoder"

    def arguments() -> str:
        return next(line for line in model_card(folder).splitlines() if line.startswith("| encoder |"))

    assert str(ARGS["layers"]) in arguments().replace("\\", "")
    config = json.loads((folder / "config.json").read_text())
    config["architecture"] = r"[x](http://a) \[y\](http://b)"
    (folder / "config.json").write_text(json.dumps(config))
    assert "http://b" in arguments()
    assert re.search(r"(?<!\\)(\\\\)*[\[\]]", arguments()) is None  # none that is not escaped


def test_model_card(run: Path) -> None:
    card = model_card(run / "encoder")
    front = card.split("---")[1]
    assert "pipeline_tag: image-feature-extraction" in front
    assert "library_name: timm" in front
    for words in ("healthy", "7.5", "lambda | 0.02", "photos", "Limits", "16 features", "It learns."):
        assert words in card, words
    assert "/home/me" not in card
    assert "secret" not in card


def test_a_card_of_deep_images_does_not_open_them_as_pictures(tmp_path: Path) -> None:
    """Kills: three bands of 16 bits through Pillow's RGB, 8 bits of them, and then through their range as well."""
    folder = a_run(tmp_path / "run") / "encoder"
    config = json.loads((folder / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"][0] == 3
    assert "exif_transpose" in model_card(folder)
    config["barlow"] |= {"value_range": [0.01, 0.06], "value_dtype": "uint16"}
    (folder / "config.json").write_text(json.dumps(config))
    card = model_card(folder)
    assert "exif_transpose" not in card
    assert "lo, hi = 0.01, 0.06" in card


def test_model_card_of_a_folder_alone_says_what_is_not_known(run: Path, tmp_path: Path) -> None:
    export_encoder(run, "timm", tmp_path / "out")
    card = model_card(tmp_path / "out")
    assert "does not name" in card
    assert "None were recorded" in card


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("channels", [1, 3])
def test_transformers_opens_the_folder(tmp_path: Path, channels: int) -> None:
    from transformers import AutoImageProcessor, AutoModel

    run = a_run(tmp_path / "run", channels)
    folder, encoder = str(run / "encoder"), load_encoder(run)
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 40, channels), np.uint8)
    pictures = [Image.fromarray(p[:, :, 0] if channels == 1 else p) for p in pixels]
    given = processor(pictures, return_tensors="pt")["pixel_values"]
    ready = encoder.preprocess(list(pixels))
    assert (given - ready).abs().max() <= 1.01 / 255 / 0.2  # Pillow rounds a pixel differently
    with torch.inference_mode():
        assert torch.equal(model(ready).pooler_output, encoder(ready))
