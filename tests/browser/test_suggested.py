"""A collection of unrelated pictures and a few planted copies: "Mark as suggested" marks these and nothing else."""

import hashlib
import io

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image
from playwright.sync_api import expect

from export.artifact import ModelCard, Preprocessing, encoder_id, save_bundle
from serving.client import Client

pytestmark = pytest.mark.browser

PICTURES, EXACT, NEAR = 100, 4, 4


def make_pooling_bundle(folder) -> None:
    """An encoder whose embedding is the picture at 8 x 8 pixels, less a middle grey: unrelated pictures are far."""
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 32, 32, 3])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 192])
    grey = helper.make_tensor("grey", TensorProto.FLOAT, [], [127.5])
    nodes = [
        helper.make_node("Cast", ["pixels"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["float", "grey"], ["less"]),
        helper.make_node("Transpose", ["less"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["planes"], ["small"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Flatten", ["small"], ["embedding"]),
    ]
    graph = helper.make_graph(nodes, "pooling", [pixels], [embedding], initializer=[grey])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    content, preprocessing = model.SerializeToString(), Preprocessing(32)
    digest = hashlib.sha256(content).hexdigest()
    card = ModelCard(encoder_id("pooling", digest, preprocessing), "pooling", 192, preprocessing, digest)
    save_bundle(folder, content, card)


def file_of(picture: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture
def planted(tmp_path, threads, wait_until):
    """Address of a service with copies of the first pictures: exact ones, then near ones."""
    make_pooling_bundle(tmp_path / "encoder")
    numbers = np.random.default_rng(0)
    pictures = [
        Image.fromarray(numbers.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((96, 96), Image.Resampling.BICUBIC)
        for _ in range(PICTURES)
    ]
    files = {f"picture{i}": file_of(picture, "PNG") for i, picture in enumerate(pictures)}
    for i in range(EXACT):
        files[f"exact{i}"] = file_of(pictures[i], "PNG", compress_level=1)
    for i in range(EXACT, EXACT + NEAR):
        files[f"near{i}"] = file_of(pictures[i].resize((80, 80)), "JPEG", quality=70)
    url = threads.service(tmp_path / "encoder", tmp_path / "index")
    with Client(url) as client:
        client.put_items(list(files.values()), [{"id": name, "name": name} for name in files])
    compared = f"{url}/collections/pictures/duplicates"
    httpx.post(compared).raise_for_status()
    wait_until(lambda: httpx.get(compared).json()["state"] == "done", "nothing is compared")
    return url


def marked(page) -> set[str]:
    return set(page.locator('#duplicates .copy[aria-pressed="true"]').evaluate_all("all => all.map(c => c.dataset.id)"))


def test_only_planted_copies_are_marked(planted, open_page):
    page = open_page(planted)
    page.get_by_role("tab", name="Duplicates").click()
    page.click("#duplicates [data-do=suggested]")
    expect(page.locator(".marked")).to_have_text(f"{EXACT + NEAR} pictures marked")
    pairs = [{f"picture{i}", f"{'exact' if i < EXACT else 'near'}{i}"} for i in range(EXACT + NEAR)]
    assert [len(pair & marked(page)) for pair in pairs] == [1] * len(pairs)
    page.click("#duplicates [data-do=clear]")
    page.click("#duplicates [data-do=exact]")
    expect(page.locator(".marked")).to_have_text(f"{EXACT} pictures marked")
    assert [len(pair & marked(page)) for pair in pairs] == [1] * EXACT + [0] * NEAR


def test_groups_on_the_map_are_named_by_a_picture(planted, open_page, wait_until):
    placed = f"{planted}/collections/pictures/map"
    wait_until(lambda: httpx.post(placed).is_success, "no map is begun")
    wait_until(lambda: httpx.get(placed).json()["state"] == "done", "no map is made")
    page = open_page(planted)
    page.get_by_role("tab", name="Map").click()
    expect(page.locator(".map-legend button").first).to_contain_text("Group 1")
    page.wait_for_function("[...document.querySelectorAll('.map-legend img')].every((image) => image.naturalWidth)")
    assert page.locator(".map-legend img").count() == page.locator(".map-legend button").count() > 1
