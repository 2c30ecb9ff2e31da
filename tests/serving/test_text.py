"""Searching by words with an encoder of two towers: "red" finds what is red, over HTTP and in a shell."""

import io
import json
import re
import shutil
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from export.artifact import TEXT_GRAPH, read_pixels
from serving.client import ServiceError
from serving.collection.index import Index, Item, content_id
from serving.inference.encoder import OnnxEncoder
from serving.inference.text import TextEncoder
from serving.limits import Limits
from tests import towers
from tests.towers import COLOURS, LENGTH

SEARCH, SEARCHES = "/collections/pictures/search", "/collections/pictures/searches"


def picture(colour: str, i: int = 0) -> bytes:
    pixels = np.array(COLOURS[colour]) + np.random.default_rng(i).integers(-20, 20, (36, 40, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """An encoder that reads text."""
    return towers.make_bundle(tmp_path_factory.mktemp("runs") / "towers" / "encoder")


@pytest.fixture(scope="module")
def filled(bundle, tmp_path_factory):
    """Folder with an index of ten pictures of each colour."""
    folder = tmp_path_factory.mktemp("filled")
    index, encode = Index(folder, bundle.card.id, bundle.card.dimension), OnnxEncoder(bundle)
    files = [(colour, picture(colour, i)) for colour in COLOURS for i in range(10)]
    items = [Item(content_id(data), f"{colour}.png", colour, None, 40, 36, len(data)) for colour, data in files]
    pixels = np.stack([read_pixels(data, bundle.card.preprocessing) for _, data in files])
    index.upsert(items, encode(pixels), {})
    return folder


@pytest.fixture
def service(serve, filled):
    """A service that reads text, over those pictures."""
    return serve(index=filled)


def labels(matches: dict) -> list[str]:
    return [match["label"] for match in matches["results"]]


def found(http, **search) -> list[str]:
    answer = http.post(SEARCH, json=search)
    assert answer.status_code == 200, answer.text
    return labels(answer.json())


@pytest.mark.parametrize("colour", COLOURS)
def test_words_find_the_pictures_that_they_describe(service, colour):
    assert found(service, text=f"a photo of a {colour} shoe", k=10) == [colour] * 10
    form = service.post(SEARCH, data={"text": colour, "k": 3, "filter": json.dumps({"label": "blue"})})
    assert labels(form.json()) == ["blue"] * 3


def test_the_similarity_is_the_cosine_of_both_towers(service, bundle, filled):
    answer = service.post(SEARCH, json={"text": "green", "k": 40}).json()
    direction = towers.vector_of(["[START]", "green", "[END]"])
    rows = Index(filled, bundle.card.id, bundle.card.dimension).get_many([one["id"] for one in answer["results"]])
    cosines = [rows[one["id"]][1] @ direction / np.linalg.norm(direction) for one in answer["results"]]
    np.testing.assert_allclose([one["similarity"] for one in answer["results"]], cosines, atol=2e-5)
    least = (cosines[14] + cosines[15]) / 2
    assert len(found(service, text="green", k=40, threshold=float(least))) == 15


def test_words_are_one_more_positive_example(service, filled, bundle):
    rows = Index(filled, bundle.card.id, bundle.card.dimension).page(40)
    ids = {item.label: item.id for item in rows}
    unit = towers.vector_of(["[START]", "blue", "[END]"])
    unit = (unit / np.linalg.norm(unit)).tolist()
    for more in ({"positive": [ids["red"]]}, {"negative": [ids["green"]]}):
        with_vector = {**more, "positive": [*more.get("positive", []), unit]}
        model = {"model": bundle.card.id, "k": 40}
        by_text, by_vector = (
            service.post(SEARCH, json=search | model).json() for search in ({"text": "blue", **more}, with_vector)
        )
        assert [one["id"] for one in by_text["results"]] == [one["id"] for one in by_vector["results"]]
    form = {"text": "blue", "k": 40}
    answer = service.post(SEARCH, files={"image": ("a.png", picture("red", 99))}, data=form).json()
    assert set(labels(answer)[:5]) <= {"red", "blue"} and set(labels(answer)[-10:]) <= {"green", "orange"}


def test_cosines_of_words_are_not_ranked_among_pairs_of_pictures(service, bundle, filled):
    Index(filled, bundle.card.id, bundle.card.dimension).random_pairs.up_to_date()
    id = service.get("/collections/pictures/items?limit=1").json()["items"][0]["id"]
    by_id, by_words = (service.post(SEARCH, json=search).json() for search in ({"positive": [id]}, {"text": "red"}))
    assert all(one["closer_than"] is not None for one in by_id["results"])
    assert all(one["closer_than"] is None for one in by_words["results"])
    refused = service.post(SEARCH, json={"text": "red", "closer_than": 0.9})
    assert refused.status_code == 400
    message = "closer_than: the cosines of pictures and text have no rank; give a threshold"
    assert (refused.json()["error"]["message"], refused.json()["error"]["param"]) == (message, "closer_than")


def test_several_searches_by_words_are_answered_in_one_request(service):
    searches = [{"text": colour, "k": 2} for colour in COLOURS] + [{"text": "red", "filter": {"label": "blue"}}]
    answers = service.post(SEARCHES, json={"searches": searches}).json()["answers"]
    assert [labels(answer)[0] for answer in answers] == [*COLOURS, "blue"]
    refused = service.post(SEARCHES, json={"searches": [*searches, {"text": " "}]})
    assert refused.json()["error"]["message"] == "searches[5].text: is empty"


def test_a_longer_text_is_cut_at_the_context_length(service):
    kept = LENGTH - 2  # with the tokens for start and end
    whole = "red " * kept
    answers = [service.post(SEARCH, json={"text": text}).json() for text in (whole, whole + "blue " * 20)]
    assert answers[0] == answers[1]
    assert answers[0] != service.post(SEARCH, json={"text": whole[4:] + "blue"}).json()


def test_the_card_says_whether_an_encoder_reads_text(service, serve, make_bundle, tmp_path, bundle):
    [card] = service.get("/v1/models").json()["data"]
    assert card["text"]["length"] == LENGTH and card["id"] == bundle.card.id
    assert service.app.state.tools._tools["search"].described.input_schema["properties"]["text"]["description"]
    other = make_bundle(tmp_path / "means" / "encoder")
    without = serve(encoder=other.folder)
    assert without.get("/v1/models").json()["data"][0]["text"] is None
    for path, body in ((SEARCH, {"text": "red"}), (SEARCHES, {"searches": [{"text": "red"}]})):
        refused = without.post(path, json=body)
        assert refused.status_code == 400
        sentence = f"text: the encoder {other.card.id} reads no text; export one with a text tower (--text)"
        assert refused.json()["error"]["message"] == ("searches[0]." if path == SEARCHES else "") + sentence


def test_the_tower_of_the_encoder_that_is_asked_for_is_used(serve, bundle, make_bundle, tmp_path, filled):
    other = make_bundle(tmp_path / "means" / "encoder")
    http = serve(encoder=f"{other.folder},{bundle.folder}", index=filled)
    assert found(http, text="blue", k=2, model=bundle.card.id) == ["blue"] * 2
    assert found(http, text="blue", k=2) == ["blue"] * 2  # the collection's encoder, which is not the default
    refused = http.post(SEARCH, json={"text": "blue", "model": other.card.id})
    assert refused.status_code == 400 and "reads no text" in refused.text


def test_without_the_package_tokenizers_the_service_names_the_extra(service, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused = service.post(SEARCH, json={"text": "red"})
    assert refused.status_code == 501
    message = "reading texts needs the package tokenizers: pip install 'twinview[text]'"
    assert refused.json()["error"]["message"] == message


def test_a_tower_whose_files_were_changed_does_not_stop_searches_by_pictures(serve, bundle, filled, tmp_path):
    shutil.copytree(bundle.folder, tmp_path / "copy")
    http = serve(encoder=tmp_path / "copy", index=filled)
    (tmp_path / "copy" / TEXT_GRAPH).write_bytes(b"another")
    refused = http.post(SEARCH, json={"text": "red"})
    assert refused.status_code == 503 and str(tmp_path) not in refused.text
    assert f"the text tower of {bundle.card.id} does not work here" in refused.json()["error"]["message"]
    answer = http.post(SEARCH, files={"image": ("a.png", picture("red", 99))}, data={"k": 2})
    assert labels(answer.json()) == ["red", "red"]
    shutil.copy(bundle.folder / TEXT_GRAPH, tmp_path / "copy")
    assert found(http, text="red", k=1) == ["red"]


def test_texts_are_read_in_a_thread_of_their_own_and_count_as_work(service, serve, filled, monkeypatch):
    threads, run = [], TextEncoder._run

    def noted(*arguments):
        threads.append(threading.current_thread().name)
        return run(*arguments)

    monkeypatch.setattr(TextEncoder, "_run", staticmethod(noted))
    found(service, text="red")
    assert threads and all(name.startswith("text") for name in threads)
    busy = serve(index=filled, limits=Limits(images_at_once=0)).post(SEARCH, json={"text": "red"})
    assert (busy.status_code, busy.headers["Retry-After"]) == (429, "1")


def test_both_clients_search_by_words(connect, service):
    client = connect(service)
    assert [one.label for one in client.search(text="a red shoe", k=2).results] == ["red"] * 2
    assert {one.label for one in client.search(picture("blue", 99), text="red", k=9).results} <= {"red", "blue"}
    answers = client.search_many([{"text": "blue", "k": 1}, {"text": "green", "k": 1}])
    assert [answer.results[0].label for answer in answers] == ["blue", "green"]
    with pytest.raises(ServiceError, match="text: is empty"):
        client.search(text="")


def test_the_command_line_searches_by_words(twinview, filled, bundle, make_bundle, tmp_path, capsys):
    def search(*words, encoder=bundle) -> list[dict]:
        twinview("index", "search", *words, "--index", filled, "--encoder", encoder.folder, "--json")
        return json.loads(capsys.readouterr().out)

    rows = search("--text", "a green shoe", "--k", 3)
    assert [row["label"] for row in rows] == ["green"] * 3 and {row["closer_than"] for row in rows} == {None}
    other = make_bundle(tmp_path / "means" / "encoder")
    for words, encoder, sentence in (
        ((), bundle, "error: give an image file or the id of an item to search by, or --text"),
        (("a.png", "--text", "red"), bundle, "error: give an image file or the id of an item to search by, or --text"),
        (("--text", " "), bundle, "error: --text: is empty"),
        (
            ("--text", "red", "--closer-than", 0.9),
            bundle,
            "error: --closer-than: the cosines of pictures and text have",
        ),
    ):
        with pytest.raises(SystemExit, match=re.escape(sentence)):
            search(*words, encoder=encoder)
    Index(tmp_path / "index", other.card.id, other.card.dimension).create()
    with pytest.raises(SystemExit, match=f"--text: the encoder {other.card.id} reads no text"):
        twinview("index", "search", "--text", "red", "--index", tmp_path / "index", "--encoder", other.folder)
