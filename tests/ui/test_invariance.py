import asyncio
import re

import gradio as gr
import pytest

from serving.client import ServiceError
from ui.search.picture import Picture
from ui.search.query import Query
from ui.tabs.invariance import InvarianceTab, examine
from ui.widgets.chart import panels_html

CAT = Picture("pets/<cat>.jpg", id="id1")


def look(client, in_loop, trail=(), selected="Invariance") -> list:
    """All that is shown in the course of one look."""

    def build():
        with gr.Blocks() as page, gr.Tabs() as tabs, gr.Tab("Here"):
            InvarianceTab(client, gr.State(()), gr.Dropdown(["pictures"]), tabs, page, gr.State(0), gr.State("Similar"))
        return page

    fn = next(fn.fn for fn in in_loop(build).fns.values() if fn.name == "refresh")

    async def all_of():
        return [shown async for shown in fn(trail, selected, 16.0, 3, "pictures")]

    return asyncio.run(all_of())


def test_there_is_a_panel_per_augmentation_and_a_line_per_kind_of_pictures(fake):
    html = asyncio.run(examine(fake(), CAT, 16, 0, "pictures"))
    assert re.findall(r"<h3>(\w+)</h3>", html) == ["crop", "hue"]
    assert re.findall(r'<polyline class="line-(\w+)"', html) == ["own", "untrained", "trained"] * 2
    assert "mean of 16 pictures" in html and "The same before training" in html and "&lt;cat&gt;.jpg alone" in html
    assert "it notices &lt;hue&gt; most" in html and "<cat>" not in html
    without = asyncio.run(examine(fake(), None, 16, 0, "pictures"))
    assert "line-own" not in without and " alone" not in without


def test_the_curves_start_at_zero_and_pass_through_the_measurements(fake):
    html = panels_html(asyncio.run(fake().invariance()), None)
    points = [[*map(float, point.split(","))] for point in re.search(r'points="([^"]*)"', html)[1].split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert (x1 - x0) / (x2 - x0) == pytest.approx(0.5, abs=0.01)
    assert (y0 - y1) / (y0 - y2) == pytest.approx(0.2 / 0.8, abs=0.01)
    hue = re.findall(r'cy="([\d.]+)"', html)[-1]
    assert float(hue) == pytest.approx(10, abs=0.1), "the highest of all reaches the top"


def test_every_value_is_in_a_tooltip_a_label_and_a_table(fake):
    html = panels_html(asyncio.run(fake().invariance()), None)
    assert "<title>1: 80% of the way to another picture, cosine 0.600</title>" in html
    assert 'aria-label="crop, share cut away: h moves 80% of the way to another picture at 1"' in html
    assert '<th scope="row">crop</th><td>1</td><td>80% (0.600)</td>' in html
    assert re.findall(r'<img src="(data:\d)" alt="([^"]*)"', html) == [
        *(("data:0", "as it is"), ("data:1", "crop 0.5"), ("data:2", "crop 1")),
        *(("data:0", "as it is"), ("data:3", "hue 0.5")),
    ]


@pytest.mark.slow
def test_it_computes_only_while_shown_and_says_that_it_is_working(fake, in_loop):
    client = fake()
    assert look(client, in_loop, selected="Map") == [gr.skip()] and client.asked == []
    working, shown = look(client, in_loop, (Query((CAT,)),))
    assert "Embedding 16 pictures" in working and "panels" in shown
    assert client.asked[-1] == ("invariance", b"a thumbnail", 16, 3, "pictures")


@pytest.mark.slow
def test_what_is_missing_is_explained(fake, in_loop):
    small = ServiceError("collection: at least two pictures are compared", 400, "malformed", "collection")
    assert "which has fewer than two" in look(fake(failure=small), in_loop)[-1]
    other = ServiceError("pictures holds vectors of tiny, and this is lite0", 409, "other_encoder", "collection")
    assert "pictures holds vectors of tiny" in look(fake(failure=other), in_loop)[-1]
    absent = ServiceError("this service was built without training's code", 501, "not_offered")
    assert "built without training&#x27;s code" in look(fake(failure=absent), in_loop)[-1]
