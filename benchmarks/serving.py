"""Speed of the service relative to a bare loop on the same cores, and the cost of a request.

    python benchmarks/serving.py [--quick]
    python benchmarks/serving.py --soak 20      memory and refused requests at twice the capacity

`bare` decodes, resizes and runs ONNX Runtime on batches of 32 in one process, in the faster of two arrangements: two
loops with all cores for each batch, one decoding while the other's batch runs; or one loop per core. `twinview` is
`bentoml serve` with its defaults, and at 32 px also with one worker per core (docs/deploying.md). The clients are a
process of their own (load.py) with as many connections as fill two batches. All contenders alternate, paused outside
their turns, and a ratio is the median of the rounds' ratios.

Ratios compare images per second, so that the clients' work, which other machines would do in a real network, counts
against the service. `clients` is their share of all cores. `by CPU` is the ratio without it: CPU time per image
in the bare loop over that in the service; `cpu_ms_a_request` is the difference of the two. Latencies are measured at
80 % of the capacity, with even gaps between requests as load tools use them; in the table also with random gaps
(Poisson).

The encoder is an untrained ResNet-18: at 224 px on JPEG files of 500 x 375; at 32 px on files of 32 x 32 with the same
first layer, so that the network takes less time than the framework, and once with the first layer for small images
(`cifar`). Answers are .npy; those of other servers are JSON, and `over_NAME` compares them with Twinview's JSON
answers. serving_peers.py describes these servers. LitServe and infinity are included if --peers names an environment
with them.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import contextlib
import dataclasses
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import httpx
import numpy as np
import tyro

from benchmarks.load import Turn, generate, memory_mib, post
from benchmarks.result import ROOT, publish
from benchmarks.serving_peers import PEERS, Model
from serving.limits import cores
from serving.protocol.pack import MEDIA_TYPE, pack

BATCH = 32
PICTURES = 2 * BATCH  # different pictures, sent in turn
START_S = 120
JPEG, NPY, JSON = "image/jpeg", "application/x-npy", "application/json"
MANY, WORKERS = "twinview, a worker a core", f"services.twinview.workers={cores()}"
BENTOML = [sys.executable, "-m", "bentoml", "serve", "--port", "PORT"]


@dataclass(frozen=True)
class Options:
    quick: bool = False
    """One short round with one worker, without `cifar` and without other servers."""
    soak: float | None = None
    """Instead of everything else: run for this many minutes at twice the capacity, at 32 px."""
    peers: Path = Path(sys.executable)
    """Python executable of the environment with LitServe and infinity."""


@dataclass(frozen=True)
class Case:
    name: str
    size_px: int
    stem_px: int
    picture: tuple[int, int]  # width, height
    seconds: float  # per turn
    packs: bool = False
    peers: bool = True
    rounds: int = 5
    gaps: tuple[str, ...] = ("even", "Poisson")

    def quick(self) -> "Case":
        return dataclasses.replace(self, seconds=self.seconds / 5, rounds=1, gaps=("even",))


CASES = (
    Case("224", 224, 224, (500, 375), seconds=6),
    Case("32", 32, 224, (32, 32), seconds=4, packs=True),
    Case("32_cifar", 32, 32, (32, 32), seconds=4, peers=False),
)


@dataclass
class Contender:
    service: str
    request: str
    measure: Callable[..., Turn]  # takes seconds, and for a service also rate and gaps
    turns: list[Turn] = field(default_factory=list)

    def median(self, name: str) -> float:
        return median(getattr(turn, name) for turn in self.turns)

    def over(self, other: "Contender", name: str = "images_per_s") -> float:
        return median(getattr(a, name) / getattr(b, name) for a, b in zip(self.turns, other.turns, strict=True))

    def row(self, alone: "Contender") -> dict:
        facts = {"service": self.service, "request": self.request, "images/s": self.median("images_per_s")}
        facts |= {"over bare": self.over(alone), "CPU ms": self.median("cpu_ms")}
        facts |= {"by CPU": alone.over(self, "cpu_ms")}
        return facts if self is alone else facts | {"clients": self.median("generator")}


def main(options: Options) -> None:
    spawn = get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, spawn) as clients,
        ProcessPoolExecutor(1, spawn) as worker,
    ):
        if options.soak is not None:
            publish("serving_soak", *soak(options.soak, Path(folder), clients))
            return
        cases = [case.quick() for case in CASES[:2]] if options.quick else CASES
        folders = [Path(folder) / case.name for case in cases]
        with ProcessPoolExecutor(len(cases), spawn) as makers:
            pictures = list(makers.map(prepare, cases, folders))
        servers: list[list[Server]] = []
        try:
            for case, place in zip(cases, folders, strict=True):
                servers.append(start(case, options, place))
            for server in itertools.chain(*servers):
                server.wait()
            rows, figures = [], {}
            for case, folder, own, running in zip(cases, folders, pictures, servers, strict=True):
                more_rows, more_figures = compare(case, folder, own, running, clients, worker)
                rows += more_rows
                figures |= more_figures
        finally:
            stop(itertools.chain(*servers))
    publish("serving", rows, figures)


def start(case: Case, options: Options, folder: Path) -> list["Server"]:
    """Start Twinview, for small requests also with one worker per core, and the other servers that are installed."""
    servers = [Server("twinview", BENTOML, folder, "/readyz")]
    if options.quick:
        return servers
    if case.packs:
        servers.append(Server(MANY, BENTOML, folder, "/readyz", {"BENTOML_CONFIG_OPTIONS": WORKERS}))
    for name, peer in PEERS.items() if case.peers else ():
        python = sys.executable if name == "bentoml" else str(options.peers)
        if has(python, peer.module):
            servers.append(Server(name, [python, *peer.command], folder, peer.ready))
        else:
            print(f"{name} is left out: not installed in {python} (benchmarks/serving_peers.txt)")
    return servers


def has(python: str, module: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code]).returncode == 0


def compare(
    case: Case,
    folder: Path,
    pictures: list[bytes],
    servers: list["Server"],
    clients: Executor,
    worker: Executor,
) -> tuple[list, dict]:
    """Rows and figures of one case."""

    def contender(server: Server, request: str, requests: list[bytes], images: int = 1) -> Contender:
        return Contender(server.name, request, partial(server.turn, clients, requests, images))

    alone = fastest_loop(folder, pictures, case.seconds / 2, worker)
    twinview, *others = servers
    many = []
    if others and others[0].name == MANY:
        many = [contender(others.pop(0), "raw, .npy", [post("/embed", JPEG, picture, NPY) for picture in pictures])]
    raw = contender(twinview, "raw, .npy", [post("/embed", JPEG, picture, NPY) for picture in pictures])
    in_json = contender(twinview, "raw, JSON", [post("/embed", JPEG, picture, JSON) for picture in pictures])
    packs = [(pictures[i:] + pictures[:i])[:BATCH] for i in range(0, PICTURES, 8)]
    packed = contender(
        twinview, f"packs of {BATCH}, .npy", [post("/embed", MEDIA_TYPE, pack(files), NPY) for files in packs], BATCH
    )
    peers = []
    for server in others:
        peer = PEERS[server.name]
        peers.append(contender(server, peer.request, [post(*peer.ask(picture), JSON) for picture in pictures]))
    contenders = [alone, raw, *many] + [packed] * case.packs + [in_json] * bool(peers) + peers
    for i, entrant in itertools.product(range(case.rounds), contenders):
        turn = entrant.measure(case.seconds)
        entrant.turns.append(turn)
        name = f"{entrant.service}, {entrant.request}"
        print(f"{case.name}, round {i + 1}: {name}: {turn.images_per_s:.0f} images/s", flush=True)
    rows = [{"px": case.name, **contender.row(alone)} for contender in contenders]
    figures = {f"served_over_bare_{case.name}": raw.over(alone)}
    for entrant in many:
        figures[f"served_over_bare_{case.name}_workers"] = entrant.over(alone)
        figures[f"cpu_ms_a_request_{case.name}_workers"] = entrant.median("cpu_ms") - alone.median("cpu_ms")
    if case.packs:
        figures[f"served_over_bare_{case.name}_packed"] = packed.over(alone)
    figures[f"served_over_bare_{case.name}_by_cpu"] = alone.over(raw, "cpu_ms")
    figures[f"cpu_ms_a_request_{case.name}"] = raw.median("cpu_ms") - alone.median("cpu_ms")
    figures |= {f"over_{peer.service}_{case.name}": in_json.over(peer) for peer in peers}
    for gaps in case.gaps:
        turn = raw.measure(case.rounds / 2 * case.seconds, 0.8 * raw.median("images_per_s"), gaps)
        p50, p99 = 1e3 * np.percentile(turn.latencies_s, (50, 99))
        row = {"px": case.name, "service": raw.service, "request": f"{raw.request}; 80 %, {gaps} gaps"}
        rows.append(row | {"images/s": turn.images_per_s, "p50 ms": p50, "p99 ms": p99})
        if gaps == "even":
            figures |= {f"p50_ms_{case.name}": p50, f"p99_ms_{case.name}": p99}
    return rows, figures


def prepare(case: Case, folder: Path) -> list[bytes]:
    """Write a bundle with an untrained encoder, using the project's export; returns JPEG files."""
    from benchmarks.photograph import jpeg
    from export.artifact import save_bundle
    from export.to_onnx import make_card, to_graph
    from training.config import PRESETS
    from training.encoders import ResNetEncoder

    encoder = ResNetEncoder("resnet18", 1, case.stem_px)
    settings = dataclasses.replace(PRESETS["imagenet"][1], encoder="resnet18", size_px=case.size_px)
    graph = to_graph(encoder, case.size_px)
    facts = {"data": "none", "images": 0, "commit": ""}
    save_bundle(folder / "encoder", graph, make_card(graph, settings, encoder.dimension, facts, "", 0.0, "none"))
    return [jpeg(i, *case.picture) for i in range(PICTURES)]


def fastest_loop(folder: Path, pictures: list[bytes], seconds: float, worker: Executor) -> Contender:
    """The faster of the two arrangements of the bare loop."""
    loops_tried = []
    for name, loops, threads in (("two loops", 2, cores()), ("a loop a core", cores(), 1)):
        run = partial(worker.submit, bare, folder / "encoder", pictures, loops, threads)
        loops_tried.append(Contender("bare", name, lambda s, run=run: run(s).result()))
    return max(loops_tried, key=lambda contender: contender.measure(seconds).images_per_s)


def bare(bundle: Path, pictures: list[bytes], loops: int, threads: int, seconds: float) -> Turn:
    """Decode and encode in this process. threads: of one run of the encoder"""
    model = Model(bundle, threads)
    batches = [pictures[i : i + BATCH] for i in range(0, PICTURES, BATCH)]
    with ThreadPoolExecutor(cores()) as decoders, ThreadPoolExecutor(loops) as loopers:
        read = map if threads == 1 else decoders.map

        def loop(_: int) -> tuple[int, float]:
            """Images and seconds."""
            images, started = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - started) < seconds:
                model(list(read(model.read, batches[images // BATCH % len(batches)])))
                images += BATCH
            return images, elapsed

        model([model.read(picture) for picture in batches[0]])  # the first run allocates memory
        cpu = time.process_time()
        done = list(loopers.map(loop, range(loops)))
        cpu = time.process_time() - cpu
    return Turn(sum(n / s for n, s in done), 1e3 * cpu / sum(n for n, _ in done))


def soak(minutes: float, folder: Path, clients: Executor) -> tuple[list, dict]:
    """Rows, each for a tenth of the time, and figures."""
    pictures = prepare(CASES[1], folder)
    server = Server("twinview", BENTOML, folder, "/readyz")
    try:
        server.wait()
        ask = partial(server.turn, clients, [post("/embed", JPEG, picture, NPY) for picture in pictures], 1)
        before = ask(10.0).images_per_s
        with ThreadPoolExecutor(1) as waiting:
            overload = waiting.submit(ask, 60 * minutes, 2 * before)
            memory = []
            while not overload.done():
                memory.append(memory_mib(server.process.pid))
                time.sleep(1)
        turn = overload.result()
        after = ask(10.0).images_per_s
    finally:
        stop([server])
    print(f"answers by status (0: connection lost): {dict(turn.statuses)}")
    tenths = [float(part.mean()) for part in np.array_split(memory, 10)]
    rows = [{"minute": minutes * (i + 1) / 10, "memory MiB": mib} for i, mib in enumerate(tenths)]
    refused, answered, total = turn.statuses[429], turn.statuses[200], turn.statuses.total()
    return rows, {
        "soak_memory_growth_mib": tenths[-1] - tenths[1],  # in the first tenth the queue fills
        "soak_share_429": refused / total,
        "soak_share_lost": 1 - (refused + answered) / total,
        "soak_over_capacity": turn.images_per_s / before,
        "soak_after_over_before": after / before,
    }


class Server:
    """A service that runs on a free port."""

    def __init__(
        self, name: str, command: list[str], folder: Path, ready: str, more: dict[str, str] | None = None
    ) -> None:
        """
        folder  contains the bundle; the service writes here
        ready   path that answers 200 when the service is ready
        more    environment variables
        """
        self.name = name
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.ready, self.log = f"http://127.0.0.1:{self.port}{ready}", folder / f"{name}.log"
        environment = os.environ | {
            "TWINVIEW_ENCODER": str(folder / "encoder"),
            "TWINVIEW_INDEX": str(folder / "index"),
            "BENTOML_HOME": str(folder / "bentoml"),
            "BENTOML_DO_NOT_TRACK": "True",
            "DO_NOT_TRACK": "1",
            **(more or {}),
        }
        command = [part.replace("PORT", str(self.port)) for part in command]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.ready).status_code == 200:
                    return self.pause()
            time.sleep(0.2)
        sys.exit(f"error: {self.name} did not start:\n{self.log.read_text()[-2000:]}")

    def turn(
        self,
        clients: Executor,
        requests: list[bytes],
        images: int,
        seconds: float,
        rate: float | None = None,
        gaps: str = "even",
    ) -> Turn:
        """Measure like `generate`. Between turns a service is paused, since some are busy even without requests."""
        connections = max(4, 2 * BATCH // images)
        os.killpg(self.process.pid, signal.SIGCONT)
        load = (self.port, self.process.pid, requests, images, connections, seconds, rate, gaps)
        try:
            turn = clients.submit(generate, *load).result()
        except RuntimeError as error:
            sys.exit(f"error: {self.name}: {error}")
        self.pause()
        return turn

    def pause(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)


def stop(servers: Iterable[Server]) -> None:
    servers = list(servers)
    for server in servers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGCONT)
            server.process.terminate()
    for server in servers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(20)
        with contextlib.suppress(ProcessLookupError):  # child processes that are still running
            os.killpg(server.process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
