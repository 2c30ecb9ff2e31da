import base64
import subprocess
import sys

import numpy as np
import pytest

from serving.collection.index import Index, Item, unit
from serving.derived import map, task
from serving.derived.task import Derived

D = 16


def arranged(vectors: np.ndarray, seed: int, before: np.ndarray | None, report) -> np.ndarray:
    """Replaces PaCMAP, which takes seconds to load: principal components, or the previous positions."""
    return map._components(vectors) if before is None else before


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("serving.derived.map._pacmap", arranged)


def two_kinds(n: int) -> np.ndarray:
    """(n, D): even rows near one direction, odd rows near another."""
    rng = np.random.default_rng(0)
    return unit(np.eye(D)[np.arange(n) % 2] + 0.1 * rng.standard_normal((n, D)))


def item(i: int, label: str | None) -> Item:
    return Item(f"{i:032x}", f"{i}.jpg", label, None, 10, 10)


@pytest.fixture
def index(tmp_path) -> Index:
    index = Index(tmp_path / "index", "means-1", D)
    index.upsert([item(i, ("shirt", None)[i % 2]) for i in range(40)], two_kinds(40))
    return index


def places(columns: dict) -> dict[str, np.ndarray]:
    at = np.stack([columns["x"], columns["y"]], axis=1)
    return dict(zip(np.char.decode(columns["ids"]).tolist(), at, strict=True))


def test_a_map_has_a_position_within_one_for_each_picture(index):
    columns = Derived(index, "map").compute(seed=0).arrays
    at = places(columns)
    assert set(at) == index.ids()
    assert np.abs([columns["x"], columns["y"]]).max() == pytest.approx(1)
    kinds = [np.mean([at[f"{i:032x}"] for i in range(start, 40, 2)], axis=0) for start in (0, 1)]
    spread = max(np.std([at[f"{i:032x}"] for i in range(start, 40, 2)], axis=0).max() for start in (0, 1))
    assert np.linalg.norm(kinds[0] - kinds[1]) > 2 * spread
    labels = [columns["labels"][i] if i >= 0 else None for i in columns["label"]]
    for id, label in zip(columns["ids"], labels, strict=True):
        assert label == ("shirt" if int(id, 16) % 2 == 0 else None)


def test_a_new_picture_is_placed_among_its_neighbours_and_a_deleted_one_is_removed(index, quick):
    kept = Derived(index, "map")
    before = places(kept.compute(seed=0).arrays)
    new = [item(100, "shoe"), item(101, None)]
    index.upsert(new, two_kinds(42)[40:])
    index.delete([f"{0:032x}"])
    columns = map.current(index, kept.result())
    after = places(columns)
    assert set(after) == index.ids()
    assert columns["unplaced"] == 0
    for i, start in ((100, 0), (101, 1)):
        kind = np.array([before[f"{j:032x}"] for j in range(start, 40, 2)])
        assert (after[f"{i:032x}"] >= kind.min(axis=0)).all()
        assert (after[f"{i:032x}"] <= kind.max(axis=0)).all()
    assert columns["labels"][columns["label"][columns["ids"].tolist().index(b"%032x" % 100)]] == "shoe"
    assert all((after[id] == before[id]).all() for id in before if id in after)


def test_similar_pictures_form_a_group_and_the_largest_has_number_0():
    rng = np.random.default_rng(0)
    of = np.repeat(np.arange(12), np.arange(20, 44, 2))  # sizes 20 to 42
    found = map._groups(unit(np.eye(D)[of] + 0.05 * rng.standard_normal((len(of), D))), 0, lambda *_: None)
    assert [len(set(found[of == kind])) for kind in range(12)] == [1] * 12
    assert (found[of == 11] == 0).all() and (found[of == 0] == 11).all()
    same = np.repeat(two_kinds(2), 50, axis=0)
    assert sorted(set(map._groups(same, 0, lambda *_: None).tolist())) == [0, 1]
    assert map._groups(two_kinds(map.FEW), 0, lambda *_: None).tolist() == [0] * map.FEW


def test_a_new_picture_joins_the_group_of_its_nearest_neighbour(index, quick):
    kept = Derived(index, "map")
    result = kept.compute(seed=0)
    result.arrays["group"][:] = np.char.decode(result.arrays["ids"]).astype(object) == f"{3:032x}"
    index.upsert([item(100, None)], index.get(f"{3:032x}")[1][None])
    columns = map.current(index, task.Result(result.arrays, {}, new=1, gone=0))
    assert columns["group"][columns["ids"].tolist().index(b"%032x" % 100)] == 1


def test_new_pictures_with_only_new_neighbours_are_placed_among_the_neighbours_of_those(index, quick, monkeypatch):
    monkeypatch.setattr("serving.derived.map.SEARCHED", 4)  # itself and three of its kind
    kept = Derived(index, "map")
    before = places(kept.compute(seed=0).arrays)
    here, far = two_kinds(1)[0], unit(np.eye(D)[2:3])[0]
    bridge = [unit((1 - t) * here[None] + t * far[None])[0] for t in np.linspace(0.05, 1, 12)]
    index.upsert([item(100 + i, None) for i in range(12)], np.stack(bridge))
    columns = map.current(index, kept.result())
    assert columns["unplaced"] == 0
    evens = np.array([before[f"{i:032x}"] for i in range(0, 40, 2)])
    last = places(columns)[f"{111:032x}"]
    assert (last >= evens.min(axis=0)).all() and (last <= evens.max(axis=0)).all()


def test_new_pictures_beyond_the_limit_are_counted(index, quick, monkeypatch):
    kept = Derived(index, "map")
    kept.compute(seed=0)
    monkeypatch.setattr("serving.derived.map.PLACED", 2)
    index.upsert([item(i, None) for i in range(100, 105)], two_kinds(5))
    columns = map.current(index, kept.result())
    assert (len(columns["ids"]), columns["unplaced"]) == (42, 3)


def test_a_new_map_starts_from_the_previous_one(index, quick):
    kept = Derived(index, "map")
    before = places(kept.compute(seed=0).arrays)
    index.upsert([item(100, None)], two_kinds(1))
    after = places(kept.compute(seed=0).arrays)
    here, there = (np.array([at[id] for id in before]) for at in (after, before))
    assert min(np.corrcoef(here[:, i], there[:, i])[0, 1] for i in (0, 1)) > 0.999


def test_a_collection_of_no_or_one_picture_has_a_map(tmp_path):
    index = Index(tmp_path / "index", "means-1", D)
    assert len(Derived(index, "map").compute(seed=0).arrays["ids"]) == 0
    index.upsert([item(0, None)], two_kinds(1))
    columns = Derived(index, "map").compute(seed=0).arrays
    assert (columns["x"].tolist(), columns["y"].tolist()) == ([0], [0])


@pytest.mark.slow
def test_the_service_computes_a_map_and_returns_it_in_columns(http, fill, wait_until):
    fill(12)
    assert http.get("/collections/nothing/map").status_code == 404
    nothing = http.get("/collections/pictures/map").json()
    assert (nothing["state"], nothing["ids"], nothing["x"]) == ("none", [], "")
    assert http.post("/collections/pictures/map").status_code == 202
    wait_until(
        lambda: http.get("/collections/pictures/map").json()["state"] != "computing", "the map is still computed"
    )
    answer = http.get("/collections/pictures/map").json()
    assert (answer["state"], answer["count"], len(answer["ids"])) == ("done", 12, 12)
    asked = http.get("/collections/pictures/map", params={"places": False}).json()
    assert (asked["count"], asked["made"], asked["ids"], asked["x"]) == (12, answer["made"], [], "")
    x, y = (np.frombuffer(base64.b64decode(answer[axis]), "<f4") for axis in "xy")
    assert np.abs([x, y]).max() == pytest.approx(1)
    label = np.frombuffer(base64.b64decode(answer["label"]), "<i4")
    items = {one["id"]: one for one in http.get("/collections/pictures/items").json()["items"]}
    for id, number in zip(answer["ids"], label, strict=True):
        assert answer["labels"][number] == items[id]["label"]


def test_one_result_is_computed_at_a_time(index, quick, monkeypatch):
    kept, lease, stages = Derived(index, "map"), index.store.lease("derived"), []

    def wait(seconds: float) -> None:
        stages.append(kept.progress().state)
        lease.__exit__(None, None, None)

    monkeypatch.setattr(task.time, "sleep", wait)
    assert lease.__enter__()
    kept.compute(seed=0)
    assert stages == ["computing"]
    assert kept.progress().state == "done"


@pytest.mark.slow
def test_pacmap_returns_the_same_map_for_the_same_seed_and_reports_progress():
    program = """
import numpy as np
from serving.derived import map
from serving.collection.index import unit
rng = np.random.default_rng(0)
vectors = unit(np.eye(16)[np.arange(300) % 3] + 0.2 * rng.standard_normal((300, 16)))
seen = []
first, second = (map._pacmap(vectors, 0, None, lambda *said: seen.append(said)) for _ in range(2))
assert (first == second).all()
assert {share for stage, share in seen if stage == "arranging"} >= {100 / 450, 1.0}
kinds = [first[i::3] for i in range(3)]
apart = min(np.linalg.norm(kinds[i].mean(0) - kinds[i - 1].mean(0)) for i in range(3))
assert apart > 2 * max(kind.std(0).max() for kind in kinds)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=task.ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
