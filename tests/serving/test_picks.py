"""Picking items to be labelled first, over HTTP."""

import pytest

from serving.client import ServiceError
from serving.collection.reembedding import Progress, Reembedding
from serving.curation.pick_items import PickedItems

PICK, ITEMS = "/collections/pictures/pick", "/collections/pictures/items"


@pytest.fixture
def client(connect, http, fill):
    """A client of a service with 6 pictures, of which the first is labelled, and the first two are of 2020."""
    items = fill(6)
    connected = connect(http)
    facts = [{"id": item.id, "label": None, "metadata": {"year": 2020 + (i > 1)}} for i, item in enumerate(items)]
    connected.change_items([facts[0] | {"label": "cat"}, *facts[1:]])
    return connected


@pytest.mark.slow
def test_items_without_a_label_are_picked(client):
    picked = client.pick(2)
    assert (len(picked.items), picked.candidates) == (2, 5)
    every = client.pick(9, labelled_too=True)
    assert (len(every.items), every.candidates) == (6, 6)
    assert {item.label for item in every.items} == {"cat", None}
    assert {item.label for item in client.pick(9, "diverse").items} == {None}
    old = client.pick(9, filter={"year": 2020})
    assert (len(old.items), old.candidates) == (1, 1)
    years = [item.metadata["year"] for item in client.pick(2, balanced_by="year").items]
    assert years == [2020, 2021]
    orders = {tuple(item.id for item in client.pick(5, seed=seed).items) for seed in (0, 0, 0)}
    assert len(orders) == 1


@pytest.mark.slow
def test_every_setting_of_a_request_counts(client, monkeypatch):
    asked = []

    def pick_items(index, *settings):
        asked.append((index.name, *settings))
        return PickedItems([], 0, 0)

    monkeypatch.setattr("serving.curation.pick_items.pick_items", pick_items)
    client.pick(7, "diverse", None, "year", True, 3)
    assert asked == [("pictures", 7, "diverse", None, "year", True, 3)]


@pytest.mark.slow
def test_nothing_to_pick_is_no_error_and_bad_input_is_named(client, http):
    assert client.pick(filter={"label": "cat"}).items == []
    assert http.post(PICK).json()["candidates"] == 5
    for arguments, message in (
        ({"k": 0}, "k: 0 is given, at least 1 is needed"),
        ({"method": "best"}, "method: "),
        ({"balanced_by": "colour"}, "balanced_by: no item of pictures has a value of colour"),
        ({"filter": {"yaer": 2020}}, "filter: .*yaer"),
        ({"collection": "none"}, "there is no collection none"),
    ):
        with pytest.raises(ServiceError, match=message):
            client.pick(**arguments)


@pytest.mark.slow
def test_one_request_is_answered_at_a_time(client, http):
    picking = http.app.state.engine.comparisons.gate
    with picking.admit(1):
        assert http.post(PICK).status_code == 429
    assert http.post(PICK).status_code == 200


@pytest.mark.slow
def test_what_is_compared_of_an_incomplete_collection_says_how_many_items_are_missing(connect, http, fill, monkeypatch):
    items, client = fill(20), connect(http)
    facts = [{"id": item.id, "metadata": {"year": 2020 + (i > 1)}} for i, item in enumerate(items)]
    client.change_items([facts[0] | {"label": "cat"}, facts[1] | {"label": "dog"}, *facts[2:]])
    comparisons = (
        client.pick,
        client.suggest,
        client.odd,
        lambda: client.coverage(filter={"year": 2020}, by_filter={"year": 2021}),
        lambda: client.split({"train": 0.5, "test": 0.5}),
        client.duplicates,
        client.map,
    )
    assert [compare().missing for compare in comparisons] == [0] * 7
    monkeypatch.setattr(Reembedding, "progress", lambda self: Progress("stopped", 6, 10))
    assert [compare().missing for compare in comparisons] == [4] * 7
