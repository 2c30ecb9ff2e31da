"""A tiny encoder made by hand, so that these tests need no torch: the embedding is a picture's 4 x 4 mean colours."""

import hashlib
import io

import numpy as np
import onnx
import pytest
from fastapi.testclient import TestClient
from onnx import TensorProto, helper
from PIL import Image

from export.artifact import Bundle, ModelCard, Preprocessing, encoder_id, read_pixels, save_bundle
from serving.app import create_app
from serving.encoder import Encoder
from serving.index import Index, Item, content_id
from serving.limits import USUAL, Limits

SIZE_PX = 32
DIMENSION = 48


def _make_bundle(folder, scale: float = 1 / 255) -> Bundle:
    """embedding = scale * the means over 8 x 8 pixels, (N, 3 * 4 * 4). Another scale makes another encoder's id."""
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
    card = ModelCard(encoder_id("means", digest, preprocessing), "means", DIMENSION, preprocessing, digest)
    return save_bundle(folder, content, card)


def _picture(seed: int, size: tuple[int, int] = (40, 30), format: str = "PNG") -> bytes:
    """An encoded picture of large coloured squares; another for every seed."""
    squares = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(squares).resize(size, Image.Resampling.NEAREST).save(buffer, format)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def make_bundle():
    return _make_bundle


@pytest.fixture(scope="session")
def picture():
    return _picture


@pytest.fixture(scope="session")
def bundle(tmp_path_factory) -> Bundle:
    return _make_bundle(tmp_path_factory.mktemp("runs") / "means" / "encoder")


@pytest.fixture
def serve(bundle, tmp_path):
    """serve(limits=..., index=..., encoder=...) -> a TestClient of a started app."""
    opened = []

    def start(encoder=bundle.folder, index=tmp_path / "index", limits: Limits = USUAL) -> TestClient:
        client = TestClient(create_app(str(encoder), index, limits), raise_server_exceptions=False)
        client.__enter__()
        opened.append(client)
        return client

    yield start
    for client in opened:
        client.__exit__(None, None, None)


@pytest.fixture
def http(serve) -> TestClient:
    return serve()


@pytest.fixture
def no_store(monkeypatch):
    """BentoML's model store, empty."""
    monkeypatch.setattr("serving.encoder._in_store", lambda tag: None)


@pytest.fixture
def fill(bundle, tmp_path):
    """fill(n) -> the n items it has put into the index of `serve`, item i with the vector of picture(i)."""

    def put(n: int, folder=tmp_path / "index") -> list[Item]:
        index, encode = Index(folder, bundle.card.id, DIMENSION), Encoder(bundle)
        files = [_picture(i) for i in range(n)]
        items = [
            Item(content_id(data), f"{'ab'[i % 2]}/{i}.png", "ab"[i % 2], f"/pictures/{i}.png", 40, 30)
            for i, data in enumerate(files)
        ]
        for item, data in zip(items, files, strict=True):
            index.add_thumbnail(item.id, data)
        index.upsert(items, encode(np.stack([read_pixels(data, bundle.card.preprocessing) for data in files])))
        return items

    return put
