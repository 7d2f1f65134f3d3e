"""Evaluation with labels: sources, the split and its guard, frozen encoders, the three columns, the written result."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from barlow import finetune, probe, protocols
from barlow.encoder import load_encoder, save_encoder
from barlow.errors import NumbersError, UserError
from barlow.evaluate import compare, evaluate, images_of_run, table
from barlow.features import features_of, fingerprint, raw_pixels
from barlow.images import open_images
from barlow.judgement import evaluation_table
from barlow.labelled import divided, open_labelled
from barlow.network import build_encoder, model_arguments
from barlow.progress import shown

ARGS = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16], "stem_chs": 8}


class Fake(nn.Module):
    """An encoder whose four features are four pixels of the grey image, plus noise that drowns them where asked."""

    features, channels, value_dtype = 4, 1, "uint8"

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.noise = noise
        self.weight = nn.Parameter(torch.eye(4))
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("mean", torch.zeros(1), persistent=False)
        self.eval()

    def normalised(self, images: Sequence[np.ndarray]) -> Tensor:
        return torch.stack([torch.from_numpy(image[:2, :2, 0].reshape(4) / 255).float() for image in images])

    def forward(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(len(x))
        return self.norm(x @ self.weight + self.noise * torch.randn(x.shape, generator=generator))


def bright(n: int, classes: int = 3, seed: int = 0, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Grey images whose brightness tells their class, a few exceptions apart; every one different."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    shown = np.where(rng.random(n) < 0.05, rng.integers(0, classes, n), labels)
    images = 60 * shown[:, None, None] + rng.integers(0, 90, (n, size, size))
    return images.astype(np.uint8), labels


def saved(path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images=images, labels=labels)
    return path


def files(folder: Path, images: np.ndarray, names: Sequence[str]) -> Path:
    for image, name in zip(images, names, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
    return folder


@pytest.fixture(autouse=True)
def short_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "STRENGTHS", (0.1, 0.01, 0.001))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return saved(tmp_path / "a.npz", *bright(300)), saved(tmp_path / "b.npz", *bright(120, seed=1))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny encoder, as a run leaves it."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = build_encoder("resnetv2_18", ARGS, channels=1, size=32, pretrained=False)
    save_encoder(
        folder / "encoder", model, name="resnetv2_18", arguments=model_arguments("resnetv2_18", ARGS, 1, 32), size=32,
        mean=[0.5], std=[0.25], origin={"seed": 7},
    )  # fmt: skip
    return folder


# ---- the result


def test_the_columns_say_which_features_are_good(pair: tuple[Path, Path]) -> None:
    labelled = open_labelled(pair[0], test=pair[1])
    encoders: Any = {"trained": Fake(), "untrained": Fake(noise=3.0)}
    result = compare(labelled, encoders)
    assert result["columns"] == ["trained", "untrained", "raw pixels"]
    assert [row["protocol"] for row in result["rows"]] == [
        "k-NN", "k-NN whitened", "linear", "1 % of labels", "10 % of labels",
    ]  # fmt: skip
    assert list(result["training_labels"].values()) == [300, 300, 300, 3, 30]
    assert result["images"] == {"train": 300, "test": 120, "unreadable": 0}
    for row in result["rows"]:
        assert row["unit"] == "accuracy"
        assert row["interval"] == row["intervals"]["trained"]
        for name in result["columns"]:
            low, high = row["intervals"][name]
            assert 0 <= low <= row[name] <= high <= 1
        if row["protocol"] != "1 % of labels":  # three labels leave everything open
            assert row["trained"] > row["untrained"] + 0.3
    assert [len(result["rows"][k]["draws"].get("trained", [])) for k in range(5)] == [0, 0, 0, 5, 5]
    assert np.mean(result["rows"][4]["draws"]["raw pixels"]) == pytest.approx(result["rows"][4]["raw pixels"])
    assert result["rows"][2]["trained"] > 0.85
    assert result["weights"]["trained"] == fingerprint(encoders["trained"])


def test_details_add_up_to_the_figure(pair: tuple[Path, Path]) -> None:
    encoders: Any = {"trained": Fake()}
    result = compare(open_labelled(pair[0], test=pair[1]), encoders)
    for protocol, row in zip(("k-NN", "k-NN whitened", "linear"), result["rows"], strict=False):
        detail = result["details"]["trained"][protocol]
        counts = np.array(detail["confusion"])
        assert counts.sum(1).tolist() == [40, 40, 40]
        assert np.trace(counts) / counts.sum() == pytest.approx(row["trained"])
        assert [c["class"] for c in detail["per_class"]] == ["0", "1", "2"]
        assert np.mean([c["recall"] for c in detail["per_class"]]) == pytest.approx(detail["balanced_accuracy"])
    assert "raw pixels" not in result["details"]


def test_k_nn_votes_twice_a_column_and_the_mistakes_are_the_first_ones(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[protocols.Votes] = []
    votes_of = protocols.neighbour_votes
    monkeypatch.setattr(protocols, "neighbour_votes", lambda *a, **k: passes.append(votes_of(*a, **k)) or passes[-1])
    encoders: Any = {"trained": Fake(), "untrained": Fake(noise=3.0)}
    result = compare(open_labelled(pair[0], test=pair[1]), encoders)
    assert len(passes) == 2 * len(result["columns"]) == 6  # as the features are, and whitened
    surest = passes[0].certainty[result["mistakes"][0]["place"] - 300]
    assert result["mistakes"][0]["certainty"] == surest


def test_test_labels_change_nothing_but_the_score(tmp_path: Path) -> None:
    """What is answered, and so which penalty was chosen, is the same whatever the test labels say."""
    train, (images, labels) = saved(tmp_path / "a.npz", *bright(200)), bright(120, seed=1)
    said = []
    for k, shift in enumerate((0, 1)):
        test = saved(tmp_path / f"t{k}.npz", images, (labels + shift) % 3)
        encoders: Any = {"trained": Fake(noise=0.5)}
        detail = compare(open_labelled(train, test=test), encoders)["details"]["trained"]
        said.append([np.array(detail[p]["confusion"]).sum(0).tolist() for p in ("k-NN", "linear")])
    assert said[0] == said[1]


def test_evaluate_writes_what_it_returns_and_again_the_same(run: Path, tmp_path: Path) -> None:
    train, test = saved(tmp_path / "a.npz", *bright(60)), saved(tmp_path / "b.npz", *bright(30, seed=1))
    result = evaluate(run, train, test=test, seed=3)
    written = (run / "evaluation.json").read_text(encoding="utf-8")
    assert json.loads(written) == result
    evaluate(run, str(train), test=str(test), seed=3)
    assert (run / "evaluation.json").read_text(encoding="utf-8") == written
    names = ["encoder", "evaluation.json"] + ["snapshots"] * bool(result["mistakes"])
    assert sorted(path.name for path in run.iterdir()) == names
    wrong = round((1 - result["rows"][0]["trained"]) * 30)
    assert 0 < len(result["mistakes"]) <= wrong
    with np.load(run / "snapshots" / "mistakes.npz") as stored:
        assert len(stored["pictures"]) == len(result["mistakes"])
    # the second column is this architecture with the weights that the run's own seed gave it
    fresh = load_encoder(run)
    torch.manual_seed(7)
    fresh.model = build_encoder("resnetv2_18", ARGS, channels=1, size=32, pretrained=False)
    assert result["weights"] == {"trained": fingerprint(load_encoder(run)), "untrained": fingerprint(fresh)}
    assert result["weights"]["trained"] != result["weights"]["untrained"]


def test_the_report_shows_the_rows(pair: tuple[Path, Path]) -> None:
    encoders: Any = {"trained": Fake(), "untrained": Fake(noise=3.0)}
    result = json.loads(json.dumps(compare(open_labelled(pair[0], test=pair[1]), encoders)))
    shown = evaluation_table(result)
    assert shown is not None
    assert shown["columns"] == result["columns"]
    assert [row["protocol"] for row in shown["rows"]] == [row["protocol"] for row in result["rows"]]
    assert all(cell["interval"] for row in shown["rows"] for cell in row["cells"])


def test_the_table(pair: tuple[Path, Path]) -> None:
    encoders: Any = {"trained": Fake(), "untrained": Fake(noise=3.0)}
    result = compare(open_labelled(pair[0], test=pair[1]), encoders)
    lines = table(result).splitlines()
    assert lines[0] == "accuracy on 120 images, 300 for training: b.npz is the test set"
    assert lines[2].split() == ["trained", "untrained", "raw", "pixels"]
    assert [line.partition(")")[0] + ")" for line in lines[3:]] == [
        "k-NN (300 labels)", "k-NN whitened (300 labels)", "linear (300 labels)",
        "1 % of labels (3 labels)", "10 % of labels (30 labels)",
    ]  # fmt: skip
    low, high = result["rows"][0]["interval"]
    assert f"{result['rows'][0]['trained']:.3f}  {low:.3f}–{high:.3f}" in lines[3]
    assert len({line.index(".") for line in lines[3:]}) == 1  # columns stand below each other


# ---- progress


def test_a_long_protocol_shows_what_it_is_at(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kills: minutes without a line within the first linear probe."""
    monkeypatch.setattr("barlow.progress.PLAIN_EVERY", 0.0)
    encoders: Any = {"trained": Fake()}
    compare(open_labelled(pair[0], test=pair[1]), encoders)
    text = capsys.readouterr().err
    assert re.search(r"^protocols: 0 of 10 done · k-NN, trained, 0 of 120 images · \d+ s so far$", text, re.MULTILINE)
    for place, name in ((2, "linear, trained"), (7, "linear, raw pixels")):
        assert f"protocols: {place} of 10 done · {name}, strength 2 of 3, pass 1 · " in text
    assert " · 10 % of labels, trained, draw 5 of 5, preparation 2 of 2, " in text


@pytest.mark.parametrize("live", [False, True])
def test_what_a_protocol_is_at_is_a_line_every_ten_seconds_or_one_that_lives(
    live: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 4.0, 9.0, 10.0, 19.0, 75.0])
    monkeypatch.setenv("COLUMNS", "12")
    with monkeypatch.context() as patch:
        patch.setattr("barlow.progress.on_terminal", lambda: live)
        patch.setattr("barlow.progress.time.monotonic", lambda: next(clock))
        with shown() as tell:
            for text in "abcde":
                tell(text)
    lines = [f"{text} · {seconds} s" for text, seconds in zip("abcd", (4, 9, 10, 19), strict=True)]
    drawn = "".join(f"\r\033[K{text} so far"[:15] for text in lines) + "\r\033[Ke · 1 min 1\r\033[K"
    plain = "c · 10 s so far\ne · 1 min 15 s so far\n"
    assert capsys.readouterr().err == (drawn if live else plain)


# ---- frozen, finite


class Learning(Fake):
    def forward(self, x: Tensor) -> Tensor:
        self.norm.train()
        return super().forward(x)


class Drifting(Fake):
    def forward(self, x: Tensor) -> Tensor:
        self.mean += 1e-7
        return super().forward(x)


@pytest.mark.parametrize("kind", [Learning, Drifting])
def test_an_encoder_that_changes_in_use_is_an_error(kind: type[Fake], pair: tuple[Path, Path]) -> None:
    encoders: Any = {"trained": kind()}
    with pytest.raises(RuntimeError, match="the trained encoder was changed"):
        compare(open_labelled(pair[0], test=pair[1]), encoders)


def test_the_fingerprint_sees_every_bit() -> None:
    plain, other = Fake(), Fake()
    assert fingerprint(plain) == fingerprint(other)
    other.weight.data[0, 1] = -0.0  # equal in value, not in bits
    assert fingerprint(plain) != fingerprint(other)


def test_features_that_are_not_finite_are_an_error(pair: tuple[Path, Path]) -> None:
    broken = Fake()
    broken.weight.data[0, 0] = float("nan")
    encoders: Any = {"trained": broken}
    with pytest.raises(NumbersError, match="the trained encoder"):
        compare(open_labelled(pair[0], test=pair[1]), encoders)


# ---- the split and its guard


def test_an_image_in_both_parts_is_refused_whatever_its_file(tmp_path: Path) -> None:
    images, labels = bright(12)
    names = [f"{'cow' if k == 1 else 'bee' if k else 'ant'}/{i}.png" for i, k in enumerate(labels)]
    files(tmp_path / "train", images, names)
    files(tmp_path / "test", bright(3, seed=5)[0], ["ant/x.png", "bee/y.png", "cow/z.png"])
    labelled = open_labelled(tmp_path)
    encoders: Any = {"trained": Fake()}
    compare(labelled, encoders)
    Image.fromarray(images[4]).save(tmp_path / "test" / "cow" / "other_name.bmp")  # the same pixels in another format
    expected = r"^1 images are in the training part and in the test part, for example cow/4.png and cow/other_name.bmp"
    with pytest.raises(UserError, match=expected):
        compare(open_labelled(tmp_path), encoders)


def test_a_fifth_is_held_back_class_by_class(tmp_path: Path) -> None:
    images, _ = bright(103)
    labels = np.r_[np.zeros(60), np.ones(32), np.full(10, 2), [3]].astype(int)
    labelled = open_labelled(saved(tmp_path / "a.npz", images, labels))
    assert labelled.test is None
    digests = raw_pixels(labelled.images)[1]
    parts = [divided(labelled, digests, seed).test for seed in (0, 0, 1)]
    assert [int(parts[0][labels == c].sum()) for c in range(4)] == [12, 7, 2, 0]  # the only one of its class: training
    assert (parts[0] == parts[1]).all()
    assert (parts[0] != parts[2]).any()
    assert divided(labelled, digests, 4).split == "a fifth held back, class by class, drawn by seed 4"
    values = open_labelled(saved(tmp_path / "b.npz", images, labels + 0.5))
    assert divided(values, digests, 4).split == "a fifth held back, drawn by seed 4"


def test_copies_stay_on_one_side(tmp_path: Path) -> None:
    images, labels = bright(60)
    labelled = open_labelled(saved(tmp_path / "a.npz", np.r_[images, images], np.r_[labels, labels]))
    for seed in range(3):
        test = divided(labelled, raw_pixels(labelled.images)[1], seed).test
        assert test is not None
        assert (test[:60] == test[60:]).all()
        assert test.sum() == 24


# ---- unreadable images, raw pixels


def test_an_unreadable_image_is_left_out_and_the_rest_stay_in_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = bright(90, classes=2, size=24)
    files(tmp_path, images, [f"{'ab'[k]}/{i:02}.png" for i, k in enumerate(labels)])
    target = tmp_path / "a" / "10.png"
    target.write_bytes(target.read_bytes()[:-60])
    labelled = open_labelled(tmp_path)
    encoders: Any = {"trained": Fake()}
    features = features_of(encoders["trained"], labelled.images, 7, "embedding")
    assert np.isnan(features).any(1).sum() == 1
    by_key = {labelled.key(i): i for i in range(len(features))}
    for i in (0, 1, 33, 88, 89):
        row = features[by_key[f"{'ab'[labels[i]]}/{i:02}.png"]]
        assert row == pytest.approx(images[i, :2, :2].reshape(4) / 255, abs=1e-4)
    capsys.readouterr()
    result = compare(labelled, encoders | {"untrained": Fake()})
    assert result["images"]["unreadable"] == 1
    assert result["images"]["train"] + result["images"]["test"] == 89
    assert result["rows"][1]["trained"] > 0.8
    assert capsys.readouterr().err.count("left out a/10.png") == 1  # not once for each encoder


def test_an_unreadable_image_counts_where_the_table_names_it(tmp_path: Path) -> None:
    """Kills: "unreadable" images of the folder that nobody labelled."""
    images, labels = bright(60, classes=2)
    files(tmp_path / "in", images, [f"{i}.png" for i in range(60)])
    for i in (3, 7, 40, 59):
        (tmp_path / "in" / f"{i}.png").write_bytes(b"no picture")
    lines = ["path,label", *(f"{i}.png,{label}" for i, label in enumerate(labels[:40]))]
    (tmp_path / "l.csv").write_text("\n".join(lines) + "\n")
    encoders: Any = {"trained": Fake()}
    result = compare(open_labelled(tmp_path / "l.csv", images=str(tmp_path / "in")), encoders)
    assert result["images"] == {"train": 30, "test": 8, "unreadable": 2}
    assert table(result).splitlines()[0].endswith("; 2 unreadable")


def test_raw_pixels_are_small_images_as_they_are_and_large_ones_made_small(tmp_path: Path) -> None:
    small, _ = bright(5, size=28)
    pixels, digests, how = raw_pixels([open_images(small)])
    assert pixels.dtype == np.float32
    assert (pixels == small.reshape(5, -1).astype(np.float32) / 255).all()
    assert how == "28×28×1, as they are"
    assert len(set(digests)) == 5
    large = np.full((2, 90, 50, 3), 51, np.uint8)
    large[:, :45] = 204
    pixels, digests, how = raw_pixels([open_images(large)])
    assert how == "32×32×3, resized"
    rows = pixels.reshape(2, 32, 32, 3)
    assert rows[:, :15] == pytest.approx(0.8)
    assert rows[:, 17:] == pytest.approx(0.2)
    assert digests[0] == digests[1]
    mixed = files(tmp_path, np.zeros((2, 9, 9), np.uint8), ["a.png", "b.png"])
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(mixed / "c.png")
    assert raw_pixels([open_images(mixed)])[2] == "32×32×1, resized"
    deep = np.full((2, 4, 4), 65535, np.uint16)
    assert (raw_pixels([open_images(deep)])[0] == 1).all()


# ---- where labels come from


def test_the_sample_brings_its_own_test_set() -> None:
    labelled = open_labelled("sample")
    assert [len(images) for images in labelled.images] == [8000, 2000]
    assert labelled.test is not None
    assert labelled.test.sum() == 2000
    assert labelled.targets.names[::3] == ["T-shirt/top", "Dress", "Shirt", "Ankle boot"]
    assert np.bincount(labelled.targets.values[labelled.test]).min() > 150
    assert labelled.key(7999) == "7999"
    assert labelled.key(8001) == "1"


@pytest.mark.parametrize("word", ["test", "val"])
def test_folders_of_class_folders(tmp_path: Path, word: str) -> None:
    images, _ = bright(5)
    files(tmp_path / "train", images[:3], ["ant/a.png", "bee/b.png", "cow/c.png"])
    files(tmp_path / word, images[3:], ["cow/d.png", "bee/e.png"])
    labelled = open_labelled(tmp_path)
    assert labelled.targets.names == ["ant", "bee", "cow"]
    assert labelled.targets.values.tolist() == [0, 1, 2, 1, 2]  # e.png is a bee though bee is class 0 of the test set
    assert labelled.test is not None
    assert labelled.test.tolist() == [False] * 3 + [True] * 2
    files(tmp_path / word, images[:1], ["dog/f.png"])
    with pytest.raises(UserError, match="'dog', which no training image is labelled with"):
        open_labelled(tmp_path)


def test_a_csv_with_a_split(tmp_path: Path) -> None:
    files(tmp_path / "in", bright(4)[0], ["a.png", "b.png", "c.png", "d.png"])
    csv = tmp_path / "labels.csv"
    csv.write_text("path,label,split\nc.png,x,test\na.png,y,train\nb.png,x,train\nd.png,y,test\n")
    labelled = open_labelled(csv, images=str(tmp_path / "in"))
    assert [labelled.key(i) for i in range(4)] == ["a.png", "b.png", "c.png", "d.png"]
    assert [labelled.targets.names[k] for k in labelled.targets.values] == ["y", "x", "x", "y"]
    assert labelled.test is not None
    assert labelled.test.tolist() == [False, False, True, True]
    with pytest.raises(UserError, match="has a column split"):
        open_labelled(csv, images=str(tmp_path / "in"), test="sample")
    csv.write_text(csv.read_text().replace(",train", ", Train").replace(",test", ", TEST "))
    again = open_labelled(csv, images=str(tmp_path / "in"))
    assert again.test is not None
    assert again.test.tolist() == [False, False, True, True]
    csv.write_text(csv.read_text().replace("Train", "learn"))
    with pytest.raises(UserError, match="says learn, test: it should say train and test"):
        open_labelled(csv, images=str(tmp_path / "in"))


def test_a_csv_beside_its_images_needs_no_folder(tmp_path: Path) -> None:
    files(tmp_path, bright(3)[0], ["in/a.png", "in/b.png", "in/c.png"])
    (tmp_path / "labels.csv").write_text("path,label\nin/c.png,x\nin/a.png,y\n")
    labelled = open_labelled(tmp_path / "labels.csv")
    assert [labelled.key(i) for i in range(2)] == ["in/c.png", "in/a.png"]
    assert [labelled.targets.names[k] for k in labelled.targets.values] == ["x", "y"]


def test_values_and_several_labels(tmp_path: Path) -> None:
    images, _ = bright(200)
    level = images[:, 0, 0] / 255 - images[:, 1, 1] / 300
    files(tmp_path / "in", images, [f"{i}.png" for i in range(200)])
    lines = [f"{i}.png,{value}" for i, value in enumerate(level)]
    (tmp_path / "v.csv").write_text("\n".join(["path,value", *lines]) + "\n")
    dark, left = level < 0.1, images[:, 0, 1] > 90
    words = [("dark;" if a else "") + (" left " if b else "") for a, b in zip(dark, left, strict=True)]
    lines = [f"{i}.png,{some}" for i, some in enumerate(words)]
    (tmp_path / "l.csv").write_text("\n".join(["path,labels", *lines]) + "\n")
    encoders: Any = {"trained": Fake(), "untrained": Fake(noise=5.0)}
    for file, measure in (("v.csv", "R²"), ("l.csv", "mean average precision")):
        labelled = open_labelled(tmp_path / file, images=str(tmp_path / "in"))
        result = compare(labelled, encoders)
        assert result["rows"][0]["unit"] == measure
        assert result["rows"][0]["trained"] > 0.95
        assert result["rows"][0]["untrained"] < 0.7
        assert f"linear (160 labels)  {result['rows'][0]['trained']:.3f}" in table(result)
        json.dumps(result, allow_nan=False)
    assert labelled.targets.names == ["dark", "left"]
    (tmp_path / "v.csv").write_text((tmp_path / "v.csv").read_text().replace(f"7.png,{level[7]}", "7.png,much"))
    with pytest.raises(UserError, match=r"holds .*, which is not a number \(such as 1.5\)"):
        open_labelled(tmp_path / "v.csv", images=str(tmp_path / "in"))


@pytest.mark.parametrize("column", ["ndvi", "label"])
def test_measurements_are_no_classes(tmp_path: Path, column: str) -> None:
    """Kills: accuracy over hundreds of classes, each of one image, where a column of numbers is not called value."""
    files(tmp_path / "in", bright(20)[0], [f"{i}.png" for i in range(20)])

    def opened(values: Sequence[object]) -> Any:
        rows = [f"{i}.png;{value}" for i, value in enumerate(values)]
        (tmp_path / "l.csv").write_text("\n".join([f"path;{column}", *rows]))
        return open_labelled(tmp_path / "l.csv", images=str(tmp_path / "in")).targets

    sentence = f"the column {column} of .*l.csv holds numbers, most of .* name it 'value' to predict them, or write"
    measured = [i / 8 for i in range(20)]
    for values in (measured, [f"{value},5" for value in range(20)], [*measured[:11], *["nan"] * 9]):
        with pytest.raises(UserError, match=sentence):
            opened(values)
    for classes in (
        [0.5, 1.5, 2.5, 3.5] * 5,
        range(20),
        [f"{i}.0" for i in range(20)],
        [f"tray {i}.5" for i in range(20)],
    ):
        assert opened(classes).kind == "classes"


@pytest.mark.parametrize("start", [0.0, 1.7e9, 1e39])
def test_values_are_read_with_all_their_digits(tmp_path: Path, start: float) -> None:
    """Kills: seconds since 1970 that are all the same, 1e39 that is inf."""
    images, _ = bright(200)
    values = start + images[:, 0, 0] / 255 * (start if start > 1e30 else 1)
    files(tmp_path / "in", images, [f"{i}.png" for i in range(200)])
    rows = [f"{i}.png,{value!r}" for i, value in enumerate(values.tolist())]
    (tmp_path / "v.csv").write_text("\n".join(["path,value", *rows]) + "\n")
    of_csv = open_labelled(tmp_path / "v.csv", images=str(tmp_path / "in"))
    assert sorted(of_csv.targets.values[:, 0]) == sorted(values)
    of_npz = open_labelled(saved(tmp_path / "v.npz", images, values))
    assert (of_npz.targets.values[:, 0] == values).all()
    for labelled in (of_csv, of_npz):
        encoders: Any = {"trained": Fake()}
        assert compare(labelled, encoders)["rows"][0]["trained"] > 0.95


def test_what_an_npz_holds_says_what_kind_of_labels(tmp_path: Path) -> None:
    images, labels = bright(20)
    assert open_labelled(saved(tmp_path / "c.npz", images, labels + 5)).targets.names == ["5", "6", "7"]
    values = open_labelled(saved(tmp_path / "v.npz", images, labels * 0.5)).targets
    assert (values.kind, values.values.shape) == ("values", (20, 1))
    several = open_labelled(saved(tmp_path / "l.npz", images, np.eye(3, dtype=int)[labels])).targets
    assert (several.kind, several.values.shape, several.values.dtype) == ("labels", (20, 3), np.dtype(bool))
    with pytest.raises(UserError, match="labels of another kind"):
        open_labelled(tmp_path / "c.npz", test=tmp_path / "v.npz")
    with pytest.raises(UserError, match="20 images and labels for 7"):
        open_labelled(saved(tmp_path / "n.npz", images, np.ones(7) / 2))
    with pytest.raises(UserError, match="give integers"):
        open_labelled(saved(tmp_path / "w.npz", images, np.full((20, 2), 9)))


def test_an_npz_can_name_its_classes(tmp_path: Path) -> None:
    images, labels = bright(20)
    names = np.array(["low", "middle", "high", "never"])
    np.savez(tmp_path / "a.npz", images=images, labels=labels * 2, names=names)
    with pytest.raises(UserError, match="has 4 names, but labels from 0 to 4"):
        open_labelled(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", images=images, labels=labels, names=names)
    assert open_labelled(tmp_path / "a.npz").targets.names == ["low", "middle", "high"]
    np.savez(tmp_path / "b.npz", images=images[::3], labels=labels[::3] + 2, names=names)
    both = open_labelled(tmp_path / "a.npz", test=tmp_path / "b.npz").targets
    assert both.values.tolist() == [*labels, *[2] * 7]
    np.savez(tmp_path / "c.npz", images=images, labels=np.eye(4, dtype=int)[labels], names=names)
    assert open_labelled(tmp_path / "c.npz").targets.names == names.tolist()
    for wrong in (np.arange(3), names[None], names[[0, 0, 1]], np.array(["a", None, "b"])):
        np.savez(tmp_path / "d.npz", images=images, labels=labels, names=wrong)
        with pytest.raises(UserError, match=r"names in .* should be texts"):
            open_labelled(tmp_path / "d.npz")
    np.savez(tmp_path / "e.npz", pictures=images, labels=labels, names=names)
    assert len(open_images(tmp_path / "e.npz")) == 20


def test_labels_for_nothing_are_one_sentence(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    files(tmp_path / "in", bright(3)[0], ["a.png", "b.png", "c.png"])
    (tmp_path / "other.csv").write_text("path,label\nx.png,1\ny.png,2\n")
    with pytest.raises(UserError, match="is one of the 3 images") as error:
        open_labelled(tmp_path / "other.csv", images=str(tmp_path / "in"))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="lie in no class folder"):
        open_labelled(tmp_path / "in")
    with pytest.raises(UserError, match="give images only with a CSV"):
        open_labelled(pair[0], images=str(tmp_path / "in"))
    np.save(tmp_path / "plain.npy", bright(5)[0])
    with pytest.raises(UserError, match="carries no labels"):
        open_labelled(tmp_path / "plain.npy")
    with pytest.raises(UserError, match="no file or folder"):
        open_labelled(tmp_path / "nowhere")
    encoders: Any = {"trained": Fake()}
    with pytest.raises(UserError, match="all training images are of class 0: there is nothing to tell apart"):
        compare(open_labelled(saved(tmp_path / "one.npz", bright(20)[0], np.zeros(20, int))), encoders)
    with pytest.raises(UserError, match="1 images to train on and 0 to test on"):
        compare(open_labelled(saved(tmp_path / "single.npz", bright(1)[0], np.zeros(1, int))), encoders)


def test_labels_that_tell_nothing_apart_are_one_sentence(tmp_path: Path) -> None:
    """Kills: a perfect figure for labels that are all the same."""
    files(tmp_path / "in", bright(20)[0], [f"{i}.png" for i in range(20)])
    encoders: Any = {"trained": Fake()}
    for header, label, sentence in (
        ("path\tlabels", "a;b", "all training images have the same labels: there is nothing to tell apart"),
        ("path\tvalue", "1.5", "all training images have the same labels"),
        (
            "path\tlabel",
            None,
            "each of the 20 labels, such as 0.tif, is on one image alone, so that none is left to test",
        ),
    ):
        rows = [header, *(f"{i}.png\t{label or f'{i}.tif'}" for i in range(20))]
        (tmp_path / "l.tsv").write_text("\n".join(rows))
        with pytest.raises(UserError, match=sentence):
            compare(open_labelled(tmp_path / "l.tsv", images=str(tmp_path / "in")), encoders)
    (tmp_path / "l.tsv").write_text("path;value\n0.png;1,5\n")
    with pytest.raises(UserError, match=r"holds '1,5', which is not a number \(such as 1.5\)"):
        open_labelled(tmp_path / "l.tsv", images=str(tmp_path / "in"))
    (tmp_path / "l.tsv").write_text("path;value\n")
    with pytest.raises(UserError, match=r"l.tsv holds names of columns and no rows"):
        open_labelled(tmp_path / "l.tsv", images=str(tmp_path / "in"))


def test_evaluate_needs_an_encoder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run folder"):
        evaluate(tmp_path, "sample")


# ---- fine-tuning


def test_fine_tuning_learns_leaves_the_encoder_alone_and_stands_beside_training_from_scratch(
    run: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "LEAST", 30)
    monkeypatch.setattr(finetune, "EPOCHS", 6)
    before = fingerprint(load_encoder(run))
    result = evaluate(run, pair[0], test=pair[1], fine_tune=True)
    few, every = result["rows"][-2:]
    assert [few["protocol"], every["protocol"]] == ["fine-tuned, 10 % of labels", "fine-tuned"]
    assert result["training_labels"]["fine-tuned, 10 % of labels"] == 30
    assert every["trained"] > 0.6  # chance is a third; the labels themselves are wrong in three of a hundred
    for name in ("trained", "untrained"):  # the second is a supervised network from scratch
        low, high = every["intervals"][name]
        assert low <= every[name] <= high
        assert np.sum(result["details"][name]["fine-tuned"]["confusion"]) == 120
    assert "raw pixels" not in every
    assert "fine-tuned (300 labels)" in table(result)
    assert fingerprint(load_encoder(run)) == before == result["weights"]["trained"]


def test_fine_tuning_is_the_same_again_and_never_sees_the_test_part(
    run: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "LEAST", 3)
    monkeypatch.setattr(finetune, "EPOCHS", 0)
    labelled = open_labelled(pair[0], test=pair[1])
    values, rows = labelled.targets.values, np.arange(100)
    made = []
    for labels in (values, values, np.where(np.arange(len(values)) < 100, values, 0)):
        network = finetune.fine_tuned(load_encoder(run), labelled.images[0], rows, labels[rows], 3)
        made.append(fingerprint(network))
    assert made[0] == made[1] == made[2]
    assert made[0] != fingerprint(
        finetune.fine_tuned(load_encoder(run), labelled.images[0], rows, values[rows], 3, seed=1)
    )


def test_fine_tuning_needs_classes(run: Path, tmp_path: Path) -> None:
    images, _ = bright(60)
    values = saved(tmp_path / "v.npz", images, np.random.default_rng(0).random(60))
    with pytest.raises(UserError, match="--fine-tune"):
        evaluate(run, values, fine_tune=True)


def test_images_of_a_run_that_are_not_there_are_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text('images = "photos"\n')
    (tmp_path / "l.csv").write_text("path,label\na.png,x\n")
    with pytest.raises(UserError, match=r"run was trained on photos, which is not there .*--images"):
        images_of_run(tmp_path / "run", tmp_path / "l.csv")
