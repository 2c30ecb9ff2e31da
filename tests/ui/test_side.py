import re

import gradio as gr
import pytest

from ui.search.crop import Box
from ui.search.picture import Picture
from ui.search.query import Query
from ui.widgets.side import MOST_STEPS, chips_html, column, steps_html

A, B, C = (Picture(f"{i}.jpg", id=f"id{i}") for i in range(3))
MIXED = Query((A, B), (C,))


@pytest.fixture
def call(in_loop):
    """call(name, *args) -> what that listener answers."""

    def build() -> gr.Blocks:
        with gr.Blocks() as page:
            column(gr.State(()))
        return page

    listeners = {listener.name: listener.fn for listener in in_loop(build).fns.values()}
    return lambda name, *args: listeners[name](*args)


def test_several_files_at_once_are_one_search(call, uploads, event):
    for name in ("a.jpg", "b.jpg"):
        (uploads / name).write_bytes(b"...")
    (query,) = call("upload", (), event(paths=[str(uploads / "a.jpg"), str(uploads / "b.jpg")]))
    assert [chosen.name for chosen in query.positive] == ["a.jpg", "b.jpg"]


def test_a_failure_in_the_browser_is_shown_and_changes_nothing(call, event):
    with pytest.warns(UserWarning, match=r"^The camera is gone"):
        assert call("upload", (MIXED,), event(failure="The camera is gone.")) == gr.skip()


def test_a_part_is_a_new_step_and_the_whole_another(call, event):
    trail = call("search_part", (MIXED,), event(box=[0, 0.1, 0.5, 1]))
    assert trail[-1].picture.box == Box(0, 0.1, 0.5, 1) and trail[-1].negative == (C,)
    assert call("search_whole", trail) == (*trail, MIXED)
    for nonsense in ({}, {"box": [0, 0, 0, 0]}, {"box": 7}):
        assert call("search_part", trail, event(**nonsense)) == gr.skip()


def test_a_picture_is_taken_out_of_the_search_on_its_side(call, event):
    assert call("remove", (MIXED,), event(at=2)) == (MIXED, Query((A, B)))
    assert call("remove", (MIXED,), event(at=0)) == (MIXED, Query((B,), (C,)))
    assert call("remove", (Query((B,)), Query((A,), (C,))), event(at=0)) == (Query((B,)),)


def test_back_returns_one_step_and_a_click_on_a_step_returns_to_it(call, event):
    trail = (Query((A,)), Query((B,)), Query((C,)))
    assert call("step_back", trail) == trail[:2]
    assert call("return_to", trail, event(at=0)) == trail[:1]


def test_one_picture_has_no_chips_and_one_search_no_steps():
    assert chips_html(()) == chips_html((Query((A,)),)) == ""
    assert steps_html(()) == steps_html((Query((A,)),)) == ""


def test_chips_are_listed_by_side_and_have_titles():
    html = chips_html((MIXED,))
    likes, unlikes = html.split("<h4>Not like these</h4>")
    assert re.findall(r'data-at="(\d)" title="Remove (\d).jpg"', likes) == [("0", "0"), ("1", "1")]
    assert re.findall(r'data-at="(\d)" title="Remove (\d).jpg"', unlikes) == [("2", "2")]


def test_the_last_steps_are_shown_and_the_current_one_is_marked():
    html = steps_html((Query((A,)),) * 20 + (MIXED,))
    assert html.count("<li>") == MOST_STEPS
    assert html.endswith("</li></ul>") and 'data-at="20" title="0.jpg and others" aria-current="step"' in html
    assert html.count("aria-current") == 1


def test_a_name_is_only_text():
    hostile = Picture('"><script>${1}', "'><script>", id="a")
    html = chips_html((Query((hostile, A)),)) + steps_html((Query((hostile,)),) * 2)
    assert "<script" not in html
