"""The page's box for words: it is there with an encoder that reads text only, and finds what the words describe."""

from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import expect

from serving import bulk
from tests import towers
from tests.browser.conftest import striped
from tests.browser.test_similar import labels, press, search_from

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def service(tmp_path_factory, threads):
    """Address of a service with an encoder that reads text, over three pictures of each colour."""
    folder = tmp_path_factory.mktemp("towers")
    towers.make_bundle(folder / "encoder")
    for label, colour in towers.COLOURS.items():
        (folder / "pictures" / label).mkdir(parents=True)
        for i in range(3):
            striped(colour, (48 + 4 * i, 36)).save(folder / "pictures" / label / f"{i}.png")
    settings = {"data": str(folder / "pictures"), "index": str(folder / "index")}
    bulk.run(bulk.BulkSettings(encoder=str(folder / "encoder"), **settings))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        yield threads.service(folder / "encoder", folder / "index")


def describe(page, words: str) -> None:
    box = page.get_by_label("Search by words")
    box.fill(words)
    box.press("Enter")


def test_words_find_pictures_and_are_a_step_of_the_history(service, open_page):
    page = open_page(service, viewport={"width": 1400, "height": 900})
    describe(page, "a red shoe")
    expect(page.locator("#heading")).to_contain_text("Most similar")
    assert labels(page)[:3] == ["red"] * 3
    expect(page.locator("#least")).to_be_visible()
    expect(page.locator("#grid .rank")).to_have_count(0)
    assert parse_qs(urlsplit(page.url).query)["text"] == ["a red shoe"]
    searches = page.evaluate("history.length")
    page.reload()
    expect(page.locator("#grid .label").first).to_have_text("red")
    expect(page.get_by_label("Search by words")).to_have_value("a red shoe")
    expect(page.locator("#heading")).to_contain_text("Most similar")
    assert page.evaluate("history.length") == searches
    describe(page, "blue")
    expect(page.locator("#grid .label").first).to_have_text("blue")
    expect(page.locator("#steps .step").first).to_have_text("a red shoe")
    page.go_back()
    expect(page.locator("#grid .label").first).to_have_text("red")
    expect(page.get_by_label("Search by words")).to_have_value("a red shoe")


def test_pictures_are_added_to_words_and_both_can_be_taken_out(service, open_page):
    page = open_page(service, viewport={"width": 1400, "height": 900})
    describe(page, "red")
    expect(page.locator("#grid .score").first).to_be_visible()
    press(page, "blue", "like")
    expect(page.locator("#chips .chip")).to_have_count(2)
    expect(page.locator("#well .label")).to_have_text("blue")
    page.get_by_title("Remove “red”").click()
    expect(page.locator("#chips .chip")).to_have_count(0)
    expect(page.locator("#grid .label").first).to_have_text("blue")
    expect(page.get_by_label("Search by words")).to_have_value("")
    describe(page, "  ")
    search_from(page, "green")
    expect(page.get_by_label("Search by words")).to_have_value("")


def test_an_encoder_of_pictures_alone_has_no_box(page):
    expect(page.locator("#grid .tile").first).to_be_visible()
    expect(page.get_by_label("Search by words")).to_have_count(0)
