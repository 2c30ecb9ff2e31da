"""Whether new pictures look like those of a collection."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from serving import drift
from serving.collection.index import Index
from serving.collection.items import Item, unit
from serving.collection.problems import IndexProblem
from serving.curation.drift import ALARM, WINDOW, Reference
from serving.drift import DriftWatch
from serving.metrics import Metrics

DRIFT = "/collections/pictures/drift"
D = 48


def heaps(n: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Unit vectors (n, D) in ten heaps, all moved by `shift` in one direction."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(10, D))
    vectors = centres[rng.integers(10, size=n)] + rng.normal(size=(n, D))
    vectors[:, 0] += shift
    return unit(vectors)


# The comparison -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.5])
def test_the_p_value_is_the_share_of_permutations_that_lie_as_far(shift):
    there, new = heaps(1200, seed=1), heaps(300, seed=5, shift=shift)
    reference = Reference(there)
    features = reference.features(np.concatenate([new, there[600:]])).astype(np.float64)
    rng = np.random.default_rng(0)

    def statistic(rows: np.ndarray) -> float:
        first, second = features[rows[:300]].mean(axis=0), features[rows[300:]].mean(axis=0)
        return float(((first - second) ** 2).sum())

    observed = statistic(np.arange(900))
    permuted = np.array([statistic(rng.permutation(900)) for _ in range(1000)])
    assert reference.compare(new).p_value == pytest.approx((permuted >= observed).mean(), abs=0.06)


def test_samples_of_the_collection_have_p_values_of_all_sizes():
    everything = heaps(20_000, seed=2)
    rng = np.random.default_rng(3)
    found = []
    for seed in range(10):  # the reference is a sample too
        reference = Reference(everything[rng.integers(20_000, size=1000)], seed)
        features = reference.features(everything)
        means = [features[rng.integers(20_000, size=WINDOW)].mean(axis=0) for _ in range(50)]
        found += [reference.compare_mean(mean, WINDOW).p_value for mean in means]
    below = [(np.array(found) < level).mean() for level in (0.5, 0.1, 0.01)]
    assert below == pytest.approx([0.5, 0.1, 0.01], abs=0.08)
    assert below[1] > 0.03 and below[2] < 0.04
    assert min(found) > ALARM


def test_pictures_that_changed_differ_and_lie_farther_the_more_they_changed():
    reference = Reference(heaps(2000, seed=1))
    alike, near, far = (reference.compare(heaps(WINDOW, seed=2, shift=shift)) for shift in (0, 1, 3))
    assert [result.differs for result in (alike, near, far)] == [False, True, True]
    assert alike.distance < 0.02 < near.distance < far.distance / 2
    assert far.distance < 2**0.5


def test_a_collection_of_one_picture_is_compared_too():
    one = np.repeat(heaps(1, seed=1), WINDOW, axis=0)
    reference = Reference(one)
    assert not reference.compare(one).differs
    assert reference.compare(heaps(WINDOW, seed=1)).differs


# Following a collection -----------------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path):
    """index(n, shift) adds n items to the collection, and returns it."""
    opened = Index(tmp_path / "index", "encoder", D)

    def add(n: int, shift: float = 0.0) -> Index:
        there = opened.count()
        items = [Item(f"{there + i}", "", None, None, 0, 0, 0, {}) for i in range(n)]
        opened.upsert(items, heaps(n, seed=there + 1, shift=shift), {})
        return opened

    return add


@pytest.fixture
def often(monkeypatch):
    """Comparisons need not wait for each other."""
    monkeypatch.setattr(drift, "REST_S", 0.0)


def state(watch: DriftWatch, index: Index) -> bool | None:
    """Whether the newest comparison says that pictures differ; None if there is none."""
    watch.look()
    found = watch.look_of(index).drift
    return None if found is None else found.differs


def test_the_last_pictures_are_compared_after_every_hundred(index, often):
    watch, there = DriftWatch(), index(600)
    watch.note(there, 7 * heaps(WINDOW - 1, seed=50))  # of any length
    assert state(watch, there) is None
    watch.note(there, heaps(1, seed=51))
    assert state(watch, there) is False
    watch.note(there, heaps(drift.EVERY - 1, seed=52, shift=9))
    assert state(watch, there) is False  # not compared yet
    watch.note(there, heaps(1, seed=53, shift=9))
    assert state(watch, there) is True
    watch.note(there, heaps(WINDOW, seed=54))  # the others have passed
    assert state(watch, there) is False
    assert watch.look_of(there).pictures == WINDOW


def test_comparisons_rest_for_a_minute(index, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(drift, "monotonic", lambda: now)
    watch, there = DriftWatch(), index(600)
    watch.note(there, heaps(WINDOW, seed=50))
    assert state(watch, there) is False
    watch.note(there, heaps(WINDOW, seed=51, shift=9))
    now += drift.REST_S - 1
    assert state(watch, there) is False
    now += 1
    assert state(watch, there) is True


def test_a_small_collection_is_compared_when_it_has_grown(index, often):
    watch, there = DriftWatch(), index(drift.LEAST - 1)
    watch.note(there, heaps(WINDOW, seed=50))
    assert state(watch, there) is None
    index(1)
    assert state(watch, there) is False


def test_the_reference_follows_a_collection_that_changes_much(index, often):
    watch, there = DriftWatch(), index(600)
    moved = heaps(WINDOW, seed=50, shift=9)
    watch.note(there, moved)
    assert state(watch, there) is True
    index(100, shift=9)
    watch.note(there, moved)
    before = watch.look_of(there)
    assert state(watch, there) is True
    assert watch.look_of(there).drift == before.drift  # the same reference
    index(20_000, shift=9)
    watch.note(there, moved)
    assert state(watch, there) is False


def test_the_reference_is_sampled_again_after_a_day(index, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(drift, "monotonic", lambda: now)
    watch, there = DriftWatch(), index(600)
    moved = heaps(WINDOW, seed=50, shift=9)
    watch.note(there, moved)
    assert state(watch, there) is True
    ids = sorted(there.ids())
    items = [Item(id, "", None, None, 0, 0, 0, {}) for id in ids]
    there.upsert(items, heaps(len(ids), seed=1, shift=9), {})  # as many as before
    now += drift.OLDEST_S + 1
    watch.note(there, moved)
    assert state(watch, there) is False


def test_collections_that_got_no_picture_for_longest_are_forgotten(index, tmp_path, monkeypatch):
    monkeypatch.setattr(drift, "FOLLOWED", 2)
    watch = DriftWatch()
    first, second, third = (Index(tmp_path / "index", "encoder", D, name) for name in ("first", "second", "third"))
    for one in (first, second, first, third):
        watch.note(one, heaps(3, seed=1))
    assert [watch.look_of(one).pictures for one in (first, second, third)] == [6, 0, 3]
    watch.forget(first)
    assert [watch.look_of(one).pictures for one in (first, third)] == [0, 3]


def test_a_collection_that_cannot_be_read_is_logged_once_and_tried_again(index, often, monkeypatch, caplog):
    watch, there = DriftWatch(), index(600)
    watch.note(there, heaps(WINDOW, seed=50))

    def fail() -> int:
        raise IndexProblem("The collection is damaged.")

    with monkeypatch.context() as patch:
        patch.setattr(there, "count", fail)
        assert state(watch, there) is state(watch, there) is None
    assert [record.getMessage() for record in caplog.records] == [
        "new pictures were not compared with their collection: The collection is damaged."
    ]
    assert state(watch, there) is False


def test_a_fault_of_the_comparison_is_logged_and_ends_nothing(index, often, monkeypatch, caplog):
    watch, there = DriftWatch(), index(600)
    watch.note(there, heaps(WINDOW, seed=50))
    with monkeypatch.context() as patch:
        patch.setattr(drift, "Reference", lambda vectors: vectors["no such thing"])
        assert state(watch, there) is None
    assert "new pictures were not compared with the collection pictures" in caplog.text
    assert state(watch, there) is False


def test_a_gauge_of_a_collection_that_is_gone_says_that_nothing_differs():
    metrics = Metrics()
    metrics.drifts = lambda: [("pictures", "m", 0.25, 1e-9, 500)]
    assert 'twinview_drift_p_value{collection="pictures",model="m"} 1e-09' in metrics.text().decode()
    metrics.drifts = tuple
    text = metrics.text().decode()
    for gauge, value in {"distance": 0.0, "p_value": 1.0, "pictures": 0.0}.items():
        assert f'twinview_drift_{gauge}{{collection="pictures",model="m"}} {value}' in text


# The service ----------------------------------------------------------------------------------------------------------


def negative(picture: bytes) -> bytes:
    """The picture as a camera takes it that has gone wrong."""
    buffer = io.BytesIO()
    ImageOps.solarize(ImageOps.autocontrast(Image.open(io.BytesIO(picture))), 60).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.slow
def test_the_service_says_whether_new_pictures_look_like_the_collection(
    serve, connect, fill, picture, often, wait_until, monkeypatch
):
    monkeypatch.setattr("serving.app.RETRY_S", 0.05)
    fill(600)
    http = serve()
    client = connect(http)
    assert http.get("/metrics").text.count("twinview_drift_distance{") == 0
    assert client.drift().text == "0 of the 500 pictures that are compared with the collection have come"
    client.embed([picture(1000 + i) for i in range(WINDOW)])
    wait_until(lambda: client.drift().state != "unknown", "they are not compared")
    found = client.drift()
    assert (found.state, found.pictures, found.window) == ("alike", WINDOW, WINDOW)
    assert found.text == "The last 500 pictures look like the collection"
    assert found.p_value > ALARM

    client.embed([negative(picture(2000 + i)) for i in range(WINDOW)])
    wait_until(lambda: client.drift().state == "different", "the change is not noticed")
    found = client.drift()
    assert found.text == "The last 500 pictures differ from the collection (p < 0.0000001)"
    assert 0 < found.p_value < ALARM and found.distance > 0.05
    labels = f'{{collection="pictures",model="{found.model}"}}'

    def gauges() -> list[float]:
        values = dict(line.rpartition(" ")[::2] for line in http.get("/metrics").text.splitlines())
        return [float(values[f"twinview_drift_{name}{labels}"]) for name in ("p_value", "distance", "pictures")]

    def answer() -> list[float]:
        last = client.drift()
        return [last.p_value, last.distance, last.pictures]

    wait_until(lambda: gauges() == answer(), "the gauges differ from the answer")  # of another comparison, for a moment


def test_pictures_count_for_the_collection_that_they_were_sent_for(http, picture):
    one = {"Content-Type": "image/png"}
    for name in ("pictures", "mine"):
        assert http.put(f"/collections/{name}/items", content=picture(1), headers=one).status_code == 200

    def counts() -> list[int]:
        return [http.get(f"/collections/{name}/drift").json()["pictures"] for name in ("pictures", "mine")]

    assert counts() == [1, 1]
    assert http.post("/embed", content=picture(2), headers=one).status_code == 200
    assert counts() == [2, 1]
    assert http.post("/collections/mine/search", files={"image": picture(3)}).status_code == 200
    assert counts() == [2, 2]
    vectors = [{"id": "a", "vector": [1.0] * 48}]  # embedded elsewhere
    body = {"items": vectors, "model": http.get("/v1/models").json()["data"][0]["id"]}
    assert http.put("/collections/mine/items", json=body).status_code == 200
    assert http.post("/collections/mine/search", json={"positive": ["a"]}).status_code == 200
    assert counts() == [2, 2]
    assert http.delete("/collections/mine").status_code == 200
    assert http.put("/collections/mine").status_code == 200
    assert counts() == [2, 0]


def test_too_few_pictures_are_a_sentence(http, fill):
    assert http.get(DRIFT).status_code == 404
    fill(3)
    answer = http.get(DRIFT).json()
    assert answer["text"] == "The collection has 3 pictures; new ones are compared with it when it has 500"
    assert (answer["state"], answer["p_value"], answer["distance"]) == ("unknown", None, None)
