"""The tab Invariance: how far the embedding h moves as one augmentation grows stronger."""

from collections.abc import AsyncIterator
from dataclasses import asdict
from html import escape
from typing import Any

import gradio as gr

from serving.client import COLLECTION, AsyncClient, ServiceError
from ui.api import EACH, QUIET, publish
from ui.assets import raw_html
from ui.search.picture import Picture, UploadFailed, notice, read
from ui.search.query import Trail
from ui.tabs.tab import Tab
from ui.widgets.chart import panels_html

EXPLANATION = (
    "One property of each picture is changed, step by step. The lines show how far the embedding h moves: 0 % is no "
    "change, 100 % is the distance to a different picture. A flat line means that the encoder ignores the change."
)
WORKING = "Embedding {count} pictures, each changed in 26 ways. The first time takes longer, because PyTorch is loaded."
OTHER_ENCODER = 409  # status for a collection that holds vectors of another encoder
EMPTY = "This compares pictures of the collection, which has fewer than two. Add some, then come back."


async def examine(client: AsyncClient, picture: Picture | None, count: int, seed: int, collection: str) -> str:
    """A sentence about what changes h most and least, and the curves. Raises ServiceError, UploadFailed."""
    image = await read(client, picture) if picture else None
    invariance = await client.invariance(image, int(count), int(seed), collection=collection)
    finding = f'<p class="finding">{escape(invariance.sentence)}</p>'
    return finding + panels_html(invariance, picture.name if picture else None)


class InvarianceTab(Tab):
    """Computes only while it is the selected tab."""

    title = "Invariance"

    def build(self) -> None:
        with gr.Row(elem_id="examining"):
            raw_html(f'<p class="explanation">{EXPLANATION}</p>')
            self.count = gr.Slider(2, 64, value=16, step=1, label="Pictures", elem_id="examined-count")
            self.others = gr.Button("Other pictures", size="sm", elem_id="others")
        self.curves = raw_html(elem_id="curves")
        self.seed = gr.State(0)

    def connect(self) -> None:
        inputs = [self.trail, self.selected, self.count, self.seed, self.collection]
        refreshing: dict[str, Any] = {
            "fn": self.refresh,
            "inputs": inputs,
            "outputs": self.curves,
            **QUIET,
        }
        self.selected.change(**refreshing)
        self.others.click(lambda seed: seed + 1, self.seed, self.seed, **EACH).then(**refreshing)
        gr.on([self.trail.change, self.count.release, self.collection.change], **refreshing)
        publish(self.invariance, "invariance")

    async def refresh(self, trail: Trail, selected: str, count: int, seed: int, collection: str) -> AsyncIterator[Any]:
        if selected != self.title:
            yield gr.skip()
            return
        yield f'<p class="notice working" role="status">{WORKING.format(count=int(count))}</p>'
        try:
            yield await examine(self.client, trail[-1].picture if trail else None, count, seed, collection)
        except (ServiceError, UploadFailed) as error:
            of_collection = isinstance(error, ServiceError) and error.param in ("collection", "name")
            other_encoder = isinstance(error, ServiceError) and error.status == OTHER_ENCODER
            yield notice(EMPTY if of_collection and not other_encoder else str(error))

    async def invariance(
        self, id: str = "", collection: str = COLLECTION, count: int = 16, seed: int = 0
    ) -> dict[str, Any]:
        """id: an item to follow; by default the first picture of the sample."""
        image = await self.client.thumbnail(id, collection=collection) if id else None
        return asdict(await self.client.invariance(image, count, seed, collection=collection))
