import shutil

import numpy as np
import pytest

from serving.collection import resident
from serving.collection.index import Index, IndexProblem, Item, content_id, unit
from serving.collection.nearest import HEADS_FROM, Nearest
from serving.protocol.filters import Filter

D = 64


def clustered(n: int, seed: int = 0) -> np.ndarray:
    """Unit vectors (n, D) around a centre for each 50."""
    rng = np.random.default_rng(seed)
    centres = unit(np.random.default_rng(7).normal(size=(n // 50, D)))
    return unit(centres[rng.integers(0, len(centres), n)] + 0.7 * D**-0.5 * rng.normal(size=(n, D)))


def held(vectors: np.ndarray, capacity: int = 0, parts: int = 5) -> Nearest:
    """With the keys 10, 11, ..., in an order that is not theirs."""
    keys = np.roll(np.arange(len(vectors), dtype=np.uint64) + 10, 100)
    pieces = zip(np.array_split(keys, parts), np.array_split(vectors[keys - 10], parts), strict=True)
    return Nearest.from_parts(pieces, vectors.shape[1], capacity or len(vectors))


def exact(vectors: np.ndarray, query: np.ndarray, k: int, among: np.ndarray) -> list[int]:
    return (among[np.argsort(-(vectors[among] @ query))[:k]] + 10).tolist()


@pytest.mark.parametrize("n", [100, 2 * HEADS_FROM])
@pytest.mark.parametrize("kept", [1.0, 0.5, 0.01])
def test_the_nearest_are_those_of_a_full_comparison_alone_and_in_a_batch(n, kept):
    vectors, queries = clustered(n), clustered(n, seed=1)[:20]
    nearest = held(vectors)
    gone = np.arange(0, n, 7)
    nearest = nearest.removed(gone.astype(np.uint64) + 10)
    left = np.setdiff1d(np.arange(n), gone)
    left = left[np.random.default_rng(2).random(len(left)) < kept]
    among = None if kept == 1 else nearest.positions(left.astype(np.uint64) + 10)
    batch = nearest.search(queries, 10, among)
    for query, (keys, cosines) in zip(queries, batch, strict=True):
        assert keys.tolist() == exact(vectors, query, 10, left)
        np.testing.assert_allclose(cosines, vectors[keys - 10] @ query, atol=1e-6)
        assert nearest.search(query[None], 10, among)[0][0].tolist() == keys.tolist()


def test_noise_without_neighbours_is_compared_in_full():
    vectors = unit(np.random.default_rng(0).normal(size=(3 * HEADS_FROM, D)))
    nearest, queries = held(vectors), unit(np.random.default_rng(1).normal(size=(20, D)))
    right = [
        len({*keys.tolist()} & {*exact(vectors, query, 10, np.arange(len(vectors)))})
        for query, (keys, _) in zip(queries, nearest.search(queries, 10), strict=True)
    ]
    assert sum(right) >= 198


def test_more_vectors_than_the_capacity_are_refused():
    with pytest.raises(ValueError, match="101 vectors are more than the 100"):
        held(clustered(100)).added(np.array([1], np.uint64), clustered(50)[:1])


def test_added_rows_are_found_and_the_old_object_is_unchanged():
    vectors = clustered(HEADS_FROM + 4000)
    old = held(vectors[:HEADS_FROM], len(vectors))
    new = old
    for at in range(HEADS_FROM, len(vectors), 1000):
        new = new.added(np.arange(at, at + 1000, dtype=np.uint64) + 10, vectors[at : at + 1000])
    for query in vectors[-5:]:
        assert new.search(query[None], 3)[0][0].tolist() == exact(vectors, query, 3, np.arange(len(vectors)))
        assert old.search(query[None], 3)[0][0].tolist() == exact(vectors, query, 3, np.arange(HEADS_FROM))


def test_memory_of_removed_rows_is_reused():
    vectors = clustered(HEADS_FROM + 2000)
    nearest = held(vectors[:HEADS_FROM], HEADS_FROM + 100).removed(np.arange(1000, dtype=np.uint64) + 10)
    for at in range(HEADS_FROM, HEADS_FROM + 1000, 250):
        nearest = nearest.added(np.arange(at, at + 250, dtype=np.uint64) + 10, vectors[at : at + 250])
    left = np.arange(1000, HEADS_FROM + 1000)
    assert nearest.count == len(left)
    for query in vectors[::500]:
        assert nearest.search(query[None], 3)[0][0].tolist() == exact(vectors, query, 3, left)


@pytest.fixture
def followed(tmp_path, monkeypatch):
    """Check an index that stays open, of what another one writes, after each step; how often all was loaded."""
    writer, reader, model = Index(tmp_path / "index", "e", D), Index(tmp_path / "index", "e", D), {}
    loads = []
    load = resident.Resident._loaded
    monkeypatch.setattr(resident.Resident, "_loaded", lambda self, table: loads.append(1) or load(self, table))

    def check() -> int:
        names, vectors = list(model), np.stack(list(model.values()))
        for query in clustered(400, seed=9)[:5]:
            order = np.argsort(-(vectors @ query))[:10]
            found = reader.search(query, 10)
            assert [item.name for item, _ in found] == [names[i] for i in order]
            even = [i for i in np.argsort(-(vectors @ query)) if int(names[i]) % 2 == 0][:5]
            found = reader.search(query, 5, Filter.parse({"even": True}))
            assert [item.name for item, _ in found] == [names[i] for i in even]
        return len(loads)

    def upsert(numbers, vectors):
        items = [Item(content_id(b"%d" % i), str(i), None, None, 1, 1, 1, {"even": i % 2 == 0}) for i in numbers]
        writer.upsert(items, vectors)
        model.update({str(i): vector for i, vector in zip(numbers, vectors, strict=True)})

    return writer, model, upsert, check


@pytest.mark.slow
def test_a_reader_follows_additions_replacements_deletions_and_undo(followed):
    writer, model, upsert, check = followed
    upsert(range(400), clustered(400))
    assert check() == 1
    upsert(range(400, 500), clustered(400, seed=2)[:100])
    upsert(range(50), clustered(400, seed=3)[:50])
    assert check() == 1  # what was there was not read again
    before = dict(model)
    writer.delete([content_id(b"%d" % i) for i in range(30, 60)])
    for i in range(30, 60):
        del model[str(i)]
    assert check() == 1
    writer.undo()
    model.update(before)
    check()
    for i in range(5):
        upsert(range(500 + i, 501 + i), clustered(400, seed=4)[i : i + 1])
    check()
    writer.maintain()
    check()
    writer.delete([content_id(b"%d" % i) for i in range(600)])
    model.clear()
    upsert(range(20), clustered(400, seed=5)[:20])
    check()


@pytest.mark.slow
def test_another_table_of_the_same_name_is_recognised(followed):
    writer, model, upsert, check = followed
    upsert(range(400), clustered(400))
    check()
    shutil.rmtree(writer.store.uri)
    model.clear()
    for at in range(0, 400, 100):
        try:
            upsert(range(at, at + 100), clustered(400, seed=6)[at : at + 100])
        except IndexProblem:  # its files are not those it knew
            upsert(range(at, at + 100), clustered(400, seed=6)[at : at + 100])
    try:
        check()
    except IndexProblem:
        check()
