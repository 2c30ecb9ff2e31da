"""`bentoml serve` as a user starts it, over a real socket."""

import ast
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
from tests.conftest import PATIENCE_S

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
    early = httpx.get(address, headers={"X": "x" * 2**16})  # refused before the app is called
    assert early.status_code == 431 and early.headers["X-Request-Id"]
    assert httpx.get(address).headers["location"] == "/ui/"
    assert "gradio" in httpx.get(f"{address}/ui/").text

    host, port = address.removeprefix("http://").split(":")
    with (
        httpx.stream("GET", f"{address}/ui/gradio_api/heartbeat/test", timeout=PATIENCE_S) as page,
        socket.create_connection((host, int(port))) as upload,
    ):
        beats = page.iter_raw()
        next(beats)  # neither an open page nor a stalled upload may delay the end
        head = (
            "POST /collections/pictures/search HTTP/1.1",
            "Host: localhost",
            "Content-Type: application/json",
            "Content-Length: 9",
            "Expect: 100-continue",
            "",
            "{",
        )
        upload.sendall("\r\n".join(head).encode())
        assert upload.recv(100).startswith(b"HTTP/1.1 100 Continue")  # the service is reading the body
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
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
    views = httpx.post(f"{running.address}/views", files={"image": ("a.png", picture(0))})
    assert views.json()["error"]["code"] == "not_offered"  # training/ is not part of the bento

    folders = {file.relative_to(bento / "src").parts[0] for file in (bento / "src").rglob("*.py")}
    assert folders == {"export", "serving", "training", "ui"}


@pytest.mark.slow
def test_the_image_of_a_bento_has_the_command_twinview(bento, bundle, picture, tmp_path):
    """`bentoml containerize` runs the script in the environment of the image, before the sources are copied."""
    docker = (bento / "env" / "docker" / "Dockerfile").read_text()
    (script,) = (file for file in (bento / "env" / "docker").iterdir() if f"&& ./env/docker/{file.name}" in docker)
    (tmp_path / "bin").mkdir()
    subprocess.run(["sh", script], env={"BENTO_PATH": str(bento), "VIRTUAL_ENV": str(tmp_path)}, check=True)
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.defpath}", "HOME": str(tmp_path)}
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(picture(i))

    def twinview(*words: object) -> str:
        command = [tmp_path / "bin" / "twinview", *map(str, words), "--index", str(tmp_path / "index")]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    added = twinview("index", "add", "--data", tmp_path / "pictures", "--encoder", bundle.folder)
    assert "indexed 3, already there 0, skipped 0" in added
    assert "3 pictures" in twinview("duplicates")


# Modules that are imported where they are used, and are not in a bento: what needs them then says so.
NOT_IN_A_BENTO = {
    "torch",
    "torchvision",
    "pillow_heif",
    "ray",
    "scipy",
    "opentelemetry",
    "pandas",
    "fiftyone",
    "datasets",
}


@pytest.mark.slow
def test_a_bento_names_the_package_of_every_import(bento):
    """Of all that its files import: their own files, and packages of its requirements."""
    requirements = (bento / "env" / "python" / "requirements.txt").read_text().splitlines()
    packages = importlib.metadata.packages_distributions()
    named_there, src = with_their_requirements(requirements), bento / "src"
    missing = set()
    for file in src.rglob("*.py"):
        for module in imported(file):
            top = module.partition(".")[0]
            if top in ("export", "serving", "training", "ui"):
                place = src / module.replace(".", "/")
                is_here = place.is_dir() or place.with_suffix(".py").exists()
                # views are computed by training's code, and answer 501 without it
                is_here |= top == "training" and file.parent.name == "views"
            else:
                distributions = {top, *(named(name) for name in packages.get(top, ()))}  # onnxruntime-gpu has another
                is_here = top in sys.stdlib_module_names | NOT_IN_A_BENTO or distributions & named_there
            if not is_here:
                missing.add((file.relative_to(src).as_posix(), module))
    assert missing == set()


def imported(file: Path) -> set[str]:
    """Names of the modules that a file imports, wherever in it, apart from those for type checkers."""
    found, tree = set(), ast.parse(file.read_text())
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    skipped = {inner for node in typing for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {node.module, *(part for part in parts if (ROOT / f"{part.replace('.', '/')}.py").exists())}
    return found


def with_their_requirements(requirements: list[str]) -> set[str]:
    """Names of these distributions and of all that they require, as installed here."""
    names, needed = {named(line) for line in requirements} - {""}, set()
    while names:
        name = names.pop()
        needed.add(name)
        try:
            further = importlib.metadata.requires(name) or ()
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in further:
            if "extra ==" not in requirement:
                names |= {named(requirement)} - needed
    return needed


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
    assert {"bentoml", "onnxruntime", "lancedb", "gradio", "orjson", "uvloop"} <= {named(line) for line in wanted}
    needed = with_their_requirements(wanted)
    assert len(needed) > 50
    assert not needed & {"torch", "torchvision", "pytorch-lightning", "triton"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("TWINVIEW_API_KEYS_FILE", "nowhere", f"TWINVIEW_API_KEYS_FILE: {ROOT / 'nowhere'} cannot be read"),
        ("TWINVIEW_LOG", "xml", "TWINVIEW_LOG is json or text, not 'xml'"),
        ("TWINVIEW_GPU", "yes", "TWINVIEW_GPU is auto or required, not 'yes'"),
        ("TWINVIEW_ENCODERS", "a", "there is no setting TWINVIEW_ENCODERS; did you mean TWINVIEW_ENCODER?"),
        ("TWINVIEW_CONSISTENCY_S", "abc", "TWINVIEW_CONSISTENCY_S is a number of seconds from 0 to 3600, not 'abc'"),
        ("TWINVIEW_DECODE_S", "0", "TWINVIEW_DECODE_S is a number of seconds from 0.1 to 600, not '0'"),
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
