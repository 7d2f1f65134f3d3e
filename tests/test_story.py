"""The report's words and tables: labels, reasons, the headline."""

from __future__ import annotations

import pytest

from barlow import judgement, story

HOSTILE = "<script>alert('x')</script>\"' onerror=alert(1) {{ 7 * 7 }} \udcff.jpg"
JUDGED = {
    "columns": ["trained", "untrained", "raw pixels"],
    "classes": ["cat", f"dog {HOSTILE[:25]}"],
    "rows": [
        {"protocol": "k-NN", "trained": 0.876, "untrained": 0.5, "raw pixels": 0.8, "unit": "accuracy",
         "interval": [0.86, 0.89], "intervals": {"trained": [0.86, 0.89], "raw pixels": [0.7, 0.9]}, "draws": {}},
        {"protocol": "ridge", "trained": 0.5, "untrained": None, "unit": "R²"},
        "noise",
    ],
    "training_labels": {"k-NN": 8000},
    "details": {"trained": {"k-NN": {"confusion": [[8, 2], [0, 0]]}}},
}  # fmt: skip


def test_evaluation_table_marks_the_best_and_keeps_intervals() -> None:
    table = judgement.evaluation_table(JUDGED)
    assert table is not None
    assert table["columns"] == JUDGED["columns"]
    first, second = table["rows"]
    assert [cell["text"] for cell in first["cells"]] == ["87.6%", "50.0%", "80.0%"]
    assert [cell["best"] for cell in first["cells"]] == [True, False, False]
    assert [cell["interval"] for cell in first["cells"]] == ["86.0% – 89.0%", "", "70.0% – 90.0%"]
    assert first["note"] == "8,000 labels"
    assert [cell["text"] for cell in second["cells"]] == ["0.500", "–", "–"]
    assert table["confusion"]["names"][0] == "cat"
    bare = judgement.evaluation_table({key: JUDGED[key] for key in ("rows", "columns")})
    assert bare is not None
    assert bare["confusion"] is None


def test_the_label_curve_shows_every_kind_of_features() -> None:
    rows = [
        {"protocol": name, "unit": "accuracy", "trained": 0.5 + share, "untrained": 0.4 + share, "raw pixels": None}
        for name, share in (("k-NN", 0.3), ("linear", 0.3), ("1 % of labels", 0.0), ("10 % of labels", 0.2))
    ]
    counts = {"k-NN": 900, "linear": 900, "1 % of labels": 9, "10 % of labels": 90}
    stored = {"columns": ["trained", "untrained"], "rows": rows, "training_labels": counts}
    table = judgement.evaluation_table(stored)
    assert table is not None
    assert table["curve"].count("<polyline") == 2
    assert ">trained</span>" in table["curve"]
    first = table["curve"].split('points="')[1].split('"')[0].split()
    assert len(first) == 3  # k-NN is no probe
    none = judgement.evaluation_table(stored | {"rows": rows[:2]})
    assert none is not None
    assert none["curve"] == ""


@pytest.mark.parametrize(
    "stored",
    [
        None,
        [],
        {},
        {"rows": 3},
        {"rows": [{"protocol": "x"}], "columns": ["x"]},
        {"rows": 3, "columns": []},
        7,
        "x",
        [[]],
    ],
)
def test_no_rows_no_table(stored: object) -> None:
    assert judgement.evaluation_table(stored) is None


@pytest.mark.parametrize("matrix", [[[1, 2]], "no", [[1]], [], None])
def test_a_broken_confusion_matrix_is_left_out(matrix: object) -> None:
    table = judgement.evaluation_table(JUDGED | {"details": {"trained": {"k-NN": {"confusion": matrix}}}})
    assert table is not None
    assert table["confusion"] is None


def test_labels_that_show_no_gain_are_said_on_top() -> None:
    lines = [{"of": "embedding", "verdict": "healthy"}, {"of": "features", "verdict": "healthy"}]
    better = story.overall(lines, judgement.evaluation_table(JUDGED))
    assert (better["word"], better["tone"], better["parts"][2]["word"]) == ("healthy", "good", "better")
    row = JUDGED["rows"][0] | {"trained": 0.7}  # type: ignore[operator]
    worse = story.overall(lines, judgement.evaluation_table(JUDGED | {"rows": [row]}))
    assert (worse["word"], worse["tone"]) == ("healthy, but not better yet", "wait")
    assert worse["remedy"]
    assert worse["parts"][2]["sentence"] == "k-NN: 70.0% trained, 50.0% untrained, 80.0% raw pixels."
    ill = story.overall([lines[0] | {"verdict": "shortcut"}], judgement.evaluation_table(JUDGED | {"rows": [row]}))
    assert ill["word"] == "shortcut"


@pytest.mark.parametrize(("text", "reason"), [
    ("256: small batches are enough", "small batches are enough"),
    ("{'layers': [1, 1]}: narrow: and good", "narrow: and good"),
    ("'a: b': because", "because"), ("(1, 2)", ""), ("x", ""),
])  # fmt: skip
def test_reasons_follow_the_value(text: str, reason: str) -> None:
    assert story.after_value(text) == reason
