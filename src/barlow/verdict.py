"""The verdict: measures of the embeddings of one set of images → one of eight words, why, and what to do about it.

The rules, in this order; the first that holds gives the verdict. m is the room min(n − 1, d). Every threshold lies
between what working encoders and embeddings showed (also untrained ones, early ones, features after a ReLU) and what
collapsed ones showed; ``benchmarks/verdicts.py`` holds the cases and prints which doses are told apart.

1. complete collapse — relative spread < 0.001; or < 0.02 and what is left is white (participation above half of that
   of white noise in as many living dimensions) and the twins are not found: noise around a constant vector. Mean cosine
   is no criterion: features after a ReLU have 0.4 to 0.98 and are fine. Two views also: unrelated, and a deviation
   below 3e-4: its square is a hundredth of the eps in the standardisation, so the loss no longer sees the embedding.
2. identical views — view gap < 1e-6, or < 0.001 at a rank that is not low: nothing was left to be invariant to.
3. cluster collapse — the images fall into at most n/4 groups with empty space between and at most 5 % of the variance
   inside them; or three in ten images sit on their nearest neighbour while the rank is not one or two (on a line,
   neighbours are close without clusters). Ordinary classes keep 20 % and more of the variance inside.
4. redundant features — half of the dimensions have a copy (|ρ| > 0.95), at least four times as many as dimensions of
   random direction would have with this spectrum, and the participation is 4 or more. Below that the rank may be low,
   which goes before; where it is not, three times as many are too many, for copies themselves make a direction strong.
   In an embedding that is being trained copies are never forced: decorrelating it is half of the objective, and healthy
   runs had copies of half of the dimensions at most, in passing. There three quarters are too many, however forced.
5. dimensional collapse — the spectrum falls off a cliff (``rank_cliff``); or one direction holds almost everything
   (participation < 1.3, less for m < 7); or the effective rank is below 9 (for m < 36: below m/4); or half of the
   dimensions are dead; or three quarters are copies in an embedding in training. With two views and a mean diagonal
   ≥ 0.8 it is a shortcut: the views agree on very little, and as nothing more will come, an effective rank below 12 is
   low enough. Healthy runs pass through 11 to 16 on their way up, at diagonals of 0.4 to 0.5; power laws up to
   λ ∝ k^−2.5 stay above these bounds.
6. not learning yet — two views: mean diagonal < 0.35 and twins found no more than five times chance (or 3 %); or mean
   diagonal < 0.2 and twins found below 10 %: untrained networks have about 0.2 and 5 %, on small gray images. Or, of an
   embedding in training, a mean diagonal below 0.1 in the last batches, whatever the held-out images say: then what
   is trained on are not views of one image. (An encoder that is only decorrelated keeps finding twins for long.)
   Or, of the same, twins hardly nearer than to the network of before the first step, which is asked, too: of the way
   from there to finding all (``twins_near``) less than 15 % is gone. At a tenth of their budget healthy runs had gone
   13 to 31 % of it with Muon, 6 to 26 % with AdamW, and what learned nothing −19 to 11 %. Not asked where the first
   network was near 0.9 and more.
7. healthy — none of these.

From fewer than 16 images rules 3 to 5 do not speak: chance alone can make so few look flat, copied or clustered.

In warm-up rules 3 to 5 give "not learning yet": Barlow Twins learns one direction after the other (Simon et al. 2023),
so a low rank and many copies are how every good run begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WAY = 0.15  # of the way from the untrained network's twins_near to 1, below which nothing much has been learned
FOUND = 0.9  # twins_near of an untrained network from which on there is no way left to measure
ENOUGH = 16  # images from which on rules 3 to 5 speak
FEW = 128  # images below which a verdict is a guess: "healthy" says how many it is of
COPIED = 0.75  # share of copied dimensions that is too large in an embedding in training, whatever the spectrum

WORDS = (
    "healthy",
    "complete collapse",
    "dimensional collapse",
    "redundant features",
    "cluster collapse",
    "identical views",
    "shortcut",
    "not learning yet",
)

CAUSES: dict[str, tuple[str, ...]] = {
    "healthy": (),
    "complete collapse": (
        "the learning rate is too high, or the weight decay so strong that the weights die",
        "the objective does not standardise the embeddings",
        "all images are nearly the same picture",
    ),
    "dimensional collapse": (
        "the learning rate is too high",
        "λ is too small, so nothing pushes the dimensions apart",
        "the batch is small beside the width of the projector",
        "training has only just begun",
    ),
    "redundant features": (
        "λ is too small for this projector width",
        "the projector is wider than the images can fill",
        "weights were copied or tied by mistake",
    ),
    "cluster collapse": (
        "the images themselves are duplicates or come in a few fixed scenes",
        "the views crop so hard that only the background is left",
        "the learning rate is too high",
    ),
    "identical views": (
        "the augmentations are switched off, or have no effect on these images",
        "both views are drawn with the same random numbers",
    ),
    "shortcut": (
        "λ is too small, so agreeing on one thing is enough",
        "the views share a trace that gives the pair away: a border, a colour cast, a time stamp, compression",
    ),
    "not learning yet": (
        "training has only just begun",
        "the learning rate is too low or too high",
        "λ is so large that the agreement of the views hardly counts",
        "the views are so strong that little is left in both that tells images apart, or all images are nearly alike",
        "the batch is tiny: what it says of the dimensions is mostly chance",
        "what is given as two views of one image, or as a pair, does not belong together",
    ),
}

REMEDIES = {
    "healthy": "Nothing to do.",
    "complete collapse": "Divide the learning rate by ten; if it happens again, run barlow check on the images.",
    "dimensional collapse": "Divide the learning rate by three and double λ; if it stays, narrow the projector.",
    "redundant features": "Double λ, or narrow the projector.",
    "cluster collapse": "Run barlow check to find duplicates, and look at the views with barlow views.",
    "identical views": "Look at the views with barlow views and make the augmentations stronger.",
    "shortcut": "Double λ; then look for what both views share with barlow views, and crop or jitter it away.",
    "not learning yet": "Train on; if it still stands after a tenth of the run, try a third of the learning rate, or a "
    "batch of 64 where it is smaller.",
}


@dataclass(frozen=True)
class Diagnosis:
    """``verdict`` is one of ``WORDS``; ``sentence`` says in numbers why; ``causes`` are likely ones, the likeliest
    first (empty when healthy); ``remedy`` is what to try first; ``measures`` are the numbers it was made from."""

    verdict: str
    sentence: str
    causes: tuple[str, ...]
    remedy: str
    measures: dict[str, float]

    @property
    def alarm(self) -> bool:
        """True for every verdict but "healthy" and "not learning yet"."""
        return is_alarm(self.verdict)


def is_alarm(verdict: str) -> bool:
    """Whether a verdict says that something is wrong: all but "healthy" and "not learning yet"."""
    return verdict not in ("healthy", "not learning yet")


def judge(m: Mapping[str, float], *, warm_up: bool = False, embedding: bool = False) -> Diagnosis:
    """The verdict for the measures ``m`` of ``barlow.health.measure``, by the rules at the head of this file.
    ``embedding``: of an embedding that the objective is decorrelating."""
    verdict, sentence = _first(m, warm_up, embedding)
    return Diagnosis(verdict, sentence, CAUSES[verdict], REMEDIES[verdict], dict(m))


def _first(m: Mapping[str, float], warm_up: bool, embedding: bool) -> tuple[str, str]:
    enough = m["n"] >= ENOUGH
    low = _low_rank(m, embedding) if enough else None
    if sentence := _complete(m, warm_up):
        return "complete collapse", sentence
    if (gap := m.get("view_gap", 1.0)) < (1e-6 if low else 1e-3):
        return "identical views", f"The two views of an image differ by {gap:.1g} of the spread between images."
    alarm = (_clusters(m) or _copies(m, embedding) or low or _copies_of_one(m, embedding)) if enough else None
    if alarm and warm_up:
        return "not learning yet", f"Too early to judge, still warming up. {alarm[1]}"
    return alarm or _unlearned(m) or ("healthy", _praise(m))


def _complete(m: Mapping[str, float], warm_up: bool) -> str:
    spread, unrelated = m["relative_spread"], _unrelated(m) is not None
    living = max(m["d"] * (1 - m["dead_dimensions"]), 1)
    white = 1 / (1 / living + 1 / max(m["n"] - 1, 1))
    if spread < 1e-3:
        return f"Every image gets nearly the same vector: only {spread:.1g} of its squared length differs."
    if spread < 0.02 and m["participation"] > 0.5 * white and m.get("twins_found", 0.0) < 0.5:
        return f"Every image gets one vector plus noise: {spread:.1%} of its squared length differs, evenly."
    if unrelated and not warm_up and m["deviation"] < 3e-4:
        return f"The embedding shrank to a standard deviation of {m['deviation']:.1g}, and the views are unrelated."
    return ""


def _clusters(m: Mapping[str, float]) -> tuple[str, str] | None:
    if m["modes"] >= 2 and m["modes_within"] <= 0.05:
        inside = f"{m['modes_within']:.1%} of the variance is left inside them."
        return "cluster collapse", f"{m['n']:.0f} images fall on {m['modes']:.0f} points; {inside}"
    if m["duplicate_neighbour_rate"] >= 0.3 and m["participation"] >= 2.5:
        return "cluster collapse", f"{m['duplicate_neighbour_rate']:.0%} of the images sit on top of another image."
    return None


def _copies(m: Mapping[str, float], embedding: bool) -> tuple[str, str] | None:
    share = m["duplicate_dimensions"]
    unforced = share >= 0.5 and m.get("forced_duplicates", 0.0) <= share / 4
    if (unforced or (embedding and share >= COPIED)) and m["participation"] >= 4:
        return "redundant features", f"{share:.0%} of the dimensions are copies of another (correlation above 0.95)."
    return None


def _copies_of_one(m: Mapping[str, float], embedding: bool) -> tuple[str, str] | None:
    share = m["duplicate_dimensions"]
    if embedding or share < 0.5 or m["participation"] >= 4 or m.get("forced_duplicates", 0.0) > share / 3:
        return None
    carried = f"{m['participation']:.1f} directions carry nearly all."
    return "redundant features", f"{share:.0%} of the dimensions are copies of another, and {carried}"


def _low_rank(m: Mapping[str, float], embedding: bool) -> tuple[str, str] | None:
    room = min(m["n"] - 1, m["d"])
    rank, carried = m["effective_rank"], m["participation"]
    agreed = m.get("mean_diagonal", 0.0) >= 0.8
    if room < 2:
        return None
    if m["rank_cliff"]:
        why = f"Everything lies in {m['rank_cliff']:.0f} of {room:.0f} possible directions; beyond is next to nothing."
    elif carried < min(1.3, 1 + 0.05 * (room - 1)):
        why = f"One direction holds almost all of the variance: {m['d']:.0f} numbers say about {max(carried, 1):.1f}."
    elif rank < min(12.0 if agreed else 9.0, room / 4):
        why = f"The images spread over {rank:.1f} of {room:.0f} possible directions (effective rank)."
    elif m["dead_dimensions"] >= 0.5:
        why = f"{m['dead_dimensions']:.0%} of the dimensions are the same number for every image."
    elif embedding and m["duplicate_dimensions"] >= COPIED and carried < 4:
        why = (
            f"{m['duplicate_dimensions']:.0%} of the dimensions are copies, and {carried:.1f} directions carry it all."
        )
    else:
        return None
    if agreed:
        return "shortcut", f"The views agree ({m['mean_diagonal']:.2f}), but on very little. {why}"
    return "dimensional collapse", why


def _unlearned(m: Mapping[str, float]) -> tuple[str, str] | None:
    if found := _unrelated(m):
        return found
    first, near = m.get("twins_near_first", 1.0), m.get("twins_near", 1.0)
    if first >= FOUND or near >= first + WAY * (1 - first):
        return None
    return "not learning yet", (
        f"The two views of an image stand hardly nearer to each other than before the first step: {near:.2f}, then "
        f"{first:.2f} (1: always the nearest of all, 0: chance)."
    )


def _unrelated(m: Mapping[str, float]) -> tuple[str, str] | None:
    if m.get("train_diagonal", 1.0) < 0.1:
        return "not learning yet", (
            f"In training the two views of an image agree by {m['train_diagonal']:.2f}, which is not at all (mean "
            "diagonal of the last batches)."
        )
    if "twins_found" not in m or m["mean_diagonal"] >= 0.35:
        return None
    few = 0.1 if m["mean_diagonal"] < 0.2 else 0.03
    if m["twins_found"] >= max(few, 5 / m["n"]):
        return None
    return "not learning yet", (
        f"The two views of an image are hardly more alike than those of different images: {m['twins_found']:.1%} of "
        f"the twins found (chance {1 / m['n']:.1%}), mean diagonal {m['mean_diagonal']:.2f}."
    )


def _praise(m: Mapping[str, float]) -> str:
    spread = f"The images spread over {m['effective_rank']:.0f} of {min(m['n'] - 1, m['d']):.0f} directions"
    if ENOUGH <= m["n"] < FEW:
        spread += f", which of only {m['n']:.0f} images says little"
    if "twins_found" in m:
        return f"{spread}; {m['twins_found']:.0%} find their own second view (chance {1 / m['n']:.1%})."
    if m["n"] < ENOUGH:
        return f"{spread}; {m['n']:.0f} images are too few to tell copies, clusters or a cliff."
    if m["duplicate_dimensions"] < 0.05:
        return f"{spread}, without copies, clusters or a cliff in the spectrum."
    return f"{spread}, without clusters or a cliff; {m['duplicate_dimensions']:.0%} of the dimensions are copies."
