"""Labels that are suggested by the nearest pictures with a label."""

import numpy as np
import pytest

from serving.client import ServiceError
from serving.collection.items import unit
from serving.curation import suggest as module
from serving.curation.suggest import suggest

SUGGEST = "/collections/pictures/suggest"
D = 16


def heaps(count: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n unit vectors around each of `count` centres, with a large part in common, and their labels."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(count, D))
    labels = np.repeat(np.arange(count), n)
    return unit(5 + centres[labels] + 0.3 * rng.normal(size=(len(labels), D))).astype(np.float32), labels


def test_the_nearest_labels_are_suggested_and_shares_say_how_sure_they_are():
    known, labels = heaps(4, 6, seed=0)
    vectors, expected = heaps(4, 700, seed=1)  # in more than one block
    between = unit(known[:12].mean(axis=0, keepdims=True))  # of two heaps
    suggested, share = suggest(np.concatenate([vectors, between]), known, labels)
    np.testing.assert_array_equal(suggested[:-1], expected)
    assert share[:-1].min() > 0.99 > share[-1] > 0.4
    order = np.random.default_rng(2).permutation(len(known))
    np.testing.assert_array_equal(suggest(vectors, known[order], labels[order])[0], expected)


def test_the_votes_are_those_of_the_nearest_by_the_exponential_of_the_cosine(monkeypatch):
    monkeypatch.setattr(module, "NEIGHBOURS", 3)
    rng = np.random.default_rng(0)
    known, labels = unit(rng.normal(size=(9, D))).astype(np.float32), np.arange(9) % 3
    vectors = unit(rng.normal(size=(5, D))).astype(np.float32)
    centre = np.concatenate([vectors, known]).mean(axis=0)
    suggested, share = suggest(vectors, known, labels)
    for row, vector in enumerate(vectors):
        cosine = unit(known - centre) @ unit((vector - centre)[None])[0]
        votes = np.zeros(3)
        for near in np.argsort(-cosine)[:3]:
            votes[labels[near]] += np.exp(cosine[near] / 0.1)
        assert (suggested[row], share[row]) == (votes.argmax(), pytest.approx(votes.max() / votes.sum(), rel=1e-4))


def test_of_many_labels_a_sample_is_compared(monkeypatch):
    known, labels = heaps(2, 500, seed=0)
    for most, right in ((40, 1), (1, 0.5)):  # of one picture only its own label is known
        monkeypatch.setattr(module, "MOST_KNOWN", most)
        assert (suggest(known, known, labels)[0] == labels).mean() == right


@pytest.fixture
def client(connect, http, fill):
    """A client of a service with 9 pictures, of which some are labelled. Those of 2020 are not."""
    items = fill(9)
    connected = connect(http)
    labels = ["cat", "dog", "cat", "dog", *[None] * 5]
    connected.change_items(
        [
            {"id": item.id, "label": label, "metadata": {"year": 2021 if label else 2020 + i % 2}}
            for i, (item, label) in enumerate(zip(items, labels, strict=True))
        ]
    )
    return connected


@pytest.mark.slow
def test_labels_are_suggested_for_items_without_one(client):
    found = client.suggest(9)
    assert (len(found.items), found.candidates) == (5, 5)
    assert {item.label for item in found.items} == {None} and {item.suggested for item in found.items} <= {"cat", "dog"}
    shares = [item.share for item in found.items]
    assert shares == sorted(shares, reverse=True) and 0.5 <= min(shares) <= max(shares) <= 1
    assert client.suggest(2).items == found.items[:2]
    old = client.suggest(filter={"year": 2020})
    assert {item.metadata["year"] for item in old.items} == {2020} and 0 < len(old.items) == old.candidates < 5
    assert [item.suggested for item in old.items] == [
        item.suggested for item in found.items if item.metadata["year"] == 2020
    ]  # by labelled ones of other years
    client.change_items([{"id": item.id, "label": item.suggested} for item in found.items])
    assert client.suggest() == type(found)([], 0)


@pytest.mark.slow
def test_without_two_labels_nothing_can_be_suggested_and_bad_input_is_named(client, http):
    for arguments, message in (
        ({"k": 0}, "k: 0 is given, at least 1 is needed"),
        ({"filter": {"yaer": 2020}}, "filter: .*yaer"),
        ({"collection": "none"}, "there is no collection none"),
    ):
        with pytest.raises(ServiceError, match=message):
            client.suggest(**arguments)
    for label, message in (
        ("dog", "pictures has no label but dog; label some"),
        (None, "pictures has no labels; label"),
    ):
        client.change_items([{"id": item.id, "label": label} for item in client.items().items if item.label])
        with pytest.raises(ServiceError, match=message) as refused:
            client.suggest()
        assert (refused.value.status, refused.value.param) == (400, "name")


@pytest.mark.slow
def test_one_request_is_answered_at_a_time(client, http):
    with http.app.state.engine.comparisons.gate.admit(1):
        assert http.post(SUGGEST).status_code == 429
    assert http.post(SUGGEST).status_code == 200
