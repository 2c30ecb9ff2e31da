import operator
from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.collection.index import Index, Item, content_id
from serving.collection.problems import UnknownKey
from serving.protocol.filters import OPERATORS, Filter, FilterProblem, parse_conditions, parse_shell

HOSTILE = ["", "'", "''", "red'; --", "`", '"', "\\", "\\'", "%", "_", "NULL", "true", "3", "ß", "日本", "🙂"]
HOSTILE += ["\n", "a\0b", "Red", "red"]
NUMBERS = [-(2**62), -3, 0, 1, 2, 2**53 + 1, 2**62]
FLOATS = [-1e300, -0.5, 0.0, 1.0, 2.5, 1e300]
COMPARE = {
    "eq": operator.eq,
    "gt": operator.gt,
    "gte": operator.ge,
    "lt": operator.lt,
    "lte": operator.le,
}


def holds(row: dict, key: str, op: str, value) -> bool:
    """Whether a row passes one condition, in plain Python."""
    has = row.get(key)
    if op == "in":
        return has in value
    if op == "ne":
        return has != value
    if has is None or value is None:
        return op == "eq" and has is value
    if op == "contains":
        return value.lower() in has.lower()
    return COMPARE[op](has, value)


def selects(row: dict, query: dict) -> bool:
    """Whether a row passes a filter, in plain Python."""
    for key, bounds in query.items():
        if key == "$or":
            passes = any(selects(row, part) for part in bounds)
        elif key == "$not":
            passes = not selects(row, bounds)
        else:
            passes = all(holds(row, key, op, value) for op, value in bounds.items())
        if not passes:
            return False
    return True


def one(values, orders=True, texts=False):
    kinds = ["eq", "ne", *(["gt", "gte", "lt", "lte"] if orders else []), *(["contains"] if texts else [])]
    single = st.tuples(st.sampled_from(kinds), values) | st.tuples(st.sampled_from(["eq", "ne"]), st.none())
    return single | st.tuples(st.just("in"), st.lists(values | st.none(), max_size=5))


words = st.sampled_from(HOSTILE) | st.text(max_size=5)
integers = st.sampled_from(NUMBERS) | st.integers(-(2**62), 2**62)
floats = st.sampled_from(FLOATS) | st.floats(allow_nan=False, allow_infinity=False)
small = st.integers(-5, 5) | st.sampled_from([-0.5, 1.0, 2.5])
condition = (
    st.tuples(st.sampled_from(["word", "name", "label"]), one(words, texts=True))
    | st.tuples(st.just("whole"), one(integers))
    | st.tuples(st.sampled_from(["few", "height"]), one(small))
    | st.tuples(st.just("real"), one(floats | small))
    | st.tuples(st.just("flag"), one(st.booleans(), orders=False))
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> tuple[Index, list[dict]]:
    """A collection whose rows have hostile values, and some rows without; and the same as plain rows."""
    index = Index(tmp_path_factory.mktemp("filters"), "enc", 2)
    items = []
    for i, word in enumerate(HOSTILE):
        metadata = {
            "word": word,
            "whole": NUMBERS[i % len(NUMBERS)],
            "few": i % 4 - 1,
            "real": FLOATS[i % len(FLOATS)],
            "flag": i % 2 == 0,
        }
        kept = {key: value for j, (key, value) in enumerate(metadata.items()) if (i + j) % 5}
        items.append(Item(content_id(b"%d" % i), word, None if i % 3 else word, None, 1, i % 5, 0, kept))
    index.upsert(items, np.ones((len(items), 2)))
    return index, [{"id": i.id, "name": i.name, "label": i.label, "height": i.height, **i.metadata} for i in items]


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(given_conditions=st.lists(condition, min_size=1, max_size=3, unique_by=lambda pair: pair[0]))
def test_a_filter_returns_the_rows_that_plain_python_selects(rows, given_conditions):
    index, plain = rows
    where = Filter.parse({key: {op: value} for key, (op, value) in given_conditions})
    wanted = {row["id"] for row in plain if all(holds(row, key, *rest) for key, rest in given_conditions)}
    assert {item.id for item in index.page(100, where=where)} == wanted
    assert index.count(where) == len(wanted)


plain_filter = st.lists(condition, max_size=2, unique_by=lambda pair: pair[0]).map(
    lambda conditions: {key: {op: value} for key, (op, value) in conditions}
)
nested_filter = st.recursive(
    plain_filter,
    lambda inner: st.tuples(
        plain_filter, st.just({}) | inner.map(lambda one: {"$not": one}), st.lists(inner, max_size=3)
    ).map(lambda parts: parts[0] | parts[1] | ({"$or": parts[2]} if parts[2] else {})),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(query=nested_filter)
def test_filters_within_filters_return_the_rows_that_plain_python_selects(rows, query):
    index, plain = rows
    where = Filter.parse(query)
    wanted = {row["id"] for row in plain if selects(row, query)}
    assert {item.id for item in index.page(100, where=where)} == wanted
    found = index.search(np.ones(2), 100, where)
    assert {item.id for item, _ in found} == wanted


def test_many_alternatives_and_deep_filters_are_searched(rows):
    index, plain = rows
    alternatives = {"$or": [{"height": i % 5} for i in range(100)]}
    assert index.count(Filter.parse(alternatives)) == len(plain)
    deep = {"height": 1}
    for _ in range(7):
        deep = {"$not": deep}
    assert index.count(Filter.parse(deep)) == sum(row["height"] != 1 for row in plain)


def test_a_bare_value_means_equality_and_null_means_no_value(rows):
    index, plain = rows
    assert index.count(Filter.parse({"flag": True})) == sum(row.get("flag") is True for row in plain)
    assert index.count(Filter.parse({"flag": None})) == sum("flag" not in row for row in plain)
    assert index.count(Filter.parse({})) == len(plain)


def test_two_operators_on_a_key_must_both_hold(rows):
    index, plain = rows
    wanted = sum(0 <= row["height"] < 2 for row in plain)
    assert index.count(Filter.parse({"height": {"gte": 0, "lt": 2}})) == wanted


def test_equal_filters_are_the_same_key_of_a_dictionary():
    given = {"a": {"in": ["x", 1, None]}, "b": 2.5}
    assert len({Filter.parse(given), Filter.parse(given)}) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a b": 1}, '"a b" is not a key'),
        ({"a`": 1}, '"a`" is not a key'),
        ({"a\n": 1}, r'"a\\n" is not a key'),
        ({3: 1}, "3 is not a key"),
        ({"a" * 65: 1}, "is not a key"),
        ({"a": {}}, "The filter on a is empty"),
        ({"a": {"like": "x"}}, 'The filter on a has an unknown operator "like"; known are eq, ne'),
        ({"a": {"in": "abc"}}, 'The filter `in` on a needs a list, not "abc"'),
        ({"a": {"in": list(range(10_001))}}, "The filter `in` on a has 10,001 values"),
        ({"a": [1]}, r"The filter on a compares with \[1\]"),
        ({"a": {"gt": None}}, "The filter on a compares with null by `gt`, which needs text or a number"),
        ({"a": {"lt": True}}, "The filter on a compares with true by `lt`, which needs text or a number"),
        ({"a": float("nan")}, "The filter on a compares with NaN"),
        ({"a": float("inf")}, "The filter on a compares with Infinity"),
        ({"a": 2**63}, "The filter on a compares with 9223372036854775808, which does not fit in 64 bits"),
        ({"a": "\ud800"}, r'The filter on a compares with "\\ud800", which is not valid text'),
        ([1], r"A filter is an object of keys and values, not \[1\]"),
        ({"a": {"contains": 3}}, "The filter on a compares with 3 by `contains`, which needs text"),
        ({"$or": []}, r"\$or needs a list of filters, not \[\]"),
        ({"$or": {"a": 1}}, r"\$or needs a list of filters, not"),
        ({"$not": [1]}, "A filter is an object of keys and values"),
        ({"$and": []}, r'"\$and" is not a key'),
        ({"$or": [{"a": 1}] * 101}, "The filter has 101 conditions; the limit is 100"),
        ({"$or": [{}] * 50_000}, "The filter has 50,000 conditions; the limit is 100"),
        ({"$or": [{"$not": {}}] * 101}, "The filter has 101 conditions; the limit is 100"),
        ({"$or": [{"a": {"in": list(range(6000))}}] * 2}, "The filter has 12,000 values; the limit is 10,000"),
        (reduce(lambda inner, _: {"$not": inner}, range(9), {}), "more than 8 filters within each other"),
    ],
)
def test_an_invalid_filter_is_refused_by_name(given, message):
    with pytest.raises(FilterProblem, match=message):
        Filter.parse(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"colour": "red"}, "No item has the key colour. The keys are .*word"),
        ({"vector": 1}, "No item has the key vector"),
        ({"few": "red"}, 'The filter on few compares with "red", but few is a whole number'),
        ({"word": 3}, "The filter on word compares with 3, but word is text"),
        ({"flag": 1}, "The filter on flag compares with 1, but flag is true or false"),
        ({"few": {"in": [1, True]}}, "The filter on few compares with true"),
    ],
)
def test_a_filter_with_an_unknown_key_or_another_type_is_refused_by_name(rows, given, message):
    with pytest.raises(UnknownKey, match=message):
        rows[0].count(Filter.parse(given))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (
            "label=shirt price>=3 colour=red,blue",
            {"label": "shirt", "price": {"gte": 3}, "colour": {"in": ["red", "blue"]}},
        ),
        ("price>3 price<=9.5", {"price": {"gt": 3, "lte": 9.5}}),
        ("sold=true brand!=acme", {"sold": True, "brand": {"ne": "acme"}}),
        ("year=null", {"year": None}),
        ("label=7 id=12", {"label": "7", "id": "12"}),
        ('sku="42" name="a b,c"', {"sku": "42", "name": "a b,c"}),
        ('note="she said \\"no\\""', {"note": 'she said "no"'}),
        ("code=0012 day=2024-01-01", {"code": "0012", "day": "2024-01-01"}),
        ("path=/a/b=c.png", {"path": "/a/b=c.png"}),
        ("depth<-3", {"depth": {"lt": -3}}),
        ("name~dress label=a", {"name": {"contains": "dress"}, "label": "a"}),
        ('{"price": {"gte": 3, "lt": 9}}', {"price": {"gte": 3, "lt": 9}}),
    ],
)
def test_a_shell_condition_means_a_json_filter(typed, meant):
    assert parse_shell(typed) == Filter.parse(meant)


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("label", "label is not a condition"),
        ("label=shirt and more", "and more is not a condition"),
        ("label=", "label= is not a condition"),
        ('name="open', 'name="open is not a condition'),
        ("price>3,4", "price>3,4 compares with several values"),
        ("price>3 price>4", "uses price> twice"),
        ("  ", "is empty"),
        ('{"label": ', "is not valid JSON"),
        ('{"label": {"like": "x"}}', 'an unknown operator "like"'),
    ],
)
def test_an_invalid_shell_condition_is_named(typed, sentence):
    with pytest.raises(FilterProblem, match=sentence.replace("{", "\\{")):
        parse_shell(typed)


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
        (["Summer dress, blue", "label=hat"], {"name": {"contains": "Summer dress, blue"}, "label": {"in": ["hat"]}}),
    ],
)
def test_conditions_of_the_page_mean_a_json_filter(typed, filter):
    assert parse_conditions(typed) == filter
    Filter.parse(filter or {})


@pytest.mark.parametrize("typed", ["label=", " ", "label=,", "=shirt", "price>3,4", 'a="open', "2b=3"])
def test_an_invalid_condition_of_the_page_is_named(typed):
    with pytest.raises(FilterProblem, match="is not a condition like label=shirt") as error:
        parse_conditions(["label=hat", typed])
    assert str(error.value).startswith(typed)


def test_two_different_limits_of_one_kind_are_refused():
    with pytest.raises(FilterProblem, match=r"^price>4 sets a second limit"):
        parse_conditions(["price>3", "price>4"])


def test_every_sign_of_the_table_is_read_by_shell_and_page_alike():
    for entry in OPERATORS.values():
        if entry.sign:
            key, value = ("name", "3") if entry.texts_only else ("size", 3)
            meant = Filter.parse({key: {entry.key: value}})
            assert parse_shell(f"{key}{entry.sign}3") == meant
            typed = Filter.parse(parse_conditions([f"{key} {entry.sign} 3"]))
            assert typed in (meant, Filter.parse({key: {"in": [value]}}))
