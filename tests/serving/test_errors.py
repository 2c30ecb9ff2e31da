"""Every way to be refused, and the one shape of it."""

import io

import pytest
from PIL import Image

from serving.limits import Limits

SMALL = Limits(body_bytes=200_000, images=3, pixels=100 * 100, images_at_once=8)
PNG = "a.png"


@pytest.fixture
def refused(serve, picture):
    """refused(status, method, path, **options) -> the error, its shape checked."""
    http = serve(limits=SMALL)

    def ask(status: int, method: str, path: str, **options) -> dict:
        answer = http.request(method, path, **options)
        assert answer.status_code == status, answer.text
        return shape(answer)

    return ask


def shape(answer) -> dict:
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert isinstance(error["message"], str) and error["message"]
    assert error["type"].endswith("_error")
    assert error["code"].replace("_", "").isalpha()
    assert error["param"] is None or isinstance(error["param"], str)
    for internal in ("UploadFile", "Traceback", "Value error", "serving/"):
        assert internal not in error["message"]
    return error


def test_every_refusal_has_the_one_shape_and_names_what_was_given(refused, picture):
    good = (PNG, picture(1))
    garbled = {"content": b"garbled", "headers": {"content-type": "multipart/form-data; boundary=x"}}
    truncated = picture(1, format="JPEG", size=(90, 90))[:-200]
    json_body = {"headers": {"content-type": "application/json"}}

    # 400
    assert refused(400, "POST", "/embed")["param"] == "images"
    assert refused(400, "POST", "/embed", data={"images": "text"})["message"] == "images[0]: must be a file"
    refused(400, "POST", "/embed", **garbled)
    refused(400, "POST", "/embed", content=b"x", headers={"content-type": "multipart/form-data"})
    assert refused(400, "POST", "/embed?normalize=perhaps", files={"images": good})["param"] == "normalize"
    assert "one of image, vector and id" in refused(400, "POST", "/search")["message"]
    assert "one of" in refused(400, "POST", "/search", json={"vector": [1.0] * 48, "id": "a"})["message"]
    assert "one of" in refused(400, "POST", "/search", files={"image": good}, data={"id": "a"})["message"]
    assert refused(400, "POST", "/search", json={"vector": [1, 2]})["message"].startswith("vector has 2 numbers")
    assert refused(400, "POST", "/search", json={"vector": [0] * 48})["param"] == "vector"
    assert refused(400, "POST", "/search", json={"vector": ["a"]})["param"] == "vector[0]"
    assert refused(400, "POST", "/search", content='{"vector": [NaN]}', **json_body)["param"] == "vector[0]"
    assert refused(400, "POST", "/search", data={"vector": "[1,"})["param"] == "vector"
    refused(400, "POST", "/search", content=b"{", **json_body)
    refused(400, "POST", "/search", content=b"\xff", **json_body)
    refused(400, "POST", "/search", **garbled)
    assert refused(400, "POST", "/search", json={"vektor": [1]})["param"] == "vektor"
    for k in (0, 1001, "many"):
        assert refused(400, "POST", "/search", files={"image": good}, data={"k": k})["param"] == "k"
    assert refused(400, "GET", "/items?limit=0")["param"] == "limit"
    assert refused(400, "GET", "/items?offset=-1")["param"] == "offset"
    assert refused(400, "POST", "/views")["param"] == "image"
    assert refused(400, "POST", "/views", files={"image": good}, data={"pairs": 17})["param"] == "pairs"
    assert refused(400, "POST", "/views", files={"image": good}, data={"seed": -1})["param"] == "seed"

    # 404, 405
    assert "/nothing" in refused(404, "GET", "/nothing")["message"]
    refused(404, "GET", "/docs/assets/nothing")
    assert "0123" in refused(404, "GET", "/items/0123/thumbnail")["message"]
    refused(404, "GET", "/items/..%2f..%2fsecret/thumbnail")
    assert "0123" in refused(404, "POST", "/search", json={"id": "0123"})["message"]
    refused(404, "POST", "/search", json={"id": "' or ''='"})
    assert "GET" in refused(405, "GET", "/embed")["message"]
    assert refused(405, "POST", "/readyz")["code"] == "method_not_allowed"

    # 413
    assert "4 images" in refused(413, "POST", "/embed", files=[("images", good)] * 4)["message"]
    assert "MiB" in refused(413, "POST", "/embed", files={"images": (PNG, b"x" * 200_000)})["message"]
    refused(413, "POST", "/search", files={"image": (PNG, b"x" * 200_000)})
    chunks = (b"x" * 50_000 for _ in range(5))  # of no announced length
    refused(413, "POST", "/search", content=chunks, headers={"content-type": "application/json"})
    large = refused(413, "POST", "/embed", files=[("images", good), ("images", ("wide.png", blank(101, 100)))])
    assert large["param"] == "images[1]"
    assert large["message"].startswith("images[1] (wide.png) has 101 x 100 pixels")

    # 422
    for path, field in (("/embed", "images"), ("/search", "image"), ("/views", "image")):
        item = "images[0]" if path == "/embed" else field
        for name, data in (("cat.txt", b"hello"), ("empty.png", b""), ("cut.jpg", truncated), ("a.svg", b"<svg/>")):
            error = refused(422, "POST", path, files={field: (name, data)})
            assert error["message"].startswith(f"{item} ({name}) is ")
            assert error["param"] == item

    # 429
    error = refused(429, "POST", "/views", files={"image": good}, data={"pairs": 5})
    assert (error["type"], error["code"]) == ("rate_limit_error", "busy")


def blank(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_fault_of_the_service_says_so_and_nothing_of_its_insides(http, picture, monkeypatch):
    def fail(*_):
        raise RuntimeError("/home/secret")

    monkeypatch.setattr(http.app.state.engine, "_batch", fail)
    answer = http.post("/embed", files={"images": (PNG, picture(1))})
    assert answer.status_code == 500
    assert shape(answer)["code"] == "internal_error"
    assert "secret" not in answer.text


def test_without_an_encoder_the_service_stays_up_and_says_how_to_make_one(serve, tmp_path, picture, no_store):
    http = serve(encoder=tmp_path / "nowhere")
    assert http.get("/livez").status_code == 200
    assert http.get("/v1/models").json() == {"data": []}
    image = {"files": {"image": (PNG, picture(1))}}
    asked = [
        http.get("/readyz"),
        http.get("/items"),
        http.get("/items/0123/thumbnail"),
        http.post("/embed", files={"images": (PNG, picture(1))}),
        http.post("/search", **image),
        http.post("/views", **image),
    ]
    for answer in asked:
        assert answer.status_code == 503
        message = shape(answer)["message"]
        assert str(tmp_path / "nowhere") in message
        assert "python training/pretrain.py" in message and "python export/to_onnx.py" in message
        assert "start the service again" in message
