"""What the tab Similar does beyond one picture: several, parts, conditions, selections, links."""

import asyncio
import csv
import re
import shutil
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import expect

from serving import bulk
from serving.client import AsyncClient

pytestmark = pytest.mark.browser


def labels(page) -> list[str]:
    return page.locator("#grid .label").all_inner_texts()


def tile(page, label: str, at: int = 0):
    return page.locator(f'#grid li:has(.tile[data-label="{label}"])').nth(at)


def press(page, label: str, sign: str) -> None:
    tile(page, label).hover()
    tile(page, label).locator(f".sign[value={sign}]").click()


def search_from(page, label: str) -> None:
    before = page.locator(".selection").get_attribute("data-view")
    tile(page, label).locator(".tile").click()
    expect(page.locator("#grid .score").first).to_be_visible()
    expect(page.locator(".selection")).not_to_have_attribute("data-view", before)
    expect(page.locator("#well .label")).to_have_text(label)


def typed(page, condition: str) -> None:
    page.locator("#where input").fill(condition)
    page.keyboard.press("Enter")


def address_query(page) -> dict[str, list[str]]:
    return parse_qs(urlsplit(page.url).query)


def saved(page, what: str) -> str:
    with page.expect_download() as download:
        page.click(f"[data-export={what}]")
    return Path(download.value.path()).read_text()


def test_several_files_are_one_search_and_each_can_be_taken_out(page, reddish, tmp_path):
    blue = tmp_path / "blue.png"
    blue.write_bytes(page.request.get(tile(page, "blue").locator("img").evaluate("image => image.src")).body())
    page.set_input_files("#well input", [reddish, blue])
    expect(page.locator("#chips .chip")).to_have_count(2)
    page.wait_for_selector("#grid .score")
    assert {"blue", "red"} <= set(labels(page)[:8])
    page.locator("#chips .chip").first.click()
    expect(page.locator("#well .name")).to_have_text("blue.png")
    expect(page.locator("#chips .chip")).to_have_count(0)
    expect(page.locator("#grid .label").first).to_have_text("blue")


def test_plus_and_minus_on_a_tile_add_it_to_the_search(page):
    search_from(page, "red")
    expect(page.locator("#grid .label").nth(2)).to_have_text("orange")
    press(page, "orange", "unlike")
    expect(page.locator("#chips .unlike .chip")).to_have_count(1)
    page.wait_for_function("document.querySelectorAll('#grid .label')[2].textContent != 'orange'")
    tile(page, "blue").locator(".tile").focus()
    page.keyboard.press("+")
    expect(page.locator("#chips .chip")).to_have_count(3)
    page.wait_for_function("document.querySelectorAll('#grid .tile').length == 10")
    assert labels(page)[0] == "blue"
    assert len(address_query(page)["like"]) == 2 and len(address_query(page)["unlike"]) == 1
    expect(page.locator("#heading")).to_contain_text("The number is a score, no cosine")
    expect(page.locator("#least")).to_contain_text("Minimum score")
    page.locator("#grid .tile").first.focus()
    page.keyboard.press("o")
    expect(page.locator(".large-score")).to_contain_text("Score 0.")


def test_any_earlier_search_can_be_returned_to(page, reddish):
    page.set_input_files("#well input", reddish)
    page.wait_for_selector("#grid .score")
    for label in ("orange", "green", "blue"):
        search_from(page, label)
    expect(page.locator("#steps .step")).to_have_count(4)
    page.locator("#steps .step").nth(1).click()
    expect(page.locator("#well .label")).to_have_text("orange")
    expect(page.locator("#steps .step")).to_have_count(2)


def test_a_part_drawn_on_the_picture_is_searched_and_cleared(page, tmp_path):
    from PIL import Image

    picture = Image.new("RGB", (200, 200), (220, 30, 30))
    picture.paste((30, 40, 220), (100, 0, 200, 200))  # blue on the right
    picture.save(tmp_path / "both.png")
    page.set_input_files("#well input", tmp_path / "both.png")
    page.wait_for_selector("#grid .score")
    place = page.locator("#well img").bounding_box()
    x, y, w, h = (place[key] for key in ("x", "y", "width", "height"))
    page.mouse.move(x + 0.6 * w, y + 0.2 * h)
    page.mouse.down()
    page.mouse.move(x + 0.9 * w, y + 0.8 * h, steps=3)
    page.mouse.up()
    expect(page.locator("#well .extent")).to_contain_text("60 × 120 pixels")
    expect(page.locator("#steps .step")).to_have_count(2)  # the page has drawn the picture again, with its part
    expect(page.locator("#grid .label").first).to_have_text("blue")
    page.locator("#well img").focus()
    for _ in range(30):
        page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    expect(page.locator("#grid .label").first).to_have_text("red")
    page.click("[data-whole]")
    expect(page.locator("#well .box")).to_be_hidden()


def test_conditions_narrow_the_collection_and_the_search(page):
    expect(page.locator("#where .info-text")).to_contain_text("Type a part of a name")
    expect(page.locator("#where .info-text")).to_be_visible()
    typed(page, "label=green, blue")
    expect(page.locator("#heading")).to_contain_text("7 pictures")
    search_from(page, "green")
    assert set(labels(page)) == {"green", "blue"}
    typed(page, "labl = green")
    expect(page.locator("#problem")).to_contain_text("labl")
    assert set(labels(page)) == {"green", "blue"}, "the results stay"


def test_a_menu_closes_when_it_is_left_by_tab(page):
    for key, drawn in (("Tab", False), ("Tab", True), ("Shift+Tab", True)):
        page.locator("#where input").focus()
        page.keyboard.press("ArrowDown")
        if drawn:
            expect(page.get_by_role("option").first).to_be_visible()
        page.keyboard.press(key)
        expect(page.locator("#where input")).not_to_be_focused()
        page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        expect(page.get_by_role("option")).to_have_count(0)


def test_a_part_of_a_name_finds_pictures(page):
    typed(page, "RED/")
    expect(page.locator("#heading")).to_contain_text(re.compile(r"\D3 pictures"))
    assert set(labels(page)) == {"red"}


def test_the_browsers_back_and_forward_walk_through_the_searches(page):
    search_from(page, "red")
    search_from(page, "blue")
    page.go_back()
    expect(page.locator("#grid .label").first).to_have_text("red")
    expect(page.locator("#steps .step")).to_have_count(0)
    page.go_forward()
    expect(page.locator("#grid .label").first).to_have_text("blue")
    expect(page.locator("#steps .step")).to_have_count(2)
    page.go_back()
    page.go_back()
    expect(page.locator("#heading")).to_contain_text("13 pictures")
    assert "like=" not in page.url


def test_a_threshold_limits_the_results_and_without_any_says_what_to_do(page):
    search_from(page, "red")
    page.fill("#least input[type=number]", "0.99")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelectorAll('#grid .tile').length < 12")
    assert set(labels(page)) == {"red"}
    typed(page, "label=blue")
    expect(page.locator("#grid .notice")).to_contain_text("No picture has a similarity of 0.99 or more. Lower")


def test_a_selection_outlives_a_search_and_is_saved(page):
    search_from(page, "red")
    page.locator("#grid li").nth(1).hover()
    page.locator("#grid .pick").nth(1).check()
    page.locator("#grid .tile").nth(4).click(modifiers=["Shift"])
    expect(page.locator(".selection .count")).to_have_text("4 selected")
    first = page.locator("#grid .tile").nth(1).get_attribute("data-similarity")
    search_from(page, "blue")
    expect(page.locator(".selection .count")).to_have_text("4 selected")
    rows = list(csv.DictReader(saved(page, "csv").splitlines()))
    assert len(rows) == 4 and float(rows[0]["similarity"]) == float(first) and rows[0]["label"] == "red"
    page.click("[data-select=none]")
    expect(page.locator("[data-export=csv]")).to_be_hidden()
    page.click("[data-select=all]")
    expect(page.locator(".selection .count")).to_have_text("12 selected")


def test_only_shift_selects_the_tiles_between(page):
    for at in (5, 1):
        page.locator("#grid .tile").nth(at).focus()
        page.keyboard.press("x")
    expect(page.locator(".selection .count")).to_have_text("2 selected")
    page.locator("#grid .tile").nth(4).click(modifiers=["Shift"])
    expect(page.locator(".selection .count")).to_have_text("5 selected")


def test_nothing_moves_after_the_first_pictures_are_there(page, monkeypatch):
    answer = AsyncClient.keys

    async def late(client, **options):
        await asyncio.sleep(1)
        return await answer(client, **options)

    monkeypatch.setattr(AsyncClient, "keys", late)
    page.add_init_script("""
        new MutationObserver((_, observer) => {
            const tile = document.querySelector("#grid .tile");
            if (!tile) return;
            observer.disconnect();
            window.hint = document.querySelector("#where").innerText;
        }).observe(document, { childList: true, subtree: true });
    """)
    page.reload()
    page.wait_for_selector("#grid .tile")
    assert "Keys: label" in page.evaluate("hint")


def test_all_of_the_collection_can_be_selected_but_some(page):
    page.click("[data-select=all]")
    page.locator("#grid .tile").nth(2).focus()
    page.keyboard.press("x")
    expect(page.locator(".selection .count")).to_have_text("12 selected")
    assert len(saved(page, "paths").splitlines()) == 12


def test_the_address_brings_the_search_back(page, servers):
    typed(page, "label=red,green")
    expect(page.locator("#grid .label", has_text="blue")).to_have_count(0)
    search_from(page, "green")
    press(page, "red", "unlike")
    expect(page.locator("#chips .chip")).to_have_count(2)
    page.fill("#k input[type=number]", "3")
    page.keyboard.press("Enter")
    expect(page.locator("#grid .tile")).to_have_count(3)
    page.wait_for_url(re.compile(r"[?&]k=3\b"))
    found, address = labels(page), page.url
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#link button")
    expect(page.locator("#link [role=status]")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == address
    page.goto(address)
    page.wait_for_selector("#grid .score")
    expect(page.locator("#chips .unlike .chip")).to_have_count(1)
    assert labels(page) == found and page.url == address
    expect(page.locator("#k input[type=number]")).to_have_value("3")


def test_a_picture_from_disk_cannot_be_linked_and_the_page_says_why(page, reddish):
    page.set_input_files("#well input", reddish)
    page.wait_for_selector("#grid .score")
    page.click("#link button")
    expect(page.locator(".toast-body")).to_contain_text("A link cannot carry a picture from your disk")


def test_a_picture_is_taken_with_the_camera(page):
    page.click("#camera button:has-text('Take a picture')")
    page.wait_for_function("document.querySelector('#camera video').videoWidth > 0")
    page.click("[data-take]")
    expect(page.locator("#well .name")).to_have_text("from the camera.jpg")
    page.wait_for_selector("#grid .score")
    assert page.evaluate("document.querySelector('#camera video').srcObject") is None, "the camera is off again"


def test_a_forbidden_camera_is_reported_and_without_one_there_is_no_button(servers, open_page):
    page = open_page(servers.service)
    page.evaluate(
        "void (navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('no', 'NotAllowedError'); })"
    )
    page.click("#camera button:has-text('Take a picture')")
    expect(page.locator(".toast-body")).to_contain_text("The browser may not use the camera. Allow it")
    page.evaluate(
        """navigator.mediaDevices.enumerateDevices = () => Promise.resolve([]);
        navigator.mediaDevices.dispatchEvent(new Event("devicechange"));"""
    )
    expect(page.locator("#camera button").first).to_be_hidden()


SHOWN_JS = """window.shown = new Set();
new MutationObserver(() => document.querySelectorAll("#grid .tile").forEach(tile => shown.add(tile.dataset.collection)))
  .observe(document, {subtree: true, childList: true})"""


def test_a_link_with_a_collection_and_a_condition_never_shows_another_collection(servers, page):
    folder = servers.folder
    for colour in ("red", "blue"):
        (folder / "two" / colour).mkdir(parents=True)
        shutil.copy(folder / "pictures" / colour / "0.png", folder / "two" / colour)
    bulk.run(
        bulk.BulkSettings(
            data=str(folder / "two"), encoder=str(folder / "encoder"), index=str(folder / "index"), collection="two"
        )
    )
    page.add_init_script(SHOWN_JS)
    for link in ("in=two&where=label%3Dred", "where=label%3Dred&in=two&k=3&least=0.1"):
        page.goto(f"{servers.service}/ui/?{link}")
        expect(page.locator('#grid .tile[data-collection="two"]')).to_have_count(1)
        assert page.evaluate("[...shown]") == ["two"]
        assert address_query(page)["in"] == ["two"] and address_query(page)["where"] == ["label=red"]
    id = tile(page, "red").locator(".tile").get_attribute("data-id")
    page.goto(f"{servers.service}/ui/?like={id}&in=two&where=label%3Dblue")
    expect(page.locator("#grid .score")).to_have_count(1)
    assert page.evaluate("[...shown]") == ["two"] and labels(page) == ["blue"]
    # Without a collection of the usual name, the name is not a choice, and Gradio would say so in a message.
    shutil.rmtree(next((folder / "index").glob("pictures.*.lance")))
    page.goto(f"{servers.service}/ui/?in=two&where=label%3Dred")
    expect(page.locator('#grid .tile[data-collection="two"]')).to_have_count(1)
    expect(page.locator("#where .token")).to_have_count(1)
    assert page.locator(".toast-body").count() == 0


def test_a_file_that_is_chosen_while_the_page_shows_another_search_is_searched_by(page, reddish):
    with page.expect_file_chooser() as opened:
        page.locator("#well label").first.click()
    page.locator("#grid .tile", has_text="blue").first.click()
    expect(page.locator("#well img")).to_have_attribute("alt", re.compile("blue"))  # the well is another element now
    opened.value.set_files(reddish)
    expect(page.locator("#well .name")).to_have_text("mine.png")
    expect(page.locator("#grid .label").first).to_have_text("red")
