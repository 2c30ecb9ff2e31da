"""The process that supervises the workers, in real services."""

import os
import signal
import socket
import tempfile
from pathlib import Path

import httpx
import pytest

from tests.conftest import PATIENCE_S

LISTENING = "0A"  # of Linux


def listening(pid: int) -> list[str]:
    """Addresses of the TCP sockets at which a process listens, as Linux writes them."""
    own = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            own.add(os.readlink(descriptor))
        except OSError:  # has just been closed
            continue
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()
    ]
    return [line[1] for line in lines if line[3] == LISTENING and f"socket:[{line[9]}]" in own]


def private(environment: Path) -> list[Path]:
    return sorted(environment.glob("twinview-*"))


@pytest.fixture
def temporary():
    """A folder of a short path: the names of sockets have at most 107 characters, so for a long one /tmp is used."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.slow
def test_the_supervisor_listens_at_the_services_port_only(launch, temporary):
    running = launch(environment={"TMPDIR": str(temporary)})
    assert [int(address.rpartition(":")[2], 16) for address in listening(running.process.pid)] == [running.port]
    (folder,) = [folder for folder in private(temporary) if (folder / "endpoint").is_socket()]
    assert folder.stat().st_mode & 0o777 == 0o700
    (worker,) = running.workers()
    assert b"MALLOC_MMAP_THRESHOLD_=131072" in Path(f"/proc/{worker}/environ").read_bytes().split(b"\0")
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(PATIENCE_S) == 0
    assert not folder.exists()


@pytest.mark.slow
def test_a_worker_ends_after_its_supervisor(launch, wait_until):
    running = launch()
    (worker,) = running.workers()
    running.process.kill()
    running.process.wait()
    wait_until(lambda: not Path(f"/proc/{worker}").exists(), "the worker goes on without its supervisor")
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", running.port))


@pytest.mark.slow
def test_two_services_of_one_bentoml_home_keep_their_own_metrics(launch):
    first = launch()
    for _ in range(3):
        httpx.get(f"{first.address}/v1/models")
    launch()
    counted = 'twinview_requests_total{route="/v1/models",status="200"} 3.0'
    assert counted in httpx.get(f"{first.address}/metrics").text
