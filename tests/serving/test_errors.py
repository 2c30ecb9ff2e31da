"""Every kind of error, and the shape they share."""

import base64
import io
import shutil
from functools import reduce

import pytest
from PIL import Image

from serving.access import Access
from serving.limits import Limits
from serving.protocol.pack import pack

SMALL = Limits(body_bytes=200_000, images=3, pixels=100 * 100, images_at_once=8)
PNG = "a.png"
ITEMS, SEARCH = "/collections/pictures/items", "/collections/pictures/search"


@pytest.fixture
def refused(serve, picture):
    """refused(status, method, path, **options) -> the error, after checking its shape."""
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
    for internal in (
        "UploadFile",
        "Traceback",
        "Value error",
        "serving/",
        "Input should",
        "String should",
        "instance of",
    ):
        assert internal not in error["message"]
    return error


def test_every_error_has_the_same_shape_and_names_the_item(refused, picture):
    good = (PNG, picture(1))
    garbled = {"content": b"garbled", "headers": {"content-type": "multipart/form-data; boundary=x"}}
    truncated = picture(1, format="JPEG", size=(90, 90))[:-200]
    json_body = {"headers": {"content-type": "application/json"}}

    # 400
    assert refused(400, "POST", "/embed")["param"] == "images"
    text = {"content": b"--x\r\nContent-Disposition: form-data; name=images\r\n\r\ntext\r\n--x--\r\n"}
    text["headers"] = garbled["headers"]
    assert refused(400, "POST", "/embed", **text)["message"] == "images[0]: must be a file"
    assert refused(400, "POST", "/embed", files={"image": good})["message"] == (
        "image: is not a field of this form; did you mean images?"
    )
    for media in ("image/png", "application/octet-stream", "application/x-twinview-pack"):
        assert refused(400, "POST", "/embed", content=b"", headers={"content-type": media})["param"] == "images"
    assert refused(400, "POST", "/embed?encoding_format=int8", content=picture(1))["param"] == "encoding_format"
    cut = {"content": pack([picture(1), picture(2)])[:-1], "headers": {"content-type": "application/x-twinview-pack"}}
    assert refused(400, "POST", "/embed", **cut)["param"] == "images[1]"
    refused(400, "POST", "/embed", **garbled)
    refused(400, "POST", "/embed", content=b"x", headers={"content-type": "multipart/form-data"})
    assert refused(400, "POST", "/embed?normalize=perhaps", files={"images": good})["param"] == "normalize"
    assert "at least one" in refused(400, "POST", SEARCH)["message"]
    vector = {"positive": [[1, 2]]}
    assert refused(400, "POST", SEARCH, json=vector)["message"].startswith("positive[0] has 2 numbers")
    assert refused(400, "POST", SEARCH, json={"positive": [[0] * 48]})["param"] == "positive[0]"
    assert refused(400, "POST", SEARCH, json={"positive": [[1e200] * 48]})["param"] == "positive[0][0]"
    assert refused(400, "GET", f"{ITEMS}?offset={2**32}")["param"] == "offset"
    assert refused(400, "POST", SEARCH, json={"positive": [["a"]]})["param"] == "positive[0][0]"
    assert refused(400, "POST", SEARCH, content='{"positive": [[NaN]]}', **json_body)["param"] == "positive[0][0]"
    assert refused(400, "POST", SEARCH, data={"positive": "[1,"})["param"] == "positive"
    refused(400, "POST", SEARCH, content=b"{", **json_body)
    refused(400, "POST", SEARCH, content=b"\xff", **json_body)
    refused(400, "POST", SEARCH, **garbled)
    assert refused(400, "POST", SEARCH, json={"vektor": [1]})["param"] == "vektor"
    for k in (0, 1001, "many"):
        assert refused(400, "POST", SEARCH, files={"image": good}, data={"k": k})["param"] == "k"
    assert refused(400, "GET", f"{ITEMS}?limit=0")["param"] == "limit"
    assert refused(400, "GET", f"{ITEMS}?offset=-1")["param"] == "offset"
    assert refused(400, "POST", "/views")["param"] == "image"
    assert refused(400, "POST", "/views", files={"image": good}, data={"pairs": 17})["param"] == "pairs"
    assert refused(400, "POST", "/views", files={"image": good}, data={"seed": -1})["param"] == "seed"
    assert refused(400, "POST", "/matrix", data={"count": 1})["param"] == "count"
    assert refused(400, "POST", "/matrix", data={"collection": "../a"})["param"] == "collection"
    assert refused(400, "POST", "/invariance", data={"count": 65})["param"] == "count"

    # 404, 405
    assert "/nothing" in refused(404, "GET", "/nothing")["message"]
    refused(404, "GET", "/docs/assets/nothing")
    assert "0123" in refused(404, "GET", f"{ITEMS}/0123/thumbnail")["message"]
    refused(404, "GET", f"{ITEMS}/..%2f..%2fsecret/thumbnail")
    assert "pictures" in refused(404, "POST", SEARCH, json={"positive": ["0123"]})["message"]
    refused(400, "POST", SEARCH, json={"positive": ["' or ''='"]})
    assert "GET" in refused(405, "GET", "/embed")["message"]
    assert refused(405, "POST", "/readyz")["code"] == "method_not_allowed"
    assert "nobody" in refused(404, "POST", "/embed?model=nobody", content=picture(1))["message"]
    assert (
        refused(404, "POST", "/v1/embeddings", json={"input": uri(picture(1)), "model": "nobody"})["param"] == "model"
    )
    assert "nobody" in refused(404, "GET", "/v1/models/nobody")["message"]
    refused(405, "DELETE", "/v1/embeddings")

    # 413
    four = {"content": pack([picture(1)] * 4), "headers": {"content-type": "application/x-twinview-pack"}}
    for body in ({"files": [("images", good)] * 4}, four):
        error = refused(413, "POST", "/embed", **body)
        assert error["message"].startswith("more than 3 images") and error["param"] == "images"
    assert refused(413, "POST", "/v1/embeddings", json={"input": [uri(picture(1))] * 4})["param"] == "input"
    assert "MiB" in refused(413, "POST", "/embed", content=b"x" * 200_001)["message"]
    assert refused(413, "POST", "/v1/embeddings", json={"input": uri(blank(101, 100))})["param"] == "input[0]"
    assert "MiB" in refused(413, "POST", "/embed", files={"images": (PNG, b"x" * 200_000)})["message"]
    refused(413, "POST", SEARCH, files={"image": (PNG, b"x" * 200_000)})
    chunks = (b"x" * 50_000 for _ in range(5))  # without a Content-Length
    refused(413, "POST", SEARCH, content=chunks, headers={"content-type": "application/json"})
    large = refused(413, "POST", "/embed", files=[("images", good), ("images", ("wide.png", blank(101, 100)))])
    assert large["param"] == "images[1]"
    assert large["message"].startswith("images[1] (wide.png) has 101 x 100 pixels")

    # 415
    for media in ("application/json", "text/plain", "application/x-www-form-urlencoded", "multipart/mixed"):
        error = refused(415, "POST", "/embed", content=picture(1), headers={"content-type": media})
        assert media in error["message"] and "application/x-twinview-pack" in error["message"]
        assert error["code"] == "unsupported_type"
    refused(415, "POST", "/v1/embeddings", data={"input": uri(picture(1))})
    refused(415, "POST", SEARCH, content=picture(1), headers={"content-type": "image/png"})

    # 422
    for path, field in (("/embed", "images"), (SEARCH, "image"), ("/views", "image")):
        item = "images[0]" if path == "/embed" else field
        for name, data in (("cat.txt", b"hello"), ("empty.png", b""), ("cut.jpg", truncated), ("a.svg", b"<svg/>")):
            error = refused(422, "POST", path, files={field: (name, data)})
            assert error["message"].startswith(f"{item} ({name}) is ")
            assert error["param"] == item

    two = [("image", good), ("image", ("cat.txt", b"hello"))]
    assert refused(422, "POST", "/matrix", files=two, data={"count": 2})["param"] == "image[1]"
    assert refused(422, "POST", "/embed", content=b"hello")["message"].startswith("images[0] is ")
    packed = {"content": pack([picture(1), b""]), "headers": {"content-type": "application/x-twinview-pack"}}
    assert refused(422, "POST", "/embed", **packed)["message"] == "images[1] is empty"
    assert refused(422, "POST", "/v1/embeddings", json={"input": [uri(picture(1)), uri(b"a")]})["param"] == "input[1]"

    # 429
    error = refused(429, "POST", "/views", files={"image": good}, data={"pairs": 5})
    assert (error["type"], error["code"]) == ("rate_limit_error", "busy")


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def blank(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


ROUTES = (
    ("GET", "/"),
    ("GET", "/docs"),
    ("GET", "/docs/assets/favicon-light-32x32.png"),
    ("GET", "/openapi.json"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/twinview"),
    ("GET", "/collections"),
    ("GET", "/collections/pictures"),
    ("GET", "/collections/pictures/keys"),
    ("GET", ITEMS),
    ("PUT", ITEMS),
    ("DELETE", ITEMS),
    ("GET", f"{ITEMS}/0123"),
    ("DELETE", f"{ITEMS}/0123"),
    ("GET", f"{ITEMS}/0123/thumbnail"),
    ("GET", f"{ITEMS}/0123/original"),
    ("PATCH", ITEMS),
    ("PUT", "/collections/pictures/copies"),
    ("PUT", "/collections/pictures"),
    ("DELETE", "/collections/pictures"),
    ("GET", "/collections/pictures/changes"),
    ("DELETE", "/collections/pictures/changes/newest"),
    ("GET", "/collections/pictures/problems"),
    ("GET", "/collections/pictures/drift"),
    ("POST", "/collections/pictures/pick"),
    ("POST", "/collections/pictures/suggest"),
    ("POST", "/collections/pictures/odd"),
    ("POST", "/collections/pictures/coverage"),
    ("POST", "/collections/pictures/split"),
    ("POST", "/collections/pictures/searches"),
    ("PATCH", "/collections/pictures"),
    ("GET", "/collections/pictures/reembedding"),
    ("PUT", "/collections/pictures/reembedding"),
    ("DELETE", "/collections/pictures/reembedding"),
    ("GET", "/aliases"),
    ("PUT", "/aliases/other"),
    ("DELETE", "/aliases/other"),
    ("GET", "/nothing"),
    ("POST", "/embed"),
    ("POST", "/v1/embeddings"),
    ("GET", "/v1/describe"),
    ("POST", "/v1/embed/images/bytes"),
    ("POST", SEARCH),
    ("GET", "/collections/pictures/duplicates"),
    ("POST", "/collections/pictures/duplicates"),
    ("GET", "/collections/pictures/map"),
    ("POST", "/collections/pictures/map"),
    ("GET", "/runs"),
    ("GET", "/runs/pictures"),
    ("POST", "/classify"),
    ("POST", "/views"),
    ("POST", "/matrix"),
    ("POST", "/invariance"),
)


@pytest.mark.slow
def test_without_a_key_every_endpoint_answers_401_in_the_same_shape(serve):
    http = serve(access=Access.from_keys("secret"))
    documented = {(method.upper(), path) for path, item in _paths(serve).items() for method in item}
    names = {
        "/0123": "/{id}",
        "/twinview": "/{id}",
        "/pictures": "/{name}",
        "/other": "/{alias}",
        "/newest": "/{change}",
    }
    asked = {
        (method, reduce(lambda path, name: path.replace(name, names[name]), names, path)) for method, path in ROUTES
    }
    assert documented - asked == {("GET", "/livez"), ("GET", "/readyz")}
    for method, path in ROUTES:
        answer = http.request(method, path)
        assert answer.status_code == 401, path
        assert shape(answer)["code"] == "no_key"


def _paths(serve) -> dict:
    return serve().get("/openapi.json").json()["paths"]


def embedding(image: bytes) -> dict[str, dict]:
    """For every route that embeds, a valid request."""
    form = {"files": {"image": (PNG, image)}}
    return {
        "/embed": {"content": image},
        "/v1/embeddings": {"json": {"input": uri(image)}},
        SEARCH: form,
        "/views": form,
        "/matrix": form,
        "/invariance": form,
    }


def test_a_busy_service_answers_429_on_every_embedding_route(serve, picture):
    http = serve(limits=Limits(images_at_once=0))
    for path, body in embedding(picture(1)).items():
        answer = http.post(path, **body)
        assert answer.status_code == 429
        assert answer.headers["Retry-After"] == "1"
        assert shape(answer)["type"] == "rate_limit_error"


def test_an_internal_error_reveals_no_internals(http, picture, monkeypatch):
    async def fail(*_):
        raise RuntimeError("/home/secret")

    engine = http.app.state.engine
    of_views = [(engine.views, method) for method in ("pairs", "matrix", "invariance")]
    for part, method in ((engine, "embed"), (engine.searches, "find"), *of_views):
        monkeypatch.setattr(part, method, fail)
    for path, body in embedding(picture(1)).items():
        answer = http.post(path, **body)
        assert answer.status_code == 500
        assert shape(answer)["code"] == "internal_error"
        assert "secret" not in answer.text


def test_without_an_encoder_the_service_runs_and_says_how_to_make_one(serve, tmp_path, picture, no_store):
    http = serve(encoder=tmp_path / "nowhere")
    assert http.get("/livez").status_code == 200
    assert http.get("/v1/models").json() == {"object": "list", "data": []}
    image = {"files": {"image": (PNG, picture(1))}}
    asked = [
        http.get("/readyz"),
        http.get("/collections"),
        http.get(ITEMS),
        http.put(ITEMS, content=picture(1)),
        http.get(f"{ITEMS}/0123/thumbnail"),
        http.get("/v1/models/twinview"),
        http.post("/embed", files={"images": (PNG, picture(1))}),
        http.post("/v1/embeddings", json={"input": uri(picture(1))}),
        http.post(SEARCH, **image),
        http.post("/views", **image),
    ]
    for answer in asked:
        assert answer.status_code == 503
        message = shape(answer)["message"]
        assert str(tmp_path / "nowhere") in message
        assert "python training/pretrain.py" in message and "python export/to_onnx.py" in message
        assert "This service tries again every 2 s." in message


def test_an_encoder_exported_later_is_loaded(serve, bundle, tmp_path, picture, no_store, monkeypatch, wait_until):
    monkeypatch.setattr("serving.app.RETRY_S", 0.05)
    http = serve(encoder=tmp_path / "later")
    image = {"files": {"images": (PNG, picture(1))}}
    assert http.post("/embed", **image).status_code == 503
    shutil.copytree(bundle.folder, tmp_path / "making")
    (tmp_path / "making").rename(tmp_path / "later")
    wait_until(lambda: http.get("/readyz").status_code == 200, "the encoder is not taken up")
    assert http.post("/embed", **image).json()["model"] == bundle.card.id
