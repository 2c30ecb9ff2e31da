"""A service started as by a user, and clients that use it meanwhile."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import httpx

from tests.conftest import PATIENCE_S

ROOT = Path(__file__).parents[2]


@dataclass
class Running:
    address: str
    process: subprocess.Popen
    log: Path

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def answers(self, path: str = "/livez") -> bool:
        try:
            return httpx.get(f"{self.address}{path}", timeout=10, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def tree(self) -> list[int]:
        """Process ids of the service and its descendants."""
        ids = [self.process.pid]
        for id in ids:
            try:
                for task in Path(f"/proc/{id}/task").iterdir():
                    ids += map(int, (task / "children").read_text().split())
            except OSError:  # it has just ended
                continue
        return ids

    def cpu_s(self) -> float:
        """Processor time that all its processes have used, those that have ended included, in seconds."""
        while True:  # a process that ends meanwhile would count twice, or not at all
            tree = self.tree()
            seconds = sum(_cpu_s(id, with_ended=True) for id in tree)
            if self.tree() == tree:
                return seconds

    def worker_cpu_s(self) -> float:
        """Processor time that BentoML's workers have used themselves, in seconds."""
        return sum(_cpu_s(id) for id in self.workers())

    def workers(self) -> list[int]:
        """Process ids of BentoML's workers, which answer requests."""
        return [id for id in self.tree() if b"--worker-id" in _command(id)]

    def memory_mib(self) -> float:
        """Memory of all its processes, shared pages counted once."""
        kib = 0
        for id in self.tree():
            try:
                lines = Path(f"/proc/{id}/smaps_rollup").read_text().splitlines()
            except OSError:
                continue
            kib += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return kib / 1024


def _cpu_s(id: int, with_ended: bool = False) -> float:
    """Processor time of a process in seconds; with that of its children that have ended, if asked."""
    try:
        fields = Path(f"/proc/{id}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended
        return 0.0
    return sum(map(int, fields[11 : 15 if with_ended else 13])) / os.sysconf("SC_CLK_TCK")


def _command(id: int) -> bytes:
    try:
        return Path(f"/proc/{id}/cmdline").read_bytes()
    except OSError:  # it has just ended
        return b""


def start(
    folder: Path,
    encoder: Path | str,
    bento: Path | str = "",
    cwd: Path = ROOT,
    environment: dict | None = None,
    program: Sequence[str | Path] = (sys.executable, "-m", "bentoml", "serve"),
) -> Running:
    """Start a service whose files are in a folder; return before it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(folder),
        "BENTOML_HOME": str(folder / "bentoml"),
        "__BENTOML_DEBUG_USAGE": "True",  # writes its reports into the log instead of sending them
        "TWINVIEW_ENCODER": str(encoder),
        "TWINVIEW_INDEX": str(folder / "index"),
        **(environment or {}),
    }
    command = [*program, *filter(None, [str(bento)]), "--port", str(port)]
    log = folder / f"log-{port}"
    with open(log, "wb") as file:
        process = subprocess.Popen(command, cwd=cwd, env=variables, stdout=file, stderr=file)
    return Running(f"http://127.0.0.1:{port}", process, log)


class Answer(NamedTuple):
    client: int
    call: int
    response: httpx.Response
    seconds: float


class Load:
    """Clients that ask until they are stopped, at least once, each on its own connection."""

    def __init__(self, address: str, asks: Sequence[Callable[[httpx.Client, int], httpx.Response]]):
        """asks  of each client; gets a client of the address and the number of the call"""
        self.answers: list[Answer] = []
        self.failures: list[Exception] = []
        self._address, self._stop = address, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=one) for one in enumerate(asks)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, count: int, wait_until: Callable) -> None:
        """Wait for this many more answers."""
        wanted = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= wanted, f"fewer than {count} more requests were answered")

    def slowest(self, client: int) -> float:
        return max(answer.seconds for answer in self.answers if answer.client == client)

    def _run(self, client: int, ask: Callable[[httpx.Client, int], httpx.Response]) -> None:
        call = 0
        with httpx.Client(base_url=self._address, timeout=PATIENCE_S, trust_env=False) as http:
            while call == 0 or not self._stop.is_set():
                started = time.monotonic()
                try:
                    self.answers.append(Answer(client, call, ask(http, call), time.monotonic() - started))
                except httpx.TransportError as error:
                    self.failures.append(error)
                    time.sleep(0.1)
                call += 1
