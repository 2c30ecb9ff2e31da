"""How many metadata keys a collection may have, and what becomes of keys that no item has any more."""

import json

import numpy as np
import pytest

from serving.collection.index import Index, Item
from serving.collection.problems import BadItem

D = 8


@pytest.fixture
def index(tmp_path) -> Index:
    return Index(tmp_path / "index", "enc-1", D)


def made(number: int, metadata: dict) -> tuple[list[Item], np.ndarray]:
    vector = np.random.default_rng(number).normal(size=(1, D)).astype(np.float32)
    return [Item(str(number), f"{number}.png", None, None, 4, 3, 10, metadata)], vector


def test_a_collection_has_a_limited_number_of_keys_and_forgets_unused_ones(index):
    index.upsert(*made(1, {"size": 1}))
    many = {f"k{i}": i for i in range(256)}
    with pytest.raises(BadItem, match="has 1 metadata keys and would have 257; at most 256 are allowed"):
        index.upsert(*made(2, many))
    many.pop("k255")
    index.upsert(*made(2, many))
    index.delete(["2"])
    assert len(index.keys()) == 256
    index.maintain()
    assert index.keys() == {"size": int}
    assert index.get("1")[0].metadata == {"size": 1}


def test_unused_keys_make_room_for_new_ones(index):
    index.upsert(*made(1, {f"k{i}": i for i in range(256)}))
    index.delete(["1"])
    index.upsert(*made(2, {"k0": 0.5, "size": 1}))
    assert index.keys() == {"k0": float, "size": int}
    assert index.get("2")[0].metadata == {"k0": 0.5, "size": 1}


def test_a_request_with_too_many_keys_is_refused(http, picture):
    item = {"metadata": {f"k{i}": i for i in range(257)}}
    files = {"images": ("a.png", picture(0)), "metadata": (None, json.dumps([item]))}
    answer = http.put("/collections/pictures/items", files=files)
    assert answer.status_code == 400
    assert "at most 256 are allowed" in answer.json()["error"]["message"]
