import asyncio
import base64
import json
import re

import gradio as gr
import numpy as np
import pytest

from serving.client import Map, ServiceError
from ui.search.choice import Choice, within
from ui.search.query import SearchSettings
from ui.search.selection import items_of
from ui.tabs.map import MOST_SHOWN, MapTab, choice_html, columns, to_dict
from ui.widgets import computing

HOSTILE = "<script>alert(1)</script>"


def a_map(n: int = 9, **facts) -> Map:
    """Pictures id0 to id8 on a grid from -1 to 1; every third is in group 1 and labelled."""
    given = {"state": "done", "stage": "", "share": 0.0, "problem": None, "model": "m", "made": "1", "automatic": False}
    given |= {"count": n, "new": 0, "gone": 0, "labels": ["cat"], "unplaced": 0, "ids": [f"id{i}" for i in range(n)]}
    at = np.arange(n)
    given |= {"x": np.float32(at % 3 - 1), "y": np.float32(at // 3 - 1)}
    given |= {"group": np.int32(at % 3 == 0), "label": np.int32(at % 3 == 0) - 1}
    return Map(**given | facts)


@pytest.fixture
def client(fake):
    """A FakeClient with a map, that answers conditions on ids."""

    class Mapped(fake):
        shown = a_map()

        async def map(self, places: bool = True, *, collection: str = "pictures") -> Map:
            self._ask("map", places, collection)
            return self.shown

        async def items(self, limit=50, offset=0, filter=None, *, collection="pictures", model=None):
            wanted = filter["id"]["in"]
            self.asked.append(("items", len(wanted)))
            found = [item for item in self.all if item.id in wanted]
            return type("Items", (), {"count": len(found), "items": found})

    return Mapped(count=1000)


def choose(**data) -> Choice:
    return Choice.parse({"collection": "pictures", "by": "label", "numbers": [], "polygon": None} | data)


def test_a_notch_of_an_outline_is_not_within_it():
    notched = np.array([[0, 0], [4, 0], [4, 4], [2, 1], [0, 4]])
    x, y = np.array([1.0, 2.0, 3.0, 5.0]), np.array([1.0, 2.0, 1.0, 1.0])
    assert within(x, y, notched).tolist() == [True, False, True, False]


def test_a_choice_is_the_highlighted_pictures_within_the_outline():
    left = [[-2, -2], [-0.5, -2], [-0.5, 0.5], [-2, 0.5]]
    assert choose(polygon=left).ids(a_map()) == ["id0", "id3"]
    assert choose(numbers=[0]).ids(a_map()) == ["id0", "id3", "id6"]
    assert choose(by="group", numbers=[0]).ids(a_map()) == ["id1", "id2", "id4", "id5", "id7", "id8"]
    assert choose(polygon=left, by="group", numbers=[0]).ids(a_map()) == []
    assert len(choose().ids(a_map())) == 9


@pytest.mark.parametrize("data", [{"by": "__class__"}, {"numbers": ["x"]}, {"polygon": [[1, "b"]]}, {"polygon": [1]}])
def test_data_that_no_browser_sends_is_refused_with_a_sentence(data):
    with pytest.raises(ValueError, match="select again"):
        choose(**data)
    with pytest.raises(ValueError, match="select again"):
        Choice.parse({})


def test_the_browser_gets_named_columns(client):
    answer = json.loads(asyncio.run(columns(client, "pictures")).body)
    x = np.frombuffer(base64.b64decode(answer["x"]), "<f4")
    assert (answer["ids"], answer["labels"], x.tolist()) == (client.shown.ids, ["cat"], client.shown.x.tolist())
    assert np.frombuffer(base64.b64decode(answer["label"]), "<i4").tolist() == client.shown.label.tolist()


def test_a_choice_is_counted_and_shown_and_can_be_listed(client):
    html = asyncio.run(choice_html(client, choose(numbers=[0])))
    assert "<h2>3 pictures chosen</h2>" in html
    assert re.findall(r'data-id="(\w+)"', html) == ["id0", "id3", "id6"]
    assert "No picture is in this part" in asyncio.run(choice_html(client, choose(polygon=[[5, 5], [6, 5], [6, 6]])))


def test_a_large_choice_loads_and_shows_its_first_pictures_only(client):
    client.shown = a_map(900)
    html = asyncio.run(choice_html(client, choose()))
    assert "900 pictures chosen" in html and f"The first {MOST_SHOWN} are shown" in html
    assert html.count('class="tile"') == MOST_SHOWN
    assert [asked for asked in client.asked if asked[0] == "items"] == [("items", MOST_SHOWN)]


def test_deleted_items_are_left_out_of_a_list(client):
    found = asyncio.run(items_of(client, ["id5", "gone", "id1"], SearchSettings()))
    assert [item.id for item in found] == ["id5", "id1"]


def test_programs_get_numbers_and_words():
    data = to_dict(a_map(3))
    assert (data["x"], data["group"], data["label"]) == ([-1.0, 0.0, 1.0], [1, 0, 0], ["cat", None, None])
    json.dumps(data)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"state": "computing", "stage": "arranging", "share": 0.42}, "Arranging, 42%"),
        ({"state": "failed", "problem": HOSTILE}, "The map could not be made: &lt;script&gt;"),
        ({"state": "none", "count": None, "made": None}, "make one"),
        ({}, "9 pictures. Look."),
        ({"missing": 1}, "9 pictures. Look. 1 picture is still to be embedded again, and not among them."),
        ({"new": 3, "gone": 1}, "9 pictures; 3 new and 1 deleted since it was made. Look."),
        ({"new": 3, "automatic": True}, "9 pictures; 3 new since it was made. It will be made again by itself. Look."),
        ({"state": "none", "count": None, "automatic": True}, "The map is being made"),
        ({"state": "failed", "problem": "full", "automatic": True}, "The map could not be made: full"),
    ],
)
def test_progress_is_shown(facts, words):
    html = computing.status_html(a_map(**facts), "The map", "make one", "Look.")
    assert words in html and "<script" not in html


def test_the_button_is_disabled_during_a_computation_and_primary_if_the_result_is_missing_or_old():
    none, now, old = (
        computing.start_button(a_map(**facts), "First", "Again")
        for facts in ({"count": None, "state": "none"}, {"state": "computing"}, {"new": 2})
    )
    assert (none["value"], none["variant"], none["interactive"]) == ("First", "primary", True)
    assert (now["value"], now["variant"], now["interactive"]) == ("Again", "secondary", False)
    assert old["variant"] == "primary"
    sent = [computing.timer(a_map(state=state)).constructor_args["active"] for state in ("computing", "done")]
    assert sent == [True, False]


def test_a_small_collection_has_no_button_unless_a_computation_failed():
    for facts in ({"state": "none", "count": None}, {"new": 2}, {}):
        assert not computing.start_button(a_map(automatic=True, **facts), "First", "Again")["visible"]
        assert computing.start_button(a_map(**facts), "First", "Again")["visible"]
    assert computing.start_button(a_map(automatic=True, state="failed"), "First", "Again")["visible"]


def test_the_page_asks_again_until_a_result_that_is_made_by_itself_is_there_and_up_to_date():
    for facts in ({"state": "none", "count": None}, {"new": 2}, {"gone": 1}):
        assert computing.timer(a_map(automatic=True, **facts)).active
        assert not computing.timer(a_map(**facts)).active
    for facts in ({}, {"state": "failed", "count": None}):
        assert not computing.timer(a_map(automatic=True, **facts)).active


def test_nothing_is_requested_while_hidden_and_no_places_when_shown(client, in_loop):
    def make() -> gr.Blocks:
        with gr.Blocks() as page:
            MapTab(client, gr.State(()), gr.Dropdown(["pictures"]), gr.Tabs(), page, gr.State(0), gr.State("Similar"))
        return page

    look = next(one.fn for one in in_loop(make).fns.values() if one.name == "refresh")
    asyncio.run(look("Similar", "pictures"))
    assert client.asked == []
    words, _, shown, _ = asyncio.run(look("Map", "pictures"))
    assert "9 pictures" in words and shown == {"collection": "pictures", "made": "1", "new": 0, "gone": 0}
    assert client.asked == [("map", False, "pictures")]


def test_the_page_asks_again_after_an_error_that_may_pass(client, in_loop):
    def make() -> gr.Blocks:
        with gr.Blocks() as page:
            MapTab(client, gr.State(()), gr.Dropdown(["pictures"]), gr.Tabs(), page, gr.State(0), gr.State("Similar"))
        return page

    refresh = next(one.fn for one in in_loop(make).fns.values() if one.name == "refresh")
    for status, asks in ((0, True), (429, True), (503, True), (403, False), (404, False)):
        client.failure = ServiceError("no map now", status)
        assert asyncio.run(refresh("Map", "pictures"))[-1].active == asks, status
