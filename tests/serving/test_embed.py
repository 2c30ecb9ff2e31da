import base64
import io
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from export.artifact import read_pixels
from serving.limits import Limits
from serving.protocol.pack import pack


@pytest.fixture
def expected(bundle, picture):
    """expected(seed) -> the embedding of picture(seed), computed by numpy."""

    def means(seed: int) -> np.ndarray:
        pixels = read_pixels(picture(seed), bundle.card.preprocessing).astype(np.float64) / 255  # (32, 32, 3)
        return pixels.reshape(4, 8, 4, 8, 3).mean(axis=(1, 3)).transpose(2, 0, 1).ravel()  # (48,)

    return means


def test_embeddings_come_in_the_order_of_the_images(http, bundle, picture, expected):
    answer = http.post("/embed", files=[("images", (f"{i}.png", picture(i))) for i in range(5)]).json()
    assert answer["model"] == bundle.card.id
    assert answer["dimension"] == 48
    np.testing.assert_allclose(answer["embeddings"], [expected(i) for i in range(5)], atol=1e-5)


def test_npy_holds_the_same_numbers_as_json(http, bundle, picture):
    files = [("images", (f"{i}.png", picture(i))) for i in range(3)]
    answer = http.post("/embed", files=files, headers={"Accept": "application/x-npy"})
    vectors = np.load(io.BytesIO(answer.content))
    assert answer.headers["Twinview-Model"] == bundle.card.id
    assert (vectors.shape, vectors.dtype) == ((3, 48), np.float32)
    np.testing.assert_array_equal(vectors, np.float32(http.post("/embed", files=files).json()["embeddings"]))


def packed(*images: bytes) -> dict:
    return {"content": pack(images), "headers": {"Content-Type": "application/x-twinview-pack"}}


def test_a_form_raw_bytes_and_a_pack_give_the_same_vectors(http, picture):
    form = http.post("/embed", files=[("images", (f"{i}.png", picture(i))) for i in range(40)]).json()
    assert http.post("/embed", **packed(*map(picture, range(40)))).json() == form
    for media in ("image/png", "image/jpeg", "IMAGE/PNG; charset=x", "application/octet-stream", None):
        raw = http.post("/embed", content=picture(3), headers={"Content-Type": media} if media else {}).json()
        assert raw["embeddings"] == form["embeddings"][3:4], media


def test_base64_is_little_endian_float32(http, picture):
    numbers = http.post("/embed?normalize=1", **packed(picture(0), picture(1))).json()
    answer = http.post("/embed?encoding_format=base64&normalize=1", **packed(picture(0), picture(1))).json()
    rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in answer.pop("embeddings")]
    np.testing.assert_array_equal(rows, np.float32(numbers.pop("embeddings")))
    assert answer == numbers


def test_an_encoder_can_be_named(serve, make_bundle, bundle, picture, expected, tmp_path):
    other = make_bundle(tmp_path / "other", scale=1 / 128)
    http = serve(encoder=f"{bundle.folder},{other.folder}")
    assert [card["id"] for card in http.get("/v1/models").json()["data"]] == [bundle.card.id, other.card.id]
    for model, name, factor in (
        (None, bundle.card.id, 1),
        ("twinview", bundle.card.id, 1),
        (bundle.card.id, bundle.card.id, 1),
        (other.card.id, other.card.id, 255 / 128),
    ):
        params = {"model": model} if model else {}
        answer = http.post("/embed", content=picture(0), params=params).json()
        assert answer["model"] == name
        np.testing.assert_allclose(answer["embeddings"], [expected(0) * factor], atol=1e-5)
        openai = {"input": base64.b64encode(picture(0)).decode()} | params
        answer = http.post("/v1/embeddings", json=openai).json()
        assert answer["model"] == name
        np.testing.assert_allclose(answer["data"][0]["embedding"], expected(0) * factor, atol=1e-5)


def test_normalized_embeddings_have_length_one_and_the_same_direction(http, picture, expected):
    answer = http.post("/embed?normalize=true", files={"images": ("a.png", picture(1))}).json()
    np.testing.assert_allclose(answer["embeddings"][0], expected(1) / np.linalg.norm(expected(1)), atol=1e-6)


def test_more_images_than_a_batch_holds_are_embedded_in_order(http, picture, expected):
    files = [("images", (f"{i}.png", picture(i))) for i in range(75)]
    vectors = http.post("/embed", files=files).json()["embeddings"]
    np.testing.assert_allclose(vectors, [expected(i) for i in range(75)], atol=1e-5)


def test_an_images_format_is_detected_from_its_bytes_not_its_name(http, picture):
    file = ("notes.txt", picture(1, format="JPEG"), "text/plain")
    assert http.post("/embed", files={"images": file}).status_code == 200


def test_a_broken_image_fails_only_its_own_request(http, picture, expected):
    """Forty concurrent requests, every second one with a broken image among good ones."""
    start = threading.Barrier(8)

    def ask(i: int):
        files = [("images", (f"{i}.png", picture(i)))] * 3
        if i % 2:
            files[1] = ("images", ("cat.txt", b"no picture"))
        if i < 8:
            start.wait()
        return http.post("/embed", files=files)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(40)))
    for i, answer in enumerate(answers):
        if i % 2:
            assert answer.status_code == 422
            message = "images[1] (cat.txt) is not an image in a supported format"
            assert answer.json()["error"]["message"] == message
        else:
            np.testing.assert_allclose(answer.json()["embeddings"], [expected(i)] * 3, atol=1e-5)


def test_metrics_count_requests_by_route_and_images_by_batch(http, picture):
    for _ in range(3):
        http.post("/embed", files={"images": ("a.png", picture(1))})
    for i in range(5):
        http.get(f"/invented/{i}")
    text = http.get("/metrics").text
    assert 'twinview_requests_total{route="/embed",status="200"} 3.0' in text
    assert 'twinview_requests_total{route="other",status="404"} 5.0' in text
    assert "twinview_batch_images_sum 3.0" in text
    assert "invented" not in text


def test_requests_beyond_the_limit_of_images_get_429_and_later_ones_are_answered(serve, picture):
    http = serve(limits=Limits(images_at_once=2))
    files = [("images", (f"{i}.png", picture(i))) for i in range(3)]
    refused = http.post("/embed", files=files)
    assert refused.status_code == 429
    assert refused.headers["Retry-After"] == "1"
    for _ in range(3):
        assert http.post("/embed", files=files[:2]).status_code == 200


def test_embedding_does_not_pass_fastapis_router(http, picture):
    """It would take a fifth of the time of embedding a small image."""
    http.app.router.routes.clear()
    assert http.get("/livez").status_code == 404
    assert http.post("/embed", content=picture(0)).status_code == 200
    assert http.post("/v1/embeddings", json={"input": base64.b64encode(picture(0)).decode()}).status_code == 200


@pytest.mark.slow
def test_embedding_imports_no_torch(bundle, picture, tmp_path):
    """Not even through other libraries: start the service without its page, embed a picture and search for it."""
    (tmp_path / "a.png").write_bytes(picture(1))
    program = """
import sys
from fastapi.testclient import TestClient
from serving.service import app
with TestClient(app, "http://127.0.0.1") as http:
    files = {"images": open("a.png", "rb")}
    assert http.post("/embed", files=files).status_code == 200
    assert http.post("/collections/pictures/search", files={"image": open("a.png", "rb")}).status_code == 404
loaded = {name.partition(".")[0] for name in sys.modules}
print(sorted(loaded & {"torch", "torchvision", "pytorch_lightning", "training", "gradio"}))
"""
    environment = {"TWINVIEW_ENCODER": str(bundle.folder), "PYTHONPATH": sys.path[0]}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr
