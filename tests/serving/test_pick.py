import csv

import numpy as np
import pytest

from serving.collection.index import Index, Item, unit
from serving.collection.reembedding import Progress, Reembedding
from serving.curation import pick as curation
from serving.curation.pick import METHODS, balanced, pick

D = 16


def heaps(sizes: list[int], spread: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (n, D) in heaps around D directions, and the heap of each."""
    rng = np.random.default_rng(0)
    of = np.repeat(np.arange(len(sizes)), sizes)
    return unit(np.eye(D)[of] + spread * rng.standard_normal((len(of), D))).astype(np.float32), of


@pytest.mark.parametrize("method", METHODS)
def test_one_of_each_heap_is_picked(method):
    vectors, of = heaps([40, 5, 80, 20])
    rows = pick(vectors, 4, method)
    assert sorted(of[rows]) == [0, 1, 2, 3]
    if method != "diverse":
        assert of[rows].tolist() == [2, 0, 3, 1]  # the largest first
    np.testing.assert_array_equal(rows, pick(vectors, 4, method))


@pytest.mark.parametrize("method", METHODS)
def test_pictures_like_labelled_ones_come_last(method):
    vectors, of = heaps([40, 30, 80, 20])
    labelled = np.zeros(len(of), bool)
    labelled[[3, 90]] = True  # of heaps 0 and 2
    rows = pick(vectors, 2, method, labelled)
    assert sorted(of[rows]) == [1, 3]
    everything = pick(vectors, 1000, method, labelled)
    assert sorted([*everything, 3, 90]) == list(range(len(of)))


@pytest.mark.parametrize("method", ["central", "typical"])
def test_the_picture_in_the_middle_is_picked(method):
    """One heap is a small dense part with pictures scattered around it."""
    vectors, of = heaps([60, 60])
    dense = np.arange(10)
    vectors[dense] = unit(np.eye(D)[0] + 0.01 * np.random.default_rng(1).standard_normal((10, D)))
    rows = pick(vectors, 2, method)
    assert rows[of[rows] == 0] in dense


def test_a_picture_far_from_all_is_picked_as_diverse():
    vectors, of = heaps([50, 50])
    vectors[7] = np.eye(D)[5]
    rows = pick(vectors, 3, "diverse")
    assert 7 in rows and set(of[rows]) == {0, 1}


@pytest.mark.parametrize("method", METHODS)
def test_few_or_equal_pictures_are_picked_once(method):
    assert pick(np.empty((0, D), np.float32), 3, method).tolist() == []
    for vectors in (heaps([1])[0], np.ones((5, D), np.float32), np.zeros((3, D), np.float32)):
        assert sorted(pick(vectors, 10, method)) == list(range(len(vectors)))
    assert len(set(pick(heaps([300])[0], 200, method))) == 200


@pytest.mark.parametrize("method", METHODS)
def test_of_large_collections_a_part_is_compared(method, monkeypatch):
    for name, value in (("MOST_CLUSTERS", 3), ("CLUSTER_SAMPLE", 10), ("COVER_SAMPLE", 50)):
        monkeypatch.setattr(curation, name, value)
    vectors, of = heaps([100, 100, 100])
    rows = pick(vectors, 9, method)
    assert len(set(rows)) == 9 and set(of[rows]) == {0, 1, 2}


def test_groups_share_what_is_picked_as_evenly_as_they_can():
    assert balanced(10, np.array([100, 100, 100])).tolist() == [4, 3, 3]
    assert balanced(10, np.array([1, 100, 2])).tolist() == [1, 7, 2]
    assert balanced(10, np.array([1, 0, 2])).tolist() == [1, 0, 2]


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def collection(tmp_path, monkeypatch):
    """An index of 12 pictures in four heaps of D; the first heap has labels."""
    monkeypatch.chdir(tmp_path)
    vectors, of = heaps([3, 3, 3, 3])
    index = Index(tmp_path / "index", "means-1", D)
    items = [
        Item(f"{i:032x}", f"{i}.png", "cat" if of[i] == 0 else None, f"/p/{i}.png", metadata={"year": 2020 + i % 2})
        for i in range(12)
    ]
    index.upsert(items, vectors)
    return index


def listed(path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_commands_say_how_much_of_a_collection_is_embedded_again(collection, twinview, capsys, monkeypatch):
    monkeypatch.setattr(Reembedding, "progress", lambda self: Progress("stopped", 1200, 5000))
    twinview("pick", "--k", "3")
    note = f"note: pictures is not complete for {collection.encoder_id}: 1,200 of 5,000 items are embedded again; "
    assert note + "only these are used\n" in capsys.readouterr().err


def test_the_command_lists_pictures_without_a_label_to_be_filled_in(collection, tmp_path, twinview, capsys):
    twinview("pick", "--k", "3")
    said = capsys.readouterr().out
    assert said == f"picked 3 of 9 pictures of pictures without a label, listed in {tmp_path}/to_label.csv\n"
    rows = listed(tmp_path / "to_label.csv")
    assert list(rows[0]) == ["id", "name", "path", "label"]
    assert sorted(int(row["name"][:-4]) // 3 for row in rows) == [1, 2, 3]
    assert all(row["path"] == f"/p/{row['name']}" and row["label"] == "" for row in rows)
    twinview("pick", "--k", "4", "--labelled-too", "--method", "diverse", "--output", "out/all.csv")
    rows = listed(tmp_path / "out" / "all.csv")
    assert sorted(int(row["name"][:-4]) // 3 for row in rows) == [0, 1, 2, 3]
    assert sorted(row["label"] for row in rows) == ["", "", "", "cat"]


def test_a_filter_and_a_balance_are_kept(collection, tmp_path, twinview):
    twinview("pick", "--k", "4", "--balanced-by", "year", "--output", "balanced.csv")
    years = [int(row["name"][:-4]) % 2 for row in listed(tmp_path / "balanced.csv")]
    assert years == [0, 1, 0, 1]
    twinview("pick", "--k", "30", "--where", "year=2020", "--output", "2020.csv")
    assert sorted(int(row["name"][:-4]) for row in listed(tmp_path / "2020.csv")) == [4, 6, 8, 10]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "0"], "--k 0: must be 1 or more"),
        (["--where", "year=1990"], "pictures has no pictures with year=1990"),
        (["--balanced-by", "colour"], "--balanced-by colour: no picture of pictures has a value of colour"),
        (["--where", "label=cat"], "all 3 pictures of pictures have a label; --labelled-too picks from them"),
        (["--output", "taken.csv"], "--output: .*taken.csv exists, and may hold labels; name another file"),
        (["--output", "taken.csv/a.csv"], "--output: .*taken.csv/a.csv cannot be written"),
    ],
)
def test_bad_input_is_named(collection, tmp_path, twinview, arguments, message):
    (tmp_path / "taken.csv").write_text("id,label\n1,cat\n")
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        twinview("pick", *arguments)
    assert (tmp_path / "taken.csv").read_text() == "id,label\n1,cat\n"


def test_an_empty_collection_is_named(tmp_path, collection, twinview):
    collection.delete(sorted(collection.ids()))
    with pytest.raises(SystemExit, match="pictures has no pictures"):
        twinview("pick")
