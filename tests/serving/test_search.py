import json

import numpy as np
import pytest


def cosines(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """In float64; (n, d) and (d,)."""
    vectors, query = np.float64(vectors), np.float64(query)
    return vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)


@pytest.fixture
def filled(serve, fill, picture):
    """A service with 30 pictures, their items, and their vectors as the service embeds them."""
    http, items = serve(), fill(30)
    files = [("images", (f"{i}.png", picture(i))) for i in range(30)]
    return http, items, np.array(http.post("/embed", files=files).json()["embeddings"])


def test_a_picture_finds_itself_first_and_the_rest_by_cosine(filled, bundle, picture):
    http, items, vectors = filled
    answer = http.post("/search", files={"image": ("q.png", picture(7))}, data={"k": 30}).json()
    expected = cosines(vectors, vectors[7])
    order = np.argsort(-expected)
    assert answer["model"] == bundle.card.id
    assert [result["id"] for result in answer["results"]] == [items[i].id for i in order]
    np.testing.assert_allclose([result["similarity"] for result in answer["results"]], expected[order], atol=1e-5)
    assert answer["results"][0] == {
        "id": items[7].id,
        "name": "b/7.png",
        "label": "b",
        "path": "/pictures/7.png",
        "similarity": pytest.approx(1, abs=1e-5),
    }


def test_a_vector_of_any_length_finds_what_its_direction_finds(filled):
    http, items, vectors = filled
    query = -3 * vectors[2] + vectors[5]
    expected = [items[i].id for i in np.argsort(-cosines(vectors, query))[:12]]
    by_json = http.post("/search", json={"vector": query.tolist()}).json()
    by_form = http.post("/search", data={"vector": json.dumps(query.tolist())}).json()
    assert [result["id"] for result in by_json["results"]] == expected
    assert by_form == by_json


def test_an_item_finds_its_neighbours_without_itself(filled):
    http, items, vectors = filled
    answer = http.post("/search", json={"id": items[4].id, "k": 3}).json()
    order = np.argsort(-cosines(vectors, vectors[4]))[1:4]
    assert [result["id"] for result in answer["results"]] == [items[i].id for i in order]


def test_searching_a_collection_that_is_not_there_finds_nothing(http, picture):
    assert http.post("/search", files={"image": ("q.png", picture(1))}).json()["results"] == []
    assert http.get("/items").json() == {"count": 0, "items": []}


def test_items_come_in_pages_that_cover_the_collection_once(filled):
    http, items, _ = filled
    pages = [http.get("/items", params={"limit": 12, "offset": offset}).json() for offset in (0, 12, 24, 36)]
    assert [len(page["items"]) for page in pages] == [12, 12, 6, 0]
    assert {page["count"] for page in pages} == {30}
    assert {item["id"] for page in pages for item in page["items"]} == {item.id for item in items}


def test_a_thumbnail_may_be_kept_by_whoever_asked(filled, picture):
    http, items, _ = filled
    answer = http.get(f"/items/{items[3].id}/thumbnail")
    assert answer.content == picture(3)
    assert answer.headers["content-type"] == "image/jpeg"
    assert "immutable" in answer.headers["cache-control"]


def test_vectors_of_two_encoders_never_meet(filled, serve, make_bundle, picture, tmp_path):
    other = make_bundle(tmp_path / "other", scale=1 / 128)
    http = serve(encoder=other.folder)
    assert http.post("/search", files={"image": ("q.png", picture(1))}).json() == {
        "model": other.card.id,
        "results": [],
    }


def test_a_damaged_index_is_named_and_does_not_stop_the_encoder(bundle, serve, fill, picture, tmp_path):
    fill(3)
    for manifest in (tmp_path / "index" / f"{bundle.card.id}.lance" / "_versions").glob("*.manifest"):
        manifest.write_bytes(b"")
    http = serve()
    answer = http.post("/search", files={"image": ("q.png", picture(1))})
    assert answer.status_code == 503
    assert str(tmp_path / "index") in answer.json()["error"]["message"]
    assert "move it away" in answer.json()["error"]["message"]
    assert http.post("/embed", files={"images": ("q.png", picture(1))}).status_code == 200
    assert http.get("/readyz").status_code == 200


def test_an_index_that_is_a_file_is_named(serve, picture, tmp_path):
    (tmp_path / "index").write_text("not a folder")
    http = serve()
    assert http.get("/items").json() == {"count": 0, "items": []}
    assert http.post("/embed", files={"images": ("q.png", picture(1))}).status_code == 200
