"""What is in a pile of images before a run: sizes, kinds, broken, tiny, constant and double images, leaks, mean, sd.

Every image is decoded once; JPEGs much larger than ``LOOK`` pixels at reduced scale, which still reads every byte.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from barlow.convert import FULL, beyond, convert
from barlow.cores import cores
from barlow.decode import filled, mode_kind
from barlow.duplicates import SIDE, SOME, near_groups, near_partners, normalised, same, thumbnail
from barlow.errors import UserError
from barlow.guard import BadImage
from barlow.images import Images, Source, open_images
from barlow.index import in_threads, modes, read_row
from barlow.quarantine import MAX_BAD
from barlow.sources import shown

Array = np.ndarray[Any, np.dtype[Any]]
Report = dict[str, Any]

LOOK = 256  # pixels on the short side that are enough to look at an image
NAMED = 10  # examples of each finding
COMPARED = 50_000  # images compared with each other for near duplicates; of more, as many evenly spread
SMALLEST = 8  # pixels: a short side below it is tiny in any data set
TINY = 0.25  # of the median short side
FLAT = 2 / 255  # an image whose channels vary by no more is constant; a colour image so close to grey is grey
MOSTLY = 0.9  # share of grey images from which on the few in colour are asked about


@dataclass(frozen=True, eq=False)
class Looked:
    """A data set after one look at each image, one row an image; values as shares of the full range."""

    images: Images
    reasons: dict[int, str]  # of images that could not be decoded
    digests: list[bytes]  # SHA-256 of the file (of the pixels, in an array); b"" for those
    small: Array  # (n, SIDE, SIDE) uint8 thumbnails
    mean: Array  # (n, c)
    square: Array  # (n, c) mean of the squares
    constant: Array  # (n,) bool
    grey: Array  # (n,) bool: three channels that are equal
    filled: Array  # (n,) numbers that were NaN or infinite, and are replaced
    clipped: Array  # (n,) share of the numbers that lie beyond the range and become its ends

    @property
    def good(self) -> Array:
        """Numbers of the images that could be decoded."""
        return np.array([i for i in range(len(self.images)) if i not in self.reasons], np.int64)


def look(images: Images) -> Looked:
    """Decodes and measures every image, with progress."""
    n, c = len(images), images.channels
    flags, counts = np.zeros((2, n), bool), np.zeros((2, n))
    small, moments = np.zeros((n, SIDE, SIDE), np.uint8), np.zeros((2, n, c))
    if images.beyond is not None:
        counts[1] = images.beyond
    out = Looked(images, {}, [b""] * n, small, moments[0], moments[1], flags[0], flags[1], counts[0], counts[1])
    kinds = [mode_kind(mode)[1] for mode in images.rows["mode"].to_pylist()]
    full = FULL[images.dtype]

    def one(i: int) -> None:
        try:
            if kinds[i] != "uint8" and images.array is None:
                real = images.decoded(i, fill=False)
                out.filled[i] = real.size - np.isfinite(real).sum()
                real = filled(real)
                out.clipped[i] = beyond(real, images.value_range)
                array = convert(real, c, images.dtype, images.value_range)
            else:
                array = images.read(i, (LOOK, LOOK))
        except BadImage as bad:
            out.reasons[i] = bad.reason
            return
        out.digests[i] = _digest(images, i, array)
        out.small[i] = np.rint(thumbnail(array) * (255 / full))
        out.mean[i], out.square[i], out.constant[i], out.grey[i] = measured(array)

    for _ in in_threads(one, n, "looking at images", cores(), 8):
        pass
    return out


def measured(array: Array) -> tuple[Array, Array, bool, bool]:
    """(mean, mean of the squares) of each channel of (h, w, c), float64 shares of the full range; whether all of them
    are constant; whether they are three that are equal.

    ``SOME`` numbers at a time, so that a large image is not copied. Of whole numbers the sums are exact.
    """
    rows, full = array.reshape(-1, array.shape[2]), FULL[array.dtype.name]
    step = max(1, SOME // rows.shape[1])
    sums, grey = np.zeros((2, rows.shape[1])), rows.shape[1] == 3
    least, most = rows[0], rows[0]
    for at in range(0, len(rows), step):
        planes = np.ascontiguousarray(rows[at : at + step].T)  # along a channel numpy is many times faster
        least, most = np.minimum(least, planes.min(1)), np.maximum(most, planes.max(1))
        grey = grey and bool((planes.max(0) - planes.min(0) <= FLAT * full).all())
        real = planes.astype(np.float64)
        sums += real.sum(1), np.square(real, out=real).sum(1)
    mean, square = sums / len(rows)
    return mean / full, square / full**2, bool((most - least <= FLAT * full).all()), grey


def _digest(images: Images, i: int, array: Array) -> bytes:
    if images.array is None and images.held is None:
        return hashlib.sha256(read_row(images.rows, images.root, i)).digest()
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).digest()


def check(source: Source, splits: Mapping[str, Source] | None = None) -> Report:
    """A report in plain JSON values. ``splits``: name → other images; none of the sets should share an image.

    ``usable`` is False when more than 5 % cannot be read, fewer than two can, or all are constant. ``problems`` says so
    in sentences, and what else deserves a look. Of given pairs the second images have a report of their own,
    ``second``, and ``equal_pairs`` are those whose two files are the same; splits are compared by the first. Raises
    UserError, and DataError when not one image can be read.
    """
    if not isinstance(splits or {}, Mapping):
        raise UserError(f"splits are other images by name, {{'test': …}}, not {splits!r}")
    first = look(open_images(source))
    looked = {"images": first}
    for name, other in (splits or {}).items():
        looked[name] = look(open_images(other, channels=first.images.channels))
    report = contents(first.images) | findings(first)
    if first.images.second is not None:
        second = look(first.images.second)
        report["second"] = contents(second.images) | findings(second)
        equal = [i for i, (a, b) in enumerate(zip(first.digests, second.digests, strict=True)) if a == b != b""]
        report["equal_pairs"] = _named([first.images.key(i) for i in equal])
    pairs = combinations(looked, 2)
    report["leaks"] = [{"between": [a, b], **_leaks(looked[a], looked[b])} for a, b in pairs]
    return report | verdict(report)


def contents(images: Images) -> Report:
    """What the index tells: kinds and sizes."""
    seen = modes(images.rows)
    return {
        "kind": images.kind,
        "channels": images.channels,
        "dtype": images.dtype,
        "value_range": list(images.value_range),
        "modes": {mode: seen[mode] for mode in sorted(seen, key=lambda m: -seen[m])},
        "turned": sum(count for mode, count in seen.items() if " turned" in mode),
        "animated": animated(seen),
        "marked": marked(seen, images.channels),
        "passed_over": dict(sorted((images.passed_over or Counter()).items())),
        "height": _spread(images.sizes[:, 0]),
        "width": _spread(images.sizes[:, 1]),
    }


def findings(looked: Looked) -> Report:
    """What the pixels tell."""
    images, good = looked.images, looked.good
    bad = images.bad
    broken = [f"{shown(bad['path'][k].as_py())}: {bad['status'][k].as_py()}" for k in range(len(bad))]
    broken += [f"{images.key(i)}: {looked.reasons[i]}" for i in sorted(looked.reasons)]
    short = images.sizes.min(1)
    tiny = np.flatnonzero(short < max(SMALLEST, TINY * float(np.median(short))))
    exact = same(looked.digests)
    mean, square = looked.mean[good].mean(0), looked.square[good].mean(0)
    return {
        "images": len(good),
        "unreadable": _named(broken),
        "tiny": _named([f"{images.key(i)}: {images.sizes[i, 0]}×{images.sizes[i, 1]}" for i in tiny.tolist()]),
        "constant": _named([images.key(i) for i in np.flatnonzero(looked.constant).tolist()]),
        "grey_saved_as_colour": int(looked.grey.sum()),
        "filled": _named([f"{images.key(i)}: {int(looked.filled[i]):,} numbers" for i in _most(looked.filled)]),
        "clipped": _named([f"{images.key(i)}: {100 * looked.clipped[i]:.2g} %" for i in _most(looked.clipped)]),
        "exact_duplicates": _doubles(images, exact),
        "near_duplicates": _doubles(images, _near(looked, exact)) | {"compared": min(len(good), COMPARED)},
        "mean": [round(float(m), 4) for m in mean],
        "sd": [round(float(s), 4) for s in np.sqrt(np.maximum(square - mean**2, 0))],
    }


def _compared(looked: Looked, without: set[int]) -> Array:
    """The images to compare: decoded, not constant, none of ``without``; at most COMPARED, evenly spread."""
    chosen = np.array([i for i in looked.good if not looked.constant[i] and i not in without], np.int64)
    return chosen[np.linspace(0, len(chosen) - 1, COMPARED).astype(np.int64)] if len(chosen) > COMPARED else chosen


def _near(looked: Looked, exact: list[list[int]]) -> list[list[int]]:
    chosen = _compared(looked, {i for group in exact for i in group[1:]})
    return [chosen[group].tolist() for group in near_groups(normalised(looked.small[chosen]))]


def _leaks(a: Looked, b: Looked) -> Report:
    """Images of ``b`` that are also, or nearly, in ``a``."""
    where = {digest: i for i, digest in enumerate(a.digests) if digest}
    exact = {j: where[digest] for j, digest in enumerate(b.digests) if digest in where}
    ours, theirs = _compared(a, set()), _compared(b, set(exact))
    partners = near_partners(normalised(a.small[ours]), normalised(b.small[theirs]))
    near = {int(theirs[j]): int(ours[i]) for j, i in partners.items()}

    def pairs(found: dict[int, int]) -> Report:
        return _named([f"{a.images.key(i)} = {b.images.key(j)}" for j, i in sorted(found.items())])

    return {"exact": pairs(exact), "near": pairs(near)}


def _most(found: Array) -> list[int]:
    """The images in which there is anything, those with most first."""
    return [int(i) for i in np.argsort(-found, kind="stable") if found[i]]


def _named(found: list[str]) -> Report:
    return {"count": len(found), "examples": found[:NAMED]}


def _doubles(images: Images, found: list[list[int]]) -> Report:
    """``count``: images that could go without a loss."""
    examples = [" = ".join(images.key(i) for i in group[:NAMED]) for group in found[:NAMED]]
    return {"count": sum(len(group) - 1 for group in found), "groups": len(found), "examples": examples}


def _spread(lengths: Array) -> Report:
    low, middle, high = (int(v) for v in np.percentile(lengths, (0, 50, 100), method="nearest"))
    return {"least": low, "median": middle, "most": high}


def verdict(report: Report) -> Report:
    """``usable`` and ``problems``, from the findings."""
    if "second" in report:
        return _of_pairs(report)
    n, broken = report["images"], report["unreadable"]["count"]
    stops, looks = [], []
    if n < 2:
        stops.append(f"{n} usable image: two views of many different images are needed")
    if broken > MAX_BAD * (n + broken):
        stops.append(f"{broken:,} of {n + broken:,} images cannot be read: pretrain would stop (max_bad = {MAX_BAD:g})")
    if n and report["constant"]["count"] == n:
        stops.append("all images are constant: there is nothing to learn")
    elif n > 1 and report["exact_duplicates"]["count"] == n - 1:
        stops.append("all images are one and the same: there is nothing to tell apart")
    if (copies := report["exact_duplicates"]["count"]) > 0.1 * n:
        looks.append(f"{copies:,} images are copies of others: views of different images should differ, so remove them")
    if (near := report["near_duplicates"]["count"]) > 0.1 * n:
        looks.append(f"{near:,} images are nearly the same as others when made small: remove what are copies; parts "
                     "before a fixed camera are none, but see that crops show what differs")  # fmt: skip
    if report["animated"]:
        looks.append(several_pages(report["animated"]))
    if report["marked"]:
        looks.append(laid_on_white(report["marked"]))
    if report["channels"] == 3 and n and report["grey_saved_as_colour"] == n:
        looks.append("all images are grey although saved as colour: one channel is enough")
    elif report["channels"] == 3 and n and report["grey_saved_as_colour"] >= MOSTLY * n:
        looks.append(f"{report['grey_saved_as_colour']:,} of {n:,} images are grey: --channels 1 makes the others so, "
                     "and chooses views for grey images")  # fmt: skip
    for leak in report["leaks"]:
        if shared := leak["exact"]["count"] + leak["near"]["count"]:
            looks.append(f"{' and '.join(leak['between'])} share {shared:,} images: results on one would be too good")
    return {"usable": not stops, "problems": stops + looks}


def animated(seen: Mapping[str, int]) -> int:
    """How many files of these modes hold more than is used of them."""
    return sum(count for mode, count in seen.items() if " animated" in mode)


def several_pages(count: int) -> str:
    """What there is to say of so many such files."""
    files = "1 file holds" if count == 1 else f"{count:,} files hold"
    used = f"{files} several pages or frames, of which only the first is used"
    return f"{used}: save the others as images of their own if they should be learned from"


def marked(seen: Mapping[str, int], channels: int) -> int:
    """How many TIFF files lose a fourth channel in a data set of so many, because it is marked as transparency."""
    return 0 if channels == 4 else sum(count for mode, count in seen.items() if " marked" in mode)


def laid_on_white(count: int, option: str = "--channels") -> str:
    """What there is to say of so many such files."""
    files = "1 TIFF file has" if count == 1 else f"{count:,} TIFF files have"
    lost = "a fourth channel that is marked as transparency and laid on white"
    return f"{files} {lost}: if it is a band, give {option} 4"


def _of_pairs(report: Report) -> Report:
    """The same of given pairs, from what is said of each column alone."""
    both = {"first": {k: v for k, v in report.items() if k not in ("second", "equal_pairs")}}
    both["second"] = report["second"] | {"leaks": []}
    said = {column: verdict(found) for column, found in both.items()}
    problems = [f"{column} images: {problem}" for column, found in said.items() for problem in found["problems"]]
    equal = report["equal_pairs"]["count"]
    if equal:
        problems.append(f"{equal:,} pairs are one file twice: there is nothing in them to agree on")
    return {"usable": all(found["usable"] for found in said.values()), "problems": problems}
