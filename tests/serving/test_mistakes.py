"""Errors about the fields of requests: each names the field as it was written, and says what is needed."""

import json

import pytest
from pydantic import ValidationError

from serving.mistakes import mistake, written
from serving.protocol.queries import ItemFacts, Searches
from serving.protocol.shown import shown

ITEMS, SEARCH, SEARCHES = (f"/collections/pictures/{path}" for path in ("items", "search", "searches"))
VECTOR = [1.0] * 48
NO_ID = "is not an id: letters from a to z, digits, _, -, and . except at the start, 1 to 128"


def message(answer, status: int = 400) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    param = error["param"]
    assert error["message"].startswith(f"{param}: " if param else "the body: "), error
    return error["message"]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"k": "5"}, 'k: "5" is text, a whole number is needed'),
        ({"k": True}, "k: true is given, a whole number is needed"),
        ({"k": 5.5}, "k: 5.5 is given, a whole number is needed"),
        ({"k": [1]}, "k: a list is given, a whole number is needed"),
        ({"k": 0}, "k: 0 is given, at least 1 is needed"),
        ({"k": 1001}, "k: 1001 is given, at most 1,000 is needed"),
        ({"threshold": "x"}, 'threshold: "x" is text, a number is needed'),
        ({"threshold": False}, "threshold: false is given, a number is needed"),
        ({"threshold": 2}, "threshold: 2 is given, at most 1 is needed"),
        ({"filter": "x"}, 'filter: "x" is text, an object is needed'),
        ({"filter": [1]}, "filter: a list is given, an object is needed"),
        (
            {"filter": {"n": {"gt": None}}},
            "filter: The filter on n compares with null by `gt`, which needs text or a number.",
        ),
        ({"positive": "a"}, 'positive: "a" is text, a list is needed'),
        ({"positive": [5]}, "positive[0]: 5 is given, an id or a vector is needed"),
        ({"positive": [None]}, "positive[0]: null is given, an id or a vector is needed"),
        ({"positive": [{}]}, "positive[0]: an object is given, an id or a vector is needed"),
        ({"positive": ["a b"]}, f'positive[0]: "a b" {NO_ID}'),
        ({"positive": [[]]}, "positive[0]: is empty"),
        ({"positive": [["1"] * 48]}, 'positive[0][0]: "1" is text, a number is needed'),
        ({"positive": [[1.0, True]]}, "positive[0][1]: true is given, a number is needed"),
        ({"positive": ["a"] * 101}, "positive: has more than 100 elements"),
        ({"positve": 1}, "positve: is not a field; did you mean positive?"),
        ({"text": 5}, "text: 5 is given, text is needed"),
        ({"text": "a" * 1001}, "text: has 1,001 characters, at most 1,000 are allowed"),
        ({"model": 5}, "model: 5 is given, text is needed"),
        ({"model": ""}, "model: is empty; leave it out for the default encoder, or give an id from /v1/models"),
    ],
)
def test_a_mistake_in_a_search_is_named_alone_and_among_several(http, fields, sentence):
    wrong = {"positive": [VECTOR]} | fields
    assert message(http.post(SEARCH, json=wrong)) == sentence
    several = [{"positive": [VECTOR], "closer_than": 0.5} for _ in range(2)] + [wrong]
    if not sentence.startswith(("filter: The", "model: is")):  # found before the first search is answered
        assert message(http.post(SEARCHES, json={"searches": several})) == f"searches[2].{sentence}"
    assert message(http.post(SEARCHES, json={"searches": [wrong]})) == f"searches[0].{sentence}"


@pytest.mark.parametrize(
    ("search", "status", "sentence"),
    [
        ({"positive": []}, 400, "positive: give at least one image, id, vector or text to search by"),
        ({"positive": [VECTOR], "filter": {"shelf": 1}}, 400, "filter: No item has the key shelf."),
        ({"positive": [VECTOR], "filter": {"name": 1}}, 400, "filter: The filter on name compares with 1"),
        ({"positive": [VECTOR], "closer_than": 0.9}, 400, "closer_than: pictures has fewer than 30 items"),
        ({"positive": [VECTOR], "threshold": 0, "closer_than": 0}, 400, "closer_than: give either"),
        ({"positive": [[1.0]]}, 400, "positive[0] has 1 numbers"),
        ({"positive": [VECTOR], "negative": [VECTOR]}, 400, "negative: the examples cancel out"),
        ({"positive": ["nothing"]}, 404, "positive[0]: no item nothing is in the collection pictures"),
        ({"positive": [VECTOR], "model": "resnet"}, 404, "model: no encoder resnet is served here"),
    ],
)
def test_every_error_of_one_search_of_several_names_it(serve, fill, search, status, sentence):
    http, _ = serve(), fill(3)
    answer = http.post(SEARCHES, json={"searches": [{"positive": [VECTOR]}, search]})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"].startswith(f"searches[1].{sentence}")
    assert sentence.startswith(error["param"].removeprefix("searches[1]."))


def test_errors_about_the_whole_of_several_searches_do_not_name_one(http):
    answer = http.post("/collections/nothing/searches", json={"searches": [{"positive": [VECTOR]}]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "name")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (5, ": 5 is given, an object is needed"),
        ({}, ".id: is missing"),
        ({"id": ""}, f'.id: "" {NO_ID}'),
        ({"id": "a", "vector": "x"}, '.vector: "x" is text, a list is needed'),
        ({"id": "a", "vector": [1, "2"]}, '.vector[1]: "2" is text, a number is needed'),
        ({"id": "a", "vector": [1, True]}, ".vector[1]: true is given, a number is needed"),
        ({"id": "a", "label": "x" * 4097}, ".label: has 4,097 characters, at most 4,096 are allowed"),
        ({"id": "a", "metadata": [1]}, ".metadata: a list is given, an object is needed"),
        (
            {"id": "a", "metadata": {"a b": 1}},
            '.metadata: "a b" is not a key: letters, digits and _, with a letter or _ first, 1 to 64',
        ),
        (
            {"id": "a", "metadata": {"größe": {}}},
            ".metadata.größe: an object is given, text, a number, true or false is needed",
        ),
        (
            {"id": "a", "wdith": 3, "vector": [1]},
            ".wdith: is not a field here; known are id, name, label, path, metadata, vector",
        ),
    ],
)
def test_a_mistake_in_a_row_is_named_in_small_and_large_bodies(http, bundle, row, sentence):
    good = {"id": "good", "vector": VECTOR, "name": "x" * 4000}
    for rows in ([good, row], [good, row, *({**good, "id": str(i)} for i in range(80))]):
        answer = http.put(ITEMS, json={"model": bundle.card.id, "items": rows})
        assert message(answer) == f"items[1]{sentence}"


def test_metadata_of_a_row_in_a_large_body_may_be_anything(http, bundle):
    rows = [{"id": str(i), "vector": VECTOR, "name": "x" * 4000} for i in range(80)]
    for wrong in (5, True, "x", [1] * 2000):
        rows[0]["metadata"] = wrong
        assert "an object is needed" in message(http.put(ITEMS, json={"model": bundle.card.id, "items": rows}))


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("limit=x", 'limit: "x" is not a whole number'),
        ("limit=", 'limit: "" is not a whole number'),
        ("limit=0", "limit: 0 is given, at least 1 is needed"),
        ("limit=1&limit=2", "limit: is there twice"),
        ("offset=99999999999", "offset: 99999999999 is given, less than 4,294,967,296 is needed"),
        ("model=", "model: is empty; leave it out for the default encoder, or give an id from /v1/models"),
        ("filter=", "filter: is empty; JSON is needed"),
        ("filter={", "filter: is not valid JSON: it ends too early"),
        (r'filter={"a":"\ud800x"}', "filter: is not valid JSON from line 1, column 13 on"),
        ('filter={"a":1,}', "filter: is not valid JSON from line 1, column 8 on"),
        ("filter=[1]", "filter: a list is given, an object is needed"),
        ("filter=null", "filter: null is given, an object is needed"),
        ('filter={"a":1}&filter={"b":1}', "filter: is there twice"),
        ("after=%20", 'after: " " is not an id that a page ended with'),
        ("fliter={}", "fliter: is not a parameter of GET /collections/{name}/items; did you mean filter?"),
    ],
)
def test_a_mistake_in_the_query_is_named(http, query, sentence):
    assert message(http.get(f"{ITEMS}?{query}")) == sentence


def test_a_parameter_with_several_values_may_be_repeated(http):
    assert http.request("DELETE", f"{ITEMS}?id=a&id=b").status_code == 404  # as there is no collection


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"k": "x"}, 'k: "x" is not a whole number'),
        ({"k": ["5", "6"]}, "k: is there twice"),
        ({"threshold": "x"}, 'threshold: "x" is not a number'),
        ({"positive": "5"}, "positive: 5 is given, a list is needed"),
        ({"positive": '[["1"]]'}, 'positive[0][0]: "1" is text, a number is needed'),
        ({"filter": "null"}, "filter: null is given, an object is needed"),
        ({"fliter": "{}"}, "fliter: is not a field; did you mean filter?"),
    ],
)
def test_a_mistake_in_a_form_is_named(http, picture, fields, sentence):
    assert message(http.post(SEARCH, data=fields, files={"image": ("a.png", picture(1))})) == sentence


@pytest.mark.parametrize(
    ("path", "method", "options", "sentence"),
    [
        (
            "/v1/embeddings",
            "POST",
            {"json": {"input": "aaaa", "normalize": "yes"}},
            'normalize: "yes" is text, true or false is needed',
        ),
        (
            "/v1/embeddings",
            "POST",
            {"json": {"input": "aaaa", "normalize": 1}},
            "normalize: 1 is given, true or false is needed",
        ),
        (
            "/v1/embeddings",
            "POST",
            {"json": {"input": "aaaa", "modality": "text"}},
            'modality: "text" is given, image is needed',
        ),
        ("/embed?normalize=perhaps", "POST", {}, 'normalize: "perhaps" is neither true nor false'),
        ("/embed?normalize=1&normalize=0", "POST", {}, "normalize: is there twice"),
        (
            "/embed?model=",
            "POST",
            {},
            "model: is empty; leave it out for the default encoder, or give an id from /v1/models",
        ),
        ("/views", "POST", {}, "image: is missing"),
        ("/views", "POST", {"data": {"image": "a"}}, "image: must be a file"),
        ("/views", "POST", {"files": [("image", b"a")], "data": {"pairs": ["2", "3"]}}, "pairs: is there twice"),
        ("/views", "POST", {"files": [("image", b"a"), ("image", b"b")]}, "image: is there twice"),
        ("/matrix", "POST", {"data": {"seed": ["2", "3"]}}, "seed: is there twice"),
        ("/invariance", "POST", {"data": {"blur": "1"}}, "blur: is not a field of this form"),
        ("/invariance", "POST", {"data": {"count": ["2", "3"]}}, "count: is there twice"),
        (
            "/matrix",
            "POST",
            {"data": {"collection": "../a"}},
            'collection: "../a" is not a name: letters from a to z, digits, _ and -, 1 to 64',
        ),
        ("/collections/a%20b", "GET", {}, 'name: "a b" is not a name: letters from a to z, digits, _ and -, 1 to 64'),
        (ITEMS, "PUT", {"data": {"metadata": "[5]"}}, "metadata[0]: 5 is given, an object is needed"),
        (ITEMS, "PUT", {"data": {"metadata": "null"}}, "metadata: null is given, a list is needed"),
        (ITEMS, "PUT", {"data": {"metadata": "["}}, "metadata: is not valid JSON: it ends too early"),
        (
            ITEMS,
            "PUT",
            {"data": {"lable": "x"}},
            "lable: is not a field of this form, which has images and metadata; parameters go into the address",
        ),
        (ITEMS, "PUT", {"json": [1]}, "the body: a list is given, an object is needed"),
        (ITEMS, "PUT", {"json": {"items": []}}, "model: is missing"),
        (
            SEARCH,
            "POST",
            {"content": b"", "headers": {"content-type": "application/json"}},
            "the body: is empty; JSON is needed",
        ),
        (
            SEARCH,
            "POST",
            {"content": b'{"k":\n 5,}', "headers": {"content-type": "application/json"}},
            "the body: is not valid JSON from line 2, column 4 on",
        ),
        (ITEMS, "DELETE", {"json": {"ids": "a"}}, 'ids: "a" is text, a list is needed'),
    ],
)
def test_a_mistake_on_another_route_is_named(http, picture, path, method, options, sentence):
    if path.startswith("/embed"):
        options = {"content": picture(0)}
    elif "data" in options and path == ITEMS:
        options = {**options, "files": {"images": ("a.png", picture(0))}}
    assert message(http.request(method, path, **options)) == sentence


def test_a_whole_number_may_be_written_with_a_point(serve, fill):
    http, _ = serve(), fill(6)
    answer = http.post(
        SEARCH, content=json.dumps({"positive": [VECTOR], "k": 5.0}), headers={"content-type": "application/json"}
    )
    assert len(answer.json()["results"]) == 5


def test_a_kind_of_error_without_words_shows_no_internals():
    error = {
        "type": "new_in_pydantic",
        "loc": ("a", "b c"),
        "msg": "Input should be an instance of Spam",
        "input": {"x": 1},
    }
    assert mistake(error) == ('a["b c"]: {"x": 1} is not allowed', 'a["b c"]')


def test_fields_of_models_inside_models_are_suggested():
    with pytest.raises(ValidationError) as raised:
        Searches.model_validate({"searches": [{"treshold": 1}]})
    assert (
        mistake(raised.value.errors()[0], Searches)[0]
        == "searches[0].treshold: is not a field; did you mean threshold?"
    )


def test_long_and_odd_values_are_cut_off_and_escaped():
    with pytest.raises(ValidationError) as raised:
        ItemFacts.model_validate({"id": "\ud800" + "ä" * 10_000})
    sentence, field = mistake(raised.value.errors()[0], ItemFacts)
    assert field == "id" and len(sentence) < 300 and sentence.encode()
    assert shown("x" * 200) == '"' + "x" * 76 + "..."
    assert written(["a", 0, "größe", "é f", "b" * 100]).startswith('a[0].größe["é f"]["bbb')


def test_a_misspelt_field_that_is_required_gets_a_suggestion(http):
    assert message(http.request("DELETE", ITEMS, json={"idss": ["a"]})) == "idss: is not a field; did you mean ids?"
    wrong = {"model": "any", "items": [{"id": "a", "vectr": VECTOR}]}
    assert message(http.put(ITEMS, json=wrong)) == "items[0].vectr: is not a field; did you mean vector?"
    assert message(http.put("/aliases/live", json={"colection": "pictures"})).endswith("did you mean collection?")
    assert message(http.request("DELETE", ITEMS, json={"x": ["a"]})) == "ids: is missing"
