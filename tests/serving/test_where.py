import pytest

from serving.protocol.filters import Filter, FilterProblem
from serving.protocol.where import parse


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
        ('{"price": {"gte": 3, "lt": 9}}', {"price": {"gte": 3, "lt": 9}}),
    ],
)
def test_what_is_typed_means_what_the_service_takes(typed, meant):
    assert parse(typed) == Filter.parse(meant)


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("label", "label is no condition"),
        ("label=shirt and more", "and more is no condition"),
        ("label=", "label= is no condition"),
        ('name="open', 'name="open is no condition'),
        ("price>3,4", "price>3,4 compares with several values"),
        ("price>3 price>4", "names price> twice"),
        ("  ", "is empty"),
        ('{"label": ', "is no JSON"),
        ('{"label": {"like": "x"}}', "no operator 'like'"),
    ],
)
def test_what_cannot_be_meant_is_named(typed, sentence):
    with pytest.raises(FilterProblem, match=sentence.replace("{", "\\{")):
        parse(typed)
