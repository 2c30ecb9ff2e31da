"""The tab Invariance: how far the embedding h moves as one augmentation grows stronger."""

from collections.abc import AsyncIterator
from dataclasses import asdict
from html import escape
from typing import Any

import gradio as gr

from serving.client import COLLECTION, AsyncClient, ServiceError
from ui.api import QUIET, publish
from ui.assets import raw_html
from ui.search.picture import Picture, UploadFailed, notice, read
from ui.search.query import Trail
from ui.tabs.tab import Tab
from ui.widgets.chart import panels_html

EXPLANATION = (
    "Each picture is changed in one way only, more and more: how far does its embedding h go? At 0 % it stays where it "
    "was, at 100 % it has gone as far as to another picture. A flat line: the encoder overlooks it."
)
WORKING = "Looking at {count} pictures, each changed in 26 ways. The first time, PyTorch has to be loaded for it."
EMPTY = "This compares pictures of the collection, which has fewer than two. Add some, then come back."


async def examine(client: AsyncClient, picture: Picture | None, count: int, seed: int, collection: str) -> str:
    """A sentence about what changes h most and least, and the curves. Raises ServiceError, UploadFailed."""
    image = await read(client, picture) if picture else None
    invariance = await client.invariance(image, int(count), int(seed), collection=collection)
    finding = f'<p class="finding">{escape(invariance.sentence)}</p>'
    return finding + panels_html(invariance, picture.name if picture else None)


class InvarianceTab(Tab):
    """It computes only while it is the selected tab."""

    title = "Invariance"

    def build(self) -> None:
        with gr.Row(elem_id="examining"):
            raw_html(f'<p class="explanation">{EXPLANATION}</p>')
            self.count = gr.Slider(2, 64, value=16, step=1, label="Pictures", elem_id="examined-count")
            self.others = gr.Button("Other pictures", size="sm", elem_id="others")
        self.curves = raw_html(elem_id="curves")
        self.seed = gr.State(0)

    def connect(self) -> None:
        inputs = [self.trail, self.in_sight, self.count, self.seed, self.collection]
        looking: dict[str, Any] = {
            "fn": self.look,
            "inputs": inputs,
            "outputs": self.curves,
            "trigger_mode": "always_last",
            **QUIET,
        }
        self.tabs.select(self.is_selected, None, self.in_sight, **QUIET).then(**looking)
        self.others.click(lambda seed: seed + 1, self.seed, self.seed, **QUIET).then(**looking)
        gr.on([self.trail.change, self.count.release, self.collection.change], **looking)
        publish(self.invariance, "invariance")

    async def look(self, trail: Trail, in_sight: bool, count: int, seed: int, collection: str) -> AsyncIterator[Any]:
        if not in_sight:
            yield gr.skip()
            return
        yield f'<p class="notice working" role="status">{WORKING.format(count=int(count))}</p>'
        try:
            yield await examine(self.client, trail[-1].picture if trail else None, count, seed, collection)
        except (ServiceError, UploadFailed) as error:
            empty = isinstance(error, ServiceError) and error.param in ("collection", "name")
            yield notice(EMPTY if empty else str(error))

    async def invariance(
        self, id: str = "", collection: str = COLLECTION, count: int = 16, seed: int = 0
    ) -> dict[str, Any]:
        """id: an item to follow; by default the first picture of the sample."""
        image = await self.client.thumbnail(id, collection=collection) if id else None
        return asdict(await self.client.invariance(image, count, seed, collection=collection))
