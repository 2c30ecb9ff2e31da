"""The tab of augmented views: pairs of one picture, and a little batch as the loss sees it."""

from dataclasses import asdict
from html import escape
from statistics import mean

import gradio as gr

from serving.client import Pair, ServiceError
from serving.client.calls import COLLECTION
from ui.api import publish
from ui.search.picture import Chosen, UploadFailed, notice, read
from ui.search.query import Query
from ui.widgets import augmentation, matrix

TITLE = "Views"
EXPLANATION = (
    "SimCLR draws two random views of every picture and trains the encoder to place the two views of one picture "
    "close together and those of different pictures apart: whatever the views vary, it learns to overlook."
)
NOTHING = "Choose a picture first: drop one anywhere on this page, or click one under Similar."
BATCH = (
    "<h2>A small batch, as the loss sees it</h2><p>Two views of each picture: the one you look at, and others of the "
    "collection. Each view has to be recognised as its partner's among all; the temperature says how much the "
    "hardest of the others count.</p>"
)
CSS = """
.pair .score { display: flex; justify-content: center; gap: 14px; }
.pair .score i, #summary i { font-style: normal; font-weight: 400; color: var(--body-text-color-subdued); }
"""


async def drawn(client, chosen: Chosen, pairs: int, seed: int, settings: dict) -> tuple[str, str]:
    """The mean cosines in words, and the pairs side by side. raises ServiceError, UploadFailed."""
    found = await client.views(await read(client, chosen), pairs=int(pairs), seed=int(seed), **settings)
    of = "this pair" if len(found) == 1 else f"these {len(found)} pairs"
    under = f"under h: <b>{mean(pair.similarity for pair in found):.2f}</b>"
    if found[0].projected is not None:
        under += f", under z = g(h): <b>{mean(pair.projected for pair in found):.2f}</b>"
    summary = f"<p>Mean cosine of {of} {under} <i>Drawn as small as the encoder sees them.</i></p>"
    return summary, f'<ul class="pairs">{"".join(map(_pair_html, found))}</ul>'


def _pair_html(pair: Pair) -> str:
    images = "".join(
        f'<img src="{escape(view)}" alt="{which} view of the picture">'
        for which, view in zip(("One", "Another"), pair.views, strict=True)
    )
    cosines = {"h": pair.similarity} | ({} if pair.projected is None else {"z": pair.projected})
    scores = f"{pair.similarity:.2f}" if len(cosines) == 1 else _named(cosines)
    return f'<li class="pair">{images}<span class="score">{scores}</span></li>'


def _named(cosines: dict[str, float]) -> str:
    return "".join(f"<span><i>{name}</i> {cosine:.2f}</span>" for name, cosine in cosines.items())


async def batch(client, chosen: Chosen | None, count: int, seed: int, collection: str, settings: dict) -> str:
    """The matrix, or why there is none. raises ServiceError, UploadFailed."""
    images = [await read(client, chosen)] if chosen else []
    found = await client.matrix(images, int(count), int(seed), collection=collection, **settings)
    cards = await client.models()
    told = (cards[0].get("training") or {}).get("settings") or {} if cards else {}
    return matrix.matrix_html(found, told.get("temperature") or matrix.TEMPERATURE)


def tab(client, trail: gr.State, collection: gr.Dropdown, tabs: gr.Tabs) -> None:
    """Build the tab. It draws views only while it is the one in sight."""
    gr.HTML(f'<p class="explanation">{EXPLANATION}</p>', apply_default_css=False)
    with gr.Row(elem_id="presets"):
        trained = gr.Button(augmentation.TRAINED, size="sm", elem_id="as-trained", visible=False)
        presets = {name: gr.Button(name, size="sm") for name in augmentation.PRESETS}
    with gr.Row(elem_id="settings"):
        settings = augmentation.controls()
        count = gr.Slider(1, 16, value=6, step=1, label="Pairs", elem_id="pair-count")
        seed = gr.Slider(0, 999, value=0, step=1, label="Seed", elem_id="seed")
    with gr.Row(elem_id="drawing"):
        summary = gr.HTML(apply_default_css=False, elem_id="summary")
        again = gr.Button("Draw again", size="sm", elem_id="again")
    pairs = gr.HTML(notice(NOTHING), apply_default_css=False, elem_id="pairs")
    with gr.Row(elem_id="batch-bar"):
        gr.HTML(BATCH, apply_default_css=False, elem_classes="heading")
        of_batch = gr.Slider(2, 12, value=6, step=1, label="Pictures", elem_id="batch-count")
    grid = gr.HTML(js_on_load=matrix.JS, apply_default_css=False, elem_id="matrix")
    in_sight = gr.State(False)
    known = gr.State(None)  # what the encoder was trained with

    async def look(event: gr.SelectData):
        if event.value != TITLE:
            return False, None, gr.skip()
        try:
            cards = await client.models()
        except ServiceError:  # drawing will say it
            cards = []
        told = augmentation.of_card(cards[0]) if cards else None
        return True, told, gr.update(visible=told is not None)

    async def draw(trail: tuple[Query, ...], in_sight: bool, count: int, seed: int, *values):
        if not in_sight:
            return gr.skip()
        if not trail:
            return "", notice(NOTHING)
        try:
            return await drawn(client, trail[-1].picture, count, seed, augmentation.settings(values))
        except (ServiceError, UploadFailed) as error:
            return "", notice(str(error))

    async def compare(trail: tuple[Query, ...], in_sight: bool, collection: str, count: int, seed: int, *values):
        if not in_sight:
            return gr.skip()
        chosen = trail[-1].picture if trail else None
        try:
            return await batch(client, chosen, count, seed, collection, augmentation.settings(values))
        except (ServiceError, UploadFailed) as error:
            return notice(str(error))

    def next_seed(seed: int) -> int:
        return (int(seed) + 1) % 1000

    async def views(
        id: str, collection: str = COLLECTION, pairs: int = 4, seed: int = 0, settings: dict | None = None
    ) -> list[dict]:
        """Of an item; settings: those of the augmentation."""
        image = await client.thumbnail(id, collection=collection)
        return [asdict(pair) for pair in await client.views(image, pairs, seed, **(settings or {}))]

    async def matrix_(
        id: str = "", collection: str = COLLECTION, count: int = 6, seed: int = 0, settings: dict | None = None
    ) -> dict:
        """Of an item and others of the collection; without one, of others alone."""
        images = [await client.thumbnail(id, collection=collection)] if id else []
        found = await client.matrix(images, count, seed, collection=collection, **(settings or {}))
        cosines = {name: one if one is None else one.tolist() for name, one in (("h", found.h), ("z", found.z))}
        return {"model": found.model, "pictures": [asdict(picture) for picture in found.pictures]} | cosines

    silent = {"show_progress": "hidden", "api_visibility": "private"}
    drawing = {"fn": draw, "inputs": [trail, in_sight, count, seed, *settings], "outputs": [summary, pairs]}
    drawing |= {"show_progress_on": pairs, "trigger_mode": "always_last", "api_visibility": "private"}
    comparing = {"fn": compare, "inputs": [trail, in_sight, collection, of_batch, seed, *settings], "outputs": grid}
    comparing |= {"trigger_mode": "always_last", "api_visibility": "private"}
    tabs.select(look, None, [in_sight, known, trained], **silent).then(**drawing).then(**comparing)
    again.click(next_seed, seed, seed, **silent).then(**drawing).then(**comparing)
    trained.click(augmentation.values, known, settings, **silent).then(**drawing).then(**comparing)
    for name, button in presets.items():
        set_to = augmentation.values(augmentation.PRESETS[name])
        button.click(lambda set_to=set_to: set_to, None, settings, **silent).then(**drawing).then(**comparing)
    *sliders, sampling = settings
    released = [slider.release for slider in (*sliders, seed)]
    gr.on([trail.change, sampling.input, *released], **drawing).then(**comparing)
    count.release(**drawing)
    gr.on([of_batch.release, collection.change], **comparing)
    publish(views, "views")
    publish(matrix_, "matrix")
