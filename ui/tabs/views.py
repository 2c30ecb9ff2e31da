"""The tab Views: pairs of augmented views of one picture, and the views of a small batch, compared as in the loss."""

from dataclasses import asdict
from html import escape
from statistics import mean
from typing import Any

import gradio as gr

from serving.client import COLLECTION, AsyncClient, Pair, ServiceError
from ui.api import EACH, PRIVATE, QUIET, publish
from ui.assets import raw_html
from ui.search.picture import Picture, UploadFailed, notice, read
from ui.search.query import Trail
from ui.tabs.tab import Tab
from ui.widgets import augmentation, matrix
from ui.widgets.augmentation import Augmentation

EXPLANATION = (
    "SimCLR draws two random views of every picture and trains the encoder to place the two views of one picture "
    "close together and those of different pictures apart. So it learns to ignore what differs between views. The loss "
    "compares the projections z = g(h), and g drops what the views do not share, so z fits this task alone; searches "
    "use h, which keeps more of the picture."
)
NOTHING = "Choose a picture first: drop one anywhere on this page, or click one under Similar."
BATCH = (
    "<h2>A small batch, as the loss compares it</h2><p>Two views each of the current picture and of others in "
    "the collection. The loss asks for each view to be closest to the other view of its picture; the lower the "
    "temperature, the more the most similar of the other views count.</p>"
)


async def pairs_html(
    client: AsyncClient, picture: Picture, pairs: int, seed: int, settings: Augmentation
) -> tuple[str, str]:
    """HTML: a sentence with the mean cosines; the pairs side by side. Raises ServiceError, UploadFailed."""
    drawn = await client.views(await read(client, picture), pairs=int(pairs), seed=int(seed), **settings)
    which = "this pair" if len(drawn) == 1 else f"these {len(drawn)} pairs"
    means = f"under h: <b>{mean(pair.similarity for pair in drawn):.2f}</b>"
    projected = [pair.projected for pair in drawn if pair.projected is not None]
    if projected:
        means += f", under z = g(h): <b>{mean(projected):.2f}</b>"
    summary = f"<p>Mean cosine of {which} {means} <i>Shown at the resolution of the encoder.</i></p>"
    return summary, f'<ul class="pairs">{"".join(map(_pair_html, drawn))}</ul>'


def _pair_html(pair: Pair) -> str:
    images = "".join(
        f'<img src="{escape(view)}" alt="{which} view of the picture">'
        for which, view in zip(("One", "Another"), pair.views, strict=True)
    )
    scores = f"{pair.similarity:.2f}"
    if pair.projected is not None:
        scores = f"<span><i>h</i> {scores}</span><span><i>z</i> {pair.projected:.2f}</span>"
    return f'<li class="pair">{images}<span class="score">{scores}</span></li>'


async def batch_html(
    client: AsyncClient, picture: Picture | None, count: int, seed: int, collection: str, settings: Augmentation
) -> str:
    """The matrix of a batch, at the temperature of training if it is known. Raises ServiceError, UploadFailed."""
    images = [await read(client, picture)] if picture else []
    batch = await client.matrix(images, int(count), int(seed), collection=collection, **settings)
    cards = await client.models()
    trained = (cards[0].get("training") or {}).get("settings") or {} if cards else {}
    return matrix.matrix_html(batch, trained.get("temperature") or matrix.TEMPERATURE)


class ViewsTab(Tab):
    """Draws views only while it is the selected tab."""

    title = "Views"

    def build(self) -> None:
        raw_html(f'<p class="explanation">{EXPLANATION}</p>')
        with gr.Row(elem_id="presets"):
            self.as_trained = gr.Button(augmentation.TRAINED, size="sm", elem_id="as-trained", visible=False)
            self.presets = {name: gr.Button(name, size="sm") for name in augmentation.PRESETS}
        with gr.Row(elem_id="drawing"):
            self.summary = raw_html(elem_id="summary")
            self.again = gr.Button("Draw again", size="sm", elem_id="again")
        self.pairs = raw_html(notice(NOTHING), elem_id="pairs")
        with gr.Row(elem_id="batch-bar"):
            raw_html(BATCH, elem_classes="heading")
            self.batch_count = gr.Slider(2, 12, value=6, step=1, label="Pictures", elem_id="batch-count")
        self.batch = raw_html(scripts=["widgets/matrix"], elem_id="matrix")
        with (
            gr.Accordion("Settings of the augmentation", open=False, elem_id="augmentation"),
            gr.Row(elem_id="settings"),
        ):
            self.sliders, self.sampling = augmentation.controls()
            self.count = gr.Slider(1, 16, value=3, step=1, label="Pairs", elem_id="pair-count")
            self.seed = gr.Slider(0, 999, value=0, step=1, label="Seed", elem_id="seed")
        self.trained = gr.State(None)  # the augmentation that the encoder was trained with

    def connect(self) -> None:
        settings = [*self.sliders, self.sampling]
        inputs = [self.trail, self.selected, self.count, self.seed, *settings]
        drawing: dict[str, Any] = {"fn": self.draw, "inputs": inputs, "outputs": [self.summary, self.pairs], **PRIVATE}
        drawing |= {"show_progress_on": self.pairs}
        inputs = [self.trail, self.selected, self.collection, self.batch_count, self.seed, *settings]
        comparing: dict[str, Any] = {"fn": self.compare, "inputs": inputs, "outputs": self.batch, **PRIVATE}

        outputs = [self.trained, self.as_trained, *settings]
        refreshed = self.selected.change(self.refresh, [self.selected, self.trained], outputs, **QUIET)
        changes = [refreshed, self.again.click(self.next_seed, self.seed, self.seed, **EACH)]
        changes.append(self.as_trained.click(augmentation.values, self.trained, settings, **QUIET))
        for name, button in self.presets.items():
            values = augmentation.values(augmentation.PRESETS[name])
            changes.append(button.click(lambda values=values: values, None, settings, **QUIET))
        for change in changes:
            change.then(**drawing).then(**comparing)
        released = [slider.release for slider in (*self.sliders, self.seed)]
        gr.on([self.trail.change, self.sampling.input, *released], **drawing).then(**comparing)
        self.count.release(**drawing)
        gr.on([self.batch_count.release, self.collection.change], **comparing)
        publish(self.views, "views")
        publish(self.matrix, "matrix")

    async def refresh(self, selected: str, before: Augmentation | None) -> tuple[Any, ...]:
        """Sets the sliders as in training when the tab is opened first, and when another encoder is served."""
        unchanged = [gr.skip()] * (len(self.sliders) + 1)
        if selected != self.title:
            return before, gr.skip(), *unchanged
        try:
            cards = await self.client.models()
        except ServiceError:  # `draw` comes next and says why
            cards = []
        trained = augmentation.from_card(cards[0]) if cards else None
        sliders = unchanged if trained is None or trained == before else augmentation.values(trained)
        return trained, gr.update(visible=trained is not None), *sliders

    async def draw(self, trail: Trail, selected: str, count: int, seed: int, *values: Any) -> Any:
        if selected != self.title:
            return gr.skip()
        picture = trail[-1].picture if trail else None
        if picture is None:
            return "", notice(NOTHING)
        try:
            return await pairs_html(self.client, picture, count, seed, augmentation.settings(values))
        except (ServiceError, UploadFailed) as error:
            return "", notice(str(error))

    async def compare(self, trail: Trail, selected: str, collection: str, count: int, seed: int, *values: Any) -> Any:
        if selected != self.title:
            return gr.skip()
        picture = trail[-1].picture if trail else None
        try:
            return await batch_html(self.client, picture, count, seed, collection, augmentation.settings(values))
        except (ServiceError, UploadFailed) as error:
            return notice(str(error))

    def next_seed(self, seed: int) -> int:
        return (int(seed) + 1) % 1000

    # For programs

    async def views(
        self,
        id: str,
        collection: str = COLLECTION,
        pairs: int = 4,
        seed: int = 0,
        settings: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Pairs of views of an item. settings: of the augmentation."""
        image = await self.client.thumbnail(id, collection=collection)
        return [asdict(pair) for pair in await self.client.views(image, pairs, seed, **(settings or {}))]

    async def matrix(
        self,
        id: str = "",
        collection: str = COLLECTION,
        count: int = 6,
        seed: int = 0,
        settings: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The matrix of an item and others of the collection; without an item, of pictures of the collection only."""
        images = [await self.client.thumbnail(id, collection=collection)] if id else []
        batch = await self.client.matrix(images, count, seed, collection=collection, **(settings or {}))
        z = None if batch.z is None else batch.z.tolist()
        pictures = [asdict(picture) for picture in batch.pictures]
        return {"model": batch.model, "pictures": pictures, "h": batch.h.tolist(), "z": z}
