"""Addressed randomness: the generator against published vectors, its statistics, and the keyed order of an epoch."""

from __future__ import annotations

from collections import Counter
from math import factorial, sqrt

import numpy as np
import pytest

from barlow.draws import order, philox, stream, uniforms
from barlow.errors import UserError

# Bounds are in standard deviations. Everything is deterministic, so a test either always passes or never does; the
# chance that a perfect generator exceeds 5 deviations in one of the few hundred numbers below is under 1e-3.
DEVIATIONS = 5.0


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]):
    words = philox(tuple(np.array([w], np.uint64) for w in counter), key[1] << 32 | key[0])
    assert tuple(int(w[0]) for w in words) == expected


def test_a_draw_depends_on_its_own_address_only():
    images = np.arange(100)
    whole = uniforms(7, 2, images, 1, 9)
    some = np.array([41, 3, 99])
    assert np.array_equal(uniforms(7, np.array([2, 2, 2]), some, 1, 5), whole[some, :5])
    assert np.array_equal(uniforms(7, np.where(images % 2, 2, 8), images, 1, 9)[1::2], whole[1::2])
    for other in (uniforms(8, 2, images, 1, 9), uniforms(7, 3, images, 1, 9), uniforms(7, 2, images, 0, 9)):
        assert not np.isin(other, whole).any()


def test_the_bits_of_a_draw_are_the_same_on_every_machine():
    expected = [0.4541662082954745, 0.5333476982292052, 0.12677835373640767]
    assert uniforms(1, 2, np.array([3]), 4, 3)[0].tolist() == expected
    assert uniforms(2**64 - 1, 2**32 - 1, np.array([2**62]), 32767, 1)[0].tolist() == [0.2557600829639505]
    assert order(1, 2, 1000, np.arange(5)).tolist() == [456, 174, 138, 131, 424]


@pytest.fixture(scope="module")
def many() -> np.ndarray:
    """Draws of (3 epochs, 2 views, 8,000 images, 8 places)."""
    images = np.arange(8000)
    return np.array([[uniforms(0, epoch, images, view, 8) for view in range(2)] for epoch in range(3)])


def test_no_draw_is_repeated_over_three_epochs(many: np.ndarray):
    assert len(np.unique(many)) == many.size  # 53 bits: a perfect generator fails this with a chance of 1e-5
    assert many.min() >= 0
    assert many.max() < 1


def test_draws_are_uniform_at_every_place_and_for_every_image(many: np.ndarray):
    for rows in (*np.moveaxis(many, 3, 0), *many.reshape(6, -1)):
        counts = np.histogram(rows, bins=100, range=(0, 1))[0]
        chi = ((counts - rows.size / 100) ** 2 / (rows.size / 100)).sum()
        assert abs(chi - 99) < DEVIATIONS * sqrt(2 * 99)
    per_image = many.mean(axis=(0, 1, 3))  # 48 draws of each image
    assert abs(per_image.std() * sqrt(48 * 12) - 1) < DEVIATIONS / sqrt(2 * 8000)


def test_the_low_bits_of_a_draw_are_as_good_as_the_high_ones(many: np.ndarray):
    bits = (many.ravel() * 2.0**53).astype(np.uint64)
    for k in range(53):
        share = (bits >> np.uint64(k) & np.uint64(1)).mean()
        assert abs(share - 0.5) < DEVIATIONS * 0.5 / sqrt(bits.size)


@pytest.mark.parametrize("axis", [0, 1, 2, 3], ids=["epoch", "view", "image", "place"])
def test_neighbours_are_uncorrelated(many: np.ndarray, axis: int):
    a = np.take(many, range(many.shape[axis] - 1), axis).ravel()
    b = np.take(many, range(1, many.shape[axis]), axis).ravel()
    for x, y in ((a, b), (a, 1 - b), ((a - 0.5) ** 2, (b - 0.5) ** 2), (a % 0.01, b % 0.01)):
        assert abs(np.corrcoef(x, y)[0, 1]) < DEVIATIONS / sqrt(len(a))


def test_neighbouring_seeds_are_uncorrelated():
    a, b = (uniforms(seed, 0, np.arange(20000), 0, 4).ravel() for seed in (5, 6))
    assert abs(np.corrcoef(a, b)[0, 1]) < DEVIATIONS / sqrt(len(a))


def test_an_order_holds_every_image_once():
    for length in (*range(1, 301), 1000, 4096, 4097, 65536, 99991, 300_000):
        found = order(3, 1, length, np.arange(length))
        assert np.array_equal(np.sort(found), np.arange(length)), length


@pytest.mark.parametrize("length", [10**9 + 7, 2**40, 2**61 - 1])
def test_a_huge_order_needs_no_list_of_images(length: int):
    positions = np.unique(np.random.default_rng(0).integers(0, length, 20000))
    found = order(3, 1, length, positions)
    assert found.min() >= 0
    assert found.max() < length
    assert len(np.unique(found)) == len(positions)
    assert abs(found.mean() / length - 0.5) < DEVIATIONS / sqrt(12 * len(found))


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_every_order_of_a_few_images_is_equally_likely(length: int):
    epochs = 200 * factorial(length)
    positions = np.tile(np.arange(length), epochs)
    found = order(11, np.repeat(np.arange(epochs), length), length, positions).reshape(epochs, length)
    counts = Counter(map(tuple, found.tolist()))
    assert len(counts) == factorial(length)
    chi = sum((k - 200) ** 2 / 200 for k in counts.values())
    assert abs(chi - (factorial(length) - 1)) < DEVIATIONS * sqrt(2 * (factorial(length) - 1))


@pytest.mark.parametrize("length", [50, 1000, 8000])
def test_an_order_looks_random(length: int):
    epochs = 400 if length < 8000 else 60
    positions = np.tile(np.arange(length), epochs)
    found = order(0, np.repeat(np.arange(epochs), length), length, positions).reshape(epochs, length)
    fixed = (found == np.arange(length)).sum(axis=1)  # Poisson of mean 1
    assert abs(fixed.mean() - 1) < DEVIATIONS / sqrt(epochs)
    again = (found[1:] == found[:-1]).sum(axis=1)  # and so is what two epochs have in common
    assert abs(again.mean() - 1) < DEVIATIONS / sqrt(epochs)
    for x, y in ((found[:, :-1], found[:, 1:]), (found[:-1], found[1:])):
        assert abs(np.corrcoef(x.ravel(), y.ravel())[0, 1] + 1 / length) < DEVIATIONS / sqrt(x.size)
    first = np.histogram(found[:, 0], bins=10, range=(0, length))[0]
    assert abs(((first - epochs / 10) ** 2 / (epochs / 10)).sum() - 9) < DEVIATIONS * sqrt(18)


def test_an_order_is_found_position_by_position():
    whole = order(5, 9, 777, np.arange(777))
    some = np.array([700, 0, 3])
    assert np.array_equal(order(5, 9, 777, some), whole[some])
    mixed = order(5, np.array([9, 10, 9]), 777, some)
    assert np.array_equal(mixed[[0, 2]], whole[some[[0, 2]]])
    assert not np.array_equal(order(5, 10, 777, np.arange(777)), whole)
    assert not np.array_equal(order(6, 9, 777, np.arange(777)), whole)


def test_the_stream_is_epoch_after_epoch_whatever_the_batches():
    length, batch = 10, 7
    parts = [stream(1, start, batch, length) for start in range(0, 70, batch)]
    epochs, images = (np.concatenate(p) for p in zip(*parts, strict=True))
    assert np.array_equal(epochs, np.repeat(np.arange(7), 10))
    for epoch in range(7):
        assert np.array_equal(images[epochs == epoch], order(1, epoch, length, np.arange(length)))
    late = stream(1, 35, 14, length)
    assert np.array_equal(late[1], images[35:49])
    one = stream(1, 5, 3, 1)
    assert one[0].tolist() == [5, 6, 7]
    assert one[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: uniforms(-1, 0, np.arange(2), 0, 1), "seed -1"),
        (lambda: uniforms(2**64, 0, np.arange(2), 0, 1), "seed"),
        (lambda: uniforms(0, 0, np.array([-1]), 0, 1), "negative"),
        (lambda: uniforms(0, -1, np.array([1]), 0, 1), "negative"),
        (lambda: uniforms(0, 2**32, np.array([1]), 0, 1), "epochs"),
        (lambda: uniforms(0, 0, np.array([1]), 32768, 1), "view 32768"),
        (lambda: uniforms(0, 0, np.array([1]), 0, 131073), "131073 draws"),
        (lambda: order(0, 0, 0, np.array([0])), "positions"),
        (lambda: order(0, 0, 5, np.array([5])), "0 to 4"),
        (lambda: order(0, 0, 5, np.array([-1])), "0 to 4"),
    ],
)
def test_an_address_that_does_not_exist_is_refused(call, words: str):
    with pytest.raises(UserError, match=words):
        call()


def test_no_images_no_draws():
    nothing = np.arange(0)
    assert uniforms(0, 0, nothing, 0, 3).shape == (0, 3)
    assert order(0, 0, 5, nothing).shape == (0,)
