"""One command or request is one change, and is undone as a whole, in the tables of all encoders."""

import gc
import os
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import lancedb.table
import numpy as np
import pytest

from serving.collection import undo as undo_module
from serving.collection.changes import KEPT_S, UNDO_S, ChangeWriter, needed_since
from serving.collection.index import Index, IndexProblem, Item
from serving.collection.problems import NothingToUndo
from serving.collection.reembedding import Embedded, Reembedding, is_complete
from serving.collection.table import LanceTable
from serving.collection.undo import changes, undo
from tests.conftest import PATIENCE_S

D = 8


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def index(request, tmp_path) -> Index:
    return Index(tmp_path / "index" if request.param == "folder" else request.getfixturevalue("s3"), "enc-1", D)


@pytest.fixture
def other(index) -> Index:
    return Index(index.store.uri, "enc-2", 4)


def put(index: Index, ids: str, version: int = 0) -> None:
    items = [Item(id, f"{id}{version}.png", None, None, 4, 3, 10) for id in ids]
    vectors = [np.random.default_rng([version, ord(id)]).normal(size=index.dimension) for id in ids]
    index.upsert(items, np.stack(vectors), {id: f"{id}{version}".encode() for id in ids}, True)


def names(index: Index) -> dict[str, str]:
    return {item.id: item.name for item in index.page(99)}


def held(index: Index) -> str:
    return "".join(sorted(index.ids()))


def texts(index: Index) -> list[str]:
    return [one.text for one in changes(index)]


def reembed(index: Index) -> Reembedding:
    work = Reembedding(index)
    work.start()
    run(work)
    return work


def run(work: Reembedding) -> None:
    made = Embedded(np.ones(work.index.dimension), b"small", 4, 3, 10)
    with work.lease() as held:
        assert held
        work.run(lambda item: b"file", lambda items, files: [made] * len(items), 1)


def test_several_commits_are_one_change_that_is_undone_as_a_whole(index):
    put(index, "a")
    with index.one_change() as whole:
        put(whole, "bc")
        index.maintain()
        put(whole, "de")
        whole.delete(["a", "b"])
    assert texts(index) == ["added 4 items, deleted 2 items", "added 1 item"]
    assert [one.next for one in changes(index)] == [True, False]
    assert undo(index)[0].text == "added 4 items, deleted 2 items"
    assert (held(index), index.read_thumbnail("a"), index.read_thumbnail("c")) == ("a", b"a0", None)
    undo(index)
    assert held(index) == ""
    with pytest.raises(NothingToUndo, match="no change of the last hour"):
        undo(index)


@pytest.mark.parametrize("newest_kept", [1, 2, 3])
def test_maintenance_keeps_what_the_changes_of_the_last_hour_are_undone_to(index, monkeypatch, newest_kept):
    """Three changes, of which the newest ones are of the last hour."""
    given, optimize = [], lancedb.table.LanceTable.optimize

    def spied(table, *, cleanup_older_than):
        given.append(cleanup_older_than)
        optimize(table, cleanup_older_than=cleanup_older_than)

    for id in "abc":
        put(index, id)
    times = [version["timestamp"].timestamp() for version in index._table._handle.list_versions()]
    before = times[-1 - newest_kept]  # the newest version from before the hour
    since = (before + times[-newest_kept]) / 2
    monkeypatch.setattr("serving.collection.index.needed_since", lambda store, stored: since)
    monkeypatch.setattr("serving.collection.table.MARGIN", timedelta())
    monkeypatch.setattr(lancedb.table.LanceTable, "optimize", spied)
    started = time.time()
    index.maintain()
    assert started - before <= given[-1].total_seconds() <= time.time() - before
    assert all(age > timedelta(days=30_000) for age in given[:-1])  # they may take long, so that it would be too late


def test_a_change_can_be_undone_for_an_hour_after_it_has_ended(index):
    def needed() -> float:
        return time.time() - needed_since(index.store, index.stored)

    def change(hours: float, files: int = 1) -> None:
        """It began so many hours ago, and ends now."""
        for _ in range(files):
            writer = ChangeWriter(index.store, index.stored, id=f"{hours}")
            writer.change = replace(writer.change, at=writer.change.at - 3600 * hours)
            writer.add([("pictures.enc-1", 1)])

    assert needed() == pytest.approx(UNDO_S, abs=600)
    change(0.5)
    assert needed() == pytest.approx(UNDO_S, abs=600)
    change(5, files=2)
    assert needed() == pytest.approx(5 * 3600, abs=600)
    change(100)
    assert needed() == pytest.approx(KEPT_S, abs=600)
    if index.store.local is not None:  # an object store sets the times itself
        for path in (index.store.local / "changes").rglob("*.json"):
            os.utime(path, (time.time(), path.stat().st_mtime - 2 * UNDO_S))
        assert needed() == pytest.approx(UNDO_S, abs=600)


def test_a_write_names_its_change(index, other):
    put(index, "abc")
    assert index.last_change == changes(index)[0].change.id
    put(other, "abc")
    for write in (
        lambda: put(index, "a", version=1),
        lambda: index.change({"b": {"label": "x"}}),
        lambda: index.delete(["b"]),
    ):
        write()  # to the tables of both encoders
        assert index.last_change == changes(index)[0].change.id
    with index.one_change() as whole:
        put(whole, "d")
        put(whole, "e")
    assert whole.last_change == whole.change_id == changes(index)[0].change.id
    index.delete(["nothing"])
    assert index.last_change is None


def test_an_undo_can_be_undone(index):
    put(index, "abc")
    put(index, "a", version=1)
    first, by = undo(index)
    assert names(index)["a"] == "a0.png"
    undo(index, by)
    assert names(index)["a"] == "a1.png"
    assert texts(index) == ["redid: changed 1 item", "undid: changed 1 item", "changed 1 item", "added 3 items"]
    assert undo(index)[0].change.id == first.change.id
    assert names(index)["a"] == "a0.png"
    with pytest.raises(NothingToUndo, match=r"was undone already"):
        undo(index, first.change.id)
    with pytest.raises(NothingToUndo, match=r"No change nothing of pictures is known"):
        undo(index, "nothing")


def test_a_deletion_is_undone_in_the_tables_of_all_encoders(index, other):
    put(index, "abc")
    put(other, "abc")
    index.delete(["a", "c"])
    assert texts(other)[0] == "deleted 2 items"
    undo(other)
    assert (held(index), held(other), index.read_thumbnail("a")) == ("abc", "abc", b"a0")


def test_what_others_have_done_since_stays(index):
    put(index, "ab")
    with index.one_change() as whole:
        put(whole, "acd", version=1)
        put(index, "e")
        put(whole, "f")
    put(index, "c", version=2)
    index.delete(["d"])
    filling = changes(index)[3]
    assert filling.text == "added 3 items, changed 1 item"
    undo(index, filling.change.id)
    assert names(index) == {"a": "a0.png", "b": "b0.png", "c": "c2.png", "e": "e0.png"}
    assert {id: index.read_thumbnail(id) for id in "acef"} == {"a": b"a0", "c": b"c2", "e": b"e0", "f": None}
    assert index.verify() == []


def test_a_deletion_during_a_filling_is_undone_alone(index):
    put(index, "ab")
    with index.one_change() as whole, index.filling():
        put(whole, "cd")
        index.delete(["a"])
        assert undo(index)[0].text == "deleted 1 item"
        assert held(index) == "abcd"
        with pytest.raises(IndexProblem, match=r"pictures is being filled: added 2 items so far"):
            undo(index)
        put(whole, "ef")
    assert undo(index)[0].text == "added 4 items"
    assert held(index) == "ab"


def test_a_change_whose_process_was_killed_is_undone_too(index):
    put(index, "a")
    killed = index.one_change()
    put(killed.__enter__(), "bc")
    assert undo(index)[0].text == "added 2 items"
    assert held(index) == "a"


def test_a_change_that_is_abandoned_writes_nothing_when_it_is_collected(index, monkeypatch):
    abandoned = index.one_change()
    put(abandoned.__enter__(), "a")
    written = []
    with monkeypatch.context() as patch:
        patch.setattr(type(index.store), "write_many", lambda store, files: written.append(files))
        del abandoned
        gc.collect()
    assert written == [] and changes(index)[0].change.open
    with pytest.raises(ValueError, match="fails"), index.one_change() as whole:
        put(whole, "b")
        raise ValueError("fails")
    assert not changes(index)[0].change.open


def test_a_re_embedding_is_one_change_and_undoing_it_leaves_the_encoder_before(index, other, monkeypatch):
    monkeypatch.setattr("serving.collection.reembedding.ROWS_TOGETHER", 2)
    put(index, "abcde")
    work = reembed(other)
    assert (work.progress().state, is_complete(other, [index])) == ("done", True)
    assert texts(index) == ["embedded 5 items again with enc-2", "added 5 items"]
    undo(index)
    assert (held(index), held(other)) == ("abcde", "")
    assert (work.progress().state, work.is_wanted(), is_complete(other, [index])) == ("stopped", False, False)
    work.start()
    run(work)
    assert (held(other), work.progress().state) == ("abcde", "done")


def test_what_was_embedded_for_another_encoder_since_goes_with_the_change(index, other):
    put(index, "ab")
    work = reembed(other)
    put(index, "cd")
    put(index, "e")
    run(work)
    assert held(other) == "abcde"
    added = changes(index)[1]
    assert [one.text for one in changes(index)][:2] == ["added 1 item", "added 2 items"]
    undo(index, added.change.id)
    assert (held(index), held(other)) == ("abe", "abe")
    assert work.progress().state == "done"
    assert undo(index)[0].text == "added 1 item"
    assert (held(index), held(other)) == ("ab", "ab")


def test_another_picture_under_an_id_is_undone_where_it_was_embedded_again(index, other):
    put(index, "ab")
    work = reembed(other)
    before = other.get("a")[1]
    put(index, "a", version=1)
    assert held(other) == "b"
    run(work)
    assert (held(other), names(other)["a"]) == ("ab", "a1.png")
    undo(index)
    assert (names(index)["a"], names(other)["a"]) == ("a0.png", "a0.png")
    assert index.read_thumbnail("a") == b"a0"
    np.testing.assert_allclose(other.get("a")[1], before, rtol=1e-5)


def label(index: Index, id: str, value: str) -> str:
    index.change({id: {"label": value}})
    return index.last_change


def test_an_undo_without_an_effect_counts_when_the_change_that_hid_it_is_undone(index):
    """The item was changed once more: the undo leaves that as it is, and no later undo brings the first one back."""
    put(index, "a")
    first, second = label(index, "a", "first"), label(index, "a", "second")
    _, empty = undo(index, first)
    assert index.page(1)[0].label == "second"
    assert [(one.text, one.undone) for one in changes(index)[:3]] == [
        ("undid: changed 1 item", False),
        ("changed 1 item", False),
        ("changed 1 item", True),
    ]
    with pytest.raises(NothingToUndo, match="was undone already"):
        undo(index, first)
    with pytest.raises(NothingToUndo, match=f"{empty} of .* had no effect; there is nothing to take back"):
        undo(index, empty)
    undo(index, second)
    assert index.page(1)[0].label is None


def everything(index: Index) -> dict:
    """Facts, vector and thumbnail of all items."""
    rows = index.get_many(index.ids())
    return {id: (item, vector.tolist(), index.read_thumbnail(id)) for id, (item, vector) in rows.items()}


@pytest.mark.parametrize("seed", range(6))
def test_undoing_all_changes_in_any_order_leaves_the_start(index, seed):
    if index.store.local is None and seed:
        pytest.skip("what is undone does not depend on the store")
    put(index, "abc")
    start, rng = everything(index), np.random.default_rng(seed)
    made = []
    for i in range(8):
        id = "abc"[rng.integers(3)]
        act = rng.integers(3)
        label(index, id, str(i)) if act == 0 else put(index, id, i) if act == 1 else index.delete([id])
        made.append(index.last_change)
    made = [one for one in made if one]
    for i in rng.permutation(len(made)):
        undo(index, made[i])
    assert everything(index) == start


def test_an_undo_that_fails_half_way_is_completed_by_the_next(index, other, monkeypatch):
    put(index, "abc")
    put(other, "abc")
    index.delete(["a"])
    take_back = LanceTable.take_back

    def failing(table, *arguments):
        if table.name.endswith("enc-2"):
            raise IndexProblem("The disk is full.")
        take_back(table, *arguments)

    monkeypatch.setattr(LanceTable, "take_back", failing)
    with pytest.raises(IndexProblem, match="full"):
        undo(index)
    assert (held(index), held(other)) == ("abc", "bc")
    monkeypatch.undo()
    assert undo(index)[0].text == "deleted 1 item"
    assert (held(index), held(other)) == ("abc", "abc")


def test_only_one_process_undoes_at_a_time(index, monkeypatch):
    put(index, "ab")
    put(index, "c")
    begun, go_on = threading.Event(), threading.Event()
    steps = undo_module._steps

    def waiting(*arguments):
        begun.set()
        assert go_on.wait(PATIENCE_S)
        return steps(*arguments)

    monkeypatch.setattr(undo_module, "_steps", waiting)
    thread = threading.Thread(target=undo, args=(index,))
    thread.start()
    assert begun.wait(PATIENCE_S)
    with pytest.raises(IndexProblem, match="just being undone"):
        undo(Index(index.store.uri, "enc-1", D))
    go_on.set()
    thread.join()
    assert held(index) == "ab"


def test_a_damaged_record_is_named(tmp_path):
    index = Index(tmp_path / "index", "enc-1", D)
    put(index, "a")
    with index.one_change() as whole:
        put(whole, "b")
    [record] = Path(tmp_path, "index", "changes", "pictures").iterdir()
    record.write_bytes(b"{")
    with pytest.raises(IndexProblem, match=rf"{record.name} is damaged; delete it"):
        changes(index)
