import pytest

from serving.client import Key
from serving.protocol.filters import Filter
from ui.search.conditions import ConditionProblem, hint, offered, parsed

KEYS = [
    Key("label", "text", 2, [("summer dress", 30), ('a "b", c', 1)]),
    Key("size", "text", 2, [("42", 5), ("XL", 4)]),
    Key("sold", "truth", 2, [(True, 7), (False, 3)]),
    Key("price", "number", 40, [(3.5, 2)], 3.0, 20.5, 99.0),
    Key("stars", "whole", 3, [(5, 4)], 1, 3, 5),
]


@pytest.mark.parametrize(
    ("typed", "filter"),
    [
        ([], None),
        (["label=shirt"], {"label": {"in": ["shirt"]}}),
        (["label = summer dress "], {"label": {"in": ["summer dress"]}}),
        (["label=shirt", "label=hat, shoes"], {"label": {"in": ["shirt", "hat", "shoes"]}}),
        (["price>=3", "price<9.5"], {"price": {"gte": 3, "lt": 9.5}}),
        (
            ['sku="42"', "sold=true", "year!=null"],
            {"sku": {"in": ["42"]}, "sold": {"in": [True]}, "year": {"ne": None}},
        ),
        (["price>3", "price>3"], {"price": {"gt": 3}}),
    ],
)
def test_what_is_typed_is_what_the_service_takes(typed, filter):
    assert parsed(typed) == filter
    Filter.parse(filter or {})


@pytest.mark.parametrize("typed", ["shirt", "label", "label=", "=shirt", "price>3,4", 'a="open', "2b=3"])
def test_what_is_no_condition_is_named(typed):
    with pytest.raises(ConditionProblem, match="is no condition such as label=shirt") as told:
        parsed(["label=hat", typed])
    assert str(told.value).startswith(typed)


def test_two_different_bounds_of_one_kind_are_refused():
    with pytest.raises(ConditionProblem, match=r"^price>4 stands beside another bound"):
        parsed(["price>3", "price>4"])


def test_what_is_offered_means_the_values_that_there_are():
    values = dict(offered(KEYS))
    assert parsed([values['size="42" (5)']]) == {"size": {"in": ["42"]}}
    assert parsed([values["sold=true (7)"]]) == {"sold": {"in": [True]}}
    assert parsed([values["stars=5 (4)"]]) == {"stars": {"in": [5]}}
    texts = [parsed([typed])["label"]["in"] for typed in values.values() if typed.startswith("label")]
    assert texts == [["summer dress"], ['a "b", c']]


def test_of_many_numbers_the_halves_are_offered():
    assert [typed for _, typed in offered(KEYS) if typed.startswith("price")] == ["price<20.5", "price>=20.5"]


def test_the_hint_names_the_keys_and_their_ranges():
    assert hint(KEYS).endswith("Here: label, size, sold, price (3 to 99), stars (1 to 5).")
    assert "Here: label." in hint([])
