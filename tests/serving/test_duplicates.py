import csv
import threading
from itertools import chain

import numpy as np
import pytest

from serving.cli.duplicates import DuplicatesSettings, run
from serving.collection.index import Index, IndexProblem, Item, unit
from serving.derived import copies, pairs, task
from serving.derived import threshold as own
from serving.derived.duplicates import IdGroup, compute, group, is_too_much, looked_up
from serving.derived.pairs import TooManyPairs, near_pairs
from serving.derived.task import Derived, DerivedProblem
from tests.conftest import PATIENCE_S

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


def test_of_identical_vectors_the_first_are_compared_with_all(monkeypatch):
    monkeypatch.setattr(copies, "COMPARED", 3)
    monkeypatch.setattr(pairs, "MOST_PAIRS", 26)
    rng = np.random.default_rng(0)
    same, other, near = unit(rng.standard_normal((3, D)))
    near = unit(same[None] + 0.01 * near)[0]
    vectors = np.stack([other, same, near, *[same] * 5, other])
    first = copies.first_identical(vectors)
    assert first.tolist() == [0, 1, 2, 1, 1, 1, 1, 1, 0]
    compared = copies.compared_rows(first)
    assert compared.tolist() == [0, 1, 2, 3, 4, 8]
    found = copies.with_identical(near_pairs(vectors[compared], 0.99), compared, first, 0.99)
    listed = sorted(zip(found.first.tolist(), found.second.tolist(), strict=True))
    left_out = {(5, 6), (5, 7), (6, 7)}
    assert listed == sorted(all_pairs(vectors, 0.99) - left_out)
    monkeypatch.setattr(pairs, "MOST_PAIRS", len(listed) - 1)
    with pytest.raises(TooManyPairs, match=r"have a cosine of 0\.99 or more"):
        copies.with_identical(near_pairs(vectors[compared], 0.99), compared, first, 0.99)


# Groups ---------------------------------------------------------------------------------------------------------------


def on_circle(*degrees: float) -> np.ndarray:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles), *[0 * angles] * (D - 2)], axis=1)


@pytest.fixture
def put(tmp_path):
    """put(vectors, widths, ids, folder) -> an index with these items"""

    def fill(vectors, widths=None, ids=None, folder="index") -> Index:
        index = Index(tmp_path / folder, "means-1", D)
        ids = ids or [f"{i:032x}" for i in range(len(vectors))]
        widths = widths or [100] * len(ids)
        items = [Item(id, f"{i}.jpg", None, f"/p/{i}.jpg", widths[i], 100, 1000) for i, id in enumerate(ids)]
        index.upsert(items, vectors)
        return index

    return fill


def groups_of(index: Index, threshold: float):
    arrays = compute(index, lambda stage, share: None, threshold)
    return [
        ([one.keep.name], [item.name for item, _ in one.near])
        for one in looked_up(index, group(arrays, threshold), threshold)
    ]


def test_the_picture_with_most_pixels_represents_its_group(put):
    index = put(on_circle(0, 5, 90, 95), widths=[100, 200, 50, 40])
    assert groups_of(index, 0.99) == [(["1.jpg"], ["0.jpg"]), (["2.jpg"], ["3.jpg"])]


def test_the_largest_group_comes_first_and_deleted_pictures_are_regrouped(put):
    index = put(on_circle(0, 5, 90, 93, 96), widths=[100, 90, 50, 40, 30])
    arrays = compute(index, lambda stage, share: None, 0.99)
    names = [[int(id, 16) for id in (one.keep, *one.near)] for one in group(arrays, 0.99)]
    assert names == [[2, 3, 4], [0, 1]]
    left = {f"{i:032x}" for i in (0, 3, 4)}
    assert [one.keep for one in group(arrays, 0.99, left)] == [f"{3:032x}"]


def test_a_chain_of_small_steps_is_not_one_group(put):
    """Each picture is near the next, but the ends are not similar."""
    index = put(on_circle(0, 10, 20, 30, 40), widths=[10, 9, 8, 7, 6])
    assert groups_of(index, np.cos(np.radians(11))) == [(["0.jpg"], ["1.jpg"]), (["2.jpg"], ["3.jpg"])]


@pytest.mark.slow
def test_duplicates_are_near_their_representative_and_representatives_are_not_near_each_other(put):
    vectors = clusters(800)
    index = put(vectors, widths=np.random.default_rng(2).integers(1, 50, 800).tolist())
    found = list(looked_up(index, group(compute(index, lambda *_: None, 0.8), 0.9), 0.9))
    gone = [int(item.name[:-4]) for one in found for item, _ in one.near]
    assert len(gone) == len(set(gone)) > 30
    for one in found:
        keep = int(one.keep.name[:-4])
        for item, cosine in one.near:
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
    said = capsys.readouterr().out
    assert said.startswith("4 pictures of pictures: 1 group with a cosine of at least 0.98, with 0 exact copies and ")
    assert " 0 exact copies and 1 near-duplicate; listed in " in said
    assert "More than 10% of the collection are near-duplicates at this threshold" in said
    rows = list(csv.DictReader(output.read_text().splitlines()))
    assert [(row["group"], row["stays"], row["copy"], row["name"], row["width"]) for row in rows] == [
        ("1", "yes", "", "1.jpg", "200"),
        ("1", "yes", "near", "0.jpg", "100"),  # one of four is too many
    ]
    assert float(rows[1]["cosine"]) == pytest.approx(np.cos(np.radians(1)), abs=1e-4)

    monkeypatch.setattr("serving.derived.duplicates.compute", lambda *_: pytest.fail("compared again"))
    settings = DuplicatesSettings(index=str(tmp_path / "index"), threshold=0.95, output=output)
    assert run(settings) == 0
    assert len(output.read_text().splitlines()) == 3
    index.delete([f"{0:032x}"])
    monkeypatch.undo()
    assert run(settings) == 0
    assert len(output.read_text().splitlines()) == 1


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Seven pictures in parts, one in none: 0 and 1, 2 and 3, and 4, 5 and 6 are near to each other."""
    monkeypatch.chdir(tmp_path)
    index = Index(tmp_path / "index", "means-1", D)
    names = ["test", "train", "train", "train", "val", "train", None, "test"]
    items = [
        Item(f"{i:032x}", f"{i}.jpg", str(i % 2), f"/p/{i}.jpg", 100, 100, metadata={"part": name} if name else {})
        for i, name in enumerate(names)
    ]
    index.upsert(items, on_circle(0, 1, 60, 61, 120, 123, 124, 180))
    return index


def test_pairs_across_a_split_are_listed(parts, tmp_path, twinview, capsys):
    twinview("duplicates", "--across", "part", "--threshold", "0.99")
    said = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "across.csv").read_text().splitlines()))
    assert [(row["part"], row["name"], row["other_part"], row["other_name"]) for row in rows] == [
        ("test", "0.jpg", "train", "1.jpg"),
        ("train", "5.jpg", "val", "4.jpg"),
    ]
    assert [float(row["cosine"]) for row in rows] == pytest.approx(np.cos(np.radians([1, 3])), abs=1e-4)
    assert (rows[0]["id"], rows[0]["label"], rows[0]["path"]) == (f"{0:032x}", "0", "/p/0.jpg")
    assert (rows[0]["other_id"], rows[0]["other_label"], rows[0]["other_path"]) == (f"{1:032x}", "1", "/p/1.jpg")
    counted = "8 pictures of pictures: 2 pairs of near-duplicates, with a cosine of at least 0.99, in different parts"
    assert f"{counted} by part; listed in {tmp_path}/across.csv\n" in said
    assert "  test and train: 1\n  train and val: 1\n" in said
    assert "Without a value of part, and so in no part: 1.\n" in said
    twinview("duplicates", "--across", "label", "--threshold", "0.9999", "--output", "out/labels.csv")
    assert "0 pairs of near-duplicates" in capsys.readouterr().out
    assert len((tmp_path / "out" / "labels.csv").read_text().splitlines()) == 1


def test_an_unknown_key_and_a_file_that_exists_are_named(parts, tmp_path, twinview):
    (tmp_path / "across.csv").write_text("mine")
    with pytest.raises(SystemExit, match=r"^error: --output: .*across\.csv exists; name another file"):
        twinview("duplicates", "--across", "part")
    with pytest.raises(SystemExit, match=r"^error: --across colour: no picture of pictures has a value of colour"):
        twinview("duplicates", "--across", "colour", "--output", "new.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["across.csv", "index"]
    assert (tmp_path / "across.csv").read_text() == "mine"


def test_an_invalid_threshold_is_named(put, tmp_path):
    put(on_circle(0, 1))
    with pytest.raises(DerivedProblem, match=r"--threshold 1\.5: must be above 0 and at most 1"):
        run(DuplicatesSettings(index=str(tmp_path / "index"), threshold=1.5))


# The collection's own threshold ---------------------------------------------------------------------------------------


def pictures_and_copies(spread: float, copies: int, each: int = 1, n: int = 400) -> np.ndarray:
    """Vectors of n different pictures, then of copies of the first ones. spread: of all around one direction"""
    rng = np.random.default_rng(3)
    different = np.eye(D)[0] + spread * rng.standard_normal((n, D))
    noise = 0.03 * spread * rng.standard_normal((each, copies, D))
    return unit(np.concatenate([different, *(different[:copies] + noise)]))


@pytest.mark.parametrize("each", [1, 4])
@pytest.mark.parametrize("spread", [0.01, 0.3, 10])
def test_copies_are_found_with_any_encoder(put, spread, each):
    index = put(pictures_and_copies(spread, 12, each), widths=[100] * 400 + [50] * 12 * each)
    arrays = compute(index, lambda *_: None)
    found = group(arrays, float(arrays["own"]))
    expected = {i: {400 + i + 12 * copy for copy in range(each)} for i in range(12)}
    assert {int(one.keep, 16): {int(id, 16) for id in one.near} for one in found} == expected


@pytest.mark.parametrize("spread", [0.01, 0.3, 10])
def test_different_pictures_are_no_near_duplicates_with_any_encoder(put, spread):
    arrays = compute(put(pictures_and_copies(spread, 0)), lambda *_: None)
    assert group(arrays, float(arrays["own"])) == []


def test_a_sample_gives_about_the_threshold_of_all(monkeypatch):
    vectors = pictures_and_copies(0.3, 60, n=2000)
    of_all = own.own_threshold(vectors)
    monkeypatch.setattr(own, "SAMPLE", 500)
    copies = np.einsum("ij,ij->i", vectors[:60], vectors[2000:])
    different = (vectors[:2000] @ vectors[:2000].T - 2 * np.eye(2000)).max()
    for limit in (of_all, own.own_threshold(vectors)):
        assert different < limit < np.quantile(copies, 0.1)


def test_the_threshold_does_not_depend_on_the_order_in_which_pictures_were_added(put):
    """Of exact copies, each has a slightly different cosine to other pictures: the best of them counts."""
    vectors, widths = on_circle(0, 0.03, 0.07, 20, 20.01, 20.02, 90, 180), [100, 90, 80] * 2 + [100] * 2
    ids = [f"{i:032x}" for i in range(8)]
    arrays = compute(put(vectors, widths, ids), lambda *_: None)
    turned = compute(put(vectors[::-1], widths[::-1], ids[::-1], "turned"), lambda *_: None)
    assert 0.9 < float(arrays["own"]) < np.cos(np.radians(20)) and arrays["own"] == turned["own"]
    assert group(arrays, float(arrays["own"])) == group(turned, float(turned["own"]))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_of_two_pictures_only_exact_copies_are_found(put, count):
    arrays = compute(put(on_circle(0, 1)[:count]) if count else put(on_circle(0)), lambda *_: None)
    assert float(arrays["own"]) == pytest.approx(1 - own.EXACT)


def test_exact_copies_stand_apart_and_do_not_hide_near_ones(put):
    """Of 30 pictures with the same pixels, three have other sizes."""
    vectors = pictures_and_copies(0.3, 12)
    same = np.repeat(vectors[:1], 30, axis=0)
    index = put(np.concatenate([vectors, same]), widths=[100] * 412 + [100] * 27 + [50] * 3)
    arrays = compute(index, lambda *_: None)
    limit = float(arrays["own"])
    groups = {int(one.keep.id, 16): one for one in looked_up(index, group(arrays, limit), limit)}
    assert set(groups) == set(range(12))
    assert [len(one.exact) for one in groups.values()] == [27] + [0] * 11
    assert [len(one.near) for one in groups.values()] == [4] + [1] * 11
    assert [item.width for item, _ in groups[0].near][:3] == [50] * 3


def test_more_identical_pictures_than_pairs_are_allowed_are_one_group(put, monkeypatch):
    """They would have 79,800 pairs with each other."""
    monkeypatch.setattr(pairs, "MOST_PAIRS", 20_000)
    monkeypatch.setattr("serving.derived.duplicates.STORED_PAIRS", 1000)
    vectors = pictures_and_copies(0.3, 12)
    index = put(np.concatenate([vectors, np.repeat(vectors[:1], 400, axis=0)]), widths=[100] * 400 + [50] * 412)
    arrays = compute(index, lambda *_: None)
    assert arrays["least"] < arrays["own"]
    groups = group(arrays, float(arrays["own"]))
    assert {int(one.keep, 16): len(one.exact + one.near) for one in groups} == {0: 401} | dict.fromkeys(range(1, 12), 1)
    left = {f"{i:032x}" for i in range(812)} - {f"{i:032x}" for i in (0, *range(412, 416))}
    assert len(group(arrays, float(arrays["own"]), left)[0].near) == 396  # of 400, a near copy of 0


def test_a_higher_threshold_helps_where_there_are_too_many_pairs(put, monkeypatch):
    """Of 200 pictures in four heaps, those of a heap are near to each other."""
    rng = np.random.default_rng(0)
    index = put(unit(np.eye(D)[np.repeat(range(4), 50)] + 0.02 * rng.standard_normal((200, D))))
    monkeypatch.setattr(pairs, "MOST_PAIRS", 300)
    monkeypatch.setattr("serving.derived.duplicates.own_threshold", lambda *_: 0.95)
    with pytest.raises(DerivedProblem, match=r"more than 300 pairs have a cosine of 0\.9 or more; choose a higher"):
        compute(index, lambda *_: None, 0.9)
    arrays = compute(index, lambda *_: None, 0.993)
    assert 0 < len(arrays["a"]) <= 300 and arrays["least"] == 0.993 and arrays["own"] == 0.95
    monkeypatch.setattr("serving.derived.duplicates.STORED_PAIRS", 200)
    arrays = compute(index, lambda *_: None)
    assert 100 < len(arrays["a"]) <= 300 and arrays["least"] > arrays["own"]


def test_an_encoder_that_gives_all_pictures_the_same_vector_is_named(put, monkeypatch):
    monkeypatch.setattr(pairs, "MOST_PAIRS", 100)
    index = put(on_circle(*np.linspace(0, 0.01, 30)))
    with pytest.raises(DerivedProblem, match=r"so many pictures have nearly the same vector .* use another encoder"):
        compute(index, lambda *_: None)


def test_an_encoder_that_finds_all_alike_has_few_stored_pairs(put, monkeypatch):
    monkeypatch.setattr("serving.derived.duplicates.STORED_PAIRS", 500)
    arrays = compute(put(pictures_and_copies(0.01, 12)), lambda *_: None)
    assert 100 < len(arrays["a"]) < 1500
    assert 0.9 < arrays["least"] <= arrays["own"]
    assert compute(put(pictures_and_copies(0.01, 12)), lambda *_: None, 0.95)["least"] == 0.95


def test_more_near_duplicates_than_a_tenth_are_not_suggested():
    groups = [IdGroup("a", ["b"] * 50, ["c"] * 10)]
    assert not is_too_much(groups, 100) and is_too_much(groups, 99)


def test_a_result_of_an_older_version_is_made_again(put):
    index = put(on_circle(0, 1, 2))
    derived = Derived(index, "duplicates")
    arrays = dict(derived.compute(threshold=None).arrays)
    assert derived.result() is not None
    del arrays["own"]
    np.savez(index.store.local / f"{derived._path}.npz", **arrays)
    task._arrays.cache_clear()
    assert derived.result() is None


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

    wait_until(lambda: result()["state"] != "computing", "the pictures are still compared")
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


@pytest.mark.parametrize("kind", ["duplicates", "map"])
def test_an_emptied_collection_has_no_duplicates_and_an_empty_map(put, kind):
    index = put(on_circle(0, 1, 2))
    index.delete([item.id for item in index.page(9)])
    result = Derived(index, kind).compute(**{"duplicates": {"threshold": 0.9}, "map": {"seed": 0}}[kind])
    assert len(result.arrays["ids"]) == 0
    assert kind == "map" or group(result.arrays, 0.9) == []


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


def test_a_computation_without_a_heartbeat_has_failed_once_its_process_has_ended(put, monkeypatch, wait_until):
    derived, ending = Derived(put(on_circle(0, 1)), "duplicates"), threading.Event()

    class Process:
        """Never reports, and ends when `ending` is set."""

        def wait(self) -> int:
            assert ending.wait(PATIENCE_S)
            return 0

    monkeypatch.setattr("serving.derived.task.subprocess.Popen", lambda *_, **__: Process())
    derived.start(threshold=0.9)
    monkeypatch.setattr("serving.derived.task.SILENT_S", 0.0)
    assert derived.progress().state == "computing"
    ending.set()
    wait_until(lambda: derived.progress().state == "failed", "it is computing for ever")
    assert "ended unexpectedly" in derived.progress().problem


def test_a_computation_that_could_not_write_its_failure_has_failed(put, monkeypatch, wait_until):
    derived = Derived(put(on_circle(0, 1)), "duplicates")
    monkeypatch.setattr("serving.derived.task.sys.executable", "false")  # ends at once, and writes nothing
    assert derived.start(threshold=0.9).state == "computing"
    wait_until(lambda: derived.progress().state == "failed", "it is computing for ever")
    assert "perhaps the disk is full" in derived.progress().problem


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
