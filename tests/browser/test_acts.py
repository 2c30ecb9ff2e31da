"""What the page changes in a collection, and takes back. Each test leaves the collection as it was."""

import io
import re

import httpx
import pytest
from PIL import Image
from playwright.sync_api import expect

from serving.client import Client

pytestmark = pytest.mark.browser


def count_of(servers, collection: str = "pictures") -> int:
    return httpx.get(f"{servers.service}/collections/{collection}").json()["count"]


def select(page, label: str) -> None:
    for tile in page.locator(f'#grid .tile[data-label="{label}"]').all():
        tile.focus()
        page.keyboard.press("x")


def narrow(page, condition: str) -> None:
    page.locator("#where input").fill(condition)
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")  # closes the menu


def do(page, act: str, text: str) -> None:
    page.click(f".selection:visible [data-act={act}]")
    page.fill("#acts dialog[open] input", text)
    page.click("[data-ask=do]")


def take_back(page) -> None:
    page.click("[data-did=undo]")
    expect(page.locator(".did [role=status]")).to_contain_text("Undone")


def says(page, words: str) -> None:
    expect(page.locator(".did [role=status]")).to_have_text(words)


def test_selected_pictures_are_removed_and_come_back(page, servers):
    select(page, "red")
    page.click("[data-act=remove]")
    expect(page.locator("#acts dialog[open] h3")).to_have_text("Remove 3 pictures from the collection pictures?")
    page.fill("#acts dialog[open] input", "2")
    expect(page.locator("[data-ask=do]")).to_be_disabled()
    page.fill("#acts dialog[open] input", "3")
    page.click("[data-ask=do]")
    says(page, "3 pictures removed; files were not touched.")
    expect(page.locator("#heading")).to_contain_text("10 pictures")
    expect(page.locator('#grid .tile[data-label="red"]')).to_have_count(0)
    expect(page.locator(".selection .count")).to_have_text("")
    assert count_of(servers) == 10
    take_back(page)
    says(page, "Undone: the collection pictures has 13 pictures now.")
    expect(page.locator("#heading")).to_contain_text("13 pictures")
    expect(page.locator('#grid .tile[data-label="red"]')).to_have_count(3)
    expect(page.locator("[data-did=undo]")).to_be_hidden()
    assert count_of(servers) == 13


def test_all_pictures_of_a_filter_but_one_are_labelled(page, servers):
    narrow(page, "label=blue")
    expect(page.locator("#heading")).to_contain_text(re.compile(r"\D3 pictures"))
    expect(page.locator("#grid .tile")).to_have_count(3)
    page.click("[data-select=all]")
    expect(page.locator(".selection .count")).to_have_text("3 selected")
    page.locator("#grid .tile").first.focus()
    page.keyboard.press("x")
    expect(page.locator(".selection .count")).to_have_text("2 selected")
    do(page, "label", "azure")
    says(page, "2 pictures labelled azure.")
    expect(page.locator("#grid .tile")).to_have_count(1)  # is still blue
    take_back(page)
    expect(page.locator("#grid .tile")).to_have_count(3)


def test_selected_pictures_are_put_into_a_new_collection_that_can_be_chosen(page, servers):
    select(page, "green")
    do(page, "copy", "no name")
    says(page, "'no name' cannot be the name of a collection: use letters, digits, - and _, for instance shoes-2.")
    do(page, "copy", "greens")
    says(page, "4 pictures put into the collection greens.")
    assert (count_of(servers), count_of(servers, "greens")) == (13, 4)
    page.locator("#collection input").click()
    page.get_by_role("option", name="greens").click()
    expect(page.locator("#heading")).to_contain_text("4 pictures")
    page.wait_for_function("[...document.querySelectorAll('#grid img')].every((image) => image.naturalWidth)")
    httpx.delete(f"{servers.service}/collections/greens").raise_for_status()


def test_pictures_chosen_on_the_map_are_removed_and_come_back(page, servers, wait_until):
    map_of = f"{servers.service}/collections/pictures/map"
    wait_until(lambda: httpx.get(map_of).json()["state"] == "done", "the map is not made by itself")
    page.get_by_role("tab", name="Map").click()
    page.locator(".map-legend button", has_text="orange").click()
    page.click("[data-do=picked]")
    expect(page.locator("#map-choice h2")).to_have_text("3 pictures chosen")
    with page.expect_download() as saved:
        page.click("#map-choice [data-export=paths]")
    assert saved.value.path().read_text().count("orange") == 3
    do(page, "remove", "3")
    says(page, "3 pictures removed; files were not touched.")
    expect(page.locator("#map-choice .tile")).to_have_count(0)
    assert count_of(servers) == 10
    take_back(page)
    assert count_of(servers) == 13


@pytest.fixture
def drop(page):
    """drop(*paths) drops files and folders of the disk on the page, as a file manager does."""

    def dropped(*paths) -> None:
        session = page.context.new_cdp_session(page)
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            session.send("Input.dispatchDragEvent", {"type": kind, "x": 600, "y": 400, "data": data})

    return dropped


def test_a_dropped_folder_is_added_and_what_cannot_be_read_is_named(page, servers, drop, tmp_path):
    folder = tmp_path / "Holiday"
    for label in ("beach", "hills"):
        (folder / label).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (40, 40), (20 * i, 50, 90 if label == "beach" else 5)).save(folder / label / f"{i}.png")
    (folder / "hills" / "notes.txt").write_text("no picture at all")
    (folder / ".hidden").write_text("nothing")
    drop(folder)
    expect(page.locator(".adding h3")).to_have_text("Add 21 pictures to the collection pictures?")
    expect(page.locator(".adding-words")).to_contain_text("become labels: beach, hills.")
    page.click("[data-adding=add]")
    expect(page.locator(".adding-words")).to_have_text("20 pictures added. 1 picture could not be read:")
    expect(page.locator(".adding-failed li")).to_contain_text("hills/notes.txt: is not an image")
    page.click("[data-adding=close]")
    expect(page.locator("#heading")).to_contain_text("33 pictures")
    narrow(page, "label=beach")
    expect(page.locator("#heading")).to_contain_text("10 pictures")
    take_back(page)
    assert count_of(servers) == 13


def test_several_dropped_pictures_are_added_or_searched_by(page, servers, drop, tmp_path, reddish):
    blue = tmp_path / "blue.png"
    Image.new("RGB", (40, 40), (30, 40, 220)).save(blue)
    drop(reddish, blue)
    page.click("[data-adding=search]")
    expect(page.locator("#chips .chip")).to_have_count(2)
    expect(page.locator("#grid .score").first).to_be_visible()
    drop(reddish, blue)
    page.click("[data-adding=add]")
    says(page, "2 pictures added.")
    assert count_of(servers) == 15
    take_back(page)
    assert count_of(servers) == 13


def test_pictures_are_added_by_a_button_also_by_the_page_alone(servers, open_page, reddish):
    page = open_page(servers.alone)
    page.click("[data-add]")
    page.set_input_files("[data-add=files]", reddish)
    page.click("[data-adding=add]")
    says(page, "1 picture added.")
    expect(page.locator("#heading")).to_contain_text("14 pictures")
    take_back(page)
    assert count_of(servers) == 13


def test_a_mark_in_duplicates_is_removed_and_comes_back(page, servers, wait_until):
    compared = f"{servers.service}/collections/pictures/duplicates"
    wait_until(lambda: httpx.get(compared).json()["state"] == "done", "nothing is compared by itself")
    page.get_by_role("tab", name="Duplicates").click()
    page.locator("#duplicates .copy").nth(1).click()
    page.click("#duplicates [data-do=ask]")
    page.fill("#acts dialog[open] input", "1")
    page.click("[data-ask=do]")
    says(page, "1 picture removed; files were not touched.")
    expect(page.locator(".marked")).to_have_text("Nothing is marked")
    take_back(page)
    assert count_of(servers) == 13
    page.get_by_role("tab", name="Similar").click()
    expect(page.locator("#heading")).to_contain_text("13 pictures")


def test_suggested_labels_are_confirmed_together(page, servers):
    select(page, "red")
    do(page, "label", "")
    says(page, "The labels of 3 pictures were removed.")
    page.click("[data-pick=suggested]")
    expect(page.locator("#heading")).to_contain_text("Suggested labels")
    expect(page.locator("#grid .tile")).to_have_count(3)
    expect(page.locator("#grid .tile .label").first).to_contain_text("?")
    suggested = page.locator("#grid .tile").evaluate_all("tiles => tiles.map(tile => tile.dataset.suggested)")
    page.locator("#grid .pick").nth(1).uncheck()  # all three are still selected
    page.click("[data-act=confirm]")
    expect(page.locator("#acts dialog[open] h3")).to_have_text("Label 2 pictures as suggested?")
    expect(page.locator("#acts dialog[open] input")).to_be_hidden()
    page.click("[data-ask=do]")
    says(page, "2 pictures labelled as suggested.")
    expect(page.locator("#grid .tile")).to_have_count(1)
    expect(page.locator("#grid .count")).to_have_text("")  # nothing is selected any more
    take_back(page)
    expect(page.locator("#grid .tile")).to_have_count(3)
    assert len(suggested) == 3 and all(suggested)
    page.click("[data-select=all]")
    do(page, "label", "red")
    expect(page.locator("#grid .notice")).to_contain_text("Every picture of the collection has a label.")


def test_what_to_label_is_suggested_until_every_picture_has_a_label(page, servers):
    select(page, "red")
    do(page, "label", "")
    says(page, "The labels of 3 pictures were removed.")
    page.click("[data-pick=first]")
    expect(page.locator("#heading")).to_contain_text("To label first")
    expect(page.locator("#grid .tile")).to_have_count(3)
    page.locator("#k input[type=number]").fill("2")
    page.keyboard.press("Enter")
    expect(page.locator("#grid .tile")).to_have_count(2)
    page.click("[data-select=all]")
    do(page, "label", "red")
    expect(page.locator("#grid .tile")).to_have_count(1)  # the next ones are suggested
    page.click("[data-select=all]")
    do(page, "label", "red")
    expect(page.locator("#grid .notice")).to_contain_text("Every picture of the collection has a label.")
    page.click("[data-pick=off]")
    expect(page.locator("#heading")).to_contain_text("Your collection")
    expect(page.locator('#grid .tile[data-label="red"]')).to_have_count(3)


def test_odd_pictures_are_listed_and_a_doubtful_label_is_corrected(page, servers):
    files, facts = [], []
    for i in range(24):
        buffer = io.BytesIO()
        Image.new("RGB", (48, 36), (225 - i, 30, 30) if i % 2 else (30, 40, 225 - i)).save(buffer, "PNG")
        files.append(buffer.getvalue())
        facts.append({"name": f"{i}.png", "label": "red" if i % 2 or i == 4 else "blue"})
    with Client(servers.service) as client:
        client.put_items(files, facts, collection="doubts")
    page.goto(f"{servers.service}/ui/?in=doubts")
    page.click("[data-pick=outliers]")
    expect(page.locator("#heading")).to_contain_text("Outliers")
    expect(page.locator("#grid .tile")).to_have_count(24)
    page.click("[data-pick=labels]")
    expect(page.locator("#heading")).to_contain_text("Doubtful labels")
    expect(page.locator("#grid .tile")).to_have_attribute("data-name", "4.png")
    expect(page.locator("#grid .label")).to_have_text("blue?")
    page.click("[data-select=all]")
    page.click("[data-act=confirm]")
    page.click("[data-ask=do]")
    says(page, "1 picture labelled as suggested.")
    expect(page.locator("#grid .notice")).to_have_text("No label is contradicted by the nearest pictures.")
    page.click("[data-pick=broken]")
    expect(page.locator("#heading")).to_contain_text("Broken pictures")  # a picture of one colour is empty
    expect(page.locator("#grid .score").first).to_have_text("empty")
    page.click("[data-pick=off]")
    expect(page.locator("#heading")).to_contain_text("24 pictures")
