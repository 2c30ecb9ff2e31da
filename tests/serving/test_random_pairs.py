import json
import threading
from itertools import combinations
from unittest.mock import Mock

import numpy as np
import pytest

from serving.cli.duplicates import DuplicatesSettings, run
from serving.client import ServiceError
from serving.collection import random_pairs
from serving.collection.index import Index, IndexProblem, Item
from serving.collection.items import unit
from serving.collection.random_pairs import LEAST, PAIRS, SAMPLE, LearntPairs, RandomPairs
from serving.collection.table import LanceTable
from serving.derived.task import Derived
from tests.conftest import PATIENCE_S

D = 8


def on_circle(*degrees: float, d: int = 2) -> np.ndarray:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles), *[0 * angles] * (d - 2)], axis=1)


def some(n: int, seed: int = 0, d: int = D) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(0.5, 1, (n, d)))


def among(vectors: np.ndarray) -> RandomPairs:
    return RandomPairs.among([str(i) for i in range(len(vectors))], vectors, len(vectors))


def share(vectors: np.ndarray, cosine: float) -> float:
    """An independent reference: plain loops in float64."""
    pairs = [float(np.dot(a, b)) for a, b in combinations(np.float64(unit(vectors)), 2)]
    return sum(pair < cosine - 1e-6 for pair in pairs) / len(pairs)


def put(index: Index, vectors: np.ndarray, first: int = 0) -> None:
    items = [Item(f"{first + i}", f"{first + i}.png", None, None, 1, 1, 1) for i in range(len(vectors))]
    index.upsert(items, vectors, allow_other_encoder=True)


@pytest.fixture
def index(tmp_path) -> Index:
    return Index(tmp_path / "index", "enc-1", D)


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def either(request, tmp_path) -> Index:
    return Index(tmp_path / "index" if request.param == "folder" else request.getfixturevalue("s3"), "enc-1", D)


# Ranks ----------------------------------------------------------------------------------------------------------------


def test_a_rank_is_the_share_of_pairs_that_are_less_alike():
    pairs = among(on_circle(0, 60, 90, 180))  # at 60, 90, 180, 30, 120 and 90 degrees to each other
    np.testing.assert_allclose(pairs.cosines, [-1, -0.5, 0, 0, 0.5, 0.75**0.5], atol=1e-6)
    ranks = [pairs.closer_than(cosine) for cosine in (-1, -0.2, 0, 0.1, 0.5, 0.9, 1)]
    assert ranks == [0, 0.333333, 0.333333, 0.666666, 0.666666, 1, 1]


def test_a_cosine_of_a_pair_is_no_closer_than_the_pair_itself():
    vectors = some(60)
    pairs = among(vectors)
    for a, b in combinations(vectors[:12], 2):
        cosine = float(a @ b)  # computed in another order than in the matrix product
        assert pairs.closer_than(cosine) == pytest.approx(share(vectors, cosine), abs=1.1e-6)


def test_the_cosine_of_a_rank_is_the_lowest_with_it():
    pairs = among(some(40))
    p = len(pairs.cosines)
    for lower in (0, 1, 400, p - 1, p):
        rank = lower * 10**6 // p / 10**6
        cosine = pairs.cosine(rank)
        assert pairs.closer_than(cosine) == rank
        if lower:
            assert pairs.closer_than(cosine - 3e-6) < rank
    assert pairs.cosine(0) == -1
    assert pairs.cosine(1) > pairs.cosines[-1]


@pytest.mark.parametrize("n", [448, 449, 600])
def test_of_many_items_no_pair_is_taken_twice_and_the_ranks_are_nearly_exact(n):
    vectors = some(n, d=32)
    every = np.sort((vectors @ vectors.T)[np.triu_indices(n, 1)])
    pairs = among(vectors)
    assert len(every) > PAIRS >= len(pairs.cosines) > 0.99 * PAIRS
    at = np.searchsorted(every, pairs.cosines - 5e-7)  # each of them is one of every pair
    np.testing.assert_allclose(every[at], pairs.cosines, atol=1e-6)
    assert np.unique(pairs.cosines).size > 0.99 * len(pairs.cosines)
    for cosine in np.quantile(every, [0.1, 0.5, 0.99]):
        assert pairs.closer_than(float(cosine)) == pytest.approx((every < cosine).mean(), abs=0.01)


# Learning -------------------------------------------------------------------------------------------------------------


def test_maintenance_learns_the_pairs_and_another_process_reads_them(either, monkeypatch):
    vectors = some(LEAST)
    put(either, vectors)
    either.maintain()
    monkeypatch.setattr(LanceTable, "sample", Mock(side_effect=AssertionError("learnt again")))
    known = Index(either.store.uri, "enc-1", D).random_pairs.known()
    assert known is not None
    np.testing.assert_allclose(known.cosines, among(vectors).cosines, atol=1e-6)
    assert known.closer_than(0.5) == pytest.approx(share(vectors, 0.5), abs=1.1e-6)
    assert Index(either.store.uri, "enc-1", D).random_pairs.up_to_date().count == LEAST


def test_few_pictures_have_no_ranks(index):
    put(index, some(LEAST - 1))
    index.maintain()
    assert index.random_pairs.known() is None
    assert index.random_pairs.up_to_date() is None
    assert not (index.store.local / "random-pairs").exists()
    with pytest.raises(IndexProblem, match=f"pictures has fewer than {LEAST} items"):
        index.random_pairs.cosine(0.9)
    put(index, some(1, seed=1), first=LEAST)
    assert index.random_pairs.up_to_date().count == LEAST


def test_a_missing_collection_has_no_ranks(index):
    assert index.random_pairs.up_to_date() is None
    assert not index.store.local.exists()


def test_the_pairs_are_from_a_sample_of_a_large_collection(index, monkeypatch):
    monkeypatch.setattr(random_pairs, "SAMPLE", 40)
    put(index, some(100))
    pairs = index.random_pairs.up_to_date()
    assert (pairs.count, len(pairs.cosines), SAMPLE) == (100, 40 * 39 // 2, 2000)


def test_two_encoders_have_their_own_pairs(index, tmp_path):
    other = Index(tmp_path / "index", "enc-2", 3)
    put(index, some(40))
    put(other, some(40, seed=5, d=3))
    for each in (index, other):
        each.maintain()
    ranks = {each.encoder_id: each.random_pairs.known().closer_than(0.4) for each in (index, other)}
    assert ranks["enc-1"] == pytest.approx(share(some(40), 0.4), abs=1.1e-6)
    assert ranks["enc-2"] == pytest.approx(share(some(40, seed=5, d=3), 0.4), abs=1.1e-6)
    assert ranks["enc-1"] != ranks["enc-2"]


@pytest.mark.parametrize(("more", "again"), [(24, False), (26, True)])
def test_they_are_learnt_again_when_the_collection_has_grown_by_a_quarter(index, more, again):
    put(index, some(100))
    assert index.random_pairs.up_to_date().count == 100
    put(index, some(more, seed=1), first=100)
    assert index.random_pairs.up_to_date().count == (100 + more if again else 100)
    assert Index(index.store.uri, "enc-1", D).random_pairs.known().count == (100 + more if again else 100)


@pytest.mark.parametrize(("changed", "again"), [(5, False), (20, True)])
def test_they_are_learnt_again_when_a_quarter_has_other_vectors_or_is_gone(index, changed, again):
    put(index, some(60))
    before = index.random_pairs.up_to_date().cosines
    put(index, some(changed, seed=1))
    now = index.random_pairs.up_to_date().cosines
    assert np.array_equal(before, now) is not again
    index.delete([str(59 - i) for i in range(changed)])
    count = 60 - changed if again else 60
    assert index.random_pairs.up_to_date().count == count


def test_a_collection_that_became_small_has_no_ranks_any_more(index):
    put(index, some(LEAST))
    index.random_pairs.up_to_date()
    index.delete(["0"])
    assert index.random_pairs.up_to_date() is None
    assert Index(index.store.uri, "enc-1", D).random_pairs.known() is None


def test_a_search_does_not_wait_until_they_are_learnt(index, monkeypatch, wait_until):
    put(index, some(40))
    begun, go_on, learn = threading.Event(), threading.Event(), LearntPairs._learn

    def slowly(pairs: LearntPairs) -> RandomPairs | None:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        return learn(pairs)

    monkeypatch.setattr(LearntPairs, "_learn", slowly)
    assert index.random_pairs.known() is None
    assert begun.wait(PATIENCE_S)
    assert index.random_pairs.known() is None
    assert len(index.search(np.ones(D), 3)) == 3
    go_on.set()
    wait_until(lambda: index.random_pairs.known() is not None, "the pairs were not learnt")


def test_a_failure_to_learn_leaves_the_last_ranks(index, monkeypatch, wait_until, caplog):
    monkeypatch.setattr(random_pairs, "CHECK_S", 0)
    put(index, some(40))
    pairs = index.random_pairs.up_to_date()
    put(index, some(40, seed=1), first=40)
    monkeypatch.setattr(LanceTable, "sample", Mock(side_effect=RuntimeError("no such disk")))
    assert index.random_pairs.known() is pairs
    wait_until(lambda: "could not be learnt" in caplog.text, "nothing was logged")
    assert "no such disk" in caplog.text
    monkeypatch.undo()
    wait_until(lambda: index.random_pairs.known().count == 80, "it was not tried again")


@pytest.mark.parametrize("damage", [b"", b"not a file of numpy", b"PK\x03\x04 cut off"])
def test_a_damaged_file_is_written_again(index, damage):
    put(index, some(40))
    index.maintain()
    (file,) = index.store.local.glob("random-pairs/*.npz")
    whole = file.read_bytes()
    file.write_bytes(damage)
    assert Index(index.store.uri, "enc-1", D).random_pairs.up_to_date().count == 40
    assert RandomPairs.from_bytes(file.read_bytes()).count == RandomPairs.from_bytes(whole).count


def test_an_index_that_cannot_be_written_has_ranks_all_the_same(index, monkeypatch):
    put(index, some(40))
    monkeypatch.setattr(index.store, "write", Mock(side_effect=IndexProblem("read only")))
    assert index.random_pairs.up_to_date().count == 40


# In the service -------------------------------------------------------------------------------------------------------

SEARCH = "/collections/pictures/search"


@pytest.fixture
def shop(serve, bundle, tmp_path):
    """A service, its index, and the vectors (40, d) of its items "0" to "39", labelled "even" or "odd"."""
    index = Index(tmp_path / "index", bundle.card.id, bundle.card.dimension)
    vectors = some(40, d=bundle.card.dimension)
    items = [Item(f"{i}", f"{i}.png", ("even", "odd")[i % 2], None, 1, 1, 1) for i in range(40)]
    index.upsert(items, vectors)
    index.maintain()
    return serve(), index, vectors


def search(http, **query) -> list[dict]:
    answer = http.post(SEARCH, json=query)
    assert answer.status_code == 200, answer.text
    return answer.json()["results"]


def test_each_result_has_its_rank_among_random_pairs(shop):
    http, _, vectors = shop
    found = search(http, positive=["3"], k=5)
    assert len(found) == 5
    for match in found:
        assert match["closer_than"] == pytest.approx(share(vectors, match["similarity"]), abs=1.1e-6)
    assert 1 > found[0]["closer_than"] > 0.8
    form = http.post(SEARCH, data={"positive": json.dumps(["3"]), "k": 5}).json()
    assert form["results"] == found


def test_a_filter_does_not_change_the_ranks(shop):
    http, _, _ = shop
    every = {match["id"]: match["closer_than"] for match in search(http, positive=["3"], k=40)}
    odd = search(http, positive=["3"], k=40, filter={"label": "odd"})
    assert len(odd) == 19
    assert {match["id"]: match["closer_than"] for match in odd}.items() <= every.items()


def test_with_several_examples_the_rank_is_of_the_mean_cosine_to_them(shop):
    """The cosine to their mean direction is higher than to each of them, and would outrank almost all pairs."""
    http, _, vectors = shop
    examples = [vectors[3], 2 * vectors[4], vectors[5]]
    for match in search(http, positive=[example.tolist() for example in examples], k=40):
        mean = float(np.mean([vectors[int(match["id"])] @ vectors[i] for i in (3, 4, 5)]))
        assert match["closer_than"] == pytest.approx(share(vectors, mean), abs=2e-3)  # one pair of 780
        assert abs(match["similarity"]) > abs(mean)


def test_a_search_with_negative_examples_has_no_ranks(shop):
    http, _, _ = shop
    assert {match["closer_than"] for match in search(http, positive=["3"], negative=["4"])} == {None}
    answer = http.post(SEARCH, json={"positive": ["3"], "negative": ["4"], "closer_than": 0.9})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "closer_than")
    assert "negative examples have no rank; give a threshold" in answer.json()["error"]["message"]


def test_a_limit_can_be_given_as_a_rank(shop):
    http = shop[0]
    every = search(http, positive=["3"], k=40)
    answer = http.post(SEARCH, json={"positive": ["3"], "k": 40, "closer_than": every[4]["closer_than"]}).json()
    assert answer["results"] == every[:5]
    assert every[5]["similarity"] < answer["threshold"] <= every[4]["similarity"] + 2e-6
    several = search(http, positive=["3", "5"], k=40)
    assert search(http, positive=["3", "5"], k=40, closer_than=several[2]["closer_than"]) == several[:3]
    assert search(http, positive=["3"], k=40, closer_than=0) == every
    assert http.post(SEARCH, json={"positive": ["3"], "threshold": 0.25}).json()["threshold"] == 0.25
    assert http.post(SEARCH, json={"positive": ["3"]}).json()["threshold"] is None


@pytest.mark.parametrize("path", [SEARCH, "/collections/pictures/duplicates"])
def test_a_limit_is_given_in_one_way(shop, path):
    http = shop[0]

    def refused(**query) -> str:
        ask = {"json": {"positive": ["3"], **query}} if path == SEARCH else {"params": query}
        answer = http.request("POST" if path == SEARCH else "GET", path, **ask)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "closer_than")
        return answer.json()["error"]["message"]

    both = "closer_than: give either threshold or closer_than, not both"
    assert refused(threshold=0.9, closer_than=0.9) == both
    assert "at most 1 is needed" in refused(closer_than=1.5)
    assert "at least 0 is needed" in refused(closer_than=-0.1)


def test_too_few_pictures_cannot_be_limited_by_a_rank(http, fill):
    fill(5)
    answers = [
        http.post(SEARCH, json={"positive": [[1.0] * 48], "closer_than": 0.9}),
        http.get("/collections/pictures/duplicates", params={"closer_than": 0.9}),
    ]
    for answer in answers:
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "closer_than")
        assert "pictures has fewer than 30 items, too few to rank a cosine; give a threshold" in error["message"]
    assert {match["closer_than"] for match in search(http, positive=[[1.0] * 48])} == {None}
    assert http.post("/collections/none/search", json={"positive": [[1.0] * 48], "closer_than": 0.9}).status_code == 404
    assert http.get("/collections/none/duplicates", params={"closer_than": 0.9}).status_code == 404


def test_ranks_follow_a_collection_that_changes(shop, monkeypatch, wait_until):
    http, index, _ = shop
    monkeypatch.setattr(random_pairs, "CHECK_S", 0)
    search(http, positive=["3"])
    put(index, (new := some(40, seed=9, d=48)))
    expected = search(http, positive=["3"], k=1)[0]["similarity"]

    def rank() -> float:
        return search(http, positive=["3"], k=1)[0]["closer_than"]

    wait_until(lambda: rank() == pytest.approx(share(new, expected), abs=1.1e-6), "the ranks are still the old ones")


def test_duplicates_have_ranks_and_a_limit_as_a_rank(shop):
    http, index, vectors = shop
    index.upsert([Item("copy", "copy.png", None, None, 1, 1, 1)], vectors[:1] + 0.01 * vectors[1:2])
    url = "/collections/pictures/duplicates"
    assert http.get(url).json()["closer_than"] is None  # nothing was compared yet
    Derived(index, "duplicates").compute(threshold=0.4)
    answer = http.get(url, params={"threshold": 0.8}).json()
    assert (answer["threshold"], answer["closer_than"]) == (0.8, pytest.approx(share(vectors, 0.8), abs=1.1e-6))
    own = http.get(url).json()
    assert own["threshold"] == own["own"] != 0.95
    assert own["exact"] == [0] * len(own["groups"]) and own["too_many"] is False
    everything = http.get(url, params={"threshold": 0.4}).json()
    assert everything["too_many"] is True
    first, copy = answer["groups"][0]
    assert {first["id"], copy["id"]} == {"0", "copy"}
    assert copy["closer_than"] == pytest.approx(share(vectors, copy["similarity"]), abs=1.1e-6)
    ranked = http.get(url, params={"closer_than": 1}).json()
    assert ranked["closer_than"] == 1
    assert ranked["threshold"] == pytest.approx(float(among(vectors).cosines[-1]), abs=3e-6)
    low = http.get(url, params={"closer_than": 0.5}).json()["error"]["message"]
    assert "compared from a cosine of 0.4 up, which is more than 0." in low


def test_the_clients_know_ranks(shop, connect):
    client = connect(shop[0])
    found = client.search(positive=["3"], k=3)
    assert found.threshold is None and 0 < found.results[2].closer_than <= found.results[0].closer_than
    limited = client.search(positive=["3"], closer_than=found.results[1].closer_than)
    assert limited.results == found.results[:2] and limited.threshold < found.results[1].similarity
    with pytest.raises(ServiceError, match="either threshold or closer_than"):
        client.search(positive=["3"], threshold=0.1, closer_than=0.1)
    Derived(shop[1], "duplicates").compute(threshold=0.1)
    assert client.duplicates(closer_than=0.9).closer_than == pytest.approx(0.9, abs=2e-3)
    found = client.duplicates()
    assert (client.duplicates(0.8).threshold, found.threshold) == (0.8, found.own)


# On the command line --------------------------------------------------------------------------------------------------


def test_the_command_prints_ranks_and_takes_a_limit(shop, twinview, capsys, tmp_path):
    where = ("--index", tmp_path / "index")

    def printed(*words) -> str:
        twinview("index", "search", "3", *where, *words)
        return capsys.readouterr().out

    found = json.loads(printed("--json", "--k", 5))
    assert [match["closer_than"] for match in found] == [
        match["closer_than"] for match in search(shop[0], positive=["3"], k=5)
    ]
    heads, *rows = printed("--k", 9, "--closer-than", found[2]["closer_than"]).splitlines()
    assert heads.split() == ["cosine", "closer", "than", "id", "name", "path"]
    assert [float(row.split()[1]) for row in rows] == pytest.approx([m["closer_than"] for m in found[:3]], abs=1e-5)
    for words, problem in (
        (("--threshold", 0.5, "--closer-than", 0.5), "either --threshold or --closer-than"),
        (("--closer-than", 1.5), "--closer-than 1.5: must be from 0 to 1"),
    ):
        with pytest.raises(SystemExit, match=problem):
            printed(*words)


def test_duplicates_are_listed_from_a_rank_up(shop, tmp_path, capsys):
    _, index, vectors = shop
    index.upsert([Item("copy", "copy.png", None, None, 1, 1, 1)], vectors[:1] + 0.01 * vectors[1:2])
    settings = {"index": str(tmp_path / "index"), "output": tmp_path / "groups.csv"}
    assert run(DuplicatesSettings(closer_than=1, **settings)) == 1
    least = index.random_pairs.cosine(1)
    assert f"with a cosine of at least {least:g}" in capsys.readouterr().out
    with pytest.raises(IndexProblem, match="either --threshold or --closer-than"):
        run(DuplicatesSettings(threshold=0.9, closer_than=0.9, **settings))
