"""Addressed randomness: every number is a pure function of where it is used, so there is no state to carry.

A draw is addressed by (seed, epoch, image, view, place). The generator is Philox4x32-10 (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011): the seed is the key, the rest of the address is the counter, and since
Philox is a bijection for each key, two addresses never share a block. The order of an epoch is a keyed permutation of
(seed, epoch): a position finds its image without the list of images ever being shuffled or held in memory.
"""

from __future__ import annotations

from math import isqrt

import numpy as np
from numpy.typing import NDArray

from barlow.errors import UserError

IntArray = NDArray[np.int64]
Words = NDArray[np.uint64]  # 32-bit words held in 64 bits, so that a product of two keeps its upper half

MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = 0x9E3779B9, 0xBB67AE85
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)

VIEWS = 1 << 15  # views are numbered below this; the upper half of the numbers belongs to `order`
ORDER = VIEWS
COUNT = 1 << 17  # draws of one image in one view: two a block, 65,536 blocks
ROUNDS = 8  # of the Feistel network; 4 are a pseudo-random permutation in theory, small domains need a few more
SMALLEST_SIDE = 8  # of the Feistel square: below it, too few round functions exist to reach every order


def philox(counter: tuple[Words, Words, Words, Words], seed: int) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10 of four 32-bit counter words (each held in uint64, broadcast together) under a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a, b = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (b >> HALF) ^ c1 ^ np.uint64(k0), b & LOW, (a >> HALF) ^ c3 ^ np.uint64(k1), a & LOW
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniforms(seed: int, epoch: IntArray | int, image: IntArray, view: int, count: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) of 53 random bits, shape (n, count): row i belongs to (epoch[i], image[i], view).

    ``epoch`` is one number or one per image; image < 2^63, epoch < 2^32, view < 32768, count <= 131072. Number k of a
    row is the same whatever ``count``, whichever other images are asked for, on every machine.
    """
    if not (0 <= view < VIEWS and count <= COUNT):
        raise UserError(f"view {view} with {count} draws: views are 0 to {VIEWS - 1}, draws at most {COUNT}")
    blocks = np.arange((count + 1) // 2, dtype=np.uint64)
    words = _blocks(seed, epoch, image, view, blocks)
    numbers = np.empty((len(image), 2 * len(blocks)))
    numbers[:, 0::2] = _unit(words[0], words[1])
    numbers[:, 1::2] = _unit(words[2], words[3])
    return numbers[:, :count]


def order(seed: int, epoch: IntArray | int, length: int, positions: IntArray) -> IntArray:
    """The images at ``positions`` of an epoch, int64 (n,): a keyed permutation of range(length).

    ``epoch`` is one number or one per position. A Feistel network on the square of side ceil(sqrt(length)), walked
    until it falls inside the range (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): O(1) memory a
    position, any length below 2^62.
    """
    positions = np.asarray(positions, np.int64)
    if length < 1 or (len(positions) and not 0 <= positions.min() <= positions.max() < length):
        raise UserError(f"positions must lie in 0 to {length - 1}, the length of an epoch being {length}")
    epochs, which = np.unique(np.broadcast_to(np.asarray(epoch, np.int64), positions.shape), return_inverse=True)
    words = _blocks(seed, epochs, np.zeros_like(epochs), ORDER, np.arange(ROUNDS // 2, dtype=np.uint64))
    keys = np.concatenate([words[0] << HALF | words[1], words[2] << HALF | words[3]], axis=1)[which]
    side = max(SMALLEST_SIDE, isqrt(length - 1) + 1)
    found = positions.astype(np.uint64)
    outside = np.arange(len(found))
    while len(outside):  # a cycle that starts inside comes back inside, so this ends
        found[outside] = _feistel(found[outside], keys[outside], np.uint64(side))
        outside = outside[found[outside] >= length]
    return found.astype(np.int64)


def stream(seed: int, start: int, count: int, length: int) -> tuple[IntArray, IntArray]:
    """Epochs and images, int64 (count,) each, at positions start to start + count of the endless stream of images.

    The stream is epoch after epoch, each holding every one of ``length`` images exactly once. Batches are consecutive
    slices of it, so every batch is full and none is dropped at the end of an epoch.
    """
    epochs, slots = np.divmod(np.arange(start, start + count, dtype=np.int64), length)
    return epochs, order(seed, epochs, length, slots)


def _blocks(
    seed: int, epoch: IntArray | int, image: IntArray, view: int, blocks: Words
) -> tuple[Words, Words, Words, Words]:
    """Philox of the addresses: four words, each of shape (n, blocks)."""
    images, epochs = np.asarray(image, np.int64), np.asarray(epoch, np.int64)
    if not 0 <= seed < 1 << 64:
        raise UserError(f"seed {seed} is outside 0 to 2^64 - 1; choose another")
    if images.size and (images.min() < 0 or epochs.min() < 0 or epochs.max() >> 32):
        raise UserError("image numbers and epochs of a draw must not be negative, nor epochs above 2^32")
    low, high = (w.astype(np.uint64)[:, None] for w in (images & 0xFFFFFFFF, images >> 32))
    words = low, high, epochs.astype(np.uint64).reshape(-1, 1), np.uint64(view << 16) | blocks[None]
    c0, c1, c2, c3 = np.broadcast_arrays(*words)
    return philox((c0, c1, c2, c3), seed)


def _unit(high: Words, low: Words) -> NDArray[np.float64]:
    """Two 32-bit words -> one float64 in [0, 1): the upper 53 bits of the 64, scaled exactly."""
    return np.asarray(((high << HALF | low) >> np.uint64(11)) * 2.0**-53, np.float64)


def _feistel(x: Words, keys: Words, side: np.uint64) -> Words:
    """A permutation of range(side^2), keys (n, ROUNDS) of 64 bits: (l, r) -> (r, (l + f(r)) mod side), repeated."""
    left, right = np.divmod(x, side)
    for k in range(keys.shape[1]):
        mixed = _mix(right ^ keys[:, k])
        left, right = right, (left + ((mixed >> HALF) * side >> HALF)) % side
    return left * side + right


def _mix(x: Words) -> Words:
    """The finaliser of splitmix64 (Steele et al., OOPSLA 2014): every bit of the input moves half of the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
