"""The page of a service that wants a key: the browser's own dialogue opens it, and everything in it."""

import pytest
from playwright.sync_api import Error

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore:.future.no_silent_downcasting"),  # Gradio's, of pandas
]


def test_with_the_key_as_password_the_page_works_and_shows_every_picture(locked, open_page, reddish):
    page = open_page(locked, http_credentials={"username": "anybody", "password": "secret"})
    assert page.locator("#grid .tile").count() == 13
    page.wait_for_function("[...document.querySelectorAll('#grid img')].every(image => image.naturalWidth > 0)")
    page.set_input_files("#well input", reddish)
    page.wait_for_selector("#grid .score")
    page.get_by_role("tab", name="Views").click()
    page.wait_for_selector("#pairs .pair")


def test_without_it_the_browser_asks_for_one_and_shows_nothing(locked, browser):
    page = browser.new_page()
    with pytest.raises(Error, match="ERR_INVALID_AUTH_CREDENTIALS"):  # its dialogue, without anybody to fill it in
        page.goto(f"{locked}/ui/")
    assert page.locator("#grid").count() == 0
    page.close()
