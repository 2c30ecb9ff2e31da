"""`bentoml serve` as a user starts it, over a real socket."""

import importlib.metadata
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from serving.client import Client
from serving.limits import cores

ROOT = Path(__file__).parents[2]
STOP_S = 10
WITHOUT_CHECKOUT = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
"""


@pytest.mark.slow
def test_bentoml_serves_until_it_is_stopped(launch, fill, bundle, picture):
    fill(5)
    running = launch()
    address, process, log = running.address, running.process, running.log
    assert httpx.get(f"{address}/livez").json() == {"status": "alive"}
    ready = httpx.get(f"{address}/readyz").json()
    assert (ready["status"], ready["model"], ready["providers"]) == ("ready", bundle.card.id, ["CPUExecutionProvider"])
    with Client(address) as client:
        assert client.embed([picture(0), picture(1)]).vectors.shape == (2, 48)
        assert client.search(picture(2), k=1).results[0].name == "a/2.png"
        assert client.items().count == 5
    assert 'route="/collections/{name}/search",status="200"} 1.0' in httpx.get(f"{address}/metrics").text

    for path in ("/nothing", "/healthz", "/docs.json"):  # BentoML's own routes among them
        assert httpx.get(f"{address}{path}").json()["error"]["code"] == "not_found"
    large = httpx.post(f"{address}/embed", files={"images": ("large.png", b"x" * (65 * 2**20))})
    assert large.status_code == 413
    assert httpx.get(address).headers["location"] == "/ui/"
    assert "gradio" in httpx.get(f"{address}/ui/").text

    host, port = address.removeprefix("http://").split(":")
    with (
        httpx.stream("GET", f"{address}/ui/gradio_api/heartbeat/test", timeout=30) as page,
        socket.create_connection((host, int(port))) as upload,
    ):
        beats = page.iter_raw()
        next(beats)  # neither an open page nor a stalled upload may delay the end
        head = (
            "POST /collections/pictures/search HTTP/1.1",
            "Host: a",
            "Content-Type: application/json",
            "Content-Length: 9",
            "Expect: 100-continue",
            "",
            "{",
        )
        upload.sendall("\r\n".join(head).encode())
        assert upload.recv(100).startswith(b"HTTP/1.1 100 Continue")  # the service is reading the body
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    text = log.read_text()
    assert "serving " + bundle.card.id in text
    assert f"listening on {address}" in text
    assert "Traceback" not in text
    assert "Tracking" not in text
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/livez")


@pytest.mark.slow
def test_workers_share_the_cores(launch, bundle, picture, wait_until):
    running = launch(environment={"BENTOML_CONFIG_OPTIONS": "services.twinview.workers=2"})
    assert len(running.workers()) == 2
    wait_until(lambda: running.log.read_text().count(f"loaded {bundle.card.id}") == 2, "two workers have not loaded it")
    share = max(1, cores() // 2)
    assert re.findall(r"loaded .* batches at once: (\d+)", running.log.read_text()) == [str(share)] * 2
    with Client(running.address) as client:
        assert client.embed([picture(0)]).vectors.shape == (1, 48)


@pytest.fixture
def bento(tmp_path) -> Path:
    """Folder of the built bento. Versions of requirements are not locked, because that needs the network."""
    config = yaml.safe_load((ROOT / "bentofile.yaml").read_text())
    config["python"]["lock_packages"] = False
    file = tmp_path / "bentofile.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "bentoml", "build", "--bentofile", file, "--output", "tag", ROOT]
    environment = {"BENTOML_HOME": str(tmp_path / "bentoml"), "HOME": str(tmp_path), "BENTOML_DO_NOT_TRACK": "True"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = (tmp_path / "bentoml" / "bentos" / "twinview").glob("*/")
    return built


@pytest.mark.slow
def test_a_built_bento_serves_where_there_is_no_checkout(launch, bento, fill, bundle, picture, tmp_path):
    fill(5)
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text(WITHOUT_CHECKOUT)
    shutil.copytree(bundle.folder, bento / "src" / "runs" / "means" / "encoder")  # as bentofile.yaml may include it
    running = launch("", bento, tmp_path / "hidden", {"PYTHONPATH": str(tmp_path / "hidden")})
    with Client(running.address) as client:
        assert client.embed([picture(0), picture(1)]).model == bundle.card.id
        assert client.search(picture(2), k=1).results[0].name == "a/2.png"
    assert "gradio" in httpx.get(f"{running.address}/ui/").text
    views = httpx.post(f"{running.address}/views", files={"image": ("a.png", picture(0))}, timeout=60)
    assert views.json()["error"]["code"] == "not_offered"  # training/ is not part of the bento

    folders = {file.relative_to(bento / "src").parts[0] for file in (bento / "src").rglob("*.py")}
    assert folders == {"export", "serving", "ui"}
    for file in (bento / "src").rglob("*.py"):
        if file.parent.name != "views":  # whose files import it on the first request
            assert "from training" not in file.read_text(), file


def named(requirement: str) -> str:
    """Name of the required distribution; empty for an option of pip."""
    name = re.match(r"\w[\w.-]*", requirement)
    return re.sub(r"[-_.]+", "-", name.group()).lower() if name else ""


@pytest.mark.slow
def test_the_image_of_a_bento_holds_what_serving_needs_and_nothing_of_torch(bento):
    docker = (bento / "env" / "docker" / "Dockerfile").read_text()
    assert "USER bentoml" in docker and "EXPOSE 3000" in docker
    assert "env/python/requirements.txt" in docker
    wanted = (bento / "env" / "python" / "requirements.txt").read_text().splitlines()
    names = {named(line) for line in wanted} - {""}
    assert {"bentoml", "onnxruntime", "lancedb", "gradio", "orjson", "uvloop"} <= names
    needed = set()
    while names:  # and their requirements, as installed here
        name = names.pop()
        needed.add(name)
        try:
            requirements = importlib.metadata.requires(name) or ()
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in requirements:
            if "extra ==" not in requirement:
                names |= {named(requirement)} - needed
    assert len(needed) > 50
    assert not needed & {"torch", "torchvision", "pytorch-lightning", "triton"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("TWINVIEW_API_KEYS_FILE", "nowhere", "TWINVIEW_API_KEYS_FILE: nowhere cannot be read"),
        ("TWINVIEW_LOG", "xml", "TWINVIEW_LOG is json or text, not 'xml'"),
    ],
)
def test_an_unusable_environment_variable_ends_the_start_with_a_message(name, value, sentence):
    command = [sys.executable, "-m", "bentoml", "serve"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, name: value}, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"error: {sentence}" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.slow
def test_several_workers_share_their_metrics_and_leave_the_page_out(launch, picture, wait_until):
    running = launch(environment={"BENTOML_CONFIG_OPTIONS": "services.twinview.workers=2"})
    embedding = 'twinview_requests_total{route="/embed",status="200"}'
    for i in range(1, 21):  # each on its own connection, so that either worker may answer
        answer = httpx.post(f"{running.address}/embed", content=picture(i), headers={"Content-Type": "image/png"})
        assert answer.status_code == 200
        counted = f"{embedding} {i}.0"  # after the last byte of the answer, so perhaps after the client has it
        wait_until(lambda: counted in httpx.get(f"{running.address}/metrics").text, f"{counted} is not there")  # noqa: B023
    assert "\ntwinview_images_at_once 0.0\n" in httpx.get(f"{running.address}/metrics").text
    assert len(running.workers()) == 2
    assert httpx.get(f"{running.address}/ui/").status_code == 404
    assert "the page is left out, because it works with one worker only" in running.log.read_text()


@pytest.mark.slow
def test_requests_are_traced_if_bentomls_configuration_enables_it(bundle, tmp_path):
    """In its own process, because importing the service reads the environment, and OpenTelemetry keeps its provider."""
    code = """
import asyncio
from bentoml._internal.configuration.containers import BentoMLContainer
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient
from serving import service
assert service.traced(service.app) is service.app
spans, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(spans))
BentoMLContainer.tracing.sample_rate.set(1.0)
BentoMLContainer.tracer_provider.set(provider)
with TestClient(service.traced(service.app), base_url="http://localhost", client=("127.0.0.1", 1)) as http:
    assert http.get("/livez").status_code == 200
print({span.attributes.get("http.target") for span in spans.get_finished_spans()})
"""
    environment = os.environ | {"TWINVIEW_ENCODER": str(bundle.folder), "BENTOML_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "/livez" in done.stdout
