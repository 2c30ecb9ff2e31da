"""Take the documents' screenshots of the page: every tab, in a wide window and in a narrow one.

    python docs/screenshots.py --encoder runs/clothing-tiny/encoder --index index --runs runs
    python docs/screenshots.py --encoder runs/lite0/encoder runs/clothing-tiny/encoder --only compared

Starts the service with that collection and writes docs/screenshots/TAB-wide.webp and TAB-narrow.webp from Chromium. The
map and the near-duplicates of the collection are computed if that has not been done yet.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import io
import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.page import FLAGS, OPENED_JS, chromium
from benchmarks.serving import BENTOML, Server, stop
from serving.client import Client

FOLDER = Path(__file__).parent / "screenshots"
SIZES = {"wide": (1400, 900), "narrow": (390, 844)}
QUALITY = 82
LONG_MS = 180_000  # a map of the whole collection may have to be computed


@dataclass(frozen=True)
class Options:
    encoder: tuple[str, ...]
    """Folders of the encoders to serve. With several, their results are compared in the screenshot `compared`."""
    index: str = "index"
    """Folder of the index."""
    collection: str = "pictures"
    runs: str = "runs"
    """Folder of the training runs."""
    picture: str = ""
    """Part of the name of the picture to show. By default the first picture of the collection."""
    only: str = ""
    """Take this screenshot only: similar, compared, map, duplicates, views, invariance or runs."""
    scheme: Literal["light", "dark"] = "light"
    """Colour scheme, light or dark."""


def similar(page: Page, picture: str) -> None:
    """Show the pictures nearest to `picture`. The other tabs then show the same picture."""
    tile = page.locator("#grid .tile")
    tile = page.locator(f'#grid .tile[data-name*="{picture}"]') if picture else tile
    tile.first.click()
    page.wait_for_selector("#grid .score")
    page.wait_for_function(OPENED_JS)


def compared(page: Page, picture: str) -> None:
    """Show the results of the first encoder beside those of the last."""
    similar(page, picture)
    page.locator("#beside input").click()
    page.get_by_role("option").last.click()
    page.locator("#grid .grid").nth(1).wait_for()
    page.wait_for_timeout(2000)  # for the pictures to load


def opener(tab: str, ready: str, begin: str | None = None) -> Callable[[Page, str], None]:
    """A function that opens a tab and waits for it.

    ready  selector of an element that the finished tab has
    begin  selector of a button to press first, if it is shown
    """

    def show(page: Page, picture: str) -> None:
        similar(page, picture)
        page.get_by_role("tab", name=tab).click()
        either = page.locator(ready).or_(page.locator(begin)) if begin else page.locator(ready)
        either.first.wait_for(timeout=LONG_MS)
        if begin and page.locator(begin).first.is_visible() and not page.locator(ready).first.is_visible():
            page.locator(begin).first.click()
        page.locator(ready).first.wait_for(timeout=LONG_MS)
        page.wait_for_timeout(2000)  # for the pictures to load

    return show


def runs(page: Page, picture: str) -> None:
    """Show the Runs tab with the two newest runs."""
    opener("Runs", "#run-curves .chart")(page, picture)
    if (second := page.locator('[data-run][aria-pressed="false"]')).count():
        second.first.click()
        page.wait_for_selector("#run-curves .key")


TABS = {
    "similar": similar,
    "compared": compared,
    "map": opener("Map", "#map .map:not([hidden]) canvas", "#make-map"),
    "duplicates": opener("Duplicates", "#duplicates .copies", "#compare"),
    "views": opener("Views", "#pairs .pair"),
    "invariance": opener("Invariance", "#curves .panel"),
    "runs": runs,
}


def main(options: Options) -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        folders = {"ENCODER": options.encoder, "INDEX": (options.index,), "RUNS": (options.runs,)}
        settings = {
            f"TWINVIEW_{name}": ",".join(str(Path(value).absolute()) for value in values)
            for name, values in folders.items()
        }
        server = Server("twinview", BENTOML, Path(folder), "/readyz", settings)
        try:
            server.wait()
            os.killpg(server.process.pid, signal.SIGCONT)
            with Client(f"http://127.0.0.1:{server.port}", timeout_s=LONG_MS / 1000) as client:
                client.invariance(count=2, collection=options.collection)  # loads PyTorch: longer than a page waits
            browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
            for tab, show in TABS.items():
                if options.only in ("", tab) and (tab != "compared" or len(options.encoder) > 1):
                    for size in SIZES:
                        take(browser, server.port, tab, show, size, options)
        finally:
            stop([server])


def take(browser: Browser, port: int, tab: str, show: Callable, size: str, options: Options) -> None:
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=options.scheme)
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{port}/ui/?in={options.collection}")
    page.wait_for_function(OPENED_JS)
    show(page, options.picture)
    page.mouse.move(0, 0)
    if size == "narrow":  # there the picture is above the tabs
        page.locator("#tabs").evaluate("tabs => tabs.scrollIntoView()")
    page.wait_for_timeout(500)
    path = FOLDER / f"{tab}-{size}.webp"
    with Image.open(io.BytesIO(page.screenshot())) as image:
        image.save(path, "WEBP", quality=QUALITY, method=6)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    context.close()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
