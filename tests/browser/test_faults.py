"""Failures while the page is open: it shows a message, stays usable and recovers."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Error, expect

from tests.conftest import PATIENCE_S

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[2]
SERVICE = """
import sys, uvicorn
from serving.app import create_app
encoder, index, port = sys.argv[1:]
uvicorn.run(create_app(encoder, index), port=int(port), log_level="warning")
"""


@pytest.fixture
def vast(tmp_path):
    """vast(side_px) -> a red picture of so many pixels each way, in some hundred kilobytes."""

    def make(side_px: int) -> Path:
        picture = Image.new("P", (side_px, side_px))
        picture.putpalette([220, 40, 40])
        picture.save(tmp_path / f"{side_px}.png")
        return tmp_path / f"{side_px}.png"

    return make


class Service:
    """The service without its page, to be stopped and started at one address."""

    def __init__(self, folder: Path, answers):
        self.answers = answers
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.url, self.folder, self.process = f"http://127.0.0.1:{self.port}", folder, None

    def start(self) -> None:
        arguments = [str(self.folder / "encoder"), str(self.folder / "index"), str(self.port)]
        self.process = subprocess.Popen([sys.executable, "-c", SERVICE, *arguments], cwd=ROOT, start_new_session=True)
        self.answers(f"{self.url}/readyz", "the output of this test")

    def stop_answering(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # dead already
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def fragile(servers, tmp_path, answers):
    """A service that can be killed, and the address of a page before it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    service = Service(servers.folder, answers)
    page = [sys.executable, "ui/app.py", "--service", service.url, "--port", str(port)]
    with open(tmp_path / "page.log", "w") as log:
        alone = subprocess.Popen(page, cwd=ROOT, stdout=log, stderr=log)
    service.start()
    url = f"http://127.0.0.1:{port}"
    answers(f"{url}/ui/", tmp_path / "page.log")
    yield service, url
    service.kill()
    alone.terminate()
    alone.wait(PATIENCE_S)


def shown(page) -> list[str]:
    return page.locator("#grid .tile").evaluate_all("tiles => tiles.map(tile => tile.dataset.id)")


def said(page, words: str) -> None:
    expect(page.get_by_text(words).last).to_be_visible()
    assert "Traceback" not in page.content()


def finds(page, label: str) -> None:
    expect(page.locator("#grid li", has=page.locator(".score")).locator(".label").first).to_have_text(label)


def test_a_dropped_text_file_is_refused_with_a_sentence_and_the_page_still_works(page, reddish):
    before = shown(page)
    page.evaluate(
        """() => {
            const carried = new DataTransfer();
            carried.items.add(new File(["no picture at all"], "notes.txt", { type: "text/plain" }));
            document.body.dispatchEvent(
                new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: carried }));
        }"""
    )
    said(page, "notes.txt) is not an image")
    assert shown(page) == before
    page.set_input_files("#well input", reddish)
    finds(page, "red")


def test_a_picture_of_100_megapixels_is_searched_by(page, vast):
    page.set_input_files("#well input", vast(10_000))
    finds(page, "red")


def test_a_picture_of_144_megapixels_is_refused_with_a_sentence_and_the_page_still_works(page, vast, reddish):
    before = shown(page)
    page.set_input_files("#well input", vast(12_000))
    said(page, "12000 x 12000 pixels")
    assert shown(page) == before
    page.set_input_files("#well input", reddish)
    finds(page, "red")


def test_a_service_killed_during_a_search_is_reported_and_found_again(fragile, open_page, reddish):
    service, url = fragile
    page = open_page(url)
    # A browser keeps six connections; thumbnails that wait for the stopped service would keep the search waiting too.
    page.wait_for_function("[...document.querySelectorAll('#grid img')].every((image) => image.naturalWidth)")
    service.stop_answering()
    with page.expect_response(lambda response: "queue/join" in response.url):  # the search has begun, and none answers
        page.set_input_files("#well input", reddish)
    service.kill()
    said(page, f"the service at {service.url} cannot be reached")
    service.start()
    page.set_input_files("#well input", reddish)
    finds(page, "red")


def test_two_windows_at_once_do_not_mix(servers, open_page, tmp_path):
    pages, colours = [open_page(servers.service) for _ in range(2)], {"red": (220, 40, 40), "blue": (40, 40, 220)}
    for name, colour in colours.items():
        Image.new("RGB", (40, 40), colour).save(tmp_path / f"{name}.png")
    for _ in range(3):
        for page, name in zip(pages, colours, strict=True):  # both are searching before either has an answer
            page.set_input_files("#well input", tmp_path / f"{name}.png")
        for page, name in zip(pages, colours, strict=True):
            finds(page, name)
            assert page.locator("#well .name").first.inner_text() == f"{name}.png"
        colours = dict(zip(reversed(colours), reversed(colours.values()), strict=True))


@pytest.mark.parametrize(
    "asked", ["fetch('http://127.0.0.1:9/font.woff2')", "new Image().src = 'http://[::1]:9/a.gif'"]
)
def test_a_request_to_another_host_fails_the_test(servers, watched, asked):
    with pytest.raises(AssertionError, match=":9/"), watched() as start:
        page = start(servers.service)
        with contextlib.suppress(Error), page.expect_event("requestfailed"):
            page.evaluate(f"() => {{ {asked}; }}")
