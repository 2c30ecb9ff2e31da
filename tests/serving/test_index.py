import contextlib
import multiprocessing
import shutil
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from serving.collection import manifest, table
from serving.collection import store as store_module
from serving.collection.index import Index, IndexProblem, Item, WrongEncoder, collections, content_id
from serving.collection.undo import changes, undo
from serving.protocol.filters import Filter, parse_shell
from tests.conftest import PATIENCE_S

D = 8


def made(numbers, d=D, **metadata) -> tuple[list[Item], np.ndarray]:
    """Items of these numbers, and vectors (n, d) that depend on the number; metadata by functions of it."""
    items = [
        Item(content_id(b"%d" % i), f"{i}.png", None, None, 4, 3, 10, {key: of(i) for key, of in metadata.items()})
        for i in numbers
    ]
    return items, np.stack([np.random.default_rng(i).normal(size=d) for i in numbers]).astype(np.float32)


def ids(numbers) -> set[str]:
    return {content_id(b"%d" % i) for i in numbers}


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def either(request, tmp_path) -> Index:
    """In a folder and in an object store."""
    return Index(tmp_path / "index" if request.param == "folder" else request.getfixturevalue("s3"), "enc-1", D)


@pytest.fixture
def index(tmp_path) -> Index:
    return Index(tmp_path / "index", "enc-1", D)


def folder(index: Index) -> Path:
    """LanceDB's files."""
    return index.store.local / "pictures.enc-1.lance"


def newest(index: Index) -> Path:
    return min((folder(index) / "_versions").glob("*.manifest"))


# Items


def test_upserting_again_replaces_and_adds_nothing(either):
    items, vectors = made(range(10), colour=lambda i: "red")
    either.upsert(items, vectors)
    new = Item(items[3].id, "new.png", "cat", "/new.png", 1, 2, 3, {"size": 4})
    either.upsert([new], -vectors[3:4])
    assert either.count() == len(either.ids()) == 10
    item, vector = either.get(new.id)
    assert item == new  # its colour is gone too
    np.testing.assert_allclose(vector, -vectors[3] / np.linalg.norm(vectors[3]), rtol=1e-5)


def test_reading_a_collection_that_does_not_exist_is_empty_and_creates_nothing(either):
    assert (either.count(), either.ids(), either.page(5), either.get("0" * 32)) == (0, set(), [], None)
    assert (either.search(np.ones(D), 3), either.search_many(np.ones((2, D)), 3)) == ([], [[], []])
    assert (list(either.scan()), either.known(["0" * 32]), either.delete(["0" * 32])) == ([], set(), set())
    assert (changes(either), either.verify(), either.maintain(), either.facts().count) == ([], [], True, 0)
    assert either.vectors()[1].shape == (0, D)
    with pytest.raises(IndexProblem, match="There is no collection pictures"):
        undo(either)
    assert either.store.local is None or not either.store.local.exists()


def test_scan_page_vectors_and_get_many_return_all_rows_unchanged(either):
    items, vectors = made(range(30), colour=lambda i: f"c{i}")
    either.upsert(items, vectors, {item.id: item.name.encode() for item in items})
    unit = {item.id: v / np.linalg.norm(v) for item, v in zip(items, vectors, strict=True)}
    scanned = {item.id: (item, v) for some, vs in either.scan(batch=7) for item, v in zip(some, vs, strict=True)}
    whole = dict(zip(*either.vectors(), strict=True))
    got = either.get_many([*unit, "f" * 32])
    assert {item.id for item in either.page(10)} | {item.id for item in either.page(99, 10)} == set(unit)
    for item in items:
        assert scanned[item.id][0] == got[item.id][0] == item
        for vector in (scanned[item.id][1], whole[item.id], got[item.id][1]):
            np.testing.assert_allclose(vector, unit[item.id], atol=1e-6)
        assert either.read_thumbnail(item.id) == item.name.encode()
    assert either.known([items[0].id, "f" * 32]) == {items[0].id}


def test_a_deleted_item_and_its_thumbnail_do_not_come_back(either):
    items, vectors = made(range(10))
    either.upsert(items, vectors, {item.id: b"jpeg" for item in items})
    assert either.delete([items[0].id, items[4].id, "f" * 32, "' or true"]) == ids([0, 4])
    assert either.ids() == ids(range(10)) - ids([0, 4])
    assert items[4].id not in {item.id for item, _ in either.search(vectors[4], 10)}
    assert (either.read_thumbnail(items[4].id), either.read_thumbnail(items[5].id)) == (None, b"jpeg")
    assert either.verify() == []


def test_a_reader_sees_what_others_write_after_it_opened(either):
    items, vectors = made(range(20))
    either.upsert(items[:10], vectors[:10])
    reader = Index(either.store.uri, "enc-1", D)
    assert reader.count() == 10
    either.upsert(items[10:], vectors[10:])
    assert reader.count() == 20
    assert reader.search(vectors[15], 1)[0][0] == items[15]


@pytest.mark.slow
def test_in_an_object_store_a_setting_says_when_the_writes_of_others_are_seen(s3, monkeypatch):
    items, vectors = made(range(3))
    writer = Index(s3, "enc-1", D)
    writer.upsert(items[:1], vectors[:1])
    monkeypatch.setenv("TWINVIEW_CONSISTENCY_S", "3600")
    late = Index(s3, "enc-1", D)
    assert late.count() == 1
    writer.upsert(items[1:2], vectors[1:2])
    assert (late.count(), Index(s3, "enc-1", D).count(), writer.count()) == (1, 2, 2)
    late.upsert(items[2:], vectors[2:])  # after a write it sees everything
    assert late.count() == 3
    monkeypatch.setenv("TWINVIEW_CONSISTENCY_S", "soon")
    message = "TWINVIEW_CONSISTENCY_S is a number of seconds from 0 to 3600, not 'soon'"
    with pytest.raises(IndexProblem, match=message):
        Index(s3, "enc-1", D).count()


def test_a_folder_is_always_read_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("TWINVIEW_CONSISTENCY_S", "3600")
    items, vectors = made(range(2))
    writer, reader = (Index(tmp_path / "index", "enc-1", D) for _ in range(2))
    for i in range(2):
        writer.upsert(items[i : i + 1], vectors[i : i + 1])
        assert reader.count() == i + 1


def test_an_index_that_was_deleted_and_filled_again_is_read(index):
    items, vectors = made(range(4))
    index.upsert(items, vectors)
    shutil.rmtree(index.store.local)
    other = Index(index.store.uri, "enc-1", D)
    other.upsert(items[:2], vectors[:2])
    with contextlib.suppress(IndexProblem):  # its files are not those it knew
        index.count()
    assert index.count() == 2


def test_collections_in_one_folder_are_separate(either):
    items, vectors = made(range(4))
    either.upsert(items, vectors, {items[0].id: b"jpeg"})
    parts = Index(either.store.uri, "enc-1", D, "parts")
    assert (parts.count(), parts.read_thumbnail(items[0].id)) == (0, None)
    parts.upsert(items[:1], vectors[:1])
    parts.delete(ids([0]))
    assert (either.count(), either.read_thumbnail(items[0].id)) == (4, b"jpeg")
    assert [(facts.name, facts.count) for facts in collections(either.store.uri)] == [("parts", 0), ("pictures", 4)]


def test_vectors_of_another_encoder_need_a_table_of_their_own(either):
    items, vectors = made(range(4))
    either.upsert(items, vectors, {item.id: b"jpeg" for item in items})
    other = Index(either.store.uri, "enc-2", 5)
    message = (
        "pictures holds vectors of enc-1, and this is enc-2. Name another collection or index, or embed all 4 items"
    )
    for call in (other.count, lambda: other.search(np.ones(5), 1), lambda: other.upsert(*made([1], 5))):
        with pytest.raises(WrongEncoder, match=message):
            call()
    other.upsert(*made([0, 1], 5), allow_other_encoder=True)
    assert (other.count(), either.count()) == (2, 4)
    assert (other.facts().others, either.facts().others) == (["enc-1"], ["enc-2"])
    assert either.delete(ids([1, 2])) == ids([1, 2])  # for every encoder
    assert (other.ids(), either.ids()) == (ids([0]), ids([0, 3]))
    assert [either.read_thumbnail(item.id) for item in items] == [b"jpeg", None, None, b"jpeg"]
    undo(either)
    assert (other.ids(), either.ids()) == (ids([0, 1]), ids(range(4)))
    assert [either.read_thumbnail(item.id) for item in items] == [b"jpeg"] * 4
    assert other.delete(ids([3])) == ids([3])  # only the other's table has it
    assert either.ids() == ids(range(3))


# Metadata


def test_metadata_keeps_its_types_and_keys_may_be_added(either):
    either.upsert(*made([0]))
    either.upsert(*made([1], text=str, whole=int, real=lambda i: i + 0.5, flag=bool))
    either.upsert(*made([2], Text=lambda i: 'quote\'s "ß" 🙂'))
    got = {item.name: item.metadata for item in either.page(9)}
    assert got["0.png"] == {}
    assert got["1.png"] == {"text": "1", "whole": 1, "real": 1.5, "flag": True}
    assert [type(value) for value in got["1.png"].values()] == [str, int, float, bool]
    assert got["2.png"] == {"Text": 'quote\'s "ß" 🙂'}


def test_a_fraction_widens_a_column_of_whole_numbers_and_whole_numbers_go_in_one_of_fractions(either):
    either.upsert(*made(range(3), price=int))
    either.upsert(*made([3], price=lambda i: 3.5))
    either.upsert(*made([4], price=int))
    assert sorted(item.metadata["price"] for item in either.page(9)) == [0, 1, 2, 3.5, 4]
    assert either.count(Filter.parse({"price": {"gte": 2}})) == 3
    either.upsert(*made([5, 6], mixed=lambda i: i if i == 5 else 6.5))
    mixed = either.page(9, where=Filter.parse({"mixed": {"gt": 0}}))
    assert sorted(item.metadata["mixed"] for item in mixed) == [5, 6.5]


LARGE = 2**53 + 1


def test_a_whole_number_that_a_fraction_would_change_is_refused_and_nothing_changes(index):
    index.upsert(*made([0], sku=lambda i: LARGE))
    index.upsert(*made([1], price=lambda i: 0.5))
    before = {item.name: item.metadata for item in index.page(9)}
    for values, words in (
        ({"sku": lambda i: 0.5}, rf"The metadata sku has a fraction here and is {LARGE} in an item"),
        ({"price": lambda i: LARGE}, rf"2.png: the metadata price is {LARGE}, which cannot be stored exactly"),
        (
            {"new": lambda i: [0.5, -LARGE][i - 2]},
            rf"3.png: the metadata new is -{LARGE}, which cannot be stored",
        ),
    ):
        with pytest.raises(IndexProblem, match=words):
            index.upsert(*made([2, 3], **values))
    with pytest.raises(IndexProblem, match="The metadata sku has a fraction here"):
        index.change({index.page(1, where=Filter.parse({"name": "1.png"}))[0].id: {"metadata": {"sku": 0.5}}})
    assert {item.name: item.metadata for item in index.page(9)} == before
    index.upsert(*made([4], sku=lambda i: LARGE + 2, price=lambda i: 2**60))  # exact
    assert index.page(9, where=Filter.parse({"name": "4.png"}))[0].metadata == {"sku": LARGE + 2, "price": 2**60}


def test_a_key_of_another_type_is_refused_by_name_and_nothing_changes(index):
    index.upsert(*made([1], colour=str))
    message = "The metadata colour is a whole number here and text in the items of the collection"
    with pytest.raises(IndexProblem, match=message):
        index.upsert(*made([1, 2], colour=int, new=int))
    assert (index.count(), index.page(1)[0].metadata) == (1, {"colour": "1"})


@pytest.mark.parametrize(("old", "new"), [("9.5", 9.5), (3, "three"), (True, 2), (1.5, False)])
def test_a_key_may_have_another_type_when_no_item_has_it_any_more(index, old, new):
    def put(id: int, value) -> None:
        items, vectors = made([id])
        items[0].metadata["price"] = value
        index.upsert(items, vectors)

    put(1, old)
    if old == 3:
        put(1, 3.5)  # a second column
    put(2, old)
    index.delete([item.id for item in index.page(9)])
    assert index.count() == 0
    put(3, new)
    assert [item.metadata for item in index.page(9)] == [{"price": new}]
    assert index.keys() == {"price": type(new)}
    (found,) = index.search(made([3])[1][0], 3, Filter.parse({"price": new}))
    assert found[0].metadata == {"price": new}


def test_a_key_may_have_letters_of_any_language(index):
    items, vectors = made([1, 2])
    for item, size in zip(items, (3, 4), strict=True):
        item.metadata.update({"größe": size, "サイズ": "x"})
    index.upsert(items, vectors)
    assert index.keys() == {"größe": int, "サイズ": str}
    for where in (parse_shell("größe>=4 サイズ=x"), Filter.parse({"größe": {"gte": 4}, "サイズ": "x"})):
        assert [item.id for item in index.page(9, where=where)] == [items[1].id]
        assert [item.id for item, _ in index.search(vectors[0], 9, where)] == [items[1].id]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"a b": 1}, '1.png: the metadata "a b" is not a key'),
        ({"label": "x"}, '1.png: the metadata "label" has the name of a field that every item has'),
        ({"a": None}, "1.png: the metadata a is null; only text, finite numbers, true and false are allowed"),
        ({"a": [1]}, r"1.png: the metadata a is \[1\]"),
        ({"a": float("nan")}, "1.png: the metadata a is NaN"),
        ({"a": 2**63}, "1.png: the metadata a is 9223372036854775808, which does not fit in 64 bits"),
    ],
)
def test_invalid_metadata_is_refused_by_name(index, metadata, message):
    items, vectors = made([1])
    items[0].metadata.update(metadata)
    with pytest.raises(IndexProblem, match=message):
        index.upsert(items, vectors)
    assert index.count() == 0


def test_an_invalid_item_is_refused_by_name(index):
    items, vectors = made([1, 2])
    for bad, message in [
        (lambda: index.upsert(items, vectors * [[1], [0]]), "2.png: its vector is zero or not finite"),
        (lambda: index.upsert(items, vectors * [[1], [np.nan]]), "2.png: its vector is zero or not finite"),
        (lambda: index.upsert(items[:1] * 2, vectors), "the same id"),
        (lambda: index.upsert(items, vectors[:, :5]), r"2 items need vectors \(2, 8\), not \(2, 5\)"),
        (lambda: index.upsert([Item("../x", "x.png", None, None, 1, 1)], vectors[:1]), 'x.png: "../x" is not an id'),
        (lambda: index.thumbnail_path("../x"), '"../x" is not an id'),
        (lambda: index.search(np.ones(5), 1), "Searching pictures needs vectors of 8 finite numbers"),
        (lambda: Index("x", "enc", 8, "a/b"), '"a/b" is not a collection\'s name'),
    ]:
        with pytest.raises(IndexProblem, match=message):
            bad()
    assert (index.count(), index.read_thumbnail("../x")) == (0, None)


# Searching


def test_search_agrees_with_brute_force(either):
    items, vectors = made(range(300), part=lambda i: i % 3)
    either.upsert(items, vectors * np.arange(1, 301)[:, None])  # lengths must not matter
    query = np.random.default_rng(1000).normal(size=D)
    cosines = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    order = np.argsort(-cosines)
    found = either.search(5 * query, 40)
    assert [item for item, _ in found] == [items[i] for i in order[:40]]
    np.testing.assert_allclose([cosine for _, cosine in found], cosines[order[:40]], atol=1e-6)
    found = either.search(query, 300, Filter.parse({"part": 1}))
    assert [item for item, _ in found] == [items[i] for i in order if i % 3 == 1]


def test_searching_many_is_searching_each(index):
    items, vectors = made(range(50), part=lambda i: i % 2)
    index.upsert(items, vectors)
    for where in (None, Filter.parse({"part": 1})):
        together = index.search_many(vectors[:7], 5, where)
        for vector, found in zip(vectors[:7], together, strict=True):
            alone = index.search(vector, 5, where)
            assert len(alone) == 5
            assert [item for item, _ in found] == [item for item, _ in alone]


@pytest.fixture
def indexed(index, monkeypatch):
    """A collection of 1,200 items of which 1,100 are in a vector index, and their vectors."""
    monkeypatch.setattr(table, "INDEXED_FROM", 1000)
    monkeypatch.setattr(table, "PARTITION_ROWS", 300)
    items, vectors = made(range(1200), 64, share=lambda i: i % 100, half=lambda i: i % 2)
    index = Index(index.store.uri, "enc-1", 64)
    index.upsert(items[:1100], vectors[:1100])
    assert index.maintain()
    index.upsert(items[1100:], vectors[1100:])
    assert index.facts().index == "IVF_RQ"
    return index, items, vectors


@pytest.mark.slow
@pytest.mark.parametrize("where", [None, {"share": 3}, {"half": 1}, {"share": {"ne": 3}}])
def test_a_vector_index_misses_little_with_and_without_a_filter_and_cosines_are_exact(indexed, where):
    index, items, vectors = indexed
    kept = [i for i in range(1200) if where is None or index_holds(where, i)]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    shares = []
    for query in unit[kept[-20:]]:  # of these the row itself is not in the index
        cosines = dict(zip((items[i].id for i in kept), unit[kept] @ query, strict=True))
        found = index.search(query, 10, where and Filter.parse(where))
        np.testing.assert_allclose([cosine for _, cosine in found], [cosines[i.id] for i, _ in found], atol=1e-6)
        assert abs(found[0][1] - 1) < 1e-6
        shares.append(np.isin([i.id for i, _ in found], sorted(cosines, key=cosines.get)[-10:]).mean())
    assert np.mean(shares) >= 0.99  # of the hardest data: without clusters


def index_holds(where: dict, i: int) -> bool:
    ((key, value),) = where.items()
    has = {"share": i % 100, "half": i % 2}[key]
    return has != value["ne"] if isinstance(value, dict) else has == value


def test_a_few_thousand_vectors_are_all_compared(index):
    items, vectors = made(range(50))
    index.upsert(items, vectors)
    assert index.maintain()
    assert index.facts().index == "none"


def test_an_index_of_an_earlier_kind_is_replaced(index, monkeypatch):
    from lancedb.index import IvfFlat

    index.upsert(*made(range(300)))
    index.store.connect().open_table("pictures.enc-1").create_index("vector", config=IvfFlat(num_partitions=1))
    assert index.facts().index == "IVF_FLAT"
    monkeypatch.setattr(table, "INDEXED_FROM", 300)
    assert index.maintain()
    assert (index.facts().index, index.verify()[1:]) == ("IVF_RQ", [])


def test_all_indices_of_a_process_share_one_cache_of_limited_size(tmp_path):
    """LanceDB's own is of 6 GiB for each connection."""
    sizes = []
    for name in "ab":
        made_index = Index(tmp_path / name, "enc-1", D)
        made_index.upsert(*made(range(300)))
        assert made_index.search(np.ones(D), 1)
        sizes.append(store_module._lancedb()[1].size_bytes)
    assert 0 < sizes[0] < sizes[1] < store_module.INDEX_CACHE_BYTES + store_module.METADATA_CACHE_BYTES < 2**30


@pytest.mark.slow
def test_new_rows_are_added_to_the_index_while_searches_continue(indexed):
    index, _, vectors = indexed
    index.upsert(*made(range(1200, 2000), 64, share=int, half=int))
    done = threading.Event()
    failed = []

    def search():
        reader = Index(index.store.uri, "enc-1", 64)
        while not done.is_set():
            if (found := reader.search(vectors[5], 1)[0][1]) < 1 - 1e-6:
                failed.append(found)

    thread = threading.Thread(target=search)
    thread.start()
    assert index.maintain()
    done.set()
    thread.join()
    assert not failed
    assert index._table._index_facts(index._table._open()).num_unindexed_rows == 0


# Durability and damage


def test_every_file_of_an_upsert_is_flushed_before_it_returns(index, monkeypatch):
    flushed = set()
    monkeypatch.setattr(store_module, "fsync", lambda path: flushed.add(path))
    items, vectors = made(range(3))
    for i in range(3):
        index.upsert(items[i : i + 1], vectors[i : i + 1], {items[i].id: b"jpeg"})
        files = {path for path in folder(index).rglob("*") if path.is_file()}
        thumbnail = index.store.local / index.thumbnail_path(items[i].id)
        folders = {path.parent for path in files} | {folder(index), index.store.local} | set(thumbnail.parents[:3])
        assert files | folders <= flushed


@pytest.mark.slow
def test_maintenance_joins_small_files_and_keeps_the_rows(either):
    items, vectors = made(range(8))
    for i in range(8):
        either.upsert(items[i : i + 1], vectors[i : i + 1])
    assert either.maintain()
    assert either.ids() == ids(range(8))
    assert either.store.connect().open_table("pictures.enc-1").stats()["fragment_stats"]["num_fragments"] == 1


def test_one_process_maintains_at_a_time(either):
    either.upsert(*made([1]))
    with either.store.lease("maintain.pictures.enc-1"):
        assert not either.maintain()
    assert either.maintain()


def test_undo_takes_back_a_change_with_its_thumbnails_and_an_undo_can_be_undone(either):
    items, vectors = made(range(6))
    jpegs = {item.id: b"jpeg" for item in items}
    either.upsert(items[:4], vectors[:4], {item.id: b"jpeg" for item in items[:4]})
    either.upsert(items[4:], vectors[4:], {item.id: b"jpeg" for item in items[4:]})
    either.delete(ids(range(3)))
    either.maintain()  # makes versions that are no changes
    assert [one.text for one in changes(either)] == ["deleted 3 items", "added 2 items", "added 4 items"]
    _, by = undo(either)
    assert either.ids() == ids(range(6))
    assert {id: either.read_thumbnail(id) for id in jpegs} == jpegs
    assert either.verify() == []
    undo(either, by)
    assert either.ids() == ids(range(3, 6))
    assert [either.read_thumbnail(id) is None for id in jpegs] == [True] * 3 + [False] * 3


def test_a_replacement_is_a_change_that_undo_takes_back(index):
    items, vectors = made(range(4))
    index.upsert(items, vectors)
    index.upsert([Item(item.id, "new", None, None, 1, 1) for item in items], vectors)
    index.maintain()
    undo(index)
    assert {item.name for item in index.page(9)} == {item.name for item in items}


def test_undo_of_a_replacement_restores_the_thumbnail_and_undo_of_other_changes_leaves_it(either):
    items, vectors = made(range(2))
    a, b = items

    def thumbnails():
        return [either.read_thumbnail(item.id) for item in items]

    either.upsert(items, vectors, {a.id: b"first", b.id: b"other"})
    either.upsert([a], -vectors[:1], {a.id: b"second"})
    _, by = undo(either)
    assert thumbnails() == [b"first", b"other"]
    np.testing.assert_allclose(either.get(a.id)[1] @ vectors[0], np.linalg.norm(vectors[0]), rtol=1e-5)
    undo(either, by)
    assert thumbnails() == [b"second", b"other"]
    either.upsert([Item(a.id, "new name", None, None, 4, 3, 10)], -vectors[:1])
    undo(either)  # of the name, not of the picture
    assert (either.get(a.id)[0].name, thumbnails()) == (a.name, [b"second", b"other"])
    either.upsert([a], vectors[:1], {a.id: b"third"})
    either.delete([a.id])
    undo(either)
    assert thumbnails() == [b"third", b"other"]
    assert either.verify() == []


def test_a_deletion_and_an_addition_of_one_item_by_two_processes_keep_its_thumbnail(index, monkeypatch):
    """At each moment of the deletion another process adds the item again."""
    items, vectors = made(range(1))
    id, other = items[0].id, Index(index.store.uri, "enc-1", D)

    def add():
        other.upsert(items, vectors, {id: b"again"})

    def interrupted(owner, name, before: bool):
        call = getattr(owner, name)

        def wrapped(*arguments, **options):
            if before:
                add()
            answer = call(*arguments, **options)
            if not before:
                add()
            return answer

        return wrapped

    for owner, name in ((index._table, "delete"), (index.store, "move")):
        for before in (True, False):
            index.upsert(items, vectors, {id: b"first"})
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, interrupted(owner, name, before))
                index.delete([id])
            if (owner, before) != (index._table, True):
                assert (index.ids(), index.verify()) == ({id}, []), (name, before)


def test_a_deletion_that_ends_while_an_item_is_added_again_leaves_its_thumbnail(index, monkeypatch):
    items, vectors = made(range(1))
    id, other = items[0].id, Index(index.store.uri, "enc-1", D)
    index.upsert(items, vectors, {id: b"first"})
    write, late = other.store.write_many, []

    def written(files):  # the new thumbnail is there, its row not yet; meanwhile the old row's thumbnail goes
        write(files)
        if not late and other.thumbnail_path(id) in files:
            late.append(index.delete([id]))

    monkeypatch.setattr(other.store, "write_many", written)
    other.upsert(items, vectors, {id: b"again"})
    assert (late, index.ids(), index.read_thumbnail(id)) == ([{id}], {id}, b"again")


def test_a_change_from_before_the_versions_that_are_kept_cannot_be_undone(index):
    index.upsert(*made([1]))
    undo(index)  # to the empty table
    assert index.count() == 0
    with pytest.raises(
        IndexProblem, match=r"^pictures cannot be undone: no change of the last hour is known that is not"
    ):
        undo(index)
    index.upsert(*made([1]))
    for path in (folder(index) / "_versions").glob("*.manifest"):
        if path != newest(index):
            path.unlink()
    with pytest.raises(
        IndexProblem, match=r"^pictures cannot be undone: no change of the last hour is known that is not"
    ):
        undo(index)


MISTYPED = struct.pack("<I2sQI4s", 2, b"\x10\x01", 0, 0, b"LANC")  # a number where a fragment should be


@pytest.mark.parametrize("left", [b"", b"\0" * 500, None, MISTYPED], ids=["empty", "zeros", "half", "mistyped"])
def test_an_unfinished_newest_manifest_is_put_aside_and_the_version_before_opens(index, left):
    index.upsert(*made(range(5)))
    index.upsert(*made(range(5, 9)))
    content = newest(index).read_bytes()
    newest(index).write_bytes(content[: len(content) // 2] if left is None else left)
    again = Index(index.store.uri, "enc-1", D)
    assert again.ids() == ids(range(5))
    assert "a commit that a power cut left unfinished was set aside" in again.verify()[0]
    again.upsert(*made(range(5, 9)))
    assert again.ids() == ids(range(9))


def test_a_commit_whose_files_a_power_cut_left_empty_is_put_aside_and_later_damage_is_not(index, monkeypatch):
    index.upsert(*made(range(5)))
    index.upsert(*made(range(5, 9)))
    max((folder(index) / "data").iterdir(), key=lambda path: path.stat().st_mtime_ns).write_bytes(b"")
    with pytest.raises(IndexProblem):
        Index(index.store.uri, "enc-1", D).ids()
    monkeypatch.setattr(manifest, "booted_at", lambda: time.time() + 1)
    assert Index(index.store.uri, "enc-1", D).ids() == ids(range(5))


def damaged_file(index: Index) -> Path:
    index.upsert(*made(range(100)))
    index.upsert(*made(range(100, 200)))
    return min((folder(index) / "data").iterdir(), key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.parametrize("how", ["missing", "empty", "short", "bent"])
def test_verify_names_the_damaged_file_and_versions_can_still_be_listed(index, how):
    file = damaged_file(index)
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "bent":
        content[100:1500] = bytes(255 - byte for byte in content[100:1500])
        file.write_bytes(content)
    else:
        file.write_bytes(b"" if how == "empty" else content[:700])
    again = Index(index.store.uri, "enc-1", D)
    says = {"missing": " is missing: 100 pictures", "empty": " is empty: 100 pictures"}.get(how, " cannot be read")
    assert f"{file.name}{says}" in " ".join(again.verify())
    with pytest.raises(IndexProblem, match="cannot be read"):
        again.vectors()
    assert [one.text for one in changes(again)] == ["added 100 items", "added 100 items"]


def test_verify_names_invalid_rows(index):
    items, vectors = made(range(4))
    index.upsert(items, vectors, {item.id: b"jpeg" for item in items[:3]})
    assert (index.verify(), index.without_thumbnail()) == ([], 1)
    table = index.store.connect().open_table("pictures.enc-1")
    rows = table.search().to_arrow()
    bent = rows["vector"].to_pylist()
    bent[:2] = [[2.0] * D, [0.0] * D]
    column = rows.schema.get_field_index("vector")
    rows = rows.set_column(column, rows.schema.field(column), pa.array(bent, rows.schema.field(column).type))
    table.add(rows)
    said = " ".join(index.verify())
    assert "2 of the pictures have a vector whose length is not 1" in said
    assert "4 of the pictures exist twice" in said
    assert "The table counts 8 pictures, but has 4 different ones" in said


def rewritten(index: Index, change) -> None:
    """Replace the rows by change(rows, as a list of dicts), behind the collection's back."""
    table = index.store.connect().open_table("pictures.enc-1")
    rows = table.search().to_arrow()
    changed = change(rows.to_pylist())
    table.delete("true")
    table.add(pa.Table.from_pylist(changed, rows.schema))


def a_bit(vector: list[float]) -> list[float]:
    bent = np.array(vector, np.float32)
    bent.view(np.uint32)[0] ^= 1
    return bent.tolist()


@pytest.mark.parametrize(
    "bend",
    [
        lambda row: {"name": "1.pnh"},
        lambda row: {"label": "cat"},
        lambda row: {"width": 5},
        lambda row: {"meta_colour": "rfd"},
        lambda row: {"whole_price": 2},
        lambda row: {"vector": a_bit(row["vector"])},
        lambda row: {"vector": [-x for x in row["vector"]]},
    ],
)
def test_verify_names_an_item_that_is_not_as_it_was_written(index, bend):
    items, vectors = made(range(3), colour=lambda i: "red", price=int)
    index.upsert(items, vectors, {item.id: b"jpeg" for item in items})
    rewritten(index, lambda rows: rows)
    assert index.verify() == []
    rewritten(index, lambda rows: [row | (bend(row) if row["id"] == items[1].id else {}) for row in rows])
    (said,) = index.verify()
    assert said.startswith("1 of the pictures are not as they were written: 1.pn")


def test_a_widened_key_and_items_put_in_as_vectors_are_sound(index):
    items, vectors = made(range(3), price=int)
    index.upsert(items, vectors, {item.id: b"jpeg" for item in items})
    index.upsert([Item("v", "a vector", None, None, metadata={"price": 1.5})], vectors[:1])
    assert [item.metadata["price"] for item in index.page(9)] == [0, 1, 2, 1.5]
    assert index.verify() == []


def test_a_table_from_before_checksums_is_read_sound_and_written(index):
    items, vectors = made(range(3))
    index.upsert(items[:2], vectors[:2], {item.id: b"jpeg" for item in items})
    index.store.connect().open_table("pictures.enc-1").drop_columns(["checksum"])
    again = Index(index.store.uri, "enc-1", D)
    assert (again.count(), again.verify()) == (2, [])
    again.upsert(items[1:], vectors[1:])
    assert (again.count(), again.verify()) == (3, [])
    rewritten(again, lambda rows: [row | {"name": "bent"} for row in rows])
    assert again.verify() == ["2 of the pictures are not as they were written: bent, bent"]


def test_a_full_disk_is_reported_and_nothing_changes(index, monkeypatch):
    index.upsert(*made(range(3)))

    def full(builder, new):
        raise RuntimeError("lance error: LanceError(IO): No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("lancedb.merge.LanceMergeInsertBuilder.execute", full)
        with pytest.raises(IndexProblem, match=rf"The disk of {index.store.uri} is full. Nothing was changed"):
            index.upsert(*made([7]))
    assert index.ids() == ids(range(3))


def test_a_table_with_another_schema_is_refused_by_name(index):
    index.upsert(*made(range(3)))
    with pytest.raises(IndexProblem, match=r"index has a table pictures.enc-1 that was not written by Twinview"):
        Index(index.store.uri, "enc-1", 9).count()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(IndexProblem, match=rf"{tmp_path / 'file'} cannot be read .*File exists"):
        Index(tmp_path / "file", "enc-1", D).upsert(*made([1]))


# Several processes


def write(uri: str, numbers, together) -> None:
    index = Index(uri, "enc-1", D)
    for i in numbers:
        together.wait(PATIENCE_S)
        index.upsert(*made(range(i, i + 10), **{f"key{i}": int}))
        index.delete(ids([i]))


@pytest.mark.slow
def test_processes_that_write_the_same_rows_together_leave_one_of_each(either):
    """Another process and this one write, step by step at the same moment, while a third index reads."""
    spawn = multiprocessing.get_context("spawn")
    together = spawn.Barrier(2)
    numbers = range(0, 40, 10)
    other = spawn.Process(target=write, args=(either.store.uri, numbers, together))
    other.start()
    either.upsert(*made(range(10)))
    reader = Index(either.store.uri, "enc-1", D)
    mine = threading.Thread(target=write, args=(either.store.uri, numbers, together))
    mine.start()
    while other.is_alive() or mine.is_alive():
        assert reader.count() >= 9
        time.sleep(0.05)
    mine.join()
    other.join()
    assert other.exitcode == 0
    assert either.count() == len(either.ids())
    assert either.ids() | ids(numbers) == ids(range(40))
    assert set(either.keys()) == {f"key{i}" for i in numbers}
    assert either.verify() == []


def test_a_table_that_another_process_created_meanwhile_is_used(index):
    index.upsert(*made([1], colour=str))
    late = Index(index.store.uri, "enc-1", D)._table
    assert "meta_colour" in late._create(late.store.connect()).schema.names


def write_on(uri: str, begun) -> None:
    index = Index(uri, "enc-1", D)
    for i in range(0, 100_000, 10):
        items, vectors = made(range(i, i + 10))
        index.upsert(items, vectors, {item.id: b"jpeg" for item in items})
        begun.set()


@pytest.mark.slow
def test_a_killed_writer_leaves_whole_upserts_and_an_undamaged_collection(index):
    spawn = multiprocessing.get_context("spawn")
    begun = spawn.Event()
    writer = spawn.Process(target=write_on, args=(index.store.uri, begun))
    writer.start()
    assert begun.wait(PATIENCE_S)
    time.sleep(0.5)
    writer.kill()
    writer.join()
    there = index.ids()
    assert len(there) >= 10
    assert there == ids(range(len(there)))
    assert len(there) % 10 == 0
    assert index.verify() == []
    index.upsert(*made(range(10)))
    assert index.ids() == there
