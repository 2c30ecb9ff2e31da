import contextlib
import multiprocessing
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from serving.index import Index, IndexProblem, Item, content_id


def made(numbers, folder=None) -> tuple[list[Item], np.ndarray]:
    """Items of these numbers, and vectors (n, 8) that depend on the number."""
    items = [Item(content_id(b"%d" % i), f"{i}.png", None, None, 4, 3) for i in numbers]
    return items, np.stack([np.random.default_rng(i).normal(size=8) for i in numbers]).astype(np.float32)


@pytest.fixture
def index(tmp_path) -> Index:
    return Index(tmp_path / "index", "enc-1", 8)


def test_upserting_again_replaces_and_adds_nothing(index):
    items, vectors = made(range(10))
    index.upsert(items, vectors)
    index.upsert([Item(items[3].id, "new.png", "cat", "/new.png", 1, 2)], -vectors[3:4])
    assert index.count() == len(index.ids()) == 10
    item, vector = index.get(items[3].id)
    assert item == Item(items[3].id, "new.png", "cat", "/new.png", 1, 2)
    np.testing.assert_allclose(vector, -vectors[3] / np.linalg.norm(vectors[3]), rtol=1e-5)


def test_reading_makes_no_folder(index):
    assert (index.count(), index.ids(), index.page(5), index.get("0" * 32)) == (0, set(), [], None)
    assert index.search(np.ones(8), 3) == []
    index.compact()
    assert not index.folder.exists()


def test_a_reader_sees_what_another_wrote_after_it_had_opened(index):
    items, vectors = made(range(20))
    index.upsert(items[:10], vectors[:10])
    reader = Index(index.folder, "enc-1", 8)
    assert reader.count() == 10
    index.upsert(items[10:], vectors[10:])
    assert reader.count() == 20
    assert reader.search(vectors[15], 1)[0][0] == items[15]


def test_an_index_that_was_deleted_and_filled_anew_is_found_again(index):
    items, vectors = made(range(4))
    index.upsert(items, vectors)
    shutil.rmtree(index.folder)
    other = Index(index.folder, "enc-1", 8)
    other.upsert(items[:2], vectors[:2])
    with contextlib.suppress(IndexProblem):  # its files are not those it knew
        index.count()
    assert index.count() == 2


def test_search_agrees_with_brute_force(index):
    items, vectors = made(range(300))
    index.upsert(items, vectors * np.arange(1, 301)[:, None])  # lengths must not matter
    query = np.random.default_rng(1000).normal(size=8)
    cosines = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    order = np.argsort(-cosines)[:40]
    found = index.search(5 * query, 40)
    assert [item for item, _ in found] == [items[i] for i in order]
    np.testing.assert_allclose([similarity for _, similarity in found], cosines[order], atol=1e-5)


def test_the_left_out_item_is_left_out_before_the_nearest_are_counted(index):
    items, vectors = made(range(30))
    index.upsert(items, vectors)
    found = [item.id for item, _ in index.search(vectors[5], 29, without=items[5].id)]
    assert len(found) == 29
    assert items[5].id not in found


def test_every_file_of_an_upsert_is_flushed_before_it_returns(index, monkeypatch):
    flushed = set()
    monkeypatch.setattr("serving.index._fsync", lambda path: flushed.add(path))
    items, vectors = made(range(3))
    for i in range(3):
        index.add_thumbnail(items[i].id, b"jpeg")
        index.upsert(items[i : i + 1], vectors[i : i + 1])
        table = index.folder / "enc-1.lance"
        files = {path for path in table.rglob("*") if path.is_file()}
        folders = {path.parent for path in files} | {table, index.folder}
        thumbnail = index.thumbnail(items[i].id)
        assert files | folders | {thumbnail.parent, thumbnail.parent.parent} <= flushed


def test_compacting_joins_the_pieces_and_keeps_the_rows(index):
    items, vectors = made(range(12))
    for i in range(12):
        index.upsert(items[i : i + 1], vectors[i : i + 1])
    index.compact()
    assert index.ids() == {item.id for item in items}
    assert index._table().stats()["fragment_stats"]["num_fragments"] == 1
    assert {item.id for item in index.page(100)} == index.ids()


def test_a_thumbnail_is_looked_for_by_ids_alone(index):
    (index.folder / "thumbnails").mkdir(parents=True)
    (index.folder / "secret.jpg").write_bytes(b"secret")
    assert index.thumbnail("../secret") is None
    assert index.thumbnail("") is None


def test_a_table_of_another_make_is_refused_by_name(index):
    items, vectors = made(range(3))
    index.upsert(items, vectors)
    with pytest.raises(IndexProblem, match=r"index holds a table enc-1 that is not from here"):
        Index(index.folder, "enc-1", 9).count()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(IndexProblem, match=rf"The index in {tmp_path / 'file'} cannot be written"):
        Index(tmp_path / "file", "enc-1", 8).upsert(*made([1]))


def write(index, numbers, together) -> None:
    for i in numbers:
        together.wait(60)
        index.upsert(*made(range(i, i + 10)))


def test_processes_that_write_the_same_rows_at_once_leave_one_of_each(index):
    """Another process and this one write, step by step at the same moment, while a third index reads."""
    spawn = multiprocessing.get_context("spawn")
    together = spawn.Barrier(2)
    other = spawn.Process(target=write, args=(Index(index.folder, "enc-1", 8), range(0, 60, 10), together))
    other.start()
    index.upsert(*made(range(10)))
    counts, reader = [], Index(index.folder, "enc-1", 8)
    with ThreadPoolExecutor() as pool:
        writing = pool.submit(write, index, range(0, 60, 10), together)
        while other.is_alive() or not writing.done():
            counts.append(reader.count())
            time.sleep(0.01)
    writing.result()
    assert other.exitcode == 0
    assert counts == sorted(counts)
    assert index.count() == len(index.ids()) == 60
