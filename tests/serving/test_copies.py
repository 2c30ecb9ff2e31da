"""Items of one collection, put into another over HTTP."""

import pytest

from serving.collection.index import Index
from tests.serving.test_collections import files

COPIES, MINE = "/collections/mine/copies", "/collections/mine/items"


@pytest.fixture
def copy(serve, fill, tmp_path, bundle):
    """(http, items, copy): 3 pictures of a folder, and copy(*ids) -> what a copy into `mine` answers."""
    http, items = serve(), fill(3)
    Index(tmp_path / "index", bundle.card.id, bundle.card.dimension).add_folders(["/pictures"])

    def call(*ids: str) -> list[str]:
        answer = http.put(COPIES, json={"collection": "pictures", "ids": list(ids)})
        assert answer.status_code == 200, answer.text
        return answer.json()["copied"]

    return http, items, call


def test_a_copy_has_all_that_belongs_to_the_item(copy, picture, bundle, tmp_path):
    http, items, call = copy
    upload = http.put("/collections/pictures/items", files=files(picture(7))).json()["items"][0]["id"]
    assert call(items[0].id, upload, "nothing") == [items[0].id, upload]
    for id in (items[0].id, upload):
        theirs, ours = (f"/collections/{name}/items/{id}" for name in ("pictures", "mine"))
        with_vector = {"params": {"vector": "true"}}
        assert http.get(ours, **with_vector).json() == http.get(theirs, **with_vector).json()
        assert http.get(f"{ours}/thumbnail").content == http.get(f"{theirs}/thumbnail").content
    assert http.get(f"{MINE}/{upload}/original").status_code == 200
    copied = Index(tmp_path / "index", bundle.card.id, bundle.card.dimension, "mine")
    assert copied.folders() == ["/pictures"]  # so that the originals of the others can be read too


def test_items_that_are_there_already_stay_as_they_are(copy):
    http, items, call = copy
    assert call(items[0].id) == [items[0].id]
    http.patch(MINE, json={"items": [{"id": items[0].id, "label": "mine"}]})
    assert call(items[0].id, items[1].id) == [items[1].id]
    assert http.get(f"{MINE}/{items[0].id}").json()["label"] == "mine"
    assert http.get("/collections/pictures/items").json()["count"] == 3
