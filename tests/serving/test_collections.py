"""The routes of the collections, on a real index."""

import errno
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from serving import errors
from serving.access import Access
from serving.client import COLLECTION
from serving.collection.index import DEFAULT, Index, content_id
from serving.limits import Limits
from serving.searches import search_direction
from tests.conftest import PATIENCE_S

ITEMS, SEARCH = "/collections/pictures/items", "/collections/pictures/search"


def cosines(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Cosines (n,) in float64 of vectors (n, d) and a query (d,)."""
    vectors, query = np.float64(vectors), np.float64(query)
    return vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)


def files(*pictures: bytes) -> list:
    return [("images", (f"{i}.png", data)) for i, data in enumerate(pictures)]


def ids(answer) -> list[str]:
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return [item["id"] for item in body.get("results", body.get("items"))]


@pytest.fixture
def filled(serve, fill, picture):
    """A service with 30 pictures, their items, and their vectors as the service embeds them."""
    http, items = serve(), fill(30)
    return http, items, np.array(http.post("/embed", files=files(*map(picture, range(30)))).json()["embeddings"])


# Adding items ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_added_pictures_are_embedded_stored_and_found(http, bundle, picture):
    facts = [{"name": "x/0", "label": "red", "metadata": {"price": 3.5, "stock": 2}}, {"id": "mine", "path": "/a"}, {}]
    form = {"metadata": json.dumps(facts)}
    answer = http.put(ITEMS, files=files(picture(0), picture(1), picture(2, format="JPEG")), data=form)
    first, third = content_id(picture(0)), content_id(picture(2, format="JPEG"))
    assert answer.json() == {
        "model": bundle.card.id,
        "items": [{"id": first, "new": True}, {"id": "mine", "new": True}, {"id": third, "new": True}],
        "changes": [http.get("/collections/pictures/changes").json()["changes"][0]["id"]],
    }
    item = http.get(f"{ITEMS}/{first}").json()
    assert item == {
        "id": first,
        "name": "x/0",
        "label": "red",
        "path": None,
        "width": 40,
        "height": 30,
        "bytes": len(picture(0)),
        "metadata": {"price": 3.5, "stock": 2},
    }
    assert http.get(f"{ITEMS}/mine").json()["name"] == "1.png"
    assert ids(http.post(SEARCH, files={"image": ("q.png", picture(1))}))[0] == "mine"
    thumbnail = http.get(f"{ITEMS}/{first}/thumbnail")
    assert Image.open(io.BytesIO(thumbnail.content)).format == "JPEG"


def test_a_single_picture_is_described_by_query_parameters(http, picture):
    answer = http.put(f"{ITEMS}?name=cat&label=pet", content=picture(3), headers={"content-type": "image/png"})
    assert answer.json()["items"] == [{"id": content_id(picture(3)), "new": True}]
    item = http.get(f"{ITEMS}/{content_id(picture(3))}").json()
    assert (item["name"], item["label"]) == ("cat", "pet")


def test_adding_an_item_again_replaces_it(http, picture):
    assert [item["new"] for item in http.put(ITEMS, files=files(picture(0), picture(0))).json()["items"]] == [
        True,
        False,
    ]
    assert http.get(ITEMS).json()["items"][0]["name"] == "1.png"  # the last counts
    answer = http.put(f"{ITEMS}?label=new", content=picture(0))
    assert answer.json()["items"][0]["new"] is False
    assert http.get(ITEMS).json()["count"] == 1
    assert http.get(ITEMS).json()["items"][0]["label"] == "new"


def test_an_id_that_is_there_twice_is_refused(http, bundle, picture):
    rows = [{"id": "a", "vector": [1.0] * 48}, {"id": "b", "vector": [1.0] * 48}, {"id": "a", "vector": [2.0] * 48}]
    form = {"files": files(picture(0), picture(1)), "data": {"metadata": json.dumps([{"id": "a"}, {"id": "a"}])}}
    for body, param in (({"json": {"model": bundle.card.id, "items": rows}}, "items[2].id"), (form, "metadata[1].id")):
        answer = http.put(ITEMS, **body)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == f"{param}: a is there twice"
        assert answer.json()["error"]["param"] == param
    assert http.get(ITEMS).status_code == 404  # nothing was stored


def test_vectors_are_stored_for_the_encoder_that_made_them(http, bundle, picture):
    (vector,) = http.post("/embed", files=files(picture(4))).json()["embeddings"]
    rows = [{"id": "four", "vector": vector, "label": "a", "metadata": {"shelf": "A"}}]
    answer = http.put(ITEMS, json={"model": bundle.card.id, "items": rows})
    assert (answer.json()["model"], answer.json()["items"]) == (bundle.card.id, [{"id": "four", "new": True}])
    assert http.get(f"{ITEMS}/four").json()["metadata"] == {"shelf": "A"}
    match = http.post(SEARCH, files={"image": ("q.png", picture(4))}).json()["results"][0]
    assert (match["id"], match["similarity"]) == ("four", pytest.approx(1, abs=1e-5))
    assert http.get(f"{ITEMS}/four/thumbnail").status_code == 404

    for wrong, param in (
        ({"model": "resnet", "items": rows}, "model"),
        ({"model": bundle.card.id, "items": [{"id": "a", "vector": [1, 2]}]}, "items[0].vector"),
        ({"model": bundle.card.id, "items": [{"id": "a", "vector": [0] * 48}]}, "items[0].vector"),
    ):
        answer = http.put(ITEMS, json=wrong)
        assert answer.status_code == (404 if param == "model" else 400)
        assert answer.json()["error"]["param"] == param
    assert http.get(ITEMS).json()["count"] == 1


def test_a_broken_picture_is_named_and_its_whole_request_is_discarded(http, picture):
    answer = http.put(ITEMS, files=files(picture(0), b"no picture"))
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "images[1]"
    assert http.get(ITEMS).status_code == 404


@pytest.mark.slow
def test_items_added_concurrently_are_all_stored(http, picture, bundle):
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: http.put(ITEMS, content=picture(i)), range(60)))
    assert all(answer.status_code == 200 and answer.json()["items"][0]["new"] for answer in answers)
    page = http.get(ITEMS, params={"limit": 100}).json()
    assert {item["id"] for item in page["items"]} == {content_id(picture(i)) for i in range(60)}
    facts = http.get("/collections/pictures").json()
    assert (facts["count"], facts["encoder"], facts["dimension"]) == (60, bundle.card.id, 48)


# Deleting items -------------------------------------------------------------------------------------------------------


def test_deleted_items_are_no_longer_found(filled):
    http, items, vectors = filled
    first, second, third, fourth = (item.id for item in items[:4])
    assert http.delete(f"{ITEMS}/{first}").json()["deleted"] == [first]
    asked = {"ids": [second, "nothing", first]}
    assert http.request("DELETE", ITEMS, json=asked).json()["deleted"] == [second]
    assert http.delete(ITEMS, params={"id": [third, fourth]}).json()["deleted"] == [third, fourth]
    assert http.delete(f"{ITEMS}/{first}").status_code == 404
    assert http.get(f"{ITEMS}/{first}").status_code == 404
    left = ids(http.post(SEARCH, json={"positive": [vectors[0].tolist()], "k": 30}))
    assert set(left) == {item.id for item in items[4:]}
    assert http.get(ITEMS).json()["count"] == 26


def test_deleted_items_are_gone_from_the_tables_of_all_encoders(filled, tmp_path):
    http, items, _ = filled
    other = Index(tmp_path / "index", "another", 3)
    other.upsert(items[:4], np.random.default_rng(0).normal(size=(4, 3)), allow_other_encoder=True)
    gone = [item.id for item in items[:2]]
    assert http.request("DELETE", ITEMS, json={"ids": gone}).json()["deleted"] == gone
    assert other.ids() == {item.id for item in items[2:4]}
    assert http.get(f"{ITEMS}/{items[0].id}/thumbnail").status_code == 404
    other.upsert(items[:1], np.ones((1, 3)))
    assert http.delete(f"{ITEMS}/{items[0].id}").json()["deleted"] == [items[0].id]  # only the other has it
    assert items[0].id not in other.ids()


# Changing items -------------------------------------------------------------------------------------------------------


def test_facts_are_changed_without_the_picture(filled, tmp_path):
    http, (item, other, *_), _ = filled
    more = Index(tmp_path / "index", "another", 3)
    more.upsert([item], np.ones((1, 3)), allow_other_encoder=True)
    before = http.get(f"{ITEMS}/{item.id}", params={"vector": True}).json()
    first = {"id": item.id, "label": "red", "metadata": {"price": 3, "colour": "red"}}
    answer = http.patch(ITEMS, json={"items": [first, {"id": "nothing", "label": "x"}]})
    assert (answer.status_code, answer.json()["changed"]) == (200, [item.id])
    after = http.get(f"{ITEMS}/{item.id}", params={"vector": True}).json()
    assert after == before | {"label": "red", "metadata": {"price": 3, "colour": "red"}}
    second = {"id": item.id, "name": "new", "label": None, "metadata": {"colour": None, "size": 1.5}}
    assert http.patch(ITEMS, json={"items": [second]}).json()["changed"] == [item.id]
    after = http.get(f"{ITEMS}/{item.id}").json()
    assert (after["name"], after["label"], after["metadata"]) == ("new", None, {"price": 3, "size": 1.5})
    assert (after["width"], after["height"], after["bytes"]) == (item.width, item.height, item.bytes)
    assert more.get(item.id)[0].metadata == {"price": 3, "size": 1.5}  # of the other encoder too
    assert http.get(f"{ITEMS}/{item.id}/thumbnail").status_code == 200
    assert http.get(f"{ITEMS}/{other.id}").json()["metadata"] == {}
    assert more.verify() == Index(tmp_path / "index", http.get("/v1/models").json()["data"][0]["id"], 48).verify() == []


def test_an_impossible_change_is_refused_and_changes_nothing(filled):
    http, (first, second, *_), _ = filled
    assert http.patch(ITEMS, json={"items": [{"id": first.id, "metadata": {"price": 3}}]}).status_code == 200
    good = {"id": first.id, "label": "x"}
    for wrong, param in (
        ([good, {"id": second.id, "metadata": {"price": "dear"}}], None),
        ([good, {"id": second.id, "metadata": {"label": "x"}}], None),
        ([good, good], "items[1].id"),
        ([good, {"id": second.id, "width": 3}], "items[1].width"),
        ([], "items"),
    ):
        answer = http.patch(ITEMS, json={"items": wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert http.get(f"{ITEMS}/{first.id}").json()["label"] == first.label
    assert http.patch("/collections/none/items", json={"items": [good]}).status_code == 404
    assert http.patch(ITEMS, content=b"x", headers={"content-type": "text/plain"}).status_code == 415


def test_a_change_does_not_bring_a_deleted_item_back(filled, monkeypatch, tmp_path):
    http, (item, *_), _ = filled
    index = http.app.state.engine.library.index("pictures")
    again = Index(tmp_path / "index", index.encoder_id, index.dimension)
    get = index._table.get

    def get_and_lose(ids):
        rows = get(ids)
        again.delete([item.id])
        return rows

    monkeypatch.setattr(index._table, "get", get_and_lose)
    index.change({item.id: {"label": "x"}})
    assert item.id not in again.ids()


# Reading items --------------------------------------------------------------------------------------------------------


def test_pages_after_an_id_have_each_item_once_while_others_are_added_and_deleted(filled, picture):
    http, items, vectors = filled
    page = http.get(ITEMS, params={"limit": 7, "after": ""}).json()
    seen, gone = ids_of(page), ids_of(page)[:3]
    assert http.request("DELETE", ITEMS, json={"ids": gone}).status_code == 200
    model = http.get("/v1/models").json()["data"][0]["id"]
    rows = [{"id": id, "vector": vectors[0].tolist()} for id in ("-before-all-others", "z-of-no-width")]
    assert http.put(ITEMS, json={"model": model, "items": rows}).status_code == 200
    while page["next"]:
        page = http.get(ITEMS, params={"limit": 7, "after": page["next"], "filter": '{"width": 40}'}).json()
        seen += ids_of(page)
    assert seen == sorted(item.id for item in items)
    assert page["count"] == 27
    both = http.get(ITEMS, params={"after": "a", "offset": 3})
    assert (both.status_code, both.json()["error"]["param"]) == (400, "after")
    assert http.get(ITEMS, params={"after": "' or true"}).status_code == 400
    assert http.get(ITEMS).json()["next"] is None


def ids_of(page: dict) -> list[str]:
    return [item["id"] for item in page["items"]]


def test_pages_contain_every_item_once(filled):
    http, items, _ = filled
    pages = [http.get(ITEMS, params={"limit": 12, "offset": offset}).json() for offset in (0, 12, 24, 36)]
    assert [len(page["items"]) for page in pages] == [12, 12, 6, 0]
    assert {page["count"] for page in pages} == {30}
    assert {item["id"] for page in pages for item in page["items"]} == {item.id for item in items}


def test_a_filter_applies_to_pages_and_searches(filled):
    http, items, vectors = filled
    expected = {item.id for item in items if item.label == "a"}
    page = http.get(ITEMS, params={"filter": '{"label": "a"}', "limit": 100}).json()
    assert (page["count"], {item["id"] for item in page["items"]}) == (15, expected)
    query = {"positive": [vectors[1].tolist()], "filter": {"label": "a"}, "k": 30}
    order = [items[i].id for i in np.argsort(-cosines(vectors, vectors[1])) if items[i].label == "a"]
    assert ids(http.post(SEARCH, json=query)) == order
    form = {name: json.dumps(value) for name, value in query.items()}
    assert ids(http.post(SEARCH, data=form)) == order


@pytest.mark.parametrize("size", [4e17, 1e-24])
def test_vectors_of_large_and_of_small_numbers_keep_their_direction(http, bundle, size):
    vector = [size * (i % 3) for i in range(48)]
    answer = http.put(ITEMS, json={"model": bundle.card.id, "items": [{"id": "far", "vector": vector}]})
    assert answer.status_code == 200
    stored = http.get(f"{ITEMS}/far?vector=true").json()["vector"]
    np.testing.assert_allclose(stored, np.array(vector) / np.linalg.norm(vector), rtol=1e-5)
    found = http.post(SEARCH, json={"positive": [vector]}).json()["results"][0]
    assert (found["id"], found["similarity"]) == ("far", pytest.approx(1, abs=1e-5))


def test_a_fault_in_the_metadata_names_the_item_by_its_id_if_it_has_no_name(http, bundle):
    rows = [{"id": "four", "name": "", "vector": [1.0] * 48, "metadata": {"label": "z"}}]
    answer = http.put(ITEMS, json={"model": bundle.card.id, "items": rows})
    assert answer.status_code == 400 and 'four: the metadata "label" has the name' in answer.json()["error"]["message"]


def test_an_item_has_its_vector_if_requested(filled):
    http, items, vectors = filled
    assert "vector" not in http.get(f"{ITEMS}/{items[2].id}").json()
    vector = http.get(f"{ITEMS}/{items[2].id}?vector=true").json()["vector"]
    np.testing.assert_allclose(vector, vectors[2] / np.linalg.norm(vectors[2]), atol=1e-6)


def test_a_thumbnail_can_be_cached(filled, picture):
    http, items, _ = filled
    answer = http.get(f"{ITEMS}/{items[3].id}/thumbnail")
    assert answer.content == picture(3)
    assert answer.headers["content-type"] == "image/jpeg"
    assert "immutable" in answer.headers["cache-control"]
    again = http.get(f"{ITEMS}/{items[3].id}/thumbnail", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_the_thumbnail_of_a_chosen_id_is_revalidated_because_its_picture_can_change(http, picture):
    for seed in (0, 1):
        http.put(f"{ITEMS}?id=mine", content=picture(seed))
        answer = http.get(f"{ITEMS}/mine/thumbnail")
        shown = np.asarray(Image.open(io.BytesIO(answer.content)), float)
        assert np.abs(shown - np.asarray(Image.open(io.BytesIO(picture(seed))), float)).mean() < 12
        assert answer.headers["cache-control"] == "private, no-cache"


def test_collections_are_separate_and_listed(http, bundle, picture):
    assert http.get("/collections").json() == {"collections": []}
    http.put("/collections/a/items", content=picture(0))
    http.put("/collections/b/items", files=files(picture(1), picture(2)))
    listed = http.get("/collections").json()["collections"]
    assert {(one["name"], one["count"], one["encoder"]) for one in listed} == {
        ("a", 1, bundle.card.id),
        ("b", 2, bundle.card.id),
    }
    assert all(one["bytes"] > 0 for one in listed)
    assert ids(http.post("/collections/a/search", files={"image": ("q", picture(1))})) == [content_id(picture(0))]
    assert http.get("/collections/b").json()["dimension"] == 48


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path", "options"),
    [
        ("GET", "", {}),
        ("GET", "/items", {}),
        ("GET", "/items/a", {}),
        ("GET", "/items/a/thumbnail", {}),
        ("DELETE", "/items", {"params": {"id": "a"}}),
        ("DELETE", "/items/a", {}),
        ("POST", "/search", {"json": {"positive": [[1.0] * 48]}}),
        ("POST", "/search", {"json": {"positive": ["a"]}}),
    ],
)
def test_a_missing_collection_is_not_found(http, picture, method, path, options):
    http.put(ITEMS, content=picture(0))
    answer = http.request(method, f"/collections/nowhere{path}", **options)
    assert answer.status_code == 404
    assert "nowhere" in answer.json()["error"]["message"]


def test_an_emptied_collection_still_exists(http, picture):
    http.put(f"{ITEMS}?id=a", content=picture(0))
    http.delete(f"{ITEMS}/a")
    assert http.get(ITEMS).json() == {"count": 0, "items": [], "next": None}
    assert http.post(SEARCH, files={"image": ("q", picture(0))}).json()["results"] == []


# Searching ------------------------------------------------------------------------------------------------------------


def test_a_picture_finds_itself_first_and_the_rest_by_cosine(filled, bundle, picture):
    http, items, vectors = filled
    answer = http.post(SEARCH, files={"image": ("q.png", picture(7))}, data={"k": 30}).json()
    expected = cosines(vectors, vectors[7])
    order = np.argsort(-expected)
    assert answer["model"] == bundle.card.id
    assert [result["id"] for result in answer["results"]] == [items[i].id for i in order]
    np.testing.assert_allclose([result["similarity"] for result in answer["results"]], expected[order], atol=1e-5)
    first = answer["results"][0]
    assert (first["name"], first["label"], first["path"]) == ("b/7.png", "b", "/pictures/7.png")


def test_only_the_direction_of_a_vector_counts(filled):
    http, items, vectors = filled
    query = -3 * vectors[2] + vectors[5]
    expected = [items[i].id for i in np.argsort(-cosines(vectors, query))[:12]]
    by_json = http.post(SEARCH, json={"positive": [query.tolist()]}).json()
    by_form = http.post(SEARCH, data={"positive": json.dumps([query.tolist()])}).json()
    assert [result["id"] for result in by_json["results"]] == expected
    for answer in (by_json, by_form):
        for result in answer["results"]:
            result.pop("closer_than")  # learnt by a thread after the first search
    assert by_form == by_json


def test_an_item_finds_its_neighbours_but_not_itself(filled):
    http, items, vectors = filled
    order = np.argsort(-cosines(vectors, vectors[4]))[1:4]
    found = ids(http.post(SEARCH, json={"positive": [items[4].id], "k": 3}))
    assert found == [items[i].id for i in order]


def test_a_search_combines_examples_and_does_not_return_them(filled, picture):
    """Items, vectors and pictures count by their direction: checked with the formula in float64."""
    http, items, vectors = filled
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def direction(rows):
        mean = unit[rows].mean(axis=0)
        return mean / np.linalg.norm(mean)

    query = direction([1, 2, 3]) - direction([8, 9])
    form = {
        "positive": json.dumps([items[1].id, (5 * vectors[2]).tolist()]),
        "negative": json.dumps([items[8].id, vectors[9].tolist()]),
        "k": 30,
    }
    answer = http.post(SEARCH, files={"image": ("q.png", picture(3))}, data=form).json()
    expected = cosines(vectors, query)
    order = [i for i in np.argsort(-expected) if i not in (1, 8)]
    assert [result["id"] for result in answer["results"]] == [items[i].id for i in order]
    np.testing.assert_allclose([result["similarity"] for result in answer["results"]], expected[order], atol=1e-5)


def test_many_examples_on_one_side_weigh_no_more_than_one_on_the_other():
    positive, negative = np.array([1.0, 0.0]), np.array([0.0, 2.0])
    np.testing.assert_allclose(search_direction([positive] * 9, [negative]), [1, -1])
    np.testing.assert_allclose(search_direction([positive, [0, 3]]), [0.5**0.5, 0.5**0.5], rtol=1e-6)


def test_results_below_the_threshold_are_left_out(filled):
    http, items, vectors = filled
    expected = cosines(vectors, vectors[0])
    least = float(np.sort(expected)[-5]) - 1e-4
    found = ids(http.post(SEARCH, json={"positive": [vectors[0].tolist()], "threshold": least, "k": 30}))
    assert found == [items[i].id for i in np.argsort(-expected)[:5]]


# Two encoders ---------------------------------------------------------------------------------------------------------


def test_vectors_of_two_encoders_never_meet(filled, serve, make_bundle, picture, tmp_path):
    other = make_bundle(tmp_path / "other", scale=1 / 128)
    http = serve(encoder=other.folder)
    for answer in (
        http.post(SEARCH, files={"image": ("q.png", picture(1))}),
        http.put(ITEMS, content=picture(50)),
        http.get(ITEMS),
        http.delete(ITEMS, params={"id": "a"}),
    ):
        assert answer.status_code == 409
        assert answer.json()["error"]["code"] == "other_encoder"
        assert "twinview index reembed --collection pictures" in answer.json()["error"]["message"]
    assert http.put("/collections/new/items", content=picture(50)).status_code == 200
    assert filled[0].get(ITEMS).json()["count"] == 30


def test_a_second_encoder_has_its_own_collections(serve, make_bundle, bundle, picture, tmp_path, wait_until):
    other = make_bundle(tmp_path / "other", scale=1 / 128)
    http = serve(encoder=f"{bundle.folder},{other.folder}")
    named = {"model": other.card.id}
    assert http.put("/collections/b/items", params=named, content=picture(0)).json()["model"] == other.card.id
    answer = http.post("/collections/b/search", files={"image": ("q.png", picture(0))}, data=named).json()
    assert answer["model"] == other.card.id and len(answer["results"]) == 1
    assert http.get("/collections/b/items", params=named).json()["count"] == 1
    wait_until(lambda: http.get("/collections/b/items").status_code == 200, "the collection does not use its encoder")
    assert http.get("/collections/b").json()["encoder"] == other.card.id
    assert http.get("/collections/b", params={"model": "nobody"}).json()["error"]["param"] == "model"


# Refused requests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "options", "param"),
    [
        ("GET", "/collections/a.b", {}, "name"),
        ("GET", "/collections/" + "a" * 65, {}, "name"),
        ("GET", f"{ITEMS}/a b", {}, "id"),
        ("GET", f"{ITEMS}?limit=0", {}, "limit"),
        ("GET", f"{ITEMS}?limit=1001", {}, "limit"),
        ("GET", f"{ITEMS}?offset=-1", {}, "offset"),
        ("GET", f"{ITEMS}?filter=label", {}, "filter"),
        ("GET", ITEMS, {"params": {"filter": '{"label": {"like": "a"}}'}}, "filter"),
        ("PUT", ITEMS, {"data": {"metadata": "[]"}, "files": {"a": b"b"}}, "a"),
        ("PUT", ITEMS, {"data": {"metadata": "[{}]", "label": "x"}}, "label"),
        ("PUT", ITEMS, {"data": {"metadata": ["[{}]", "[{}]"]}}, "metadata"),
        ("PUT", ITEMS, {"data": {"metadata": "[]"}}, "metadata"),
        ("PUT", ITEMS, {"data": {"metadata": "{"}}, "metadata"),
        ("PUT", ITEMS, {"data": {"metadata": '[{"id": "a b"}]'}}, "metadata[0].id"),
        ("PUT", ITEMS, {"data": {"metadata": '[{"metadata": {"a": [1]}}]'}}, "metadata[0].metadata.a"),
        ("PUT", ITEMS, {"data": {"metadata": '[{"metadata": {"a-b": 1}}]'}}, "metadata[0].metadata"),
        ("PUT", f"{ITEMS}?name=a", {"data": {"metadata": "[{}]"}}, "name"),
        ("PUT", f"{ITEMS}?colour=a", {"content": b"a"}, "colour"),
        ("PUT", ITEMS, {"json": []}, None),
        ("PUT", ITEMS, {"json": {"model": "a", "items": []}}, "items"),
        ("DELETE", ITEMS, {}, "ids"),
        ("DELETE", f"{ITEMS}?id=a", {"json": {"ids": ["a"]}}, "id"),
        ("POST", SEARCH, {}, "positive"),
        ("POST", SEARCH, {"json": {"negative": [[1.0] * 48]}}, "positive"),
        ("POST", SEARCH, {"json": {"positive": [[1.0] * 48], "negative": [[2.0] * 48]}}, "negative"),
        ("POST", SEARCH, {"json": {"positive": [[1, 2]]}}, "positive[0]"),
        ("POST", SEARCH, {"json": {"positive": [["a"]]}}, "positive[0][0]"),
        ("POST", SEARCH, {"json": {"positive": ["a b"]}}, "positive[0]"),
        ("POST", SEARCH, {"json": {"positive": ["a"], "threshold": 1.5}}, "threshold"),
        ("POST", SEARCH, {"json": {"positive": ["a"], "filter": {"label": {"like": "b"}}}}, "filter"),
        ("POST", SEARCH, {"data": {"positive": "[1,"}}, "positive"),
        ("POST", SEARCH, {"files": {"image": ("a", b"b")}, "data": {"k": 1001}}, "k"),
        ("POST", SEARCH, {"files": {"negative": ("a", b"b")}}, "negative"),
    ],
)
def test_a_malformed_field_is_named(http, picture, method, path, options, param):
    if "data" in options and method == "PUT" and "files" not in options:
        options = {**options, "files": files(picture(0))}
    answer = http.request(method, path, **options)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_too_many_items_in_a_request_are_refused(serve, picture, bundle):
    http = serve(limits=Limits(images=2, rows=3))
    rows = [{"id": str(i), "vector": [1.0] * 48} for i in range(4)]
    for most, answer in (
        ("2", http.put(ITEMS, files=files(*map(picture, range(3))))),
        ("3", http.put(ITEMS, json={"model": bundle.card.id, "items": rows})),
        ("3", http.request("DELETE", ITEMS, json={"ids": list("abcd")})),
    ):
        assert answer.status_code == 413
        assert most in answer.json()["error"]["message"]


def test_requests_are_refused_while_too_many_reads_or_writes_wait(serve, picture, bundle):
    http = serve(limits=Limits(rows_at_once=1, reads_at_once=0))
    rows = [{"id": str(i), "vector": [1.0] * 48} for i in range(2)]
    for answer, what in (
        (http.put(ITEMS, json={"model": bundle.card.id, "items": rows}), "rows to write"),
        (http.put(ITEMS, files=files(picture(0), picture(1))), "rows to write"),
        (http.delete(ITEMS, params={"id": ["a", "b"]}), "rows to write"),
        (http.get(ITEMS), "reads of collections"),
    ):
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert what in answer.json()["error"]["message"]


def test_collections_need_a_key(serve, picture):
    http = serve(access=Access.from_keys("k"))
    assert http.put(ITEMS, content=picture(0)).status_code == 401
    assert http.delete(f"{ITEMS}/a").status_code == 401
    assert http.put(ITEMS, content=picture(0), headers={"Authorization": "Bearer k"}).status_code == 200


# Errors of the index --------------------------------------------------------------------------------------------------


def test_a_damaged_index_is_named_and_does_not_stop_the_encoder(serve, fill, picture, tmp_path):
    fill(3)
    for manifest in (tmp_path / "index").glob("*.lance/_versions/*.manifest"):
        manifest.write_bytes(b"garbage")
    http = serve()
    for answer in (
        http.post(SEARCH, files={"image": ("q.png", picture(1))}),
        http.get(ITEMS),
        http.put(ITEMS, content=picture(9)),
    ):
        assert answer.status_code == 503
        assert answer.json()["error"]["message"].startswith("the index cannot be read (")
    assert http.post("/embed", files=files(picture(1))).status_code == 200
    assert http.get("/readyz").status_code == 200
    assert http.get(f"{ITEMS}/{content_id(picture(1))}/thumbnail").content == picture(1)
    assert http.put("/collections/other/items", content=picture(9)).status_code == 200


def test_an_index_that_is_a_file_is_named(serve, picture, tmp_path):
    (tmp_path / "index").write_text("not a folder")
    http = serve()
    message = http.put(ITEMS, content=picture(0)).json()["error"]["message"]
    assert message.startswith("the index cannot be written (Not a directory)")
    assert http.post("/embed", files=files(picture(1))).status_code == 200


@pytest.mark.parametrize("blank", ["", " ", "\u3000\t"])
def test_a_blank_label_is_none(http, fill, picture, blank):
    [item] = fill(1)
    assert http.patch(ITEMS, json={"items": [{"id": item.id, "label": " hat"}]}).status_code == 200
    assert http.get(f"{ITEMS}/{item.id}").json()["label"] == " hat"
    http.patch(ITEMS, json={"items": [{"id": item.id, "label": blank}]})
    assert http.get(f"{ITEMS}/{item.id}").json()["label"] is None
    named = {"Content-Type": "image/png"}
    stored = http.put(ITEMS, content=picture(5), headers=named, params={"id": "own", "label": blank})
    assert stored.status_code == 200, stored.text
    assert http.get(f"{ITEMS}/own").json()["label"] is None


@pytest.mark.parametrize(("why", "status"), [("Input/output error", 503), ("No space left on device", 507)])
def test_the_place_of_the_index_is_in_the_log_only(filled, picture, monkeypatch, caplog, tmp_path, why, status):
    http, *_ = filled
    place = str(tmp_path / "index")

    def fail(*_, **__):
        raise OSError(f"LanceError(IO): {why}: {place.strip('/')}/pictures.lance")  # as LanceDB writes it

    monkeypatch.setattr("serving.collection.table.LanceTable.upsert", fail)
    answer = http.put(ITEMS, content=picture(40))
    assert answer.status_code == status
    assert "the index" in answer.json()["error"]["message"]
    assert tmp_path.name not in answer.text
    assert place in caplog.text


def test_a_full_disk_is_reported_and_reading_still_works(filled, picture, monkeypatch):
    http, items, _ = filled

    def full(*_, **__):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            from serving.collection.index import IndexProblem

            raise IndexProblem("the collection pictures cannot be written (No space left on device)") from error

    monkeypatch.setattr(Index, "upsert", full)
    answer = http.put(ITEMS, content=picture(40))
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "disk_full")
    assert "No space left" in answer.json()["error"]["message"]
    assert ids(http.post(SEARCH, json={"positive": [items[0].id]}))
    assert http.post("/embed", files=files(picture(1))).status_code == 200


@pytest.mark.slow
def test_embedding_works_while_reads_of_the_collection_are_blocked(filled, picture, monkeypatch):
    http, _, _ = filled
    go_on = threading.Event()
    count = Index.count

    def slow(*arguments, **options):
        assert go_on.wait(PATIENCE_S)
        return count(*arguments, **options)

    monkeypatch.setattr(Index, "count", slow)
    with ThreadPoolExecutor(60) as pool:
        pages = [pool.submit(http.get, ITEMS) for _ in range(60)]
        for i in range(10):
            assert http.post("/embed", files=files(picture(i))).status_code == 200
        assert not any(page.done() for page in pages)
        go_on.set()
        assert all(page.result().status_code == 200 for page in pages)


def test_client_and_service_have_the_same_default_collection():
    assert COLLECTION == DEFAULT


# Keys -----------------------------------------------------------------------------------------------------------------


def test_keys_have_their_most_common_values_and_numbers_their_range(http, picture):
    prices, labels = [1.0, 2.0, 2.0, 9.0], ["hat", "hat", "shoe", None]
    facts = [{"label": label, "metadata": {"price": price}} for label, price in zip(labels, prices, strict=True)]
    facts[0]["metadata"] |= {"sold": True}
    http.put(ITEMS, files=files(*map(picture, range(4))), data={"metadata": json.dumps(facts)})
    label, price, sold = http.get("/collections/pictures/keys").json()["keys"]
    assert (label["key"], label["type"], label["distinct"], label["least"]) == ("label", "text", 2, None)
    assert label["values"] == [["hat", 2], ["shoe", 1]]
    assert (price["key"], price["type"], price["distinct"], price["values"][0]) == ("price", "number", 3, [2.0, 2])
    assert (price["least"], price["median"], price["most"]) == (1.0, 2.0, 9.0)
    assert (sold["key"], sold["type"], sold["values"]) == ("sold", "truth", [[True, 1]])


def test_only_the_most_common_of_many_values_are_listed(http, picture):
    facts = [{"label": f"{i // 2}" if i < 4 else f"{i}"} for i in range(26)]
    http.put(ITEMS, files=files(*map(picture, range(26))), data={"metadata": json.dumps(facts)})
    (label,) = http.get("/collections/pictures/keys").json()["keys"]
    assert label["distinct"] == 24 and len(label["values"]) == 20
    assert sorted(label["values"][:2]) == [["0", 2], ["1", 2]]


def test_a_missing_collection_has_no_keys_and_bare_items_have_none(http, picture):
    assert http.get("/collections/pictures/keys").status_code == 404
    http.put(ITEMS, files=files(picture(0)))
    assert http.get("/collections/pictures/keys").json() == {"keys": []}


# Bodies that would stop the service -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("DELETE", "/collections/a/items", b'{"ids": [%s]}'),
        ("PUT", "/collections/a/items", b'{"model": "x", "items": [%s]}'),
        ("PUT", "/collections/a/items", b'{"model": "x", "items": [{"id": "a", "vector": [%s]}]}'),
        ("POST", "/collections/a/search", b'{"positive": [%s]}'),
        ("POST", "/v1/embeddings", b'{"input": [%s]}'),
    ],
)
def test_only_the_first_of_many_errors_is_looked_for(http, monkeypatch, method, path, body):
    found = []
    malformed = errors.malformed
    monkeypatch.setattr(errors, "malformed", lambda several, *kind: found.append(len(several)) or malformed(several))
    content = body % b",".join([b"{}"] * 2000)
    answer = http.request(method, path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 413)
    assert sum(found) <= 8  # a {} as an item lacks several fields


def test_a_body_of_too_many_keys_is_refused_before_it_is_parsed(http):
    keys = b",".join(b'"k%d": 0' % i for i in range(30_000))
    answer = http.post("/collections/a/search", content=b"{%s}" % keys, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"id": "b", "vector": [1.0, "x"]},
            'items[1].vector[1]: "x" is text, a number is needed',
        ),
        (
            {"id": "b", "vector": [1.0], "other": 1},
            "items[1].other: is not a field here; known are id, name, label, path, metadata, vector",
        ),
        ({f"k{i}": 1 for i in range(2000)}, "items[1]: has more than 1024 keys"),
    ],
)
def test_rows_in_a_large_body_are_checked_like_those_in_a_small_one(http, bundle, row, message):
    large = {"id": "a", "vector": [0.5] * 48, "name": "x" * 4096}
    rows = [large, row, *({**large, "id": str(i)} for i in range(80))]
    answer = http.put("/collections/a/items", json={"model": bundle.card.id, "items": rows})
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(message)
    del rows[1]
    answer = http.put("/collections/a/items", json={"model": bundle.card.id, "items": rows})
    assert answer.status_code == 200 and len(answer.json()["items"]) == 81


# Whole collections ----------------------------------------------------------------------------------------------------


def test_several_searches_are_answered_as_each_alone(filled):
    http, items, vectors = filled
    searches = [
        {"positive": [items[0].id], "k": 3},
        {"positive": [vectors[1].tolist()], "negative": [items[2].id], "k": 5, "filter": {"label": "a"}},
        {"positive": [items[3].id], "threshold": 0.5},
    ]

    def without_rank(answer: dict) -> dict:  # which a thread learns meanwhile
        return answer | {"results": [match | {"closer_than": None} for match in answer["results"]]}

    together = http.post("/collections/pictures/searches", json={"searches": searches}).json()["answers"]
    alone = [http.post(SEARCH, json=search).json() for search in searches]
    assert list(map(without_rank, together)) == list(map(without_rank, alone))
    assert [len(answer["results"]) for answer in together[:2]] == [3, 5]
    for wrong, param in (
        ([searches[0], {}], "searches[1].positive"),
        ([searches[0], {"positive": ["nothing"]}], "searches[1].positive[0]"),
        ([{"positive": [items[0].id], "filter": {"label": {"like": 1}}}], "searches[0].filter"),
        ([{"positive": [items[0].id], "threshold": 0, "closer_than": 0}], "searches[0].closer_than"),
        ([], "searches"),
        ([searches[0]] * 101, "searches"),
    ):
        answer = http.post("/collections/pictures/searches", json={"searches": wrong})
        assert (answer.status_code in (400, 404), answer.json()["error"]["param"]) == (True, param), answer.text


def test_a_collection_is_created_empty_and_deleted_with_all_its_files(filled, tmp_path, picture):
    http, items, _ = filled
    assert http.put("/collections/new").json()["count"] == 0
    assert http.put("/collections/pictures").json()["count"] == 30  # it exists
    assert {facts["name"] for facts in http.get("/collections").json()["collections"]} == {"new", "pictures"}
    Index(tmp_path / "index", "another", 3).upsert(items[:1], np.ones((1, 3)), allow_other_encoder=True)
    assert http.delete(f"{ITEMS}/{items[1].id}").status_code == 200
    assert http.delete("/collections/pictures").json() == {"dropped": "pictures", "count": 29}
    assert http.get("/collections/pictures").status_code == http.get(ITEMS).status_code == 404
    assert http.delete("/collections/pictures").status_code == 404
    left = {path for path in (tmp_path / "index").rglob("*") if path.is_file() and "pictures" in str(path.parent.name)}
    assert not [path for path in left if ".leases" not in str(path)]
    assert http.put(ITEMS, files=files(picture(0))).json()["items"][0]["new"] is True
    assert http.get(ITEMS).json()["count"] == 1


def test_changes_are_listed_and_undone(filled):
    http, items, _ = filled
    assert http.delete(f"{ITEMS}/{items[0].id}").status_code == 200
    newest, before = http.get("/collections/pictures/changes").json()["changes"]
    assert (newest["text"], newest["deleted"], newest["next"], newest["undone"]) == ("deleted 1 item", 1, True, False)
    assert (before["text"], before["added"], before["next"], before["undone"]) == ("added 30 items", 30, False, False)
    assert newest["at"] >= before["at"]
    answer = http.delete("/collections/pictures/changes/newest").json()
    assert (answer["undone"], answer["count"]) == (newest | {"undone": True, "next": False}, 30)
    assert http.get(f"{ITEMS}/{items[0].id}/thumbnail").status_code == 200
    assert http.delete(f"/collections/pictures/changes/{newest['id']}").status_code == 404
    again = http.delete(f"/collections/pictures/changes/{answer['id']}").json()
    assert (again["undone"]["text"], again["count"]) == ("undid: deleted 1 item", 29)
    undos = http.get("/collections/pictures/changes").json()["changes"][:2]
    assert [one["text"] for one in undos] == ["redid: deleted 1 item", "undid: deleted 1 item"]
    assert http.delete("/collections/pictures/changes/newest").json()["undone"]["id"] == newest["id"]
    assert http.delete("/collections/none/changes/newest").status_code == 404
    assert http.get("/collections/none/changes").status_code == 404


def test_damage_is_reported_without_the_indexs_place(filled, tmp_path):
    http, *_ = filled
    assert http.get("/collections/pictures/problems").json() == {"problems": []}
    (file,) = (tmp_path / "index").glob("pictures.*.lance/data/*")
    file.write_bytes(file.read_bytes()[:100])
    problems = " ".join(http.get("/collections/pictures/problems").json()["problems"])
    assert f"{file.name} cannot be read" in problems
    assert str(tmp_path) not in problems
    assert http.get("/collections/none/problems").status_code == 404


def test_new_vectors_of_an_item_keep_the_size_path_and_original_of_its_picture(http, picture):
    file = picture(1)
    answer = http.put(ITEMS, files=files(file), data={"metadata": '[{"path": "/pictures/1.png"}]'}).json()
    [put], model = answer["items"], answer["model"]
    before = http.get(f"{ITEMS}/{put['id']}").json()
    row = {"id": put["id"], "vector": [1.0] * 48, "label": "new"}
    body = {"model": model, "items": [row, {"id": "other", "vector": [1.0] * 48}]}
    assert http.put(ITEMS, json=body).status_code == 200
    after = http.get(f"{ITEMS}/{put['id']}").json()
    size = ("width", "height", "bytes", "path")
    assert {key: after[key] for key in size} == {key: before[key] for key in size}
    assert (after["label"], after["bytes"], after["path"]) == ("new", len(file), "/pictures/1.png")
    assert http.get(f"{ITEMS}/{put['id']}/original").status_code == 200
    assert http.get(f"{ITEMS}/other").json()["bytes"] == 0
