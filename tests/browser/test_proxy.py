"""Behind a real nginx that publishes the service below a path: the page works there, and at its own address."""

from pathlib import Path

import pytest

COMMANDS = True  # they have the access control of a real start

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore:.future.no_silent_downcasting"),  # Gradio's, of pandas
]


def use(page, reddish: Path) -> None:
    """An upload, a click on a result, and another tab."""
    from playwright.sync_api import expect

    page.wait_for_selector("#grid .tile img")
    page.set_input_files("#well input", reddish)
    expect(page.locator("#grid .tile").first).to_contain_text("red")
    page.wait_for_function("() => document.querySelector('#grid .tile img').naturalWidth > 0")
    page.get_by_role("tab", name="Map").click()
    expect(page.get_by_role("tab", name="Map")).to_have_attribute("aria-selected", "true")


def test_the_page_works_below_the_path(proxy, open_page, reddish):
    use(open_page(proxy, viewport={"width": 1400, "height": 900}), reddish)


def test_the_page_works_at_the_services_own_address_too(published, open_page, reddish):
    use(open_page(published, viewport={"width": 1400, "height": 900}), reddish)


@pytest.mark.parametrize("proxy", ["takes the path away"], indirect=True)
def test_the_start_and_the_documentation_are_found_below_the_path(proxy, browser):
    page = browser.new_page()
    page.goto(f"{proxy}/")
    page.wait_for_selector("#grid .tile")
    assert page.url.startswith(f"{proxy}/ui/")
    page.goto(f"{proxy}/docs")
    page.wait_for_selector(".opblock >> nth=0")
    page.close()
