"""The page of a service that wants a key: the browser's own dialogue opens it, and everything in it."""

import asyncio
import socket
import threading

import pytest
import uvicorn
from playwright.sync_api import Error

from serving.access import Access
from serving.app import create_app
from ui.app import mount

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore:.future.no_silent_downcasting"),  # Gradio's, of pandas
]


@pytest.fixture
def locked(servers, wait_until):
    """Address of such a service, over the same pictures."""

    async def make():
        app = create_app(str(servers.folder / "encoder"), servers.folder / "index", access=Access.from_keys("secret"))
        return mount(app)

    made = []
    thread = threading.Thread(target=lambda: made.append(asyncio.run(make())))  # Playwright's loop runs in this one
    thread.start()
    thread.join()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(made[0], log_level="warning", timeout_graceful_shutdown=1))
    running = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    running.start()
    wait_until(lambda: server.started, "the service does not start")
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    running.join()
    listener.close()


def test_with_the_key_as_password_the_page_works_and_shows_every_picture(locked, open_page, reddish):
    page = open_page(locked, http_credentials={"username": "anybody", "password": "secret"})
    assert page.locator("#grid .tile").count() == 13
    page.wait_for_function("[...document.querySelectorAll('#grid img')].every(image => image.naturalWidth > 0)")
    page.set_input_files("#well input", reddish)
    page.wait_for_selector("#grid .score")
    page.get_by_role("tab", name="Views").click()
    page.wait_for_selector("#pairs .pair")


def test_without_it_the_browser_asks_for_one_and_shows_nothing(locked, browser):
    page = browser.new_page()
    with pytest.raises(Error, match="ERR_INVALID_AUTH_CREDENTIALS"):  # its dialogue, without anybody to fill it in
        page.goto(f"{locked}/ui/")
    assert page.locator("#grid").count() == 0
    page.close()
