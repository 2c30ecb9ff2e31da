"""Searching a collection of which a new encoder has embedded a part. The encoders are functions here."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from serving.cli import index as cli
from serving.collection import reembedding, upgrade
from serving.collection.index import Index, Item
from serving.collection.items import unit
from serving.collection.problems import UnknownKey, WrongEncoder
from serving.collection.reembedding import Embedded, Reembedding
from serving.collection.upgrade import Upgrade
from serving.inference import encoder
from serving.protocol.filters import Filter

COUNT, D, D_OLD = 200, 8, 12
IDS = [f"{'shoe' if i < COUNT // 2 else 'hat'}-{i:03}" for i in range(COUNT)]
NEW = unit(np.random.default_rng(0).normal(size=(COUNT, D)))
OLD = (
    NEW @ np.linalg.qr(np.random.default_rng(1).normal(size=(D_OLD, D)))[0].T
)  # in another space, with the same angles


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(upgrade, "LEAST_PAIRS", 60)
    monkeypatch.setattr(upgrade, "CHECK_S", 0)
    monkeypatch.setattr(reembedding, "ROWS_TOGETHER", 20)


@pytest.fixture
def old(tmp_path) -> Index:
    """The collection as the old encoder has embedded it."""
    index = Index(tmp_path / "index", "old", D_OLD)
    index.upsert([Item(id, id, id[:3], None, 1, 1, 1, {"row": i}) for i, id in enumerate(IDS)], OLD)
    return index


@pytest.fixture
def new(old) -> Index:
    return Index(old.store.uri, "new", D)


def embed_again(index: Index, most: int = COUNT) -> None:
    """Until `most` items are embedded."""
    work = Reembedding(index)
    work.start()
    with work.lease() as held:
        assert held
        work.run(
            lambda item: item.id.encode(),
            lambda items, files: [Embedded(NEW[IDS.index(item.id)], b"", 1, 1, 1) for item in items],
            1,
            lambda: index.exists() and index._table.exists() and index.count() >= most,
        )


def test_every_item_is_found_when_half_are_embedded_again(old, new, monkeypatch):
    embed_again(new, 100)
    known = new.ids()
    assert len(known) == 100
    answers, estimated = Upgrade(new).search_many(2 * NEW, 5, None)
    assert estimated
    for i, id in enumerate(IDS):
        found = {item.id: cosine for item, cosine in answers[i]}
        assert len(found) == 5 and next(iter(found)) == id
        assert list(found.values()) == sorted(found.values(), reverse=True)
        for other, cosine in found.items():
            assert cosine == pytest.approx(NEW[i] @ NEW[IDS.index(other)], abs=1e-5 if other in known else 0.1)
    monkeypatch.setattr(upgrade.VectorMap, "cosines", lambda self, estimated: estimated + 0.5)
    answers, _ = Upgrade(new).search_many(NEW, 5, None)
    for i, answer in enumerate(answers):
        for item, cosine in answer:  # none has an estimate in place of its real cosine
            assert cosine == pytest.approx(NEW[i] @ NEW[IDS.index(item.id)] + 0.5 * (item.id not in known), abs=0.1)


@pytest.mark.parametrize("embedded", [100, COUNT])
def test_the_search_of_the_command_line_finds_them_too_and_says_so(old, new, monkeypatch, capsys, embedded):
    embed_again(new, embedded)
    monkeypatch.setattr(encoder, "find_bundle", lambda *_, **__: SimpleNamespace(card=SimpleNamespace(id="new")))
    missing = next((id for id in IDS if id not in new.ids()), IDS[0])
    cli.search(cli.Search(index=old.store.uri, collection=old.name, query=missing, k=COUNT, json=True))
    said = capsys.readouterr()
    assert {row["id"] for row in json.loads(said.out)} == set(IDS) - {missing}
    assert ("some cosines are estimates" in said.err) == (embedded < COUNT)
    cli.search(cli.Search(index=old.store.uri, collection=old.name, query=missing, threshold=0.5, json=True))
    assert min(row["similarity"] for row in json.loads(capsys.readouterr().out)) >= 0.5


def test_the_items_that_are_embedded_first_stand_for_all(old, new):
    embed_again(new, 20)
    assert 4 <= sum(id.startswith("shoe") for id in new.ids()) <= 16


@pytest.mark.parametrize("state", ["none", "few", "done"])
def test_otherwise_only_the_new_table_is_searched(old, new, state):
    if state == "none":
        with pytest.raises(WrongEncoder):
            Upgrade(new).search_many(NEW[:1], 5, None)
        with pytest.raises(WrongEncoder):
            Upgrade(new).get_many(IDS[:1])
        new.create(allow_other_encoder=True)
    else:
        embed_again(new, 40 if state == "few" else COUNT)
    assert Upgrade(new).search_many(NEW[:3], 5, None) == (new.search_many(NEW[:3], 5), False)
    assert Upgrade(new).get_many(IDS).keys() == new.ids()


def test_a_small_share_is_not_enough(old, new, monkeypatch):
    monkeypatch.setattr(upgrade, "LEAST_SHARE", 0.6)
    embed_again(new, 100)
    assert Upgrade(new).old_vectors() is None


def test_the_map_is_learnt_again_when_twice_as_many_are_embedded(old, new):
    embed_again(new, 60)
    searched = Upgrade(new)
    first = searched.old_vectors()
    embed_again(new, 100)
    assert searched.old_vectors() is first
    embed_again(new, 120)
    assert (first.count, searched.old_vectors().count) == (60, 120)
    embed_again(new)
    assert searched.old_vectors() is None


def test_items_have_their_vector_or_an_estimate(old, new):
    embed_again(new, 100)
    found = Upgrade(new).get_many([*IDS, "other"])
    assert found.keys() == set(IDS)
    for i, id in enumerate(IDS):
        item, vector = found[id]
        assert item.id == id
        np.testing.assert_allclose(vector, NEW[i], atol=1e-6 if id in new.ids() else 0.2)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


def test_filters_hold_in_both_tables_also_by_a_key_that_one_lacks(old, new):
    embed_again(new, 100)
    new.upsert([Item("late", "late", "late", None, 1, 1, 1, {"season": "winter"})], NEW[:1])
    searched = Upgrade(new)

    def ids(**where) -> set[str]:
        return {item.id for item, _ in searched.search_many(NEW[:1], COUNT, Filter.parse(where))[0][0]}

    assert ids(label="hat") == set(IDS[COUNT // 2 :])
    assert ids(season="winter") == {"late"}
    old.upsert([Item("early", "early", "early", None, 1, 1, 1, {"price": 3})], OLD[:1])
    assert ids(price=3) == {"early"}
    with pytest.raises(UnknownKey):
        ids(colour="red")
