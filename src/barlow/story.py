"""What the report tells in words, numbers and curves, from the lines of metrics.jsonl and the settings."""

from __future__ import annotations

import math
from typing import Any

from markupsafe import Markup

from barlow.judgement import judged
from barlow.pictures import Line, chart, number, short
from barlow.progress import duration
from barlow.verdict import CAUSES, REMEDIES

Lines = list[dict[str, Any]]

NAMES = {"features": "Encoder output", "embedding": "Embedding", "features_b": "Second encoder"}
EVIDENCE = {  # the section whose picture shows it, and its heading
    "complete collapse": ("answers", "What the encoder answers"),
    "dimensional collapse": ("spectrum", "How many directions are used"),
    "redundant features": ("matrix", "Cross-correlation"),
    "cluster collapse": ("map", "Map of the images"),
    "identical views": ("views", "What the network sees"),
    "shortcut": ("spectrum", "How many directions are used"),
    "not learning yet": ("health", "Health over time"),
}
BEHIND_CAUSES = (
    "training was short: the rank still climbs",
    "the views change what these labels are about",
    "the images are so simple that pixels already tell",
)
BEHIND_REMEDY = "Train longer; then look at the views and turn off what changes the meaning of an image."

WATCHED = (  # measure, title, what it is, drawn as per cent
    ("twins_found", "Twins found", "images that find their second view", True),
    ("effective_rank", "Effective rank", "directions in use", False),
    ("mean_diagonal", "Mean diagonal", "agreement of the two views", False),
    ("off_diagonal_excess", "Off-diagonal excess", "redundancy; 1 is chance", False),
    ("relative_spread", "Relative spread", "0 is the same for every image", False),
    ("duplicate_dimensions", "Copied dimensions", "correlated above 0.95", True),
)


def tone(verdict: str) -> str:
    """The CSS class of a verdict: "good", "wait" or "bad"."""
    return {"healthy": "good", "not learning yet": "wait", "no verdict yet": "wait"}.get(verdict, "bad")


def last(lines: Lines, key: str, **where: str) -> float | None:
    """The newest finite value of ``key`` among the lines that match ``where``."""
    chosen = (line for line in reversed(lines) if all(line.get(k) == v for k, v in where.items()))
    return next((value for line in chosen if (value := number(line.get(key))) is not None), None)


def overall(health: Lines, table: dict[str, Any] | None = None) -> dict[str, Any]:
    """The headline: the newest verdict on the embedding and on the encoder's output, the worse of the two on top.

    A healthy encoder that labels show to be no better than untrained is not called healthy without saying so.
    ``evidence`` is the section of the page that shows it (its name and heading), None for a healthy run.
    """
    parts = []
    for of in ("embedding", "features", "features_b"):
        newest = next((line for line in reversed(health) if line.get("of") == of), None)
        if newest:
            word = str(newest.get("verdict", ""))
            parts.append(
                {"of": NAMES[of], "word": word, "sentence": str(newest.get("sentence", "")), "tone": tone(word)}
            )
    if not parts:
        sentence = "Nothing has been measured yet: the run has only just begun."
        return {"word": "no verdict yet", "tone": "wait", "sentence": sentence, "parts": [], "causes": (), "remedy": "",
                "evidence": None}  # fmt: skip
    worst = min(parts, key=lambda part: ("bad", "wait", "good").index(part["tone"]))
    word, remedy = worst["word"], REMEDIES.get(worst["word"], "") if worst["tone"] != "good" else ""
    shown = {"word": word, "tone": worst["tone"], "sentence": worst["sentence"], "causes": CAUSES.get(word, ()),
             "remedy": remedy, "evidence": EVIDENCE.get(word)}  # fmt: skip
    if labels := judged(table):
        parts.append(labels)
        if worst["tone"] == "good" and labels["tone"] != "good":
            shown |= {"word": f"{word}, but not better yet", "tone": "wait", "evidence": ("labels", "With labels"),
                      "causes": BEHIND_CAUSES, "remedy": BEHIND_REMEDY}  # fmt: skip
    return shown | {"parts": parts}


def cards(config: dict[str, Any], lines: dict[str, Lines], health: Lines) -> list[tuple[str, str, str]]:
    """(title, value, note) of the key numbers; a number that is not known has no card."""
    train, speed = lines["train"], lines["speed"]
    shown = []
    loss, least = last(train, "loss"), last(train, "floor")
    if loss is not None:
        shown.append(("Loss", figure(loss), f"floor {figure(least)}" if least is not None else ""))
    for of in ("features", "embedding"):  # the encoder's output, where one encoder makes both views
        found, n = last(health, "twins_found", of=of), last(health, "n", of=of)
        if found is not None and n:
            shown.append(("Twins found", f"{found:.0%}", f"of {n:,.0f} held-out images; chance {1 / n:.1%}"))
            break
    rank = last(health, "effective_rank", of="features")
    if rank is not None:
        sizes = [last(health, key, of="features") for key in ("n", "d")]
        note = f"of {min(sizes[0] - 1, sizes[1]):,.0f} in the encoder's output" if sizes[0] and sizes[1] else ""
        other = last(health, "effective_rank", of="embedding")
        shown.append(
            ("Effective rank", f"{rank:.0f}", note + (f"; embedding {other:.0f}" if other is not None else ""))
        )
    lidar = last(health, "lidar", of="features")
    if lidar is not None:
        shown.append(("LiDAR", f"{lidar:.0f}", "directions of the image that survive its views"))
    step, batch = last(train, "step"), number(config.get("batch_size"))
    if step is not None:
        epoch = last(train, "epoch")
        seen = f"{step * batch:,.0f}" if batch else f"{step:,.0f} steps"
        note = f"{step:,.0f} steps" if batch else ""
        shown.append(("Images seen", seen, note + (f", {epoch:.1f} epochs" if epoch is not None else "")))
    seconds, rate = last(speed, "seconds"), last(speed, "images_per_s")
    if seconds is not None:
        shown.append(("Time", duration(seconds), f"{rate:,.0f} images a second" if rate is not None else ""))
    return shown


def figure(value: float) -> str:
    """A loss or a count with three digits that mean something."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def loss_charts(config: dict[str, Any], train: Lines) -> list[Markup]:
    """The loss beside its floor, and its two terms apart (redundancy times λ, so that they add up)."""

    def series(key: str, factor: float = 1.0) -> list[float]:
        return [factor * value if (value := number(line.get(key))) is not None else math.nan for line in train]

    steps = [float(line["step"]) for line in train]
    weight = number(config.get("lambda"))
    name = "redundancy" if weight is None else f"redundancy × λ ({weight:g})"
    redundancy = Line(name, steps, series("redundancy", weight or 1.0), "two")
    low = max(min((f for f in series("floor") if f > 0), default=1e-3) / 3, 1e-6)
    return [made for made in (
        chart([Line("loss", steps, series("loss")), Line("floor", steps, series("floor"), "faint", dashed=True)],
              title="Loss", x_label="steps", y_log=True, low=low),
        chart([Line("invariance", steps, series("invariance")), redundancy],
              title="Its two terms", x_label="steps", y_log=True, low=1e-4),
    ) if made]  # fmt: skip


def health_charts(health: Lines) -> list[Markup]:
    """One small chart a measure, embedding and encoder's output together."""
    charts = []
    for key, title, note, percent in WATCHED:
        lines = []
        for of, line_tone in (("embedding", "one"), ("features", "two")):
            points = [
                (line["step"], value)
                for line in health
                if line.get("of") == of and (value := number(line.get(key))) is not None
            ]
            if len(points) > 1:
                lines.append(Line(NAMES[of].lower(), [p[0] for p in points], [p[1] for p in points], line_tone))
        charts.append(chart(lines, title=title, x_label="steps", zero=True, percent=percent, note=note))
    return [made for made in charts if made]


def choices(config: dict[str, Any], events: Lines) -> list[tuple[str, str, str]]:
    """(word, value, reason): the settings in their order; the reason where the run chose by itself and said why."""
    reasons = {}
    for event in events:
        word, equals, rest = str(event.get("message", "")).partition(" = ")
        if equals and event.get("step") == 0 and word in config:
            reasons[word] = after_value(rest)
    return [(word, spell(value), reasons.get(word, "")) for word, value in config.items()]


def after_value(text: str) -> str:
    """What follows the first ``: `` that stands outside all brackets and quotation marks."""
    depth, quote = 0, ""
    for i, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif depth == 0 and text.startswith(": ", i):
            return text[i + 2 :]
    return ""


def spell(value: Any) -> str:
    """A setting as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " · ".join(map(spell, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {spell(inner)}" for key, inner in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def notes(events: Lines) -> list[tuple[str, str]]:
    """(step, message) of the last twenty events that are no choice of a setting."""
    told = [event for event in events if event.get("step") or " = " not in str(event.get("message", ""))]
    return [(short(float(event["step"])), str(event.get("message", ""))) for event in told[-20:]]
