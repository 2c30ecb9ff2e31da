"""Fixtures with a tiny hand-made encoder, so that these tests need no torch: an embedding is 4 x 4 mean colours."""

import asyncio
import hashlib
import io
import logging
import os
import signal
import socket
import sys
import threading
import uuid
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import httpx
import numpy as np
import onnx
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from onnx import TensorProto, helper
from PIL import Image

from export.artifact import (
    MAX_PIXELS,
    Bundle,
    ModelCard,
    Preprocessing,
    UnreadableImage,
    encoder_id,
    probe_pixels,
    probe_values,
    read_pixels,
    save_bundle,
)
from serving.access import Access
from serving.app import create_app
from serving.cli import main
from serving.client import AsyncClient, Client
from serving.collection.index import Index, Item, content_id
from serving.connection import Connection
from serving.inference import decode, reading
from serving.inference.encoder import CPU, OnnxEncoder
from serving.inference.lane import BatchResult, Part, run_batch
from serving.limits import DEFAULT_LIMITS, Limits
from tests.serving import running as running_module
from tests.serving.running import Running

SIZE_PX = 32
DIMENSION = 48


def _make_bundle(folder, scale: float = 1 / 255) -> Bundle:
    """embedding = scale * the means over 8 x 8 pixels, (N, 3 * 4 * 4). Another scale gives another encoder id."""
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", SIZE_PX, SIZE_PX, 3])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", DIMENSION])
    nodes = [
        helper.make_node("Cast", ["pixels"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["planes"], ["means"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Flatten", ["means"], ["embedding"]),
    ]
    constants = [helper.make_tensor("scale", TensorProto.FLOAT, [], [scale])]
    graph = helper.make_graph(nodes, "means", [pixels], [embedding], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    content = model.SerializeToString()
    digest, preprocessing = hashlib.sha256(content).hexdigest(), Preprocessing(SIZE_PX)
    card = ModelCard(
        encoder_id("means", digest, preprocessing),
        "means",
        DIMENSION,
        preprocessing,
        digest,
        probe=probe_values(_means(probe_pixels(SIZE_PX), scale)[0]),
    )
    return save_bundle(folder, content, card)


def _means(pixels: np.ndarray, scale: float = 1 / 255) -> np.ndarray:
    """The bundle's embeddings, computed by numpy in float64: (n, 32, 32, 3) -> (n, 48)."""
    parts = pixels.astype(np.float64).reshape(-1, 4, 8, 4, 8, 3) * scale
    return parts.mean(axis=(2, 4)).transpose(0, 3, 1, 2).reshape(-1, DIMENSION)


def _picture(seed: int, size: tuple[int, int] = (40, 30), format: str = "PNG") -> bytes:
    """An image file of large coloured squares, different for every seed."""
    squares = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(squares).resize(size, Image.Resampling.NEAREST).save(buffer, format)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def make_bundle():
    return _make_bundle


@pytest.fixture(scope="session")
def means():
    return _means


@pytest.fixture(scope="session")
def picture():
    return _picture


@pytest.fixture(scope="session")
def bundle(tmp_path_factory) -> Bundle:
    return _make_bundle(tmp_path_factory.mktemp("runs") / "means" / "encoder")


class InThread:
    """A lane in a thread instead of a process, which would take a second to start."""

    provider, gpu_problem = CPU, None

    def __init__(self, bundle: Bundle, max_work: int):
        self.encode = OnnxEncoder(bundle, 1).rows
        self.preprocessing, self.max_work = bundle.card.preprocessing, max_work

    async def __call__(self, parts: list[Part]) -> BatchResult:
        def read(data: bytes) -> np.ndarray:
            return read_pixels(data, self.preprocessing, max_work=self.max_work)

        return await asyncio.to_thread(lambda: run_batch(parts, lambda pixels: self.encode(pixels), read))

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """An app collects garbage when it has loaded: with all that tests import that takes a quarter of a second."""
    monkeypatch.setattr("serving.app.gc", Mock())


@pytest.fixture(autouse=True)
def nothing_by_itself(monkeypatch):
    """Apps in this process make no map and no duplicates by themselves."""
    monkeypatch.setattr("serving.derived.automatic.LOOK_S", 1e6)


class DecodesInThread:
    """Decodes in the thread that calls it, instead of in a process."""

    def __init__(self, lane: decode.DecodingLane):
        self.lane = lane

    def __call__(self, read, files, preprocessing, max_pixels=MAX_PIXELS, max_work=None) -> list:
        results, kind = [], reading.READS[read]
        for data in files:
            try:
                got = reading.read_file(kind, data, preprocessing, max_pixels, max_work or self.lane.max_work)
            except UnreadableImage as error:
                results.append(reading.FileProblem(error))
            else:
                pieces, numbers, work = got
                results.append(reading.Done(kind.restore(pieces, numbers, preprocessing), work))
        return results

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def lanes_in_threads(monkeypatch):
    """Apps in this process have lanes in threads. Services started by `launch` have processes, as for a user."""
    monkeypatch.setattr(decode, "DecodingProcess", DecodesInThread)

    def lanes(bundle: Bundle, cores: int, max_work: int, gpu_required: bool) -> list[InThread]:
        return [InThread(bundle, max_work) for _ in range(cores)]

    monkeypatch.setattr("serving.inference.served.open_lanes", lanes)


@pytest.fixture
def serve(bundle, tmp_path):
    """serve(limits=..., index=..., encoder=..., access=...) -> a TestClient of a started app."""
    opened = []

    def start(
        encoder=bundle.folder, index=tmp_path / "index", limits: Limits = DEFAULT_LIMITS, access: Access | None = None
    ) -> TestClient:
        client = TestClient(
            create_app(str(encoder), index, limits, access), "http://127.0.0.1", raise_server_exceptions=False
        )
        client.__enter__()
        opened.append(client)
        return client

    yield start
    for client in opened:
        client.__exit__(None, None, None)


@pytest.fixture
def http(serve) -> TestClient:
    return serve()


class Awaited:
    """Wraps AsyncClient's methods as blocking calls, so that one test covers both clients."""

    def __init__(self, app):
        self.app = app

    def __getattr__(self, name):
        async def call(*arguments, **options):
            async with AsyncClient("http://127.0.0.1", transport=httpx.ASGITransport(self.app)) as client:
                return await getattr(client, name)(*arguments, **options)

        return lambda *arguments, **options: asyncio.run(call(*arguments, **options))


@pytest.fixture(params=["sync", "async"])
def connect(request):
    """connect(http) -> a Client or AsyncClient of an app in this process."""

    def relay(http):
        def answer(sent: httpx.Request) -> httpx.Response:
            got = http.request(sent.method, str(sent.url), content=sent.read(), headers=dict(sent.headers))
            return httpx.Response(got.status_code, headers=dict(got.headers), content=got.content)

        return httpx.MockTransport(answer)

    def make(http):
        return Client("http://127.0.0.1", transport=relay(http)) if request.param == "sync" else Awaited(http.app)

    return make


@pytest.fixture
def listen(bundle, tmp_path, wait_until):
    """listen(host=..., access=...) -> (port, app) of a started app that listens on a real socket."""
    running = []

    def start(
        host: str = "127.0.0.1", limits: Limits = DEFAULT_LIMITS, access: Access | None = None
    ) -> tuple[int, FastAPI]:
        app = create_app(str(bundle.folder), tmp_path / "index", limits, access)
        listener = socket.socket()
        listener.bind((host, 0))
        http = partial(Connection, answer=app.state.answer_early)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", http=http))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        running.append((server, thread, listener))
        wait_until(lambda: server.started or not thread.is_alive(), "the app has not started")
        assert server.started, "the app's thread has ended"
        return listener.getsockname()[1], app

    yield start
    for server, thread, listener in running:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture
def no_store(monkeypatch):
    """Makes BentoML's model store empty."""
    monkeypatch.setattr("serving.inference.encoder._in_store", lambda tag: None)


@pytest.fixture
def fill(bundle, tmp_path):
    """fill(n) -> the n items it has added to the index of `serve`, item i with the vector of picture(i)."""

    def put(n: int, folder=tmp_path / "index") -> list[Item]:
        index, encode = Index(folder, bundle.card.id, DIMENSION), OnnxEncoder(bundle)
        files = [_picture(i) for i in range(n)]
        items = [
            Item(content_id(data), f"{'ab'[i % 2]}/{i}.png", "ab"[i % 2], f"/pictures/{i}.png", 40, 30, len(data))
            for i, data in enumerate(files)
        ]
        pixels = np.stack([read_pixels(data, bundle.card.preprocessing) for data in files])
        index.upsert(items, encode(pixels), {item.id: data for item, data in zip(items, files, strict=True)})
        return items

    return put


@pytest.fixture
def twinview(monkeypatch):
    """twinview(argument, ...) runs the command as a shell does."""

    def call(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", ["twinview", *map(str, arguments)])
        monkeypatch.setattr("serving.bulk.lower_priority", lambda: None)  # would slow down the tests after this one
        main.main()

    return call


@pytest.fixture(scope="session")
def object_store():
    """URL of an S3 server in this process."""
    from moto.server import ThreadedMotoServer  # the import takes seconds

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs a line per request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(object_store, monkeypatch) -> str:
    """s3://bucket/prefix of a new bucket, with the environment variables that give access to it."""
    for name, value in {
        "AWS_ENDPOINT_URL": object_store,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "TWINVIEW_CONSISTENCY_S": "0",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{uuid.uuid4().hex}"
    httpx.put(f"{object_store}/{bucket}").raise_for_status()
    return f"s3://{bucket}/index"


@pytest.fixture
def launch(bundle, tmp_path, wait_until):
    """launch(encoder, ...) as running.start -> a Running service that answers, or whose process has ended; killed after
    the test."""
    launched = []

    def start(encoder: Path | str = bundle.folder, *arguments, **options) -> Running:
        running = running_module.start(tmp_path, encoder, *arguments, **options)
        launched.append(running)
        ended = running.process.poll
        wait_until(lambda: ended() is not None or running.answers(), "the service does not answer")
        return running

    yield start
    for running in launched:
        orphans = running.workers() if running.process.poll() is None else []
        running.process.kill()
        running.process.wait()
        for orphan in orphans:
            os.kill(orphan, signal.SIGKILL)
