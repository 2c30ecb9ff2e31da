"""Several searches in one request give what each gives alone, by as few queries of the table as possible."""

import numpy as np
import pytest

from serving import searches as searching
from serving.collection.table import LanceTable

SEARCH, SEARCHES = "/collections/pictures/search", "/collections/pictures/searches"


@pytest.fixture
def queries(monkeypatch) -> list[int]:
    """The number of vectors in each query of a table."""
    asked, nearest = [], LanceTable.nearest

    def noted(self, vectors, k, where=None):
        asked.append(len(vectors))
        return nearest(self, vectors, k, where)

    monkeypatch.setattr(LanceTable, "nearest", noted)
    return asked


@pytest.fixture
def searches(fill) -> list[dict]:
    """Searches of all kinds."""
    ids = [item.id for item in fill(60)]
    vector = np.random.default_rng(0).normal(size=48).tolist()
    return [
        *({"positive": [id]} for id in ids[:6]),
        {"positive": [vector], "k": 13},
        {"positive": ids[:2], "negative": [ids[5]], "k": 5},
        {"positive": [ids[7]], "filter": {"label": "a"}},
        {"positive": [ids[8]], "filter": {"label": "a"}},
        {"positive": [ids[9]], "filter": {"width": 40}},
        {"positive": [ids[10]], "filter": {"width": 40.0}},
        {"positive": [ids[3], ids[3]]},
        {"positive": [ids[4]], "threshold": 0.8},
        {"positive": [ids[4]], "closer_than": 0.9},
        {"positive": [ids[4]], "k": 60},
        {"positive": ids[:30], "k": 60},
    ]


def test_searches_together_give_what_each_gives_alone(http, searches):
    together = http.post(SEARCHES, json={"searches": searches})
    assert together.status_code == 200, together.text
    alone = [http.post(SEARCH, json=search).json() for search in searches]
    assert together.json()["answers"] == alone
    assert all(answer["results"] for answer in alone)


def test_searches_that_differ_in_their_examples_only_are_one_query(http, searches, queries):
    http.post(SEARCHES, json={"searches": searches[:6]})
    assert queries == [6]
    queries.clear()
    http.post(SEARCHES, json={"searches": searches[:10]})
    assert queries == [7, 1, 2]  # with the vector, whose twelve results and itself are as many rows


def test_searches_for_many_rows_are_not_all_in_memory_at_once(http, searches, queries, monkeypatch):
    monkeypatch.setattr(searching, "ROWS_FOUND", 30)
    http.post(SEARCHES, json={"searches": searches[:6]})
    assert queries == [2, 2, 2]


def test_the_search_that_fails_among_several_is_named(http, searches):
    wrong = {"positive": searches[0]["positive"], "filter": {"labl": "a"}}
    answer = http.post(SEARCHES, json={"searches": [*searches[:3], wrong]})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "searches[3].filter")
    assert error["message"].startswith("searches[3].filter: No item has the key labl")


def test_truth_values_and_numbers_are_not_the_same_filter(http, searches):
    first = searches[0]["positive"]
    both = [{"positive": first, "filter": {"width": 1}}, {"positive": first, "filter": {"width": True}}]
    for order, wrong in ((both, 1), (both[::-1], 0)):
        answer = http.post(SEARCHES, json={"searches": order})
        assert answer.json()["error"]["param"] == f"searches[{wrong}].filter"
