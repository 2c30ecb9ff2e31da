import asyncio
import re

import pytest

from serving.client import Item, Match, ServiceError
from ui.picture import Chosen
from ui.similar import PAGE, collection, grid_html, neighbours


@pytest.fixture
def upload(uploads):
    (uploads / "mine.jpg").write_bytes(b"...")
    return Chosen("mine.jpg", file=uploads / "mine.jpg")


def test_the_collection_says_which_part_of_it_is_shown(fake):
    client = fake(count=PAGE + 7)
    heading, grid, count = asyncio.run(collection(client, PAGE))
    assert f"{PAGE + 1} to {PAGE + 7} of {PAGE + 7} pictures" in heading
    assert count == PAGE + 7 and grid.count("<li>") == 7
    assert client.asked == [("items", PAGE, PAGE)]


@pytest.mark.parametrize(("count", "words"), [(1, "<p>1 picture."), (12, "<p>12 pictures.")])
def test_a_small_collection_is_counted(fake, count, words):
    assert words in asyncio.run(collection(fake(count), 0))[0]


def test_an_empty_collection_says_how_to_fill_it(fake, upload):
    how = "<code>python serving/bulk.py --data ~/Pictures</code>"
    assert how in asyncio.run(collection(fake(count=0), 0))[1]
    assert how in asyncio.run(neighbours(fake(count=0), upload, 5))[1]


def test_a_collection_that_is_not_there_yet_says_so_too(fake, upload):
    how = "<code>python serving/bulk.py --data ~/Pictures</code>"
    client = fake(failure=ServiceError("there is no collection pictures", 404, "not_found", "name"))
    assert how in asyncio.run(collection(client, 0))[1]
    assert how in asyncio.run(neighbours(client, upload, 5))[1]
    with pytest.raises(ServiceError):
        asyncio.run(neighbours(client, Chosen("cat 3.jpg", id="gone"), 5))


def test_a_collection_of_one_says_that_there_is_no_other(fake):
    assert "no other picture" in asyncio.run(neighbours(fake(count=1), Chosen("cat 0.jpg", id="id0"), 5))[1]


def test_an_item_is_searched_by_its_id_and_an_upload_by_its_file(fake, upload):
    client = fake()
    asyncio.run(neighbours(client, Chosen("cat 3.jpg", id="id3"), 5))
    asyncio.run(neighbours(client, upload, 6))
    assert client.asked == [("search", None, ["id3"], 5), ("search", upload.file, [], 6)]


def test_neighbours_come_in_the_services_order_with_cosines_of_two_decimals(fake):
    _, grid = asyncio.run(neighbours(fake(), Chosen("cat 0.jpg", id="id0"), 3))
    assert re.findall(r'data-id="(\w+)"', grid) == ["id1", "id2", "id3"]
    assert re.findall(r'<span class="score">([^<]*)</span>', grid) == ["1.00", "0.88", "0.75"]


def test_thumbnails_are_for_the_browser_to_fetch_when_they_come_in_sight(fake):
    client = fake()
    _, grid, _ = asyncio.run(collection(client, 0))
    assert [asked[0] for asked in client.asked] == ["items"]
    assert grid.count('<img loading="lazy" src="../collections/pictures/items/id') == PAGE
    assert 'alt="pets/cat 5.jpg, cat"' in grid


def test_a_name_and_an_id_are_only_text():
    hostile = "\"><script>alert('x')</script>${1}{{x}}`"
    html = grid_html([Item(hostile, hostile, hostile, None), Match(hostile, hostile, None, None, similarity=0.5)])
    assert "<script" not in html
    assert set(re.findall(r"<(\w+)", html)) == {"ul", "li", "button", "img", "span"}
    assert re.findall(r" (on\w+)=", html) == []
