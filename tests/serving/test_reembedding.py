"""Embedding a collection again with another encoder, while others write to it. The encoders are functions here."""

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from serving.collection import reembedding
from serving.collection.index import Index, IndexProblem, Item
from serving.collection.reembedding import Embedded, Progress, Reembedding, asked_for, is_complete
from serving.collection.undo import undo
from serving.protocol.replies import Skipped
from tests.conftest import PATIENCE_S

D = 8


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def old(request, tmp_path) -> Index:
    """The collection as the old encoder has embedded it."""
    return Index(tmp_path / "index" if request.param == "folder" else request.getfixturevalue("s3"), "old", 4)


@pytest.fixture
def work(old) -> Reembedding:
    return Reembedding(Index(old.store.uri, "new", D))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(reembedding, "ROWS_TOGETHER", 4)
    monkeypatch.setattr(reembedding, "FILES_TOGETHER", 2)


def vector(data: bytes, d: int) -> np.ndarray:
    """What an encoder with d numbers makes of a picture."""
    return np.random.default_rng([d, *data]).normal(size=d).astype(np.float32)


def put(index: Index, *ids: str, kept: bool = True, version: str = "") -> None:
    pictures = {id: f"picture {id}{version}".encode() for id in ids}
    items = [Item(id, f"{id}.png", "old label", None, 4, 3, len(data)) for id, data in pictures.items()]
    vectors = np.stack([vector(data, index.dimension) for data in pictures.values()])
    thumbnails = {id: b"small " + data for id, data in pictures.items()}
    index.upsert(items, vectors, thumbnails, True, pictures if kept else {})


def run(work: Reembedding, between: Callable[[], object] = lambda: None, **options) -> Progress:
    """between: called once, after the first pictures were embedded, and before their vectors are stored"""
    once = [between]

    def read(item: Item) -> bytes | str:
        return work.index.read_original(item.id) or "has no original"

    def embed(items, files) -> list:
        made = [Embedded(vector(data, D), b"new small", 9, 9, len(data)) for data in files]
        if once:
            once.pop()()
        return made

    with work.lease() as held:
        assert held
        return work.run(read, embed, 1, **options)


def assert_same(old: Index, new: Index) -> None:
    """The new encoder has the same items, with its own vectors of their newest pictures."""
    assert old.ids() == new.ids()
    ours, theirs = old.get_many(old.ids()), new.get_many(new.ids())
    for id, (item, unit) in theirs.items():
        assert item == ours[id][0]
        made = vector(new.read_original(id), D)
        np.testing.assert_allclose(unit, made / np.linalg.norm(made), rtol=1e-5, err_msg=id)


LETTERS = "abcdefghij"


def test_all_items_are_taken_over_with_their_facts_and_the_old_table_stays(old, work):
    put(old, *LETTERS)
    work.start()
    assert work.progress().state == "waiting"
    done = run(work)
    assert (done.state, done.done, done.total, done.skipped) == ("done", 10, 10, 0)
    assert_same(old, work.index)
    assert work.index.verify() == old.verify() == []
    assert old.read_thumbnail("a") == b"small picture a"
    assert is_complete(work.index, [old])


def test_what_others_do_meanwhile_is_done_for_the_new_encoder_too(old, work):
    put(old, *LETTERS)
    work.start()

    def others():
        put(old, "k")
        put(old, "a", version=", another")
        old.delete(["b"])
        old.change({"c": {"label": "new label"}, "h": {"label": "new label"}})

    assert run(work, others).state == "done"
    assert_same(old, work.index)
    assert "k" in work.index.ids() and "b" not in work.index.ids()
    assert work.index.verify() == old.verify() == []


@pytest.mark.parametrize("by_new", [False, True], ids=["by the old encoder", "by the new one"])
@pytest.mark.parametrize("what", ["delete", "change"])
def test_a_row_that_is_written_in_the_middle_of_another_write_is_not_forgotten(old, work, what, by_new, monkeypatch):
    """A row is stored between the parts of a deletion or a change that goes from table to table."""
    put(old, *LETTERS)
    work.start()
    writer = Index(old.store.uri, "new", D) if by_new else Index(old.store.uri, "old", 4)
    settled, stored = threading.Event(), threading.Event()
    writer.create(allow_other_encoder=True)
    own = getattr(writer._table, what)

    def first(*arguments):
        answer = own(*arguments)
        if not settled.is_set():
            settled.set()
            assert stored.wait(PATIENCE_S)
        return answer

    def write():
        writer.delete(["a"]) if what == "delete" else writer.change({"a": {"label": "new label"}})

    thread = threading.Thread(target=write)
    settle = work._settle

    def after_settling(table, checksums):
        settle(table, checksums)
        stored.set()

    def begin():
        thread.start()
        assert settled.wait(PATIENCE_S)

    monkeypatch.setattr(writer._table, what, first)
    monkeypatch.setattr(work, "_settle", after_settling)
    if by_new and what == "delete":  # its own table has no such row yet, so it goes on to the old one's
        monkeypatch.setattr(writer._table, "checksums", first_of(writer._table.checksums, settled, stored))
    run(work, begin)
    thread.join()
    run(work)
    assert_same(old, work.index)


def first_of(call, begun: threading.Event, go_on: threading.Event):
    def wrapped(*arguments):
        answer = call(*arguments)
        if not begun.is_set():
            begun.set()
            assert go_on.wait(PATIENCE_S)
        return answer

    return wrapped


def test_undo_of_a_deletion_during_the_work_brings_the_files_back(old, work):
    put(old, "a", "b")
    work.start()
    run(work, lambda: old.delete(["a"]))
    assert (work.index.ids(), old.ids()) == ({"b"}, {"b"})
    undo(old)
    assert old.read_original("a") == b"picture a" and old.read_thumbnail("a") is not None
    assert not is_complete(work.index, [old])
    run(work)
    assert_same(old, work.index)


def test_items_without_an_original_are_named_and_left_out_only_on_demand(old, work):
    put(old, *LETTERS[:6])
    put(old, "x", "y", kept=False)
    work.start()
    progress = run(work)
    skipped = (Skipped("x", "x.png", "has no original"), Skipped("y", "y.png", "has no original"))
    assert (progress.state, progress.done, progress.total, progress.skipped) == ("incomplete", 6, 8, 2)
    assert progress.first_skipped == skipped
    assert not is_complete(work.index, [old])
    assert work.start(without_skipped=True).state == "waiting"
    assert run(work).state == "done"
    assert is_complete(work.index, [old])
    put(old, "z")
    assert not is_complete(work.index, [old])  # nobody has said that it may be left out


def test_items_that_others_delete_or_replace_are_not_among_those_skipped(old, work):
    put(old, "a", kept=False)
    put(old, *LETTERS[1:])
    work.start()
    others = {
        "b": lambda: old.delete(["b"]),
        "d": lambda: put(old, "d", version=", another"),
        "j": lambda: old.delete(["a"]),  # which was skipped long before
    }

    def read(item: Item) -> bytes | str:
        others.pop(item.id, lambda: None)()
        data = work.index.read_original(item.id)
        return data if data and len(data) == item.bytes else "has changed"

    def embed(items, files) -> list:
        return [Embedded(vector(data, D), b"new small", 9, 9, len(data)) for data in files]

    with work.lease():
        done = work.run(read, embed, 1)
    assert (done.state, done.done, done.total, done.first_skipped) == ("done", 8, 8, ())
    assert_same(old, work.index)


@pytest.mark.parametrize("name", ["order", "progress"])
def test_a_damaged_file_of_the_work_is_named(old, work, name):
    put(old, "a")
    work.start()
    run(work)
    old.store.write(f"reembedding/pictures.new/{name}.json", b'{"id": "2')
    with pytest.raises(IndexProblem, match=rf"/reembedding/pictures\.new/{name}\.json is damaged; delete it"):
        is_complete(work.index, [old])


def test_as_many_items_are_not_all_of_them(old, work):
    put(old, "a", "b")
    put(work.index, "b", "c")
    assert not is_complete(work.index, [old])
    put(work.index, "a")
    assert is_complete(work.index, [old])


def test_work_that_is_cancelled_stops_and_goes_on_where_it_was(old, work):
    put(old, *LETTERS)
    work.start()
    stopped = run(work, work.cancel)
    assert stopped.state == "stopped"
    assert 0 < work.index.count() < 10
    assert work.progress().missing == stopped.missing == len(LETTERS) - work.index.count()
    before = work.index.ids()
    embedded = []
    assert work.start().state == "waiting"
    with work.lease():
        work.run(
            lambda item: embedded.append(item.id) or old.read_original(item.id),
            lambda items, files: [Embedded(vector(data, D), b"", 1, 1, 1) for data in files],
            1,
        )
    assert set(embedded) == set(LETTERS) - before
    assert_same(old, work.index)
    assert (work.progress().state, work.progress().missing) == ("done", 0)


def test_work_whose_process_was_killed_waits_for_another(old, work, monkeypatch):
    put(old, *LETTERS)
    work.start()
    with pytest.raises(SystemExit):
        run(work, sys.exit)
    assert work.progress().state == "running"  # the last that was heard of it
    monkeypatch.setattr(reembedding, "SILENT_S", 0)
    assert work.progress().state == "waiting" and work.is_wanted()
    monkeypatch.setattr(reembedding, "SILENT_S", 60)
    again = Reembedding(work.index)
    assert run(again).state == "done"
    assert_same(old, work.index)


def test_work_whose_process_ends_says_how_far_it_is_and_waits_for_another(old, work):
    put(old, *LETTERS)
    work.start()
    stop = []
    run(work, lambda: stop.append(True), stopping=lambda: bool(stop))
    there = work.index.count()
    assert 0 < there < len(LETTERS)
    progress = work.progress()
    assert (progress.state, progress.done, progress.missing) == ("waiting", there, len(LETTERS) - there)


def test_asking_twice_is_asking_once_and_two_cannot_work_at_once(old, work):
    put(old, "a")
    first = work.start().order
    assert work.start().order == first
    assert work.start(without_skipped=True).order != first
    assert list(asked_for(old.store)) == [("pictures", "new")]
    with work.lease() as held, Reembedding(work.index).lease() as second:
        assert held and not second


def test_a_failure_is_told_and_what_was_embedded_stays(old, work, monkeypatch):
    put(old, *LETTERS)
    work.start()
    upsert, calls = Index.upsert, []

    def full(self, items, *arguments, **options):
        calls.append(items)
        if len(calls) == 2:
            raise IndexProblem("The disk of the index is full.")
        return upsert(self, items, *arguments, **options)

    monkeypatch.setattr(Index, "upsert", full)
    with pytest.raises(IndexProblem):
        run(work)
    assert (work.progress().state, work.progress().problem) == ("failed", "The disk of the index is full.")
    assert work.index.count() == 4 and not work.is_wanted()
    work.start()
    assert run(work).state == "done"
    assert_same(old, work.index)


def test_metadata_that_the_new_table_has_in_another_type_skips_only_its_items(old, work):
    put(old, *LETTERS[:3])
    old.change({"b": {"metadata": {"price": "dear"}}})
    odd = Item("odd", "odd", None, None, metadata={"price": 3})
    work.index.upsert([odd], np.ones((1, D)), allow_other_encoder=True)
    work.start()
    progress = run(work)
    assert (progress.state, [one.id for one in progress.first_skipped]) == ("incomplete", ["b"])
    assert "price is text" in progress.first_skipped[0].reason
    assert work.index.ids() == {"a", "c", "odd"}


def test_a_collection_that_is_deleted_during_the_work_stays_deleted(old, work):
    put(old, *LETTERS)
    work.start()
    run(work, old.drop)
    assert Index(old.store.uri, "new", D).ids() == set()
    assert list(asked_for(old.store)) == []
    assert not [path for path in old.store.list("") if path.startswith(("originals", "thumbnails", "reembedding"))]


def test_the_pictures_of_an_import_get_their_size(old, work):
    put(old, "a")
    item, unit = old.get("a")
    old.upsert([replace(item, width=0, height=0, bytes=0)], unit[None])
    work.start()
    run(work)
    made, _ = work.index.get("a")
    assert (made.width, made.height, made.bytes) == (9, 9, len(b"picture a"))


def test_large_files_are_embedded_one_after_the_other(old, work, monkeypatch):
    put(old, *LETTERS[:4])
    monkeypatch.setattr(reembedding, "BYTES_TOGETHER", 1)
    work.start()
    groups = []

    def embed(items, files):
        groups.append(len(files))
        return [Embedded(vector(data, D), b"", 1, 1, 1) for data in files]

    with work.lease():
        work.run(lambda item: old.read_original(item.id), embed, 2)
    assert groups == [1, 1, 1, 1]
    assert_same(old, work.index)


def test_the_progress_moves_while_it_works(old, work, monkeypatch):
    monkeypatch.setattr(reembedding, "REPORT_S", -1)
    put(old, *LETTERS)
    work.start()
    seen = []
    report = work._report
    monkeypatch.setattr(work, "_report", lambda *arguments: (report(*arguments), seen.append(work.progress()))[0])
    run(work)
    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)
    assert {progress.state for progress in seen} == {"running", "done"}
    assert {0, 4, 10} <= {progress.done for progress in seen}
    assert all(abs(progress.at - time.time()) < 60 for progress in seen)


def test_a_collection_that_is_deleted_in_the_middle_of_a_write_ends_the_work_quietly(old, work, monkeypatch):
    put(old, *LETTERS)
    work.start()
    store = work._store

    def dropped(rows, skipped):
        old.drop()
        store(rows, skipped)

    monkeypatch.setattr(work, "_store", dropped)
    assert run(work).state == "none"
    assert Index(old.store.uri, "new", D).ids() == set()
