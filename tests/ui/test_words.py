import asyncio
from urllib.parse import parse_qsl

import pytest

from ui.app import build
from ui.search import link
from ui.search.picture import Picture
from ui.search.query import Query, SearchSettings, nearest
from ui.widgets.side import chips_html, remove, search_part, show_trail, steps_html

CAT, DOG = (Picture(f"{i}.jpg", id=f"id{i}") for i in range(2))
RED = Query((), text="a <red> shoe")
MIXED = Query((CAT,), (DOG,), "red")


def test_words_stay_while_pictures_come_and_go():
    assert RED.picture is None and RED.pictures == ()
    assert RED.like(CAT) == Query((CAT,), (), RED.text)
    assert RED.unlike(CAT) == Query((), (CAT,), RED.text)
    assert MIXED.without(CAT) == Query((), (DOG,), "red") and MIXED.unlike(CAT) == Query((), (DOG, CAT), "red")
    assert MIXED.without_text() == Query((CAT,), (DOG,)) and RED.without_text() is None
    assert MIXED.replace_first(DOG) == Query((DOG,), (DOG,), "red")


@pytest.mark.parametrize("query", [RED, MIXED])
def test_words_are_sent_and_no_rank_is_asked_for(fake, query):
    client = fake()
    asyncio.run(nearest(client, query, SearchSettings(closer_than=0.99)))
    more = client.asked[-1][-1]
    assert (more["text"], more["closer_than"]) == (query.text, None)
    asyncio.run(nearest(client, Query((CAT,)), SearchSettings()))
    assert client.asked[-1][-1]["text"] is None


@pytest.mark.parametrize("query", [RED, Query((), text="é & ?like=id0"), Query((), (CAT,), "red")])
def test_a_link_brings_words_back(fake, query):
    client, params = fake(), parse_qsl(link.query_string(query, SearchSettings()))
    found = asyncio.run(link.load_query(client, params, "pictures"))
    assert (found.text, [p.id for p in found.negative]) == (query.text, [p.id for p in query.negative])
    assert asyncio.run(link.load_query(client, [("text", "  ")], "pictures")) is None


def test_words_are_shown_in_the_history_and_among_the_parts_of_a_search(event):
    assert chips_html((RED,)) == ""  # the box shows them
    assert "a &lt;red&gt; shoe</span>" in steps_html((RED, MIXED)) and "<red>" not in steps_html((RED, MIXED))
    chips = chips_html((MIXED,))
    assert 'data-at="2" title="Remove “red”"' in chips and chips.count("<li>") == 3
    assert "a &lt;red&gt; shoe</span>" in chips_html((RED.like(CAT),)) and "<red>" not in chips_html((RED.like(CAT),))
    assert remove((MIXED,), event(at=2)) == (MIXED, Query((CAT,), (DOG,)))
    assert remove((RED, MIXED), event(at=0))[-1] == Query((), (DOG,), "red")
    assert "Drop a picture" in show_trail((RED,))[0]
    assert search_part((RED,), event(box=[0, 0, 0.5, 1])) == (RED,)  # there is no picture to cut


def test_the_box_is_shown_for_an_encoder_that_reads_text(fake, in_loop):
    """Of several encoders, for the one that is chosen."""
    client = fake()
    cards = [{"id": "fake"}, {"id": "towers", "text": {"length": 8}}]

    async def models():
        return cards

    client.models = models
    page = in_loop(build, client)
    show = next(listener.fn for listener in page.fns.values() if listener.name == "show")
    for encoder, visible in ((None, False), ("fake", False), ("towers", True)):
        shown = asyncio.run(show((), 60, "", 24, 0.0, 0.0, [], "pictures", encoder, None))
        assert shown[10]["visible"] is visible
    del cards[0]
    assert asyncio.run(show((), 60, "", 24, 0.0, 0.0, [], "pictures", None, None))[10]["visible"] is True


def test_words_are_a_search_by_themselves_and_nothing_is_none(fake, in_loop):
    page = in_loop(build, fake())
    search = next(listener.fn for listener in page.fns.values() if listener.name == "search_words")
    assert search((MIXED,), " a red shoe ") == (MIXED, Query((), text="a red shoe"))
    assert "__type__" in search((MIXED,), "  ")
