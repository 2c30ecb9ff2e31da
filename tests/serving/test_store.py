import errno
import multiprocessing
import os
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from serving.collection import lease
from serving.collection import store as store_module
from serving.collection.index import Index, Item
from serving.collection.problems import IndexProblem
from serving.collection.store import FileStore
from tests.conftest import PATIENCE_S


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def store(request, tmp_path) -> FileStore:
    return FileStore(tmp_path / "index" if request.param == "folder" else request.getfixturevalue("s3"))


def test_written_files_are_read_listed_measured_and_deleted(store):
    store.write_many({f"a/b/{i}": b"x" * i for i in range(20)})
    store.write("a/c", b"whole")
    store.write("ab", b"other")
    store.write("a/c", b"new")
    assert store.read("a/c") == b"new"
    assert set(store.list("a")) == {"a/c", *(f"a/b/{i}" for i in range(20))}
    assert store.size("a/b") == sum(range(20))
    store.delete(["a/c", "a/nothing", "a/b/7"])
    assert (store.read("a/c"), store.read("a/b/7"), store.read("a/b/8")) == (None, None, b"x" * 8)


def test_a_missing_file_reads_as_none_and_creates_nothing(store):
    assert (store.read("a/b"), list(store.list("a")), store.size("a")) == (None, [], 0)
    assert store.local is None or not store.local.exists()


def test_moving_replaces_files_and_skips_missing_ones(store):
    store.write_many({"a/1": b"1", "a/2": b"2", "b/2": b"old"})
    store.move({"a/1": "b/1", "a/2": "b/2", "a/3": "b/3"})
    assert [store.read(path) for path in ("a/1", "a/2", "b/1", "b/2", "b/3")] == [None, None, b"1", b"2", None]


def test_a_lease_has_one_holder_and_is_free_afterwards(store):
    with store.lease("x") as first, FileStore(store.uri).lease("x") as second, store.lease("y") as other:
        assert [bool(lease) for lease in (first, second, other)] == [True, False, True]
    with store.lease("x") as again:
        assert again


def hold(uri: str, held) -> None:
    with FileStore(uri).lease("x"):
        held.set()
        time.sleep(60)


@pytest.mark.slow
def test_a_lease_of_a_killed_process_is_free(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    held = spawn.Event()
    other = spawn.Process(target=hold, args=(str(tmp_path), held))
    other.start()
    assert held.wait(PATIENCE_S)
    with FileStore(tmp_path).lease("x") as mine:
        assert not mine
    other.kill()
    other.join()
    with FileStore(tmp_path).lease("x") as mine:
        assert mine


@pytest.mark.slow
def test_a_lease_in_an_object_store_is_renewed_by_its_holder_and_expires_without_one(s3, monkeypatch, wait_until):
    now = 1000.0
    monkeypatch.setattr(lease, "time", SimpleNamespace(time=lambda: now))
    monkeypatch.setattr(lease, "LEASE_S", 0.4)
    store = FileStore(s3)

    def renewed() -> bool:
        return float(store.read(".leases/x").split()[0]) == now + 0.4

    with store.lease("x") as first:
        for _ in range(3):
            now += 0.3
            wait_until(renewed, "the lease is not renewed")
        with store.lease("x") as second:
            assert (bool(first), bool(second)) == (True, False)
    store.write(".leases/x", b"%f dead" % (now + 0.2))
    with store.lease("x") as held:
        assert not held
    now += 0.3
    with store.lease("x") as held:
        assert held


@pytest.mark.slow
def test_the_holder_of_a_lease_in_an_object_store_learns_that_it_is_lost(s3, monkeypatch, wait_until, caplog):
    now = 1000.0
    monkeypatch.setattr(lease, "time", SimpleNamespace(time=lambda: now))
    monkeypatch.setattr(lease, "LEASE_S", 0.4)
    store = FileStore(s3)
    with store.lease("x") as taken:
        store.write(".leases/x", b"%f another" % (now + 100))  # while this process was stopped, say
        wait_until(lambda: not taken, "the loss is not noticed")
    assert store.read(".leases/x").endswith(b" another")  # it is not released for the other
    with store.lease("y") as unanswered:
        monkeypatch.setattr(lease._LeaseClaim, "_put", lambda *_: 1 / 0)
        assert unanswered
        now += 0.5
        wait_until(lambda: not unanswered, "it is held for ever")
    assert caplog.text.count("was lost: it could not be renewed in time") == 2


def test_maintenance_ends_when_its_lease_is_lost(tmp_path, monkeypatch):
    index = Index(tmp_path / "index", "enc-1", 2)
    index.upsert([Item("a", "a", None, None)], np.ones((1, 2)))
    held = lease.Lease(True)
    monkeypatch.setattr(index.store, "lease", lambda name: nullcontext(held))
    done = []
    monkeypatch.setattr(index._table, "maintain", lambda since: held.lose())
    monkeypatch.setattr(index.store, "sweep", lambda *_: done.append(1))
    assert (index.maintain(), done) == (False, [])


def test_every_file_and_folder_is_flushed_before_writing_returns(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(store_module, "fsync", lambda path: flushed.append(Path(path)))
    store = FileStore(tmp_path / "index")
    store.write("a/b/c", b"data")
    assert flushed[0].parent == store.local / ".writing"  # the file before it takes its name
    assert {store.local / "a" / "b", store.local / "a", store.local} <= set(flushed[1:])


def test_a_failed_write_leaves_the_old_file_and_no_part_of_the_new_one(tmp_path, monkeypatch):
    store = FileStore(tmp_path)
    store.write("a", b"old")

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "fsync", full)
        with pytest.raises(IndexProblem, match=rf"The disk of {tmp_path} is full. Nothing was changed"):
            store.write("a", b"new")
    assert store.read("a") == b"old"
    assert list(store.list(".writing")) == []


def test_an_open_file_that_is_replaced_is_read_as_it_was(tmp_path):
    store = FileStore(tmp_path)
    store.write("a", b"old")
    with open(tmp_path / "a", "rb") as file:
        store.write("a", b"new")
        assert file.read() == b"old"


def test_a_moved_file_has_the_time_of_the_move(tmp_path):
    store = FileStore(tmp_path)
    store.write("a", b"")
    os.utime(tmp_path / "a", (0, 0))
    store.move({"a": "x/a"})
    store.sweep("x", 1000)
    assert store.read("x/a") == b""


def test_sweeping_deletes_old_files(tmp_path):
    store = FileStore(tmp_path)
    store.write_many({"x/new": b"", "x/old": b"", ".writing/old": b"", ".writing/new": b""})
    for name in ("x/old", ".writing/old"):
        os.utime(tmp_path / name, (0, 0))
    store.sweep("x", 1000)
    assert set(store.list("")) == {"x/new", ".writing/new"}


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(IndexProblem, match=rf"{tmp_path / 'file'} cannot be written"):
        FileStore(tmp_path / "file").write("a", b"")


@pytest.mark.slow
def test_a_missing_bucket_and_a_silent_server_are_reported(s3, monkeypatch):
    with pytest.raises(IndexProblem, match=r"s3://nowhere/x cannot be written \(there is no such bucket\)"):
        FileStore("s3://nowhere/x").write("a", b"")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(store_module, "RETRIES", 0)
    with pytest.raises(IndexProblem, match="it does not answer"):
        FileStore(s3).read("a")


def test_the_reason_for_an_error_is_one_that_the_user_can_change(tmp_path, monkeypatch):
    def sentence(uri, error: Exception) -> str:
        with pytest.raises(IndexProblem) as raised, FileStore(uri).explained("read"):
            raise error
        return str(raised.value)

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    assert "(the keys are refused)" in sentence("s3://bucket/x", OSError("403 Forbidden"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    without = sentence("s3://bucket/x", OSError("403 Forbidden"))
    assert "(it refuses requests without keys, and AWS_ACCESS_KEY_ID is not set)" in without
    assert sentence(tmp_path, PermissionError(13, "Permission denied")).endswith(
        "Give this program permission there, or choose another index."
    )
    assert sentence(tmp_path, OSError("bad page")).endswith("`twinview index verify` finds damaged files.")


def test_a_file_uri_is_a_folder(tmp_path):
    FileStore(f"file://{tmp_path}").write("a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1"
