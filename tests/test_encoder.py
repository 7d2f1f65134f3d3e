"""The encoder folder: opened by timm without us, loaded by us with its preprocessing, refused when it is hostile."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import blobs
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch.nn.modules.module import register_module_parameter_registration_hook

import barlow.encoder
from barlow import Samples, embed, load_encoder, pretrain
from barlow.card import model_card
from barlow.config import Config
from barlow.encoder import Encoder, save_encoder, untrained
from barlow.errors import UserError
from barlow.labelled import open_labelled
from barlow.network import build_encoder, model_arguments

GOOD = {"input_size": [3, 32, 32], "mean": [0, 0, 0], "std": [1, 1, 1]}
ARGS = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16], "stem_chs": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("encoder"), channels=3)


def write(path: Path, channels: int) -> Path:
    torch.manual_seed(0)
    model = build_encoder("resnetv2_18", ARGS, channels=channels, size=32, pretrained=False)
    for name, buffer in model.named_buffers():  # running statistics that are not those of a fresh network, but near
        if buffer.is_floating_point():  # to them: of larger means the last ReLU makes zeros, of every image
            buffer.uniform_(*((0.5, 1.5) if name.endswith("var") else (-0.2, 0.2)))
    save_encoder(path, model, name="resnetv2_18", arguments=model_arguments("resnetv2_18", ARGS, channels, 32), size=32,
                 mean=[0.1 * (i + 1) for i in range(channels)], std=[0.2] * channels,
                 origin={"images": "test"})  # fmt: skip
    return path


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.filterwarnings("ignore:Pretrained (mean|std)")
def test_timm_opens_the_folder_and_gives_the_same_features(tmp_path: Path, channels: int) -> None:
    path = write(tmp_path, channels)
    ours, theirs = load_encoder(path), timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    x = torch.randn(2, channels, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    assert theirs.num_classes == 0
    assert theirs.pretrained_cfg["input_size"] == (channels, 32, 32)


def test_timms_own_preprocessing_is_ours(folder: Path) -> None:
    """A square image resized by timm (Pillow, bicubic) and by us: equal but for the rounding of a pixel."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    transform = create_transform(**resolve_data_config({}, model=model))
    pixels = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
    theirs = transform(Image.fromarray(pixels))
    ours = load_encoder(folder).preprocess([pixels])[0]
    assert (ours - theirs).abs().max() <= 1.01 / 255 / 0.2


@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_of_a_list_is_prepared_by_its_own_type(tmp_path: Path, channels: int) -> None:
    """Kills: reals cast to bytes 0 and 1, or bytes left at 0..255, as the first image of a list decided for all."""
    encoder = load_encoder(write(tmp_path, channels))
    byte = np.random.default_rng(0).integers(90, 160, (40, 33, channels), np.uint8)  # nothing is clipped on the way
    kinds = [byte, byte.astype(np.float32) / 255, byte.astype(np.uint16) * 257, byte / 255.0]
    alone = torch.cat([encoder.preprocess([image]) for image in kinds])
    assert (alone - alone[0]).abs().max() <= 2.01 / 255 / 0.2
    for order in ([0, 1, 2, 3], [1, 0, 3, 2], [2, 0], [1, 2, 3]):
        made = encoder.preprocess([kinds[k] for k in order])
        assert torch.equal(made, alone[order])
        assert made.is_contiguous(memory_format=torch.channels_last)


def real_run(tiny: Callable[..., Config]) -> tuple[Path, np.ndarray[Any, Any]]:
    """A run on real numbers, and images of which one holds what is not finite."""
    images = (blobs(96).astype(np.float32) * 40 - 1000)[..., None]
    run = pretrain(tiny(images=None, steps=2), images=images, quiet=True)
    holed = images[:6].copy()
    holed[2, 3:9, 4] = np.nan
    holed[2, 12, 5:7] = [[np.inf], [-np.inf]]
    return run, holed


def test_what_is_not_finite_is_filled_as_embed_does(tiny: Callable[..., Config]) -> None:
    """Kills: NaN refused with a sentence about integers and the range 0 to 1, where ``embed`` fills it."""
    run, holed = real_run(tiny)
    encoder = load_encoder(run)
    with torch.inference_mode():
        ours = encoder(encoder.preprocess(list(holed))).numpy()
    assert ours.std(axis=0).max() > 0.01
    np.testing.assert_allclose(ours, embed(run, holed)[1], rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match=r"^image 1 holds no finite number$"):
        encoder.preprocess([holed[0], np.full((8, 8, 1), np.nan)])


@pytest.mark.filterwarnings("ignore:Pretrained (mean|std)")
def test_the_lines_of_the_card_fill_and_scale_as_embed_does(tiny: Callable[..., Config]) -> None:
    """Kills: NaN through the network, by who follows the card."""
    run, holed = real_run(tiny)
    lines = re.findall(r"```python\n(.*?)```", model_card(run / "encoder"), re.DOTALL)[1]
    model = timm.create_model(f"local-dir:{run / 'encoder'}", pretrained=True).eval()
    cfg, features = model.pretrained_cfg, []
    for image in holed:
        exec(lines, names := {"np": np, "x": image})
        x = torch.from_numpy(names["x"]).permute(2, 0, 1)[None].float()
        x = F.interpolate(x, cfg["input_size"][1:], mode="bicubic", antialias=True).clamp(0, 1)
        with torch.inference_mode():
            features.append(model((x - cfg["mean"][0]) / cfg["std"][0])[0].numpy())
    np.testing.assert_allclose(features, embed(run, holed)[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("width", [240, 180])
def test_the_code_of_the_card_gives_our_features_of_any_shape(folder: Path, tmp_path: Path, width: int) -> None:
    """Kills: timm's transform alone, which cuts after resizing: other pixels where a picture is not square."""
    code = re.findall(r"```python\n(.*?)```", model_card(folder), re.DOTALL)[0].partition("from transformers")[0]
    rng, encoder = np.random.default_rng(0), load_encoder(folder)
    pictures = [Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize((width, 180)) for _ in range(8)]
    with torch.inference_mode():
        ours = encoder(encoder.preprocess([np.asarray(picture) for picture in pictures]))

    def apart(code: str) -> float:
        """The largest distance from our features, as a share of the typical distance of two pictures'."""
        theirs = []
        for picture in pictures:
            picture.save(tmp_path / "photo.png")
            code = code.replace("photo.jpg", str(tmp_path / "photo.png")).replace("FOLDER", str(folder))
            with torch.inference_mode():
                exec(code, names := dict[str, Any]())
            theirs.append(names["features"][0])
        return float((torch.stack(theirs) - ours).norm(dim=1).max() / torch.pdist(ours).median())

    assert apart(code) < 0.005
    if width != 180:
        assert apart(code.replace("square(ImageOps", "(ImageOps")) > 0.005


def test_timm_needs_nothing_of_ours(folder: Path) -> None:
    """In a fresh process: the folder opens in timm, and nothing of this package is imported by that."""
    program = f"""
import sys, timm
model = timm.create_model("local-dir:{folder}", pretrained=True)
assert model.num_features == 16, model.num_features
assert not [name for name in sys.modules if name.partition(".")[0] == "barlow"]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_new_images_of_real_numbers_are_scaled_as_those_of_the_run(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """The dim half of a data set gets the features that it has within the whole: its range is the run's."""
    images = blobs(96).astype(np.float32) * 40 - 1000
    np.save(tmp_path / "real.npy", images)
    run = pretrain(tiny(images=str(tmp_path / "real.npy"), steps=2), quiet=True)
    dim = np.argsort(images.max((1, 2)) - images.min((1, 2)))[:48]
    assert load_encoder(run).value_range != (0, 1)
    _, whole = embed(run, images)
    _, half = embed(run, images[dim] * 0.5 - 500)
    _, same = embed(run, images[dim])
    np.testing.assert_allclose(same, whole[dim], rtol=1e-4, atol=1e-5)
    assert not np.allclose(half, whole[dim], rtol=1e-2)


@pytest.mark.parametrize("depth", ["float32", "float64", "uint16", "int16"])
def test_preprocess_takes_images_as_their_files_hold_them(
    tiny: Callable[..., Config], tmp_path: Path, depth: str
) -> None:
    """With the range that the encoder was trained on. Kills: features of images whose whole range is a hundredth of
    what the network knows, without a word."""
    images = (blobs(96).astype(np.float64) * 2 + (100 if depth == "uint16" else -1000)).astype(depth)
    run = pretrain(tiny(images=None, steps=2), images=images, quiet=True)
    encoder = load_encoder(run)
    assert encoder.value_range != (0, 1)
    _, expected = embed(run, images)
    with torch.no_grad():
        ours = encoder(encoder.preprocess(list(images[..., None] if images.ndim == 3 else images))).numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
    assert "brought to 0..1 first" in model_card(run / "encoder")


@pytest.mark.parametrize(("trained", "given"), [("uint16", "float32"), ("uint16", "uint8"), ("float32", "uint16")])
def test_images_of_other_numbers_than_a_range_is_of_are_refused(
    tiny: Callable[..., Config], trained: str, given: str
) -> None:
    """Kills: the same features for all images, as a range of 16 bits is in shares of them, and one of reals not."""
    images = blobs(96).astype(trained) * (1 if trained == "uint16" else 40)
    run = pretrain(tiny(images=None, steps=2), images=images, quiet=True)
    for ask in (lambda new: embed(run, new), lambda new: load_encoder(run).preprocess(list(new[..., None]))):
        ask(images[:4])
        with pytest.raises(
            UserError, match=f"trained on {trained} images, .* these are {given}: save them as {trained}"
        ):
            ask(images[:4].astype(given))


def given(way: str, images: np.ndarray[Any, Any], folder: Path) -> Any:
    """The images as one array, as a list, or as the files of a folder."""
    if way != "files":
        return images if way == "array" else list(images)
    folder.mkdir()
    for k, image in enumerate(images):
        np.save(folder / f"{k:02d}.npy", image)
    return folder


@pytest.mark.parametrize("way", ["array", "list", "files"])
@pytest.mark.parametrize("depth", ["uint16", "float32"])
def test_features_for_an_encoder_of_bytes_do_not_depend_on_the_company(
    folder: Path, tmp_path: Path, depth: str, way: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Kills: a range measured on the images of the call, where the encoder knows none."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 3000, (12, 40, 40, 3)) + 4000 * (np.arange(12) > 5)[:, None, None, None]
    images = images.astype(np.uint16) if depth == "uint16" else (images / 7000).astype(np.float32)
    _, few = embed(folder, given(way, images[:6], tmp_path / "few"))
    _, many = embed(folder, given(way, images, tmp_path / "many"))
    np.testing.assert_allclose(few, many[:6], rtol=1e-4, atol=1e-5)
    encoder = load_encoder(folder)
    with torch.inference_mode():
        expected = encoder(encoder.preprocess(list(images)))
    np.testing.assert_allclose(many, expected, rtol=1e-4, atol=1e-5)
    noted = "note: the encoder was trained on 8-bit images; of these 16 bits the full range is taken"
    assert (noted in capfd.readouterr().err) == (depth == "uint16")


@pytest.mark.parametrize("way", ["array", "list", "files"])
@pytest.mark.parametrize("odd", [1.5, -0.1, np.nan])
def test_real_numbers_beyond_the_unit_are_refused_by_an_encoder_of_bytes(
    folder: Path, tmp_path: Path, odd: float, way: str
) -> None:
    images = np.random.default_rng(0).random((4, 32, 32, 3), np.float32)
    images[2, 3, 3, 0] = odd
    with pytest.raises(UserError, match=r"2.*: integer .* real numbers must lie in 0 to 1, all finite"):
        embed(folder, given(way, images, tmp_path / "odd"))
    with pytest.raises(UserError, match="real numbers must lie in 0 to 1, all finite"):
        load_encoder(folder).preprocess(list(images))


def test_labelled_images_are_opened_as_the_encoder_takes_them(folder: Path, tmp_path: Path) -> None:
    """Kills: a range measured on the test images alone, where those of the training part are bytes."""
    rng, encoder = np.random.default_rng(0), load_encoder(folder)
    np.savez(tmp_path / "train.npz", images=rng.integers(0, 256, (8, 32, 32, 3), np.uint8), labels=np.arange(8) % 2)
    narrow = rng.integers(0, 3000, (8, 32, 32, 3)).astype(np.uint16)
    np.savez(tmp_path / "test.npz", images=narrow, labels=np.arange(8) % 2)
    opened = open_labelled(tmp_path, channels=3, value_range=encoder.value_range)
    np.testing.assert_array_equal(opened.read(8), narrow[0])


def test_preprocess_takes_gray_images_without_an_axis_of_channels(tmp_path: Path) -> None:
    encoder, images = load_encoder(write(tmp_path, 1)), blobs(3)
    expected = encoder.preprocess(list(images[..., None]))
    assert torch.equal(encoder.preprocess(list(images)), expected)
    assert torch.equal(encoder.preprocess(images[..., None]), expected)
    assert torch.equal(encoder.preprocess(images[0]), expected[:1])


@pytest.mark.parametrize(
    "images", [[], (), blobs(1)[0], blobs(2), torch.zeros(2, 8, 8, 3), [torch.zeros(8, 8, 3)], "a.png", 3, None]
)
def test_preprocess_says_what_is_no_list_of_images(folder: Path, images: Any) -> None:
    with pytest.raises(UserError, match=r"give a list of images \(h, w, 3\)"):
        load_encoder(folder).preprocess(images)


@pytest.mark.parametrize("kind", [np.int64, np.int16, np.uint32])
def test_integers_of_other_kinds_are_not_called_floats(folder: Path, kind: Any) -> None:
    with pytest.raises(UserError, match=r"^integer images are taken as uint8 or uint16"):
        load_encoder(folder).preprocess([np.full((8, 8, 3), 200, kind)])


def test_preprocess_takes_any_size_and_refuses_other_channels(folder: Path) -> None:
    encoder = load_encoder(folder)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((20, 30), (32, 32), (100, 7))]
    x = encoder.preprocess(images)
    assert x.shape == (3, 3, 32, 32)
    assert torch.equal(x[1:2], encoder.preprocess(images[1:2]))  # what else is in the batch does not matter
    assert encoder(x).shape == (3, encoder.features) == (3, 16)
    with pytest.raises(ValueError, match=r"takes images \(h, w, 3\)"):
        encoder.preprocess([images[0][:, :, :1]])


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("resnet10t", [64, 64, 128, 256, 512]),
        ("test_vit", [64, 64, 64, 64, 64]),
        ("test_convnext", [24, 32, 48, 64]),
    ],
)
def test_depths_end_in_the_features(name: str, widths: list[int]) -> None:
    size = 64
    torch.manual_seed(0)
    arguments = model_arguments(name, {}, 3, size)
    encoder = Encoder(build_encoder(name, arguments, channels=3, size=size, pretrained=False), size=size,
                      mean=[0.5] * 3, std=[0.2] * 3).eval()  # fmt: skip
    x = torch.randn(3, 3, size, size)
    with torch.no_grad():
        depths = encoder.depths(x)
        assert torch.equal(depths[-1], encoder(x))
    assert [depth.shape for depth in depths] == [(3, width) for width in widths]


def test_loading_counts_no_parameters_of_other_threads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: "far larger than its weights" of a sound encoder, and of a stranger's network, as the count was the
    process's."""
    real, others = barlow.encoder.rebuild, list[Any]()

    def beside(*given: Any) -> Any:
        def another() -> None:
            try:
                others.append(torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(3000)))
                others.append(torch.nn.Linear(5000, 5000))
            except ValueError as error:
                others.append(error)

        thread = threading.Thread(target=another)
        thread.start()
        thread.join()
        return real(*given)

    monkeypatch.setattr(barlow.encoder, "rebuild", beside)
    assert load_encoder(folder).features == 16
    assert [type(other) for other in others] == [torch.nn.ModuleList, torch.nn.Linear]


def test_a_load_leaves_the_hooks_alone_that_another_thread_walks_over(folder: Path) -> None:
    """Kills: "OrderedDict mutated during iteration" in a thread that builds a network of its own meanwhile."""
    inside, ended, made = threading.Event(), threading.Event(), list[Any]()

    def stand(*_: Any) -> None:
        if threading.current_thread() is thread:
            inside.set()
            ended.wait(30)

    def build() -> None:
        try:
            made.append(torch.nn.Linear(1, 1))
        except RuntimeError as error:
            made.append(error)

    thread = threading.Thread(target=build)
    hooks = [register_module_parameter_registration_hook(each) for each in (stand, lambda *_: None)]  # one is to come
    try:
        thread.start()
        assert inside.wait(30)
        load_encoder(folder)
    finally:
        ended.set()
        thread.join()
        for hook in hooks:
            hook.remove()
    assert isinstance(made[0], torch.nn.Linear)


def test_loading_takes_no_random_numbers_of_the_process(folder: Path) -> None:
    """Kills: another training after a load, as fresh weights were drawn before they were replaced."""
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    for ask in (lambda: load_encoder(folder), lambda: embed(folder, images), lambda: untrained(folder, 1)):
        ask()
        assert torch.equal(torch.get_rng_state(), before)
    first, again, other = (next(untrained(folder, seed).parameters()) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_encoder_of_images_embeds_images_alone(folder: Path) -> None:
    """Kills: the sentence for resuming a run, where nothing was given; samples taken for images."""
    with pytest.raises(UserError, match=r"^there is nothing to embed: give images"):
        embed(folder, None)
    tiles = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    with pytest.raises(UserError, match=r"^the encoder takes images, and Samples are none"):
        embed(folder, Samples(tiles))


def test_embed_gives_one_row_an_image(folder: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    keys, features = embed(folder, images, batch_size=2)
    assert len(set(keys)) == 5
    assert features.std(axis=0).max() > 0.01  # not the same for all images
    encoder = load_encoder(folder)
    with torch.inference_mode():
        expected = encoder(encoder.preprocess(list(images)))
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


def changed(folder: Path, tmp_path: Path, **changes: Any) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config.update(changes)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "hf-hub:evil/model"}, "not the name of a timm model"),
        ({"architecture": "../../evil"}, "not the name of a timm model"),
        ({"architecture": "resnet81"}, "timm knows no encoder"),
        ({"architecture": 3}, "is damaged"),
        ({"model_args": [1]}, "is damaged"),
        ({"model_args": {"layers": [1, 1, 1, 1], "num_classes": 0}}, "cannot take|do not fit"),
        ({"pretrained_cfg": {}}, "is damaged"),
        ({"barlow": {"value_range": [1.0]}}, "is damaged"),
        ({"barlow": {"value_range": [2.0, 1.0]}}, "is damaged"),
        ({"barlow": {"value_range": "ab"}}, "is damaged"),
        ({"pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0, 0, 0], "std": [1, 0, 1]}}, "is damaged"),
        ({"barlow": None}, "is damaged"),
        ({"barlow": {"format": 2}}, "another version of barlow .format 2, this one reads 1"),
        ({"pretrained_cfg": GOOD | {"mean": [float("nan"), 0, 0]}}, "is damaged"),
        ({"pretrained_cfg": GOOD | {"std": [1, 1, float("inf")]}}, "is damaged"),
        ({"pretrained_cfg": GOOD | {"input_size": [3, True, True]}}, "is damaged"),
        ({"pretrained_cfg": GOOD | {"crop_pct": 0.875}}, "a preprocessing that barlow does not have .crop_pct 0.875"),
        ({"model_args": ARGS | {"layers": [10**6, 1, 1, 1]}}, "far larger than its weights"),
        ({"model_args": ARGS | {"channels": [10**5] * 4}}, "far larger than its weights|cannot take"),
        ({"pretrained_cfg": {"input_size": [3, 10**9, 10**9], "mean": [0, 0, 0], "std": [1, 1, 1]}}, "is damaged"),
    ],
)
def test_hostile_or_damaged_config(folder: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_encoder(changed(folder, tmp_path, **changes))


def test_pretrained_paths_in_the_arguments_are_not_followed(folder: Path, tmp_path: Path) -> None:
    """A config cannot make timm read another file: arguments of that name are dropped."""
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["pretrained_cfg"] = {"file": "/etc/passwd"}
    config["model_args"]["pretrained"] = True
    config["model_args"]["checkpoint_path"] = str(tmp_path / "evil.pth")
    (tmp_path / "evil.pth").write_bytes(b"cos\nsystem\n(S'touch /tmp/evil'\ntR.")
    with pytest.raises(UserError):
        load_encoder(changed(folder, tmp_path, model_args=config["model_args"]))


@pytest.mark.parametrize("damage", ["cut", "pickle", "nan", "missing"])
def test_damaged_weights(folder: Path, tmp_path: Path, damage: str) -> None:
    copy = changed(folder, tmp_path)
    weights = copy / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "pickle":
        weights.write_bytes(b"\x80\x04\x95" + b"x" * 200)
    elif damage == "nan":
        data = bytearray(weights.read_bytes())
        data[-4:] = np.float32("nan").tobytes()
        weights.write_bytes(bytes(data))
    else:
        weights.unlink()
    with pytest.raises(UserError):
        load_encoder(copy)


def test_configs_that_are_no_configs(folder: Path, tmp_path: Path) -> None:
    copy = changed(folder, tmp_path)
    for text in (b"[" * 100_000, b"null", b"[]", b"\xff", b" " * (2 << 20) + b"{}"):
        (copy / "config.json").write_bytes(text)
        with pytest.raises(UserError, match="is damaged"):
            load_encoder(copy)


def test_folder_that_is_no_encoder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run folder with an encoder nor an encoder folder"):
        load_encoder(tmp_path)
