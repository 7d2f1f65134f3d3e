"""The report's pictures: axes, charts, matrices, thumbnails, neighbours and the map."""

from __future__ import annotations

import numpy as np
import pytest

from barlow.figures import Snapshot, cross_correlation, embedding_map, neighbours, strongest, varied
from barlow.pictures import Line, axis, chart, diverging, picture, sheet, short, thin, thumbnail


@pytest.mark.parametrize(("value", "text"), [
    (0, "0"), (1200, "1,200"), (0.05, "0.05"), (1e-7, "1e-7"), (2.5, "2.5"), (1e6, "1e6"),
    (0.001, "0.001"), (99.5, "99.5"), (5e-4, "5e-4"), (-3, "-3"),
])  # fmt: skip
def test_numbers_on_an_axis(value: float, text: str) -> None:
    assert short(value) == text


def test_axes_hold_their_data() -> None:
    for values in ([0.2, 0.9], [5.0], [0.0, 0.0], [-3.0, 12.0], [1e-9, 2e-9], [1e5, 1e9]):
        made = axis(np.array(values))
        assert made.low <= min(values)
        assert max(values) <= made.high
        assert 3 <= len(made.ticks) <= 7 or len(set(values)) == 1
    log = axis(np.array([0.03, 4000.0]), log=True)
    assert (log.low, log.high) == (pytest.approx(0.01), pytest.approx(10000))
    assert np.allclose(log.place(np.array([0.01, 10.0, 10000.0])), [0, 0.5, 1])
    assert axis(np.array([np.nan, -1.0]), log=True).low > 0


def test_long_lines_keep_their_course_and_end() -> None:
    x = np.arange(10_000.0)
    thin_x, thin_y = thin(x, 3 * x)
    assert len(thin_x) == 300
    assert thin_x[-1] == 9999
    assert np.allclose(thin_y, 3 * thin_x)
    assert np.all(np.diff(thin_x)[:-1] < 40)
    assert len(thin(np.array([1.0, 2.0]), np.array([np.nan, 1.0]))[0]) == 1


def test_charts_escape_and_bear_emptiness() -> None:
    made = chart([Line("<b>", [1, 2], [3, 4]), Line("absent", [], [])], title="a<i>", x_label='"x"')
    assert "<b></b>" not in made
    assert made.count("&lt;b&gt;") == 2  # in the key and in the name that is read aloud
    assert "absent" not in made
    assert chart([Line("none", [1.0], [float("nan")])], title="t", x_label="x") == ""
    assert "polyline" in chart([Line("one", [5.0], [1.0])], title="t", x_label="x")


def test_the_cross_correlation_is_that_of_the_paper() -> None:
    draw = np.random.default_rng(0)
    a = draw.standard_normal((40, 300)).astype(np.float32)
    b = (a + draw.standard_normal(a.shape)).astype(np.float32)
    c = cross_correlation(a, b)
    assert c.shape == (256, 256)
    assert np.isclose(c[3, 200], np.corrcoef(a[:, 3], b[:, 200])[0, 1])
    assert np.all(cross_correlation(a * 0, b) == 0)


def test_pictures_are_small_and_whole() -> None:
    for channels, mode in ((1, "L"), (2, "L"), (3, "RGB"), (7, "RGB")):
        assert picture(np.zeros((5, 4, channels), np.uint8)).mode == mode
        assert thumbnail(np.zeros((50, 60, channels), np.uint8)).startswith("data:image/jpeg;base64,")
        uri, cells = sheet(np.zeros((10, 12, 12, channels), np.uint8))
        assert cells == 4
        assert uri.startswith("data:image/jpeg")
    assert len(diverging(np.random.default_rng(0).uniform(-1, 1, (256, 256)))) < 90_000


def test_neighbours_are_the_nearest_by_cosine_and_never_the_image_itself() -> None:
    features = np.array([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 0.9], [5, 5], [-1, 0]])
    shot = Snapshot(0, features, features, features)
    images = np.arange(6, dtype=np.uint8)[:, None, None, None].repeat(3, axis=1).repeat(3, axis=2) * 40
    rows = {
        row["query"]["key"]: [n["key"].split(" ")[0] for n in row["after"]]
        for row in neighbours([shot], images, list("abcdef"))
    }
    assert rows["a"][:2] == ["b", "e"]
    assert all(key not in nearest for key, nearest in rows.items())
    assert len(varied(features, 4)) == len(set(varied(features, 4))) == 4


def test_the_map_puts_the_strongest_direction_across() -> None:
    z = np.zeros((9, 3))
    z[:, 1], z[:, 2] = np.linspace(-4, 4, 9), np.tile([0.5, -0.5, 0], 3)
    plane, share = strongest(z)
    points = embedding_map(plane, [str(i) for i in range(9)], 3)
    across = [float(point["x"]) for point in points]
    assert across == sorted(across) or across == sorted(across, reverse=True)
    assert share == "100%"
    assert any(point["big"] for point in points)
    assert [(point["column"], point["row"]) for point in points[2:5]] == [(2, 0), (0, 1), (1, 1)]
    flat = embedding_map(strongest(np.ones((4, 1)))[0], list("abcd"), 2)
    assert {point["x"] for point in flat} == {"3.0"}
