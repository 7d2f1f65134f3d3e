"""The report of ``barlow check`` as rows of text."""

from __future__ import annotations

from typing import Any

from barlow.convert import range_in_words

SHOWN = 3  # examples in a row of the table; the JSON has more


def rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, finding) for a table of two columns."""
    out = [("images", f"{report['images']:,} usable, of kind {report['kind']}"), *_of_column(report)]
    if second := report.get("second"):
        out += [(f"second: {what}", finding) for what, finding in _of_column(second)]
        out.append(("one file twice", _found(report["equal_pairs"])))
    if report["passed_over"]:
        out.append(("passed over", ", ".join(f"{n:,} {ending}" for ending, n in report["passed_over"].items())))
    for leak in report["leaks"]:
        both = " and ".join(leak["between"])
        out += [(f"{both}: same", _found(leak["exact"])), (f"{both}: nearly", _found(leak["near"]))]
    return out + [("problem", problem) for problem in report["problems"]]


def _of_column(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What is said of one kind of images: all of them, or one column of pairs."""
    return [
        ("unreadable", _found(report["unreadable"])),
        ("modes", ", ".join(f"{count:,} {mode}" for mode, count in report["modes"].items())),
        (
            "become",
            f"{report['channels']} channel{'s' * (report['channels'] > 1)} of {report['dtype']}{_range(report)}",
        ),
        *_conversions(report),
        ("height", _spread(report["height"])),
        ("width", _spread(report["width"])),
        ("tiny", _found(report["tiny"])),
        ("constant", _found(report["constant"])),
        ("grey as colour", f"{report['grey_saved_as_colour']:,}"),
        ("exact duplicates", _found(report["exact_duplicates"])),
        ("near duplicates", _found(report["near_duplicates"])),
        ("mean of channels", ", ".join(f"{m:.3g}" for m in report["mean"])),
        ("sd of channels", ", ".join(f"{s:.3g}" for s in report["sd"])),
    ]


def _conversions(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What the numbers of images became, where that is another than they were."""
    out = []
    if report["filled"]["count"]:
        out.append(("not finite", f"{_found(report['filled'])}: NaN and infinity become the least of the channel"))
    if report["clipped"]["count"]:
        out.append(("beyond the range", f"{_found(report['clipped'])}: become its ends"))
    return out


def _range(report: dict[str, Any]) -> str:
    words = range_in_words(report["dtype"], report["value_range"])
    return f"; {words}" if words else ""


def _found(finding: dict[str, Any]) -> str:
    examples = finding["examples"][:SHOWN]
    more = " …" if finding["count"] > len(examples) and examples else ""
    return f"{finding['count']:,}" + (f" ({'; '.join(examples)}{more})" if examples else "")


def _spread(lengths: dict[str, int]) -> str:
    if lengths["least"] == lengths["most"]:
        return f"all {lengths['least']:,}"
    return f"{lengths['least']:,} to {lengths['most']:,}, half of them up to {lengths['median']:,}"
