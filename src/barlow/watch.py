"""Verdicts from look to look: an alarm that stands is told once, with causes and remedy, and may stop the run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, final

from barlow.verdict import CAUSES, REMEDIES, is_alarm

SPACES = {"features": "the encoder's output", "features_b": "the second encoder's output", "embedding": "the embedding"}


@final
class Watch:
    """Takes the health lines of each look in turn.

    One look may catch a run at a bad moment on its way up, so only an alarm at two looks in a row, in the same space,
    counts. ``collapsed`` says what is wrong now, in one paragraph; empty while nothing stands. What it knows follows
    from the looks: a run that is resumed shows it those of metrics.jsonl again.
    """

    def __init__(self) -> None:
        self.collapsed = ""
        self._before: set[str] = set()
        self._told: set[tuple[str, str]] = set()

    def see(self, lines: Iterable[Mapping[str, Any]]) -> list[str]:
        """The alarms that stand and have not been told yet, a paragraph each."""
        bad = {line["of"]: line for line in lines if is_alarm(line["verdict"])}
        standing = {of: _paragraph(line) for of, line in bad.items() if of in self._before}
        fresh = [of for of in standing if (of, bad[of]["verdict"]) not in self._told]
        self._told |= {(of, bad[of]["verdict"]) for of in fresh}
        self._before = set(bad)
        self.collapsed = " ".join(standing.values())
        return [standing[of] for of in fresh]


def _paragraph(line: Mapping[str, Any]) -> str:
    word = line["verdict"]
    likely = "; or ".join(CAUSES[word])
    return f"{word} of {SPACES[line['of']]}. {line['sentence']} Likely: {likely}. {REMEDIES[word]}"
