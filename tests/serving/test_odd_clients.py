"""What other programs send: null for what they do not set, base64 in all its forms, HEAD, and more."""

import base64
import gzip
import json
import logging
from urllib.parse import quote

import numpy as np
import pytest

from serving.access import Access, AccessProblem
from serving.keys import ApiKeys

JSON = {"Content-Type": "application/json"}


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def message(answer, status: int = 400) -> str:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["message"]


# Null -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["encoding_format", "model", "modality", "normalize", "dimensions", "user"])
def test_null_means_the_default_of_an_embedding(http, picture, field):
    plain = http.post("/v1/embeddings", json={"input": text(picture(0))}).json()
    given = http.post("/v1/embeddings", json={"input": text(picture(0)), field: None})
    assert given.json() == plain


@pytest.mark.parametrize("field", ["negative", "k", "filter", "threshold", "closer_than", "model"])
def test_null_means_the_default_of_a_search(http, fill, field):
    fill(4)
    query = {"positive": [[1.0] * 48]}
    plain = http.post("/collections/pictures/search", json=query)
    assert plain.status_code == 200
    assert http.post("/collections/pictures/search", json=query | {field: None}).json() == plain.json()


@pytest.mark.parametrize("large", [False, True])
def test_null_means_that_an_item_has_no_such_fact(http, bundle, large):
    row = {"id": "a", "vector": [1.0] * 48, "name": None, "label": None, "path": None}
    rows = [
        row | {"metadata": None},
        row | {"id": "b", "metadata": {"price": None, "size": 3}},
        *([row | {"id": f"{i}"} for i in range(1000 if large else 0)][:900]),
    ]
    body = json.dumps({"model": bundle.card.id, "items": rows}, indent=8 if large else None).encode()
    assert (len(body) > 2**18) == large
    answer = http.put("/collections/pictures/items", content=body, headers=JSON)
    assert answer.status_code == 200, answer.text
    assert http.get("/collections/pictures/items/a").json()["metadata"] == {}
    assert http.get("/collections/pictures/items/b").json()["metadata"] == {"size": 3}


def test_null_is_no_value_of_what_is_required(http):
    assert "input" in message(http.post("/v1/embeddings", json={"input": None}))


# Base64 ---------------------------------------------------------------------------------------------------------------


def url_safe(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode()


FORMS = {
    "plain": text,
    "for URLs": url_safe,
    "without padding": lambda data: text(data).rstrip("="),
    "for URLs, without padding": lambda data: url_safe(data).rstrip("="),
    "with blanks around it": lambda data: f" \t{text(data)}\r\n",
    "in lines": lambda data: base64.encodebytes(data).decode(),
    "in lines of Windows": lambda data: base64.encodebytes(data).decode().replace("\n", "\r\n"),
    "a data URI": lambda data: f"data:image/png;base64,{text(data)}",
    "a data URI in capitals": lambda data: f"DATA:IMAGE/PNG;BASE64,{text(data)}",
    "a data URI without a type": lambda data: f"data:;base64,{text(data)}",
    "a data URI with blanks": lambda data: f" data:image/png; base64 , {text(data)} ",
    "a data URI in lines": lambda data: f"data:image/png;base64,{base64.encodebytes(data).decode()}",
    "a data URI, percent-encoded": lambda data: f"data:image/png;base64,{quote(text(data), safe='')}",
    "a data URI for URLs, without padding": lambda data: f"data:image/png;base64,{url_safe(data).rstrip('=')}",
    "a data URI with a name": lambda data: f"data:image/png;name=a.png;base64,{text(data)}",
    "a data URI with a name at the end": lambda data: f"data:image/png;base64;name=a.png,{text(data)}",
}


@pytest.mark.parametrize("form", FORMS)
def test_base64_is_read_as_browsers_read_it(http, picture, form):
    sources = [next(data for seed in range(99) if set(text(data := picture(seed))) >= set("+/=")), picture(1) + b"\0"]
    expected = http.post("/v1/embeddings", json={"input": [text(data) for data in sources]}).json()["data"]
    answer = http.post("/v1/embeddings", json={"input": [FORMS[form](data) for data in sources]})
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"] == expected


# HEAD -----------------------------------------------------------------------------------------------------------------


def test_head_is_answered_wherever_get_is(http, fill, caplog):
    item = fill(3)[0].id
    known = {"name": "pictures", "id": item}
    paths = [path.format(**known) for path, item in http.get("/openapi.json").json()["paths"].items() if "get" in item]
    assert len(paths) > 10
    for path in [*paths, "/", "/docs", "/openapi.json", "/docs/assets/swagger-ui.css", "/nowhere"]:
        get, head = (http.request(method, path, follow_redirects=False) for method in ("GET", "HEAD"))
        assert head.status_code == get.status_code, path
        assert head.content == b"" and head.headers.get("content-type") == get.headers.get("content-type"), path
        if path != "/metrics":
            assert head.headers.get("content-length") == get.headers.get("content-length"), path
    assert http.head("/embed").status_code == 405
    with caplog.at_level(logging.INFO, "twinview.requests"):
        http.head("/livez")
    assert "HEAD /livez 200" in caplog.text


def test_head_needs_a_key_like_get(serve):
    locked = serve(access=Access.from_keys("secret"))
    assert locked.head("/v1/models").status_code == 401
    assert locked.head("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert locked.head("/livez").status_code == 200


# Bodies ---------------------------------------------------------------------------------------------------------------


def test_a_byte_order_mark_before_json_is_no_error(http, bundle, picture):
    def send(method, path, content):
        answer = http.request(method, path, content=b"\xef\xbb\xbf" + json.dumps(content).encode(), headers=JSON)
        assert answer.status_code == 200, answer.text

    row = {"id": "a", "vector": [1.0] * 48}
    rows = {"model": bundle.card.id, "items": [row] + [row | {"id": f"x{i}", "name": 300 * "n"} for i in range(900)]}
    send("POST", "/v1/embeddings", {"input": text(picture(0))})
    send("PUT", "/collections/pictures/items", rows | {"items": [row]})
    send("PUT", "/collections/pictures/items", rows)  # large enough for the other parser
    send("POST", "/collections/pictures/search", {"positive": ["a"]})
    send("DELETE", "/collections/pictures/items", {"ids": ["a"]})


@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP, identity"])
def test_a_compressed_body_is_refused_in_words(http, picture, encoding):
    for path, headers in (("/embed", {"Content-Type": "image/png"}), ("/v1/embeddings", JSON)):
        body = gzip.compress(picture(0))
        answer = http.post(path, content=body, headers={**headers, "Content-Encoding": encoding})
        assert "send it uncompressed" in message(answer, 415)
        assert answer.headers["accept-encoding"] == "identity"
    answer = http.post("/embed", content=picture(0), headers={"Content-Encoding": "identity"})
    assert answer.status_code == 200


# Query parameters -----------------------------------------------------------------------------------------------------


def test_an_unknown_query_parameter_is_refused_by_name_on_every_route(http, fill):
    item = fill(3)[0].id
    checked = 0
    for path, operations in http.get("/openapi.json").json()["paths"].items():
        for method in operations:
            answer = http.request(
                method,
                path.format(name="pictures", id=item, alias="other", change="newest"),
                params={"unheard_of": "1"},
            )
            assert message(answer).startswith("unheard_of: is not a parameter of "), (method, path)
            assert answer.json()["error"]["param"] == "unheard_of"
            checked += 1
    assert checked > 20
    assert http.get("/collections/pictures/items", params={"limit": 2}).json()["count"] == 3  # nothing was deleted


@pytest.mark.parametrize(
    ("method", "path", "name", "nearest"),
    [
        ("POST", "/embed", "normalise", "normalize"),
        ("GET", "/collections/pictures/items", "filters", "filter"),
        ("PUT", "/collections/pictures/items", "labels", "label"),
        ("GET", "/runs", "limits", "limit"),
    ],
)
def test_a_mistyped_query_parameter_gets_a_suggestion(http, picture, method, path, name, nearest):
    answer = http.request(method, path, params={name: "true"}, content=picture(0))
    assert message(answer).endswith(f"did you mean {nearest}?")


def test_a_body_where_the_route_reads_none_is_refused(http, fill):
    item, checked = fill(3)[0].id, 0
    for path, operations in http.get("/openapi.json").json()["paths"].items():
        for method, operation in operations.items():
            if "requestBody" in operation:
                continue
            url = path.format(name="pictures", id=item, alias="other", change="newest")
            answer = http.request(method, url, json={"without_skipped": True})
            assert message(answer).endswith("takes no body, only parameters in its address"), (method, path)
            checked += 1
    assert checked > 20
    assert http.request("GET", "/collections", json={}).status_code == 200
    assert http.get("/collections/pictures/items").json()["count"] == 3  # nothing was deleted


def test_a_link_to_the_page_may_have_any_parameter(http):
    assert http.get("/", params={"utm_source": "mail"}, follow_redirects=False).status_code == 307
    assert http.get("/docs", params={"lang": "en"}).status_code == 200


# Settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["open", "proxy"])
def test_all_switches_have_one_meaning_of_yes(name):
    variable = f"TWINVIEW_{name.upper()}"
    for value in ("1", "true", "True", "yes", "ON", " 1 "):
        assert getattr(Access.from_environment({variable: value}), name) is True
    for value in ("", "0", "false", "No", "off"):
        assert getattr(Access.from_environment({variable: value}), name) is False
    with pytest.raises(AccessProblem, match=f"{variable} is 1 or 0, not 'perhaps'"):
        Access.from_environment({variable: "perhaps"})


def test_a_key_file_may_begin_with_a_byte_order_mark(tmp_path):
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbffirst\r\nsecond\r\n")
    keys = ApiKeys(file=str(file))
    assert keys.find(b"first") and keys.find(b"second")


def test_nulls_do_not_change_numbers(http, picture):
    one = http.post("/v1/embeddings", json={"input": text(picture(0)), "encoding_format": None}).json()
    other = http.post("/embed", content=picture(0)).json()
    np.testing.assert_array_equal(one["data"][0]["embedding"], other["embeddings"][0])
