import asyncio
import io
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from serving.client import AsyncClient, Client, Copied, Item, Match, PutItem, ServiceError, generate
from serving.client.messages import ATTEMPTS, LONGEST_WAIT_S
from serving.limits import Limits

ROOT = Path(__file__).parents[2]


@pytest.fixture
def client(connect, http, fill):
    fill(5)
    return connect(http)


def test_a_path_bytes_and_a_pil_image_give_the_same_embedding(client, bundle, picture, tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1))
    image = Image.open(io.BytesIO(picture(1)))
    answer = client.embed([tmp_path / "a.png", str(tmp_path / "a.png"), picture(1), image])
    assert answer.model == bundle.card.id
    assert (answer.vectors.shape, answer.vectors.dtype) == ((4, 48), np.float32)
    assert (answer.vectors == answer.vectors[0]).all()
    np.testing.assert_array_equal(client.embed(image).vectors, answer.vectors[:1])
    np.testing.assert_allclose(np.linalg.norm(client.embed(image, normalize=True).vectors), 1, rtol=1e-5)


def test_a_path_may_begin_with_the_home_folder(client, picture, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.png").write_bytes(picture(3))
    assert np.array_equal(client.embed("~/mine.png").vectors, client.embed(tmp_path / "mine.png").vectors)


def test_an_image_in_a_mode_that_png_lacks_is_converted(client):
    assert client.embed(Image.new("CMYK", (8, 8))).vectors.shape == (1, 48)


def test_many_pictures_are_sent_in_packs_that_the_service_accepts(serve, connect, picture, monkeypatch):
    """200 pictures in packs of 64, to a service that takes 20 a request, and 12,000 bytes."""
    monkeypatch.setattr("serving.client.messages.PACK_IMAGES", 64)
    wide = connect(serve())
    narrow = connect(serve(limits=Limits(images=20, body_bytes=4_000)))
    pictures = [picture(i) for i in range(200)]
    assert 4_000 / 20 > max(map(len, pictures)) > 4_000 / 64
    expected = wide.embed(pictures).vectors
    assert expected.shape == (200, 48)
    np.testing.assert_allclose(expected[123], wide.embed(picture(123)).vectors[0], atol=1e-5)
    np.testing.assert_allclose(narrow.embed(iter(pictures)).vectors, expected, atol=1e-5)


def test_a_broken_picture_is_named_by_its_index_among_all_and_its_file_name(client, picture, tmp_path, monkeypatch):
    monkeypatch.setattr("serving.client.messages.PACK_IMAGES", 2)
    (tmp_path / "cat.txt").write_text("no picture")
    with pytest.raises(ServiceError) as refused:
        client.embed([picture(0), picture(1), picture(2), tmp_path / "cat.txt"])
    assert refused.value.message == "images[3] (cat.txt) is not an image in a supported format"
    assert refused.value.param == "images[3]"


def test_a_picture_too_large_for_the_service_raises_its_error(serve, connect, picture):
    client = connect(serve(limits=Limits(body_bytes=1_000)))
    with pytest.raises(ServiceError, match="the request is larger than"):
        client.embed([picture(0), b"x" * 2_000, picture(1)])


def test_an_empty_list_of_pictures_is_refused_by_the_service(client):
    with pytest.raises(ServiceError, match="images: the request has none") as refused:
        client.embed([])
    assert refused.value.status == 400


def test_an_encoder_can_be_chosen_and_an_unknown_one_is_refused(client, bundle, picture):
    assert client.embed(picture(0), model=bundle.card.id).model == bundle.card.id
    with pytest.raises(ServiceError, match="nobody") as refused:
        client.embed(picture(0), model="nobody")
    assert (refused.value.status, refused.value.param) == (404, "model")


def test_all_packs_go_to_the_encoder_of_the_first(monkeypatch):
    """The service may take up a newer one meanwhile: vectors of two must not meet in one answer."""
    monkeypatch.setattr("serving.client.messages.PACK_IMAGES", 1)
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.params.get("model"))
        buffer = io.BytesIO()
        np.save(buffer, np.zeros((1, 4), np.float32))
        return httpx.Response(200, headers={"Twinview-Model": "old"}, content=buffer.getvalue())

    assert Client("http://s", transport=httpx.MockTransport(answer)).embed([b"a", b"b", b"c"]).model == "old"
    assert asked == [None, "old", "old"]


def test_pictures_are_read_when_their_pack_is_sent(monkeypatch):
    monkeypatch.setattr("serving.client.messages.PACK_BYTES", 10)
    read, sent = [], []

    def pictures():
        for i in range(6):
            read.append(i)
            yield b"12345"

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append((len(request.read()), len(read)))
        buffer = io.BytesIO()
        np.save(buffer, np.zeros((2, 4), np.float32))
        return httpx.Response(200, headers={"Twinview-Model": "m"}, content=buffer.getvalue())

    Client("http://s", transport=httpx.MockTransport(answer)).embed(pictures())
    assert sent == [(18, 3), (18, 5), (18, 6)]


def test_search_by_picture_vector_and_id(client, picture):
    (first, *_) = matches = client.search(picture(2), k=5).results
    expected = Match(first.id, "a/2.png", "a", "/pictures/2.png", 40, 30, first.bytes, similarity=first.similarity)
    assert (first, first.similarity) == (expected, pytest.approx(1, abs=1e-5))
    assert len(matches) == 5
    assert client.search(positive=[client.embed(picture(2)).vectors[0]], k=5).results == matches
    assert [match.id for match in client.search(positive=[first.id], k=4).results] == [
        match.id for match in matches[1:]
    ]


@pytest.mark.slow
def test_items_are_stored_searched_read_and_deleted(client, bundle, picture):
    with pytest.raises(ServiceError, match="there is no collection mine") as refused:
        client.items(collection="mine")
    assert refused.value.status == 404
    facts = [{"id": f"p{i}", "metadata": {"price": i}} for i in range(3)]
    put = client.put_items([picture(i) for i in range(3)], facts, collection="mine")
    assert put.items == [PutItem(f"p{i}", True) for i in range(3)] and put.model == bundle.card.id
    assert put.changes == [client.changes(collection="mine")[0].id]
    vector = client.embed(picture(9)).vectors
    put = client.put_vectors(["p9"], vector, bundle.card.id, [{"label": "nine"}], collection="mine")
    assert put.items == [PutItem("p9", True)]
    assert client.item("p9", collection="mine").label == "nine"
    stored = client.item("p9", vector=True, collection="mine").vector
    np.testing.assert_allclose(stored, vector[0] / np.linalg.norm(vector[0]), atol=1e-6)

    assert {item.id for item in client.items(filter={"price": {"gte": 1}}, collection="mine").items} == {"p1", "p2"}
    found = client.search(picture(1), k=9, filter={"price": {"lt": 2}}, collection="mine").results
    assert [(match.id, match.metadata) for match in found] == [("p1", {"price": 1}), ("p0", {"price": 0})]
    found = client.search([picture(0), picture(1)], negative=["p2", vector[0]], k=2, collection="mine").results
    assert {match.id for match in found} == {"p0", "p1"}
    assert client.search(positive=["p0"], threshold=1, collection="mine").results == []

    change = {"id": "p0", "label": "x", "metadata": {"price": 2}}
    assert client.change_items([change, {"id": "nothing"}], collection="mine").changed == ["p0"]
    assert client.copy_items(["p0", "p1", "nothing"], "mine", collection="two").copied == ["p0", "p1"]
    assert client.copy_items(["p0"], "mine", collection="two") == Copied([], []), "it is there already"
    assert client.collection("two").count == 2 and client.item("p0", collection="two").label == "x"
    assert client.thumbnail("p0", collection="two") == client.thumbnail("p0", collection="mine")
    assert client.original("p0", collection="two") == client.original("p0", collection="mine")
    with pytest.raises(ServiceError, match="there is no collection none"):
        client.copy_items(["p0"], "none", collection="two")
    assert client.delete_collection("two") == 2
    page = client.items(1, after="", collection="mine")
    assert (page.items[0].label, page.items[0].metadata, page.next) == ("x", {"price": 2}, "p0")
    assert "p0" not in [item.id for item in client.items(9, after=page.next, collection="mine").items]
    (answer,) = client.search_many([{"positive": ["p0"], "k": 1}], collection="mine")
    assert len(answer.results) == 1
    assert client.verify(collection="mine") == []
    assert client.delete_items(["p0", "nothing"], collection="mine").deleted == ["p0"]
    assert client.changes(collection="mine")[0].id == client.undo(collection="mine").undone.id
    (change,) = client.delete_items(["p0"], collection="mine").changes
    assert client.undo(change, collection="mine").undone.deleted == 1
    assert client.delete_items(["p0"], collection="mine").deleted == ["p0"]
    assert client.create_collection("empty").count == client.delete_collection("empty") == 0
    assert client.collection("mine").count == 3
    assert {one.name: one.count for one in client.collections()} == {"mine": 3, "pictures": 5}


@pytest.mark.slow
def test_many_pictures_are_stored_each_with_its_facts(client, picture, monkeypatch):
    monkeypatch.setattr("serving.client.messages.PACK_IMAGES", 4)
    facts = [{"name": str(i)} for i in range(10)]
    put = client.put_items((picture(i) for i in range(10)), facts, collection="mine")
    assert [client.item(item.id, collection="mine").name for item in put.items] == [str(i) for i in range(10)]
    with pytest.raises(ValueError, match="facts: 2 given for 1 images"):
        client.put_items(picture(0), facts[:2], collection="mine")
    with pytest.raises(ServiceError, match=r"images\[5\] \(image\) is not an image"):
        client.put_items([*map(picture, range(5)), b"no picture"], collection="mine")


def test_items_thumbnails_views_models_and_readiness(client, bundle, picture):
    page = client.items(limit=2, offset=1)
    assert (page.count, len(page.items)) == (5, 2)
    assert isinstance(page.items[0], Item)
    assert client.thumbnail(page.items[0].id).startswith(b"\x89PNG")  # as the fixture wrote it
    pairs = client.views(picture(1), pairs=2, seed=3, strength=0.5, crop_area=(0.5, 1.0))
    assert [len(pair.views) for pair in pairs] == [2, 2]
    assert -1 <= pairs[0].similarity <= 1
    assert client.models()[0]["id"] == bundle.card.id
    assert client.ready() is True


def test_a_refusal_is_raised_with_the_services_message(client):
    with pytest.raises(ServiceError, match=r"^images\[0\] \(image\) is not an image") as refused:
        client.embed(b"no picture")
    assert (refused.value.status, refused.value.code, refused.value.param) == (422, "undecodable", "images[0]")


def test_without_an_encoder_the_client_reports_not_ready_and_does_not_wait(serve, connect, tmp_path, no_store):
    client = connect(serve(encoder=tmp_path / "nowhere"))
    assert client.ready() is False
    assert client.models() == []
    with pytest.raises(ServiceError, match=r"training/pretrain\.py"):
        client.items()


def answering(*responses: httpx.Response):
    """A transport that gives these in turn, and the requests that it got."""
    got, left = [], list(responses)

    def answer(request: httpx.Request) -> httpx.Response:
        got.append(request.read())
        return left.pop(0)

    return httpx.MockTransport(answer), got


def busy(after: str = "7") -> httpx.Response:
    error = {"message": "come back", "type": "rate_limit_error", "code": "busy", "param": None}
    return httpx.Response(429, headers={"Retry-After": after}, json={"error": error})


def test_a_request_to_a_busy_service_is_repeated_after_retry_after(monkeypatch):
    waits = []
    monkeypatch.setattr("serving.client.sync_client.time.sleep", waits.append)
    transport, got = answering(busy(), busy(), httpx.Response(200, json={"model": "m", "results": []}))
    assert Client("http://service", transport=transport).search(b"picture").results == []
    assert waits == [7, 7]
    assert len(set(map(len, got))) == 1 and b"picture" in got[2]


def test_the_async_client_also_waits_for_retry_after(monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr("serving.client.async_client.asyncio.sleep", sleep)
    transport, got = answering(busy(), httpx.Response(200, json={"count": 3, "items": []}))

    async def ask():
        async with AsyncClient("http://service", transport=transport) as client:
            return await client.items()

    assert asyncio.run(ask()).count == 3
    assert (waits, len(got)) == ([7], 2)


def test_no_wait_is_longer_than_the_client_allows(monkeypatch):
    waits = []
    monkeypatch.setattr("serving.client.sync_client.time.sleep", waits.append)
    transport, _ = answering(busy("86400"), httpx.Response(200, json={"count": 0, "items": []}))
    Client("http://service", transport=transport).items()
    assert waits == [LONGEST_WAIT_S]


def test_after_some_attempts_a_busy_service_raises_an_error(monkeypatch):
    monkeypatch.setattr("serving.client.sync_client.time.sleep", lambda _: None)
    transport, got = answering(*(busy() for _ in range(10)))
    with pytest.raises(ServiceError, match="come back"):
        Client("http://service", transport=transport).search(b"picture")
    assert len(got) == ATTEMPTS


def test_an_answer_of_a_proxy_is_reported_by_its_status():
    transport, _ = answering(httpx.Response(502, text="<html>Bad gateway</html>"))
    with pytest.raises(ServiceError, match=r"http://service/collections/pictures/items\S* answered 502"):
        Client("http://service", transport=transport).items()


def test_an_unreachable_service_is_named():
    with pytest.raises(ServiceError, match=r"http://127\.0\.0\.1:9\S* cannot be reached"):
        Client("http://127.0.0.1:9").items()


def test_the_key_is_sent_as_a_bearer_token():
    keys = []

    def answer(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers["Authorization"])
        return httpx.Response(200, json={"data": []})

    Client("http://service", api_key="secret", transport=httpx.MockTransport(answer)).models()
    assert keys == ["Bearer secret"]


def test_the_training_runs_are_listed(connect, http, tmp_path, monkeypatch):
    monkeypatch.setenv("TWINVIEW_RUNS", str(tmp_path))
    folder = tmp_path / "cats & dogs" / "#1"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"data": "cats", "epochs": 2, "batch_size": 4}')
    (folder / "metrics.csv").write_text("epoch,loss\n1,5.5\n2,5.0\n")
    client = connect(http)
    (run,) = client.runs()
    details = client.run(run.name)
    assert details.name == run.name == "cats & dogs/#1"
    assert vars(run).items() <= vars(details).items()
    assert details.metrics["loss"] == [5.5, 5.0]


@pytest.mark.slow
def test_the_client_loads_nothing_of_the_service():
    program = "import sys, serving.client; print({'fastapi', 'starlette', 'onnxruntime', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.slow
def test_the_sync_client_is_what_the_generator_makes_of_the_async_one():
    assert generate.TARGET.read_text() == generate.generate()
