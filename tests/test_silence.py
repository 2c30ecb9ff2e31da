"""No command and no service connects to anyone but this machine, or collects what could be sent later."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from export.silence import SETTINGS
from tests.conftest import PATIENCE_S

ROOT = Path(__file__).parents[1]
LOOPBACK = re.compile(
    r'inet_addr\("127\.|sin_addr=inet_addr\("0\.0\.0\.0"\)|inet_pton\(AF_INET6, "(::1|::ffff:127\.[\d.]+)"'
)


@pytest.fixture
def way_out() -> tuple[int, list[bytes]]:
    """The port of a proxy, and the first bytes of every connection to it. It lets nothing out."""
    asked: list[bytes] = []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def refuse() -> None:
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(5)
                    if first := connection.recv(200):
                        asked.append(first)
                    else:
                        return

        thread = threading.Thread(target=refuse)
        thread.start()
        yield listener.getsockname()[1], asked
        with socket.create_connection(listener.getsockname()):
            pass  # sends nothing, which ends the thread
        thread.join()


@pytest.fixture
def outside(way_out, tmp_path) -> Callable[[], list]:
    """outside() -> what was asked of others so far."""

    def found() -> list:
        connections = [
            line
            for log in tmp_path.glob("*.strace")
            for line in log.read_text(errors="replace").splitlines()
            if "AF_INET" in line and not LOOPBACK.search(line)
        ]
        return [*way_out[1], *connections]

    return found


@pytest.fixture
def environment(way_out, tmp_path) -> dict[str, str]:
    """A user's, with a proxy as the only way out, and none of the variables that turn reports off."""
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), f"http://127.0.0.1:{way_out[0]}")
    (tmp_path / "home").mkdir()
    return {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT),
        "TWINVIEW_ENCODER": str(tmp_path / "runs" / "ours" / "encoder"),
        "CUDA_VISIBLE_DEVICES": "",
        "TWINVIEW_INDEX": str(tmp_path / "index"),
        **proxies,
        **{name.upper(): url for name, url in proxies.items()},
    }


@pytest.fixture
def watched(tmp_path) -> Callable[..., list[str]]:
    """watched(command) -> the command under strace, which also sees connections that go past the proxy; without
    strace, the command itself."""
    traces = shutil.which("strace") and subprocess.run(["strace", "-o", "/dev/null", "true"])
    options = ["-f", "--seccomp-bpf", "-qq", "-e", "trace=connect,sendto,sendmsg,sendmmsg"]

    def wrap(*command: str) -> list[str]:
        log = tmp_path / f"{len(list(tmp_path.glob('*.strace')))}.strace"
        return ["strace", *options, "-o", str(log), *command] if traces and not traces.returncode else list(command)

    return wrap


def pictures(folder: Path, count: int = 24) -> Path:
    for i in range(count):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((40, 40), Image.Resampling.NEAREST).save(folder / "ab"[i % 2] / f"{i}.png")
    return folder


@pytest.mark.slow
def test_no_command_and_no_service_asks_anyone_else(tmp_path, environment, watched, outside, wait_until):
    data = str(pictures(tmp_path / "pictures"))
    small = ("--data", data, "--epochs", "1")

    def run(*command: str) -> None:
        done = subprocess.run(
            watched(*command),
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, (command, done.stdout)
        assert outside() == [], command

    def script(name: str, *options: str) -> None:
        run(sys.executable, str(ROOT / name), *options)

    def twinview(*options: str) -> None:
        run(sys.executable, "-c", "from serving.cli.main import main; main()", *options)

    script("training/pretrain.py", *small, "--name", "ours", "--batch-size", "8", "--size-px", "32")
    script("export/to_onnx.py", "runs/ours")
    script("export/quantize.py", "runs/ours/encoder", "--data", data, "--limit", "20")
    script("training/evaluate.py", "runs/ours", "--data", data)
    script("training/finetune.py", "--init", "runs/ours", *small)
    script("training/distil.py", "--teacher", "runs/ours", "--encoder", "tiny", *small, "--size-px", "32")
    script("serving/bulk.py", "--data", data)
    twinview("index", "list")
    twinview("index", "search", f"{data}/a/0.png")
    twinview("index", "export", "all.parquet")
    twinview("index", "import", "all.parquet", "--collection", "again", "--pictures", data)
    twinview("index", "copy", "index", "copy")
    twinview("index", "verify")
    twinview("duplicates", "--threshold", "0.5")
    twinview("index", "reembed", "--encoder", "runs/ours/encoder-int8")

    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    service, page = (f"http://127.0.0.1:{port}" for port in ports)
    commands = (
        (sys.executable, "-m", "bentoml", "serve", "--port", str(ports[0])),
        (sys.executable, "ui/app.py", "--service", service, "--port", str(ports[1])),
    )
    servers = []
    for i, command in enumerate(commands):
        with open(tmp_path / f"{i}.log", "wb") as log:
            options = {"cwd": ROOT, "env": environment, "stdout": log, "stderr": log, "start_new_session": True}
            servers.append(subprocess.Popen(watched(*command), **options))
    with httpx.Client(trust_env=False, timeout=PATIENCE_S) as http:

        def answers(url: str) -> bool:
            try:
                return http.get(url).is_success
            except httpx.TransportError:
                return False

        try:
            for url in (f"{service}/readyz", f"{page}/ui/", f"{service}/ui/"):
                wait_until(lambda url=url: answers(url), f"{url} does not answer; see {tmp_path}")
            item = http.get(f"{service}/collections/pictures/items").json()["items"][0]
            assert answers(f"{page}/collections/pictures/items/{item['id']}/original"), "past the proxy, to the service"
            twinview("embed", data, "--service", service, "-o", "vectors.npy")
        finally:
            for server in servers:
                os.killpg(server.pid, signal.SIGTERM)  # strace passes nothing on
            for server in servers:
                server.wait(PATIENCE_S)
    assert outside() == []
    kept = {path.relative_to(tmp_path / "home").as_posix() for path in (tmp_path / "home").rglob("*") if path.is_file()}
    assert {path for path in kept if not path.startswith((".cache/matplotlib/", "bentoml/"))} == set()


def test_reports_are_turned_off_before_any_library_is_imported():
    libraries = ("bentoml", "gradio", "huggingface_hub", "onnxruntime", "pytorch_lightning", "ray", "timm", "torch")
    code = f"import sys, os, PACKAGE; print([name for name in {libraries} if name in sys.modules], os.environ)"
    for package in ("export", "serving", "training", "ui"):
        command = [sys.executable, "-c", code.replace("PACKAGE", package)]
        shown = subprocess.run(
            command, cwd=ROOT, env={"GRADIO_ANALYTICS_ENABLED": "True"}, capture_output=True, text=True
        )
        assert shown.stdout.startswith("[] "), shown
        assert all(f"'{name}': '{value}'" in shown.stdout for name, value in SETTINGS.items())
