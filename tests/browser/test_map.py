"""The map and the near-duplicates, in a browser. Each test continues from the state that the previous one left."""

import json
import time
from dataclasses import asdict

import httpx
import pytest
from playwright.sync_api import expect

from serving.derived.task import Progress
from tests.conftest import PATIENCE_S

pytestmark = pytest.mark.browser


def open_tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def chosen(page) -> list[str]:
    return sorted(page.locator("#map-choice .label").all_inner_texts())


def test_map_and_duplicates_of_a_new_collection_appear_by_themselves(servers, open_page):
    for label in ("red", "blue"):
        for i in range(2):
            picture = (servers.folder / "pictures" / label / f"{i}.png").read_bytes()
            put = httpx.put(
                f"{servers.service}/collections/new/items",
                params={"label": label, "name": f"{label} {i}.png"},
                content=picture,
                headers={"Content-Type": "image/png"},
            )
            assert put.status_code == 200, put.text
    for name, result in (("Map", ".map-legend button"), ("Duplicates", "#duplicates .copies")):
        page = open_page(servers.service)
        page.goto(f"{servers.service}/ui/?in=new")
        expect(page.locator("#grid .tile")).to_have_count(4)
        open_tab(page, name)
        expect(page.locator(result)).to_have_count(2)
        expect(page.locator("#make-map, #compare")).to_have_count(0)


@pytest.mark.parametrize(
    ("tab", "kind", "result"),
    [("Map", "map", ".map-legend button"), ("Duplicates", "duplicates", "#duplicates .copies")],
)
def test_a_tab_opened_while_its_result_is_computed_shows_it_when_it_is_there(servers, open_page, tab, kind, result):
    (table,) = (servers.folder / "index" / "derived").glob(f"new.*/{kind}.json")
    done = table.read_text()
    table.write_text(json.dumps(asdict(Progress("computing", "reading", 0.5, at=time.time() + PATIENCE_S))))
    page = open_page(servers.service)
    page.goto(f"{servers.service}/ui/?in=new")
    expect(page.locator("#grid .tile")).to_have_count(4)
    open_tab(page, tab)
    expect(page.locator(f"#{kind}-status")).to_have_text("Reading, 50%")
    table.write_text(done)
    expect(page.locator(result)).to_have_count(2)


def test_what_is_chosen_on_the_map_is_shown(servers, page, wait_until):
    map_of = f"{servers.service}/collections/pictures/map"
    wait_until(lambda: httpx.get(map_of).json()["state"] == "done", "the map is not made by itself")
    open_tab(page, "Map")
    expect(page.locator(".map-legend button")).to_have_count(4)
    expect(page.locator("#map-status")).to_contain_text("13 pictures")

    page.locator(".map canvas").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#map-choice h2")).to_have_text("13 pictures chosen")
    page.locator(".map-legend button", has_text="red").click()
    page.click("[data-do=picked]")
    expect(page.locator("#map-choice h2")).to_have_text("3 pictures chosen")
    assert chosen(page) == ["red"] * 3
    with page.expect_download() as saved:
        page.click("#map-choice [data-export=csv]")
    assert saved.value.path().read_text().count("red") >= 3
    page.locator("#map-choice .tile").first.click()
    expect(page.locator("#grid .label").first).to_have_text("red")


def test_a_point_shows_its_picture_and_is_searched_from_and_a_box_gathers(servers, open_page):
    page = open_page(servers.alone, viewport={"width": 1400, "height": 900})
    open_tab(page, "Map")
    page.wait_for_selector(".map-legend button")
    canvas = page.locator(".map canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.click("[data-mode=box]")
    page.mouse.move(box["x"] + 3, box["y"] + 3)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(box["x"] + box["width"] - 3, box["y"] + box["height"] - 3)
    page.mouse.up()
    expect(page.locator("#map-choice h2")).to_have_text("13 pictures chosen")
    page.click("[data-do=pictures]")
    thumbnail = page.locator(".map-pictures img").first
    page.wait_for_function("document.querySelector('.map-pictures img')?.naturalWidth > 0")
    at = thumbnail.bounding_box()
    page.mouse.move(at["x"] + at["width"] / 2, at["y"] + at["height"] / 2)
    expect(page.locator(".map-tip")).to_be_visible()
    page.wait_for_function("document.querySelector('.map-tip img').naturalWidth > 0")
    name = page.locator(".map-tip span").inner_text()
    page.mouse.down()
    page.mouse.up()
    expect(page.locator("#well .label")).to_have_text(name)
    expect(page.locator("#grid .score").first).to_be_visible()


def test_the_tab_that_was_chosen_last_is_filled(page):
    for name in ("Map", "Views", "Invariance", "Runs", "Duplicates"):  # at once, one after another
        open_tab(page, name)
    page.wait_for_selector("#duplicates .copy")


def test_points_become_pictures_when_zoomed_in_and_none_overlaps(page):
    open_tab(page, "Map")
    page.wait_for_selector(".map-legend button")
    pictures = page.locator(".map-pictures img")
    page.click("[data-do=pictures]")
    expect(pictures.first).to_be_visible()
    page.locator(".map canvas").scroll_into_view_if_needed()
    spot = pictures.first.bounding_box()
    page.click("[data-do=pictures]")
    expect(pictures).to_have_count(0)  # the whole map shows points
    page.mouse.move(spot["x"] + 27, spot["y"] + 27)
    page.mouse.wheel(0, -100)
    expect(pictures.first).to_be_visible()
    box = "(all) => all.map((one) => one.getBoundingClientRect()).map(({ x, y }) => [x, y])"
    places = pictures.evaluate_all(box)
    apart = [max(abs(x - u), abs(y - v)) for i, (x, y) in enumerate(places) for u, v in places[:i]]
    assert len(places) > 1 and min(apart) >= 54
    page.click("[data-do=whole]")
    expect(pictures).to_have_count(0)


def test_marks_are_kept_while_paging_and_removing_asks_twice(page):
    open_tab(page, "Duplicates")
    expect(page.locator("#duplicates .copies")).to_have_count(4)
    copies = page.locator("#duplicates .copy")
    expect(copies.first.locator(".verdict")).to_have_text("keep (suggested)")
    copies.nth(1).focus()
    page.keyboard.press("Space")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator(".marked")).to_have_text("2 pictures marked")
    copies.first.click()
    expect(page.locator(".none-stays")).to_have_count(1)
    copies.first.click()
    page.fill("#threshold input[type=number]", "0.99")
    page.keyboard.press("Enter")
    expect(page.locator("#duplicates .copies-all")).to_have_attribute("data-threshold", "0.99")
    expect(page.locator('.copy[aria-pressed="true"]')).to_have_count(2)
    with page.expect_download() as saved:
        page.click("#duplicates [data-do=paths]")
    assert len(saved.value.path().read_text().splitlines()) == 2

    page.click("#duplicates [data-do=ask]")
    expect(page.locator("#acts h3").first).to_have_text("Remove 2 pictures from the collection pictures?")
    remove = page.locator("[data-ask=do]")
    expect(remove).to_be_disabled()
    page.fill("#acts dialog[open] input", "3")
    expect(remove).to_be_disabled()
    page.fill("#acts dialog[open] input", "2")
    remove.click()
    expect(page.locator(".did")).to_contain_text("2 pictures removed; files were not touched")
    expect(page.locator("#duplicates .copies")).to_have_count(3)
    expect(page.locator(".marked")).to_have_text("Nothing is marked")
    open_tab(page, "Map")
    page.wait_for_function(
        "[...document.querySelectorAll('.map-legend b')].reduce((sum, b) => sum + Number(b.textContent), 0) == 11"
    )


def test_a_narrow_window_needs_no_sideways_scrolling(servers, open_page):
    page = open_page(servers.service, viewport={"width": 390, "height": 844}, color_scheme="dark")
    for name, ready in (("Map", ".map-legend button"), ("Duplicates", "#duplicates .copy")):
        open_tab(page, name)
        page.wait_for_selector(ready)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_programs_ask_by_name(servers):
    from gradio_client import Client

    client = Client(f"{servers.alone}/ui/", verbose=False)
    answer = client.predict("pictures", api_name="/map")
    assert len(answer["ids"]) == len(answer["x"]) == 11
    groups = client.predict(0.95, 10, 0, "pictures", api_name="/duplicates")["groups"]
    assert len(groups) == 3 and all(one["similarity"] >= 0.95 for group in groups for one in group)
