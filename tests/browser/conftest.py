"""A real Chromium on the real service, over a collection of coloured pictures."""

import asyncio
import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
import uvicorn
from fastapi import FastAPI
from onnx import TensorProto, helper
from PIL import Image

from export.artifact import ModelCard, Preprocessing, encoder_id, save_bundle
from serving import bulk
from serving.access import Access
from serving.app import create_app
from serving.client import AsyncClient
from tests.conftest import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),  # a camera that shows a clock
]
COLOURS = {"red": (220, 30, 30), "orange": (230, 165, 20), "green": (30, 200, 40), "blue": (30, 40, 220)}
SOON = {  # seconds between looks of the service and of the page
    "serving.derived.automatic": {"LOOK_S": 0.5, "REST_S": 2.0},
    "ui.widgets.computing": {"POLL_S": 0.3, "WAIT_S": 0.5},
}
HOSTILE = "<img src=x onerror=alert(1)>${document.title=1}{{x}}`'&.png"  # a file name like any other


def striped(colour: tuple[int, int, int], size: tuple[int, int] = (48, 36)) -> Image.Image:
    """`colour`, darker in every other pair of columns, so that a crop, a blur and a flip can be seen."""
    pixels = np.full((size[1], size[0], 3), colour, np.uint8)
    pixels[:, np.arange(size[0]) % 4 < 2] //= 2
    pixels[: size[1] // 2, : size[0] // 2] //= 2
    return Image.fromarray(pixels)


def make_bundle(folder: Path, reduce: str = "ReduceMean", name: str = "colour") -> None:
    """An encoder whose embedding is the picture's mean colour, so a test knows which pictures are nearest.

    reduce  ONNX's operator that makes one pixel of all
    """
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 32, 32, 3])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 3])
    nodes = [
        helper.make_node("Cast", ["pixels"], ["float"], to=TensorProto.FLOAT),
        helper.make_node(reduce, ["float"], ["embedding"], axes=[1, 2], keepdims=0),
    ]
    graph = helper.make_graph(nodes, "colour", [pixels], [embedding])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    content, preprocessing = model.SerializeToString(), Preprocessing(32)
    digest = hashlib.sha256(content).hexdigest()
    save_bundle(folder, content, ModelCard(encoder_id(name, digest, preprocessing), name, 3, preprocessing, digest))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str], log: Path):
    """A server, until the block ends. raises when it does not stop by then."""
    with open(log, "w") as output:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        yield
    finally:
        server.terminate()
        try:
            server.wait(PATIENCE_S)
        finally:
            server.kill()
            server.wait()


@pytest.fixture(scope="session")
def answers(wait_until):
    """answers(url, log) waits until the URL answers with success."""

    def is_ready(url: str) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(url).is_success
        return False

    return lambda url, log: wait_until(lambda: is_ready(url), f"{url} is not ready; see {log}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gradio runs in threads of this process, and pandas warns of how it uses it."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning"))


class Threads:
    """Servers in threads of this process, which are ready in a second."""

    def __init__(self, wait_until):
        self.wait_until = wait_until
        self.stop = contextlib.ExitStack()

    def serve(self, make: Callable[[], FastAPI]) -> str:
        """Returns the address of the app. make: called while a loop runs"""
        made = []

        async def call() -> None:
            made.append(make())

        thread = threading.Thread(target=lambda: asyncio.run(call()))  # Playwright's loop runs in this one
        thread.start()
        thread.join()
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(made[0], log_level="warning", loop="asyncio", timeout_graceful_shutdown=PATIENCE_S)
        )
        running = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        running.start()

        def end() -> None:
            server.should_exit = True
            running.join()
            listener.close()

        self.stop.callback(end)
        self.wait_until(lambda: server.started, "the service does not start")
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    def service(self, encoder: Path, index: Path, access: Access | None = None) -> str:
        """Returns the address of a service with its page."""
        from ui.app import mount

        return self.serve(lambda: mount(create_app(str(encoder), index, access=access)))

    def page_of(self, service: str) -> str:
        """Returns the address of the page alone."""
        from ui.app import standalone

        return self.serve(lambda: standalone(AsyncClient(service)))


@pytest.fixture(scope="module")
def threads(wait_until) -> Iterator[Threads]:
    threads = Threads(wait_until)
    with threads.stop:
        yield threads


@dataclass(frozen=True)
class Servers:
    service: str
    """The service, with the page at its /ui."""
    alone: str
    """The page alone, for that service."""
    folder: Path
    """Where its encoder/, index/ and runs/ are."""


@pytest.fixture(scope="module")
def servers(request, tmp_path_factory, browser, answers, threads):
    """Both, over 13 pictures: three of each colour, labelled with it, and one of a hostile name.

    They are threads of this process, unless the module says COMMANDS = True: then `bentoml serve` and
    `python ui/app.py`, which take half a minute.
    """
    folder = tmp_path_factory.mktemp("servers")
    make_bundle(folder / "encoder")
    for label, colour in COLOURS.items():
        (folder / "pictures" / label).mkdir(parents=True)
        for i in range(3):
            striped(colour, (48 + 4 * i, 36)).save(folder / "pictures" / label / f"{i}.png")
    striped((10, 200, 210)).save(folder / "pictures" / "green" / HOSTILE)
    bulk.run(
        bulk.BulkSettings(data=str(folder / "pictures"), encoder=str(folder / "encoder"), index=str(folder / "index"))
    )
    if not getattr(request.module, "COMMANDS", False):
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("TWINVIEW_RUNS", str(folder / "runs"))
            environment.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
            for module, periods in SOON.items():
                for name, seconds in periods.items():
                    environment.setattr(f"{module}.{name}", seconds)
            service = threads.service(folder / "encoder", folder / "index")
            yield Servers(service, threads.page_of(service), folder)
        return
    environment = os.environ | {
        "TWINVIEW_ENCODER": str(folder / "encoder"),
        "TWINVIEW_INDEX": str(folder / "index"),
        "TWINVIEW_RUNS": str(folder / "runs"),
        "BENTOML_HOME": str(folder / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "True",
    }
    ports = [str(free_port()) for _ in range(2)]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    serve = [sys.executable, "-m", "bentoml", "serve", "--port", ports[0]]
    alone = [sys.executable, "ui/app.py", "--service", urls[0], "--port", ports[1]]
    logs = folder / "service.log", folder / "page.log"
    with running(serve, environment, logs[0]), running(alone, environment, logs[1]):
        answers(f"{urls[0]}/readyz", logs[0])
        answers(f"{urls[1]}/ui/", logs[1])
        yield Servers(*urls, folder)
        for url in urls:  # a page that is left open keeps neither from stopping
            page = browser.new_page()
            page.goto(f"{url}/ui/")
            page.wait_for_selector("#grid .tile")


@pytest.fixture(scope="module")
def playwright():
    """Of a module, not the session: while it lives its thread has a running loop, and asyncio.run would refuse."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=1000 * PATIENCE_S)
    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="module")
def chromium() -> dict[str, object]:
    """How Playwright starts it."""
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        give_up = pytest.fail if "TWINVIEW_REQUIRE_BROWSER" in os.environ else pytest.skip
        give_up(f"no Chromium is installed: none of {', '.join(CHROMIUM)} is on the path")
    return {"executable_path": path, "args": FLAGS}


@pytest.fixture(scope="module")
def browser(playwright, chromium):
    with contextlib.closing(playwright.chromium.launch(**chromium)) as browser:
        yield browser


@pytest.fixture(scope="module")
def context(playwright, chromium, tmp_path_factory):
    """Of all pages of a module: it keeps compiled scripts on the disk, which halves the time to open a page."""
    profile = tmp_path_factory.mktemp("profile")
    with contextlib.closing(playwright.chromium.launch_persistent_context(profile, **chromium)) as context:
        context.set_default_timeout(1000 * PATIENCE_S)
        yield context


@pytest.fixture
def locked(servers, threads):
    """Address of a service over the same pictures that wants the key `secret`."""
    return threads.service(servers.folder / "encoder", servers.folder / "index", Access.from_keys("secret"))


@pytest.fixture
def watched(request, context):
    """A block in which start(url, viewport, **settings) -> the page, ready. At its end it must have asked nobody but
    `url`, and have met no error. settings: of a context of its own"""

    @contextlib.contextmanager
    def watch():
        opened, asked, failures = [], {}, []

        def start(url: str, viewport: dict[str, int] | None = None, **settings):
            viewport = viewport or {"width": 1280, "height": 720}
            if settings:
                own = request.getfixturevalue("browser").new_context(viewport=viewport, **settings)
                own.set_default_timeout(1000 * PATIENCE_S)
                opened.append(own)
                page = own.new_page()
            else:
                opened.append(page := context.new_page())
                page.set_viewport_size(viewport)
            page.on("request", lambda request: asked.setdefault(request.url, url))
            page.on("pageerror", lambda error: failures.append(str(error)))
            page.goto(f"{url}/ui/")
            page.wait_for_selector("#grid .tile, #grid .notice")
            return page

        try:
            yield start
        finally:
            for one in opened:
                one.close()
        foreign = [what for what, url in asked.items() if not what.startswith((f"{url}/", "data:", "blob:"))]
        assert foreign == []
        assert failures == []

    return watch


@pytest.fixture
def open_page(watched):
    """open_page(url, **context) -> the page, ready, and watched until the test is over."""
    with watched() as start:
        yield start


@pytest.fixture
def page(servers, open_page):
    return open_page(servers.service, viewport={"width": 1400, "height": 900})


@pytest.fixture
def reddish(tmp_path) -> Path:
    """A picture that is not of the collection; the reds are nearest, then the oranges."""
    striped((200, 45, 40)).save(tmp_path / "mine.png")
    return tmp_path / "mine.png"


# Behind a proxy -------------------------------------------------------------------------------------------------------

CONFIGURATION = """
daemon off;
error_log stderr;
pid {folder}/nginx.pid;
events {{}}
http {{
    access_log off;
    client_max_body_size 64m;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        proxy_http_version 1.1;
        proxy_buffering off;
        proxy_set_header Host $http_host;
        proxy_set_header X-Forwarded-For $remote_addr;
        {headers}
        location /tv/ {{ proxy_pass {service}{rest}; }}
    }}
}}
"""
PROXIES = {
    "takes the path away": ("/", ""),
    "leaves the path": ("", ""),
    "names the host": ("/", "proxy_set_header X-Forwarded-Host $http_host; proxy_set_header X-Forwarded-Proto http;"),
}


@pytest.fixture(scope="module")
def nginx() -> str:
    found = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if found is None:
        give_up = pytest.fail if "TWINVIEW_REQUIRE_BROWSER" in os.environ else pytest.skip
        give_up("nginx is not installed")
    return found


@pytest.fixture(scope="module")
def published(servers: Servers, answers) -> Iterator[str]:
    """A service of its own over the same pictures, published below /tv."""
    environment = os.environ | {
        "TWINVIEW_ENCODER": str(servers.folder / "encoder"),
        "TWINVIEW_INDEX": str(servers.folder / "index"),
        "TWINVIEW_RUNS": str(servers.folder / "runs"),
        "TWINVIEW_PROXY": "yes",
        "TWINVIEW_PUBLIC_PATH": "/tv",
        "BENTOML_HOME": str(servers.folder / "bentoml"),
    }
    port, log = free_port(), servers.folder / "published.log"
    with running([sys.executable, "-m", "bentoml", "serve", "--port", str(port)], environment, log):
        answers(f"http://127.0.0.1:{port}/readyz", log)
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(params=PROXIES)
def proxy(request, nginx: str, published: str, tmp_path: Path, wait_until) -> Iterator[str]:
    rest, headers = PROXIES[request.param]
    port, file = free_port(), tmp_path / "nginx.conf"
    file.write_text(CONFIGURATION.format(folder=tmp_path, port=port, service=published, rest=rest, headers=headers))
    with open(tmp_path / "nginx.log", "w") as log:
        process = subprocess.Popen([nginx, "-p", str(tmp_path), "-c", str(file)], stderr=log)
    address = f"http://127.0.0.1:{port}/tv"
    try:
        wait_until(lambda: _is_up(address), f"nginx is not ready; see {tmp_path / 'nginx.log'}")
        yield address
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def _is_up(address: str) -> bool:
    try:
        return httpx.get(f"{address}/livez").is_success
    except httpx.HTTPError:
        return False
