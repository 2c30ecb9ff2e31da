import html
import json
import re
from xml.etree import ElementTree

import pytest

from ui.widgets.chart import Line, Plot, chart

W, H, LEFT, RIGHT, TOP, BOTTOM = Plot.width, Plot.height, Plot.left, Plot.right, Plot.top, Plot.bottom


def percent(value: float) -> str:
    return f"{100 * value:.3g}%"


def lines(svg: str) -> list[list[tuple[float, float]]]:
    return [
        [tuple(map(float, point.split(","))) for point in points.split()]
        for points in re.findall(r'<polyline class="curve" points="([^"]*)"', svg)
    ]


def test_the_first_and_the_last_value_stand_where_the_axes_say():
    (line,) = lines(chart("Loss", [Line("a", 0, [(0, 0.0), (10, 4.0)])], 10, str))
    assert line == [(LEFT, H - BOTTOM), (W - RIGHT, TOP)]


@pytest.mark.parametrize(
    ("values", "marks"),
    [([0.0, 4.0], ["0.0", "1.0", "2.0", "3.0", "4.0"]), ([3.36, 5.8], ["3.0", "4.0", "5.0", "6.0"])],
)
def test_marks_are_round_and_hold_the_values_between_them(values, marks):
    svg = chart("Loss", [Line("a", 0, list(enumerate(values)))], 1, str)
    assert re.findall(r'text-anchor="end">([^<]*)<', svg) == marks


@pytest.mark.parametrize("values", [[0.0, 0.0], [2.5], [-1e-9, -1e-9], [1e-12, 2e-12], [0.0, 1e9]])
def test_any_finite_values_stay_inside(values):
    (line,) = lines(chart("Loss", [Line("a", 0, list(enumerate(values)))], 1, str))
    assert all(LEFT <= x <= W - RIGHT and TOP <= y <= H - BOTTOM for x, y in line)


@pytest.mark.parametrize(
    ("values", "marks"),
    [
        ([0.499, 0.501], ["40%", "45%", "50%", "55%", "60%"]),  # a difference of chance looks small
        ([0.99, 1.0], ["80%", "85%", "90%", "95%", "100%"]),
        ([0.0, 0.01], ["0%", "5%", "10%", "15%", "20%"]),
        ([0.1, 0.95], ["0%", "50%", "100%"]),
    ],
)
def test_shares_have_axes_within_their_bounds_that_do_not_enlarge_noise(values, marks):
    svg = chart("kNN", [Line("a", 0, list(enumerate(values)))], 1, percent, bounds=(0, 1))
    assert re.findall(r'text-anchor="end">([^<]*)<', svg) == marks
    assert all(TOP <= y <= H - BOTTOM for _, y in lines(svg)[0])


def test_a_run_of_one_epoch_is_a_dot():
    assert chart("Loss", [Line("a", 0, [(1, 2.0)])], 1, str).count("<circle") == 1


def test_chance_is_within_the_chart_and_named():
    svg = chart("Loss", [Line("a", 0, [(1, 2.0), (2, 1.0)])], 2, str, chance=5.5)
    level = float(re.search(r'class="chance"[^>]* y1="([^"]*)"', svg)[1])
    assert TOP <= level < min(y for _, y in lines(svg)[0])
    assert "chance 5.5" in svg


def test_the_pointer_and_screen_readers_get_the_values():
    svg = chart("kNN", [Line("a", 0, [(10, 0.25), (20, 0.5)]), Line("b", 1, [(10, 0.3)])], 20, percent)
    data = json.loads(html.unescape(re.search(r'data-lines="([^"]*)"', svg)[1]))
    assert data == [{"name": "a", "points": [[10, "25%"], [20, "50%"]]}, {"name": "b", "points": [[10, "30%"]]}]
    assert 'aria-label="kNN by epoch: a ends at 50%; b ends at 30%"' in svg


def test_names_are_only_text():
    hostile = "<script>\"'&${x}"
    svg = chart(hostile, [Line(hostile, 0, [(1, 2.0)])], 1, str)
    assert "<script" not in svg
    assert ElementTree.fromstring(svg).find("figcaption/b").text == hostile
