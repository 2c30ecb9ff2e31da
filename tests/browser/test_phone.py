"""The page on a phone: the current picture leaves room for the tabs, and a photo can be taken."""

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
TABS = ("Similar", "Map", "Duplicates", "Views", "Invariance", "Runs")


@pytest.fixture
def phone(servers, open_page):
    return open_page(servers.service, **PHONE)


def test_the_current_picture_takes_less_than_half_of_each_tab(phone, reddish):
    phone.set_input_files("#well input >> nth=0", reddish)
    expect(phone.locator("#way button").first).to_be_visible()
    for tab in TABS:
        phone.get_by_role("tab", name=tab).tap()
        expect(phone.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")
        phone.evaluate("scrollTo(0, 0)")
        assert phone.locator("#side").bounding_box()["height"] < 0.3 * 844, tab
        assert phone.locator("#main").bounding_box()["y"] < 0.5 * 844, tab
        assert phone.evaluate("document.documentElement.scrollWidth") <= 390, tab


def test_a_photo_is_taken_or_chosen(phone, reddish):
    expect(phone.locator(".invitation")).to_contain_text("Take or choose a photo")
    expect(phone.locator("#camera")).to_be_hidden()  # the phone has its own
    expect(phone.get_by_text("Take a photo", exact=True)).to_be_visible()
    phone.set_input_files("#well input[capture=environment]", reddish)
    expect(phone.locator("#grid .label").first).to_have_text("red")


def test_at_a_desk_nothing_speaks_of_a_photo(page):
    expect(page.locator(".invitation b.on-phone")).to_be_hidden()
    expect(page.locator(".photo")).to_be_hidden()
