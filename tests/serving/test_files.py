"""The files of items: originals and thumbnails stay with their rows, and nothing is left behind."""

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from serving.collection import items
from serving.collection.changes import UNDO_S, ChangeWriter
from serving.collection.files import ItemFiles
from serving.collection.index import Index, IndexProblem, Item, content_id
from serving.collection.table import LanceTable
from serving.collection.undo import undo
from serving.indexing import transfer

D = 8


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def index(request, tmp_path) -> Index:
    """In a folder and in an object store."""
    return Index(tmp_path / "index" if request.param == "folder" else request.getfixturevalue("s3"), "enc-1", D)


def put(index: Index, pictures: Mapping[str, bytes], seed: int = 0, kept: bool = True) -> None:
    """Items as an upload stores them: the vector and the thumbnail depend on the picture."""
    items = [Item(id, f"{id}.png", None, None, 4, 3, len(data)) for id, data in pictures.items()]
    vectors = [np.random.default_rng([seed, *data]).normal(size=index.dimension) for data in pictures.values()]
    thumbnails = {id: b"small " + data for id, data in pictures.items()}
    index.upsert(items, np.stack(vectors), thumbnails, True, pictures if kept else {})


def files(index: Index) -> dict[str, tuple[bytes | None, bytes | None]]:
    """Original and thumbnail by id, of all that the store has."""
    ids = index.files.ids("originals") | index.files.ids("thumbnails")
    return {id: (index.read_original(id), index.read_thumbnail(id)) for id in ids}


def pair(data: bytes) -> tuple[bytes, bytes]:
    return data, b"small " + data


def other_encoder(index: Index) -> Index:
    return Index(index.store.uri, "enc-2", 4)


def aged(index: Index) -> None:
    """Makes all files old enough to be removed."""
    if index.store.local is None:
        pytest.skip("an object store sets the times itself")
    for path in index.store.local.rglob("*"):
        if path.is_file() and ".lance" not in str(path):
            facts = path.stat()
            os.utime(path, (facts.st_atime, facts.st_mtime - 2 * UNDO_S))


def test_the_originals_of_items_are_kept_deleted_and_brought_back_with_their_rows(index):
    put(index, {"a": b"one", "b": b"two"})
    assert files(index) == {"a": pair(b"one"), "b": pair(b"two")}
    index.delete(["a"])
    assert files(index) == {"b": pair(b"two")}
    _, by = undo(index)
    assert files(index) == {"a": pair(b"one"), "b": pair(b"two")}
    undo(index, by)
    assert files(index) == {"b": pair(b"two")}
    assert index.verify() == []


def test_undo_of_a_replacement_brings_back_the_picture_before(index):
    put(index, {"a": b"one"})
    put(index, {"a": b"two"})
    assert files(index) == {"a": pair(b"two")}
    _, by = undo(index)
    assert files(index) == {"a": pair(b"one")}
    undo(index, by)
    assert files(index) == {"a": pair(b"two")}


@pytest.mark.parametrize("first", [True, False], ids=["with, then without", "without, then with"])
def test_an_item_never_has_the_original_of_another_picture(index, first):
    put(index, {"a": b"one"}, kept=first)
    put(index, {"a": b"two"}, kept=not first)
    ours, theirs = (b"one", None) if first else (None, b"two")
    assert files(index) == {"a": (theirs, b"small two")}
    undo(index)
    assert files(index) == {"a": (ours, b"small one")}


def test_an_original_stays_when_its_picture_is_put_again_without(index):
    id = content_id(b"one")
    put(index, {id: b"one"})
    put(index, {id: b"one"}, kept=False)
    assert files(index) == {id: pair(b"one")}


def test_another_picture_under_an_id_leaves_no_vector_of_the_one_before_in_other_tables(index):
    other = other_encoder(index)
    for table in (index, other):
        put(table, {"a": b"one", "b": b"two"})
    put(index, {"a": b"three", "b": b"two"})
    assert (index.ids(), other.ids()) == ({"a", "b"}, {"b"})
    undo(index)
    assert other.ids() == {"a", "b"}
    assert (files(index), index.verify(), other.verify()) == ({"a": pair(b"one"), "b": pair(b"two")}, [], [])


def test_a_new_thumbnail_of_the_same_file_leaves_other_tables_alone(index):
    id, other = content_id(b"one"), other_encoder(index)
    put(other, {id: b"one"})
    put(index, {id: b"one"})
    index.upsert([Item(id, "a", None, None, 4, 3, 3)], np.ones((1, D)), {id: b"by a newer program"})
    assert other.ids() == {id}


def test_files_stay_while_another_encoder_has_the_item(index):
    other = other_encoder(index)
    put(index, {"a": b"one"})
    put(other, {"a": b"one"})
    index.delete(["a"], of_all_encoders=False)
    assert files(index) == {"a": pair(b"one")}
    undo(index)
    index.delete(["a"])
    assert (files(index), other.ids()) == ({}, set())
    undo(other)
    assert (index.ids(), other.ids()) == ({"a"}, {"a"})
    assert files(other) == {"a": pair(b"one")}


def test_dropping_a_collection_leaves_none_of_its_files(index):
    put(index, {"a": b"one", "b": b"two"})
    put(index, {"a": b"three"})
    index.delete(["b"])
    index.drop()
    assert [path for path in index.store.list("") if "pictures" in path] == []


def test_the_size_of_the_originals_is_shown(index):
    put(index, {"a": b"12345", "b": b"678"})
    assert index.facts(measured=True).originals == 8
    assert index.facts().originals == 0  # not measured: that takes a listing


def test_a_copy_has_the_originals_and_a_second_one_takes_over_what_has_changed(index, tmp_path):
    put(index, {"a": b"one", "b": b"two", "c": b"six"})
    other = Index(tmp_path / "other", index.encoder_id, D)
    transfer.copy(index, other)
    assert files(other) == files(index)
    put(index, {"a": b"ten"})  # of the same size
    put(index, {"b": b"fifteen"}, kept=False)
    index.delete(["c"])
    transfer.copy(index, other)
    assert files(other) == files(index) == {"a": pair(b"ten"), "b": (None, b"small fifteen")}
    other.store.delete([other.files.path("originals", "a")])
    with pytest.raises(IndexProblem, match="a of pictures is not the same"):
        transfer.compare(index, other)


def test_maintenance_removes_files_that_no_item_has_after_undo_can_no_longer_need_them(tmp_path):
    index = Index(tmp_path / "index", "enc-1", D)
    other = other_encoder(index)
    put(index, {"a": b"one"})
    put(other, {"b": b"two"})
    index.files.write({"lost": b"small lost"}, {"lost": b"lost"})  # its writer was killed before it wrote the row
    index.maintain()
    assert set(files(index)) == {"a", "b", "lost"}  # it may still be written
    aged(index)
    index.maintain()
    assert files(index) == {"a": pair(b"one"), "b": pair(b"two")}
    assert len(list(index.store.list("deleted/pictures"))) == 3
    aged(index)
    index.maintain()
    assert [path for path in index.store.list("deleted/pictures") if "lost" in path] == []


def test_files_are_kept_for_as_long_as_a_change_can_be_undone(tmp_path):
    index = Index(tmp_path / "index", "enc-1", D)
    put(index, {"a": b"one"})
    index.delete(["a"])
    aged(index)
    writer = ChangeWriter(index.store, index.stored)  # of a filling that began before the deletion and goes on
    writer.change = replace(writer.change, at=writer.change.at - 5 * UNDO_S)
    writer.add([(index._table.name, 1)])
    index.maintain()
    undo(index)
    assert files(index) == {"a": pair(b"one")}


class Killed(BaseException):
    """Ends a writer where it is, as a signal would: nothing is taken back."""


def kill_at(monkeypatch, where: object, name: str, do: Callable[[], object]) -> None:
    """The process that does this is killed when it comes there."""

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(where, name, killed)
        with pytest.raises(Killed):
            do()


@pytest.fixture
def collection(tmp_path) -> Index:
    return Index(tmp_path / "index", "enc-1", D)


def test_an_undo_that_was_killed_before_its_files_is_completed(collection, monkeypatch):
    put(collection, {"a": b"one", "b": b"two"})
    collection.delete(["a", "b"])
    kill_at(monkeypatch, ItemFiles, "undo", lambda: undo(collection))
    assert (collection.count(), files(collection)) == (2, {})
    collection.files.recover()
    assert files(collection) == {}  # what is so new may belong to a writer that is alive
    aged(collection)
    with collection.store.lease(f"undo.{collection.stored}"):
        collection.maintain()
    assert files(collection) == {}  # while another undo brings its files back, nothing is moved or deleted
    collection.maintain()
    assert files(collection) == {"a": pair(b"one"), "b": pair(b"two")}
    assert collection.verify() == []


@pytest.mark.parametrize("kept", [True, False])
def test_a_replacement_that_was_killed_before_its_row_leaves_the_picture_before(collection, monkeypatch, kept):
    put(collection, {"a": b"one", "b": b"two"}, kept=kept)
    before = files(collection)
    kill_at(monkeypatch, LanceTable, "upsert", lambda: put(collection, {"a": b"other"}))
    assert files(collection)["a"] == pair(b"other")
    aged(collection)
    collection.maintain()
    assert files(collection) == before
    assert collection.verify() == []


def test_a_replacement_that_was_killed_between_two_tables_keeps_the_newer_picture(collection, monkeypatch):
    other = other_encoder(collection)
    put(collection, {"a": b"one"})
    put(other, {"a": b"one"})
    kill_at(monkeypatch, LanceTable, "delete", lambda: put(collection, {"a": b"other"}))
    assert other.known(["a"]) == {"a"}
    aged(collection)
    collection.maintain()
    assert files(collection) == {"a": pair(b"other")}


def test_a_better_thumbnail_of_the_same_picture_stays(collection):
    put(collection, {"a": b"one"})
    item, vector = collection.get("a")
    collection.upsert([replace(item, label="new")], vector[None], {"a": b"better"}, True, {"a": b"one"})
    aged(collection)
    collection.files.recover()
    assert files(collection) == {"a": (b"one", b"better")}


def test_the_picture_of_an_item_that_only_another_encoder_had_comes_back(collection):
    other = other_encoder(collection)
    put(other, {"a": b"one"})
    put(collection, {"a": b"two"})
    assert other.known(["a"]) == set()
    undo(collection)
    assert (other.known(["a"]), collection.known(["a"])) == ({"a"}, set())
    assert files(collection) == {"a": pair(b"one")}


def test_a_picture_comes_back_although_the_facts_of_its_item_were_changed_meanwhile(collection):
    put(collection, {"a": b"one"})
    collection.change({"a": {"label": "new"}})
    labelled = collection.last_change
    put(collection, {"a": b"two"})
    replaced = collection.last_change
    undo(collection, labelled)
    undo(collection, replaced)
    assert (collection.get("a")[0].label, files(collection)) == (None, {"a": pair(b"one")})


def test_files_that_were_swept_come_back_with_the_row_of_an_undo_that_was_killed(collection, monkeypatch):
    put(collection, {"a": b"one", "b": b"two"})
    with monkeypatch.context() as patch:  # the rows are deleted, and the process killed before it moves the files
        patch.setattr(ItemFiles, "put_aside", lambda *_: None)
        collection.delete(["a", "b"])
    aged(collection)
    collection.files.sweep(UNDO_S)
    assert files(collection) == {}
    kill_at(monkeypatch, ItemFiles, "undo", lambda: undo(collection))
    collection.store.write(collection.files.path("originals", "b"), b"two")
    aged(collection)
    collection.files.recover()
    assert files(collection) == {"a": pair(b"one"), "b": pair(b"two")}
    assert len(list(collection.store.list(collection.files._deleted))) == 2  # b's original was there; and the mark


def test_a_deletion_that_was_cut_off_can_be_undone_after_its_files_were_swept(tmp_path):
    index = Index(tmp_path / "index", "enc-1", D)
    put(index, {"a": b"one", "b": b"two"})
    aged(index)
    index._table.delete(["a"])  # and then its process was killed
    index.maintain()
    assert set(files(index)) == {"b"}
    undo(index)
    assert files(index) == {"a": pair(b"one"), "b": pair(b"two")}


def test_an_item_that_is_added_while_its_old_file_is_swept_keeps_its_files(tmp_path, monkeypatch):
    index = Index(tmp_path / "index", "enc-1", D)
    put(index, {"b": b"two"})
    index.files.write({"a": b"small one"}, {"a": b"one"})
    aged(index)
    move = index.store.move

    def moved(paths):
        put(Index(index.store.uri, "enc-1", D), {"a": b"one"})
        move(paths)

    monkeypatch.setattr(index.store, "move", moved)
    index.maintain()
    assert files(index) == {"a": pair(b"one"), "b": pair(b"two")}


@pytest.mark.parametrize("full_at", ["file", "row"])
@pytest.mark.parametrize("kept", [True, False])
def test_a_full_disk_leaves_the_files_of_the_picture_before(index, monkeypatch, full_at, kept):
    put(index, {"a": b"one", "b": b"two"}, kept=kept)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = files(index)
    with monkeypatch.context() as patch, pytest.raises(IndexProblem, match="is full"):
        if full_at == "row":
            patch.setattr(index._table, "upsert", full)
        else:
            put_one = index.store._put
            patch.setattr(index.store, "_put", lambda entry: full() if entry[1] == b"small six" else put_one(entry))
        put(index, {"a": b"three", "b": b"six"})
    assert files(index) == before
    assert index.verify() == []


def test_a_full_disk_stores_nothing_of_an_item(tmp_path, monkeypatch):
    index = Index(tmp_path / "index", "enc-1", D)
    put(index, {"a": b"one"})
    write = Path.write_bytes

    def full(path, data):
        if data == b"two":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(IndexProblem, match="is full"):
        put(index, {"b": b"two"})
    assert index.ids() == {"a"} and index.read_original("b") is None


def test_a_collection_that_was_deleted_elsewhere_is_gone_at_once(tmp_path):
    index = Index(tmp_path / "index", "enc-1", D)
    put(index, {"a": b"one"})
    Index(index.store.uri, "enc-1", D).drop()
    assert (index.ids(), index.facts().version) == (set(), 0)


def test_the_files_of_a_retracted_row_can_be_brought_back_in_the_table_that_it_came_from(index):
    other = other_encoder(index)
    put(index, {"a": b"one"})
    checksum = index._table.checksums()["a"]
    index._table.delete(["a"])
    put(other, {"a": b"one"})  # meanwhile
    index.files.put_aside({"a": [checksum]})  # the rest of the deletion, which finds that the file is used
    other.retract({"a": checksum})
    assert files(index) == {}
    undo(index)
    assert files(index) == {"a": pair(b"one")}


def test_verify_finds_an_original_that_was_cut_off(index):
    put(index, {"a": b"one", "b": b"two"})
    put(index, {"c": b"six"}, kept=False)
    assert index.verify() == []
    index.store.write(index.files.path("originals", "b"), b"t")
    assert index.verify() == ["1 of the pictures have an original of another size than was uploaded: b.png"]


def test_rows_with_a_checksum_of_the_older_form_are_undamaged():
    item, vector = Item("a", "a.png", "cat", None, 4, 3, 10, {"count": 2}), np.ones(4, np.float32) / 2
    older = -1392389200096356961  # as it was written before
    assert items.is_checksum(older, item, vector) and items.is_checksum(None, item, vector)
    assert items.is_checksum(items.checksum(item, vector), item, vector)
    assert not items.is_checksum(older, replace(item, label="dog"), vector)
    assert not items.is_checksum(items.checksum(item, vector), item, -vector)


def test_the_part_of_a_checksum_for_the_picture_does_not_depend_on_facts():
    item, vector = Item("a", "a.png", None, None, 4, 3, 10), np.ones(4, np.float32) / 2
    seen = items.picture(items.checksum(item, vector))
    assert seen == items.picture(items.checksum(replace(item, label="cat", name="b", metadata={"x": 1}), vector))
    for other in (replace(item, bytes=11), replace(item, width=5), replace(item, id="b")):
        assert seen != items.picture(items.checksum(other, vector))
    assert seen != items.picture(items.checksum(item, -vector))
