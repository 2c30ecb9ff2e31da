"""Results of small collections are made by themselves: when, how often, and that they do not cause one another."""

import logging
import time

import numpy as np
import pytest

from export.artifact import Preprocessing
from serving.collection.index import Index, Item
from serving.collection.problems import IndexProblem
from serving.derived import automatic
from serving.derived.automatic import AutomaticResults
from serving.derived.task import Derived, DerivedProblem, Progress
from serving.indexing.fill import BatchEncoder, Tally, fill
from serving.indexing.originals import Original

BOTH = [("pictures", "duplicates"), ("pictures", "map")]


@pytest.fixture
def index(bundle, tmp_path) -> Index:
    return Index(tmp_path / "index", bundle.card.id, bundle.card.dimension)


@pytest.fixture
def put(index):
    """put(n) adds n items to the collection."""
    added = iter(range(1000))

    def add(n: int = 1, to: Index = index) -> None:
        ids = [f"{next(added):032x}" for _ in range(n)]
        vectors = np.random.default_rng(int(ids[0], 16)).standard_normal((n, to.dimension))
        to.upsert([Item(id, f"{id}.jpg", None, None, 1, 1) for id in ids], vectors, allow_other_encoder=True)

    return add


@pytest.fixture
def started(monkeypatch) -> list[tuple[str, str]]:
    """Collection and kind of each computation that was started; it is done at once."""
    listed = []

    def compute(derived: Derived, **settings) -> None:
        listed.append((derived.index.name, derived.kind))
        derived.compute(**settings)

    monkeypatch.setattr(Derived, "start", compute)
    return listed


@pytest.fixture
def results(bundle, index) -> AutomaticResults:
    return AutomaticResults(index.store.uri, lambda: [bundle.card])


@pytest.fixture
def rested(monkeypatch) -> None:
    monkeypatch.setattr(automatic, "REST_S", 0.0)


def look(results: AutomaticResults, times: int = 4) -> None:
    for _ in range(times):
        results.look()


def test_both_are_made_one_after_the_other_once_nothing_changes_and_then_no_more(put, results, started, rested):
    put(3)
    results.look()
    assert started == []
    results.look()
    assert started == BOTH[:1]
    results.look()
    assert started == BOTH
    look(results)
    assert started == BOTH


def test_nothing_is_made_without_a_collection(results, started):
    look(results)
    assert started == []


def test_a_large_collection_is_left_to_its_user(put, results, started, monkeypatch):
    monkeypatch.setattr(automatic, "MOST", 3)
    put(4)
    look(results)
    assert started == []


def test_a_collection_that_keeps_changing_is_left_alone(put, results, started):
    for _ in range(5):
        put()
        results.look()
    assert started == []
    look(results)
    assert started == BOTH


def test_an_outdated_result_is_made_again_with_its_settings_but_not_before_a_rest(put, index, results, started, rested):
    put(3)
    Derived(index, "duplicates").compute(threshold=0.5)
    look(results)
    assert started == BOTH[1:]
    put()
    automatic.REST_S = 60.0
    look(results)
    assert started == BOTH[1:]
    automatic.REST_S = 0.0
    look(results)
    assert started == [BOTH[1], *BOTH]
    assert Derived(index, "duplicates").result().settings == {"threshold": 0.5}


def test_a_new_version_with_the_same_pictures_computes_nothing(put, index, results, started, rested):
    put(3)
    look(results)
    index.upsert([index.page(1)[0]], np.ones((1, index.dimension)))
    index.maintain()
    look(results)
    assert started == BOTH


def test_a_service_that_starts_finds_what_is_there(put, bundle, index, started, rested):
    put(3)
    for _ in range(2):
        look(AutomaticResults(index.store.uri, lambda: [bundle.card]))
    assert started == BOTH


def test_nothing_is_made_during_a_fill(put, index, results, started):
    put(3)
    with index.filling():
        look(results)
    assert started == []
    look(results)
    assert started == BOTH


def test_a_fill_says_that_it_is_running(index, picture):
    held = []

    def encode(pixels: np.ndarray) -> np.ndarray:
        with index.filling() as free:
            held.append(not free)
        return np.ones((len(pixels), index.dimension), np.float32)

    originals = [Original("a.png", None, None, lambda: picture(0))]
    fill(originals, 1, BatchEncoder(encode, Preprocessing(32), 1), index, Tally(), quiet=True)
    assert held == [True]
    with index.filling() as free:
        assert free


def test_a_failure_is_tried_again_only_after_a_change(put, index, results, rested, monkeypatch):
    tried = []

    def fail(derived: Derived, **settings) -> None:
        tried.append(derived.kind)
        with pytest.raises(DerivedProblem), derived._heartbeat():
            raise DerivedProblem("too many pairs")

    monkeypatch.setattr(Derived, "start", fail)
    put(3)
    look(results, 6)
    assert tried == ["duplicates", "map"]
    put()
    look(results, 6)
    assert tried == ["duplicates", "map"] * 2


def test_what_another_process_computes_is_left_to_it(put, index, results, started, rested):
    put(3)
    with Derived(index, "duplicates")._heartbeat():
        look(results)
        assert started == BOTH[1:]


def test_one_computation_runs_at_a_time(put, bundle, index, results, monkeypatch):
    started = []

    def begin(derived: Derived, **settings) -> None:
        started.append(derived)
        derived.write(Progress("computing", at=time.time()))

    monkeypatch.setattr(Derived, "start", begin)
    put(3)
    put(3, Index(index.store.uri, bundle.card.id, bundle.card.dimension, "others"))
    look(results)
    assert len(started) == 1
    started[0].write(Progress("failed", at=time.time()))
    look(results)
    assert len(started) == 2


def test_vectors_of_an_encoder_that_is_not_served_are_left_alone(put, index, results, started):
    put(3, Index(index.store.uri, "another-1", 5))
    look(results)
    assert started == []


def test_a_problem_is_logged_once_and_the_looks_go_on(results, monkeypatch, caplog, wait_until):
    looks = []

    def fail() -> None:
        looks.append(1)
        raise IndexProblem("the disk is gone")

    monkeypatch.setattr(automatic, "LOOK_S", 0.001)
    monkeypatch.setattr(results, "look", fail)
    with caplog.at_level(logging.WARNING, "twinview"):
        results.start()
        wait_until(lambda: len(looks) > 3, "it looks no more")
        results.close()
    assert caplog.messages == ["no results are made by themselves: the disk is gone"]


def test_the_reply_says_whether_a_result_is_made_by_itself(http, fill, monkeypatch):
    fill(6)
    for path in ("map", "duplicates"):
        assert http.get(f"/collections/pictures/{path}").json()["automatic"] is True
    monkeypatch.setattr(automatic, "MOST", 5)
    assert http.get("/collections/pictures/map").json()["automatic"] is False


@pytest.mark.slow
def test_the_service_makes_both_without_being_asked(serve, fill, monkeypatch, wait_until):
    monkeypatch.setattr(automatic, "LOOK_S", 0.1)
    http = serve()
    fill(6)

    def counts() -> list[int | None]:
        return [http.get(f"/collections/pictures/{path}").json()["count"] for path in ("map", "duplicates")]

    wait_until(lambda: counts() == [6, 6], "nothing is made")
