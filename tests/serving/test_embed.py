import io
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from export.artifact import read_pixels
from serving.limits import Limits


@pytest.fixture
def expected(bundle, picture):
    """The embedding of picture(seed), by numpy."""

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


def test_normalized_embeddings_have_length_one_and_the_same_direction(http, picture, expected):
    answer = http.post("/embed?normalize=true", files={"images": ("a.png", picture(1))}).json()
    np.testing.assert_allclose(answer["embeddings"][0], expected(1) / np.linalg.norm(expected(1)), atol=1e-6)


def test_more_images_than_a_batch_holds_are_embedded_in_order(http, picture, expected):
    files = [("images", (f"{i}.png", picture(i))) for i in range(75)]
    vectors = http.post("/embed", files=files).json()["embeddings"]
    np.testing.assert_allclose(vectors, [expected(i) for i in range(75)], atol=1e-5)


def test_an_image_is_judged_by_its_bytes_not_by_its_name(http, picture):
    file = ("notes.txt", picture(1, format="JPEG"), "text/plain")
    assert http.post("/embed", files={"images": file}).status_code == 200


def test_broken_images_harm_no_request_but_their_own(http, picture, expected):
    """Forty requests at once, every other one with a broken image among good ones."""
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
            message = "images[1] (cat.txt) is not an image of a format this reads"
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


def test_images_beyond_what_fits_in_the_house_are_turned_away_and_the_house_empties_again(serve, picture):
    http = serve(limits=Limits(images_at_once=2))
    files = [("images", (f"{i}.png", picture(i))) for i in range(3)]
    refused = http.post("/embed", files=files)
    assert refused.status_code == 429
    assert refused.headers["Retry-After"] == "1"
    for _ in range(3):
        assert http.post("/embed", files=files[:2]).status_code == 200


def test_embedding_imports_no_torch(bundle, picture, tmp_path):
    """Not even through the libraries: the service without its page, one picture embedded and searched for."""
    (tmp_path / "a.png").write_bytes(picture(1))
    program = """
import sys
from fastapi.testclient import TestClient
from serving.service import app
with TestClient(app) as http:
    files = {"images": open("a.png", "rb")}
    assert http.post("/embed", files=files).status_code == 200
    assert http.post("/search", files={"image": open("a.png", "rb")}).status_code == 200
loaded = {name.partition(".")[0] for name in sys.modules}
print(sorted(loaded & {"torch", "torchvision", "pytorch_lightning", "training", "gradio"}))
"""
    environment = {"TWINVIEW_ENCODER": str(bundle.folder), "PYTHONPATH": sys.path[0]}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr
