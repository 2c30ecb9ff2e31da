import base64

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser

COMMANDS = True  # these tests are of what a user starts


def labels(page) -> list[str]:
    return page.locator("#grid .label").all_inner_texts()


def search(page, picture) -> None:
    page.set_input_files("#well input", picture)
    page.wait_for_selector("#grid .score")


def open_views(page) -> None:
    page.get_by_role("tab", name="Views").click()
    page.wait_for_selector("#pairs .pair")


def test_an_uploaded_picture_finds_its_like(page, reddish):
    assert len(labels(page)) == 13
    search(page, reddish)
    assert labels(page)[:6] == ["red"] * 3 + ["orange"] * 3
    expect(page.locator("#well .name")).to_have_text("mine.png")
    scores = [float(score) for score in page.locator("#grid .score").all_inner_texts()]
    assert scores == sorted(scores, reverse=True) and 0.9 < scores[0] <= 1


def test_a_click_on_a_result_searches_from_there_and_back_returns(page, reddish):
    search(page, reddish)
    page.locator('#grid .tile[data-label="blue"]').first.click()
    expect(page.locator("#well .label")).to_have_text("blue")
    expect(page.locator("#grid .label").first).to_have_text("blue")
    assert len(labels(page)) == 12, "the picture itself is left out"
    page.click("#back")
    expect(page.locator("#well .name")).to_have_text("mine.png")
    expect(page.locator("#grid .label").first).to_have_text("red")
    page.click("#all")
    expect(page.locator("#heading")).to_contain_text("13 pictures")
    expect(page.locator("#well img")).to_have_count(0)


def test_a_picture_of_the_collection_is_searched_by_a_click(page):
    page.locator('#grid .tile[data-label="green"]', has_text="0.png").click()
    page.wait_for_selector("#grid .score")
    assert labels(page)[:2] == ["green", "green"]


def test_how_many_can_be_set_by_mouse_keys_and_number(page, reddish):
    search(page, reddish)
    page.fill("#k input[type=number]", "5")
    page.keyboard.press("Enter")
    expect(page.locator("#grid .tile")).to_have_count(5)
    page.focus("#k input[type=range]")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#grid .tile")).to_have_count(4)
    track = page.locator("#k input[type=range]").bounding_box()
    page.mouse.click(track["x"] + track["width"] / 2, track["y"] + track["height"] / 2)
    expect(page.locator("#grid .tile")).to_have_count(13)


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_picture_can_be_dropped_and_pasted_anywhere(page, reddish, way):
    page.evaluate(
        """async ([data, way]) => {
            const bytes = await (await fetch("data:image/png;base64," + data)).blob();
            const carried = new DataTransfer();
            carried.items.add(new File([bytes], "mine.png", { type: "image/png" }));
            document.body.dispatchEvent(way == "drop"
                ? new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: carried })
                : new ClipboardEvent("paste", { bubbles: true, clipboardData: carried }));
        }""",
        [base64.b64encode(reddish.read_bytes()).decode(), way],
    )
    expect(page.locator("#well .name")).to_have_text("mine.png")
    expect(page.locator("#grid .label").first).to_have_text("red")  # the results come after the picture


def test_a_text_file_is_refused_with_a_sentence(page, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture at all")
    page.set_input_files("#well input", tmp_path / "notes.txt")
    toast = page.locator(".toast-body")
    expect(toast).to_contain_text("notes.txt")
    expect(toast).to_contain_text("is not an image")
    assert "Traceback" not in page.content()
    expect(page.locator("#heading")).to_contain_text("Your collection")


def test_every_picture_is_loaded_and_described(page):
    images = page.locator("#grid img")
    assert all(images.evaluate_all("images => images.map(image => image.alt)"))
    images.last.scroll_into_view_if_needed()
    page.wait_for_function("[...document.querySelectorAll('#grid img')].every(image => image.naturalWidth > 0)")


def test_a_file_name_is_only_text(page):
    strange = page.locator(".tile .name", has_text="onerror")
    assert strange.inner_text().startswith("<img src=x onerror=alert(1)>${document.title=1}{{x}}`'&")
    strange.click()
    expect(page.locator("#well .name")).to_contain_text("${document.title=1}")
    assert page.title() == "Twinview"


def test_a_narrow_window_needs_no_sideways_scrolling(servers, open_page, reddish):
    page = open_page(servers.service, viewport={"width": 360, "height": 740}, color_scheme="dark")
    search(page, reddish)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    open_views(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_alone_the_page_shows_the_same_over_http(servers, open_page, reddish):
    page = open_page(servers.alone)
    search(page, reddish)
    assert labels(page)[:3] == ["red"] * 3
    page.wait_for_function("document.querySelector('#grid img').naturalWidth > 0")
