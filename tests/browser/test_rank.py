"""How the page says closer than which share of random pairs a result is, and takes a limit in it."""

import io
from urllib.parse import parse_qs, urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

pytestmark = pytest.mark.browser
MANY = "many"


@pytest.fixture(scope="module")
def many(servers, wait_until) -> str:
    """The address of a collection of 60 pictures of random colours, of which the last resembles the first."""
    colours = np.random.default_rng(0).integers(20, 235, (60, 3))
    colours[-1] = colours[0] + 1
    files = []
    for i, colour in enumerate(colours):
        buffer = io.BytesIO()
        Image.new("RGB", (48, 36), tuple(colour.tolist())).save(buffer, "PNG")
        files.append(("images", (f"{i}.png", buffer.getvalue(), "image/png")))
    address = f"{servers.service}/collections/{MANY}"
    httpx.put(f"{address}/items", files=files).raise_for_status()
    wait_until(lambda: results(address, k=1)[0]["closer_than"] is not None, "the pairs were not learnt")
    return address


def results(address: str, **query) -> list[dict]:
    """Of a search by the first picture."""
    (first,) = [item for item in httpx.get(f"{address}/items?limit=100").json()["items"] if item["name"] == "0.png"]
    answer = httpx.post(f"{address}/search", json={"positive": [first["id"]], **query})
    return answer.raise_for_status().json()["results"]


@pytest.fixture
def searched(servers, many, page):
    """The page with the results of a search by the first picture."""
    page.goto(f"{servers.service}/ui/?in={MANY}")
    expect(page.locator("#heading")).to_contain_text("60 pictures")
    page.locator('#grid .tile[data-name="0.png"]').click()
    expect(page.locator("#well .name")).to_have_text("0.png")
    expect(page.locator("#grid .score").first).to_be_visible()
    return page


def choose(page, box: str, option: str) -> None:
    page.locator(f"{box} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def test_each_result_says_closer_than_how_many_pairs_it_is(searched, many):
    found = results(many, k=24)
    words = searched.locator("#grid .rank")
    expect(words).to_have_count(24)
    expect(words.first).to_have_text("closer than 99.94 % of pairs")  # all but one of 60 * 59 / 2
    assert 0.5 < found[12]["closer_than"] < 0.99
    expect(words.nth(12)).to_have_text(f"closer than {int(100 * found[12]['closer_than'])} % of pairs")
    assert words.first.is_visible()


def test_a_limit_is_chosen_as_a_rank_and_is_in_the_address(searched, many):
    expect(searched.locator("#closer")).to_be_visible()
    expect(searched.locator("#least")).to_be_hidden()
    count = len(results(many, k=24, closer_than=0.95))
    assert 0 < count < 24
    choose(searched, "#closer", "95 % of pairs")
    expect(searched.locator("#grid .tile")).to_have_count(count)
    expect(searched.locator("#heading")).to_contain_text("Only those closer than 95 % of pairs: with a cosine from")
    assert parse_qs(urlsplit(searched.url).query)["closer"] == ["0.95"]
    searched.reload()
    expect(searched.locator("#grid .tile")).to_have_count(count)
    expect(searched.locator("#closer input")).to_have_value("95 % of pairs")
    choose(searched, "#closer", "no limit")
    expect(searched.locator("#grid .tile")).to_have_count(24)


def test_a_search_with_a_picture_to_be_unlike_has_no_ranks(searched):
    choose(searched, "#closer", "95 % of pairs")
    expect(searched.locator("#heading")).to_contain_text("Only those closer")
    searched.locator("#grid .tile").nth(2).focus()
    searched.keyboard.press("-")
    expect(searched.locator("#grid .rank")).to_have_count(0)
    expect(searched.locator("#grid .tile")).to_have_count(24)
    expect(searched.locator("#least")).to_be_visible()
    expect(searched.locator("#closer")).to_be_hidden()


def test_in_a_small_collection_the_page_has_no_ranks(servers, page):
    page.locator("#grid .tile").first.click()
    expect(page.locator("#grid .score").first).to_be_visible()
    expect(page.locator("#least")).to_be_visible()
    expect(page.locator("#closer")).to_be_hidden()
    assert page.locator("#grid .rank").count() == 0


def test_the_duplicates_limit_is_named_and_given_as_a_rank(searched, many):
    page = searched
    page.get_by_role("tab", name="Duplicates").click()
    if page.locator("#compare").is_visible():
        page.click("#compare")
    expect(page.locator("#threshold")).to_contain_text("% of pairs")
    before = page.locator("#threshold input[type=number]").input_value()
    own = httpx.get(f"{many}/duplicates").json()["own"]
    assert float(before) == pytest.approx(own, abs=1e-5)
    choose(page, "#closer-pairs", "95 % of pairs")
    expect(page.locator("#threshold")).to_contain_text("closer than 95 % of pairs")
    expect(page.locator("#threshold input[type=number]")).not_to_have_value(before)
    answer = httpx.get(f"{many}/duplicates", params={"closer_than": 0.95}).json()
    expect(page.locator("#duplicates .copies")).to_have_count(answer["total"])
    assert float(page.locator("#threshold input[type=number]").input_value()) == pytest.approx(
        answer["threshold"], abs=1.1e-4
    )
