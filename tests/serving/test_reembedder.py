"""Embedding a collection again over HTTP, in the background of a real service in this process."""

import asyncio
import threading

import numpy as np
import pytest

from export.artifact import read_pixels
from serving.access import Access
from serving.api.collections import refusal
from serving.collection.index import Index, WrongEncoder, content_id
from serving.collection.items import Item
from serving.collection.reembedding import NO_ORIGINAL, Reembedding
from serving.library import Library
from tests.conftest import PATIENCE_S

PATH, ITEMS = "/collections/pictures/reembedding", "/collections/pictures/items"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """New exports are found, and complete collections are noticed, as soon as possible."""
    monkeypatch.setattr("serving.inference.served.CHECK_EVERY_S", 0.05)
    monkeypatch.setattr("serving.inference.served.COUNT_EVERY_S", 3600)  # only when the work is done
    monkeypatch.setattr("serving.reembedder.LOOK_S", 0.05)


@pytest.fixture
def new(make_bundle, tmp_path):
    return make_bundle(tmp_path / "new", 1 / 128)


@pytest.fixture
def index(bundle, tmp_path) -> Index:
    return Index(tmp_path / "index", bundle.card.id, bundle.card.dimension)


@pytest.fixture
def both(serve, bundle, new):
    """A service whose default encoder is the new one; it serves the old one too."""
    return lambda: serve(f"{new.folder},{bundle.folder}")


@pytest.fixture
def upload(picture):
    """upload(http, model, *numbers) -> the ids of the pictures"""

    def put(http, model: str, *numbers: int) -> list[str]:
        files = [("images", (f"{i}.png", picture(i))) for i in numbers]
        answer = http.put(ITEMS, files=files, params={"model": model})
        assert answer.status_code == 200, answer.text
        return [item["id"] for item in answer.json()["items"]]

    return put


@pytest.fixture
def ended(wait_until):
    """ended(http) -> the progress of work that has ended"""

    def wait(http, *states: str) -> dict:
        states = states or ("done", "incomplete", "failed")
        wait_until(lambda: http.get(PATH).json()["state"] in states, "it does not end")
        return http.get(PATH).json()

    return wait


def used(http) -> str:
    """The encoder that the collection uses."""
    answer = http.get("/collections/pictures")
    assert answer.status_code == 200, answer.text
    return answer.json()["encoder"]


def test_uploads_are_taken_over_by_one_call_and_searches_go_on(both, bundle, new, upload, ended, picture, wait_until):
    http = both()
    ids = upload(http, bundle.card.id, *range(20))
    wait_until(lambda: http.get(ITEMS).status_code == 200, "the encoder of the new collection is not noticed")
    assert used(http) == bundle.card.id
    assert http.get(PATH).json()["state"] == "none"
    answer = http.put(PATH)
    assert (answer.status_code, answer.json()["model"], answer.json()["state"]) == (202, new.card.id, "waiting")
    search = http.post("/collections/pictures/search", json={"positive": ids[:1], "k": 3})
    assert search.status_code == 200 and len(search.json()["results"]) == 3
    done = ended(http)
    assert (done["state"], done["done"], done["total"], done["skipped"]) == ("done", 20, 20, 0)
    wait_until(lambda: used(http) == new.card.id, "the collection does not switch")
    found = http.post("/collections/pictures/search", files=[("image", ("a.png", picture(3)))], data={"k": "1"}).json()
    assert (found["model"], found["results"][0]["id"]) == (new.card.id, content_id(picture(3)))


def test_items_without_an_original_keep_the_old_encoder_until_somebody_goes_on_without(
    both, bundle, new, upload, ended, index, wait_until
):
    http = both()
    upload(http, bundle.card.id, 1, 2)
    vector = [1.0] * bundle.card.dimension
    http.put(ITEMS, json={"model": bundle.card.id, "items": [{"id": "bare", "name": "a vector", "vector": vector}]})
    http.put(PATH)
    told = ended(http)
    assert (told["state"], told["skipped"]) == ("incomplete", 1)
    assert told["first_skipped"] == [{"id": "bare", "name": "a vector", "reason": NO_ORIGINAL}]
    wait_until(lambda: http.get(ITEMS).status_code == 200, "the encoder of the new collection is not noticed")
    assert used(http) == bundle.card.id
    http.put(PATH, params={"without_skipped": True})
    assert ended(http, "done")["skipped"] == 1
    wait_until(lambda: used(http) == new.card.id, "the collection does not switch")


def test_a_broken_original_is_skipped_by_name(both, bundle, upload, ended, index, picture):
    http = both()
    good, broken, cut = upload(http, bundle.card.id, 1, 2, 3)
    index.store.write(index.files.path("originals", broken), b"x" * len(picture(2)))
    index.store.write(index.files.path("originals", cut), picture(3)[:50])
    http.put(PATH)
    told = ended(http)
    assert (told["state"], told["done"]) == ("incomplete", 1)
    reasons = {one["id"]: one["reason"] for one in told["first_skipped"]}
    assert reasons.keys() == {broken, cut}
    assert reasons[broken].startswith("cannot be embedded: its file is not an image")
    assert reasons[cut] == NO_ORIGINAL
    assert good not in reasons


def test_files_of_indexed_folders_are_read_again_and_others_are_not(both, bundle, new, index, ended, picture, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    index.add_folders([str(folder)])
    for i, place in enumerate((folder, tmp_path)):
        path = place / f"{i}.png"
        path.write_bytes(picture(i))
        item = Item(content_id(picture(i)), f"{i}.png", None, str(path), 40, 30, len(picture(i)))
        index.upsert([item], [[1.0] * 48])
    http = both()
    http.put(PATH)
    told = ended(http)
    assert (told["done"], [one["name"] for one in told["first_skipped"]]) == (1, ["1.png"])
    assert str(tmp_path) not in str(told)


def test_work_goes_on_after_a_restart(both, bundle, new, upload, ended, index):
    http = both()
    ids = upload(http, bundle.card.id, *range(12))
    http.app.state.reembedder.close()
    http.put(PATH)
    http.__exit__(None, None, None)
    target = Index(index.store.uri, new.card.id, new.card.dimension)
    assert Reembedding(target).progress().state == "waiting"
    again = both()
    assert ended(again)["done"] == 12
    assert target.ids() == set(ids)


@pytest.mark.parametrize("gone", [False, True], ids=["stopped", "closed"])
def test_work_in_the_middle_ends_when_it_is_stopped_or_the_service_is(
    both, bundle, new, upload, ended, monkeypatch, wait_until, gone
):
    http = both()
    upload(http, bundle.card.id, *range(12))
    begun, go_on = threading.Event(), threading.Event()
    embed = Library.embed_again

    async def held(self, files, encoder):
        begun.set()
        await asyncio.to_thread(go_on.wait, 60)
        return await embed(self, files, encoder)

    monkeypatch.setattr("serving.collection.reembedding.FILES_TOGETHER", 2)
    monkeypatch.setattr(Library, "embed_again", held)
    http.put(PATH)
    assert begun.wait(PATIENCE_S)
    assert http.get(PATH).json()["state"] == "running"
    if gone:
        closing = threading.Thread(target=http.app.state.reembedder.close)
        closing.start()
        wait_until(http.app.state.reembedder._closing.is_set, "it is not closing")
        go_on.set()
        closing.join(PATIENCE_S)
        assert not http.app.state.reembedder._thread.is_alive()
    else:
        assert http.delete(PATH).json()["state"] == "stopped"
        go_on.set()
    count = http.get("/collections/pictures", params={"model": new.card.id}).json()["count"]
    assert count < 12
    if not gone:
        monkeypatch.setattr(Library, "embed_again", embed)
        http.put(PATH)
        assert ended(http)["done"] == 12


def test_what_is_added_with_the_old_encoder_after_the_end_is_taken_over_too(
    both, bundle, new, upload, ended, index, wait_until
):
    http = both()
    upload(http, bundle.card.id, 1)
    http.put(PATH)
    ended(http)
    wait_until(lambda: used(http) == new.card.id, "the collection does not switch")
    [late] = upload(http, bundle.card.id, 2)
    target = Index(index.store.uri, new.card.id, new.card.dimension)
    wait_until(lambda: late in target.ids(), "the late item is not taken over")
    http.app.state.engine.library.recount()
    assert used(http) == new.card.id


def test_the_clients_start_look_and_stop(both, bundle, new, upload, connect, ended):
    http = both()
    upload(http, bundle.card.id, 1, 2)
    client = connect(http)
    assert client.reembedding().state == "none"
    assert client.reembed().model == new.card.id
    assert ended(http)["state"] == "done"
    assert (client.reembedding().done, client.stop_reembedding().state) == (2, "done")
    assert client.reembedding(model=bundle.card.id).model == bundle.card.id


def test_items_that_only_a_lost_encoder_has_embedded_are_found_by_estimates(
    serve, bundle, new, picture, means, ended, connect, monkeypatch, tmp_path
):
    monkeypatch.setattr("serving.collection.upgrade.LEAST_PAIRS", 60)
    monkeypatch.setattr("serving.collection.upgrade.CHECK_S", 0)
    files = {content_id(picture(i)): picture(i) for i in range(120)}
    pixels = np.stack([read_pixels(data, bundle.card.preprocessing) for data in files.values()])
    turned = means(pixels) @ np.linalg.qr(np.random.default_rng(0).normal(size=(48, 48)))[0]
    lost = Index(tmp_path / "index", "lost", 48)
    items = [Item(id, id, None, None, 40, 30, len(data)) for id, data in files.items()]
    kept = dict(list(files.items())[:90])  # the others have no original, so the work stays incomplete
    lost.upsert(items, turned, dict.fromkeys(kept, b"thumbnail"), False, kept)
    http = serve(new.folder)
    assert http.put(PATH).status_code == 202
    assert ended(http)["state"] == "incomplete"
    client = connect(http)
    for id in list(files)[88:92]:
        by_picture, by_id = client.search(files[id], k=3), client.search(positive=[id], k=3)
        assert (by_picture.model, by_picture.estimated, by_id.estimated) == (new.card.id, True, True)
        assert by_picture.results[0].id == id
        assert len(by_id.results) == 3 and id not in {item.id for item in by_id.results}
    assert [one.estimated for one in client.search_many([{"positive": [id], "k": 2}])] == [True]
    client.reembed(without_skipped=True)
    ended(http, "done")
    found = client.search(files[id], k=3)
    assert not found.estimated and id not in {item.id for item in found.results}


def test_a_key_that_may_read_does_not_start_it(serve, bundle, new):
    http = serve(f"{new.folder},{bundle.folder}", access=Access.from_keys("ours", "theirs read reader"))
    read = {"Authorization": "Bearer reader"}
    assert http.put(PATH, headers=read).status_code == http.delete(PATH, headers=read).status_code == 403


def test_no_collection_and_no_such_encoder_are_named(both):
    http = both()
    assert http.put(PATH).json()["error"]["message"].startswith("there is no collection pictures")
    assert "no encoder other is served here" in http.put(PATH, params={"model": "other"}).json()["error"]["message"]


def test_the_refusal_of_a_search_names_the_call(serve, bundle, new, index):
    index.upsert([Item("a", "a", None, None)], [[1.0] * 48])
    answer = serve(new.folder).get(ITEMS)
    assert answer.status_code == refusal(WrongEncoder("")).status == 409
    assert "PUT /collections/pictures/reembedding" in answer.json()["error"]["message"]


def test_a_renamed_collection_keeps_its_encoder_and_its_work(both, bundle, new, upload, ended, wait_until):
    http = both()
    ids = upload(http, bundle.card.id, 1, 2)
    wait_until(lambda: http.get(ITEMS).status_code == 200, "the encoder of the new collection is not noticed")
    http.patch("/collections/pictures", json={"name": "photos"})
    http.put("/aliases/pictures", json={"collection": "photos"})
    assert used(http) == bundle.card.id
    assert http.post("/collections/photos/search", json={"positive": ids[:1]}).json()["model"] == bundle.card.id
    http.put(PATH)
    assert ended(http)["done"] == 2
    assert http.get("/collections/photos/reembedding").json()["state"] == "done"
    wait_until(lambda: used(http) == new.card.id, "the collection does not switch")


def test_a_damaged_file_of_one_collection_leaves_the_others_alone(
    both, bundle, index, new, picture, ended, wait_until, monkeypatch
):
    order = [("harmed", new.card.id), ("pictures", new.card.id)]
    monkeypatch.setattr("serving.reembedder.asked_for", lambda store: order)
    http = both()
    for name in ("harmed", "pictures"):
        url = f"/collections/{name}/items"
        http.put(url, files=[("images", ("a.png", picture(1)))], params={"model": bundle.card.id})
        wait_until(lambda url=url: http.get(url).status_code == 200, "the encoder of the new collection is not noticed")
    index.store.write(f"reembedding/harmed.{new.card.id}/order.json", b'{"id": "asked for"}')
    index.store.write(f"reembedding/harmed.{new.card.id}/progress.json", b"{")
    damaged = http.get("/collections/harmed/reembedding")
    assert damaged.status_code == 503 and "progress.json is damaged" in damaged.json()["error"]["message"]
    http.put(PATH)
    assert ended(http)["state"] == "done"
    wait_until(lambda: used(http) == new.card.id, "the collection does not switch")
    assert http.get("/collections/harmed/items").json()["count"] == 1, "it keeps its encoder"


def test_an_undone_re_embedding_brings_the_encoder_before_it_back(both, bundle, new, upload, ended, wait_until):
    http = both()
    upload(http, bundle.card.id, *range(3))
    http.put(PATH)
    assert ended(http)["state"] == "done"
    wait_until(lambda: used(http) == new.card.id, "the collection does not switch")
    answer = http.delete("/collections/pictures/changes/newest").json()
    assert answer["undone"]["text"] == f"embedded 3 items again with {new.card.id}"
    assert answer["count"] == 3
    wait_until(lambda: used(http) == bundle.card.id, "the collection does not switch back")
    assert http.get(PATH).json()["state"] == "stopped"
    assert http.get(ITEMS).json()["count"] == 3


def test_a_collection_with_a_damaged_file_keeps_its_encoder_when_a_service_starts(both, bundle, new, index, picture):
    Index(index.store.uri, new.card.id, index.dimension).upsert([Item("a", "a", None, None, 1, 1)], [[1.0] * 48])
    both_items = [Item(id, id, None, None, 1, 1) for id in "ab"]
    index.upsert(both_items, [[1.0] * 48] * 2, allow_other_encoder=True)
    index.store.write(f"reembedding/pictures.{new.card.id}/order.json", b'{"id": "asked for"}')
    index.store.write(f"reembedding/pictures.{new.card.id}/progress.json", b"{")
    http = both()
    assert used(http) == bundle.card.id
    assert http.get(ITEMS).json()["count"] == 2


def test_nothing_is_left_of_work_whose_collection_was_deleted(index, new):
    index.upsert([Item("a", "a", None, None, 1, 1)], [[1.0] * 48])
    work = Reembedding(Index(index.store.uri, new.card.id, index.dimension))
    work.start()
    index.drop()
    work.finish([])
    assert list(index.store.list("reembedding")) == []
