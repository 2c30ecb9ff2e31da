import asyncio

import numpy as np
import pytest

from serving.client import ServiceError
from ui.search.crop import Box
from ui.search.picture import Picture
from ui.search.query import Query, SearchSettings, nearest

USUAL = SearchSettings()
A, B, C = (Picture(f"{i}.jpg", id=f"id{i}") for i in range(3))


@pytest.fixture
def mine(uploads):
    (uploads / "mine.jpg").write_bytes(b"...")
    return Picture("mine.jpg", file=uploads / "mine.jpg")


def asked(client, query: Query, settings: SearchSettings = USUAL) -> tuple:
    asyncio.run(nearest(client, query, settings))
    return client.asked[-1]


def test_a_picture_stands_on_one_side_only():
    query = Query((A,)).like(B).unlike(C)
    assert query == Query((A, B), (C,)) and query.picture == A and query.pictures == (A, B, C)
    assert query.like(C) == Query((A, B, C))
    assert query.unlike(B) == Query((A,), (C, B))
    assert query.like(A) == Query((B, A), (C,))


def test_the_last_picture_to_be_like_stays():
    assert Query((A,), (B,)).unlike(A) == Query((A,), (B,))
    assert Query((A,), (B,)).without(A) is None
    assert Query((A,), (B,)).without(B) == Query((A,))


def test_a_part_takes_the_place_of_its_picture():
    part = Picture("0.jpg", id="id0", box=Box(0, 0, 0.5, 0.5))
    assert Query((A, B), (C,)).replace_first(part) == Query((part, B), (C,))


def test_items_are_searched_by_id_and_uploads_by_their_file(fake, mine):
    assert asked(fake(), Query((A, mine, B), (C,)))[:4] == ("search", [mine.file], ["id0", "id1"], ["id2"])
    assert asked(fake(), Query((A,)))[1] is None


def test_the_search_settings_reach_the_service(fake):
    settings = SearchSettings(7, 0.5, ("label=cat",), "others", "an encoder")
    *_, k, model, more = asked(fake(), Query((Picture("0.jpg", id="id0", collection="others"),)), settings)
    where = {"label": {"in": ["cat"]}}
    assert (k, model, more) == (
        7,
        "an encoder",
        {"text": None, "filter": where, "threshold": 0.5, "closer_than": None, "collection": "others"},
    )
    assert asked(fake(), Query((A,)))[-1]["threshold"] is None


def test_items_of_another_collection_are_searched_by_their_pictures(fake):
    stranger = Picture("0.jpg", id="id0", collection="others")
    client = fake()
    _, images, positive, negative, *_ = asked(client, Query((stranger, A), (stranger, B)))
    assert (images, positive) == ([b"a thumbnail"], ["id0"])
    assert negative[0] == "id1" and np.array_equal(negative[1], [1, 1])


def test_a_part_of_an_item_is_no_longer_that_item(fake, monkeypatch):
    monkeypatch.setattr("ui.search.picture.cut", lambda picture, box: b"a part")
    _, images, positive, *_ = asked(fake(), Query((Picture("0.jpg", id="id0", box=Box(0, 0, 0.5, 0.5)),)))
    assert (images, positive) == ([b"a part"], [])


def test_a_missing_collection_has_no_results(fake, mine):
    client = fake(failure=ServiceError("there is no collection pictures", 404, "not_found", "name"))
    assert asyncio.run(nearest(client, Query((mine,)), SearchSettings())).results == []
    with pytest.raises(ServiceError):
        asyncio.run(nearest(client, Query((A,)), SearchSettings()))


def test_a_limit_as_a_rank_reaches_the_service_unless_there_are_no_ranks(fake):
    ranked = SearchSettings(closer_than=0.99)
    assert asked(fake(), Query((A,)), ranked)[-1]["closer_than"] == 0.99
    assert asked(fake(), Query((A,), (B,)), ranked)[-1]["closer_than"] is None
    assert asked(fake(), Query((A,)), SearchSettings(min_similarity=0.5, closer_than=0.99))[-1]["closer_than"] is None


def test_in_a_collection_without_ranks_the_limit_is_ignored(fake):
    client = fake(5)
    search = client.search

    async def refuse_ranks(*arguments, closer_than=None, **options):
        if closer_than is not None:
            raise ServiceError("closer_than: pictures has fewer than 30 items", 400, "malformed", "closer_than")
        return await search(*arguments, **options)

    client.search = refuse_ranks
    assert len(asyncio.run(nearest(client, Query((A,)), SearchSettings(closer_than=0.99))).results) == 4
