"""The set T: what is drawn, against torchvision's algorithm and binomial bounds."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from barlow.crops import Draws
from barlow.draws import uniforms
from barlow.errors import UserError
from barlow.views import PRESETS, View, apply_own, draw, generator, suggest

N = 20000
DEVIATIONS = 4.5  # of a binomial: a right frequency is outside with a chance of 7e-6, and draws are the same each time


def drawn(view: View, n: int = N, number: int = 0, size: tuple[int, int] = (60, 80), channels: int = 3, seed: int = 0):
    return draw(view, seed, np.zeros(n, np.int64), np.arange(n), number, np.tile(size, (n, 1)), channels)


def assert_frequency(happened: np.ndarray, probability: float) -> None:
    assert abs(happened.mean() - probability) <= DEVIATIONS * math.sqrt(probability * (1 - probability) / len(happened))


def assert_uniform(values: np.ndarray, low: float, high: float) -> None:
    """Kolmogorov-Smirnov: the largest gap to the uniform distribution is under 2.3 / sqrt(n), a chance of 5e-5."""
    assert low <= values.min()
    assert values.max() <= high
    ranks = np.arange(1, len(values) + 1) / len(values)
    assert np.abs(ranks - (np.sort(values) - low) / (high - low)).max() < 2.3 / math.sqrt(len(values))


def test_natural_is_the_papers_pair():
    a, b = PRESETS["natural"]
    shared = View(
        crop=(0.08, 1), ratio=(3 / 4, 4 / 3), flip=0.5, flip_vertical=0, turn=0, jitter=0.8, brightness=0.4,
        contrast=0.4, saturation=0.2, hue=0.1, gain=0, offset=0, gray=0.2, sigma=(0.1, 2.0),
    )  # fmt: skip
    assert a == replace(shared, blur=1.0, solarize=0.0)
    assert b == replace(shared, blur=0.1, solarize=0.2)
    assert b.threshold == 0.5  # bytes of 128 and more


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("number", [0, 1])
def test_everything_happens_as_often_as_the_view_says(preset: str, number: int):
    view = PRESETS[preset][number]
    colour = preset not in ("grayscale", "many-channel")
    d = drawn(view, number=number, channels=3 if colour else 5)
    assert_frequency(d.flip, view.flip)
    assert_frequency(d.flip_vertical, view.flip_vertical)
    assert_frequency(d.turn > 0, view.turn)
    assert_frequency(d.brightness != 1, view.jitter)
    assert_frequency(d.gray, view.gray)
    assert_frequency(d.sigma > 0, view.blur)
    assert_frequency(np.isfinite(d.solarize), view.solarize)
    assert_frequency(d.flip & d.gray, view.flip * view.gray)  # independent of one another
    assert_frequency((d.sigma > 0) & np.isfinite(d.solarize), view.blur * view.solarize)
    if view.turn:
        for k in range(4):
            assert_frequency(d.turn == k, view.turn / 3 if k else 1 - view.turn)


def test_strengths_are_uniform_and_jitter_is_all_or_nothing():
    view = replace(PRESETS["natural"][0], gain=0.3, offset=0.1)
    d = drawn(view)
    jitter = d.brightness != 1
    for values, strength, middle in (
        (d.brightness, 0.4, 1),
        (d.contrast, 0.4, 1),
        (d.saturation, 0.2, 1),
        (d.hue, 0.1, 0),
        (d.gain[:, 2], 0.3, 1),
        (d.offset[:, 1], 0.1, 0),
    ):
        assert_uniform(values[jitter], middle - strength, middle + strength)
        assert (values[~jitter] == middle).all()
    assert_uniform(d.sigma[d.sigma > 0], 0.1, 2.0)
    together = np.corrcoef(np.stack([v[jitter] for v in (d.brightness, d.contrast, d.saturation, d.hue, d.sigma)]))
    assert np.abs(together - np.eye(5)).max() < DEVIATIONS / math.sqrt(jitter.sum())


def test_every_draw_is_independent_of_every_other():
    often = {"flip": 0.5, "flip_vertical": 0.5, "turn": 0.75, "jitter": 1, "gray": 0.5, "blur": 0.5, "solarize": 0.5}
    often["erase"] = 1
    ranges = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "gain": 0.2, "offset": 0.1}
    d = drawn(View(crop=(0.3, 0.6), **often, **ranges), size=(400, 400))
    share = d.box[:, :2] / (401 - d.box[:, 2:])  # where in the room that the box leaves
    columns = [*share.T, d.box[:, 2], d.flip, d.flip_vertical, d.turn % 2, d.turn // 2, d.gray, d.sigma > 0]
    columns += [*(d.erased[:, :2] / (1 - d.erased[:, 2:])).T, d.erased[:, 2] * d.erased[:, 3], *d.level.T]
    columns += [np.isfinite(d.solarize), d.brightness, d.contrast, d.saturation, d.hue, *d.gain.T, *d.offset.T]
    gap = np.corrcoef(np.array(columns, float)) - np.eye(len(columns))
    assert np.abs(gap).max() < DEVIATIONS / math.sqrt(N)


def test_without_three_channels_there_is_no_colour():
    for channels in (1, 2, 4, 13):
        d = drawn(PRESETS["natural"][0], 100, channels=channels)
        assert (d.saturation == 1).all()
        assert (d.hue == 0).all()
        assert not d.gray.any()
        assert d.gain.shape == d.offset.shape == (100, channels)


def box_by_hand(view: View, u: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop.get_params in plain Python, fed with the uniform numbers of one image."""
    for k in range(10):
        area = height * width * (view.crop[0] + (view.crop[1] - view.crop[0]) * u[k])
        low, high = math.log(view.ratio[0]), math.log(view.ratio[1])
        ratio = math.exp(low + (high - low) * u[10 + k])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(u[20] * (width - w + 1)), int(u[21] * (height - h + 1)), w, h
    w, h = width, height
    if width / height < view.ratio[0]:
        h = round(width / view.ratio[0])
    elif width / height > view.ratio[1]:
        w = round(height * view.ratio[1])
    return (width - w) // 2, (height - h) // 2, w, h


@pytest.mark.parametrize("size", [(60, 80), (28, 28), (500, 90), (90, 500), (3, 3), (1, 7)])
@pytest.mark.parametrize("crop", [(0.08, 1.0), (0.9, 1.0), (0.2, 0.2)])
def test_boxes_are_torchvisions(size: tuple[int, int], crop: tuple[float, float]):
    view = View(crop=crop, ratio=(3 / 4, 4 / 3))
    u = uniforms(0, 0, np.arange(300), 0, 22)
    assert drawn(view, 300, size=size).box.tolist() == [list(box_by_hand(view, row, *size)) for row in u]


@pytest.mark.parametrize("size", [(60, 80), (100, 100), (40, 120)])
def test_boxes_are_distributed_as_torchvisions(size: tuple[int, int]):
    height, width = size
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1], [3 / 4, 4 / 3]) for _ in range(4000)])
    ours = drawn(PRESETS["natural"][0], size=size).box[:, [1, 0, 3, 2]]
    for k in range(4):
        points = np.arange(max(size) + 1)
        gap = [(column[:, None] <= points).mean(axis=0) for column in (ours[:, k], theirs[:, k])]
        assert np.abs(gap[0] - gap[1]).max() < 2.3 * math.sqrt(1 / len(ours) + 1 / len(theirs))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20000), st.integers(1, 20000)), min_size=1, max_size=8),
    st.floats(0.001, 1),
    st.floats(0.05, 1),
    st.integers(0, 2**64 - 1),
)
def test_a_box_lies_in_its_image(sizes: list[tuple[int, int]], crop: float, ratio: float, seed: int):
    view = View(crop=(crop, 1), ratio=(ratio, 1 / ratio))
    n = len(sizes)
    x, y, w, h = draw(view, seed, np.zeros(n, np.int64), np.arange(n), 0, np.array(sizes), 1).box.T
    assert (x >= 0).all()
    assert (y >= 0).all()
    assert (w >= 1).all()
    assert (h >= 1).all()
    assert (x + w <= np.array(sizes)[:, 1]).all()
    assert (y + h <= np.array(sizes)[:, 0]).all()


def test_a_plain_view_is_the_central_square():
    d = drawn(View(), 5, size=(60, 80))
    assert d.box.tolist() == [[10, 0, 60, 60]] * 5
    for happened in (d.flip, d.flip_vertical, d.turn, d.gray, d.sigma, np.isfinite(d.solarize)):
        assert not happened.any()
    assert (d.brightness == 1).all()


def rows(d: Draws) -> list[np.ndarray]:
    return [v for v in vars(d).values() if isinstance(v, np.ndarray)]


def test_what_is_drawn_for_an_image_depends_on_no_other():
    view, sizes = PRESETS["overhead"][1], np.random.default_rng(0).integers(20, 200, (50, 2))
    epochs, images = np.arange(50) // 20, np.arange(50) * 17
    whole = draw(view, 3, epochs, images, 1, sizes, 3)
    some = np.array([30, 2, 49, 7])
    part = draw(view, 3, epochs[some], images[some], 1, sizes[some], 3)
    for a, b in zip(rows(part), rows(whole[some]), strict=True):
        assert np.array_equal(a, b)
    for other in (
        draw(view, 4, epochs, images, 1, sizes, 3),
        draw(view, 3, epochs + 1, images, 1, sizes, 3),
        draw(view, 3, epochs, images, 0, sizes, 3),
    ):
        assert not np.array_equal(other.box, whole.box)
        assert not np.array_equal(other.brightness, whole.brightness)


def test_a_changed_probability_changes_nothing_else():
    changed = replace(PRESETS["natural"][0], gray=0.9, blur=0.3, flip=0.1, erase=0.5)
    a, b = drawn(PRESETS["natural"][0], 200), drawn(changed, 200)
    for name in ("box", "brightness", "hue", "turn", "solarize", "gain", "offset"):
        assert np.array_equal(getattr(a, name), getattr(b, name))
    assert np.array_equal(a.sigma[b.sigma > 0], b.sigma[b.sigma > 0])


def test_what_is_painted_over_lies_inside_and_has_the_area_asked_for():
    d = drawn(View(erase=0.4, erased=(0.05, 0.3)), channels=2)
    x, y, w, h = d.erased[d.erased[:, 2] > 0].T
    assert_frequency(d.erased[:, 2] > 0, 0.4)
    assert_uniform(w * h, 0.05, 0.3)
    assert_uniform(np.log(w / h), -math.log(3.3), math.log(3.3))
    for start, length in ((x, w), (y, h)):
        assert_uniform(start / (1 - length), 0, 1)
    assert_uniform(d.level[:, 1], 0, 1)
    assert (d.erased[d.erased[:, 2] == 0] == 0).all()


def test_any_number_of_views():
    boxes = [drawn(PRESETS["small"][k % 2], 300, number=k).box for k in range(6)]
    assert len({box.tobytes() for box in boxes}) == 6


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"flip": 1.1}, "flip is 1.1"),
        ({"jitter": -0.1}, "jitter is -0.1"),
        ({"blur": math.nan}, "blur is nan"),
        ({"hue": 0.6}, "hue is 0.6.*0.5"),
        ({"brightness": 2.0}, "brightness"),
        ({"crop": (0.0, 1.0)}, "crop is"),
        ({"crop": (0.5, 1.5)}, "crop is"),
        ({"crop": (0.9, 0.5)}, "smaller one first"),
        ({"ratio": (0.0, 1.0)}, "ratio is"),
        ({"ratio": (1.0, math.inf)}, "ratio is"),
        ({"sigma": (0.0, 2.0)}, "sigma is"),
        ({"sigma": (1.0,)}, "sigma is"),
        ({"threshold": 128}, "threshold is 128"),
        ({"erase": 2}, "erase is 2"),
        ({"erased": (0.2, 1.2)}, "erased is"),
        ({"flip": "often"}, "flip is often"),  # as a TOML file may say
        ({"crop": 0.5}, "crop is 0.5; it needs two numbers"),
        ({"crop": ("small", "large")}, "crop is"),
    ],
)
def test_a_view_that_cannot_be_is_refused(wrong: dict, words: str):
    with pytest.raises(UserError, match=words):
        View(**wrong)


@pytest.mark.parametrize(
    ("channels", "size", "preset"),
    [(3, 224, "natural"), (3, 65, "natural"), (3, 64, "small"), (1, 28, "grayscale"), (1, 512, "grayscale")]
    + [(k, 64, "many-channel") for k in (2, 4, 13)],
)
def test_a_preset_is_suggested_with_its_reason(channels: int, size: int, preset: str):
    name, reason = suggest(channels, size)
    assert name == preset
    assert reason
    assert name in PRESETS


def test_a_generator_is_the_address_of_its_batch():
    def numbers(*address) -> list[float]:
        return torch.rand(4, generator=generator(*address)).tolist()

    images = np.array([5, 1, 9])
    first = numbers(0, np.zeros(3, np.int64), images, 1)
    assert numbers(0, np.zeros(3, np.int64), images, 1) == first
    assert first == pytest.approx([0.2, 0.2, 0.2, 0.2], abs=1)
    others = [
        numbers(1, np.zeros(3, np.int64), images, 1),
        numbers(0, np.ones(3, np.int64), images, 1),
        numbers(0, np.zeros(3, np.int64), images[::-1], 1),
        numbers(0, np.zeros(2, np.int64), images[:2], 1),
        numbers(0, np.zeros(3, np.int64), images, 0),
    ]
    assert len({tuple(v) for v in (first, *others)}) == 6


def test_a_users_own_view():
    crops = torch.randint(0, 256, (4, 8, 8, 2), dtype=torch.uint8)
    seen = []

    def noise(images: torch.Tensor, g: torch.Generator) -> torch.Tensor:
        seen.append(images)
        return images + 0.1 * torch.rand(images.shape, generator=g)

    def g() -> torch.Generator:
        return generator(0, np.zeros(4, np.int64), np.arange(4), 0)

    made = apply_own(noise, crops, g(), (0.5, 0.4), (0.2, 0.3))
    assert torch.equal(seen[0], crops.permute(0, 3, 1, 2) / 255)
    expected = seen[0] + 0.1 * torch.rand(seen[0].shape, generator=g())
    expected = (expected - torch.tensor([0.5, 0.4])[:, None, None]) / torch.tensor([0.2, 0.3])[:, None, None]
    assert torch.allclose(made, expected, atol=1e-6)
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert made.dtype == torch.float32
    for wrong in (lambda x, g: x[:, :1], lambda x, g: x.numpy(), lambda x, g: (x * 255).byte()):
        with pytest.raises(UserError, match="your own view returned"):
            apply_own(wrong, crops, g(), (0.5, 0.4), (0.2, 0.3))
