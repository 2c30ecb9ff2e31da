import csv
from itertools import chain

import numpy as np
import pytest

from serving.cli.duplicates import DuplicatesSettings, run
from serving.collection.index import Index, IndexProblem, Item, unit
from serving.derived import pairs, task
from serving.derived.duplicates import compute, group, looked_up
from serving.derived.pairs import TooManyPairs, near_pairs
from serving.derived.task import Derived, DerivedProblem

D = 32


def clusters(n: int, seed: int = 0, d: int = D) -> np.ndarray:
    """Unit vectors (n, d), a tenth of them copies with some noise."""
    rng = np.random.default_rng(seed)
    scale = np.arange(1, d + 1) ** -0.5
    x = rng.standard_normal((max(2, n // 50), d))[rng.integers(max(2, n // 50), size=n)] * scale
    x += 0.6 * rng.standard_normal((n, d)) * scale
    copies, of = rng.integers(n, size=(2, n // 10))
    x[copies] = x[of] + rng.uniform(0, 0.3, (len(of), 1)) * scale * rng.standard_normal((len(of), d))
    return unit(x)


def all_pairs(vectors: np.ndarray, threshold: float) -> set[tuple[int, int]]:
    """An independent reference: plain loops in float64."""
    found = set()
    for i, row in enumerate(np.float64(vectors)):
        found |= {(j, i) for j in np.flatnonzero(vectors[:i] @ row >= threshold).tolist()}
    return found


def found_by(vectors: np.ndarray, threshold: float) -> set[tuple[int, int]]:
    pairs = near_pairs(vectors, threshold)
    listed = list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    assert len(set(listed)) == len(listed)
    np.testing.assert_allclose(
        pairs.cosine, np.einsum("ij,ij->i", vectors[pairs.first], vectors[pairs.second]), atol=1e-6
    )
    return set(listed)


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.6, 0.9, 0.99])
@pytest.mark.parametrize("all_at_once", [0, 10_000])
def test_every_near_pair_is_found_once_and_no_other(monkeypatch, threshold, all_at_once):
    monkeypatch.setattr(pairs, "ALL_AT_ONCE", all_at_once)
    monkeypatch.setattr(pairs, "BLOCK", 100)  # so that there are several blocks
    vectors = clusters(1500)
    expected = all_pairs(vectors, threshold)
    assert len(expected) > 50
    assert found_by(vectors, threshold) == expected


@pytest.mark.slow
def test_all_pairs_are_found_where_clusters_touch_or_no_direction_dominates(monkeypatch):
    monkeypatch.setattr(pairs, "ALL_AT_ONCE", 0)
    rng = np.random.default_rng(1)
    around = unit(rng.standard_normal((600, 3)) @ rng.standard_normal((3, D)))  # dense on a sphere of few dimensions
    flat = unit(rng.standard_normal((600, D)))  # the same variance in every direction
    for vectors, threshold in ((around, 0.97), (flat, 0.5)):
        expected = all_pairs(vectors, threshold)
        assert expected
        assert found_by(vectors, threshold) == expected


@pytest.mark.slow
def test_most_pairs_are_never_compared(monkeypatch):
    monkeypatch.setattr(pairs, "ALL_AT_ONCE", 0)
    vectors, compared = clusters(3000), []
    einsum = np.einsum
    monkeypatch.setattr(pairs.np, "einsum", lambda how, a, b: compared.append(len(a)) or einsum(how, a, b))
    found = near_pairs(vectors, 0.95)
    assert sum(compared) < 0.02 * 3000 * 2999 / 2 + len(found.first)


def test_few_vectors_have_few_pairs():
    assert len(near_pairs(np.zeros((0, D), np.float32), 0.9).first) == 0
    assert len(near_pairs(clusters(1), 0.9).first) == 0
    assert found_by(np.repeat(clusters(1), 3, axis=0), 0.999) == {(0, 1), (0, 2), (1, 2)}


def test_too_many_pairs_are_refused(monkeypatch):
    monkeypatch.setattr(pairs, "MOST_PAIRS", 10)
    with pytest.raises(TooManyPairs, match=r"more than 10 pairs have a cosine of 0\.5 or more"):
        near_pairs(np.repeat(clusters(1), 20, axis=0), 0.5)


# Groups ---------------------------------------------------------------------------------------------------------------


def on_circle(*degrees: float) -> np.ndarray:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles), *[0 * angles] * (D - 2)], axis=1)


@pytest.fixture
def put(tmp_path):
    """put(vectors, widths, ids) -> an index with these items"""

    def fill(vectors, widths=None, ids=None) -> Index:
        index = Index(tmp_path / "index", "means-1", D)
        ids = ids or [f"{i:032x}" for i in range(len(vectors))]
        widths = widths or [100] * len(ids)
        items = [Item(id, f"{i}.jpg", None, f"/p/{i}.jpg", widths[i], 100, 1000) for i, id in enumerate(ids)]
        index.upsert(items, vectors)
        return index

    return fill


def groups_of(index: Index, threshold: float):
    arrays = compute(index, lambda stage, share: None, threshold)
    return [
        ([one.keep.name], [item.name for item, _ in one.others])
        for one in looked_up(index, group(arrays, threshold), threshold)
    ]


def test_the_picture_with_most_pixels_represents_its_group(put):
    index = put(on_circle(0, 5, 90, 95), widths=[100, 200, 50, 40])
    assert groups_of(index, 0.99) == [(["1.jpg"], ["0.jpg"]), (["2.jpg"], ["3.jpg"])]


def test_the_largest_group_comes_first_and_deleted_pictures_are_regrouped(put):
    index = put(on_circle(0, 5, 90, 93, 96), widths=[100, 90, 50, 40, 30])
    arrays = compute(index, lambda stage, share: None, 0.99)
    names = [[int(first, 16), *(int(id, 16) for id in others)] for first, others in group(arrays, 0.99)]
    assert names == [[2, 3, 4], [0, 1]]
    left = {f"{i:032x}" for i in (0, 3, 4)}
    assert [first for first, _ in group(arrays, 0.99, left)] == [f"{3:032x}"]


def test_a_chain_of_small_steps_is_not_one_group(put):
    """Each picture is near the next, but the ends are not similar."""
    index = put(on_circle(0, 10, 20, 30, 40), widths=[10, 9, 8, 7, 6])
    assert groups_of(index, np.cos(np.radians(11))) == [(["0.jpg"], ["1.jpg"]), (["2.jpg"], ["3.jpg"])]


@pytest.mark.slow
def test_duplicates_are_near_their_representative_and_representatives_are_not_near_each_other(put):
    vectors = clusters(800)
    index = put(vectors, widths=np.random.default_rng(2).integers(1, 50, 800).tolist())
    found = list(looked_up(index, group(compute(index, lambda *_: None, 0.8), 0.9), 0.9))
    gone = [int(item.name[:-4]) for one in found for item, _ in one.others]
    assert len(gone) == len(set(gone)) > 30
    for one in found:
        keep = int(one.keep.name[:-4])
        for item, cosine in one.others:
            assert cosine == pytest.approx(float(vectors[keep] @ vectors[int(item.name[:-4])]), abs=1e-5)
            assert cosine >= 0.9
            assert item.width <= one.keep.width
    stay = sorted(set(range(800)) - set(gone))
    cosines = vectors[stay] @ vectors[stay].T - 2 * np.eye(len(stay))
    assert cosines.max() < 0.9


@pytest.mark.slow
def test_the_command_writes_one_row_per_picture_and_compares_once(put, tmp_path, twinview, capsys, monkeypatch):
    index = put(on_circle(0, 1, 90, 180), widths=[100, 200, 50, 50])
    output = tmp_path / "out" / "groups.csv"
    twinview("duplicates", "--index", tmp_path / "index", "--output", output, "--threshold", "0.98")
    assert "1 groups" in capsys.readouterr().out
    rows = list(csv.DictReader(output.read_text().splitlines()))
    assert [(row["group"], row["stays"], row["name"], row["width"]) for row in rows] == [
        ("1", "yes", "1.jpg", "200"),
        ("1", "no", "0.jpg", "100"),
    ]
    assert float(rows[1]["cosine"]) == pytest.approx(np.cos(np.radians(1)), abs=1e-4)

    monkeypatch.setattr("serving.derived.duplicates.compute", lambda *_: pytest.fail("compared again"))
    settings = DuplicatesSettings(index=str(tmp_path / "index"), threshold=0.95, output=output)
    assert run(settings) == 1
    index.delete([f"{0:032x}"])
    monkeypatch.undo()
    assert run(settings) == 0
    assert len(output.read_text().splitlines()) == 1


def test_an_invalid_threshold_is_named(put, tmp_path):
    put(on_circle(0, 1))
    with pytest.raises(DerivedProblem, match=r"--threshold 1\.5: must be above 0 and at most 1"):
        run(DuplicatesSettings(index=str(tmp_path / "index"), threshold=1.5))


# In the background ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_service_compares_in_the_background_and_reports_progress(http, fill, wait_until):
    items = fill(6)
    assert http.get("/collections/nothing/duplicates").status_code == 404
    assert http.post("/collections/nothing/duplicates").status_code == 404
    before = http.get("/collections/pictures/duplicates").json()
    assert (before["state"], before["groups"], before["count"]) == ("none", [], None)
    started = http.post("/collections/pictures/duplicates", params={"threshold": 0.3})
    assert started.status_code == 202
    assert started.json()["state"] == "computing"

    def result() -> dict:
        return http.get("/collections/pictures/duplicates", params={"threshold": 0.3}).json()

    wait_until(lambda: result()["state"] != "computing", "the pictures are still compared", 120)
    answer = result()
    assert answer["state"] == "done", answer
    assert (answer["count"], answer["new"], answer["gone"], answer["least"]) == (6, 0, 0, 0.3)
    assert {one["id"] for one in chain(*answer["groups"])} <= {item.id for item in items}
    assert answer["total"] == len(answer["groups"]) > 0
    refused = http.get("/collections/pictures/duplicates", params={"threshold": 0.1})
    assert refused.status_code == 400
    assert "POST a lower threshold first" in refused.json()["error"]["message"]

    gone = [one["id"] for one in answer["groups"][0][1:]]
    assert http.request("DELETE", "/collections/pictures/items", json={"ids": gone}).status_code == 200
    after = http.get("/collections/pictures/duplicates", params={"threshold": 0.3}).json()
    assert (after["new"], after["gone"], after["total"]) == (0, len(gone), len(after["groups"]))
    assert not {one["id"] for one in chain(*after["groups"])} & set(gone)


def test_a_failed_computation_says_why_and_keeps_the_last_result(put, monkeypatch):
    index = put(on_circle(0, 1))
    derived = Derived(index, "duplicates")
    derived.compute(threshold=0.9)
    monkeypatch.setattr(pairs, "MOST_PAIRS", 0)
    with pytest.raises(DerivedProblem):
        derived.compute(threshold=0.8)
    progress = derived.progress()
    assert progress.state == "failed"
    assert "choose a higher threshold" in progress.problem
    assert derived.result().settings == {"threshold": 0.9}


def test_a_computation_without_a_heartbeat_has_failed(put, monkeypatch):
    derived = Derived(put(on_circle(0, 1)), "duplicates")
    monkeypatch.setattr(
        "serving.derived.task.subprocess.Popen", lambda *_, **__: type("P", (), {"wait": lambda self: 0})()
    )
    derived.start(threshold=0.9)
    assert derived.progress().state == "computing"
    monkeypatch.setattr("serving.derived.task.SILENT_S", 0.0)
    assert derived.progress().state == "failed"
    assert "ended unexpectedly" in derived.progress().problem


def test_a_new_version_with_the_same_pictures_is_not_stale(put):
    index = put(on_circle(*range(5)))
    derived = Derived(index, "duplicates")
    derived.compute(threshold=0.9)
    index.upsert([index.get(f"{0:032x}")[0]], on_circle(0))
    assert not derived.result().stale
    index.upsert([Item("f" * 32, "new.jpg", None, None, 1, 1)], on_circle(50))
    result = derived.result()
    assert (result.new, result.gone) == (1, 0)


@pytest.mark.slow
def test_changes_of_two_collections_polled_in_turn_are_each_counted_once(tmp_path, monkeypatch):
    indexes = [Index(tmp_path, "enc", D, name) for name in ("first", "second")]
    for index in indexes:
        index.upsert([Item("a", "a.jpg", None, None, 1, 1)], on_circle(0))
        Derived(index, "duplicates").compute(threshold=0.9)
        index.upsert([Item("b", "b.jpg", None, None, 1, 1)], on_circle(50))
    reads, ids = [], Index.ids
    monkeypatch.setattr(Index, "ids", lambda index: reads.append(index.name) or ids(index))
    for _ in range(3):
        for index in indexes:
            assert Derived(index, "duplicates").result().new == 1
    assert reads == ["first", "second"]


def test_a_result_that_is_deleted_while_it_is_read_is_named(tmp_path, monkeypatch):
    index = Index(tmp_path, "enc", D)
    index.upsert([Item("a", "a.jpg", None, None, 1, 1)], on_circle(0))
    Derived(index, "duplicates").compute(threshold=0.9)
    index.upsert([Item("b", "b.jpg", None, None, 1, 1)], on_circle(50))
    facts = Index.facts

    def deleting(index: Index):
        (file,) = tmp_path.glob("derived/*/duplicates.npz")
        file.unlink()
        task._arrays.cache_clear()
        return facts(index)

    monkeypatch.setattr(Index, "facts", deleting)
    with pytest.raises(IndexProblem, match=r"duplicates\.npz has just been deleted"):
        Derived(index, "duplicates").result()
