import asyncio
import re

import pytest

from serving.client import Item, Items, Run, RunDetails
from ui.search.picture import Picture
from ui.tabs.runs import MOST_POINTS, curves_html, list_html, settings_html, still_listed, views_html

NOW = 1_000_000.0
FACTS = {
    "kind": "pretraining",
    "state": "finished",
    "epoch": 2,
    "epochs": 2,
    "data": "Pictures.zip",
    "encoder": "tiny",
    "init": "",
    "figures": {"knn": 0.505},
    "changed": NOW - 7200,
}
AUGMENT = {"crop_area": [0.25, 1.0], "strength": 0.5}
METRICS = {
    "epoch": [1, 2],
    "step": [9, 18],
    "loss": [5.0, 4.0],
    "chance": [5.5, 5.5],
    "knn": [None, 0.505],
    "lr": [0.1, 0.0],
}


def run(name: str = "cats", **facts) -> Run:
    return Run(name=name, **FACTS | facts)


def detailed(name: str = "cats", settings=None, metrics=METRICS, chance=5.5, **facts) -> RunDetails:
    settings = {"lr": 0.1, "augment": AUGMENT} if settings is None else settings
    return RunDetails(name=name, **FACTS | facts, settings=settings, chance=chance, metrics=metrics)


def titles(html: str) -> list[str]:
    return re.findall(r"<figcaption><b>([^<]*)</b>", html)


def test_a_row_shows_the_epochs_and_the_best_figure():
    html = list_html([run(), run("dogs", state="training", epoch=1)], ["cats"], NOW)
    assert "kNN 50.5%" in html and "2 h ago" in html
    assert '<span class="state training">training now</span><span class="epochs">1 of 2</span>' in html
    assert re.findall(r'data-run="(\w+)" aria-pressed="(\w+)"', html) == [("cats", "true"), ("dogs", "false")]


def test_accuracy_is_preferred_to_figures_measured_during_training():
    assert "accuracy 80.0%" in list_html([run(figures={"held_out": 0.7, "knn": 0.5, "accuracy": 0.8})], [], NOW)


def test_the_newest_run_is_shown_if_none_is_chosen_or_the_chosen_are_deleted():
    runs = [run("new"), run("old")]
    assert still_listed(runs, ()) == still_listed(runs, ("gone",)) == ("new",)
    assert still_listed(runs, ("old", "gone")) == ("old",)
    assert still_listed([], ("gone",)) == ()


def test_the_run_that_is_served_is_marked_and_shown_first():
    runs = [run("new"), run("old")]
    assert still_listed(runs, (), "old") == ("old",) and still_listed(runs, ("new",), "old") == ("new",)
    assert still_listed(runs, (), "elsewhere") == ("new",)
    assert re.findall(r"<b>(\w+)</b> <i>served</i>", list_html(runs, [], NOW, "old")) == ["old"]


def test_losses_of_different_kinds_have_charts_of_their_own():
    both = [detailed(), detailed("small", kind="distillation", chance=None), detailed("dogs")]
    html = curves_html(both)
    assert titles(html) == ["Loss", "Loss of distillation", "kNN accuracy", "Learning rate"]
    first, second, third, _ = html.split("</figure>")[:4]
    assert [re.findall(r'class="(c\d)"><polyline', chart) for chart in (first, second, third)] == [
        ["c0", "c2"],
        ["c1"],
        ["c0", "c1", "c2"],
    ]
    assert "chance 5.5" in first and "chance" not in second


def test_shares_have_axes_up_to_a_hundred_percent_at_most():
    html = curves_html([detailed(metrics=METRICS | {"knn": [0.98, 0.99]})])
    assert ">100%<" in html and ">105%<" not in html


def test_measurements_have_charts_and_counters_have_none():
    assert titles(curves_html([detailed()])) == ["Loss", "kNN accuracy", "Learning rate"]
    odd = METRICS | {"contrast_accuracy": [0.1, 0.2], "held_out": [None, None]}
    assert titles(curves_html([detailed(metrics=odd)]))[-1] == "contrast accuracy"


def test_before_the_first_epoch_a_sentence_replaces_the_curves():
    assert "first epoch is not finished" in curves_html([detailed(metrics={})])


def test_chance_is_drawn_if_it_is_the_same_for_all_runs():
    assert "chance 5.5" in curves_html([detailed(), detailed("dogs")])
    assert "chance" not in curves_html([detailed(), detailed("dogs", chance=6.2)])
    assert "chance" not in curves_html([detailed(), detailed("dogs", chance=None)])


def test_a_long_curve_is_thinned_and_keeps_its_end():
    epochs = list(range(1, 2001))
    html = curves_html([detailed(metrics={"epoch": epochs, "loss": [1 / e for e in epochs]}, epoch=2000)])
    (points,) = re.findall(r'class="curve" points="([^"]*)"', html)
    assert MOST_POINTS / 2 < len(points.split()) <= MOST_POINTS
    assert "ends at 0.0005" in html


def test_several_runs_have_a_key_and_one_has_none():
    assert '<span class="c0">cats</span><span class="c1">dogs</span>' in curves_html([detailed(), detailed("dogs")])
    assert 'class="key"' not in curves_html([detailed()])


def test_settings_that_differ_come_first_and_are_marked():
    other = {"lr": 0.2, "augment": AUGMENT, "mode": "full", "compile": False}
    html = settings_html([detailed(), detailed("dogs", settings=other)])
    differing = re.findall(r'<tr class="differs"><th scope="row">([^<]*)</th><td>([^<]*)</td><td>([^<]*)</td>', html)
    assert differing == [("lr", "0.1", "0.2"), ("mode", "–", "full"), ("compile", "–", "no")]
    assert "2 settings that are the same" in html and "<td>0.25 to 1</td>" in html


def test_settings_of_one_run_are_all_there():
    html = settings_html([detailed()])
    assert re.findall(r"<dt>([^<]*)</dt>", html) == ["lr", "augment.crop_area", "augment.strength"]


def test_names_are_only_text():
    hostile = "<img src=x onerror=alert(1)>\"'${x}"
    both = [detailed(hostile, data=hostile, settings={hostile: hostile}), detailed()]
    html = list_html(both, [hostile], NOW) + curves_html(both) + settings_html(both) + settings_html(both[:1])
    assert "<img" not in html


def test_views_are_drawn_with_the_settings_of_each_run(fake):
    client = fake()
    html = asyncio.run(views_html(client, [detailed(), detailed("dogs")], Picture("mine", id="id1"), "pictures"))
    assert html.count('class="pair"') == 6 and "Views that dogs trained with" in html
    assert [asked[-1] for asked in client.asked if asked[0] == "views"] == [AUGMENT] * 2


@pytest.mark.parametrize(("items", "said"), [([], "collection is empty"), ([Item("id7", "a", None, None)], "pair")])
def test_without_a_picture_the_collections_first_is_used(fake, items, said):
    client = fake()

    async def first(limit, collection):
        return Items(len(items), items[:limit])

    client.items = first
    assert said in asyncio.run(views_html(client, [detailed()], None, "pictures"))
    assert not items or ("thumbnail", "id7") in client.asked
