"""A result opened large: the original, its facts, the keys, and back to the tile."""

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser


def has_focus(page, id: str) -> None:
    page.wait_for_function("id => document.activeElement.dataset.id === id", arg=id)


def ids(page, where: str = "#grid .tile") -> list[str]:
    return page.locator(where).evaluate_all("tiles => tiles.map(tile => tile.dataset.id)")


def place_of(page, name: str) -> int:
    names = page.locator("#grid .tile").evaluate_all("tiles => tiles.map(tile => tile.dataset.name)")
    return next(i for i, other in enumerate(names) if name in other)


def open_large(page, at: int, where: str = "#grid li") -> None:
    page.locator(where).nth(at).hover()
    page.locator(where).nth(at).locator(".open").click()
    expect(page.locator(".large")).to_be_visible()


def shows_the_original(page) -> None:
    page.wait_for_function("document.querySelector('.large img').src.endsWith('/original')")
    page.wait_for_function("document.querySelector('.large img').naturalWidth > 0")
    expect(page.locator(".large-note")).to_be_empty()


@pytest.mark.parametrize("which", ["service", "alone"])
def test_a_tile_opens_large_with_the_original_and_its_facts(servers, open_page, which):
    page = open_page(getattr(servers, which))
    before = page.locator("#grid .tile").count()
    at = place_of(page, "red/1.png")
    open_large(page, at)
    shows_the_original(page)
    expect(page.locator(".large h2")).to_have_text("1.png")
    expect(page.locator(".large dl")).to_contain_text("52 × 36 pixels, 1 kB")
    expect(page.locator(".large dl")).to_contain_text(str(servers.folder / "pictures"))
    expect(page.locator(".large-place")).to_have_text(f"{at + 1} of {before}")
    assert page.locator("#grid .score").count() == 0, "the click has searched"
    with page.context.expect_page() as opened:
        page.click(".large-original")
    assert opened.value.url.endswith("/original")
    assert page.locator("#grid .picked").count() == 0


def test_a_double_click_opens_what_it_began_on_and_searches_from_it_once(page):
    at = place_of(page, "red/1.png")
    page.locator("#grid .tile").nth(at).dblclick()
    expect(page.locator(".large h2")).to_have_text("1.png")
    expect(page.locator(".large-place")).to_have_text(f"{at + 1} of 13")
    expect(page.locator("#well .name")).to_have_text("1.png")
    expect(page.locator("#grid .score").first).to_be_visible()
    expect(page.locator("#steps .step")).to_have_count(0)
    page.keyboard.press("Escape")
    expect(page.locator(".large")).to_be_hidden()


def test_arrow_keys_go_on_and_escape_returns_to_the_tile_of_the_picture_shown(page):
    every = ids(page)
    for key in ("o", " "):
        page.locator("#grid .tile").first.focus()
        page.keyboard.press(key)
        expect(page.locator(".large-place")).to_have_text("1 of 13")
        if key == "o":
            page.keyboard.press("Escape")
    expect(page.locator(".large [data-step='-1']")).to_be_disabled()
    page.keyboard.press("ArrowLeft")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.click(".large [data-step='-1']")
    expect(page.locator(".large-place")).to_have_text("3 of 13")
    shows_the_original(page)
    assert every[2] in page.locator(".large img").get_attribute("src")
    page.keyboard.press("Escape")
    expect(page.locator(".large")).to_be_hidden()
    has_focus(page, every[2])
    for _ in range(13):
        page.keyboard.press("o")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Escape")
    has_focus(page, every[-1])


def test_the_keyboard_stays_in_the_dialog(page):
    open_large(page, 1)
    for _ in range(8):
        page.keyboard.press("Tab")
        inside = "document.activeElement === document.body || !!document.activeElement.closest('.large')"
        assert page.evaluate(inside), "the focus has left the dialog"


def test_the_picture_shown_is_searched_from(page):
    every = ids(page)
    open_large(page, 3)
    page.keyboard.press("ArrowRight")
    page.click(".large [data-do=search]")
    expect(page.locator(".large")).to_be_hidden()
    page.wait_for_selector("#grid .score")
    assert f"like={every[4]}" in page.url or every[4] in page.locator("#well img").get_attribute("src")
    open_large(page, 0)
    expect(page.locator(".large .score")).to_have_text("Similarity 1.00")


def test_shift_and_the_button_open_and_do_not_select(page):
    page.locator("#grid li").nth(2).hover()
    page.locator("#grid .open").nth(2).click(modifiers=["Shift"])
    expect(page.locator(".large")).to_be_visible()
    assert page.locator("#grid .picked").count() == 0


def test_without_the_original_the_thumbnail_is_shown_and_the_page_says_so(page, servers):
    at = place_of(page, "blue/0.png")
    file = servers.folder / "pictures" / "blue" / "0.png"
    data = file.read_bytes()
    file.unlink()
    page.context.new_cdp_session(page).send("Network.clearBrowserCache")  # other tests have opened it
    try:
        open_large(page, at)
        expect(page.locator(".large-note")).to_contain_text("The original cannot be read here")
        assert page.locator(".large img").get_attribute("src").endswith("/thumbnail")
        page.keyboard.press("ArrowLeft" if at == 12 else "ArrowRight")
        shows_the_original(page)
    finally:
        file.write_bytes(data)


def test_a_hostile_name_is_only_text(page):
    open_large(page, place_of(page, "onerror"))
    expect(page.locator(".large h2")).to_contain_text("onerror=alert(1)")
    expect(page.locator(".large dl")).to_contain_text("onerror=alert(1)")
    assert page.title() == "Twinview"


def test_members_of_duplicates_open_large_and_a_narrow_window_needs_no_sideways_scrolling(servers, open_page):
    page = open_page(servers.service, viewport={"width": 390, "height": 844}, color_scheme="dark")
    page.get_by_role("tab", name="Duplicates").click()
    page.wait_for_selector("#duplicates .copy")
    every = ids(page, "#duplicates .copy")
    open_large(page, 1, "#duplicates .copies li")
    shows_the_original(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    has_focus(page, every[2])
    assert page.locator('.copy[aria-pressed="true"]').count() == 0
