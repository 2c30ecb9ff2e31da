import json
import math
import os
import time

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser

SETTINGS = {
    "data": "/home/me/cats.zip",
    "epochs": 20,
    "batch_size": 64,
    "encoder": "tiny",
    "augment": {"crop_area": [0.25, 1.0], "strength": 0.5},
}


@pytest.fixture(scope="module", autouse=True)
def trained(servers):
    """Two runs, one of which is still training: how to write so many of its epochs."""

    def write(name: str, epochs: int, **settings) -> None:
        folder = servers.folder / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(SETTINGS | settings))
        rows = [f"{e},{e * 10},{4.84 * math.exp(-e / 20):.4f},0.1,60.0" for e in range(1, epochs + 1)]
        (folder / "metrics.csv").write_text("\n".join(["epoch,step,loss,lr,images_per_s", *rows]) + "\n")

    write("done", 20, lr=0.3)
    write("now", 3, lr=0.1)
    for file in (servers.folder / "runs" / "done").iterdir():
        os.utime(file, (time.time() - 60,) * 2)  # the older of the two
    return write


@pytest.fixture
def runs(page):
    page.get_by_role("tab", name="Runs").click()
    page.wait_for_selector(".chart")
    return page


def of(page, name: str):
    return page.locator(f'[data-run="{name}"]')


def test_the_newest_run_is_shown_and_grows_while_it_trains(runs, trained):
    expect(of(runs, "now")).to_contain_text("training now")
    expect(of(runs, "done")).to_contain_text("20 of 20")
    trained("now", 5, lr=0.1)
    expect(of(runs, "now")).to_contain_text("5 of 20")
    assert runs.locator(".chart polyline").first.get_attribute("points").count(",") == 5


def test_nothing_is_requested_while_the_tab_is_hidden(runs):
    runs.get_by_role("tab", name="Similar").click()
    asked = []
    runs.on("request", lambda request: asked.append(request.url) if "queue/join" in request.url else None)
    for _ in range(5):  # the first of them may find what was on its way
        asked.clear()
        runs.wait_for_timeout(4500)
        if not asked:
            return
    raise AssertionError(f"still asked for: {asked}")


def test_several_are_compared_curve_by_curve_and_where_their_settings_differ(runs):
    of(runs, "done").click()
    expect(runs.locator(".chart").first.locator("polyline")).to_have_count(2)
    expect(runs.locator(".key span")).to_have_text(["now", "done"])
    expect(runs.locator("tr.differs th")).to_have_text(["lr"])
    expect(runs.locator("tr.differs td")).to_have_text(["0.1", "0.3"])
    of(runs, "now").click()
    expect(runs.locator(".chart").first.locator("polyline")).to_have_count(1)
    expect(of(runs, "now")).to_have_attribute("aria-pressed", "false")


def test_values_are_shown_at_the_pointer_and_by_keys(runs):
    of(runs, "done").click()
    expect(runs.locator(".key span")).to_have_count(2)
    svg, reading = runs.locator(".chart svg").first, runs.locator(".chart .reading").first
    box = svg.bounding_box()
    svg.hover(position={"x": box["width"] - 12, "y": 50})
    expect(reading).to_have_text("epoch 20: done 1.78")
    runs.mouse.move(5, 5)
    expect(reading).to_have_text("")
    svg.focus()
    for _ in range(20):
        runs.keyboard.press("ArrowLeft")
    expect(reading).to_have_text("epoch 1: now 4.604, done 4.604")


def test_views_are_drawn_as_the_run_draws_them(runs):
    runs.click("#draw-views")
    runs.wait_for_selector("#run-views .pair")  # PyTorch is loaded for the first
    expect(runs.locator("#run-views .pair img")).to_have_count(6)
    assert runs.locator("#run-views img").evaluate_all("images => images.every(image => image.naturalWidth > 0)")


def test_a_narrow_window_needs_no_sideways_scrolling(servers, open_page):
    page = open_page(servers.service, viewport={"width": 390, "height": 844}, color_scheme="dark")
    page.get_by_role("tab", name="Runs").click()
    page.wait_for_selector(".chart")
    of(page, "done").click()
    page.wait_for_selector("tr.differs")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    edges = page.locator(".chart, .run, .scroll").evaluate_all(
        "all => all.map((one) => one.getBoundingClientRect().right)"
    )
    assert max(edges) <= 390
