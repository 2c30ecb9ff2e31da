"""The page of a collection with vectors of two encoders: choosing one, comparing both, changes over both."""

import re

import httpx
import pytest
from PIL import Image
from playwright.sync_api import expect

from serving import bulk
from tests.browser.conftest import make_bundle
from tests.browser.test_similar import labels, search_from, tile

pytestmark = pytest.mark.browser

COLOURS = {"white": (250, 250, 250), "grey": (170, 170, 171), "teal": (10, 120, 120)}


@pytest.fixture(scope="module")
def service(tmp_path_factory, threads):
    """Address of a service with two encoders. Grey is most like white by the mean, and most like teal by the darkest
    values of red, green and blue."""
    folder = tmp_path_factory.mktemp("encoders")
    for label, colour in COLOURS.items():
        for i in range(2):
            (folder / "pictures" / label).mkdir(parents=True, exist_ok=True)
            picture = Image.new("RGB", (48 + 4 * i, 36), colour)
            if label == "grey":
                picture.paste((0, 90, 90), (8, 8, 16, 16))
            picture.save(folder / "pictures" / label / f"{i}.png")
    make_bundle(folder / "mean", name="mean")
    make_bundle(folder / "darkest", "ReduceMin", "darkest")
    settings = {"data": str(folder / "pictures"), "index": str(folder / "index")}
    bulk.run(bulk.BulkSettings(encoder=str(folder / "mean"), **settings))
    bulk.run(bulk.BulkSettings(encoder=str(folder / "darkest"), reembed=True, **settings))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        yield threads.service(f"{folder / 'mean'},{folder / 'darkest'}", folder / "index")


def choose(page, where: str, choice: str) -> None:
    page.locator(f"{where} input").click()
    page.get_by_role("option", name=choice).click()
    expect(page.get_by_role("option")).to_have_count(0)


def counts(service: str) -> list[int]:
    return [one["count"] for one in httpx.get(f"{service}/collections").json()["collections"]]


def test_an_encoder_is_chosen_and_two_are_compared(service, open_page):
    page = open_page(service, viewport={"width": 1400, "height": 900})
    search_from(page, "grey")
    expect(page.locator("#grid .label").nth(1)).to_have_text("white")
    choose(page, "#encoder", "darkest")
    expect(page.locator(".selection")).to_have_attribute("data-encoder", re.compile("^darkest-"))
    expect(page.locator("#grid .label").nth(1)).to_have_text("teal")
    choose(page, "#beside", "mean")
    expect(page.locator("#grid .grid")).to_have_count(2)
    expect(page.locator("#heading")).to_contain_text("5 of 5 results are found by both encoders")
    assert [labels(page)[1], labels(page)[6]] == ["teal", "white"]


def test_what_is_removed_is_gone_for_both_and_comes_back_for_both(service, open_page):
    page = open_page(service, viewport={"width": 1400, "height": 900})
    assert counts(service) == [6, 6]
    tile(page, "teal").locator(".tile").focus()
    page.keyboard.press("x")
    page.click("[data-act=remove]")
    page.fill("#acts dialog[open] input", "1")
    page.click("[data-ask=do]")
    expect(page.locator(".did [role=status]")).to_contain_text("1 picture removed")
    assert counts(service) == [5, 5]
    page.click("[data-did=undo]")
    expect(page.locator(".did [role=status]")).to_contain_text("has 6 pictures now")
    assert counts(service) == [6, 6]
