"""`bentoml serve` as a user starts it, over a real socket."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from serving.client import Client

ROOT = Path(__file__).parents[2]
START_S, STOP_S = 90, 10


@pytest.fixture
def served(bundle, fill, tmp_path):
    """(address, process, log file) of a service over 5 pictures."""
    fill(5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "log"
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "BENTOML_HOME": str(tmp_path / "bentoml"),
        "__BENTOML_DEBUG_USAGE": "True",  # writes its reports into the log instead of sending them
        "TWINVIEW_ENCODER": str(bundle.folder),
        "TWINVIEW_INDEX": str(tmp_path / "index"),
    }
    command = [sys.executable, "-m", "bentoml", "serve", "--port", str(port)]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and process.poll() is None:
            try:
                httpx.get(f"{address}/livez")
                break
            except httpx.TransportError:
                time.sleep(0.2)
        yield address, process, log
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_bentoml_serves_until_it_is_told_to_stop(served, bundle, picture):
    address, process, log = served
    assert httpx.get(f"{address}/livez").json() == {"status": "alive"}
    assert httpx.get(f"{address}/readyz").json() == {"status": "ready", "model": bundle.card.id}
    with Client(address) as client:
        assert client.embed([picture(0), picture(1)]).vectors.shape == (2, 48)
        assert client.search(picture(2), k=1).results[0].name == "a/2.png"
        assert client.items().count == 5
    assert 'route="/search",status="200"} 1.0' in httpx.get(f"{address}/metrics").text

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
        next(beats)  # neither an open page nor an upload that stalls may hold up the end
        head = ("POST /search HTTP/1.1", "Host: a", "Content-Type: application/json", "Content-Length: 9", "", "{")
        upload.sendall("\r\n".join(head).encode())
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_S + 10) == 0
    told = log.read_text()
    assert "serving " + bundle.card.id in told
    assert f"listening on {address}" in told
    assert "Traceback" not in told
    assert "Tracking" not in told
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/livez")
