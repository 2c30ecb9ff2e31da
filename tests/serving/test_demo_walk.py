"""The demo on one set, on another, and again after a picture was added: with real collections, without training."""

import contextlib
import json
from itertools import pairwise
from pathlib import Path

import pytest

import demo
from export.artifact import CARD
from serving import bulk
from serving.collection.index import Index, collections, existing_collections


@pytest.fixture
def walk(tmp_path, monkeypatch, make_bundle):
    """walk(folder) runs the demo; returns what it trained and the names in the collection that its page opens on."""
    monkeypatch.chdir(tmp_path)
    trained, opened = [], []

    def run(*words: str, quiet: bool = False) -> None:
        given = dict(pairwise(words))
        if words[0] == "export/to_onnx.py":
            folder = Path(given.get("--out") or f"{words[1]}/encoder")
            if not folder.exists():
                scale = 1 / (256 + len(list(Path("runs").glob("*/encoder"))))  # each has its own id
                make_bundle(folder, scale)
        elif words[0] == "serving/bulk.py":
            bulk.run(
                bulk.BulkSettings(
                    data=given["--data"],
                    encoder=given["--encoder"],
                    collection=given["--collection"],
                    reembed="--reembed" in words,
                )
            )
        elif words[0] == "training/evaluate.py":
            encoders = words[1 : words.index("--data")]
            rows = [{"encoder": name, "knn": 0.5, "asked": 9} for name in encoders]
            Path(given["--out"]).with_suffix(".json").write_text(json.dumps({"rows": rows}))
        else:
            trained.append(given["--name"])

    @contextlib.contextmanager
    def service(settings, encoders, collection):
        yield lambda: opened.append((collection, encoders))

    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(demo, "service", service)

    def go(folder: str) -> tuple[list[str], set[str]]:
        trained.clear()
        demo.demo(demo.DemoSettings(data=folder, port=0))
        collection, encoders = opened[-1]
        served = {json.loads((encoder / CARD).read_text())["id"] for encoder in encoders}
        tables = existing_collections("index", collection)
        assert {table.encoder for table in tables} == served  # every encoder on offer finds every picture
        (names,) = {
            frozenset(item.name for item in Index("index", table.encoder, table.dimension, collection).page(99))
            for table in tables
        }
        return list(trained), set(names)

    return go


@pytest.mark.parametrize("has_lite0", [False, True])
def test_each_set_has_its_own_collection_and_a_new_picture_is_found_without_training(
    walk, tmp_path, monkeypatch, picture, has_lite0
):
    monkeypatch.setattr(demo, "has_lite0", lambda: has_lite0)
    for folder, seeds in (("a", range(4)), ("b", range(10, 14))):
        (tmp_path / folder).mkdir()
        for seed in seeds:
            (tmp_path / folder / f"{folder}{seed}.png").write_bytes(picture(seed))
    trained_a, found_a = walk("a")
    trained_b, found_b = walk("b")
    assert found_a == {"a0.png", "a1.png", "a2.png", "a3.png"}
    assert found_b == {"b10.png", "b11.png", "b12.png", "b13.png"}
    assert trained_a and trained_b and not {*trained_a} & {*trained_b}
    (tmp_path / "b" / "new.png").write_bytes(picture(20))
    assert walk("b") == ([], found_b | {"new.png"})
    assert walk("a") == ([], found_a)
    assert len({table.name for table in collections("index")}) == 2
