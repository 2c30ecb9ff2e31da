import asyncio
from pathlib import Path
from urllib.parse import parse_qsl

import pytest

from serving.client import ServiceError
from ui.search import link
from ui.search.crop import Box
from ui.search.picture import Picture
from ui.search.query import Query, SearchSettings

CATS = [Picture(f"pets/cat {i}.jpg", "cat", id=f"id{i}") for i in range(3)]
PART = Picture("pets/cat 0.jpg", "cat", id="id0", box=Box(0.1, 0.2, 0.6, 0.75))


def opened(client, address: str, most_k: int = 200):
    params = parse_qsl(address)
    settings = link.parse_settings(params, most_k)
    return asyncio.run(link.load_query(client, params, settings.collection)), settings


@pytest.mark.parametrize(
    "search",
    [
        (None, SearchSettings()),
        (None, SearchSettings(where=("label=a & b", "price>=3"), collection="pets")),
        (Query((CATS[0],)), SearchSettings(closer_than=0.9995)),
        (Query((PART, CATS[1]), (CATS[2],)), SearchSettings(7, 0.35, (), "pictures", "tiny-1", "tiny-2")),
    ],
)
def test_a_link_brings_the_search_back(fake, search):
    assert opened(fake(), link.query_string(*search)) == search


def test_defaults_are_left_out():
    assert link.query_string(None, SearchSettings()) == ""
    assert link.query_string(Query((CATS[0],)), SearchSettings()) == "like=id0"


def test_what_only_this_browser_has_cannot_be_linked():
    upload = Picture("mine.jpg", file=Path("/tmp/mine.jpg"))
    stranger = Picture("cat.jpg", id="id0", collection="pets")
    for query in (Query((upload,)), Query((CATS[0], upload)), Query((CATS[0],), (stranger,))):
        assert link.query_string(query, SearchSettings()) is None
        assert "data-query" not in link.link_html(query, SearchSettings(), 1)


@pytest.mark.parametrize("wrong", ["k=many&least=nan", "k=&least=-3", "like=", "unlike=id3", "k=nan"])
def test_invalid_values_in_a_link_are_ignored(fake, wrong):
    assert opened(fake(), wrong) == (None, SearchSettings())


def test_numbers_of_a_link_stay_in_their_range(fake):
    assert opened(fake(), "k=99999&least=7")[1] == SearchSettings(200, 1.0)


def test_an_invalid_part_means_the_whole_picture(fake):
    assert opened(fake(), "like=id0@1,2,3")[0] == Query((CATS[0],))


def test_a_deleted_item_is_named(fake):
    with pytest.raises(ServiceError, match="no item gone is in the collection"):
        opened(fake(), "like=gone")


def test_a_long_link_loads_few_items(fake):
    client = fake()
    opened(client, "&".join(["like=id0"] * 500))
    assert len(client.asked) == link.MOST


def test_a_link_is_only_text():
    html = link.link_html(None, SearchSettings(where=('label="><script>',)), 0)
    assert "<script" not in html and html.count('"') == 8
