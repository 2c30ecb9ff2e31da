"""Time that the page adds to a search, and time to open it, with a large collection.

    python benchmarks/page.py [--quick]

`bentoml serve` with a collection of generated vectors in clusters, with thumbnails, and a real Chromium. A picture is
dropped on the page, and the time until the tiles of the results are painted is measured. Alternating with that, the
client makes the same search with the same picture over HTTP; the overhead of a round is the difference. Service,
browser and client share the machine's cores. The page is opened with an empty cache each time, until its first tiles
and their pictures are shown.

The encoder is an untrained ResNet-18 at 224 px: the results are meaningless, but take as long.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import base64
import io
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import numpy as np
import tyro
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.photograph import jpeg
from benchmarks.result import publish
from benchmarks.serving import BENTOML, Case, Server, prepare, stop
from export.artifact import load_bundle
from serving.client import Client
from serving.collection.index import Index, Item
from serving.inference.thumbnail import thumbnail

K = 24  # results on the page
CLUSTERS, LABELS = 2000, 10
FACES = 16  # different thumbnails
AT_ONCE = 10_000
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]

# Returns after the frame that follows the insertion of the tiles.
DROP_JS = """
async ([data, name]) => {
    const bytes = await (await fetch("data:image/jpeg;base64," + data)).blob();
    const carried = new DataTransfer();
    carried.items.add(new File([bytes], name, { type: "image/jpeg" }));
    const frame = () => new Promise(requestAnimationFrame);
    const grid = document.querySelector("#grid");
    const found = new Promise((resolve) => {
        const watching = new MutationObserver(() => {
            const ours = document.querySelector("#well .name")?.textContent === name;
            if (!ours || !grid.querySelector(".score")) return;
            watching.disconnect();
            resolve();
        });
        watching.observe(document.body, { childList: true, subtree: true, characterData: true });
    });
    grid.querySelectorAll(".score").forEach((score) => score.remove());  // of the search before
    const started = performance.now();
    document.body.dispatchEvent(new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: carried }));
    await found;
    await frame();
    await frame();
    return performance.now() - started;
}
"""
OPENED_JS = """
() => {
    const images = [...document.querySelectorAll("#grid .tile img")];
    const seen = images.filter((image) => image.getBoundingClientRect().top < innerHeight);
    return seen.length > 0 && seen.every((image) => image.naturalWidth > 0);
}
"""


@dataclass(frozen=True)
class Options:
    items: int = 100_000
    """Pictures in the collection."""
    rounds: int = 30
    """Searches on the page, and as many over HTTP."""
    quick: bool = False
    """1,000 pictures and 4 rounds only."""


def main(options: Options) -> None:
    items, rounds, openings = (1000, 4, 2) if options.quick else (options.items, options.rounds, 5)
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        prepare(Case("224", 224, 224, (500, 375), seconds=0), folder)
        fill_index(folder, items)
        server = Server("twinview", BENTOML, folder, "/readyz")
        try:
            server.wait()
            os.killpg(server.process.pid, signal.SIGCONT)
            browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
            opened = [opening(browser, server.port) for _ in range(openings + 1)][1:]  # the first fills caches
            by_page, by_http = searches(browser, server.port, rounds)
            browser.close()
        finally:
            stop([server])
    beyond = [page - http for page, http in zip(by_page, by_http, strict=True)]
    what = {"open the page": opened, "drop to results": by_page, "search over HTTP": by_http, "difference": beyond}
    rows = [
        {"what": what, "items": items, "n": len(ms), "p50 ms": median(ms), "p95 ms": quantiles(ms, n=20)[-1]}
        for what, ms in what.items()
    ]
    figures = {"page_open_ms": median(opened), "page_search_ms": median(by_page), "page_overhead_ms": median(beyond)}
    publish("page", rows, figures)


def chromium() -> str:
    """Path of a Chromium or Chrome on this machine."""
    if (path := next(filter(None, map(shutil.which, CHROMIUM)), None)) is None:
        sys.exit(f"error: no Chromium is installed: none of {', '.join(CHROMIUM)} is on the path")
    return path


def fill_index(folder: Path, n: int) -> None:
    """Fill folder/index. The thumbnails are hard links to a few files, since writing them is not measured."""
    card, rng = load_bundle(folder / "encoder").card, np.random.default_rng(0)
    index = Index(folder / "index", card.id, card.dimension)
    centres = rng.standard_normal((CLUSTERS, card.dimension), np.float32)
    faces = []
    for i in range(FACES):
        faces.append(folder / f"{i}.jpg")
        with Image.open(io.BytesIO(jpeg(i))) as image:
            faces[-1].write_bytes(thumbnail(image))
    for start in range(0, n, AT_ONCE):
        numbers = range(start, min(start + AT_ONCE, n))
        items = [Item(f"{i:08x}"[::-1], f"{i}.jpg", f"kind {i % LABELS}", None, 500, 375) for i in numbers]
        vectors = centres[rng.integers(CLUSTERS, size=len(items))]
        index.upsert(items, vectors + 0.6 * rng.standard_normal(vectors.shape, np.float32))
        for i, item in zip(numbers, items, strict=True):
            path = folder / "index" / index.thumbnail_path(item.id)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.hardlink_to(faces[i % FACES])
    index.maintain()


def opening(browser: Browser, port: int) -> float:
    """Milliseconds until the page shows the collection."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    page = context.new_page()
    started = time.perf_counter()
    page.goto(f"http://127.0.0.1:{port}/ui/")
    page.wait_for_function(OPENED_JS, timeout=60_000)
    seconds = time.perf_counter() - started
    context.close()
    return seconds * 1000


def searches(browser: Browser, port: int, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each search on the page, and of the same one over HTTP, after a warm-up."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto(f"http://127.0.0.1:{port}/ui/")
    page.wait_for_function(OPENED_JS, timeout=60_000)
    by_page, by_http = [], []
    with Client(f"http://127.0.0.1:{port}") as client:
        for i in range(rounds + 1):
            picture = jpeg(1000 + i)
            by_page.append(drop(page, picture, f"{i}.jpg"))
            page.wait_for_function(OPENED_JS)  # waits for thumbnails that are still loading
            started = time.perf_counter()
            client.search(picture, k=K)
            by_http.append((time.perf_counter() - started) * 1000)
    return by_page[1:], by_http[1:]


def drop(page: Page, picture: bytes, name: str) -> float:
    """Milliseconds from dropping a picture on the page to its results."""
    return page.evaluate(DROP_JS, [base64.b64encode(picture).decode(), name])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
