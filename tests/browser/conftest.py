"""A real Chromium on the real service: `bentoml serve` over a collection of coloured pictures."""

import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from export.artifact import ModelCard, Preprocessing, encoder_id, save_bundle

ROOT = Path(__file__).resolve().parents[2]
READY_S = 120
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
COLOURS = {"red": (220, 30, 30), "orange": (230, 130, 20), "green": (30, 200, 40), "blue": (30, 40, 220)}
HOSTILE = "<img src=x onerror=alert(1)>${document.title=1}{{x}}`'&.png"  # a file name like any other


def striped(colour: tuple[int, int, int], size: tuple[int, int] = (48, 36)) -> Image.Image:
    """`colour`, darker in every other pair of columns, so that a crop, a blur and a flip can be seen."""
    pixels = np.full((size[1], size[0], 3), colour, np.uint8)
    pixels[:, np.arange(size[0]) % 4 < 2] //= 2
    pixels[: size[1] // 2, : size[0] // 2] //= 2
    return Image.fromarray(pixels)


def make_bundle(folder: Path) -> None:
    """An encoder whose embedding is the picture's mean colour: what is nearest can be told without running it."""
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 32, 32, 3])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 3])
    nodes = [
        helper.make_node("Cast", ["pixels"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float"], ["embedding"], axes=[1, 2], keepdims=0),
    ]
    graph = helper.make_graph(nodes, "colour", [pixels], [embedding])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    content, preprocessing = model.SerializeToString(), Preprocessing(32)
    digest = hashlib.sha256(content).hexdigest()
    save_bundle(
        folder, content, ModelCard(encoder_id("colour", digest, preprocessing), "colour", 3, preprocessing, digest)
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def running(command: list[str], ready_url: str, environment: dict[str, str], log: Path):
    """Run a server until the block ends. raises with its output when it is not ready in time."""
    with open(log, "w") as output:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + READY_S
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(ready_url).is_success:
                    break
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)} is not ready:\n{log.read_text()}")
            time.sleep(0.2)
        yield
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@dataclass(frozen=True)
class Service:
    url: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def service(tmp_path_factory, browser):
    """A service over 13 pictures: three of each colour, labelled with it, and one of a hostile name."""
    folder = tmp_path_factory.mktemp("service")
    make_bundle(folder / "encoder")
    for label, colour in COLOURS.items():
        (folder / "pictures" / label).mkdir(parents=True)
        for i in range(3):
            striped(colour, (48 + 4 * i, 36)).save(folder / "pictures" / label / f"{i}.png")
    striped((10, 200, 210)).save(folder / "pictures" / "green" / HOSTILE)
    environment = os.environ | {
        "TWINVIEW_ENCODER": str(folder / "encoder"),
        "TWINVIEW_INDEX": str(folder / "index"),
        "BENTOML_HOME": str(folder / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "True",
    }
    fill = [sys.executable, "serving/bulk.py", "--data", str(folder / "pictures")]
    subprocess.run(fill, cwd=ROOT, env=environment, check=True, capture_output=True)
    url = f"http://127.0.0.1:{free_port()}"
    serve = [sys.executable, "-m", "bentoml", "serve", "--port", url.rpartition(":")[2]]
    with running(serve, f"{url}/readyz", environment, folder / "service.log"):
        yield Service(url, environment)


@pytest.fixture(scope="module")
def browser():
    """Of a module, not the session: while it lives its thread has a running loop, and asyncio.run would refuse."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if chromium is None:
        pytest.skip(f"no Chromium is installed: none of {', '.join(CHROMIUM)} is on the path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """open_page(url, **context) -> the page, ready. Afterwards it must have asked nobody but `url`, without errors."""
    contexts, asked, failures = [], {}, []

    def start(url: str, **context):
        contexts.append(browser.new_context(**context))
        page = contexts[-1].new_page()
        page.set_default_timeout(30_000)
        page.on("request", lambda request: asked.setdefault(request.url, url))
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.goto(f"{url}/ui/")
        page.wait_for_selector("#grid .tile, #grid .notice")
        return page

    yield start
    for context in contexts:
        context.close()
    foreign = [what for what, url in asked.items() if not what.startswith((f"{url}/", "data:", "blob:"))]
    assert foreign == []
    assert failures == []


@pytest.fixture
def alone(service, tmp_path):
    """alone(service_url) -> the address of `python ui/app.py` for it."""
    with contextlib.ExitStack() as servers:

        def start(service_url: str) -> str:
            port = str(free_port())
            command = [sys.executable, "ui/app.py", "--service", service_url, "--port", port]
            url = f"http://127.0.0.1:{port}"
            servers.enter_context(running(command, f"{url}/ui/", service.environment, tmp_path / "page.log"))
            return url

        yield start


@pytest.fixture
def page(service, open_page):
    return open_page(service.url, viewport={"width": 1400, "height": 900})


@pytest.fixture
def reddish(tmp_path) -> Path:
    """A picture that is not of the collection; the reds are nearest, then the oranges."""
    striped((200, 45, 40)).save(tmp_path / "mine.png")
    return tmp_path / "mine.png"
