import asyncio
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import gradio as gr
import pytest

from serving.client import Duplicates, Match, ServiceError
from ui.search import rank
from ui.tabs.duplicates import AT_ONCE, TOO_MANY, DuplicatesTab, export_text, groups_html, suggest, to_dict

HOSTILE = "\"><script>alert('x')</script>${1}{{x}}`"


def found(groups: Sequence[Sequence[str]], **facts) -> Duplicates:
    """Groups of pictures by their ids; the first of each has a cosine of 1."""
    matches = [
        [Match(id, f"pets/{id}.jpg", "cat", f"/p/{id}.jpg", 640, 480, similarity=1 - i / 100) for i, id in enumerate(g)]
        for g in groups
    ]
    given = {"state": "done", "stage": "", "share": 0.0, "problem": None, "model": "m", "made": "1", "automatic": False}
    given |= {"count": 9}
    given |= {
        "new": 0,
        "gone": 0,
        "threshold": 0.95,
        "own": 0.95,
        "too_many": False,
        "exact": [0] * len(groups),
        "closer_than": None,
        "least": 0.9,
        "total": len(groups),
        "groups": matches,
    }
    return Duplicates(**given | facts)


@pytest.fixture
def client(fake):
    class Compared(fake):
        all_groups = (("a", "b", "c"), ("d", "e"))

        facts: ClassVar[dict] = {}

        async def duplicates(self, threshold=None, limit=100, offset=0, *, closer_than=None, collection="pictures"):
            self._ask("duplicates", threshold, limit, offset)
            some = found(self.all_groups[offset : offset + limit], threshold=threshold or 0.97)
            return Duplicates(**vars(some) | {"total": len(self.all_groups)} | self.facts)

        async def items(self, limit=50, offset=0, filter=None, *, collection="pictures", model=None):
            some = [one for g in found(self.all_groups).groups for one in g if one.id in filter["id"]["in"]]
            return type("Items", (), {"count": len(some), "items": some})

    return Compared()


def test_a_group_is_a_row_whose_first_is_suggested_to_stay():
    html = groups_html(found([["a", "b", "c"], ["d", "e"]]), 0.95, 0, "shop")
    assert "2 groups, the largest first" in html
    assert re.findall(r'class="copy" data-id="(\w+)"( data-first=yes)?', html) == [
        ("a", " data-first=yes"),
        *[("b", ""), ("c", "")],
        *[("d", " data-first=yes"), ("e", "")],
    ]
    assert re.findall(r'class="score">([^<]*)<', html) == ["0.990", "0.980", "0.990"]
    assert html.count("640 × 480") == 5
    assert '"../collections/shop/items/b/thumbnail"' in html
    assert "Mark the other 2" in html and 'data-collection="shop" data-threshold="0.95"' in html


def test_a_page_says_which_groups_it_shows():
    some = [[f"a{i}", f"b{i}"] for i in range(20)]
    assert "Groups 21 to 40 of 1,234" in groups_html(found(some, total=1234), 0.95, 20, "shop")


def test_without_groups_the_threshold_is_named():
    assert "have a cosine of 0.975" in groups_html(found([]), 0.975, 0, "shop")
    assert "alike" not in groups_html(found([], made=None), 0.975, 0, "shop")


def test_a_name_is_only_text():
    hostile = Match(HOSTILE, HOSTILE, HOSTILE, None, 1, 1, similarity=1.0)
    some = Duplicates(**vars(found([])) | {"groups": [[hostile, hostile]], "exact": [1], "total": 1})
    html = groups_html(some, 0.9, 0, HOSTILE)
    assert "<script" not in html and re.findall(r" (on\w+)=", html) == []


def test_suggested_to_go_are_all_but_the_first_of_all_groups(client):
    assert asyncio.run(suggest(client, 0.95, "pictures")) == {"ids": ["b", "c", "e"], "problem": None}
    client.all_groups = [[f"a{i}", f"b{i}"] for i in range(AT_ONCE + 1)]
    client.asked.clear()
    assert len(asyncio.run(suggest(client, 0.95, "pictures"))["ids"]) == AT_ONCE + 1
    assert [asked[-1] for asked in client.asked] == [0, AT_ONCE]


def test_only_exact_copies_are_suggested_on_request_or_if_near_ones_are_too_many(client):
    client.facts = {"exact": [1, 0]}
    assert asyncio.run(suggest(client, 0.95, "pictures", near=False)) == {"ids": ["b"], "problem": None}
    client.facts |= {"too_many": True}
    assert asyncio.run(suggest(client, 0.95, "pictures", near=False)) == {"ids": ["b"], "problem": None}
    assert asyncio.run(suggest(client, 0.95, "pictures")) == {"ids": ["b"], "problem": TOO_MANY}


def test_exact_copies_are_named_instead_of_their_cosine():
    html = groups_html(found([["a", "b", "c"]], exact=[1]), 0.95, 0, "shop")
    assert re.findall(r'class="score">([^<]*)<', html) == ["exact copy", "0.980"]


def test_marks_are_saved_as_paths_and_as_a_table(client):
    assert asyncio.run(export_text(client, ["c", "a"], "paths", "shop")) == "/p/c.jpg\n/p/a.jpg\n"
    assert asyncio.run(export_text(client, ["c", "a"], "csv", "shop")).startswith("id,name,label,")


def test_programs_get_plain_groups():
    answer = to_dict(found([["a", "b"]]))
    assert [one["id"] for one in answer["groups"][0]] == ["a", "b"]
    assert "path" not in answer["groups"][0][0] and answer["groups"][0][0]["file"] == "/p/a.jpg"
    assert (answer["total"], answer["groups"][0][1]["similarity"]) == (1, 0.99)


@pytest.fixture
def tab(client, in_loop):
    """tab(name) -> the tab's method that an event calls"""

    def make() -> gr.Blocks:
        with gr.Blocks() as page:
            DuplicatesTab(
                client, gr.State(()), gr.Dropdown(["pictures"]), gr.Tabs(), page, gr.State(0), gr.State("Similar")
            )
        return page

    page = in_loop(make)
    return lambda name: next(one.fn for one in page.fns.values() if one.name == name)


@pytest.fixture
def look(tab):
    """look(selected, threshold) -> what the tab shows then"""
    return lambda selected, threshold: asyncio.run(tab("refresh")(selected, "pictures", threshold, 0))


@pytest.fixture
def ranked(client):
    """The client with ranks: a cosine of 0.9 + r / 10 has the rank r, so 0.95 has 0.5."""
    plain = type(client).duplicates

    async def duplicates(threshold=0.95, limit=100, offset=0, *, closer_than=None, collection="pictures"):
        threshold = (threshold or 0.95) if closer_than is None else 0.9 + closer_than / 10
        answer = await plain(client, threshold, limit, offset, collection=collection)
        return replace(answer, threshold=threshold, closer_than=round(10 * (threshold - 0.9), 6))

    client.duplicates = duplicates
    return client


def test_each_copy_says_closer_than_how_many_random_pairs_it_is():
    (first, second), _ = found([["a", "b"], ["c", "d"]]).groups
    group = [replace(first, closer_than=1.0), replace(second, closer_than=0.9957)]
    html = groups_html(replace(found([]), groups=[group], exact=[0], total=1), 0.95, 0, "shop")
    assert re.findall(r'class="rank"[^>]*>([^<]*)<', html) == ["closer than 99.5 % of pairs"]
    assert "rank" not in groups_html(found([["a", "b"]]), 0.95, 0, "shop")


@pytest.mark.slow
def test_the_slider_says_closer_than_how_many_random_pairs_its_cosine_is(look, ranked):
    slider, choice = look("Duplicates", 0.95)[2:4]
    assert (slider["value"], slider["info"]) == (0.95, "closer than 50 % of pairs")
    assert choice["visible"] and choice["choices"] == rank.choices()


@pytest.mark.slow
def test_without_ranks_the_tab_looks_as_before(look, client):
    slider, choice = look("Duplicates", 0.95)[2:4]
    assert slider["info"] is None and not choice["visible"]


@pytest.mark.slow
def test_a_limit_as_a_rank_moves_the_slider(tab, ranked):
    assert asyncio.run(tab("limit_by_rank")("pictures", 0.5)) == (pytest.approx(0.95), 0)
    ranked.failure = ServiceError("the service is busy", 429)
    with pytest.warns(UserWarning, match="the service is busy"):
        assert asyncio.run(tab("limit_by_rank")("pictures", 0.5)) == (gr.skip(), 0)


@pytest.mark.slow
def test_nothing_is_requested_while_the_tab_is_hidden(look, client):
    look("Map", 0.95)
    assert client.asked == []
    assert "2 groups" in look("Duplicates", 0.95)[4]


@pytest.mark.slow
def test_the_slider_begins_at_the_threshold_of_the_collection(look, client):
    slider, groups = (look("Duplicates", None)[at] for at in (2, 4))
    assert slider["value"] == 0.97 and 'data-threshold="0.97"' in groups
    assert client.asked[-1][1] is None


@pytest.mark.slow
def test_a_threshold_below_the_least_that_was_compared_is_raised_to_it(look, client):
    assert look("Duplicates", 0.5)[2]["value"] == 0.9
    assert client.asked[-1][1] == 0.9


def test_a_failure_is_shown_and_a_missing_collection_is_called_empty(look, client):
    client.failure = ServiceError("the service at x cannot be reached")
    assert "the service at x cannot be reached" in look("Duplicates", 0.95)[0]
    client.failure = ServiceError("there is no collection", 404, "not_found")
    assert "The collection is empty" in look("Duplicates", 0.95)[0]
