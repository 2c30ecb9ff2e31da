import asyncio
import re
from dataclasses import replace

import pytest

from serving.client import Item, Match, ServiceError
from ui.search import rank
from ui.search.picture import Picture
from ui.search.query import Query, SearchSettings
from ui.tabs.similar import SimilarTab
from ui.widgets.grid import grid_html, selection_html
from ui.widgets.results import AT_ONCE, PAGE, VIEWS, browse, neighbours

USUAL = SearchSettings()
BULK = "<code>python serving/bulk.py --data ~/Pictures</code>"


@pytest.fixture
def upload(uploads):
    (uploads / "mine.jpg").write_bytes(b"...")
    return Query((Picture("mine.jpg", file=uploads / "mine.jpg"),))


def like(i: int) -> Query:
    return Query((Picture(f"cat {i}.jpg", id=f"id{i}"),))


def test_the_collection_says_which_part_of_it_is_shown(fake):
    client = fake(count=PAGE + 7)
    heading, grid, count = asyncio.run(browse(client, PAGE, USUAL))
    assert f"{PAGE} of {PAGE + 7} pictures" in heading
    assert count == PAGE + 7 and grid.count("<li>") == PAGE
    assert client.asked == [("items", PAGE, 0, None, "pictures", None)]


def test_many_pictures_are_listed_in_several_answers(fake):
    client = fake(count=2 * AT_ONCE + 50)
    _, grid, _ = asyncio.run(browse(client, 2 * AT_ONCE + 10, USUAL))
    assert grid.count("<li>") == 2 * AT_ONCE + 10
    assert [asked[1:3] for asked in client.asked] == [(AT_ONCE, 0), (AT_ONCE, AT_ONCE), (10, 2 * AT_ONCE)]


@pytest.mark.parametrize(("state", "looks"), [("alike", "quality"), ("different", "doubt")])
def test_the_collection_says_whether_new_pictures_look_like_it(fake, state, looks):
    tab, client = object.__new__(SimilarTab), fake()
    tab.client = client
    controls = (24, 0, 0, ("label=cat",), "shop", "tiny", "")

    def heading(trail=()) -> str:
        return asyncio.run(tab.show(trail, PAGE, "", *controls))[4]

    assert "500" not in heading()
    text = "The last 500 pictures differ (p < 0.01)"
    client.drifted = replace(client.drifted, state=state, text=text)
    assert f'<p class="{looks}">The last 500 pictures differ (p &lt; 0.01).</p>' in heading()
    assert client.asked.count(("drift", "shop", "tiny")) == 2
    assert "500" not in heading((like(3),))  # of a search


@pytest.mark.parametrize(("count", "words"), [(1, "<p>1 picture."), (12, "<p>12 pictures.")])
def test_a_small_collection_is_counted(fake, count, words):
    assert words in asyncio.run(browse(fake(count), PAGE, USUAL))[0]


def test_browsing_applies_the_conditions(fake):
    client = fake()
    asyncio.run(browse(client, PAGE, SearchSettings(where=("price>=3",), collection="shop", encoder="tiny")))
    assert client.asked == [("items", PAGE, 0, {"price": {"gte": 3}}, "shop", "tiny")]


def test_an_empty_collection_says_how_to_fill_it(fake, upload):
    assert BULK in asyncio.run(browse(fake(count=0), PAGE, USUAL))[1]
    assert BULK in asyncio.run(neighbours(fake(count=0), upload, USUAL))[1]


def test_a_missing_collection_says_how_to_fill_it_too(fake, upload):
    client = fake(failure=ServiceError("there is no collection pictures", 404, "not_found", "name"))
    assert BULK in asyncio.run(browse(client, PAGE, USUAL))[1]
    assert BULK in asyncio.run(neighbours(client, upload, USUAL))[1]
    with pytest.raises(ServiceError):
        asyncio.run(neighbours(client, like(3), USUAL))


def test_without_results_the_page_says_what_to_do(fake, upload):
    none = fake(count=0)
    assert "no other picture" in asyncio.run(neighbours(fake(count=1), like(0), USUAL))[1]
    assert "Lower the limit" in asyncio.run(neighbours(none, upload, SearchSettings(min_similarity=0.9)))[1]
    narrow = SearchSettings(where=("label=dog", "price>3"))
    assert (
        "No picture matches <code>label=dog</code> and <code>price&gt;3</code>"
        in (asyncio.run(neighbours(none, upload, narrow))[1])
    )
    assert "Remove a condition" in asyncio.run(browse(none, PAGE, narrow))[1]


@pytest.mark.parametrize("view", VIEWS)
def test_pictures_that_are_still_to_be_embedded_again_are_said_to_be_missing(fake, view):
    client = fake()
    assert "embedded again" not in asyncio.run(VIEWS[view](client, 5, USUAL))[0]
    client.missing = 1200
    heading, _ = asyncio.run(VIEWS[view](client, 5, USUAL))
    assert "1,200 pictures are still to be embedded again, and not among them." in heading


@pytest.mark.parametrize("estimated", [True, False])
def test_estimated_similarities_are_said_to_be_estimates(fake, estimated):
    client = fake()
    client.estimated = estimated
    assert ("some similarities are estimates" in asyncio.run(neighbours(client, like(0), USUAL))[0]) == estimated


def test_neighbours_come_in_the_services_order_with_cosines_of_two_decimals(fake):
    _, grid, _ = asyncio.run(neighbours(fake(), like(0), SearchSettings(k=3)))
    assert re.findall(r'data-id="(\w+)"', grid) == ["id1", "id2", "id3"]
    assert re.findall(r'<span class="score">([^<]*)</span>', grid) == ["1.00", "0.88", "0.75"]
    assert 'class="selection" data-total="3"' in grid


def test_each_result_says_closer_than_how_many_random_pairs_it_is(fake):
    client = fake()
    client.rank = 0.998
    heading, grid, _ = asyncio.run(neighbours(client, like(0), SearchSettings(k=2)))
    assert re.findall(r'<span class="rank" title="([^"]*)">([^<]*)</span>', grid) == 2 * [
        ("99.8 % of random pairs of pictures of this collection are less alike", "closer than 99.8 % of pairs")
    ]
    assert "with the cosine of the embeddings and its rank among random pairs" in heading
    beside = asyncio.run(neighbours(client, like(0), SearchSettings(k=2, other_encoder="other")))[1]
    assert beside.count("closer than 99.8 % of pairs") == 4
    for other, query in ((client, like(0).unlike(like(1).picture)), (fake(), like(0))):
        heading, grid, _ = asyncio.run(neighbours(other, query, USUAL))
        assert "random pairs" not in heading and 'class="rank"' not in grid


def test_a_limit_as_a_rank_is_shown_with_its_cosine(fake):
    client = fake()
    client.rank = 0.998
    heading = asyncio.run(neighbours(client, like(0), SearchSettings(closer_than=0.99)))[0]
    assert "Only those closer than 99 % of pairs: with a cosine from 0.97 up." in heading
    nothing = asyncio.run(neighbours(client, like(0), SearchSettings(closer_than=0.9995)))[1]
    assert "No picture is closer than 99.95 % of random pairs are. Lower the limit" in nothing


@pytest.mark.parametrize(
    ("closer_than", "words"),
    [
        *[(0, "0 %"), (0.499, "49 %"), (0.57, "57 %"), (0.9899, "98 %"), (0.99, "99 %"), (0.9949, "99.4 %")],
        *[(0.998, "99.8 %"), (0.99899, "99.8 %"), (0.999, "99.90 %"), (0.99957, "99.95 %"), (1, "99.99 %")],
    ],
)
def test_a_rank_is_rounded_down(closer_than, words):
    assert rank.percent(closer_than) == words


def test_limits_are_offered_from_a_rank_up_with_the_chosen_one():
    assert rank.choices(0.9995, chosen=0.999) == [
        ("99.90 % of pairs", 0.999),
        ("99.95 % of pairs", 0.9995),
        ("99.98 % of pairs", 0.9998),
        ("99.99 % of pairs", 0.9999),
    ]
    assert rank.choices()[0] == ("50 % of pairs", 0.5)


def test_two_encoders_are_compared_and_common_results_are_counted_and_marked(fake):
    client = fake()
    heading, html, _ = asyncio.run(
        neighbours(client, like(0), SearchSettings(k=3, encoder="tiny", other_encoder="other"))
    )
    assert "2 of 3 results are found by both encoders" in heading
    first, second = html.split("<section>")[1:]
    assert "<h3>tiny</h3>" in first and "<h3>other</h3>" in second
    assert re.findall(r'<li( class=both)?><button class="tile" data-id="(\w+)"', first) == [
        ("", "id1"), (" class=both", "id2"), (" class=both", "id3")
    ]  # fmt: skip
    assert re.findall(r'data-id="(\w+)"', second) == ["id2", "id3", "id4"]
    assert [asked[5] for asked in client.asked] == ["tiny", "other"]


@pytest.mark.parametrize("encoder", [None, "second"])
def test_the_results_say_how_good_the_vectors_of_each_shown_encoder_are(fake, encoder):
    class Client(fake):
        async def models(self):
            figures = {"measured": {"data": "shoes", "found_first": 0.5, "judged": 12}}
            return [{"id": "first", "figures": figures}, {"id": "second", "architecture": "tiny"}]

    tab = object.__new__(SimilarTab)
    tab.client = Client()
    for trail in ((), (like(0),)):
        heading = asyncio.run(tab.show(trail, PAGE, "", 24, 0, 0, [], "pictures", encoder, ""))[4]
        assert ('<p class="quality">first: of 12 pictures of shoes, 50 %' in heading) == (encoder is None)
        assert ('<p class="quality">tiny: nothing is known' in heading) == (encoder == "second")
    heading, tiles = asyncio.run(tab.show((like(0),), PAGE, "", 24, 0, 0, [], "pictures", "second", "first"))[4:6]
    assert heading.index(">tiny: nothing is known") < heading.index(">first: of 12 pictures of shoes")
    assert "<h3>tiny</h3>" in tiles and "<h3>first</h3>" in tiles


def test_a_side_that_finds_nothing_leaves_the_other(fake):
    html = asyncio.run(neighbours(fake(count=2), like(0), SearchSettings(other_encoder="other")))[1]
    assert html.count('class="tile"') == 1 and "No results." in html


def test_the_browser_loads_thumbnails_when_they_are_scrolled_to(fake):
    client = fake()
    _, grid, _ = asyncio.run(browse(client, PAGE, replace(USUAL, collection="shop")))
    assert [asked[0] for asked in client.asked] == ["items"]
    assert grid.count('<img loading="lazy" src="../collections/shop/items/id') == PAGE
    assert 'alt="pets/cat 5.jpg, cat"' in grid and grid.count('data-collection="shop"') == 1 + PAGE


def test_a_name_and_an_id_are_only_text():
    hostile = "\"><script>alert('x')</script>${1}{{x}}`"
    items = [Item(hostile, hostile, hostile, None), Match(hostile, hostile, None, None, similarity=0.5)]
    html = selection_html(2, SearchSettings(where=(hostile,), collection=hostile), hostile) + grid_html(items, hostile)
    assert "<script" not in html
    assert set(re.findall(r"<(\w+)", html)) == {"ul", "li", "button", "img", "span", "input", "div"}
    assert re.findall(r" (on\w+)=", html) == []
