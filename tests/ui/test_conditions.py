from serving.client import Key
from serving.protocol.filters import parse_conditions
from ui.search.conditions import condition_choices, condition_hint

KEYS = [
    Key("label", "text", 2, [("summer dress", 30), ('a "b", c', 1)]),
    Key("size", "text", 2, [("42", 5), ("XL", 4)]),
    Key("sold", "truth", 2, [(True, 7), (False, 3)]),
    Key("price", "number", 40, [(3.5, 2)], 3.0, 20.5, 99.0),
    Key("stars", "whole", 3, [(5, 4)], 1, 3, 5),
]


def test_offered_conditions_mean_the_values_of_the_collection():
    values = dict(condition_choices(KEYS))
    assert parse_conditions([values['size="42" (5)']]) == {"size": {"in": ["42"]}}
    assert parse_conditions([values["sold=true (7)"]]) == {"sold": {"in": [True]}}
    assert parse_conditions([values["stars=5 (4)"]]) == {"stars": {"in": [5]}}
    texts = [parse_conditions([typed])["label"]["in"] for typed in values.values() if typed.startswith("label")]
    assert texts == [["summer dress"], ['a "b", c']]


def test_many_numbers_are_offered_as_two_halves():
    assert [typed for _, typed in condition_choices(KEYS) if typed.startswith("price")] == ["price<20.5", "price>=20.5"]


def test_the_hint_names_the_keys_and_their_ranges():
    assert condition_hint(KEYS).endswith("Keys: label, size, sold, price (3 to 99), stars (1 to 5).")
    assert "Keys: label." in condition_hint([])


def test_an_offered_text_that_reads_as_null_or_a_number_is_quoted():
    keys = [Key("label", "text", 1, [("null", 2)]), Key("size", "text", 1, [("true", 1)])]
    assert [typed for _, typed in condition_choices(keys)] == ['label="null"', 'size="true"']
