import asyncio
import re

import gradio as gr
import pytest

from serving.client import Pair, ServiceError
from ui.search.picture import Picture
from ui.search.query import Query
from ui.tabs.views import ViewsTab, batch_html, pairs_html
from ui.widgets import augmentation

SETTINGS = {"crop_area": (0.3, 1.0), "flip": 0.5}
CAT = Picture("cat.jpg", id="id1")


def test_pairs_stand_side_by_side_with_their_cosine_and_the_mean(fake):
    words, html = asyncio.run(pairs_html(fake(), CAT, 4, 0, SETTINGS))
    assert "these 4 pairs under h: <b>0.38</b>" in words  # of 0, 1/4, 2/4, 3/4
    assert re.findall(r'<span class="score">([^<]*)</span>', html) == ["0.00", "0.25", "0.50", "0.75"]
    assert html.count('alt="One view of the picture"') == html.count('alt="Another view of the picture"') == 4


def test_with_a_projection_head_both_cosines_are_shown(fake, monkeypatch):
    client = fake()

    async def views(*_, **__):
        return [Pair(("data:a", "data:b"), 0.9, 0.5), Pair(("data:a", "data:b"), 0.7, 0.1)]

    monkeypatch.setattr(client, "views", views)
    words, html = asyncio.run(pairs_html(client, CAT, 2, 0, SETTINGS))
    assert "these 2 pairs under h: <b>0.80</b>, under z = g(h): <b>0.30</b>" in words
    assert "<i>h</i> 0.90</span><span><i>z</i> 0.50" in html


def test_one_pair_is_not_called_several(fake):
    assert "Mean cosine of this pair" in asyncio.run(pairs_html(fake(), CAT, 1, 0, SETTINGS))[0]


def test_sliders_reach_the_service_under_the_names_of_the_augmentation(fake):
    client = fake()
    asyncio.run(pairs_html(client, CAT, 2.0, 7.0, SETTINGS))
    assert client.asked[-1] == ("views", b"a thumbnail", 2, 7, SETTINGS)


@pytest.mark.slow
def test_presets_of_the_page_are_those_of_pretraining():
    config = pytest.importorskip("training.config")
    for name, of_page in (("aerial", "Aerial"), ("microscopy", "Microscopy"), ("cifar", "CIFAR-10")):
        assert augmentation.PRESETS[of_page] == vars(config.PRESETS[name][1].augment)


@pytest.mark.slow
def test_the_controls_are_all_settings_of_pretraining_and_begin_with_its_defaults(in_loop):
    training = pytest.importorskip("training.augment")

    def build():
        with gr.Blocks():
            sliders, sampling = augmentation.controls()
            return [control.value for control in (*sliders, sampling)]

    values = in_loop(build)
    settings = augmentation.settings(values)
    assert training.AugmentSettings(**settings) == training.AugmentSettings()
    assert set(settings) == set(vars(training.AugmentSettings()))
    for preset in augmentation.PRESETS.values():
        training.AugmentSettings(**preset)
        assert augmentation.settings(augmentation.values(preset)) == preset
    assert augmentation.settings([0.9, 0.2, *values[2:]])["crop_area"] == (0.2, 0.9)


def test_the_augmentation_in_the_encoders_card_is_a_preset():
    trained = dict(augmentation.PHOTOGRAPHS, crop_area=[0.25, 1.0])
    values = augmentation.from_card({"training": {"settings": {"augment": trained}}})
    assert values == trained | {"crop_area": (0.25, 1.0)}
    older = {name: value for name, value in trained.items() if name not in ("gamma", "rotation")}
    assert augmentation.from_card({"training": {"settings": {"augment": older}}}) == values
    for card in ({}, {"training": {}}, {"training": {"settings": {"augment": {"flip": 1}}}}):
        assert augmentation.from_card(card) is None


def test_the_current_picture_is_the_first_of_the_batch_if_there_is_one(fake):
    client = fake()
    asyncio.run(batch_html(client, CAT, 4.0, 2.0, "others", SETTINGS))
    asyncio.run(batch_html(client, None, 3, 0, "pictures", SETTINGS))
    asked = [one for one in client.asked if one[0] == "matrix"]
    assert asked == [
        ("matrix", [b"a thumbnail"], 4, 2, "others", SETTINGS),
        ("matrix", [], 3, 0, "pictures", SETTINGS),
    ]


def test_the_batch_begins_at_the_temperature_of_training(fake, monkeypatch):
    client = fake()
    assert 'value="0.2"' in asyncio.run(batch_html(client, None, 3, 0, "pictures", SETTINGS))

    async def models():
        return [{"id": "fake", "training": {"settings": {"temperature": 0.5}}}]

    monkeypatch.setattr(client, "models", models)
    assert 'value="0.5"' in asyncio.run(batch_html(client, None, 3, 0, "pictures", SETTINGS))


@pytest.fixture
def page_of(in_loop):
    """page_of(client) -> its functions."""

    def build(client):
        with gr.Blocks() as page, gr.Tabs() as tabs, gr.Tab("Here"):
            ViewsTab(client, gr.State(()), gr.Dropdown(["pictures"]), tabs, page, gr.State(0), gr.State("Similar"))
        return list(page.fns.values())

    return lambda client: in_loop(build, client)


@pytest.mark.slow
def test_views_are_drawn_only_while_shown_and_ask_for_a_picture(fake, page_of):
    client = fake()
    named = {fn.name: fn.fn for fn in page_of(client)}
    values = augmentation.values(augmentation.PHOTOGRAPHS)
    looked_at = (Query((CAT,)),)
    asyncio.run(named["draw"](looked_at, "Map", 3, 0, *values))
    asyncio.run(named["compare"](looked_at, "Map", "pictures", 3, 0, *values))
    assert client.asked == []
    assert "Choose a picture first" in asyncio.run(named["draw"]((), "Views", 3, 0, *values))[1]
    assert asyncio.run(named["draw"](looked_at, "Views", 3, 0, *values))[1].count('class="pair"') == 3
    assert 'class="batch"' in asyncio.run(named["compare"]((), "Views", "pictures", 3, 0, *values))
    small = fake(failure=ServiceError("image: two pictures at least", 400, "malformed", "image"))
    failing = {fn.name: fn.fn for fn in page_of(small)}
    assert "two pictures at least" in asyncio.run(failing["compare"]((), "Views", "pictures", 3, 0, *values)).lower()


@pytest.mark.slow
def test_the_sliders_begin_as_the_encoder_was_trained_and_stay_as_they_are_set(fake, page_of, monkeypatch):
    client = fake()
    augment = augmentation.PHOTOGRAPHS | {"strength": 0.3, "crop_area": [0.3, 1.0]}

    async def models():
        return [{"id": "fake", "training": {"settings": {"augment": augment}}}]

    monkeypatch.setattr(client, "models", models)
    refresh = next(fn.fn for fn in page_of(client) if fn.name == "refresh")
    trained, button, *sliders = asyncio.run(refresh("Views", None))
    assert button["visible"] and sliders == augmentation.values(trained)
    assert trained["strength"] == 0.3 and trained["crop_area"] == (0.3, 1.0)
    again = asyncio.run(refresh("Views", trained))
    assert again[0] == trained and all(value == gr.skip() for value in again[2:]), "what the user set stays"
    client.asked.clear()
    assert asyncio.run(refresh("Map", trained))[0] == trained and client.asked == []


@pytest.mark.slow
def test_programs_ask_for_views_and_matrix_by_name(fake, page_of):
    named = {fn.api_name: fn.fn for fn in page_of(fake()) if fn.api_visibility == "public"}
    assert set(named) == {"views", "matrix"}
    assert asyncio.run(named["views"]("id1", pairs=2))[1]["similarity"] == 0.25
    assert asyncio.run(named["matrix"](count=2))["h"][0] == [1.0, 0.5, 0.25, 0.25]
