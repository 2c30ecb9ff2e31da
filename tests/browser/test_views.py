"""The tabs Views and Invariance: what a picture's augmentations are, and what the encoder makes of them."""

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser


def search(page, picture) -> None:
    page.set_input_files("#well input", picture)
    page.wait_for_selector("#grid .score")


def drawn(page) -> list[str]:
    return page.locator("#pairs .pair img").evaluate_all("images => images.map(image => image.src)")


def open_tab(page, name: str, until: str) -> None:
    page.get_by_role("tab", name=name).click()
    page.wait_for_selector(until)


def wait_for_other(page, before: list[str]) -> list[str]:
    page.wait_for_function(
        """before => {
            const images = [...document.querySelectorAll("#pairs .pair img")];
            return images.length && images.some((image, i) => image.src != before[i]);
        }""",
        arg=before,
    )
    return drawn(page)


def test_a_slider_changes_the_views_and_the_same_seed_brings_the_same(page, reddish):
    search(page, reddish)
    open_tab(page, "Views", "#pairs .pair")
    first = drawn(page)
    assert len(first) == 6 and len(set(first)) > 3
    expect(page.locator("#strength")).to_be_hidden()
    page.get_by_role("button", name="Settings of the augmentation").click()
    page.fill("#strength input[type=number]", "0")
    page.keyboard.press("Enter")
    plain = wait_for_other(page, first)
    page.click("#again")
    expect(page.locator("#seed input[type=number]")).to_have_value("1")
    wait_for_other(page, plain)
    page.fill("#seed input[type=number]", "0")
    page.keyboard.press("Enter")
    page.wait_for_function("src => document.querySelector('#pairs .pair img').src == src", arg=plain[0])
    assert drawn(page) == plain
    page.locator("#pair-count").scroll_into_view_if_needed()
    track = page.locator("#pair-count input[type=range]").bounding_box()
    page.mouse.click(track["x"] + track["width"] - 2, track["y"] + track["height"] / 2)
    expect(page.locator("#pairs .pair")).to_have_count(16)
    expect(page.locator("#summary")).to_contain_text("Mean cosine of these 16 pairs under h:")


def test_pairs_and_matrix_are_in_sight_at_720_pixels(servers, open_page, reddish):
    page = open_page(servers.service, viewport={"width": 1280, "height": 720})
    search(page, reddish)
    open_tab(page, "Views", "#matrix .batch")
    box = page.locator("#matrix").bounding_box()
    assert box["y"] < 720, "the matrix is below the window"


def test_a_preset_sets_the_sliders_and_without_augmentation_both_views_are_the_picture(page, reddish):
    search(page, reddish)
    open_tab(page, "Views", "#pairs .pair")
    page.get_by_role("button", name="Settings of the augmentation").click()
    page.get_by_role("button", name="None").click()
    expect(page.locator("#least-crop input[type=number]")).to_have_value("1")
    page.wait_for_function("new Set([...document.querySelectorAll('#pairs .pair img')].map(one => one.src)).size == 1")
    expect(page.locator("#summary")).to_contain_text("under h: 1.00")


def test_views_follow_the_picture(page, reddish):
    page.get_by_role("tab", name="Views").click()
    expect(page.locator("#pairs .notice")).to_contain_text("Choose a picture first")
    page.set_input_files("#well input", reddish)
    page.wait_for_selector("#pairs .pair")
    of_mine = drawn(page)
    page.get_by_role("tab", name="Similar").click()
    page.locator('#grid .tile[data-label="blue"]').first.click()
    expect(page.locator("#well .label")).to_have_text("blue")
    page.get_by_role("tab", name="Views").click()
    wait_for_other(page, of_mine)


def test_the_temperature_changes_loss_and_shares_at_once_by_eq_1(page, reddish):
    """The loss that the browser shows equals one computed here from the same cosines; no request is made."""
    search(page, reddish)
    open_tab(page, "Views", "#matrix .batch")
    expect(page.locator("#matrix .shares tbody tr")).to_have_count(12)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    for temperature in (0.05, 0.7):
        shown = page.evaluate(
            """temperature => {
                const slider = document.querySelector("#matrix .tau"), box = document.querySelector("#matrix .batch");
                slider.value = temperature;
                slider.dispatchEvent(new Event("input", { bubbles: true }));
                const positive = [...box.querySelectorAll(".shares .positive")].map(cell => Number(cell.textContent));
                return { loss: Number(box.querySelector(".loss").textContent), h: JSON.parse(box.dataset.h), positive };
            }""",
            temperature,
        )
        assert shown["loss"] == pytest.approx(_nt_xent(shown["h"], temperature), abs=6e-4)
        assert len(shown["positive"]) == 12
    page.locator("#matrix .cosines tbody tr").first.locator("td").nth(1).hover()
    expect(page.locator("#matrix .readout")).to_contain_text("mine.png, view 1 with mine.png, view 2, the positive")
    assert asked == []


def _nt_xent(cosines: list[list[float]], temperature: float) -> float:
    """By loops. Rows 2i and 2i + 1 are of one picture."""
    from math import exp, log

    losses = []
    for i, row in enumerate(cosines):
        weights = [exp(cosine / temperature) for cosine in row]
        losses.append(-log(weights[i ^ 1] / (sum(weights) - weights[i])))
    return sum(losses) / len(losses)


def test_each_augmentation_has_curves_and_its_picture_at_each_strength(page, reddish):
    """The encoder is the mean colour: a flip is nothing to it, grey is much."""
    search(page, reddish)
    open_tab(page, "Invariance", "#curves .panels")
    expect(page.locator("#curves .panel")).to_have_count(8)
    expect(page.locator("#curves .finding")).to_contain_text("This encoder notices")
    flip = page.locator("#curves .panel", has_text="flip").first
    assert "1: 0% of the way" in flip.locator("circle title").last.text_content()
    assert flip.locator(".strip img").count() == 2
    expect(page.locator("#curves .legend")).to_contain_text("mine.png alone")
    page.locator("#curves summary").click()
    expect(page.locator("#curves table")).to_be_visible()


@pytest.mark.parametrize(("tab", "until"), [("Views", "#matrix .batch"), ("Invariance", "#curves .panels")])
def test_a_narrow_window_needs_no_sideways_scrolling(servers, open_page, reddish, tab, until):
    page = open_page(servers.service, viewport={"width": 390, "height": 844}, color_scheme="dark")
    search(page, reddish)
    open_tab(page, tab, until)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
